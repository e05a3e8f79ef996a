"""Data sets: digits as they are, and written in the layouts that users have."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from awconv.data import BrokenImageError, Cifar10, Cifar100, Digits, ImageFolder, Parquet, WebDataset, to_uint8
from awconv.data.augment import shift
from awconv.data.images import InMemoryImages, TransformedImages, read_image

DIGITS = load_digits()


def digit(index: int, size: int = 8) -> Image.Image:
    return Image.fromarray((DIGITS.images[index] * 15).astype(np.uint8)).resize((size, size))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, splits: dict[str, int], size: int = 8) -> None:
    for split, count in splits.items():
        for index in range(count):
            folder = root / split / f"digit{DIGITS.target[index]}"
            folder.mkdir(parents=True, exist_ok=True)
            digit(index, size).save(folder / f"{index:04}.png")


def write_parquet(path: Path, indices: range, names: bool = True, label: Callable[[int], int] = int) -> None:
    images = [{"bytes": png(digit(index)), "path": f"{index}.png"} for index in indices]
    table = pa.table({"image": images, "label": [label(DIGITS.target[index]) for index in indices]})
    if names:
        features = {"label": {"names": [f"digit{i}" for i in range(10)], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def as_bytes(dataset: InMemoryImages) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.images}


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


class TestImageFolder:
    def test_a_tree_with_splits(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"train": 200, "val": 60, "test": 50})
        data = ImageFolder(tmp_path, image_size=8)
        assert data.classes == [f"digit{i}" for i in range(10)]
        assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [200, 60, 50]
        assert data.dataset("train").images.shape == (200, 3, 8, 8)

    def test_without_val_a_share_of_train_is_held_out_and_tested(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"train": 300})
        data = ImageFolder(tmp_path, image_size=8, val_fraction=0.2)
        assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [240, 60, 60]
        assert not as_bytes(data.dataset("train")) & as_bytes(data.dataset("val"))
        assert data.dataset("test") is data.dataset("val")  # decoded once

    def test_a_large_set_is_decoded_by_workers_to_the_same_evaluation_images(self, tmp_path: Path) -> None:
        write_tree(tmp_path, {"train": 100, "val": 40}, size=12)
        kept = ImageFolder(tmp_path, image_size=8)
        streamed = ImageFolder(tmp_path, image_size=8, in_memory=False, num_workers=2, batch_size=16)
        assert isinstance(streamed.dataset("train"), TransformedImages)
        images = torch.cat([images for images, _ in streamed.val_dataloader()])
        assert torch.equal(images, kept.dataset("val").images)
        images, targets = next(iter(streamed.train_dataloader()))
        assert (images.dtype, images.shape, len(targets)) == (torch.uint8, (16, 3, 8, 8), 16)

    def test_the_size_decides_where_images_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_tree(tmp_path, {"train": 100})
        monkeypatch.setattr("awconv.data.module.IN_MEMORY_BYTES", 1000)
        assert isinstance(ImageFolder(tmp_path, image_size=8).dataset("train"), TransformedImages)

    def test_errors_name_the_folder_the_class_and_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"train is not a folder; expected images in .*/train/CLASS/"):
            ImageFolder(tmp_path).classes  # noqa: B018
        write_tree(tmp_path, {"train": 100, "val": 40})
        (tmp_path / "val" / "digit3").rename(tmp_path / "val" / "three")
        with pytest.raises(ValueError, match=r"must have the classes of .*: digit3, three"):
            ImageFolder(tmp_path, image_size=8).dataset("val")
        (tmp_path / "val" / "three").rename(tmp_path / "val" / "digit3")
        (tmp_path / "val" / "digit3" / "0003.png").write_bytes(b"not a picture")
        with pytest.raises(BrokenImageError, match=r"val/digit3/0003\.png: cannot identify"):
            ImageFolder(tmp_path, image_size=8).dataset("val")
        (tmp_path / "train" / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="empty"):
            ImageFolder(tmp_path).classes  # noqa: B018


class TestParquet:
    def test_names_labels_and_pictures_come_out(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train-0.parquet", range(150))
        write_parquet(tmp_path / "train-1.parquet", range(150, 300))
        write_parquet(tmp_path / "test.parquet", range(300, 350))
        data = Parquet(str(tmp_path / "train-*.parquet"), test=str(tmp_path / "test.parquet"), image_size=8)
        assert data.classes == [f"digit{i}" for i in range(10)]
        assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [270, 30, 50]
        assert data.dataset("test").targets.tolist() == DIGITS.target[300:350].tolist()
        expected = np.stack([np.array(digit(index)) for index in range(300, 350)])
        assert np.array_equal(data.dataset("test").images[:, 0].numpy(), expected)

    def test_without_metadata_classes_are_numbers(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train.parquet", range(100), names=False)
        assert Parquet(str(tmp_path / "train.parquet")).classes == [str(i) for i in range(10)]

    def test_errors_name_the_file_the_column_and_the_row(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file matches .*nothing\.parquet"):
            Parquet(str(tmp_path / "nothing.parquet")).classes  # noqa: B018
        train = str(tmp_path / "train.parquet")
        write_parquet(Path(train), range(100))
        with pytest.raises(ValueError, match=r"must have a column 'img', got \['image', 'label'\]; .*image_column"):
            Parquet(train, image_column="img").classes  # noqa: B018
        write_parquet(tmp_path / "wrong.parquet", range(20), label=lambda target: 10 if target == 7 else int(target))
        with pytest.raises(ValueError, match=r"labels must be from 0 to 9, got 10 in row 7 \(and 1 more\)"):
            Parquet(str(tmp_path / "wrong.parquet")).classes  # noqa: B018
        pq.write_table(
            pa.table({"image": [{"bytes": b"broken", "path": ""}] * 4, "label": [0] * 4}), tmp_path / "b.parquet"
        )
        with pytest.raises(BrokenImageError, match=r"b\.parquet, row 0: cannot identify"):
            Parquet(str(tmp_path / "b.parquet"), val_fraction=0).dataset("train")

        def refused(image: object, label: object, message: str) -> None:
            pq.write_table(pa.table({"image": image, "label": label}), tmp_path / "odd.parquet")
            with pytest.raises(ValueError, match=message):
                Parquet(str(tmp_path / "odd.parquet"), val_fraction=0).dataset("train")

        nothing = {"bytes": None, "path": "x"}
        refused([nothing] * 3, [0, 1, 2], r"odd\.parquet, row 0: the row has no image")
        refused([b"abc"] * 3, [0, 1, 2], r"column 'image' must hold structs with a field 'bytes', got binary")
        refused([nothing] * 3, ["a", "b", "c"], r"column 'label' must hold class indices.*got string with 0 nulls")
        refused([nothing] * 3, [0, None, 2], r"column 'label' must hold class indices.*got int64 with 1 nulls")
        write_parquet(tmp_path / "more.parquet", range(20), names=False, label=lambda target: int(target) + 5)
        with pytest.raises(ValueError, match=r"more\.parquet must have the 10 classes of"):
            Parquet(train, test=str(tmp_path / "more.parquet"), image_size=8).dataset("test")

    def test_real_cifar10_images(self, shared_data: Path) -> None:
        folder = shared_data / "cifar10-jpeg"
        data = Parquet(str(folder / "test.parquet"), image_size=32)
        assert data.classes[:3] == ["airplane", "automobile", "bird"]
        images, targets = next(iter(data.val_dataloader()))
        assert images.shape == (125, 3, 32, 32)  # 1,000 images are held out, for 8 batches
        assert len(targets.unique()) == 10
        assert images.float().std() > 40


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_any_mode_and_shape_become_uint8(mode: str, channels: int) -> None:
    image = digit(3, 20).resize((30, 17)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    tensor = to_uint8(read_image(buffer.getvalue(), "name"), channels, 8)
    assert (tensor.dtype, tensor.shape) == (torch.uint8, (channels, 8, 8))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    assert np.array_equal(np.asarray(read_image(png(Image.fromarray(ramp)), "name")), ramp // 256)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_damaged_file_is_decoded_or_a_broken_image_with_its_name(kind: str) -> None:
    buffer = io.BytesIO()
    digit(0, 20).save(buffer, kind)
    generator = np.random.default_rng(0)
    broken = 0
    for _ in range(60):
        content = bytearray(buffer.getvalue())
        for position in generator.integers(len(content), size=8):
            content[position] = generator.integers(256)
        try:
            assert read_image(bytes(content), "damaged").mode in ("L", "RGB")
        except BrokenImageError as error:
            assert str(error).startswith("damaged: ")  # noqa: PT017  # some are decoded all the same
            broken += 1
    assert broken


def test_the_shorter_side_is_resized_and_the_centre_kept() -> None:
    stripes = np.zeros((8, 24), np.uint8)
    stripes[:, 8:16] = 200
    assert torch.equal(to_uint8(Image.fromarray(stripes), 1, 8), torch.full((1, 8, 8), 200, dtype=torch.uint8))


def test_the_part_of_the_shorter_side_that_is_kept() -> None:
    ring = np.zeros((16, 16), np.uint8)
    ring[2:14, 2:14] = 200
    assert torch.equal(
        to_uint8(Image.fromarray(ring), 1, 12, crop_pct=0.75), torch.full((1, 12, 12), 200, dtype=torch.uint8)
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_images_are_refused_or_left_out_by_name(
    in_memory: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path, {"train": 60, "val": 20})
    for split in ("train", "val"):
        victim = sorted((tmp_path / split).rglob("*.png"))[3]
        victim.write_bytes(victim.read_bytes()[:40])

    def data(broken_images: str) -> ImageFolder:
        return ImageFolder(
            tmp_path, image_size=8, batch_size=10, in_memory=in_memory, num_workers=0, broken_images=broken_images
        )

    with pytest.raises(BrokenImageError, match=r"val/digit\d/\d+\.png: .*; --data\.broken_images=skip leaves"):
        list(data("refuse").val_dataloader())
    batches = list(data("skip").val_dataloader())
    assert sum(len(targets) for _, targets in batches) == 19
    assert str(sorted((tmp_path / "val").rglob("*.png"))[3]) in caplog.text
    assert sum(len(targets) for _, targets in data("skip").train_dataloader()) == (50 if in_memory else 59)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train": 30})
    (tmp_path / "train" / "digit11").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Found no valid file for the classes digit11.*remove empty ones"):
        ImageFolder(tmp_path).classes  # noqa: B018


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


class TestStreamedParquet:
    def test_row_groups_are_read_when_needed_and_forgotten(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "small.parquet", range(500))
        table = pq.read_table(tmp_path / "small.parquet")
        for part in range(2):
            pq.write_table(table.slice(250 * part, 250), tmp_path / f"part{part}.parquet", row_group_size=20)
        data = Parquet(
            str(tmp_path / "part*.parquet"), image_size=8, batch_size=16, in_memory=False, num_workers=0, val_fraction=0
        )
        source = data.open("train")
        assert source.blocks == [20] * 12 + [10] + [20] * 12 + [10]
        assert not source._kept
        for index in (0, 19, 20, 249, 250, 499):
            assert np.array_equal(np.asarray(source[index][0]), np.asarray(digit(index)))
        source._forget()
        read: list[int] = []
        original = source._read
        source._read = lambda group: (read.append(group) if group not in source._kept else None, original(group))[1]
        loader = data.train_dataloader()
        drawn = [draw.image for batch in loader.batch_sampler for draw in batch]
        assert len(set(drawn)) == len(drawn) == 496
        for _ in loader:
            assert len(source._kept) <= 8
        # Each window of 8 groups once; a batch across two windows may read a group of the first again.
        assert len(read) <= 26 + 3 * 8
        assert sorted(set(read)) == list(range(26))
        neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(drawn))
        assert neighbours < 50  # of 495: rows are shuffled within windows of 160, not only groups

    def test_a_broken_file_is_named(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet", range(50))
        (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file, or a broken one"):
            Parquet(str(tmp_path / "*.parquet")).classes  # noqa: B018


def write_shard(path: Path, indices: range, label: str = "cls", pax: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for index in indices:
            target = int(DIGITS.target[index])
            text = {"cls": str(target), "json": json.dumps({"label": target})}.get(label)
            prefix = "a long folder name " * 10 if pax else "images"
            files = {f"{prefix}/{index:04}.seg.png" if pax else f"{prefix}/{index:04}.png": png(digit(index))}
            if text is not None:
                files[f"{prefix}/{index:04}.{label}"] = text.encode()
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class TestWebDataset:
    @pytest.mark.parametrize("label", ["cls", "json"])
    @pytest.mark.parametrize("pax", [True, False])
    def test_images_and_labels_are_those_of_the_shards(self, label: str, pax: bool, tmp_path: Path) -> None:
        for shard in range(3):
            write_shard(tmp_path / f"train-{shard}.tar", range(40 * shard, 40 * shard + 40), label, pax)
        write_shard(tmp_path / "test.tar", range(200, 230), label, pax)
        data = WebDataset(
            str(tmp_path / "train-*.tar"), test=str(tmp_path / "test.tar"), image_size=8, batch_size=16, num_workers=2
        )
        assert data.classes == [str(index) for index in range(10)]
        source = data.open("train")
        assert source.targets == DIGITS.target[:120].tolist()
        for index in (0, 41, 119):
            assert np.array_equal(np.asarray(source[index][0]), np.asarray(digit(index)))
        assert sum(len(targets) for _, targets in data.test_dataloader()) == 30
        with pytest.raises(FileNotFoundError, match=r"no file matches .*train-3\.tar"):
            WebDataset(str(tmp_path / "train-{1..3}.tar")).classes  # noqa: B018
        numbered = WebDataset(str(tmp_path / "train-{1..2}.tar"), image_size=8)
        assert numbered.open("train").targets == DIGITS.target[40:120].tolist()
        streamed = WebDataset(
            str(tmp_path / "train-*.tar"), image_size=8, batch_size=16, in_memory=False, num_workers=2, val_fraction=0
        )
        assert sum(len(targets) for _, targets in streamed.train_dataloader()) == 112

    def test_mistakes_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file matches .*none\.tar"):
            WebDataset(str(tmp_path / "none.tar")).classes  # noqa: B018
        write_shard(tmp_path / "a.tar", range(20))
        (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
        with pytest.raises(ValueError, match=r"cut\.tar is not a plain tar file, or a broken one"):
            WebDataset(str(tmp_path / "cut.tar")).classes  # noqa: B018
        whole = (tmp_path / "a.tar").read_bytes()
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
        for length in (end, end - 512 * 3):  # without the blocks of zeros, and with a member of which nothing is left
            (tmp_path / "short.tar").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"short\.tar is (cut off|not a plain tar file, or a broken one)"):
                WebDataset(str(tmp_path / "short.tar")).classes  # noqa: B018
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
        with pytest.raises(ValueError, match=r"a\.tar\.gz is not a plain tar file"):
            WebDataset(str(tmp_path / "a.tar.gz")).classes  # noqa: B018
        write_shard(tmp_path / "none.tar", range(5), label="txt")
        with pytest.raises(ValueError, match=r"image images/0000\.png has no label; expected images/0000\.cls"):
            WebDataset(str(tmp_path / "none.tar")).classes  # noqa: B018
        with pytest.raises(ValueError, match=r"labels must be from 0 to 1, got 9; name all classes with class_names"):
            WebDataset(str(tmp_path / "a.tar"), class_names=["a", "b"]).classes  # noqa: B018
