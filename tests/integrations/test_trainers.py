"""AW networks in skorch, Transformers and Accelerate, and by timm's tools for training."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import awconv
from awconv.branch import AttentionBranch
from awconv.models.published import WEIGHTS
from awconv.parameter_groups import branch_parameters
from tests.networks import moved

IMAGES, LABELS = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10


def converted(**arguments: Any) -> nn.Module:
    return awconv.convert(timm.create_model("resnet8_cifar", in_chans=1), init="identity", **arguments)


class Classifier(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        logits = self.network(pixel_values)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


DATA = [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]


class TestSkorch:
    def fitted(self, **arguments: Any) -> Any:
        skorch: Any = pytest.importorskip("skorch", reason="needs skorch")
        net = skorch.NeuralNetClassifier(
            converted,
            criterion=nn.CrossEntropyLoss,
            optimizer__param_groups=[("*.attention.*", {"lr": 0.003})],
            lr=0.05,
            max_epochs=2,
            batch_size=16,
            train_split=None,
            verbose=0,
            **arguments,
        )
        return net.fit(IMAGES.numpy(), LABELS.numpy())

    def test_groups_by_a_glob_are_the_branches(self) -> None:
        net = self.fitted()
        group, rest = net.optimizer_.param_groups
        assert (group["lr"], rest["lr"]) == (0.003, 0.05)
        assert set(group["params"]) == branch_parameters(net.module_)
        assert any(branch.norm2.weight.any() for branch in net.module_.modules() if isinstance(branch, AttentionBranch))

    def test_a_pickle_and_saved_parameters_predict_the_same(self, tmp_path: Path) -> None:
        net = self.fitted(module__reduction=8)
        expected = net.predict_proba(IMAGES.numpy())
        assert (pickle.loads(pickle.dumps(net)).predict_proba(IMAGES.numpy()) == expected).all()
        net.save_params(f_params=tmp_path / "a.safetensors", use_safetensors=True)
        other = net.__class__(converted, module__reduction=8, criterion=nn.CrossEntropyLoss).initialize()
        assert (other.predict_proba(IMAGES.numpy()) != expected).any()
        other.load_params(f_params=tmp_path / "a.safetensors", use_safetensors=True)
        assert (other.predict_proba(IMAGES.numpy()) == expected).all()


class TestTransformers:
    def trainer(self, model: nn.Module, folder: Path, steps: int = 2) -> Any:
        transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
        pytest.importorskip("accelerate", reason="needs accelerate")
        arguments = transformers.TrainingArguments(
            str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=8,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        groups = awconv.parameter_groups(model, branch={"lr": 0.01})
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        return transformers.Trainer(model, arguments, train_dataset=DATA, optimizers=(optimizer, None))

    def test_a_training_goes_on_from_its_checkpoint(self, tmp_path: Path) -> None:
        torch.manual_seed(3)
        start = converted().state_dict()

        def model() -> Classifier:
            network = converted()
            network.load_state_dict(start)
            return Classifier(network)

        whole, resumed = model(), model()
        self.trainer(whole, tmp_path, 4).train()
        self.trainer(resumed, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name
        assert not torch.equal(whole.network.conv1.weight, start["conv1.weight"])

    def test_a_checkpoint_holds_the_network(self, tmp_path: Path) -> None:
        model, loaded = Classifier(converted()), Classifier(converted())
        self.trainer(model, tmp_path).train()
        load_model(loaded, tmp_path / "checkpoint-2" / "model.safetensors")
        assert torch.equal(loaded.eval()(IMAGES)["logits"], model.eval()(IMAGES)["logits"])

    def test_a_shared_branch_trains_and_is_not_saved(self, tmp_path: Path) -> None:
        model = Classifier(converted(branch=functools.cache(AttentionBranch.of)))
        with pytest.raises(RuntimeError, match="share memory"):
            self.trainer(model, tmp_path).train()
        trainer = self.trainer(model, tmp_path)
        trainer.args.save_strategy = "no"
        assert trainer.train().global_step == 2

    @pytest.mark.parametrize("arguments", [dict(reduction=4), dict(init="identity", input_gain=True)])
    def test_our_names_are_architectures(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
        told = dict(model_args=dict(in_chans=1, aw_args=arguments), num_labels=5)
        config = transformers.TimmWrapperConfig(architecture="aw_resnet8_cifar", **told)
        model = moved(transformers.TimmWrapperForImageClassification(config))
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits)

    def test_a_published_folder_is_a_model_of_transformers(self) -> None:
        transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
        folder = WEIGHTS / "aw_resnet8_cifar.digits"
        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        expected = timm.create_model(folder.name, pretrained=True).eval()
        assert torch.equal(model(pixel_values=IMAGES).logits, expected(IMAGES))
        assert model.config.id2label == {number: str(number) for number in range(10)}
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert tuple(processor.data_config["input_size"]) == (1, 8, 8)

    def test_a_folder_of_timms_is_none_with_attention_or_without(self, tmp_path: Path) -> None:
        """The page says so; the day that it is one, the page may say that."""
        transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
        for name in ("resnet8_cifar", "aw_resnet8_cifar"):
            save_for_hf(timm.create_model(name, num_classes=3), tmp_path / name, safe_serialization=True)
            with pytest.raises(TypeError, match="multiple values for keyword argument 'num_classes'"):
                transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / name)

    def test_without_the_number_of_classes_it_is_one(self, tmp_path: Path) -> None:
        transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
        model = moved(converted(input_gain=True))
        save_for_hf(model, tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["model_args"]["num_classes"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(pixel_values=IMAGES).logits, model(IMAGES))


def test_accelerates_steps_in_bfloat16_are_those_of_a_bare_loop(tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of another test's precision
    first, second = converted(), converted()
    second.load_state_dict(first.state_dict())
    optimizer = torch.optim.SGD(awconv.parameter_groups(first, branch={"lr": 0.01}), lr=0.05)
    for start in (0, 16):
        for half in (start, start + 8):
            with torch.autocast("cpu", torch.bfloat16):
                output = first(IMAGES[half : half + 8])
            (F.cross_entropy(output.float(), LABELS[half : half + 8]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(awconv.parameter_groups(second, branch={"lr": 0.01}), lr=0.05)
    batches: Any = torch.utils.data.DataLoader(list(zip(IMAGES, LABELS, strict=True)), batch_size=8)
    model, optimizer, batches = accelerator.prepare(second, optimizer, batches)
    for images, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        second.fc.weight.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(second.fc.weight, first.fc.weight)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_branch_has_its_layers_rate_and_norms_are_kept_from_decay() -> None:
    model = awconv.convert(timm.create_model("resnet18", num_classes=3), init="identity")
    optimizer = create_optimizer_v2(model, "adamw", lr=0.01, weight_decay=0.05, layer_decay=0.7)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(found) == set(names.values())
    for name, (scale, decay) in found.items():
        layer = name.partition(".attention")[0]
        if layer != name:
            assert scale == found[f"{layer}.weight"][0], name
        assert decay == (0.0 if model.get_parameter(name).dim() == 1 else 0.05), name
