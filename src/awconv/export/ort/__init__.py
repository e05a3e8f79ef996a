"""awconv's operator for ONNX Runtime: the fused convolution's C code behind ONNX Runtime's C interface.

A graph holds it as one node, ``AWConv`` of the domain ``awconv``, described in operator.c. A session finds it in a
shared library, which is built for the machine that runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from awconv.ops.build import kept_file, library

_SOURCE = Path(__file__).with_name("operator.c")
_DOMAIN, _NAME = "awconv", "AWConv"
_INFINITY = float("inf")


def ort_library() -> Path:
    """The shared library with awconv's operator for ONNX Runtime, which is built for this machine if it was not before.

    A session of ONNX Runtime 1.17 or later that runs a file of ``awconv export --operator`` needs it. In Python,
    ``options.register_custom_ops_library(str(path))`` gives it to ``onnxruntime.SessionOptions``; in other languages,
    ``RegisterCustomOpsLibrary`` does.

    Returns:
        Its path, in the cache of the package. It is for processors like this machine's: build it where it runs.

    Raises:
        OSError: there is no C compiler, it fails, or the library cannot be kept.
    """
    built = library(_SOURCE, torch.float32)
    if isinstance(built, str):
        raise OSError(f"awconv's operator for ONNX Runtime cannot be had here: {built}")
    file = kept_file(built)
    if file is None:
        raise OSError(
            "awconv's operator for ONNX Runtime cannot be had here: there is no cache to keep its library in; name a "
            "folder of your own in XDG_CACHE_HOME"
        )
    return file


def translations() -> dict[Any, Callable[..., Any]]:
    """How PyTorch's exporter translates the fused operator, for ``custom_translation_table``."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    kinds = OpSchema.AttrType
    attributes = dict(strides=kinds.INTS, pads=kinds.INTS, dilations=kinds.INTS, group=kinds.INT)
    attributes |= dict(minimum=kinds.FLOAT, maximum=kinds.FLOAT)
    schema = OpSchema(
        _NAME,
        _DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(name, "T") for name in ("input", "weight", "gain")],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(name, kind, "") for name, kind in attributes.items()],
    )
    operator = Op(Opset(_DOMAIN, 1), _NAME, schema)

    def translate(
        input: Any, weight: Any, gain: Any, stride: list[int], padding: list[int], dilation: list[int], groups: int
    ) -> Any:
        return operator(
            input,
            weight,
            gain,
            strides=list(stride),
            pads=[*padding[::2], *padding[1::2]],
            dilations=list(dilation),
            group=groups,
            minimum=-_INFINITY,
            maximum=_INFINITY,
        )

    return {torch.ops.awconv.fused.default: translate}


def merge(proto: Any) -> None:
    """Lets the operator do what follows it: a BatchNorm, the addition of a bias, a ReLU or another limit.

    Args:
        proto: the model, which is changed. Nodes whose result something else needs stay.
    """
    graph = _Graph(proto.graph)
    for node in [node for node in proto.graph.node if (node.domain, node.op_type) == (_DOMAIN, _NAME)]:
        for absorb in (_absorb_norm, _absorb_bias, _absorb_limits):
            following = graph.only_user(node.output[0])
            if following is not None and absorb(graph, node, following):
                node.output[0] = following.output[0]
                proto.graph.node.remove(following)
    graph.remove_unused()


class _Graph:
    """A graph with its constants by name."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                self.constants[node.output[0]] = node.attribute[0].t

    def only_user(self, name: str) -> Any:
        """The node that needs a value, None if there are more, or if it is a result of the graph."""
        users = [node for node in self.graph.node if name in node.input]
        return users[0] if len(users) == 1 and all(output.name != name for output in self.graph.output) else None

    def array(self, name: str) -> np.ndarray[Any, Any] | None:
        """A constant in double precision, None for what is none."""
        import onnx

        if name not in self.constants:
            return None
        array: np.ndarray[Any, Any] = onnx.numpy_helper.to_array(self.constants[name]).astype(np.float64)
        return array

    def add(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """A new constant in single precision."""
        import onnx

        tensor = onnx.numpy_helper.from_array(array.astype(np.float32), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def remove_unused(self) -> None:
        """Removes constants that no node needs any more, where no node has a graph of its own, which could."""
        if any(attribute.HasField("g") for node in self.graph.node for attribute in node.attribute):
            return
        used = {name for node in self.graph.node for name in node.input} | {one.name for one in self.graph.output}
        for tensor in [tensor for tensor in self.graph.initializer if tensor.name not in used]:
            self.graph.initializer.remove(tensor)


def _absorb_norm(graph: _Graph, node: Any, norm: Any) -> bool:
    weight = graph.array(node.input[1])
    if norm.op_type != "BatchNormalization" or weight is None or norm.input[0] != node.output[0]:
        return False
    arrays = [graph.array(name) for name in norm.input[1:]]
    scale, shift, mean, variance = arrays
    if scale is None or shift is None or mean is None or variance is None:
        return False
    epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
    factor = scale / np.sqrt(variance + epsilon)
    node.input[1] = graph.add(f"{node.output[0]}_weight", weight * factor.reshape(-1, *[1] * (weight.ndim - 1)))
    _add_bias(graph, node, shift - mean * factor)
    return True


def _absorb_bias(graph: _Graph, node: Any, addition: Any) -> bool:
    weight = graph.array(node.input[1])
    if addition.op_type != "Add" or weight is None:
        return False
    other = graph.array(next((name for name in addition.input if name != node.output[0]), ""))
    if other is None or other.shape not in ((len(weight), *[1] * (weight.ndim - 2)), (1, len(weight), 1, 1)):
        return False
    _add_bias(graph, node, other.reshape(-1))
    return True


def _add_bias(graph: _Graph, node: Any, bias: np.ndarray[Any, Any]) -> None:
    if len(node.input) > 3:
        known = graph.array(node.input[3])
        assert known is not None  # only _add_bias gives one
        node.input[3] = graph.add(f"{node.input[3]}_sum", known + bias)
    else:
        node.input.append(graph.add(f"{node.output[0]}_bias", bias))


def _absorb_limits(graph: _Graph, node: Any, limit: Any) -> bool:
    if limit.op_type == "Relu":
        limits = (0.0, _INFINITY)
    elif limit.op_type == "Clip" and limit.input[0] == node.output[0]:
        ends = [
            graph.array(name) if name else np.array(end)
            for name, end in zip([*limit.input[1:], "", ""][:2], (-_INFINITY, _INFINITY), strict=True)
        ]
        if ends[0] is None or ends[1] is None:
            return False
        limits = (float(ends[0]), float(ends[1]))
    else:
        return False
    for attribute in node.attribute:
        if attribute.name in ("minimum", "maximum"):
            attribute.f = limits[attribute.name == "maximum"]
    return True
