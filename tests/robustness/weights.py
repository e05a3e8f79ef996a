"""Spoiled checkpoints and files of weights."""

from __future__ import annotations

import functools
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from awconv.cli import main
from awconv.training.checkpoints import find_last
from tests.robustness.commands import FIT, places, something_was_trained
from tests.robustness.harness import Case, folder_of_this_process


@functools.cache
def trained() -> Path:
    """A checkpoint of a classifier of the digits, trained for a moment."""
    root = folder_of_this_process()
    assert main([*FIT, f"--trainer.default_root_dir={root}"]) == 0
    last = find_last(root)
    assert last is not None
    return last


class Planted:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return __import__("os").system, ("touch executed",)


_OTHERS = (None, "text", [1], {"a": 1}, 3.5, -1, torch.zeros(3), torch.full((2, 2), float("nan")), 10**30)


def _retyped(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    parent: Any = content
    while True:
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        inner = parent[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.75:
            parent = inner
            continue
        parent[key] = rng.choice(_OTHERS)
        return content


def _no_number(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    tensors = [tensor for tensor in content["state_dict"].values() if tensor.is_floating_point()]
    tensor = rng.choice(tensors).view(-1)
    tensor[rng.randrange(len(tensor))] = rng.choice([float("nan"), float("inf"), -float("inf")])
    return content


def _without(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    del content[rng.choice(["state_dict", "hyper_parameters", "callbacks", "loops"])]
    return content


def _of_another(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    name = rng.choice([name for name, tensor in content["state_dict"].items() if tensor.dim() > 0])
    content["state_dict"][name] = torch.zeros(1, 2, 3)
    return content


def _where_from(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    arguments = [
        {"pretrained": True},
        {"checkpoint_path": "x.pth"},
        {"pretrained_cfg": {"url": "http://127.0.0.1:9/w"}},
    ]
    content["hyper_parameters"]["network_args"] = rng.choice(arguments)
    return content


_CHANGES: dict[str, tuple[Callable[[dict[str, Any], random.Random], Any], bool]] = {
    "retyped": (_retyped, False),  # which may be of a part that nobody looks at
    "no number": (_no_number, True),
    "without a part": (_without, True),
    "of another network": (_of_another, True),
    "with weights from elsewhere": (_where_from, True),
    "a list": (lambda content, rng: [content], True),
    "a tensor": (lambda content, rng: torch.zeros(4), True),
    "planted": (lambda content, rng: content | {"loops": Planted()}, True),
}


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _zeroed(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) - 600)
    return content[:start] + bytes(600) + content[start + 600 :]


_BYTES: dict[str, tuple[Callable[[bytes, random.Random], bytes], bool]] = {
    "cut": (_cut, True),
    "flipped": (_flipped, False),  # which may be of a byte between the parts
    "zeroed": (_zeroed, False),
    "empty": (lambda content, rng: b"", True),
    "text": (lambda content, rng: b"not a checkpoint\n" * 40, True),
    "pickled": (lambda content, rng: pickle.dumps(Planted()), True),
}


def checkpoints(seed: int) -> Case:
    """A checkpoint that was damaged, or made by hand, in a prediction, an evaluation or a training that goes on."""
    rng = random.Random(f"checkpoints {seed}")
    rule = [*_CHANGES, *_BYTES][seed % (len(_CHANGES) + len(_BYTES))]
    command = rng.choice(["fit", "test", "predict"])

    def prepare(folder: Path) -> Sequence[str]:
        path = folder / "spoiled.ckpt"
        if rule in _CHANGES:
            content = torch.load(trained(), weights_only=True)
            torch.save(_CHANGES[rule][0](content, rng), path)
        else:
            path.write_bytes(_BYTES[rule][0](trained().read_bytes(), rng))
        if command == "predict":
            from PIL import Image

            Image.new("L", (8, 8), 99).save(folder / "a.png")
            return "predict", "--ckpt=spoiled.ckpt", "a.png"
        if command == "test":
            return "test", "--ckpt_path=spoiled.ckpt", "--trainer.logger=false", *FIT[3:5]
        return *FIT, "--trainer.max_epochs=2", "--ckpt_path=spoiled.ckpt"

    wrong = _CHANGES[rule][1] if rule in _CHANGES else _BYTES[rule][1]
    if rule == "without a part" and command != "fit":
        wrong = False  # a prediction needs no loops
    check = something_was_trained if command == "fit" else lambda folder: None
    return Case(
        f"checkpoints {seed}: {rule}, {command}",
        prepare,
        "spoiled.ckpt" if command == "predict" else "checkpoint",
        "error" if wrong else "either",
        check,
    )


_LEAVES = (*_OTHERS, True, {3: 4}, [[]])


def resumed(seed: int) -> Case:
    """A checkpoint of which any one part, however deep, is something else, in a training that goes on."""
    rng = random.Random(f"resumed {seed}")
    part = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "hyper_parameters")[seed % 5]

    def prepare(folder: Path) -> Sequence[str]:
        content = torch.load(trained(), weights_only=True)
        place = rng.choice(places(content[part])[1:])
        parent = content[part]
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = rng.choice(_LEAVES)
        torch.save(content, folder / "spoiled.ckpt")
        return *FIT, "--trainer.max_epochs=2", "--ckpt_path=spoiled.ckpt"

    return Case(f"resumed {seed}: {part}", prepare, "checkpoint", "either", something_was_trained)


def weights(seed: int) -> Case:
    """A file of weights that was damaged, or is of something else, from which a training is to start."""
    rng = random.Random(f"weights {seed}")
    kinds = ("safetensors", "pth")
    kind = kinds[seed % 2]
    rule = ["cut", "empty", "text", "pickled", "zeroed", "no number", "renamed", "reshaped", "a list"][seed // 2 % 9]

    def prepare(folder: Path) -> Sequence[str]:
        path = folder / f"weights.{kind}"
        content = torch.load(trained(), weights_only=True)["state_dict"]
        state: Any = {name.removeprefix("network."): tensor.clone() for name, tensor in content.items()}
        names = [name for name, tensor in state.items() if tensor.dim() > 1 and not name.startswith("fc")]
        name = rng.choice(names)
        if rule == "no number":
            state[name].view(-1)[0] = float("nan")
        elif rule == "renamed":
            state[f"other.{name}"] = state.pop(name)
        elif rule == "reshaped":
            state[name] = state[name].flatten()
        if rule == "a list" and kind == "pth":
            state = list(state.values())
        (save_file if kind == "safetensors" and rule != "a list" else torch.save)(state, path)
        if rule in _BYTES:
            path.write_bytes(_BYTES[rule][0](path.read_bytes(), rng))
        return *FIT, f"--model.pretrained=weights.{kind}"

    harmless = (rule == "zeroed" and kind == "safetensors") or (rule == "a list" and kind == "safetensors")
    return Case(
        f"weights {seed}: {rule}, {kind}", prepare, "weights", "either" if harmless else "error", something_was_trained
    )
