"""The base of all data sets, tested on the digits."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from awconv.data import Cifar10, Cifar100, Digits, ImageFolder
from awconv.data.augment import shift
from awconv.data.datasets import InMemoryImages, TransformedImages
from tests.data.samples import DIGITS, digit, write_tree


class TestDigits:
    def test_the_splits_are_all_the_digits_and_share_none(self) -> None:
        data = Digits()
        sizes = {split: len(data.dataset(split)) for split in ("train", "val", "test")}
        assert sizes == {"train": 1293, "val": 144, "test": 360}
        # A few of the 1,797 scans are alike, so pictures are counted, not assumed to differ.
        every = torch.cat([data.dataset(split).images for split in sizes])
        scans = torch.from_numpy(np.round(DIGITS.images * 255 / 16).astype(np.uint8))
        assert torch.equal(every.flatten(1).unique(dim=0), scans.flatten(1).unique(dim=0))

    def test_every_split_has_the_classes_evenly(self) -> None:
        data = Digits()
        for split in ("train", "val", "test"):
            counts = torch.bincount(data.dataset(split).targets)
            assert counts.max() - counts.min() <= 0.1 * counts.max() + 1

    def test_the_split_does_not_depend_on_the_runs_seed(self) -> None:
        first = Digits().dataset("val").targets
        torch.manual_seed(123)
        np.random.seed(123)
        assert torch.equal(Digits().dataset("val").targets, first)
        assert not torch.equal(Digits(split_seed=1).dataset("val").images, Digits().dataset("val").images)

    def test_mean_and_deviation_are_those_of_the_training_images(self) -> None:
        data = Digits(val_fraction=0)
        values = data.dataset("train").images / 255
        assert data.mean == pytest.approx([values.mean().item()], abs=5e-3)
        assert data.std == pytest.approx([values.std().item()], abs=5e-3)

    def test_batches_are_uint8_and_drawn_anew_each_epoch(self) -> None:
        loader = Digits(batch_size=64).train_dataloader()
        epochs = [[targets for _, targets in loader] for _ in range(2)]
        images, targets = next(iter(loader))
        assert (images.dtype, images.shape, targets.dtype) == (torch.uint8, (64, 1, 8, 8), torch.long)
        assert len(loader) == 1293 // 64
        assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))

    def test_evaluation_sees_every_image_once_and_in_order(self) -> None:
        data = Digits(batch_size=100)
        images = torch.cat([images for images, _ in data.test_dataloader()])
        assert torch.equal(images, data.dataset("test").images)

    def test_without_a_validation_share_there_is_none(self) -> None:
        data = Digits(val_fraction=0)
        assert data.val_dataloader() == []
        assert len(data.dataset("train")) == 1437


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(val_fraction=1.0), "val_fraction must be at least 0 and less than 1, got 1.0"),
            (dict(batch_size=0), "batch_size must be at least 1, got 0"),
            (dict(image_size=0), "image_size must be at least 1, got 0"),
            (dict(crop_padding=-1), "crop_padding must be at least 0, got -1"),
            (dict(crop_padding=8), "crop_padding must be less than image_size = 8, got 8"),
            (dict(crop_pct=1e-320), "crop_pct must be at least 0.01 and at most 1"),
            (dict(max_pixels=0), "max_pixels must be at least 1, got 0"),
            (
                dict(image_size=30_000),
                r"128 images of 1 channels and 30000x30000 pixels take 429\.2 GiB",
            ),
            (dict(batch_size=10**9), r"1000000000 images of .* take 238\.4 GiB as float32"),
            (dict(num_workers=5000), r"num_workers must be at most \d+ .4 for each core, or 32., got 5000"),
            (dict(mean=[0.5, 0.5]), r"mean must be 1 numbers, one for each channel, got \[0\.5, 0\.5\]"),
            (dict(std=[0.0]), r"std must be 1 positive numbers, one for each channel, got \[0\.0\]"),
            (dict(mean=[float("nan")]), "mean must be 1 numbers"),
        ],
    )
    def test_numbers_out_of_range_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Digits(**arguments)

    def test_a_share_that_no_class_can_give_is_refused(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"train": 12})
        with pytest.raises(ValueError, match=r"val_fraction = 0\.1 cannot be held out of every class of 12 training"):
            ImageFolder(tmp_path, image_size=8).dataset("train")

    def test_a_batch_larger_than_the_training_split_is_refused(self) -> None:
        with pytest.raises(ValueError, match="batch_size must be at most the 1293 training images, got 2000"):
            Digits(batch_size=2000).train_dataloader()


@pytest.mark.parametrize(("module", "classes"), [(Cifar10, 10), (Cifar100, 100)])
def test_cifar_as_torchvision_downloads_it(
    module: type[Cifar10], classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not in .*Put the folder cifar-100?-(batches-py|python) there"):
        module(tmp_path, download=False).classes  # noqa: B018
    # The files' layout, with digits for pictures; torchvision would check that they are the published ones.
    dataset = module._dataset
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    key = "labels" if classes == 10 else "fine_labels"
    for name, _ in (*dataset.train_list, *dataset.test_list):
        pictures = np.stack([np.array(digit(index, 32).convert("RGB")) for index in range(200)])
        content = {"data": pictures.transpose(0, 3, 1, 2).reshape(200, -1), key: (np.arange(200) % classes).tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    names = {dataset.meta["key"]: [f"class{i}" for i in range(classes)]}
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps(names))
    data = module(tmp_path, download=False, val_fraction=0.5)
    assert data.classes == [f"class{i}" for i in range(classes)]
    total = 200 * len(dataset.train_list)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [total // 2, total // 2, 200]
    assert np.array_equal(data.dataset("test").images[5, 0].numpy(), np.array(digit(5, 32)))


class TestAugmentation:
    def test_a_crop_is_a_window_of_the_padded_image_and_each_sample_has_its_own(self) -> None:
        images = torch.arange(1, 1 + 50 * 2 * 5 * 6).reshape(50, 2, 5, 6).to(torch.int32)
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
        top, left = torch.randint(0, 5, (2, 50))
        for before, after, y, x in zip(padded, shift(images, 2, top, left), top, left, strict=True):
            assert torch.equal(before[:, y : y + 5, x : x + 6], after)

    def test_every_place_and_either_side_is_drawn(self) -> None:
        images = torch.zeros(2000, 1, 8, 8, dtype=torch.uint8)
        images[:, :, 4, 3] = 1  # crops of at most 2 pixels keep it
        augmented = Digits(crop_padding=2, horizontal_flip=True).augment(images, seed=5)
        counts = augmented.sum(0)[0]  # 4, 3 moves by up to two, and 3 becomes 4 in a mirror
        assert counts[2:7].gt(0).nonzero()[:, 1].tolist() == [1, 2, 3, 4, 5, 6] * 5
        # 25 places and two sides are 50 outcomes of 1/50 each; column 1 has one of them, the columns between two.
        expected = 2000 / 50 * torch.tensor([1, 2, 2, 2, 2, 1])
        assert torch.all((counts[2:7, 1:7] - expected).abs() < 6 * expected.sqrt())  # six deviations

    def test_several_processes_do_together_what_one_does(self) -> None:
        images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8)
        together = Digits(crop_padding=2, horizontal_flip=True).augment(images, seed=3)
        for rank in range(3):
            data = Digits(crop_padding=2, horizontal_flip=True)
            data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
            assert torch.equal(data.augment(images[rank::3], seed=3), together[rank::3])
        assert not torch.equal(Digits(crop_padding=2).augment(images, seed=4), together)

    def test_training_batches_alone_are_augmented(self) -> None:
        data = Digits(batch_size=64, crop_padding=2)

        batch = next(iter(data.train_dataloader()))
        progress = SimpleNamespace(current=SimpleNamespace(ready=0))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        data.trainer = SimpleNamespace(training=True, fit_loop=loop, current_epoch=0, global_rank=0, world_size=1)
        assert not torch.equal(data.on_after_batch_transfer(batch, 0)[0], batch[0])
        data.trainer.training = False
        assert torch.equal(data.on_after_batch_transfer(batch, 0)[0], batch[0])


def test_arguments_of_timms_transform(tmp_path: Path) -> None:
    data = Digits(transform={"auto_augment": "rand-m7-mstd0.5-inc1", "scale": [0.5, 1.0]}, num_workers=0, image_size=16)
    assert isinstance(data.dataset("train"), TransformedImages)
    assert isinstance(data.dataset("val"), InMemoryImages)
    images, _ = next(iter(data.train_dataloader()))
    assert (images.dtype, images.shape) == (torch.uint8, (128, 1, 16, 16))
    loader = data.train_dataloader()
    assert torch.equal(next(iter(loader))[0], images)  # the same epoch
    loader.batch_sampler.sampler.set_epoch(1)
    assert not torch.equal(next(iter(loader))[0], images)
    with pytest.raises(ValueError, match=r"transform must hold arguments of timm.*got \{'scael': 1\}.*scael"):
        Digits(transform={"scael": 1}).dataset("train")
    with pytest.raises(ValueError, match="in_memory and transform exclude each other"):
        Digits(transform={"scale": [0.5, 1.0]}, in_memory=True)


def test_workers_do_not_change_what_is_drawn() -> None:
    def first(workers: int) -> torch.Tensor:
        data = Digits(in_memory=False, num_workers=workers, batch_size=40, image_size=16)
        return torch.cat([images for images, _ in data.train_dataloader()])

    assert torch.equal(first(0), first(2))


@pytest.mark.gpu
def test_a_training_on_a_gpu_gets_its_batches_from_the_gpus_memory(tmp_path: Path) -> None:
    data = Digits(batch_size=8, val_fraction=0.25)
    there = data.dataset("val")
    assert isinstance(there, InMemoryImages)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cuda", 0))
    )
    batches = list(data.val_dataloader())
    assert {batch[0].device for batch in batches} == {torch.device("cuda", 0)}
    assert all(24 < len(targets) <= 32 for _, targets in batches)  # four times as many as it trains on
    assert torch.equal(torch.cat([images for images, _ in batches]).cpu(), there.images)
    assert torch.equal(torch.cat([targets for _, targets in batches]).cpu(), there.targets)
