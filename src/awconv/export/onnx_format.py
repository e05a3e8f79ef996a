"""ONNX files: writing one, and running one with ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from awconv.export.graph import Inputs
from awconv.export.metadata import KEY, Metadata, parsed
from awconv.export.ort import merge, ort_library, translations
from awconv.extras import require
from awconv.ops.exports import target

_LARGEST = 2**31 - 2**20  # bytes of a protocol buffer, and room for the metadata
_SCOPES = "pkg.torch.onnx.name_scopes"  # where a node's module is named


def translated(module: nn.Module, inputs: Inputs, opset: int | None) -> Any:
    """A module as an ONNX model, a ``ModelProto``, in the form of :func:`~awconv.ops.exports.exporting_for`.

    Args:
        module: in evaluation mode.
        inputs: what it takes.
        opset: the version of ONNX's operators; None takes PyTorch's default.

    Raises:
        ValueError: PyTorch cannot export the network in this way, or a file of ONNX cannot hold it.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])
    if size > _LARGEST:
        raise ValueError(
            f"a file of ONNX holds at most 2 GiB, and the network's weights have {size / 2**30:.1f} GiB; a .pt2 has no "
            "such limit"
        )
    operator = target().runtime == "onnxruntime_operator"
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                module,
                inputs.examples(),
                None,
                dynamo=True,
                input_names=inputs.names,
                output_names=["boxes", "scores", "labels"] if inputs.detector else ["logits"],
                dynamic_shapes=inputs.dynamic_shapes(),
                opset_version=opset,
                custom_translation_table=translations() if operator else None,
                verbose=False,
            )
    except Exception as error:  # networks fail in ways of their own
        raise ValueError(f"PyTorch cannot export the network{_mend(inputs)}: {_innermost(error)}") from error
    proto = program.model_proto
    _check_dimensions(proto, inputs)
    if operator:
        merge(proto)
    return proto


def _mend(inputs: Inputs) -> str:
    if inputs.dynamic_size:
        return " for images of any size (--size=fixed exports it for one)"
    return " for batches of any size (--batch=1 exports it for one)" if inputs.batch is None else ""


def _innermost(error: BaseException) -> str:
    """The first line that says something of the error that was first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _check_dimensions(proto: Any, inputs: Inputs) -> None:
    """Raises a ValueError if a dimension that was to be dynamic has become a constant; names the others."""
    for axis, dimension in enumerate(proto.graph.input[0].type.tensor_type.shape.dim):
        if inputs.is_dynamic(axis) and not dimension.dim_param:
            inputs.refuse_constant(axis, dimension.dim_value)


def strip(proto: Any) -> dict[str, str]:
    """Removes what PyTorch notes of the code and the machine that exported, and says which module each node is of.

    Returns:
        The dotted name of the module, by the name of the node.
    """
    import onnx

    modules = {}
    for graph in [proto.graph, *_subgraphs(proto.graph)]:
        for node in graph.node:
            notes = {note.key: note.value for note in node.metadata_props}
            modules[node.name] = notes.get(_SCOPES, "")
            del node.metadata_props[:]
            node.doc_string = ""
        for value in [*graph.value_info, *graph.input, *graph.output, *graph.initializer]:
            del value.metadata_props[:]
            value.doc_string = ""
        del graph.metadata_props[:]
    del proto.metadata_props[:]
    assert isinstance(proto, onnx.ModelProto)
    return modules


def _subgraphs(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield inner
                yield from _subgraphs(inner)


def write(proto: Any, metadata: Metadata, file: Path) -> None:
    """Writes a model with its metadata, which are all that it holds besides the graph."""
    del proto.metadata_props[:]
    proto.metadata_props.add(key=KEY, value=metadata.text())
    proto.producer_name, proto.producer_version = "awconv", metadata.awconv
    file.write_bytes(proto.SerializeToString())


class OnnxFile:
    """A file of ``awconv export --format=onnx``, run by ONNX Runtime on the CPU.

    Args:
        file: its path.

    Attributes:
        metadata: what it says of its network.
        nodes: the number of operations in it.

    Raises:
        ModuleNotFoundError: the extra ``onnx`` is not installed.
        ValueError: it is broken, or was not written by ``awconv export``.
    """

    def __init__(self, file: Path) -> None:
        onnx, runtime = require("onnx", extra="onnx"), require("onnxruntime", extra="onnx")
        try:
            proto = onnx.load(file, load_external_data=False)
        except Exception as error:  # of protobuf
            raise ValueError(f"{file} is broken, or no file of ONNX: {error}") from error
        texts = {entry.key: entry.value for entry in proto.metadata_props}
        self.metadata = parsed(texts.get(KEY), file)
        if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in _tensors(proto)):
            raise ValueError(f"{file} takes weights from other files, which a file of 'awconv export' does not")
        self.nodes = len(proto.graph.node)
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        if self.metadata.operator:
            _register(options, file)
        try:
            self._session = runtime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of ONNX Runtime
            raise ValueError(f"ONNX Runtime cannot run {file}: {_innermost(error)}") from error

    def __call__(self, *inputs: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """What the network gives for its inputs."""
        outputs: list[np.ndarray[Any, Any]] = self._session.run(
            None, {one.name: value for one, value in zip(self._session.get_inputs(), inputs, strict=True)}
        )
        return outputs


def _register(options: Any, file: Path) -> None:
    """Gives a session the operator that a file needs."""
    try:
        options.register_custom_ops_library(str(ort_library()))
    except Exception as error:  # of ONNX Runtime, too
        raise ValueError(
            f"{file} was exported with --operator, for sessions with awconv's own operator: {_innermost(error)}. "
            "Exported without --operator, it runs everywhere"
        ) from error


def _tensors(proto: Any) -> Iterator[Any]:
    for graph in [proto.graph, *_subgraphs(proto.graph)]:
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, PyTorch's exporter and its optimiser say nothing: what matters is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
