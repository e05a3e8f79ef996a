"""Spoiled options, recipes, records of runs and output folders."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from awconv.compare.record import EpochRecord, Record
from awconv.training.checkpoints import find_last, read_checkpoint
from tests.robustness.harness import Case

FIT = (
    "fit",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=false",
    "--trainer.default_root_dir=out",
    "--model.network=aw_resnet8_cifar",
)
VALUES = (".nan", ".inf", "-.inf", "-1", "-0.5", "0", "2", "1e400", "1e308", "1" + "0" * 30, "9" * 400, "text", "[1]")
VALUES += (
    "{a: 1}",
    "null",
    "''",
    "true",
    "[[[[]]]]",
    "&a [*a]",
    "[" * 3000,
    "\x00",
    "\ud800",
    "{",
    "!!python/name:os.system",
)
_OPTIONS = {
    "model": (
        "lr branch_lr_factor head_lr_factor momentum weight_decay branch_weight_decay warmup_epochs decay_epochs "
        "decay_rate label_smoothing erasing ema_decay optimizer network channels_last convert mixup optimizer_args "
        "network_args"
    ),
    "data": (
        "batch_size image_size crop_pct crop_padding horizontal_flip val_fraction split_seed in_memory num_workers "
        "transform broken_images mean std"
    ),
    "trainer": (
        "max_epochs max_steps limit_train_batches limit_val_batches precision accumulate_grad_batches "
        "gradient_clip_val gradient_clip_algorithm overfit_batches check_val_every_n_epoch val_check_interval "
        "log_every_n_steps num_sanity_val_steps max_time min_epochs"
    ),
    "recent_checkpoint": "every_n_steps",
}


def something_was_trained(folder: Path) -> str | None:
    """What is wrong with a training that ended well: it must have made a step, and its weights must be numbers."""
    last = find_last(folder)
    if last is None:
        return "it ended well, and there is no checkpoint"
    checkpoint = read_checkpoint(last)
    if checkpoint["global_step"] < 1:
        return "it ended well, and no step was made"
    if not all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values()):
        return "it ended well, and weights are no numbers"
    if not all(math.isfinite(rate) for rate in checkpoint["lr_schedulers"][0]["_last_lr"]):
        return "it ended well, and the learning rate is no number"
    return None


def with_options(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each option with each value, shuffled, so that the first ones are of all kinds."""
    endless = [("trainer.max_epochs", value) for value in ("null", "1" + "0" * 30)]
    pairs = [(name, value) for name in names for value in VALUES if (name, value) not in endless]
    random.Random("options").shuffle(pairs)
    return pairs


OPTIONS = with_options(
    [f"{group}.{name}" for group, known in _OPTIONS.items() for name in known.split()] + ["seed_everything"]
)


def named(option: str, value: str) -> str:
    """What an error must name: the option, or the alias of which the parser knows no more than the text."""
    return "an alias" if value.startswith("&") and option.startswith("data.") else option.rpartition(".")[2]


def options(seed: int) -> Case:
    """A value out of range, or of another type, for one option of a training."""
    name, value = OPTIONS[seed]
    given = (*FIT, f"--{name}={value}".replace("\x00", "\\0"))
    return Case(
        f"options {seed}: --{name}={value[:40]!r}",
        lambda folder: given,
        named(name, value),
        "either",
        something_was_trained,
    )


_DICTIONARIES = {
    "network_args": (
        "drop_rte: 0.1",
        "aw_args: {reductoin: 4}",
        "aw_args: 3",
        "drop_rate: text",
        "1: 2",
        "block: os.system",
    ),
    "convert": (
        "reductoin: 4",
        "select: nothing",
        "select: [[1]]",
        "norm_layer: 3",
        "init: identical",
        "reduction: -1",
    ),
    "optimizer_args": ("nestrov: true", "betas: 3", "lr: 5", "params: []", "eps: text", "opt: adam"),
    "mixup": ("mixup_alfa: 0.1", "mixup_alpha: text", "prob: 7, mixup_alpha: .nan", "num_classes: 3", "mode: none"),
    "transform": (
        "auto_augmnt: x",
        "auto_augment: nothing",
        "scale: 3",
        "input_size: 3",
        "interpolation: 17",
        "re_prob: text",
    ),
    "detector_args": ("box_scoer_thresh: 0.1", "num_classes: 3", "backbone: x"),
}


def dictionaries(seed: int) -> Case:
    """A key that is misspelt, or a value of another type, in an option that is a dictionary."""
    rng = random.Random(f"dictionaries {seed}")
    name = rng.choice(list(_DICTIONARIES))
    text = rng.choice(_DICTIONARIES[name])
    group = "data" if name == "transform" else "model"
    given = (*FIT, f"--{group}.{name}={{{text}}}")
    return Case(f"dictionaries {seed}: {name}={text}", lambda folder: given, name, "either", something_was_trained)


_GOOD = """\
# A recipe that can be trained in a moment.
seed_everything: 3
trainer:
  max_epochs: 1
  limit_train_batches: 1
  accelerator: cpu
model:
  network: resnet8_cifar
  lr: 0.1
  weight_decay: 5.0e-4
data:
  class_path: awconv.data.Digits
  init_args:
    batch_size: 64
"""


def _cut(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text))]


def _misspelt(text: str, rng: random.Random) -> str:
    lines = [line for line in text.splitlines() if ":" in line and not line.startswith("#")]
    line = rng.choice(lines)
    key = line.strip().partition(":")[0]
    return text.replace(line, line.replace(key, key[:-1] + "q" + key[-1]))


def _retyped(text: str, rng: random.Random) -> str:
    content = yaml.safe_load(text)
    inner = content
    path = []
    while isinstance(inner, dict) and (not path or rng.random() < 0.7):
        key = rng.choice(list(inner))
        path.append(key)
        if not isinstance(inner[key], dict):
            break
        inner = inner[key]
    parent: Any = content
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(parent, dict):
        parent[path[-1]] = rng.choice([None, [1], {"a": 1}, "text", 10**400, True, "1e999", [[]]])
    return yaml.safe_dump(content)


def _noise(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice("\t{}[]&*!%@`\"'\x00\x1b\u202e:-#|>?,") + text[at:]


def _deep(text: str, rng: random.Random) -> str:
    return text + "extra: " + "[" * 10 ** rng.randint(2, 5)


def _laughs(text: str, rng: random.Random) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, rng.randint(7, 12))]
    return text + "\n".join(lines) + "\n"


def _document(text: str, rng: random.Random) -> str:
    return rng.choice(
        ["", "text", "- 1\n- 2\n", "3", "--- a\n--- b\n", "\ufeff\ufeff", "%YAML 9.9\n---\na", "?", "\x80" * 50]
    )


_RECIPE_RULES: tuple[Callable[[str, random.Random], str], ...] = (
    _cut, _misspelt, _misspelt, _retyped, _retyped, _noise, _noise, _deep, _laughs, _document,
)  # fmt: skip


def recipes(seed: int) -> Case:
    """A recipe that is cut, misspelt, of other types, too deep or too large."""
    rng = random.Random(f"recipes {seed}")
    rule = _RECIPE_RULES[seed % len(_RECIPE_RULES)]
    text, command = rule(_GOOD, rng), rng.choice(["fit", "compare"])

    def prepare(folder: Path) -> Sequence[str]:
        (folder / "recipe.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        if command == "compare":
            return "compare", "recipe.yaml", "--seeds=1", "--variants=plain", "--out=out"
        return *FIT[:-1], "--config=recipe.yaml"

    return Case(f"recipes {seed}: {rule.__name__}, {command}", prepare, "", "either", something_was_trained)


def a_run() -> dict[str, Any]:
    """A run's file of the recipe above, as JSON holds it."""
    run = Record(
        "plain",
        "resnet8_cifar",
        0,
        75290,
        "test",
        0.5,
        [EpochRecord(2.0, 0.4, 1.0)],
        {},
        {"torch": str(torch.__version__)},
    )
    return asdict(run)


_JSON = (None, "text", [1], {"a": [1]}, True, -1, 10**400, "0.9", [[]], {"class_path": "antigravity.Thing"})


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in nested dictionaries and lists, as keys and indices; the first place is the whole."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def retyped(content: Any, rng: random.Random) -> Any:
    """A copy of what JSON holds, with one value of another type, or left out."""
    content = json.loads(json.dumps(content))
    place = rng.choice(places(content)[1:])
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if isinstance(parent, dict) and rng.random() < 0.2:
        del parent[place[-1]]
    else:
        parent[place[-1]] = rng.choice([value for value in _JSON if type(value) is not type(parent[place[-1]])])
    return content


def run_files(seed: int) -> Case:
    """A finished run whose file was changed."""
    rng = random.Random(f"run files {seed}")
    text = json.dumps(a_run(), indent=1)
    rule = seed % 4
    if rule == 0:
        text = text[: rng.randrange(len(text) - 2)]
    elif rule == 1:
        text = rng.choice(["[" * 10**5, "NaN", '{"score": 1e999}', "\x00", "[]", '"run"', "{}", "\ud800"])
    else:
        text = json.dumps(retyped(a_run(), rng))
    command = rng.choice(["compare", "publish"])

    def prepare(folder: Path) -> Sequence[str]:
        (folder / "recipe.yaml").write_text(_GOOD)
        (folder / "out").mkdir()
        (folder / "out" / "plain-seed0.json").write_text(text, errors="surrogatepass")
        if command == "compare":
            return "compare", "recipe.yaml", "--seeds=1", "--variants=plain", "--out=out"
        return "publish", "out/plain-seed0.json", "--tag=x", "--data=digits", "--recipe=r"

    return Case(f"run files {seed}: rule {rule}, {command}", prepare, "out/plain-seed0")


_PLACES = (
    "file",
    "file/below",
    "/dev/null/below",
    "/proc/awconv",
    "/sys/awconv",
    "dangling/below",
    "n" * 300,
    "a\nb/\x1b[2J",
)


def outputs(seed: int) -> Case:
    """A place for results that is none."""
    rng = random.Random(f"outputs {seed}")
    place = _PLACES[seed % len(_PLACES)]
    command = rng.choice(["fit", "fit with logs", "compare"])

    def prepare(folder: Path) -> Sequence[str]:
        (folder / "file").write_text("somebody's")
        (folder / "dangling").symlink_to("nowhere/at/all")
        (folder / "recipe.yaml").write_text(_GOOD)
        if command == "compare":
            return "compare", "recipe.yaml", "--seeds=1", "--variants=plain", f"--out={place}"
        return *FIT[:6], *([] if "logs" in command else FIT[6:7]), FIT[-1], f"--trainer.default_root_dir={place}"

    may = place.startswith(("a\n", "dangling"))
    return Case(f"outputs {seed}: {place[:20]!r}, {command}", prepare, place[:4], "either" if may else "error")
