"""Trains a run of a comparison, resuming where it was interrupted, and writes its record."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from awconv.compare.comparison import Comparison, Run
from awconv.compare.record import Record
from awconv.compare.recorder import Progress, Recorder
from awconv.compare.shared_data import OpenedData
from awconv.compare.time_limit import StopInTime, TimeLimit, TimeOverError
from awconv.summary import summary
from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.class_report import ClassReport
from awconv.training.notice import NoticeError
from awconv.training.recipe import Recipe
from awconv.training.same import SameSettings
from awconv.training.stop import StopOnSigterm
from awconv.version import __version__


def train(
    comparison: Comparison,
    run: Run,
    opened: OpenedData,
    on_progress: Progress = lambda epochs, of: None,
    limit: TimeLimit | None = None,
    decoded: Path | None = None,
) -> Record:
    """Trains the network, resuming an interrupted run, tests it after the last epoch and writes the record.

    Args:
        comparison: that the run belongs to.
        run: the run.
        opened: the data sets of other runs, to share.
        on_progress: called after each batch with the epochs done so far and the number of all epochs.
        limit: ends the run when its time is over.
        decoded: the folder of data that were decoded for it, as of :meth:`OpenedData.of`.

    Raises:
        NoticeError: the time of the job of SLURM is nearly over, and a checkpoint is written.
        KeyboardInterrupt: the user pressed Ctrl-C, which Lightning makes a SystemExit of.
        SIGTERMException: SIGTERM came.
        TimeOverError: the time is over, and a checkpoint is written.
        ValueError: there is nothing to test on, or an interrupted run had other settings.
    """
    recorder = Recorder(on_progress)
    recipe, split = comparison.recipe(run), comparison.split
    built = recipe.build()
    model, trainer, data = built.model, built.trainer, opened.of(recipe, built, split, decoded)
    callbacks = [one for one in trainer.callbacks if not isinstance(one, ClassReport)]  # type: ignore[attr-defined]
    (stop,) = (one for one in callbacks if isinstance(one, StopOnSigterm))
    ours = [recorder, *([] if limit is None else [StopInTime(limit, stop)])]
    trainer.callbacks = [*ours, *callbacks]  # type: ignore[attr-defined]  # they are before checkpoints are written
    try:
        interrupted = _interrupted(comparison, run, recipe)
        with built.naming(interrupted):
            trainer.fit(model, datamodule=data, ckpt_path=interrupted)
        evaluate = trainer.test if split == "test" else trainer.validate
        (metrics,) = evaluate(model, datamodule=data, verbose=False)
    except NoticeError:
        raise
    except SIGTERMException as error:
        if stop.asked and not stop.received:
            raise TimeOverError from error
        raise
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    model.cpu()
    record = Record(
        variant=run.variant.name,
        network=model.network_name,
        seed=run.seed,
        parameters=sum(p.numel() for p in model.network.parameters() if p.requires_grad),
        operations=summary(model.network, model.example()).operations,
        test_split=data.test_split if split == "test" else split,
        score=metrics[f"{split}/{model.score}"],
        epochs=recorder.epochs,
        recipe=dict(recipe.settings.content),
        versions=_versions(recorder.device) | recipe.own_code,
        jobs=comparison.jobs,
        metric=model.score_name,
        figures={name: metrics[f"{split}/{name}"] for name in model.further_figures},
        seconds=recorder.seconds,
        tuned=dict(run.variant.tuned),
        tuned_epochs=run.variant.tuned_epochs,
    )
    if trainer.is_global_zero:
        record.save(comparison.file(run))
    return record


def _versions(device: Any) -> dict[str, str]:
    return {
        "awconv": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _interrupted(comparison: Comparison, run: Run, recipe: Recipe) -> str | None:
    """The last checkpoint of an interrupted run, or None.

    Raises:
        ValueError: it has other settings.
    """
    folder = comparison.checkpoints(run)
    last = find_last(folder)
    if last is None:
        return None
    checkpoint = read_checkpoint(last)
    there = checkpoint["callbacks"].get(SameSettings.__qualname__, {}).get("settings", {})
    differing = recipe.settings.differences(recipe.settings.of_checkpoint(there, checkpoint["hyper_parameters"]))
    if differing:
        raise ValueError(
            f"{folder} holds checkpoints of other settings: {'; '.join(differing[:3])}. Name another folder with "
            "--out, or remove this one to train anew"
        )
    return str(last)
