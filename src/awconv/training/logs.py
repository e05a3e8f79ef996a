"""Where a training writes its logs."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

LOGS = "lightning_logs"


def loggers(root: str, claim: bool = False) -> list[Logger]:
    """Logs for TensorBoard and as CSV, under the next free number.

    Args:
        root: the folder of all logs.
        claim: make the numbered folder now, so that a training that starts at the same time takes another one.
    """
    boards = TensorBoardLogger(root, name=LOGS)
    while claim:
        try:
            Path(boards.log_dir).mkdir(parents=True)
            break
        except FileExistsError:
            if not Path(boards.log_dir).is_dir():  # what is in the way is above it
                raise
            boards = TensorBoardLogger(root, name=LOGS)  # which looks again
    return [boards, CSVLogger(boards.save_dir, name=LOGS, version=boards.version)]
