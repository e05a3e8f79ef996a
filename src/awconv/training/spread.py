"""How many processes a launcher has started: torchrun and SLURM say it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

_ALL = ("auto", "-1", "None")  # as many devices as there are


class Started(NamedTuple):
    """The processes that a launcher has started.

    Attributes:
        by: the launcher, and its option for the processes of a host.
        here: processes on this host.
        hosts: number of hosts.
    """

    by: str
    here: int
    hosts: int


def started() -> Started | None:
    """The processes that torchrun or srun has started for one training; None if it starts its own.

    Raises:
        ValueError: the hosts have different numbers of processes, or torchrun has started them again in a way that they
            cannot find each other.
    """
    if TorchElasticEnvironment.detect():
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            raise ValueError(
                "torchrun has started the processes again with the addresses of those that have ended; for restarts "
                "(--max-restarts), start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            )
        by, names = "torchrun (--nproc-per-node)", ("WORLD_SIZE", "GROUP_WORLD_SIZE")
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect():
        by, names = "srun (--ntasks-per-node)", ("SLURM_NTASKS", "SLURM_NNODES")
    else:
        return None
    processes, hosts = (int(os.environ.get(name, "1")) for name in names)
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else processes // hosts
    if here * hosts != processes:
        raise ValueError(
            f"{by} has started {processes} processes on {hosts} hosts, {here} of them on this one; start the same "
            "number on each"
        )
    return Started(by, here, hosts)


def as_started(trainer: Mapping[str, Any]) -> dict[str, int]:
    """The trainer's ``devices`` and ``num_nodes`` that fit what torchrun or srun has started.

    Args:
        trainer: the trainer's arguments.

    Returns:
        Both arguments; nothing if the training starts its own processes.

    Raises:
        ValueError: an argument contradicts the launcher.
    """
    there = started()
    if there is None:
        return {}
    devices, hosts = str(trainer.get("devices")), trainer.get("num_nodes") or 1
    given = {"devices": int(devices) if devices.isdecimal() else None, "num_nodes": hosts if hosts > 1 else None}
    fitting = {"devices": there.here, "num_nodes": there.hosts}
    wrong = [f"trainer.{name} is {value}" for name, value in given.items() if value not in (None, fitting[name])]
    if wrong:
        raise ValueError(
            f"{there.by} has started {there.here} processes on each of {there.hosts} hosts, and {' and '.join(wrong)}; "
            "leave out trainer.devices and trainer.num_nodes, which the launcher decides"
        )
    if given["devices"] is None and devices not in _ALL:  # named devices, which Lightning counts
        del fitting["devices"]
    return fitting
