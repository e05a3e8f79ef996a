"""Spoiled arguments of the commands beside ``awconv fit``."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from awconv.cli import main
from tests.robustness.commands import FIT
from tests.robustness.harness import Case, folder_of_this_process
from tests.robustness.weights import trained

_HUGE = ("1" + "0" * 9, "1" + "0" * 12, "1" + "0" * 30, "9" * 400, "9" * 5000)
_WRONG = (
    "0",
    "-1",
    "1.5",
    "text",
    "nan",
    "inf",
    "",
    "1,,2",
    "8;9",
    "true",
    "[1]",
    "{a: 1}",
    "null",
    "\x1b[2J",
    "\u0661",
)
_PLACES = (
    "file",
    "file/below",
    "/dev/null/below",
    "/proc/awconv",
    "missing/below/x.svg",
    "folder",
    "n" * 300,
    "x.exe",
    "x",
)
_PICTURES = (*_PLACES, "file/x.png", "folder.svg", "missing/x.pdf", "\x1b[2J", "")
_NETWORKS = (
    "resnet50",
    "aw_resnet999",
    "",
    "aw_",
    "../x",
    "hf-hub:a/b",
    "local-dir:.",
    "aw_resnet18.nothing",
    "[",
    "a\x1b[2J",
)


@functools.cache
def compared() -> Path:
    """The folder of a finished comparison of one run."""
    root = folder_of_this_process()
    overrides = ["--trainer.max_epochs=1", *FIT[2:6]]
    recipe = str(Path(__file__).parents[2] / "recipes" / "digits.yaml")
    assert main(["compare", recipe, "--seeds=1", f"--out={root}", "--", *overrides]) == 0
    return root


Arguments = tuple[Sequence[str], str, bool]
"""The arguments, what an error must name, and whether there must be one."""


def _op(rng: random.Random) -> Arguments:
    name = rng.choice(
        [
            "channels",
            "size",
            "batch",
            "kernel_size",
            "stride",
            "groups",
            "blocks",
            "ways",
            "work",
            "dtype",
            "device",
            "rounds",
        ]
    )
    large = ("100000",) if name in ("channels", "size", "kernel_size") else ()
    value = rng.choice(_WRONG if name in ("ways", "work", "dtype", "device") else _WRONG + _HUGE + large)
    small = {"channels": "4", "size": "6", "batch": "1", "rounds": "1"}
    small[name] = value
    return ["bench", "op", *(f"--{key}={text}" for key, text in small.items())], name, False


def _op_places(rng: random.Random) -> Arguments:
    place, name = rng.choice(_PICTURES), rng.choice(["plot", "roofline"])
    given = ["bench", "op", "--channels=4", "--batch=1", "--rounds=1", "--work=forward", "--size=6,8"]
    return [*given, f"--{name}={place}"], name, True


def _model(rng: random.Random) -> Arguments:
    name = rng.choice(["batch", "work", "size", "algorithm", "amp", "device", "rounds", "networks", "networks"])
    if name == "networks":
        return ["bench", "model", rng.choice(_NETWORKS), "--rounds=1"], "networks", True
    large = ("100000",) if name == "size" else ()
    value = rng.choice(_WRONG if name in ("work", "algorithm", "amp", "device") else _WRONG + _HUGE + large)
    small = {"batch": "1", "size": "16", "rounds": "1", "work": "forward"} | {name: value}
    return ["bench", "model", "aw_resnet8_cifar", *(f"--{key}={text}" for key, text in small.items())], name, False


def _detector(rng: random.Random) -> Arguments:
    name = rng.choice(["batch", "work", "size", "detector", "algorithm", "amp", "rounds", "networks"])
    sizes = ("64", "64x64x64", "x", "0x64", "-1x64", "100000x100000", "9" * 30 + "x64", "1x64", "64x100000", "1x1")
    if name == "networks":
        return ["bench", "detector", rng.choice(_NETWORKS), "--rounds=1", "--size=64x64"], "networks", True
    numeric = name in ("batch", "rounds")
    value = rng.choice(sizes if name == "size" else _WRONG + _HUGE if numeric else _WRONG)
    small = {"batch": "1", "size": "64x64", "rounds": "1", "work": "forward"} | {name: value}
    return ["bench", "detector", "aw_resnet18", *(f"--{key}={text}" for key, text in small.items())], name, False


def _models(rng: random.Random) -> Arguments:
    given, name = rng.choice(
        [
            ("--filter=nothing*", "nothing"), ("--filter=", ""), ("--filter=[", "["), ("--format=xml", "format"),
            ("--fliter=x", "fliter"), ("aw_resnet50", "aw_resnet50"), (f"--filter={'*a' * 30}", "*a"),
            ("--config=missing.yaml", "config"), ("--config=file", "config"), ("--filter=\x1b[2J", r"\x1b[2J"),
        ]
    )  # fmt: skip
    return ["models", given], name, True


def _publish(rng: random.Random) -> Arguments:
    given = {"tag": "t", "data": "digits", "recipe": "digits.yaml", "out": "weights"}
    name = rng.choice(["tag", "data", "recipe", "license", "out", "run", "checkpoints"])
    run = "run/aw-seed0.json"
    if name == "run":
        run = rng.choice(["run", "missing.json", "file", "/dev/null", "run/report.md", "run/plain-seed0.json"])
    elif name == "checkpoints":
        run = "alone/aw-seed0.json"
    elif name == "out":
        given["out"] = rng.choice([place for place in _PLACES if not place.startswith("x")])
    else:
        given[name] = rng.choice(
            ["", "../../escaped", "a/b", "\x1b[2J", "a\nlicense: other", "n" * 300, "..", ".", "`x`", "<script>", "---"]
        )
    wrong = name in ("out", "checkpoints") or (name == "run" and run != "run/plain-seed0.json")
    if name == "out" and given["out"] in ("folder", "missing/below/x.svg"):
        wrong = False
    names = {"run": "", "checkpoints": "alone", "out": given["out"][:5]}.get(name, name)
    return ["publish", run, *(f"--{key}={text}" for key, text in given.items())], names, wrong


_OVERRIDES = (
    "--trainer.max_epochs=0", "--trainer.nothing=1", "--model.lr=nan", "--model.network=nothing", "--data=Nothing",
    "--data.batch_size=100000", "nothing", "--trainer.max_epochs", "--seed_everything=text", "--model=3",
    "--config=file", "--ckpt_path=file", "--trainer.accelerator=tpu",
)  # fmt: skip


def _demo(rng: random.Random) -> Arguments:
    name = rng.choice(["seeds", "out", "--", "--"])
    if name == "seeds":
        seeds = rng.choice([one for one in _WRONG if one not in ("true", "\u0661")])
        return ["demo", f"--seeds={seeds}", "--out=out"], "seeds", True
    if name == "out":
        place = rng.choice([one for one in _PLACES if one not in ("folder", "x", "x.exe", "missing/below/x.svg")])
        return ["demo", "--seeds=1", f"--out={place}"], place[:5], True
    override = rng.choice(_OVERRIDES)
    names = override.removeprefix("--").partition("=")[0].rpartition(".")[2].rpartition("_")[2]
    short = [] if "max_epochs" in override else ["--trainer.max_epochs=1"]
    return ["demo", "--seeds=1", "--out=out", "--", *short, *FIT[2:6], override], names, True


_CHANGES = (
    "reduction=0", "reduction=text", "reduction=", "reduction", "nothing=3", "activation=nothing", "select=nothing.*",
    "norm_layer=[1]", "init=1e400", "kernel_expansion=-3", "in_expansion=99999999", "residual=maybe", "=", "+", "a=b=c",
    "reduction=4 reduction=4", "branch_lr_factor=nan", "branch_weight_decay=-1", "reduction={", "reduction=[[[[",
    "activation=!!python/name:os.system", "../x=1", "",
)  # fmt: skip


def _ablate(rng: random.Random) -> Arguments:
    given = rng.choice(_CHANGES)
    recipe = rng.choice(["recipe.yaml"] * 5 + ["missing.yaml", "file", "folder"])
    short = ["--", "--trainer.max_epochs=1", *FIT[2:6]]
    names = "recipe" if recipe == "recipe.yaml" else recipe
    return (
        ["ablate", recipe, f"--vary={given}", "--seeds=1", "--out=out", *short],
        "" if names == "recipe" else names,
        True,
    )


def _evaluate(rng: random.Random) -> Arguments:
    command = rng.choice(["validate", "test"])
    given, names, wrong = rng.choice(
        [
            ([], "ckpt_path", True),
            (["--ckpt_path=missing.ckpt"], "missing.ckpt", True),
            (["--ckpt_path=file"], "file", True),
            (["--ckpt_path=folder"], "folder", True),
            (["--ckpt_path=last"], "checkpoint", True),
            (["--ckpt_path="], "ckpt_path", True),
            (["--model.pretrained=missing.pth"], "missing.pth", True),
            (["--model.pretrained=file"], "file", True),
            ([f"--ckpt_path={trained()}", "--data=Nothing"], "Nothing", True),
            ([f"--ckpt_path={trained()}", "--data.val_fraction=0"], "", command == "validate"),
            ([f"--ckpt_path={trained()}", "--data.batch_size=0"], "batch_size", True),
            ([f"--ckpt_path={trained()}", "--data.image_size=1000000"], "image_size", True),
            ([f"--ckpt_path={trained()}", "--trainer.limit_test_batches=-1"], "limit_test_batches", True),
            ([f"--ckpt_path={trained()}", "--data=ImageFolder", "--data.root=missing"], "missing", True),
            ([f"--ckpt_path={trained()}", "--data.mean=[nan]"], "mean", True),
            ([f"--ckpt_path={trained()}", "--model.network=resnet20_cifar"], "network", False),
            ([f"--ckpt_path={trained()}", "--trainer.precision=nothing"], "precision", True),
            ([f"--ckpt_path={trained()}", f"--ckpt_path={trained()}/x"], "ckpt", True),
        ]
    )
    return [command, *given, "--trainer.logger=false", *FIT[3:6]], names, wrong


_RULES: tuple[Callable[[random.Random], Arguments], ...] = (
    _op, _op, _op_places, _model, _detector, _models, _publish, _demo, _ablate, _evaluate,
)  # fmt: skip
_RECIPE = "model: {network: resnet8_cifar}\ndata: {class_path: awconv.data.Digits}\n"


def others(seed: int) -> Case:
    """An argument out of range, of another type or of what is not there, where nothing is fitted or predicted."""
    rng = random.Random(f"others {seed}")
    arguments, names, wrong = _RULES[seed % len(_RULES)](rng)

    def prepare(folder: Path) -> Sequence[str]:
        (folder / "file").write_text("somebody's")
        (folder / "folder").mkdir()
        (folder / "folder.svg").mkdir()
        (folder / "recipe.yaml").write_text(_RECIPE)
        if arguments[0] == "publish":
            shutil.copytree(compared(), folder / "run")
            (folder / "alone").mkdir()
            shutil.copy(compared() / "aw-seed0.json", folder / "alone")
        return arguments

    title = " ".join(one[:60] for one in arguments).replace(str(trained()), "TRAINED")
    return Case(f"others {seed}: {title}", prepare, names, "error" if wrong else "either")
