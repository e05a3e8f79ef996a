"""Trees of image files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from awconv.data import BrokenImageError, ImageFolder
from awconv.data.images import InMemoryImages, TransformedImages
from tests.data.samples import write_tree


def as_bytes(dataset: InMemoryImages) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.images}


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
        with pytest.raises(FileNotFoundError, match=r"of 1 of 11 classes: empty\."):
            ImageFolder(tmp_path).classes  # noqa: B018


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
    with pytest.raises(
        FileNotFoundError, match=r"train: no image file .* of 1 of \d+ classes: digit11\. .*remove empty"
    ):
        ImageFolder(tmp_path).classes  # noqa: B018
