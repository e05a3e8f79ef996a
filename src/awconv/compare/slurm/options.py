"""What a run's job asks SLURM for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from awconv.compare.time_limit import parse_duration
from awconv.training.recipe import Recipe
from awconv.usage import UsageError

_OURS = {  # sbatch's options that follow from ours, or from the run
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "gpus-per-node": "gpus",
    "cpus-per-task": "cpus",
    "mem": "memory",
}
_THE_RUNS = (
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "job-name",
    "signal",
    "requeue",
    "no-requeue",
    "output",
    "chdir",
    "error",
    "array",
)


@dataclass(frozen=True)
class SlurmOptions:
    """What each run's job asks for, and what becomes of the jobs if the command ends before them.

    Attributes:
        partition: where the jobs run; the cluster's default by default.
        account: whom they are charged to.
        qos: their quality of service.
        time: the longest a job may take, such as 4h or 90m. A run that needs longer writes a checkpoint before, and is
            queued again.
        notice: how long before its end a job is told to write a checkpoint, which it does after a step.
        gpus: number of GPUs of each node.
        cpus: number of cores of each process; those that SLURM gives by default.
        memory: of each node, such as 16GB; the cluster's default by default.
        options: further options of sbatch, such as {constraint: a100}.
        setup: lines of shell before the training, such as [module load cuda].
        leave: whether Ctrl-C and SIGTERM leave the jobs to themselves; else they end with the command.
        poll: seconds between two looks at the queue.

    Raises:
        UsageError: a value is out of its range, or an option is not to be set here.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "4h"
    notice: str = "90s"
    gpus: int = 0
    cpus: int | None = None
    memory: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    leave: bool = True
    poll: float = 10.0

    def __post_init__(self) -> None:
        for name, value, least in (("gpus", self.gpus, 0), ("cpus", self.cpus, 1)):
            if value is not None and value < least:
                raise UsageError(f"slurm.{name} must be at least {least}, got {value}")
        if not 0 < self.poll < math.inf:
            raise UsageError(f"slurm.poll must be a number of seconds above 0, got {self.poll}")
        time, notice = parse_duration(self.time, "slurm.time"), parse_duration(self.notice, "slurm.notice")
        if time < 60 or notice >= time:
            raise UsageError(
                f"slurm.time must be a minute or more, and longer than slurm.notice, got {self.time} and {self.notice}"
            )
        for name in self.options:
            if name.replace("_", "-") in _OURS:
                raise UsageError(f"slurm.options cannot hold {name}; give --slurm.{_OURS[name.replace('_', '-')]}")
            if name.replace("_", "-") in _THE_RUNS:
                raise UsageError(f"slurm.options cannot hold {name}, which follows from the run")

    def parameters(self, recipe: Recipe) -> dict[str, Any]:
        """Arguments of submitit's executor for a run.

        Args:
            recipe: of the run; the number of its nodes and devices is that of the job's nodes and processes.
        """
        trainer = recipe.settings.content["trainer"]
        devices = trainer.get("devices")
        tasks = devices if isinstance(devices, int) and devices > 0 else max(1, self.gpus)
        parameters = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": math.ceil(parse_duration(self.time) / 60),
            "signal_delay_s": math.ceil(parse_duration(self.notice)),
            "nodes": trainer.get("num_nodes") or 1,
            "ntasks_per_node": tasks,
            "gpus_per_node": self.gpus or None,
            "cpus_per_task": self.cpus,
            "mem": self.memory,
            "setup": self.setup or None,
            # srun does not take it from sbatch, from SLURM 22.05 on.
            "srun_args": None if self.cpus is None else [f"--cpus-per-task={self.cpus}"],
            "additional_parameters": {"requeue": True, **self.options},
            "stderr_to_stdout": True,
        }
        return {name: value for name, value in parameters.items() if value is not None}
