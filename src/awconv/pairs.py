"""Convolutions whose output goes to a norm and nowhere else, found by torch.fx."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx.proxy import Proxy

from awconv.convert import has_hooks

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_log = logging.getLogger(__name__)


def pairs(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[nn.Module, str, str]]:
    """Finds pairs in a module, and in the parts of it that can be traced where it cannot. The module is not changed.

    A trace is one path through a forward. Where a parameter has a default, both are followed, the default and a tensor,
    and a pair must be one on each. A container whose module cannot be traced is left: the module may call its parts one
    by one, and keep what is between them.

    Args:
        module: any, in evaluation mode.
        kinds: convolutions and norms.

    Yields:
        A module, and the names below it of a convolution and of its norm.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return  # which may change what is between them
    traces = _traces(module, kinds)
    if not traces:
        for child in _called(module):
            yield from pairs(child, kinds)
        return
    found = [_pairs_of(*trace) for trace in traces]
    for names in found[0]:
        if all(names in other for other in found[1:]):
            yield module, *names
    for name in {str(node.target) for graph, _ in traces for node in graph.nodes if node.op == "call_module"}:
        leaf = module.get_submodule(name)
        if leaf is not module and not isinstance(leaf, kinds) and has_hooks(leaf):
            yield from pairs(leaf, kinds)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a module that have a forward of their own to call."""
    for child in module.children():
        if type(child) in _CONTAINERS:
            yield from _called(child)
        else:
            yield child


class _Tensor(Proxy):
    """A proxy that is taken for a tensor by code that asks."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return torch.Tensor


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.kinds) or has_hooks(module) or super().is_leaf_module(module, qualified_name)

    def proxy(self, node: torch.fx.Node) -> Proxy:
        return _Tensor(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), Proxy) else super().create_arg(a)


def _traces(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[tuple[torch.fx.Graph, set[torch.fx.Node]]]:
    """Graphs of a module, and the nodes of each whose value an attribute keeps; none if it cannot be traced."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        traces = []
        for values in [defaults, None] if defaults else [None]:
            tensors = [*module.parameters(), *module.buffers()]
            copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})  # a forward may set attributes
            traces.append((_Tracer(kinds).trace(copied, values), _kept(copied)))
    except Exception:  # a forward can do anything, such as depend on values
        _log.debug("torch.fx cannot trace %s; its parts are traced by themselves", type(module).__name__)
        return []
    return traces


def _kept(module: nn.Module) -> set[torch.fx.Node]:
    found: set[torch.fx.Node] = set()

    def look(value: Any) -> None:
        if issubclass(type(value), Proxy):
            found.add(value.node)
        elif isinstance(value, list | tuple | set):
            for each in value:
                look(each)
        elif isinstance(value, dict):
            look(list(value.values()))

    for part in module.modules():
        look({name: value for name, value in vars(part).items() if name not in ("_modules", "_parameters", "_buffers")})
    return found


def _pairs_of(graph: torch.fx.Graph, kept: set[torch.fx.Node]) -> list[tuple[str, str]]:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        names = (str(before.target), str(node.target))
        if before not in kept and all(calls[name] == 1 and name not in read for name in names):
            found.append(names)
    return found
