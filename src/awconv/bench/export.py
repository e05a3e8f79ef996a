"""``awconv bench export``: exported networks beside their baselines, each in the runtimes that serve them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from awconv.bench.model import FIRST_MAPS, competitors
from awconv.bench.report import Format, Measurement, check_memory, check_range, names, numbers, print_measurements
from awconv.bench.timing import ratios
from awconv.export.graph import Inputs, prepared
from awconv.export.onnx_format import translated
from awconv.export.openvino_format import PRECISE, core
from awconv.export.ort import ort_library
from awconv.extras import require
from awconv.fuse import fuse
from awconv.ops.exports import Runtime
from awconv.tasks.checks import check_network

RUNTIMES = ("onnxruntime", "onnxruntime_operator", "openvino", "pytorch")
Call = Callable[[], None]


def bench_export(
    networks: Sequence[str],
    batch: str = "1,8",
    runtimes: str = "onnxruntime,openvino,pytorch",
    size: int | None = None,
    fixed: bool = False,
    rounds: int = 9,
    format: Format = "table",
) -> int:
    """Measures the runtime of exported AW networks relative to the exported plain networks, interleaved.

    SE is measured beside them where there is such a network. All have random weights.

    Args:
        networks: their names, such as aw_resnet50. A network without attention is measured beside its conversion.
        batch: images; several numbers, with commas, make rows for each.
        runtimes: some of ``onnxruntime``, ``onnxruntime_operator`` (with awconv's own operator), ``openvino`` (all in
            float32) and ``pytorch`` (eager; after ``awconv.fuse``), with commas.
        size: height and width of the images; the network's own by default.
        fixed: export for each number of images by itself. False exports once, for any.
        rounds: how often each is timed.
        format: a table, the same as Markdown, or JSON with all figures: nodes and seconds to export, too.

    Returns:
        The exit status, 0.

    Raises:
        ModuleNotFoundError: an extra is not installed.
        OSError: awconv's operator cannot be built here.
        ValueError: an argument is out of range, or timm does not know a network.
    """
    check_range(rounds=rounds, **({} if size is None else {"size": size}))
    batches, wanted = numbers("batch", batch), names("runtimes", runtimes, RUNTIMES)
    for name in networks:
        check_network(name)
    if "openvino" in wanted:
        require("openvino", extra="openvino")
    if wanted != ["pytorch"]:
        require("onnxscript", extra="onnx")
        require("onnxruntime", extra="onnx")
    if "onnxruntime_operator" in wanted:
        ort_library()
    measurements: list[Measurement] = []
    for name in networks:
        sides = {way: network.eval() for way, (network, _) in competitors(name, "auto", ["se"]).items()}
        shape = _shape(sides["plain"], size)
        check_memory(FIRST_MAPS * max(batches) * int(np.prod(shape)), "cpu", batch=max(batches), size=shape[1])
        for runtime in wanted:
            measurements += _measure(name, runtime, sides, shape, batches, fixed, rounds)
    print_measurements(measurements, "cpu", format)
    return 0


def _shape(network: nn.Module, size: int | None) -> tuple[int, int, int]:
    cfg: Any = getattr(network, "pretrained_cfg", {})  # which networks of one's own may lack
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    return channels, size or height, size or width


def _measure(
    name: str,
    runtime: str,
    sides: Mapping[str, nn.Module],
    shape: tuple[int, int, int],
    batches: Sequence[int],
    fixed: bool,
    rounds: int,
) -> list[Measurement]:
    """One measurement for each number of images and each network."""
    measurements = []
    exported: dict[str, tuple[Callable[[np.ndarray[Any, Any]], Any], dict[str, Any]]] = {}
    for images in batches:
        if fixed or not exported:
            exported = {
                way: _ready(network, runtime, shape, images if fixed else None) for way, network in sides.items()
            }
        input = np.random.default_rng(0).standard_normal((images, *shape), dtype=np.float32)
        calls: dict[str, Call] = {way: _call(run, input) for way, (run, _) in exported.items()}
        work = f"{runtime}, batch {images}{' only' if fixed and runtime != 'pytorch' else ''}"
        for way, ratio in ratios(calls, rounds, "cpu").items():
            measurements.append(Measurement(name, work, way, ratio, exported[way][1] | {"batch": images}))
    return measurements


def _call(run: Callable[[np.ndarray[Any, Any]], Any], input: np.ndarray[Any, Any]) -> Call:
    return lambda: run(input)


def _ready(
    network: nn.Module, runtime: str, shape: tuple[int, int, int], batch: int | None
) -> tuple[Callable[[np.ndarray[Any, Any]], Any], dict[str, Any]]:
    """A network in a runtime, and how large its graph is and how long the export took."""
    if runtime == "pytorch":
        fused = fuse(copy.deepcopy(network))

        def run_fused(input: np.ndarray[Any, Any]) -> None:
            with torch.inference_mode():
                fused(torch.from_numpy(input))

        return run_fused, {}
    start = time.perf_counter()
    with prepared(network, cast("Runtime", runtime), batch) as module:
        proto = translated(module, Inputs(shape, batch, dynamic_size=False, uint8=False), None)
    facts = {"nodes": len(proto.graph.node), "export_seconds": time.perf_counter() - start}
    content = proto.SerializeToString()
    if runtime == "openvino":
        compiled = core().compile_model(core().read_model(content), "CPU", PRECISE)
        return compiled.create_infer_request().infer, facts
    onnxruntime = require("onnxruntime", extra="onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # the others' threads leave the cores free
    if runtime == "onnxruntime_operator":
        options.register_custom_ops_library(str(ort_library()))
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    return lambda input: session.run(None, {entry: input}), facts
