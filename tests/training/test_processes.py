"""Processes that have lost others, without a training."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed

from awconv.training import processes
from awconv.training.processes import LostError, Processes

TRAINER: Any = SimpleNamespace(
    world_size=3,
    strategy=SimpleNamespace(launcher=None),
    state=SimpleNamespace(fn=TrainerFn.TESTING),
    checkpoint_callbacks=[],
)


def test_the_first_process_stays_until_the_others_have_read_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may notice a loss later, and would take it for gone, with the store that it keeps."""
    monkeypatch.setattr(processes, "_PATIENCE", timedelta(seconds=1.5))
    monkeypatch.setattr(processes, "_PAUSE", 0.05)
    stores = [distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(stores[0].port))
    members = [processes._Member(rank, "here" if rank < 2 else "there", rank == 0, {}) for rank in range(3)]
    first, second = Processes(), Processes()
    for process, me in ((first, members[0]), (second, members[1])):
        process._members, process._me = members, me
        threading.Thread(target=process._answer, daemon=True).start()
    lost = RuntimeError("gloo: connection closed by peer")

    def first_ends() -> None:
        with pytest.raises(LostError, match="process 0 on here has lost others: nothing is heard of process 2 on ther"):
            first.after(lost, TRAINER)
        stores.clear()

    ends = threading.Thread(target=first_ends)
    ends.start()
    time.sleep(2.2)  # more than the first one waits for answers
    with pytest.raises(SystemExit, match="1"):  # in silence, since the first of its host is there
        second.after(lost, TRAINER)
    ends.join()
    assert not stores
