"""awconv's operator for ONNX Runtime, against the paper's sum in double precision."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from awconv.export import export, ort_library
from awconv.export.exported import open_exported
from awconv.ops import build
from awconv.tasks import ClassificationTask
from tests.export.conftest import NAME, Exported, logits, normalised
from tests.ops.reference import aw_convolution

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module", autouse=True)
def library() -> Path:
    try:
        return ort_library()
    except RuntimeError as error:
        pytest.skip(str(error))


def model(weight: np.ndarray[Any, Any], constant: bool, bias: bool, **attributes: Any) -> bytes:
    """One node, AWConv."""
    helper, tensor = onnx.helper, onnx.helper.make_tensor_value_info
    names = ["input", "weight", "gain", *(["bias"] if bias else [])]
    node = helper.make_node("AWConv", names, ["output"], domain="awconv", **attributes)
    inputs = [tensor(name, onnx.TensorProto.FLOAT, None) for name in names if name != "weight" or not constant]
    graph = helper.make_graph(
        [node],
        "graph",
        inputs,
        [tensor("output", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "weight")] if constant else [],
    )
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("awconv", 1)]
    content: bytes = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    return content


def session(content: bytes | Path, threads: int = 2) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(ort_library()))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class Case:
    """An AW-convolution with random numbers, and what it should give."""

    def __init__(
        self,
        channels: tuple[int, int],
        size: tuple[int, ...],
        kernel: tuple[int, ...],
        groups: int = 1,
        stride: int = 1,
        pads: tuple[int, int] = (1, 1),
        dilation: int = 1,
        blocks: int = 1,
        batch: int = 2,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        generator = np.random.default_rng(seed)
        axes = len(kernel)
        weight_shape = (channels[1], channels[0] // groups, *kernel)
        exact = {
            "input": generator.normal(size=(batch, channels[0], *size)),
            "weight": generator.normal(size=weight_shape),
            "gain": generator.uniform(0.5, 1.5, size=(batch, channels[1], blocks, int(np.prod(kernel)))),
        }
        if bias:
            exact["bias"] = generator.normal(size=channels[1])
        self.arrays: Arrays = {name: array.astype(np.float32) for name, array in exact.items()}
        self.attributes: dict[str, Any] = dict(
            strides=[stride] * axes,
            pads=[pads[0]] * axes + [pads[1]] * axes,
            dilations=[dilation] * axes,
            group=groups,
            minimum=-np.inf,
            maximum=np.inf,
        )
        self.expected = aw_convolution(
            *(self.arrays[name].astype(np.float64) for name in ("input", "weight")),
            self.arrays["gain"].astype(np.float64).reshape(batch, channels[1], blocks, *kernel),
            self.arrays.get("bias"),
            [stride] * axes,
            [pads] * axes,
            [dilation] * axes,
            groups,
            False,
        )

    def model(self, constant: bool) -> bytes:
        return model(self.arrays["weight"], constant, "bias" in self.arrays, **self.attributes)

    def feeds(self, constant: bool) -> Arrays:
        return {name: array for name, array in self.arrays.items() if name != "weight" or not constant}

    def check(self, output: np.ndarray[Any, Any]) -> None:
        assert output.shape == self.expected.shape
        assert np.abs(output - self.expected).max() <= 2e-6 * np.abs(self.expected).max()


CASES = {
    "a vector of channels": Case((3, 16), (7, 9), (3, 3)),
    "one more than a panel": Case((5, 33), (5, 5), (3, 3), batch=1, bias=True),
    "one less than a vector": Case((4, 15), (6, 20), (3, 3), batch=3),
    "wider than a tile": Case((2, 18), (3, 31), (3, 3), batch=1),
    "strides": Case((4, 20), (11, 8), (3, 3), stride=2, bias=True),
    "dilation and uneven padding": Case((3, 20), (8, 9), (3, 3), dilation=2, pads=(3, 1)),
    "blocks of input channels": Case((6, 18), (6, 6), (3, 3), blocks=3),
    "groups of many channels": Case((6, 36), (5, 6), (3, 3), groups=2, bias=True),
    "groups of few channels": Case((8, 12), (5, 17), (3, 3), groups=4, blocks=2, bias=True),
    "depthwise": Case((21, 21), (9, 16), (3, 3), groups=21, batch=3, bias=True),
    "depthwise, more than a task has": Case((130, 130), (4, 5), (3, 3), groups=130),
    "depthwise with strides": Case((9, 9), (10, 33), (5, 5), groups=9, stride=2, pads=(2, 2), batch=1),
    "depthwise, rows shorter than a vector": Case((34, 34), (7, 6), (3, 3), groups=34, bias=True),
    "one axis": Case((3, 17), (23,), (3,), stride=2),
    "three axes": Case((2, 5), (3, 4, 5), (2, 3, 3)),
    "an even kernel without padding": Case((3, 40), (6, 5), (2, 4), pads=(0, 0)),
    "pointwise": Case((5, 17), (4, 4), (1, 1), pads=(0, 0)),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "computed"])
@pytest.mark.parametrize("name", CASES)
def test_it_gives_the_papers_sum(name: str, constant: bool, threads: int) -> None:
    case = CASES[name]
    (output,) = session(case.model(constant), threads).run(None, case.feeds(constant))
    case.check(output)


def test_batch_and_sizes_may_change_from_call_to_call() -> None:
    shapes = [(1, (5, 9)), (7, (3, 2)), (2, (4, 19)), (1, (1, 1))]
    cases = [Case((3, 33), size, (3, 3), batch=batch) for batch, size in shapes]
    runs = session(cases[0].model(constant=False))
    for case in cases:
        (output,) = runs.run(None, case.feeds(constant=False))
        case.check(output)


def test_an_empty_batch_gives_none() -> None:
    case = CASES["depthwise"]
    feeds = {name: array[:0] if name in ("input", "gain") else array for name, array in case.feeds(True).items()}
    (output,) = session(case.model(True)).run(None, feeds)
    assert output.shape == (0, *case.expected.shape[1:])


@pytest.mark.parametrize("name", ["groups of many channels", "depthwise"])
def test_limits_hold_after_the_bias(name: str) -> None:
    case = CASES[name]
    content = model(case.arrays["weight"], True, True, **(case.attributes | dict(minimum=0.0, maximum=6.0)))
    (output,) = session(content).run(None, case.feeds(True))
    assert (case.expected < 0).any()
    assert (case.expected > 6).any()
    np.testing.assert_allclose(output, case.expected.clip(0, 6), atol=2e-6 * np.abs(case.expected).max())


def test_nan_is_not_hidden_by_a_limit() -> None:
    case = CASES["depthwise"]
    content = model(case.arrays["weight"], True, True, **(case.attributes | dict(minimum=0.0)))
    feeds = case.feeds(True) | {"input": case.arrays["input"].copy()}
    feeds["input"][0, 0, 4, 4] = np.nan
    (output,) = session(content).run(None, feeds)
    assert np.isnan(output[0, 0, 3:6, 3:6]).all()
    assert np.isfinite(output[1:]).all()


@pytest.mark.parametrize("constant", [True, False])
def test_sessions_may_run_from_several_threads_at_once(constant: bool) -> None:
    cases = [CASES["groups of many channels"], CASES["depthwise"], CASES["one more than a panel"]]
    sessions = [session(case.model(constant)) for case in cases]

    def run(index: int) -> np.ndarray[Any, Any]:
        output: np.ndarray[Any, Any] = sessions[index].run(None, cases[index].feeds(constant))[0]
        return output

    once = [run(index) for index in range(3)]
    for case, output in zip(cases, once, strict=True):
        case.check(output)
    indices = list(itertools.chain.from_iterable(itertools.repeat(range(3), 40)))
    with ThreadPoolExecutor(6) as pool:
        for index, output in zip(indices, pool.map(run, indices), strict=True):
            np.testing.assert_array_equal(output, once[index])


def wrong(**changes: np.ndarray[Any, Any]) -> Any:
    case = CASES["blocks of input channels"]
    return session(case.model(False)).run(None, case.feeds(False) | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gain": (1, 18, 3, 9)}, "gain must have the shape"),
        ({"gain": (2, 18, 4, 9)}, "gain must have the shape"),
        ({"gain": (2, 18, 3, 8)}, "gain must have the shape"),
        ({"gain": (2, 18, 27)}, "gain must have the shape"),
        ({"input": (2, 5, 6, 6)}, "input's channels must be group times"),
        ({"input": (2, 6, 6)}, "as many axes as the weight"),
        ({"weight": (18, 6, 0, 3)}, "must not be empty"),
        ({"weight": (1, 6, 23, 23)}, "512 taps"),
    ],
)
def test_wrong_shapes_are_refused_in_words(changes: dict[str, tuple[int, ...]], expected: str) -> None:
    with pytest.raises(Exception, match=expected):
        wrong(**{name: np.zeros(shape, np.float32) for name, shape in changes.items()})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"strides": [0, 1]}, "must be positive"),
        ({"dilations": [1]}, "same one to three axes"),
        ({"pads": [1, 1]}, "two numbers for each axis"),
        ({"pads": [1, 1, -1, 1]}, "must not be negative"),
        ({"group": 0}, "group must be positive"),
        ({"group": 5}, "multiple of group"),
    ],
)
def test_wrong_attributes_are_refused_in_words(changes: dict[str, Any], expected: str) -> None:
    case = CASES["a vector of channels"]
    with pytest.raises(Exception, match=expected):
        session(model(case.arrays["weight"], True, False, **(case.attributes | changes)))


def test_a_network_gives_what_it_gives_in_pytorch(
    exported: Exported, task: ClassificationTask, batch: torch.Tensor
) -> None:
    file = exported(".onnx", operator=True)
    kinds = [(node.domain, node.op_type) for node in onnx.load(file).graph.node]
    assert kinds.count(("awconv", "AWConv")) == 6
    assert ("", "BatchNormalization") not in kinds
    runs = session(file)
    for images in (batch[:1], batch):
        (got,) = runs.run(None, {"images": normalised(task, images)})
        exact = logits(task, images)
        assert np.abs(got - exact).max() <= 1e-5 * np.abs(exact).max()


def test_its_file_is_opened_with_the_operator(exported: Exported, batch: torch.Tensor) -> None:
    with_operator, without = (open_exported(exported(".onnx", **more)) for more in ({"operator": True}, {}))
    assert with_operator.nodes < without.nodes
    torch.testing.assert_close(with_operator(batch), without(batch), rtol=1e-4, atol=1e-4)


def test_without_a_compiler_it_is_told_what_is_missing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = exported(".onnx", operator=True)
    monkeypatch.setenv("CC", "nothing-of-this-name")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"'nothing-of-this-name'.*Exported without --operator, it runs"):
            open_exported(file)
        with pytest.raises(OSError, match=r"cannot be had here.*'nothing-of-this-name'"):
            export(NAME, tmp_path / "net.onnx", operator=True)
    finally:
        build.library.cache_clear()


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("net.xml", {}, "--format must be onnx, got openvino"),
        ("net.pt2", {}, "--format must be onnx, got pt2"),
        ("net.onnx", {"precision": "fp16"}, "precision must be fp32 with --operator"),
    ],
)
def test_it_is_refused_where_it_cannot_be_used(
    name: str, arguments: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        export(NAME, tmp_path / name, operator=True, **arguments)
