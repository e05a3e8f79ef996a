"""Trains the variants of a recipe over seeds, and reports what is finished."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from awconv import terminal
from awconv.compare.report import rich_table, summarise, write_report
from awconv.compare.runs import Run, Variant, base_network, find_variant, open_data, train

DEMO_RECIPE = Path(__file__).with_name("digits.yaml")


def compare(
    recipe: Path,
    variants: str = "plain,aw",
    seeds: int = 3,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    command: str = "",
) -> int:
    """Trains the twins of a recipe over the same seeds and prints how they compare.

    Each finished run is kept as a small JSON file, and Ctrl-C reports those that are finished. The twins of a seed are
    trained one after the other, so that the ratio of their times is taken on a machine in the same state.

    Args:
        recipe: a YAML file for ``awconv fit``.
        variants: with commas between them: ``plain`` is the recipe's network, a prefix such as ``aw`` or
            ``aw_se`` the network of that name, and ``FILE.yaml`` the recipe with that file laid over it.
        seeds: number of seeds, counted from 0.
        out: the folder of the report; ``runs/`` and the recipe's name by default.
        overrides: further arguments for every run, as ``awconv fit`` takes them, such as ``--trainer.max_epochs=5``.
        command: what the user typed, for the report.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        FileNotFoundError: there is no such recipe or variant.
        ValueError: the recipe names no network, a variant does not exist or twice, or there is nothing to run.
    """
    base = base_network(recipe, overrides)
    twins = [find_variant(base, variant.strip()) for variant in variants.split(",")]
    names = [twin.name for twin in twins]
    if len(set(names)) < len(names):
        raise ValueError(f"variants must have names of their own, got {', '.join(names)}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    folder = out if out is not None else Path("runs") / recipe.stem
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{base}: {' against '.join(names)} ({recipe.stem})"
    console = terminal.console()
    status, runs = _train_all(recipe, twins, seeds, folder, overrides, console)
    if runs:
        console.print(rich_table(summarise(runs), title))
        console.print(f"Report: {write_report(runs, folder, title, command)}")
    return status


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
        The exit status: 0, or 130 after Ctrl-C.
    """
    return compare(DEMO_RECIPE, seeds=seeds, out=out, overrides=overrides, command=command)


def _train_all(
    recipe: Path,
    variants: Sequence[Variant],
    seeds: int,
    folder: Path,
    overrides: Sequence[str],
    console: Console,
) -> tuple[int, list[Run]]:
    runs: list[Run] = []
    data = open_data(recipe, overrides)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        bar = progress.add_task("", total=len(variants) * seeds)
        for seed, variant in product(range(seeds), variants):
            name, done = f"{variant.name}-seed{seed}", len(runs)

            def on_progress(epochs: float, of: int, name: str = name, done: int = done) -> None:
                epoch = min(int(epochs) + 1, of)
                progress.update(bar, description=f"{name}, epoch {epoch}/{of}", completed=done + epochs / of)

            try:
                run = train(recipe, variant, seed, folder / name, data, overrides, on_progress)
                run.save(folder / f"{name}.json")
            except KeyboardInterrupt:
                console.print(f"Interrupted in {name}; {len(runs)} finished runs are kept in {folder}")
                return 130, runs
            runs.append(run)
            console.print(f"{name}: test accuracy {100 * run.test_accuracy:.2f} %", highlight=False)
    return 0, runs
