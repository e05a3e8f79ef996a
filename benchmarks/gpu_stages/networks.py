"""Whole networks beside their baselines and their rivals: forward, training step, memory, compilation, first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from awconv.bench.model import RIVALS, CompileMode, Side, competitors, measure
from awconv.models.registry import BASELINES
from gpu_stages.journal import Entry, Settings
from gpu_stages.kernels import host_seconds, profile_step

_SEED = 0
_SUBJECTS = (("aw_resnet50", 256, 224), ("aw_resnet20_cifar", 512, 32))  # batch and size of the images
_FIRST_STEP_SECONDS = 180.0
_SLOW, _FEW = 0.5, 3  # seconds of a call, beyond which there are few rounds

Save = Callable[[], None]


def entries(settings: Settings) -> list[Entry]:
    """In order of worth."""
    large, small = (("aw_resnet8_cifar", 2, 16),) * 2 if settings.quick else _SUBJECTS

    def timed(
        subject: tuple[str, int, int],
        works: Sequence[str],
        rivals: Sequence[str] = (),
        mode: CompileMode | None = None,
        benchmark: bool = True,
    ) -> Any:
        return partial(_timed, subject, works, tuple(rivals), mode, benchmark, settings)

    several = [
        ("eager", 40, timed(large, ("forward", "memory", "training"))),
        ("profile", 15, partial(_profile, large, settings)),
        ("compiled training", 90, timed(large, ("training",), mode="default")),
        ("compiled forward", 60, timed(large, ("forward",), mode="default")),
        ("small, eager", 15, timed(small, ("forward", "training"))),
        ("small, reduce-overhead", 70, timed(small, ("training",), mode="reduce-overhead")),
        *(
            (f"beside {rival}", 25, timed(large, ("memory", "training", "forward"), (rival,), benchmark=rival == "se"))
            for rival in RIVALS
        ),
        ("first step", 60, partial(_first_step, large, settings)),
    ]
    return [Entry(name, guess / 4 if settings.quick else guess, work) for name, guess, work in several]


def _sides(
    subject: tuple[str, int, int], rivals: Sequence[str], mode: CompileMode | None, settings: Settings
) -> dict[str, Side]:
    """bfloat16 by autocast, channels last."""
    name, batch, size = subject
    torch.manual_seed(_SEED)
    images = torch.randn(batch, 3, size, size, device=settings.device).contiguous(memory_format=torch.channels_last)
    networks = competitors(name, settings.algorithm, rivals)
    return {
        way: Side(network, held, images, "bfloat16", settings.device, channels_last=True, compile_mode=mode)
        for way, (network, held) in networks.items()
    }


def _about(subject: tuple[str, int, int], settings: Settings) -> dict[str, Any]:
    name, batch, size = subject
    return dict(
        network=name,
        batch=batch,
        size=size,
        dtype="bfloat16 by autocast, channels_last",
        seed=_SEED,
        algorithm=settings.algorithm,
        rounds=settings.rounds,
    )


def _timed(
    subject: tuple[str, int, int],
    works: Sequence[str],
    rivals: Sequence[str],
    mode: CompileMode | None,
    benchmark: bool,
    settings: Settings,
    figures: dict[str, Any],
    save: Save,
) -> None:
    figures |= _about(subject, settings) | {"compile_mode": mode, "cudnn_benchmark": benchmark, "works": {}}
    torch.backends.cudnn.benchmark = benchmark
    torch._dynamo.reset()
    counters.clear()
    sides = _sides(subject, rivals, mode, settings)
    for work in works:
        found = figures["works"][work] = {}
        rounds = settings.rounds
        if work != "memory":
            found["first_calls_seconds"] = {}
            for way, side in sides.items():
                found["first_calls_seconds"][way] = [_seconds(getattr(side, work), settings.device) for _ in range(2)]
                save()
            slowest = max(second for _, second in found["first_calls_seconds"].values())
            rounds = min(rounds, _FEW) if slowest > _SLOW else rounds
        with settings.turn():
            rows = measure(subject[0], sides, work, rounds, settings.device)
        for row in rows:
            found[row.way] = asdict(row.ratio) | row.facts | {"rounds": rounds}
        if mode is not None:
            figures["graph_breaks"] = sum(counters["graph_break"].values())
            figures["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
        save()
        if mode is not None and work == "training":
            _profile_sides(sides, settings.out / f"profile_{subject[0]}_{mode}.json", figures, settings, save)
    torch._dynamo.reset()  # lets go of the compiled networks, and of the memory of their graphs


def _seconds(call: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _profile(subject: tuple[str, int, int], settings: Settings, figures: dict[str, Any], save: Save) -> None:
    figures |= _about(subject, settings)
    torch.backends.cudnn.benchmark = True
    sides = _sides(subject, (), None, settings)
    _profile_sides(sides, settings.out / "profile.json", figures, settings, save)
    for way, side in sides.items():
        few = side.input[:2, :, :64, :64].contiguous(memory_format=torch.channels_last)
        tiny = Side(side.network, side.algorithm, few, side.amp, side.device, channels_last=True)
        figures["profile"][way]["host_seconds"] = host_seconds(tiny)
        save()


def _profile_sides(sides: dict[str, Side], path: Path, figures: dict[str, Any], settings: Settings, save: Save) -> None:
    """Kernels go to a file of their own, every step's trace to another, and sums into the figures."""
    profiles: dict[str, Any] = {}
    figures["profile"] = {}
    for way, side in sides.items():
        with settings.turn():
            profiles[way] = profile_step(side, path.with_name(f"{path.stem}_{way}.json.gz"))
        figures["profile"][way] = {name: value for name, value in profiles[way].items() if not isinstance(value, list)}
        path.write_text(json.dumps(profiles, indent=1) + "\n")
        save()


def _first_step(subject: tuple[str, int, int], settings: Settings, figures: dict[str, Any], save: Save) -> None:
    """In processes of their own, whose kernels nothing has compiled or timed before."""
    name, batch, size = subject
    figures |= _about(subject, settings)
    for way, network in {"plain": BASELINES[name], "aw": name}.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "gpu_stages.first_step", network, str(batch), str(size), settings.device]
            result = subprocess.run(
                [*command, settings.algorithm],
                env=os.environ | {"TRITON_CACHE_DIR": folder},
                capture_output=True,
                text=True,
                timeout=_FIRST_STEP_SECONDS,
                check=False,
            )
        if result.returncode:
            raise RuntimeError(f"the first step of {network} failed:\n{result.stderr[-4000:]}")
        figures[way] = json.loads(result.stdout.splitlines()[-1])
        save()
    figures["extra_seconds"] = figures["aw"]["first"] - figures["plain"]["first"]
