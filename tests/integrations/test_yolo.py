"""Converted networks in Ultralytics: fused, trained, resumed, saved, exported, and named in YAML files."""

from __future__ import annotations

import copy
import doctest
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import awconv
from awconv import AWConv2d
from awconv.integrations import ultralytics as integration
from awconv.integrations.ultralytics import register, trainer
from tests.conftest import SHARED_DATA
from tests.integrations.yolo_data import coco128, rectangles
from tests.kept import kept_settings
from tests.networks import moved

pytest.importorskip("ultralytics", reason="needs Ultralytics, which is AGPL-3.0: make yolo installs it")
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils import DEFAULT_CFG

COCO128 = SHARED_DATA / "coco128" / "coco128.zip"


@pytest.fixture(autouse=True)
def _leaves_settings() -> Iterator[None]:
    with kept_settings():
        yield


@pytest.fixture
def names_in_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """AW blocks are known in this test alone."""
    monkeypatch.setattr(tasks, "parse_model", getattr(tasks.parse_model, "args", [tasks.parse_model])[0])
    register()


def aw_layers(model: nn.Module) -> dict[str, AWConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AWConv2d)}


def converted(config: str = "yolo11n.yaml", **arguments: Any) -> Any:
    yolo = YOLO(config)
    awconv.convert(yolo.model, **arguments)
    return yolo


def options(data: Path, folder: Path, **more: Any) -> dict[str, Any]:
    small = dict(imgsz=64, batch=4, device="cpu", workers=0, plots=False, verbose=False)
    return dict(data=str(data), project=str(folder), **small, **more)


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What goes into the head, which hides small differences behind its biases."""
    found = model(images)[1]
    found = found[-1] if isinstance(found, tuple) else found  # of a network with masks
    return torch.cat([level.flatten(1) for level in found.get("one2one", found)["feats"]], dim=1)


def test_all_spatial_convolutions_but_the_stem_are_converted() -> None:
    yolo = YOLO("yolo11n.yaml")
    expected = {
        name
        for name, module in yolo.model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and name != "model.0.conv"
    }
    rows = [(layer.i, layer.f, layer.type, layer.np) for layer in yolo.model.model]
    layers = aw_layers(awconv.convert(yolo.model))
    assert set(layers) == expected
    assert any(layer.groups > 1 for layer in layers.values())
    assert type(yolo.model.model[23].dfl.conv) is nn.Conv2d
    assert [(layer.i, layer.f, layer.type, layer.np) for layer in yolo.model.model] == rows


@pytest.mark.parametrize("config", ["yolo11n", "yolo26n", "yolo26n-seg", "yolov9t", "yolov10s"])
def test_a_converted_network_computes_the_same_and_fuses_exactly(config: str, caplog: pytest.LogCaptureFixture) -> None:
    model, images = YOLO(f"{config}.yaml").model.double(), torch.rand(4, 3, 64, 64).double()
    with torch.no_grad():
        model.train()(images)  # statistics other than 0 and 1
        before = features(model.eval(), images)
        awconv.convert(model, init="identity")
        torch.testing.assert_close(features(model, images), before, rtol=1e-9, atol=1e-11)  # another order of sums
        attended = features(moved(model), images)
        assert (attended - before).abs().max() > 1e-6
        fused = copy.deepcopy(model)
        assert fused.fuse(verbose=False) is fused
        for network in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(features(network, images), attended, rtol=1e-9, atol=1e-11)
            # YOLO26 and YOLOv10 have a head for training alone, which fuse() drops.
            assert set(aw_layers(network)) == {
                name for name in aw_layers(model) if dict(fused.named_modules()).get(name)
            }
    assert len(aw_layers(fused)) > 30
    blocks = [module for module in fused.modules() if type(module).__name__ in ("RepConv", "RepVGGDW")]
    assert bool(blocks) is (config in ("yolov9t", "yolov10s")) is ("now leaves its block as it is" in caplog.text)
    assert "raises an error" not in caplog.text
    assert all(hasattr(block, "conv1") for block in blocks)  # the two kernels of each are still two
    awconv.revert(model, drop_attention=True).fuse(verbose=False)
    assert model.is_fused()


def test_a_convolution_that_is_a_row_of_the_yaml_keeps_its_place() -> None:
    head = [[-1, 1, "nn.Conv2d", [8, 8, 3, 1, 1]], [[1], 1, "Detect", ["nc"]]]
    model = tasks.DetectionModel({"nc": 1, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": head}, verbose=False)
    awconv.convert(model.eval())
    assert type(model.model[1]) is AWConv2d
    assert (model.model[1].i, model.model[1].f) == (1, -1)
    assert model(torch.rand(2, 3, 32, 32))[0].shape[0] == 2


def test_the_count_of_info_has_the_convolutions_and_a_quarter_of_the_attention() -> None:
    yolo = YOLO("yolo11n.yaml")
    _, parameters, _, before = yolo.info()
    found = awconv.summary(awconv.convert(yolo.model).eval(), torch.zeros(1, 3, 640, 640))
    _, after_parameters, _, after = yolo.info()
    assert after_parameters == parameters + found.parameters_added
    assert 0 <= after - before < 0.3 * (2e-9 * found.operations_added)


@pytest.mark.skipif(not COCO128.exists(), reason="needs coco128, which a clone does not have")
def test_the_trainer_trains_attention_on_coco128_where_the_plain_one_loses_it(tmp_path: Path) -> None:
    quick = dict(optimizer="SGD", lr0=0.01, nbs=4, warmup_epochs=0)  # each batch is a step
    arguments = options(coco128(COCO128, tmp_path / "data", 8), tmp_path, epochs=2, amp=False, **quick)
    yolo = converted(init="identity")
    before = {name: value.clone() for name, value in yolo.model.state_dict().items()}
    ours = trainer(yolo)
    losses: dict[str, list[float]] = {"plain": [], "aw": []}
    for name, used in (("plain", None), ("aw", ours)):
        training = converted(init="identity")
        training.add_callback(
            "on_train_batch_end", lambda trainer, name=name: losses[name].append(float(trainer.loss.detach()))
        )
        training.train(trainer=used, name=name, **arguments)
        assert len(aw_layers(training.model)) == (41 if used else 0)
    assert len(losses["aw"]) == 4
    assert losses["aw"][0] == pytest.approx(losses["plain"][0], rel=1e-5)  # the same start, seed and images
    assert losses["aw"][2:] != losses["plain"][2:]
    trained, averaged = training.trainer.model.state_dict(), training.trainer.ema.ema.state_dict()
    decayed = {id(p) for g in training.trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    kernels = {id(p) for p in training.trainer.model.parameters() if p.ndim == 4}
    assert decayed == kernels  # not norms and biases
    for name in aw_layers(training.model):
        if not name.startswith("model.23.cv2"):  # whose coarse levels may see no box
            for key in (f"{name}.weight", f"{name}.attention.norm2.weight"):
                assert not torch.equal(trained[key], before[key]), key
                assert not torch.equal(averaged[key], before[key]), key


def test_mixed_precision_has_finite_gradients_for_every_branch() -> None:
    model = converted(init="identity").model.train()
    model.args = DEFAULT_CFG
    batch = dict(
        img=torch.rand(4, 3, 64, 64),
        batch_idx=torch.arange(4.0),
        cls=torch.zeros(4, 1),
        bboxes=torch.tensor([[0.4, 0.5, 0.5, 0.5]]).repeat(4, 1),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(batch)
    loss.sum().backward()
    for name, layer in aw_layers(model).items():
        gradient = layer.attention.norm2.weight.grad
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0 or name.startswith("model.23.cv2"), name  # no box on a coarse level


class StoppedError(Exception):
    """A run that was cut off."""


def stop_in_epoch_2(trainer: Any) -> None:
    if trainer.epoch == 1:
        raise StoppedError


def test_a_training_that_was_stopped_resumes_with_its_attention(tmp_path: Path) -> None:
    yolo = converted(reduction=8, activation="tanh", init="identity")
    yolo.add_callback("on_train_epoch_start", stop_in_epoch_2)
    arguments = options(rectangles(tmp_path / "data", 4, ["box"]), tmp_path, epochs=2)
    with pytest.raises(StoppedError):
        yolo.train(trainer=trainer(yolo), **arguments)
    last = str(yolo.trainer.last)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        YOLO(last).train(resume=True)  # Ultralytics notices by the optimizer's state
    yolo = YOLO(last)
    assert {(layer.reduction, layer.activation) for layer in aw_layers(yolo.model).values()} == {(8, "tanh")}
    stored = {name: value.clone() for name, value in yolo.model.state_dict().items()}
    seen: list[Any] = []
    yolo.add_callback("on_train_start", lambda trainer: seen.append(copy.deepcopy(trainer.model.state_dict())))
    yolo.train(resume=True, trainer=trainer(yolo))
    assert yolo.trainer.start_epoch == 1
    assert seen[0].keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in seen[0].items())
    assert len(aw_layers(yolo.model)) == 41


def test_other_classes_get_a_head_with_new_branches_or_that_of_the_weights(tmp_path: Path) -> None:
    arguments = options(rectangles(tmp_path / "data", 4, ["a", "b"]), tmp_path, epochs=1)
    yolo = converted(reduction=8, out_expansion=2, init="identity")
    yolo.train(trainer=trainer(yolo), **arguments)
    layers = aw_layers(yolo.model)
    assert len(layers) == 41
    assert layers["model.23.cv3.0.1.0.conv"].in_channels == 64  # 80 for 80 classes
    assert {(layer.reduction, layer.out_expansion, layer.attention.relative) for layer in layers.values()} == {
        (8, 2, True)
    }
    with torch.no_grad():
        moved(yolo.model)
    yolo.save(tmp_path / "moved.pt")
    tuned = YOLO(tmp_path / "moved.pt")
    arguments["data"] = str(rectangles(tmp_path / "other", 4, ["a", "b", "c"]))
    seen: list[Any] = []
    tuned.add_callback("on_train_start", lambda trainer: seen.append(copy.deepcopy(trainer.model)))
    tuned.train(trainer=trainer(tuned), **arguments)
    for name, layer in aw_layers(YOLO(tmp_path / "moved.pt").model).items():
        state = seen[0].get_submodule(name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items()), name


def test_a_checkpoint_predicts_validates_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    data = rectangles(tmp_path / "data", 4, ["box"])
    yolo = converted("yolov8n.yaml", init="identity")
    with torch.no_grad():
        yolo.model.train()(torch.rand(4, 3, 64, 64))
        moved(yolo.model).half().float()  # as it is saved
    yolo.save("saved.pt")
    loaded, images = YOLO("saved.pt"), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = yolo.model(images)[0]
        assert torch.equal(loaded.model.eval()(images)[0], expected)
    results = loaded.predict(str(tmp_path / "data" / "images" / "0.png"), imgsz=64, verbose=False)
    assert results[0].orig_shape == (64, 64)
    assert 0 <= loaded.val(**options(data, tmp_path)).box.map <= 1
    assert len(aw_layers(loaded.model)) == 38
    file = loaded.export(format="onnx", imgsz=64, dynamic=True, simplify=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    # Boxes are of some 64 pixels; both add in float32, over some 60 layers.
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail):
        session.run(None, {session.get_inputs()[0].name: torch.rand(1, 3, 96, 96).numpy()})
    (result,) = YOLO(file).predict(str(tmp_path / "data" / "images" / "0.png"), imgsz=64, verbose=False)
    assert result.orig_shape == (64, 64)


ROWS = {
    "nc": 2,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "AWConv", [16, 3, 2]], [-1, 2, "AWC3k2", [16, True]]],
    "head": [[-1, 2, "AWBottleneck", [16]], [-1, 1, "Conv", [16, 3, 2]], [[3, 4], 1, "Detect", ["nc"]]],
}


@pytest.mark.usefixtures("names_in_yaml")
def test_a_yaml_names_aw_blocks_and_every_training_builds_them_again(tmp_path: Path) -> None:
    (tmp_path / "tiny-aw.yaml").write_text(repr({**ROWS, "awconv": {"reduction": 8, "init": "identity"}}))
    yolo = YOLO(tmp_path / "tiny-aw.yaml")
    plain = copy.deepcopy(ROWS)
    for row in (*plain["backbone"], *plain["head"]):
        row[2] = row[2].removeprefix("AW")
    reference = tasks.DetectionModel(plain, verbose=False)
    assert str(awconv.revert(copy.deepcopy(yolo.model))) == str(reference)
    spatial = {n for n, m in reference.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    named = ("model.1.", "model.2.", "model.3.")
    layers = aw_layers(yolo.model)
    assert set(layers) == {name for name in spatial if name.startswith(named)}
    assert {(layer.reduction, layer.attention.relative) for layer in layers.values()} == {(8, True)}
    assert [layer.type for layer in yolo.model.model][1:4] == ["AWConv", "AWC3k2", "AWBottleneck"]
    assert [layer.np for layer in yolo.model.model] == [
        sum(p.numel() for p in m.parameters()) for m in yolo.model.model
    ]
    yolo.add_callback("on_train_epoch_start", stop_in_epoch_2)
    with pytest.raises(StoppedError):
        yolo.train(**options(rectangles(tmp_path / "data", 4, ["a", "b"]), tmp_path, epochs=2))
    resumed = YOLO(yolo.trainer.last)
    resumed.train(resume=True)
    assert resumed.trainer.start_epoch == 1
    assert set(aw_layers(resumed.model)) == set(layers)
    register()  # a second time changes nothing
    assert len(aw_layers(YOLO(tmp_path / "tiny-aw.yaml").model)) == len(layers)


@pytest.mark.usefixtures("names_in_yaml")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": [[-1, 1, "AWConw", [8, 3, 2]]]}, r"there is no block 'Conw'"),
        (
            {"backbone": [*ROWS["backbone"][:2], [-1, 1, "AWSPPF", [8, 5]]]},
            r"layer 2 of the YAML file, AWSPPF: its convolutions all have a kernel of size 1, .* write SPPF",
        ),
        ({"awconv": {"reductoin": 8}}, r"layer 1 of the YAML file, AWConv: .*no argument reductoin"),
        ({"awconv": {"select": "*"}}, r"must not hold select: the rows"),
        ({"awconv": "identity"}, r"must hold arguments of awconv.convert, got 'identity'"),
    ],
)
def test_a_yaml_with_a_mistake_says_which(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tasks.DetectionModel({**copy.deepcopy(ROWS), **change}, verbose=False)


def of_another_version(d: Any, ch: Any, verbose: bool = True) -> Any:
    raise KeyError("rows")


@pytest.mark.parametrize("parse", [None, lambda rows: rows, of_another_version])
def test_another_version_of_ultralytics_is_told_of_and_left_alone(parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "parse_model", parse)
    with pytest.raises(RuntimeError, match=r"register: Ultralytics \d.* is not known .*awconv\.convert\(yolo\.model\)"):
        register()
    assert tasks.parse_model is parse


def test_a_version_that_does_not_ask_for_the_function_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = getattr(tasks.parse_model, "args", [tasks.parse_model])[0]
    monkeypatch.setattr(tasks, "parse_model", plain)
    rows = {"nc": 1, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}
    built = tasks.DetectionModel(rows, verbose=False)
    monkeypatch.setattr(tasks, "DetectionModel", lambda *arguments, **more: built)
    with pytest.raises(RuntimeError, match=r"AWConv was to be model\.0\.conv, and there is none"):
        register()
    assert tasks.parse_model is plain


def branch_of_a_users_own(spec: awconv.BranchSpec) -> nn.Module:
    size = spec.attention_size
    values = nn.Linear(spec.in_channels, math.prod(size))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), values, nn.Unflatten(1, size))


def test_the_trainer_says_what_it_cannot_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no AW-convolution; convert it first"):
        trainer(YOLO("yolo11n.yaml"))
    with pytest.raises(TypeError, match=r"a network of PyTorch, such as YOLO\('yolo11n\.pt'\), got <"):
        trainer(type("Yolo", (), {"model": "model.onnx"})())
    arguments = options(rectangles(tmp_path / "data", 4, ["box"]), tmp_path, epochs=1)
    fused = converted()
    fused.model.fuse(verbose=False)
    with pytest.raises(ValueError, match=r"A fused network cannot be trained: load its checkpoint again"):
        fused.train(trainer=trainer(fused), **arguments)
    small, large = converted("yolov5n.yaml"), converted("yolo11n.yaml")
    with pytest.raises(ValueError, match=r"no convolution 'model\.2\.m\.0\.cv1\.conv'.*|those of another network"):
        small.train(trainer=trainer(large), **arguments)
    own = converted(branch=branch_of_a_users_own)
    with pytest.raises(ValueError, match=r"a branch or a pool of a user's own\. Give the YAML the number of classes"):
        own.train(trainer=trainer(own), **arguments)


def test_a_trainer_of_a_users_own_stays_what_it_is() -> None:
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Own(DetectionTrainer):
        """Does something more."""

    made = trainer(converted(), Own)
    assert issubclass(made, Own)
    assert made.__name__ == "AWOwn"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="ultralytics")

    monkeypatch.setattr(integration.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install ultralytics"):
        register()


@pytest.mark.usefixtures("names_in_yaml")
def test_the_examples_in_docstrings_run() -> None:
    failed, tried = doctest.testmod(integration)
    assert (failed, tried > 5) == (0, True)
