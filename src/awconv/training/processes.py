"""Processes that train together: what they must agree on, and what is said when they lose each other."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed

from awconv.roles import Role
from awconv.training.settings import Settings
from awconv.training.watch import newest_checkpoint
from awconv.version import __version__

_LEAST, _MOST = 5, 86_400  # seconds
_PATIENCE = timedelta(seconds=5)  # with which answers are waited for
_PAUSE = 0.2  # seconds
_CALL, _HERE, _ERROR, _READ = "call", "here", "error", "read"  # what processes leave in the store
# What messages contain about an exchange that failed: gloo's, NCCL's and the store's.
_LOST = re.compile(
    r"gloo|NCCL|Connection (was )?(closed|reset|refused)|Broken pipe|TCPStore|client socket|clients joined|wait time",
    re.IGNORECASE,
)
# What processes must agree on, and how they come to.
_CHECKPOINT, _DATA, _VERSIONS = "the checkpoint", "the data", "the version"
_MEND = {
    _CHECKPOINT: "trainer.default_root_dir must be one folder that all hosts see, or --ckpt_path a file that all have",
    _DATA: "all hosts must read the same images",
    _VERSIONS: "install the same on all hosts",
}


class LostError(ConnectionError):
    """The processes of a training have lost each other."""


@dataclass(frozen=True)
class _Member:
    """One of the processes, as the others know it."""

    rank: int
    host: str
    first: bool  # of its host
    facts: Mapping[str, str]  # on which all must agree
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.rank} on {self.host}"


class Processes(pl.Callback):
    """Watches processes that train or evaluate together.

    Before the first step they compare settings, data, versions and the checkpoint that they go on from. When one of
    them ends, the others stop, and say which one it was. Does nothing where there is one process.

    Args:
        timeout: seconds that a process waits for the others before it gives them up: longer than the slowest of them
            takes for a step, a batch of an evaluation, or a checkpoint.

    Attributes:
        settings: of this training, to compare.
        checkpoint: that it goes on from, likewise.

    Raises:
        ValueError: ``timeout`` is out of its range.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        if not _LEAST <= timeout <= _MOST:
            raise ValueError(f"processes.timeout must be from {_LEAST} to {_MOST:,} seconds, got {timeout}")
        self.timeout = timedelta(seconds=timeout)
        self.settings: Settings | None = None
        self.checkpoint: str | None = None
        self._members: Sequence[_Member] = ()
        self._me: _Member | None = None

    def limit(self, trainer: pl.Trainer) -> None:
        """Makes the trainer wait no longer than ``timeout``, if the processes are not joined yet."""
        if hasattr(trainer.strategy, "_timeout"):
            trainer.strategy._timeout = self.timeout

    def new_group(self) -> Any:
        """A process group on the CPUs, whose exchanges wait for no device."""
        return distributed.new_group(backend="gloo", timeout=self.timeout)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compares what the processes must agree on.

        Raises:
            ValueError: they differ, and the message says in what. Only the first process of each host raises it; the
                others end in silence.
        """
        if trainer.world_size == 1 or self._members:
            return
        settings = {} if self.settings is None else self.settings.deciding(Role.RESULT)
        me = _Member(
            trainer.global_rank,
            socket.gethostname(),
            trainer.local_rank == 0,
            {_VERSIONS: f"awconv {__version__} with torch {torch.__version__}", **settings, **self._found(trainer)},
        )
        members: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(members, me, group=self.new_group())
        differing = _disagreement(members)
        if differing and me.first:
            raise ValueError(differing)
        if differing:
            raise SystemExit(1)
        self._members, self._me = members, me
        threading.Thread(target=self._answer, daemon=True).start()

    def _found(self, trainer: pl.Trainer) -> dict[str, str]:
        """What this process has found: its data, and the checkpoint to go on from."""
        data, fitting = trainer.datamodule, trainer.state.fn == TrainerFn.FITTING  # type: ignore[attr-defined]
        splits = ("train", "val") if fitting else ("val",) if trainer.state.fn == TrainerFn.VALIDATING else ("test",)
        images = [f"{len(there)} to {split}" for split in splits if (there := data.dataset(split)) is not None]
        checkpoint = self.checkpoint
        if checkpoint is not None and os.path.isfile(checkpoint):
            checkpoint = f"{os.path.basename(checkpoint)} of {os.path.getsize(checkpoint):,} bytes"
        return {_DATA: " and ".join(images) + f" in {len(data.classes)} classes", _CHECKPOINT: checkpoint or "none"}

    def after(self, error: Exception, trainer: pl.Trainer) -> None:
        """Tells the other processes of an error. If it is that they are lost, finds out what became of them.

        Raises:
            LostError: the others are lost. Of each host, only the first process that is left raises it; the others end
                in silence.
        """
        if trainer.world_size == 1:
            return
        lost = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
        if lost and self._me is None:
            raise LostError(
                f"the {trainer.world_size} processes have not come together within {self.timeout.total_seconds():g} s: "
                f"{_first_line(error)}; {_ADDRESSES}"
            ) from error
        if self._me is None:
            return
        store = _store()
        if not lost:
            with suppress(RuntimeError, AttributeError):  # without a store, the others cannot be told
                store.set(self._key(_ERROR, self._me), _first_line(error))
            return
        with _undisturbed():
            errors = self._call(store, getattr(trainer.strategy.launcher, "procs", []))
        here = [member.rank for member in self._members if member.host == self._me.host]
        if self._me.rank != min(rank for rank in here if errors.get(rank) == ""):
            raise SystemExit(1)
        raise LostError(self._report(error, errors, store is not None, trainer)) from error

    def _answer(self) -> None:
        """Answers when the processes are called, even while this one waits for others."""
        assert self._me is not None
        store = _store()
        with suppress(RuntimeError, AttributeError):  # the store is gone
            store.wait([self._key(_CALL)], timedelta(days=365))
            store.set(self._key(_HERE, self._me), "")

    def _call(self, store: Any, children: Sequence[Any]) -> dict[int, str]:
        """Calls all processes: their errors by rank, nothing of those that go on. Those that are gone are left out, but
        this process sees how its children ended."""
        assert self._me is not None
        errors, until = {self._me.rank: ""}, time.monotonic() + _PATIENCE.total_seconds()
        with suppress(RuntimeError, AttributeError):
            store.set(self._key(_CALL), "")
        while True:
            for member in self._members:
                with suppress(RuntimeError, AttributeError):
                    if member.rank not in errors and store.check([self._key(_ERROR, member)]):
                        errors[member.rank] = store.get(self._key(_ERROR, member)).decode()
                    elif member.rank not in errors and store.check([self._key(_HERE, member)]):
                        errors[member.rank] = ""
            for rank, child in enumerate(children, start=1):  # of Lightning's launcher
                status = child.poll()
                if rank not in errors and status is not None and status < 0:
                    errors[rank] = f"it was ended by {signal.Signals(-status).name}"
            if len(errors) == len(self._members) or time.monotonic() > until:
                break
            time.sleep(_PAUSE)
        self._part(store, [member for member in self._members[1:] if errors.get(member.rank) == ""])
        return errors

    def _part(self, store: Any, others: Sequence[_Member]) -> None:
        """Says that this process has read what became of the others. The first one, which may keep the store, waits
        until those that are there have said so, too."""
        assert self._me is not None
        until = time.monotonic() + _PATIENCE.total_seconds()
        with suppress(RuntimeError, AttributeError):
            store.set(self._key(_READ, self._me), "")
            while self._me.rank == 0 and time.monotonic() < until:
                if all(store.check([self._key(_READ, member)]) for member in others):
                    break
                time.sleep(_PAUSE)

    def _key(self, kind: str, member: _Member | None = None) -> str:
        return f"awconv/{self._members[0].token}/{kind}/{'' if member is None else member.rank}"

    def _report(self, error: Exception, errors: Mapping[int, str], reached: bool, trainer: pl.Trainer) -> str:
        said = [f"{member}: {errors[member.rank]}" for member in self._members if errors.get(member.rank)]
        silent = [str(member) for member in self._members if member.rank not in errors]
        if silent and not reached:
            said.append(f"the host of process 0, {self._members[0].host}, cannot be reached")
        elif silent:
            said.append(f"nothing is heard of {', '.join(silent)}")
        if not said:
            said.append(
                f"all are there, but did not answer within {self.timeout.total_seconds():g} s; where a step may take "
                "so long, give a larger --processes.timeout"
            )
        fitting, last = trainer.state.fn == TrainerFn.FITTING, newest_checkpoint(trainer)
        place = f" in epoch {trainer.current_epoch}, step {trainer.global_step}" if fitting else ""
        again = "start all processes again"
        if fitting:
            again += f" with --ckpt_path=last, to go on from {last}" if last else "; there is no checkpoint yet"
        return f"{self._me} has lost others{place}: {'; '.join(said)}. Then {again} ({_first_line(error)})"


_ADDRESSES = (
    "check that all hosts are started, and that each knows the addresses of the others (GLOO_SOCKET_IFNAME, or "
    "NCCL_SOCKET_IFNAME on GPUs, names the network interface)"
)


def _disagreement(members: Sequence[_Member]) -> str | None:
    """In what processes differ that must agree, in words."""
    first = members[0]
    for other in members[1:]:
        for name in (_VERSIONS, *sorted(first.facts.keys() | other.facts.keys())):
            there, here = first.facts.get(name, "not set"), other.facts.get(name, "not set")
            if there != here:
                mend = _MEND.get(name, "start all processes by the same command")
                return f"{name} differs between processes: {there} for {first}, {here} for {other}; {mend}"
    return None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignores SIGTERM, which torchrun sends to the others of a host as soon as one has ended. This one soon does."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _store() -> Any:
    """The store that process 0 or its launcher keeps; None if it cannot be reached."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "0")
    try:
        store = distributed.TCPStore  # type: ignore[attr-defined]
        return store(address, int(port), is_master=False, timeout=_PATIENCE, wait_for_workers=False)
    except (RuntimeError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return textwrap.shorten(next(iter(str(error).splitlines()), type(error).__name__), 200, placeholder=" ...")
