"""Networks whose parameters are shared out among processes (FSDP)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from awconv.odconv import WITH_BRANCHES

_LEAST = 1_000_000  # parameters of a block: smaller ones are gathered together with what is around them
_CONTAINERS = (nn.Sequential, nn.ModuleList)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shares out the parameters of a network among the processes of a mesh, in place, by ``torch``'s ``fully_shard``.

    The blocks of a network are gathered one by one, where they are large. An AW-convolution stays whole: on some paths
    it reads its branch's parameters without calling the branch.

    Args:
        network: a network; one that is shared out already stays as it is.
        mesh: the processes, of one dimension.
    """
    if isinstance(network, FSDPModule):
        return
    for block in reversed(list(_blocks(network))):  # the inner ones first
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The large modules that a container calls one after the other, the outer ones first."""
    for child in module.children():
        if isinstance(child, WITH_BRANCHES):
            continue
        called = isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS)
        if called and sum(parameter.numel() for parameter in child.parameters()) >= _LEAST:
            yield child
        yield from _blocks(child)


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with names of parameters, as one process has it: by numbers, in the groups' order."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    groups = [group | {"params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number[name]: of for name, of in state["state"].items()}, "param_groups": groups}


def by_name(state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """The inverse of :func:`by_number`.

    Args:
        state: with numbers.
        names: of the parameters of each group of the optimizer.

    Raises:
        ValueError: the groups have other numbers of parameters.
    """
    if [len(group["params"]) for group in state["param_groups"]] != [len(group) for group in names]:
        raise ValueError("the checkpoint's optimizer has other parameters than this training's")
    groups = [group | {"params": of} for group, of in zip(state["param_groups"], names, strict=True)]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    name = dict(zip(numbers, (name for group in names for name in group), strict=True))
    return {"state": {name[number]: of for number, of in state["state"].items()}, "param_groups": groups}
