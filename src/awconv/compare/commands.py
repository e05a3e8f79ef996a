"""The commands ``compare``, ``ablate`` and ``demo``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_only

from awconv import terminal
from awconv.compare.ablation import arms, choices, find_variant
from awconv.compare.comparison import Comparison
from awconv.compare.plan import Plan
from awconv.compare.record import Record, TestSplit
from awconv.compare.session import run_plan
from awconv.compare.slurm import SlurmOptions
from awconv.compare.status import print_status
from awconv.compare.summaries import summarise
from awconv.compare.time_limit import TimeLimit, parse_duration
from awconv.compare.tuning import Tuning
from awconv.compare.variants import check_overrides, read_base
from awconv.extras import require
from awconv.models import variants as variants_of
from awconv.training.quiet import quiet_lightning
from awconv.training.settings import data_of
from awconv.usage import UsageError

Launcher = Literal["local", "slurm"]
_JOB = SlurmOptions()
_DEMO_RECIPE = Path(__file__).with_name("digit_scenes.yaml")
_TASK = """\
The task: scanned digits in scenes of 24x24 pixels. From scene to scene the digit's size and place differ, whether it is
lighter or darker than the ground and by how much, how thick it is, and the noise and the clutter around it. So kernels
that adapt to each image should matter. There are 5,385 scenes to learn from, and 1,440 of other digits for the test.
"""


@quiet_lightning()
def compare(
    recipe: Path,
    variants: str = "plain,aw",
    seeds: int = 3,
    out: Path | None = None,
    jobs: int | None = None,
    split: TestSplit = "test",
    tune: str | None = None,
    tune_epochs: int | None = None,
    time_limit: str | None = None,
    launcher: Launcher = "local",
    slurm: SlurmOptions = _JOB,
    status: bool = False,
    overrides: Sequence[str] = (),
    command: str = "",
    begun: float | None = None,
) -> int:
    """Trains variants of a recipe over the same seeds and compares them.

    A finished run leaves a record, a small JSON file, and is not trained again. Ctrl-C reports the finished runs; the
    same command resumes the interrupted one, on any machine with the folder. A failed run is reported, and the
    others go on. Variants of a seed are trained one after the other, so that the ratio of their times is fair.

    Args:
        recipe: a YAML file for ``awconv fit``.
        variants: with commas between them: ``plain`` is the recipe's network, ``aw``, ``se`` or ``aw_se`` the same
            network with that attention, ``aw+reduction=8`` with changes of its branch as ``awconv ablate`` takes
            them, a network of timm by its name, and ``FILE.yaml`` the recipe with that file laid over it.
        seeds: number of seeds, counted from 0.
        out: the folder of the report; ``runs/RECIPE`` by default.
        jobs: how many runs are trained side by side, in processes that share the device, 1 by default; or how many jobs
            may be in SLURM's queue, as many as there are runs by default.
        split: the split to test on. Make choices on ``val``, before you look at ``test``.
        tune: a setting to choose first, and the values to try, such as ``lr=0.05,0.1,0.2,0.4``: an argument of the task
            (``lr``, ``weight_decay``, ``branch_lr_factor``, ...). Every variant is trained with each value, with seed
            0, and takes the one that is best on the held-out images for all its seeds.
        tune_epochs: number of epochs of these runs; the recipe's by default.
        time_limit: how long the command may take: ``90s``, ``9m``, ``1h30m``, or seconds. Only runs start that will end
            in time; once a seed is complete, only seeds that all variants can finish. The same command goes on.
        launcher: where the runs are trained: ``local``, or ``slurm`` for a job of SLURM each (extra ``slurm``). The
            jobs need the folder and the data under the same names on every node.
        slurm: what these jobs ask for.
        status: only say which runs have finished, run, wait, have failed or are missing.
        overrides: further arguments for every run, as ``awconv fit`` takes them, such as ``--trainer.max_epochs=5``.
        command: what the user typed, for the report.
        begun: when the time limit began, by ``time.monotonic``; now by default.

    Returns:
        The exit status: 0, 1 if a run failed, 124 if the time limit left runs out, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        FileNotFoundError: the recipe or a variant is missing.
        UsageError: ``tune`` or ``time_limit`` cannot be read, or something else sets the same setting.
        ValueError: the recipe names no network, a variant is unknown or given twice, there is nothing to run, a record
            has other settings, the data have no images to choose by, or the comparison itself sets an override.
    """
    limit, tuning = _limit(time_limit, begun), Tuning.parse(tune, tune_epochs)
    check_overrides(overrides)
    base = read_base(recipe, overrides)
    changes = [find_variant(base, variant) for variant in _listed(variants)]
    names = [change.name for change in changes]
    if not names:
        raise ValueError(f"variants must name at least one, such as plain,aw, got {variants!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"variants must have names of their own, got {', '.join(names)}")
    folder = out if out is not None else Path("runs") / recipe.stem
    plan = Plan(recipe, changes, overrides, seeds, folder, split, jobs, tuning, limit, _jobs_of(launcher, slurm, limit))
    if status:
        return print_status(plan)
    named = f"{base.network}: {' against '.join(names)}"
    return run_plan(plan, lambda comparison: f"{named} on {_data(comparison)} ({recipe.stem})", command)


@quiet_lightning()
def ablate(
    recipe: Path,
    vary: str | None = None,
    seeds: int = 3,
    out: Path | None = None,
    jobs: int | None = None,
    tune: str | None = None,
    tune_epochs: int | None = None,
    time_limit: str | None = None,
    launcher: Launcher = "local",
    slurm: SlurmOptions = _JOB,
    status: bool = False,
    overrides: Sequence[str] = (),
    command: str = "",
    begun: float | None = None,
) -> int:
    """Compares settings of a recipe's attention branch on the validation split.

    The test split is not used. Finished and interrupted runs are treated as in ``awconv compare``.

    Args:
        recipe: a YAML file for ``awconv fit``.
        vary: changes, tried one at a time, with commas between them: arguments of the layer such as ``reduction=4``,
            ``in_expansion=1``, ``activation=tanh``, ``residual=false``, ``input_gain=true``, ``norm_layer=none``;
            ``select=layer3.*`` for the layers with AW; ``branch_lr_factor=0.1`` and ``branch_weight_decay=0`` for
            their optimisation. Join changes by ``+`` to try them at once: ``reduction=4+activation=tanh``. The default
            is some of each kind.
        seeds: number of seeds, counted from 0.
        out: the folder of the report; ``runs/RECIPE_ablation`` by default.
        jobs: how many runs are trained side by side, in processes that share the device, 1 by default; or how many jobs
            may be in SLURM's queue, as many as there are runs by default.
        tune: a setting to choose first, and the values to try, such as ``lr=0.05,0.1,0.2,0.4``: an argument of the task
            (``lr``, ``weight_decay``, ``branch_lr_factor``, ...). Every variant is trained with each value, with seed
            0, and takes the one that is best on the held-out images for all its seeds.
        tune_epochs: number of epochs of these runs; the recipe's by default.
        time_limit: how long the command may take: ``90s``, ``9m``, ``1h30m``, or seconds. Only runs start that will end
            in time; once a seed is complete, only seeds that all variants can finish. The same command goes on.
        launcher: where the runs are trained: ``local``, or ``slurm`` for a job of SLURM each (extra ``slurm``). The
            jobs need the folder and the data under the same names on every node.
        slurm: what these jobs ask for.
        status: only say which runs have finished, run, wait, have failed or are missing.
        overrides: further arguments for every run, as ``awconv fit`` takes them, such as ``--trainer.max_epochs=5``.
        command: what the user typed, for the report.
        begun: when the time limit began, by ``time.monotonic``; now by default.

    Returns:
        The exit status, as of :func:`compare`.

    Raises:
        FileNotFoundError: the recipe is missing.
        UsageError: as of :func:`compare`.
        ValueError: a change is unknown, the data have no validation split, a record has other settings, or the
            comparison itself sets an override.
    """
    limit, tuning = _limit(time_limit, begun), Tuning.parse(tune, tune_epochs)
    check_overrides(overrides)
    base = read_base(recipe, overrides)
    network, conversion = base.network, base.conversion
    if conversion is None and not network.startswith("aw_"):
        aw = variants_of(network).get("aw")
        network, conversion = (network, {}) if aw is None else (aw, None)
    changes = arms(network, choices(network) if vary is None else _listed(vary), base.network_args, conversion)
    folder = out if out is not None else Path("runs") / f"{recipe.stem}_ablation"
    plan = Plan(recipe, changes, overrides, seeds, folder, "val", jobs, tuning, limit, _jobs_of(launcher, slurm, limit))
    if status:
        return print_status(plan)
    named = f"{network}: choices for the branch"
    return run_plan(plan, lambda comparison: f"{named} on {_data(comparison)} ({recipe.stem})", command)


def demo(
    seeds: int = 3, out: Path = Path("awconv-demo"), overrides: Sequence[str] = (), command: str = "awconv demo"
) -> int:
    """Trains a small ResNet, plain and with AW, on scenes of scanned digits, compares them and explains the AW network.

    Two runs are trained side by side where there are threads for them.

    Args:
        seeds: number of seeds, counted from 0.
        out: the folder of the report; the explanation is in its folder ``explain``.
        overrides: further arguments for every run, as ``awconv fit`` takes them, such as ``--trainer.max_epochs=5``.
        command: what the user typed, for the report.

    Returns:
        The exit status, as of :func:`compare`.

    Raises:
        ModuleNotFoundError: the extra ``explain`` is not installed.
    """
    require("pytorch_grad_cam", extra="explain")
    from awconv.explain.command import explain
    from awconv.explain.folder import check_folder

    check_folder(out / "explain")
    _print(_TASK)
    jobs = min(2, torch.get_num_threads())
    status = compare(_DEMO_RECIPE, seeds=seeds, out=out, jobs=jobs, overrides=overrides, command=command)
    if status != 0 or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return status
    records = [Record.load(out / f"{variant}-seed{seed}.json") for seed in range(seeds) for variant in ("plain", "aw")]
    _print(_verdict(records))
    attended, plain = (str(out / f"{variant}-seed0") for variant in ("aw", "plain"))
    return explain(attended, out / "explain", split="test", images=1440, compare=plain, command=command)


def _verdict(records: Sequence[Record]) -> str:
    """What the difference between AW and plain says."""
    found = summarise(records)[1].difference
    if found is None or found.low is None or found.high is None:
        said = "One seed says nothing about the difference: networks of other seeds differ, too."
    elif found.low > 0:
        said = "AW is better at this task: the interval of the difference lies above zero."
    elif found.high < 0:
        said = "AW is worse at this task: the interval of the difference lies below zero."
    else:
        said = "Neither is better at this task, as far as these seeds tell: the interval of the difference holds zero."
    return f"{said} Where AW wins, and where not: docs/experiments.md. What its attention does here:"


def _listed(text: str) -> list[str]:
    """What stands between commas, or between spaces where there are none. Those in brackets belong to a value."""
    outside = r"(?![^\[({]*[\])}])"
    parts = [part.strip() for part in re.split(f",{outside}", text)]
    return parts if len(parts) > 1 else [part for part in re.split(rf"\s{outside}", text) if part]


def _data(comparison: Comparison) -> str:
    """The data that the variants are trained on: the class, and the last folder of its root or its files."""
    found = []
    for variant in comparison.variants:
        data = data_of(variant.recipe.settings.content)
        root, train = (data["init_args"].get(name) for name in ("root", "train"))
        folder = Path(root) if root else Path(train).parent if isinstance(train, str) else None
        kind = str(data["class_path"]).rpartition(".")[2]
        found.append(kind if folder is None else f"{kind} {folder.absolute().name}")
    return ", ".join(dict.fromkeys(found))


def _jobs_of(launcher: Launcher, slurm: SlurmOptions, limit: TimeLimit) -> SlurmOptions | None:
    """What the jobs of runs ask for; None to train the runs here."""
    if launcher == "local":
        if slurm != _JOB:
            raise UsageError("the options slurm.* are those of jobs; give --launcher=slurm, too")
        return None
    if limit.is_set:
        raise UsageError(
            "time_limit is for runs that are trained here; jobs have --slurm.time, after which they are queued again"
        )
    return slurm


def _limit(text: str | None, begun: float | None) -> TimeLimit:
    return TimeLimit() if text is None else TimeLimit(parse_duration(text), begun)


def _print(text: str) -> None:
    terminal.console().print(text, markup=False, highlight=False)
