"""``awconv bench model``: whole networks beside their baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv.bench.report import (
    Format,
    Measurement,
    check_device,
    check_memory,
    check_range,
    names,
    numbers,
    print_measurements,
)
from awconv.bench.rivals import with_condconv
from awconv.bench.timing import Ratio, peak_memory, ratios
from awconv.branch import AttentionBranch
from awconv.convert import convert
from awconv.layers import AW_LAYERS
from awconv.models.registry import BASELINES, variants
from awconv.ops.choose import ALGORITHMS, use_algorithm
from awconv.tasks.checks import check_network

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
WORKS = ("forward", "step", "training", "memory", "branch")
RIVALS = ("se", "condconv", "aw, per_sample")
FIRST_MAPS = 8  # times the images, the least that a network's first feature maps take


def bench_model(
    networks: Sequence[str],
    batch: str = "8",
    work: str = "forward,step",
    size: int | None = None,
    algorithm: str = "auto",
    rivals: bool = False,
    amp: Literal["off", "bfloat16", "float16"] = "off",
    device: str = "cpu",
    channels_last: bool = False,
    compile: bool = False,
    compile_mode: CompileMode = "default",
    rounds: int = 9,
    format: Format = "table",
) -> int:
    """Measures the runtime of AW networks relative to the plain networks, interleaved.

    Args:
        networks: their names, such as aw_resnet50. A network without attention is measured beside its conversion.
        batch: images; several numbers, with commas, make rows for each.
        work: with commas: ``forward`` (evaluation), ``step`` (forward, backward, in training), ``training`` (a step
            with a cross-entropy, and the update by SGD with momentum), ``memory`` (bytes at the peak of a step),
            ``branch`` (the attention branches alone, as a share of the forward).
        size: height and width of the images; the network's own by default.
        algorithm: that the AW networks use, such as ``fused``; auto by default.
        rivals: measures three more: the plain network with SE, with timm's CondConv2d in the places of
            AW-convolutions, and the AW network with one set of weights a sample (``per_sample``).
        amp: dtype of autocast.
        device: cpu or cuda.
        channels_last: memory format of networks and images.
        compile: compiles all of them.
        compile_mode: the mode of ``torch.compile``.
        rounds: how often each is timed.
        format: a table, the same as Markdown, or JSON with all figures.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: an argument is out of range, or timm does not know a network.
    """
    check_device(device)
    check_range(rounds=rounds, **({} if size is None else {"size": size}))
    works = names("work", work, WORKS)
    batches = numbers("batch", batch)
    names("algorithm", algorithm, ("auto", *ALGORITHMS))
    for name in networks:
        check_network(name)
    mode = compile_mode if compile else None
    measurements: list[Measurement] = []
    for name in networks:
        networks_of = competitors(name, algorithm, RIVALS if rivals else ())
        for images in batches:
            sides = _sides(networks_of, images, size, amp, device, channels_last, mode)
            for kind in works:
                measurements += measure(f"{name}, batch {images}", sides, kind, rounds, device)
    print_measurements(measurements, device, format)
    return 0


def _sides(
    networks: dict[str, tuple[nn.Module, str | None]],
    images: int,
    size: int | None,
    amp: str,
    device: str,
    channels_last: bool,
    compile_mode: CompileMode | None,
) -> dict[str, Side]:
    """The networks of :func:`competitors` with random images, of the size that the plain one is made for by default."""
    cfg: Any = getattr(networks["plain"][0], "pretrained_cfg", {})  # which networks of one's own may lack
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    height, width = size or height, size or width
    check_memory(FIRST_MAPS * images * channels * height * width, device, batch=images, size=height)
    input = torch.randn(images, channels, height, width, device=device)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    return {
        way: Side(network, algorithm, input, amp, device, channels_last, compile_mode)
        for way, (network, algorithm) in networks.items()
    }


def check_aw_networks(argument: str, networks: Sequence[str]) -> None:
    """Raises a ValueError for a name that is not of an AW network."""
    for name in networks:
        if name not in BASELINES or not name.startswith("aw_"):
            known = ", ".join(network for network in BASELINES if network.startswith("aw_"))
            raise ValueError(f"{argument} must be AW networks, got {name!r}; there are {known}")


def competitors(name: str, algorithm: str, rivals: Sequence[str] = ()) -> dict[str, tuple[nn.Module, str | None]]:
    """The networks by their names in the table, with the algorithm that each uses.

    Args:
        name: of an AW network, or of one to convert. The network without AW comes first.
        algorithm: that it uses.
        rivals: some of ``RIVALS``; SE is left out where there is no such network.
    """
    if name.startswith("od_") and name in BASELINES:
        raise ValueError(f"{name} has ODConvs; this compares AW networks with plain ones: give aw_{BASELINES[name]}")
    baseline = BASELINES[name] if name.startswith("aw_") and name in BASELINES else name
    plain, aw = timm.create_model(baseline), _aw(name)
    result: dict[str, tuple[nn.Module, str | None]] = {"plain": (plain, None), "aw": (aw, algorithm)}
    squeezed = variants(baseline).get("se")
    if "se" in rivals and squeezed is not None:
        result["se"] = timm.create_model(squeezed), None
    if "condconv" in rivals:
        places = [place for place, part in aw.named_modules() if isinstance(part, AW_LAYERS)]
        result["condconv"] = with_condconv(plain, places), None
    if "aw, per_sample" in rivals:
        result["aw, per_sample"] = _aw(name), "per_sample"
    return result


def _aw(name: str) -> nn.Module:
    network: nn.Module = timm.create_model(name)
    return network if any(isinstance(module, AW_LAYERS) for module in network.modules()) else convert(network)


def measure(subject: str, sides: Mapping[str, Side], work: str, rounds: int, device: str) -> list[Measurement]:
    """Measures one kind of work of networks: its runtime, interleaved, or its memory.

    Args:
        subject: what is measured, in words.
        sides: ``"plain"``, which comes first, ``"aw"`` and others.
        work: one of ``WORKS``.
        rounds: how often each is timed.
        device: that of the networks.
    """
    facts = {"batch": len(sides["aw"].input)}
    if work == "memory":
        return [replace(peak, facts=peak.facts | facts) for peak in _memory(subject, sides, device)]
    if work == "branch":
        functions = {"whole": sides["aw"].forward, "aw": _branches(sides["aw"])}
    else:
        functions = {way: getattr(side, work) for way, side in sides.items()}
    timed = ratios(functions, rounds, device)
    timed.pop("whole", None)
    return [Measurement(subject, work, way, ratio, facts) for way, ratio in timed.items()]


class Side:
    """A network with its images, ready to be timed."""

    def __init__(
        self,
        network: nn.Module,
        algorithm: str | None,
        input: Tensor,
        amp: str,
        device: str,
        channels_last: bool = False,
        compile_mode: CompileMode | None = None,
    ) -> None:
        self.network = network.to(device)
        if channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.input, self.algorithm, self.amp, self.device = input, algorithm, amp, device
        self.run: Callable[[Tensor], Tensor] = self.network
        if compile_mode is not None:
            self.run = _compiled(self.network, compile_mode)

    def _set_mode(self, training: bool) -> None:
        """Only where it changes: a loop of training does not do so in each step."""
        if self.network.training != training:
            self.network.train(training)

    def forward(self) -> None:
        """In evaluation."""
        self._set_mode(training=False)
        with torch.inference_mode(), self.settings():
            self.run(self.input)

    def step(self) -> None:
        """Forward and backward in training."""
        self._set_mode(training=True)
        self.network.zero_grad(set_to_none=True)
        with self.settings():
            loss = self.run(self.input).float().square().mean()
            loss.backward()

    def training(self) -> None:
        """A step with a cross-entropy, and the update."""
        self._set_mode(training=True)
        self.optimizer.zero_grad(set_to_none=True)
        with self.settings():
            loss = F.cross_entropy(self.run(self.input).float(), self.targets)
        loss.backward()
        self.optimizer.step()

    @cached_property
    def optimizer(self) -> torch.optim.SGD:
        """Its momentum takes memory from the first update on."""
        return torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    @cached_property
    def targets(self) -> Tensor:
        """Classes of the images."""
        classes: int = self.network.num_classes  # type: ignore[assignment]
        return torch.arange(len(self.input), device=self.device) % classes

    @contextmanager
    def settings(self) -> Iterator[None]:
        """The algorithm, and autocast."""
        cast = nullcontext() if self.amp == "off" else torch.autocast(self.device, getattr(torch, self.amp))
        with use_algorithm(self.algorithm), cast:
            yield

    def held(self) -> int:
        """Bytes of what lives before a step and through it."""
        tensors = (self.input, *self.network.parameters(), *self.network.buffers())
        return sum(tensor.nbytes for tensor in tensors)


def _compiled(network: nn.Module, mode: CompileMode) -> Callable[[Tensor], Tensor]:
    run: Callable[[Tensor], Tensor] = torch.compile(network, mode=mode)

    def call(input: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last call gave is not needed any more
        return run(input)

    return call


def _memory(subject: str, sides: Mapping[str, Side], device: str) -> list[Measurement]:
    """Bytes at the peak of a training step; networks that wait are moved out of a GPU's memory."""
    peaks: dict[str, int] = {}
    for way, side in sides.items():
        if device == "cuda":
            for other in sides.values():
                other.network.to("cuda" if other is side else "cpu")
        side.network.zero_grad(set_to_none=True)
        peaks[way] = peak_memory(side.step, side.held(), device)
        side.network.zero_grad(set_to_none=True)
    for side in sides.values():
        side.network.to(device)
    baseline = next(iter(peaks.values()))
    shares = {way: peak / baseline for way, peak in peaks.items()}
    return [
        Measurement(subject, "memory", way, Ratio(share, share, share, 0), {"bytes": peaks[way]})
        for way, share in shares.items()
    ]


def _branches(side: Side) -> Callable[[], None]:
    """A call that runs all attention branches of a network, on inputs of their sizes, in evaluation."""
    seen: list[tuple[nn.Module, Tensor]] = []
    branches = [module for module in side.network.modules() if isinstance(module, AttentionBranch)]
    hooks = [
        branch.register_forward_pre_hook(lambda branch, inputs: seen.append((branch, inputs[0].clone())))
        for branch in branches
    ]
    with torch.inference_mode(), side.settings():
        side.network.eval()(side.input)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        with torch.inference_mode(), side.settings():
            for branch, input in seen:
                branch(input)

    return run
