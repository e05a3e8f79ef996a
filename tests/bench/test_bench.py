"""The benchmark command: its counts and its output. No test asserts a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  # the first import sets log levels, which no test may leave behind
import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

import awconv
from awconv.bench.data import READERS, loader, read_photographs, write_layouts
from awconv.bench.detector import matched_detectors
from awconv.bench.model import competitors
from awconv.bench.op import Layer
from awconv.bench.rivals import RoutedCondConv2d, with_condconv
from awconv.bench.roofline import work_of
from awconv.bench.timing import graphed, peak_memory, ratios
from awconv.cli import main
from awconv.ops import functional
from awconv.ops.choose import ALGORITHMS, use_algorithm
from awconv.ops.problem import describe
from tests.ops.problems import TYPICAL
from tests.photographs import photograph

TINY = ["--channels=4", "--batch=2", "--rounds=1"]


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    report = json.loads(capsys.readouterr().out)
    assert {"device", "threads", "torch", "timm", "awconv"} <= set(report["environment"])
    return report["rows"]


def test_a_layer_is_timed_by_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    works = ["forward", "step", "input_gradient", "weight_gradients"]
    arguments = ["--size=6", "--ways=all,layer,branch,se,condconv", f"--work={','.join(works)}", "--format=json"]
    assert main(["bench", "op", *TINY, *arguments]) == 0
    measured = rows(capsys)
    able = [name for name in ALGORITHMS if "gain" not in name]
    ways = ["plain", *able, "layer", "branch", "se", "condconv"]
    expected = [(work, way) for work in works for way in ways]
    assert [(row["work"], row["way"]) for row in measured] == expected
    for row in measured:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert measured[0]["ratio"]["median"] == 1


def test_a_sweep_makes_a_row_for_each_number_and_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot, roofline = tmp_path / "growth.svg", tmp_path / "roofline.svg"
    arguments = ["--size=4,6", "--work=forward", f"--plot={plot}", f"--roofline={roofline}", "--format=json"]
    assert main(["bench", "op", *TINY, *arguments]) == 0
    measured = [(row["facts"]["size"], row["way"]) for row in rows(capsys)]
    assert measured == [(4, "plain"), (4, "auto"), (6, "plain"), (6, "auto")]
    assert all("<svg" in path.read_text() for path in (plot, roofline))


def test_a_network_is_timed_beside_its_rivals(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--batch=2", "--rounds=1", "--rivals=true", "--size=16", "--work=forward,step,training,memory,branch"]
    assert main(["bench", "model", "aw_resnet8_cifar", *arguments, "--format=json"]) == 0
    measured = rows(capsys)
    ways = ["plain", "aw", "se", "condconv", "aw, per_sample"]
    expected = [(work, way) for work in ("forward", "step", "training", "memory") for way in ways]
    assert [(row["work"], row["way"]) for row in measured] == [*expected, ("branch", "aw")]
    assert measured[-1]["ratio"]["median"] > 0
    assert all(row["facts"]["bytes"] > 0 for row in measured if row["work"] == "memory")


@pytest.mark.parametrize("name", ["resnet8_cifar", "seresnet20_cifar", "test_resnet"])
def test_a_network_without_aw_is_measured_beside_its_conversion(name: str) -> None:
    networks = competitors(name, "auto")
    assert list(networks) == ["plain", "aw"]
    plain, aw = networks["plain"][0], networks["aw"][0]
    expected = timm.create_model(name)
    assert plain.state_dict().keys() == expected.state_dict().keys()
    assert aw.state_dict().keys() == awconv.convert(expected).state_dict().keys() > plain.state_dict().keys()


def test_an_aw_network_is_measured_beside_its_baseline_and_rivals() -> None:
    networks = competitors("aw_resnet20_cifar", "auto", ["se"])
    assert networks["plain"][0].state_dict().keys() == timm.create_model("resnet20_cifar").state_dict().keys()
    assert networks["se"][0].state_dict().keys() == timm.create_model("seresnet20_cifar").state_dict().keys()


@pytest.mark.parametrize(
    ("detector", "backbone", "works"),
    [
        ("faster_rcnn", "aw_resnet18", ["forward", "step"]),
        pytest.param("ssd300", "aw_vgg16", ["forward"], marks=pytest.mark.campaign),
    ],
)
def test_a_detector_is_timed_beside_the_plain_one(
    detector: str, backbone: str, works: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--detector={detector}", f"--work={','.join(works)}", "--size=64x96", "--rounds=1", "--format=json"]
    assert main(["bench", "detector", backbone, *arguments]) == 0
    measured = [(row["work"], row["way"]) for row in rows(capsys)]
    assert measured == [(work, way) for work in works for way in ("plain", "aw")]


@pytest.mark.parametrize(
    ("detector", "backbone", "arguments"),
    [
        ("faster_rcnn", "aw_resnet18", dict(min_size=96, max_size=160, box_score_thresh=0.0)),
        pytest.param("ssd300", "aw_vgg16", dict(score_thresh=0.0), marks=pytest.mark.campaign),
    ],
)
def test_both_detectors_have_the_same_to_do(
    detector: Any, backbone: str, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    detectors = matched_detectors(detector, backbone, **arguments)
    assert not caplog.messages  # of plain weights in AW layers, which are no mistake here
    image = pil_to_tensor(photograph("china")) / 255
    with torch.no_grad():
        plain, aw = (detectors[way].eval()([image])[0] for way in ("plain", "aw"))
    assert len(plain["boxes"]) == len(aw["boxes"]) > 10
    # Single precision through up to 18 layers; the order of scores that lie close together is not compared.
    torch.testing.assert_close(aw["scores"], plain["scores"], rtol=1e-3, atol=1e-4)


def test_tables_have_a_line_for_each_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "op", *TINY, "--size=4", "--format=markdown"]) == 0
    table, footer = capsys.readouterr().out.split("\n\n")
    assert [line.split("|")[2].strip() for line in table.splitlines()] == ["work", "---", "forward", "step"]
    assert torch.__version__ in footer
    assert main(["bench", "op", *TINY, "--size=4"]) == 0
    assert "auto" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["op", "--ways=fast"], "ways must be some of all, auto, .*, got 'fast'"),
        (["op", "--batch=0"], "batch must be positive integers .*, got '0'"),
        (["op", "--size=a"], "size must be positive integers .*, got 'a'"),
        (["op", "--ways=output_gain"], "algorithm='output_gain' cannot run this problem"),
        (["op", "--groups=3"], "groups must divide the channels"),
        (["op", "--plot=a.png"], "plot needs several numbers for one of channels"),
        (["op", "--size=6,8", "--plot=missing/a.png"], "plot must be a file in a folder that is there .*missing/a.png"),
        (["op", "--roofline=a.exe"], "roofline must end in .png, .svg, .pdf, got a.exe"),
        (["op", "--stride=0"], "stride must be from 1 to 2,147,483,647, got 0"),
        (["op", "--groups=-1"], "groups must be from 1 to 2,147,483,647, got -1"),
        (["op", "--kernel_size=3,4"], "kernel_size must be odd, so that the padding keeps the size, got 4"),
        (["op", f"--kernel_size={10**30}"], "kernel_size must be from 1 to 2,147,483,647, got 1000"),
        (["op", "--rounds=0"], "rounds must be from 1 to 100,000, got 0"),
        (["op", "--size=1000000"], "at least [0-9,]+ GiB are needed, and cpu has .*: give less of .*size = 1000000"),
        (["model", "aw_resnet8_cifar", "--size=10000000"], "GiB are needed.*size = 10000000"),
        (["model", "aw_resnet8_cifar", "--rounds=-1"], "rounds must be from 1 to 100,000, got -1"),
        (["detector", "aw_resnet18", "--size=9999999x9999999"], "GiB are needed.*size = 9999999x9999999"),
        (["op", "--device=tpu"], "device must be cpu or cuda"),
        (["detector", "aw_resnet18", "--size=800"], "size must be a height and a width such as 800x1333, got '800'"),
        (["detector", "resnet50"], "networks must be AW networks, got 'resnet50'"),
        (["model", "resnet5O"], "network must be a name that timm.create_model knows, got 'resnet5O'"),
        (["model", "aw_resnet8_cifar", "--algorithm=fast"], "algorithm must be some of auto, .*, got 'fast'"),
        (["model", "aw_resnet8_cifar", "--work=fit"], "work must be some of forward, step, training, memory, branch"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "op", "--device=cuda"]) == 1
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["plain", "auto", "per_tap"])
def test_a_gradient_alone_is_that_of_the_whole_backward(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(4, 6, 2, 3, out_channels=8, stride=2, channels_last=True)
    layer.call(way, "step")()
    grad, given = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: given.append(grad(*a, **k)))
    for work in ("input_gradient", "weight_gradients"):
        backward = layer.call(way, work)
        backward()
        backward()  # from what the first call made
    (first,), (again,), weights, weights_again = given
    assert torch.equal(first, again)
    torch.testing.assert_close(first, layer.input.grad)
    assert len(weights) == len(weights_again) == 2
    for gradient, tensor in zip(weights, (layer.weight, layer.attention), strict=True):
        torch.testing.assert_close(gradient, tensor.grad)


@pytest.mark.gpu
def test_a_graph_replays_what_a_function_launches() -> None:
    layer = Layer(16, 8, 4, 3, device="cuda", dtype=torch.bfloat16, channels_last=True)
    numbers = torch.zeros(8, device="cuda")

    def add() -> None:
        numbers.add_(1)

    replay = graphed(add)
    before = numbers[0].item()
    replay()
    assert numbers[0].item() == before + 1
    for work in ("forward", "input_gradient", "weight_gradients"):
        assert ratios({"plain": graphed(layer.call("plain", work))}, rounds=2, device="cuda")["plain"].seconds > 0


def test_the_first_function_is_the_baseline() -> None:
    measured = ratios({"one": lambda: None, "other": lambda: None}, rounds=3, device="cpu")
    assert (measured["one"].low, measured["one"].median, measured["one"].high) == (1, 1, 1)
    assert measured["other"].seconds > 0


def test_the_peak_counts_what_lives_at_once() -> None:
    def work() -> None:
        first = torch.ones(1000)  # 4,000 bytes
        second = first * 2  # and 4,000 more
        del first
        torch.cat([second, second])  # 4,000 and 8,000

    assert peak_memory(work, held=100, device="cpu") == 12_100


def test_operations_and_bytes_by_hand() -> None:
    tensors = (torch.empty(5, 6, 8, 8), torch.empty(10, 3, 3, 3), torch.empty(5, 10, 1, 3, 3))
    problem = describe(2, *tensors, None, 2, 1, 1, 2, True)
    work = work_of(problem, batch=5, passes=1)
    assert work.operations == 2 * 5 * (10 * 4 * 4) * (3 * 9)
    assert work.bytes == 4 * (5 * 6 * 8 * 8 + 5 * 10 * 4 * 4 + 10 * 3 * 9)
    step = work_of(problem, batch=5, passes=3)
    assert (step.operations, step.bytes) == (3 * work.operations, 3 * work.bytes)


def test_all_calls_can_be_held_to_one_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    case = TYPICAL["per_tap"]
    monkeypatch.setattr(functional, "_remembered_plan", functional._remembered_plan.__wrapped__)
    for name, algorithm in list(ALGORITHMS.items()):
        run = lambda *a, name=name, run=algorithm.run: (ran.append(name), run(*a))[1]  # noqa: E731
        monkeypatch.setitem(ALGORITHMS, name, algorithm._replace(run=run))
    with use_algorithm("per_sample"):
        case.run()
        case.run("per_tap")
    case.run()
    assert ran[:2] == ["per_sample", "per_tap"]
    assert ran[2] != "per_sample"


def test_condconv_takes_the_same_places() -> None:
    plain = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.nn.ReLU())
    network = with_condconv(plain, ["0"])
    assert isinstance(network[0], RoutedCondConv2d)
    assert isinstance(plain[0], torch.nn.Conv2d)
    input = torch.randn(2, 4, 9, 9)
    conv = network[0].conv
    routes = torch.sigmoid(network[0].routing(input.mean((2, 3))))
    each = [
        F.conv2d(sample[None], (route @ conv.weight).reshape(6, 4, 3, 3), route @ conv.bias, 2, 1)
        for sample, route in zip(input, routes, strict=True)
    ]
    torch.testing.assert_close(network(input), torch.cat(each).relu())


@pytest.mark.parametrize(
    ("runtimes", "batches"),
    [
        ("onnxruntime,pytorch", (2,)),
        pytest.param("onnxruntime,pytorch", (1, 2), marks=pytest.mark.campaign),
        pytest.param("onnxruntime_operator,openvino", (1, 2), marks=pytest.mark.campaign),
    ],
)
def test_exported_networks_are_measured_in_their_runtimes(
    runtimes: str, batches: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    if "openvino" in runtimes:
        pytest.importorskip("openvino")
    arguments = ["aw_resnet8_cifar", f"--batch={','.join(map(str, batches))}", f"--runtimes={runtimes}"]
    arguments += ["--rounds=1", "--format=json"]
    assert main(["bench", "export", *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["way"] for row in rows} == {"plain", "aw", "se"}
    assert {row["work"] for row in rows} == {f"{name}, batch {n}" for name in runtimes.split(",") for n in batches}
    for row in rows:
        assert row["ratio"]["seconds"] > 0
        assert ("nodes" in row["facts"]) == ("pytorch" not in row["work"])
    first = runtimes.partition(",")[0]
    nodes = {row["way"]: row["facts"]["nodes"] for row in rows if row["work"] == f"{first}, batch {batches[0]}"}
    assert nodes["plain"] < nodes["aw"]


def test_a_runtime_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    assert main(["bench", "export", "aw_resnet8_cifar", "--runtimes=tensorrt"]) == 1
    assert "runtimes must be some of onnxruntime, onnxruntime_operator, openvino, pytorch" in capsys.readouterr().err


def test_loaders_are_timed_beside_torchvisions(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size=16", "--images=20", "--batch=5", "--workers=1", "--rounds=1", "--format=json"]
    assert main(["bench", "data", *arguments]) == 0
    measured = rows(capsys)
    assert [row["way"] for row in measured] == [
        "torchvision",
        "uint8",
        "ImageFolder",
        "Parquet",
        "WebDataset",
        "pillow",
    ]
    assert measured[0]["ratio"]["median"] == 1
    for row in measured:
        facts = row["facts"]
        # 20 images by one process in the median time
        assert facts["images_a_second_and_core"] == pytest.approx(20 / row["ratio"]["seconds"], abs=0.06)
        assert 400 * 300 < facts["pixels"] < 560 * 420


def test_all_loaders_read_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "own" / "deep").mkdir(parents=True)
    for index, name in enumerate(("china", "flower")):
        photograph(name).save(tmp_path / "own" / "deep" / f"{index}.jpg")
    photographs = read_photographs(tmp_path / "own", 100)
    assert photographs == [(tmp_path / "own" / "deep" / f"{index}.jpg").read_bytes() for index in range(2)]
    write_layouts(photographs, 30, tmp_path, READERS)
    sources = [loader(way, tmp_path, 16, 10, 1).dataset.dataset for way in READERS]
    files = [[Path(one.encoded(index).source).read_bytes() for index in range(30)] for one in sources[:1]]
    files += [[one.encoded(index).source for index in range(30)] for one in sources[1:]]
    assert [sorted(one) for one in files] == [sorted(photographs * 15)] * 3
    assert [sorted(one.targets.tolist()) for one in sources] == [sorted([*range(10)] * 3)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere must be a folder with image files"),
        (["--images=4", "--batch=2"], "images must be at least a batch, and 10, one of each class; got 4"),
        (["--workers=100000"], "workers must be at most"),
        (["--ways=ffcv"], "ways must be some of uint8, ImageFolder, Parquet, WebDataset, pillow"),
    ],
)
def test_a_loading_that_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "data", *arguments]) == 1
    assert message in capsys.readouterr().err
