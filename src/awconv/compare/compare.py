"""Trains the variants of a recipe over seeds, and reports what is finished."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import closing, nullcontext
from itertools import product
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from awconv import terminal
from awconv.compare.ablation import arms, choices
from awconv.compare.processes import train_in_turn, train_side_by_side
from awconv.compare.report import rich_table, summarise, write_report
from awconv.compare.runs import (
    Plan,
    Run,
    Split,
    Variant,
    base_network,
    check_overrides,
    find_variant,
    parse,
    quiet_lightning,
)
from awconv.training.lock import locked

DEMO_RECIPE = Path(__file__).with_name("digits.yaml")


@quiet_lightning()
def compare(
    recipe: Path,
    variants: str = "plain,aw",
    seeds: int = 3,
    out: Path | None = None,
    jobs: int = 1,
    split: Split = "test",
    overrides: Sequence[str] = (),
    command: str = "",
) -> int:
    """Trains the twins of a recipe over the same seeds and prints how they compare.

    Each finished run is kept as a small JSON file. A run whose file is there is not trained again, and one that was
    interrupted goes on: Ctrl-C reports what is finished, and the same command goes on later, or elsewhere with these
    files. A run that fails is named, and the others go on. The twins of a seed are trained one after the other, so that
    the ratio of their times is taken on a machine in the same state.

    Args:
        recipe: a YAML file for ``awconv fit``.
        variants: with commas between them: ``plain`` is the recipe's network, a prefix such as ``aw`` or
            ``aw_se`` the network of that name, and ``FILE.yaml`` the recipe with that file laid over it.
        seeds: number of seeds, counted from 0.
        out: the folder of the report; ``runs/`` and the recipe's name by default.
        jobs: how many runs go side by side, in processes that share the device.
        split: what the networks are tested on. Choices are to be made on ``val``, before anything is seen of ``test``.
        overrides: further arguments for every run, as ``awconv fit`` takes them, such as ``--trainer.max_epochs=5``.
        command: what the user typed, for the report.

    Returns:
        The exit status: 0, 1 if a run failed, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        FileNotFoundError: there is no such recipe or variant.
        ValueError: the recipe names no network, a variant does not exist or twice, there is nothing to run, a file
            holds a run of other settings, or an override is of what the comparison sets for each run.
    """
    check_overrides(overrides)
    base = base_network(recipe, overrides)
    twins = [find_variant(base, variant.strip()) for variant in variants.split(",")]
    names = [twin.name for twin in twins]
    if len(set(names)) < len(names):
        raise ValueError(f"variants must have names of their own, got {', '.join(names)}")
    title = f"{base}: {' against '.join(names)} ({recipe.stem})"
    folder = out if out is not None else Path("runs") / recipe.stem
    return _run(recipe, twins, seeds, folder, jobs, split, overrides, title, command)


@quiet_lightning()
def ablate(
    recipe: Path,
    vary: str | None = None,
    seeds: int = 3,
    out: Path | None = None,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    command: str = "",
) -> int:
    """Trains the AW twin of a recipe with other choices for its branch, and compares them on the validation split.

    The test split is not looked at. Finished and interrupted runs are taken up as in ``awconv compare``.

    Args:
        recipe: a YAML file for ``awconv fit``.
        vary: what is changed, one at a time, with spaces between them: arguments of the layer such as ``reduction=4``,
            ``in_expansion=1``, ``activation=tanh``, ``residual=false``, ``norm_layer=none``; ``select=layer3.*`` for
            the stages with AW; ``branch_lr_factor=0.1`` and ``branch_weight_decay=0`` for their optimisation. Several
            changes at once are joined by ``+``: ``reduction=4+activation=tanh``. By default some of each kind.
        seeds: number of seeds, counted from 0.
        out: the folder of the report; ``runs/`` and the recipe's name with ``_ablation`` by default.
        jobs: how many runs go side by side, in processes that share the device.
        overrides: further arguments for every run, as ``awconv fit`` takes them, such as ``--trainer.max_epochs=5``.
        command: what the user typed, for the report.

    Returns:
        The exit status, as of :func:`compare`.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe's network has no AW twin, a change is none, the data have no validation split, a file
            holds a run of other settings, or an override is of what the comparison sets for each run.
    """
    check_overrides(overrides)
    base = base_network(recipe, overrides)
    network = base if base.startswith("aw_") else find_variant(base, "aw").network
    assert network is not None
    network_args = parse(recipe, *overrides, build=False).config.model.network_args or {}
    twins = arms(network, choices(network) if vary is None else vary.split(), network_args)
    folder = out if out is not None else Path("runs") / f"{recipe.stem}_ablation"
    title = f"{network}: choices for the branch ({recipe.stem})"
    return _run(recipe, twins, seeds, folder, jobs, "val", overrides, title, command)


def demo(
    seeds: int = 3, out: Path = Path("awconv-demo"), overrides: Sequence[str] = (), command: str = "awconv demo"
) -> int:
    """Trains a small ResNet and its AW twin on scikit-learn's scanned digits, and prints how they compare.

    Args:
        seeds: number of seeds, counted from 0.
        out: the folder of the report.
        overrides: further arguments for every run, as ``awconv fit`` takes them, such as ``--trainer.max_epochs=5``.
        command: what the user typed, for the report.

    Returns:
        The exit status, as of :func:`compare`.
    """
    return compare(DEMO_RECIPE, seeds=seeds, out=out, overrides=overrides, command=command)


def _run(
    recipe: Path,
    variants: Sequence[Variant],
    seeds: int,
    folder: Path,
    jobs: int,
    split: Split,
    overrides: Sequence[str],
    title: str,
    command: str,
) -> int:
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    jobs = min(jobs, seeds * len(variants))
    plans = [
        Plan(recipe, variant, seed, folder, tuple(overrides), split, jobs)
        for seed, variant in product(range(seeds), variants)
    ]
    for plan in plans[: len(variants)]:
        plan.check()
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # of processes that train together
    console = terminal.console() if first else Console(quiet=True)
    with locked(folder) if first else nullcontext():
        status, runs = _train_all(plans, console)
        if runs and first:
            order = [variant.name for variant in variants]
            runs.sort(key=lambda run: (run.seed, order.index(run.variant)))
            console.print(rich_table(summarise(runs), title))
            console.print(f"Report: {write_report(runs, folder, title, command)}", markup=False)
    return status


def _train_all(plans: Sequence[Plan], console: Console) -> tuple[int, list[Run]]:
    finished = {plan: run for plan in plans if (run := plan.finished()) is not None}
    missing = [plan for plan in plans if plan not in finished]
    runs, folder = list(finished.values()), plans[0].folder
    failures: list[tuple[Plan, str]] = []
    if runs:
        console.print(
            f"{len(runs)} of {len(plans)} runs are finished already, in {folder}", markup=False, highlight=False
        )
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    stopped = 0
    with progress:
        bar = progress.add_task("", total=len(missing))
        done: dict[Plan, float] = {}

        def on_progress(plan: Plan, epochs: float, of: int) -> None:
            done[plan] = epochs / of
            epoch = min(int(epochs) + 1, of)
            progress.update(bar, description=f"{plan.name}, epoch {epoch}/{of}", completed=sum(done.values()))

        train = train_in_turn if plans[0].jobs == 1 else train_side_by_side
        try:
            with closing(train(missing, on_progress)) as results:
                for plan, result in results:
                    if isinstance(result, Run):
                        runs.append(result)
                        score = f"{result.test_split} {result.metric} {100 * result.score:.2f} %"
                        console.print(f"{plan.name}: {score}", markup=False, highlight=False)
                    else:
                        failures.append((plan, result))
        except (KeyboardInterrupt, SIGTERMException) as error:
            stopped = 130 if isinstance(error, KeyboardInterrupt) else 128 + signal.SIGTERM
            console.print(
                f"Interrupted; {len(runs)} finished runs are kept in {folder}, and the same command goes on",
                markup=False,
                highlight=False,
            )
    for plan, reason in failures:
        terminal.say(*f"awconv: run {plan.name} failed: {reason}".splitlines())
    return stopped or (1 if failures else 0), runs
