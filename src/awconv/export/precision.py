"""Half precision and 8 bits for an ONNX model, by ONNX Runtime's tools."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from awconv.extras import require
from awconv.odconv import WITH_BRANCHES


def halved(proto: Any) -> Any:
    """The model in half precision; it still takes and gives single precision."""
    float16 = require("onnxruntime.transformers.float16", extra="onnx")
    with _quiet():
        return float16.convert_float_to_float16(proto, keep_io_types=True)


def quantized(proto: Any, scopes: Mapping[str, str], network: nn.Module, batches: Iterable[Any], folder: Path) -> Any:
    """The model with weights and activations of 8 bits (QDQ): weights signed, for each output channel; activations
    unsigned, in the range that they have on the given batches.

    Of an AW-convolution, only the convolutions with constant weights are quantized. Its attention branches and the
    products with the gains cost little, and an error in a gain is one in a whole channel. Logits stay as they are.

    Args:
        proto: the model.
        scopes: the modules that each node is in, by its name, as PyTorch notes them.
        network: of which the names are.
        batches: the model's inputs, arrays.
        folder: for intermediate files.
    """
    tools, runtime = require("onnxruntime.quantization", extra="onnx"), require("onnxruntime", extra="onnx")
    import onnx

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {proto.graph.input[0].name: batch}

    simple, whole = folder / "simple.onnx", folder / "quantized.onnx"
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # folds norms into convolutions
    options.optimized_model_filepath = str(simple)
    runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with _quiet():
        tools.quantize_static(
            simple,
            whole,
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            nodes_to_exclude=_kept(onnx.load(simple), scopes, network),
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
    return onnx.load(whole)


def _kept(proto: Any, scopes: Mapping[str, str], network: nn.Module) -> list[str]:
    """The names of the nodes that are not quantized."""
    layers = {name: m for name, m in network.named_modules() if isinstance(m, WITH_BRANCHES)}
    branches = {f"{name}.{branch}" for name in layers for branch in ("attention", "input_attention")}
    constants = {tensor.name for tensor in proto.graph.initializer}
    kept = []
    for node in proto.graph.node:
        modules = set(ast.literal_eval(scopes.get(node.name) or "[]"))
        convolves = node.op_type == "Conv" and node.input[1] in constants and not modules & branches
        if modules & set(layers) and not convolves:
            kept.append(node.name)
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, ONNX Runtime's tools log nothing: what matters is checked afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
