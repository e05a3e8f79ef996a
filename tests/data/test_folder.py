"""Trees of image files."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from awconv.data import BrokenImageError, Cifar10, ImageFolder, Parquet, WebDataset
from awconv.data.datasets import InMemoryImages, TransformedImages
from tests.data.samples import digit, png, write_tar, write_tree


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
        monkeypatch.setattr("awconv.data.classification.IN_MEMORY_BYTES", 1000)
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
        with pytest.raises(FileNotFoundError, match=r"1 of 11 classes have no image file: empty;"):
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
    with pytest.raises(FileNotFoundError, match=r"train: 1 of \d+ classes have no image file: digit11; .*remove empty"):
        ImageFolder(tmp_path).classes  # noqa: B018


def tree(root: Path, *paths: str) -> Path:
    """Pictures, each its own digit, and other files, by their endings."""
    for index, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(digit(index)) if Path(path).suffix.lower() == ".png" else b"no picture")
    return root


CATS_AND_DOGS = ("train/cat/0.png", "train/cat/1.PNG", "train/dog/a/0.png", "train/dog/b/0.png")


class TestLayouts:
    """What cameras, Kaggle, NAS, notebooks and people leave in a folder."""

    @pytest.mark.parametrize(
        "more",
        [
            (
                "train/cat/._0.png",
                "train/._dog",
                "train/.DS_Store",
                "__MACOSX/train/cat/._0.png",
                "train/__MACOSX/x.png",
            ),
            ("train/.ipynb_checkpoints/0-checkpoint.png", "train/cat/.ipynb_checkpoints/0-checkpoint.png"),
            ("train/@eaDir/0.png/x.png", "train/cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "train/#recycle/x.png"),
            ("train/cat/Thumbs.db", "train/desktop.ini", "train/$RECYCLE.BIN/x.png", "train/.git/x.png"),
        ],
        ids=["mac", "notebook", "nas", "windows"],
    )
    def test_what_programs_leave_behind_is_passed_over(
        self, more: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "lightning.pytorch")  # which a comparison silences
        data = ImageFolder(tree(tmp_path, *CATS_AND_DOGS, *more))
        source = data.open("train")
        assert data.classes == ["cat", "dog"]
        assert [str(Path(file).relative_to(tmp_path)) for file in source.files] == list(CATS_AND_DOGS)
        assert list(source.targets) == [0, 0, 1, 1]
        for index in range(4):
            assert np.array_equal(np.asarray(source[index][0]), np.asarray(digit(index)))
        assert "not used" not in caplog.text

    @pytest.mark.parametrize(
        "folder",
        [
            "#snapshot", "#Recycle", "@eadir", "@Recently-Snapshot", "@recycle", "$RECYCLE.BIN", "$Recycle.Bin",
            "Network Trash Folder", "Temporary Items", "System Volume Information", "lost+found", "__macosx",
        ],
    )  # fmt: skip
    def test_what_programs_leave_beside_classes_is_none(
        self, folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "lightning.pytorch")  # which a comparison silences
        tree(tmp_path, "cat/0.png", "dog/0.png", f"{folder}/cat/0.png", f"{folder}/1.png", f"cat/{folder}/0.png")
        data = ImageFolder(tmp_path)
        assert data.classes == ["cat", "dog"]
        assert len(data.open("train")) == 2
        assert "not used" not in caplog.text

    @pytest.mark.parametrize(("val", "test"), [("valid", "test"), ("validation", "Testing"), ("Val", "TEST")])
    @pytest.mark.parametrize("train", ["train", "Training"])
    def test_the_usual_names_of_splits(self, train: str, val: str, test: str, tmp_path: Path) -> None:
        names = {"train": train, "val": val, "test": test}
        for count, folder in enumerate(names.values(), 1):
            tree(tmp_path / folder, *[f"{one}/{i}.png" for one in ("cat", "dog") for i in range(count)])
        data = ImageFolder(tmp_path)
        assert {split: len(data.open(split)) for split in names} == {"train": 2, "val": 4, "test": 6}
        tree(tmp_path / "Train" if train != "Train" else tmp_path / "train", "cat/0.png", "dog/0.png")
        with pytest.raises(ValueError, match="are both the train split; expected one"):
            ImageFolder(tmp_path).classes  # noqa: B018

    def test_a_folder_for_each_class_without_splits(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "lightning.pytorch")  # which a comparison silences
        data = ImageFolder(tree(tmp_path, "cat/0.png", "dog/0.png", "__MACOSX/x.png", "labels.csv"))
        assert data.classes == ["cat", "dog"]
        assert data.open("val") is None
        assert data.test_split == "val"
        assert "each folder in it is a training class: cat, dog, 2 in all" in caplog.text
        assert "not used: 1 beside the folders of the classes (.csv)" in caplog.text

    @pytest.mark.parametrize(("train", "val"), [("NFD", "NFC"), ("NFC", "NFD")])
    def test_an_accent_is_the_same_in_both_of_unicodes_forms(self, train: str, val: str, tmp_path: Path) -> None:
        names = {"train": train, "val": val}
        for split, kind in names.items():  # between e and é, a class that is sorted before the one or behind the other
            tree(tmp_path / split, "f/0.png", "f/1.png", unicodedata.normalize(kind, "é/0.png"))  # type: ignore[arg-type]
        data = ImageFolder(tmp_path)
        assert data.classes == ["f", unicodedata.normalize("NFC", "é")]
        for split in names:
            source = data.open(split)
            assert list(source.targets) == [0, 0, 1]
            assert np.array_equal(np.asarray(source[2][0]), np.asarray(digit(2)))
        tree(tmp_path, unicodedata.normalize(val, "train/é/1.png"))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="train: two folders are called é, in different Unicode forms; merge them"):
            ImageFolder(tmp_path).classes  # noqa: B018

    def test_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        tree(tmp_path / "pets", *CATS_AND_DOGS)
        assert ImageFolder(Path("~/pets")).classes == ["cat", "dog"]
        assert Cifar10(Path("~/cifar")).root == tmp_path / "cifar"

    def test_what_is_not_used_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "lightning.pytorch")  # which a comparison silences
        more = ("train/x.png", "train/cat/a.heic", "train/cat/b.txt", "test/0.png", "extra\x1b[2J/0.png", "notes.txt")
        data = ImageFolder(tree(tmp_path, *CATS_AND_DOGS, *more))
        assert len(data.open("train")) == 4
        assert data.open("test") is None
        assert f"not used: {tmp_path}/test, which holds no folders of classes" in caplog.text
        assert f"not used: extra\\x1b[2J, notes.txt in {tmp_path}" in caplog.text
        for why in (
            "beside the folders of the classes (.png)",
            "not named as images (.heic)",
            "not named as images (.txt)",
        ):
            assert f"1 {why}" in caplog.text

    @pytest.mark.parametrize(
        ("paths", "message"),
        [
            (
                ("pets/train/cat/0.png", "pets/train/dog/0.png"),
                r"two classes, and .* holds only the folder pets; expected images",
            ),
            (("train/cat/0.png",), r"two classes, and .*/train holds only the folder cat"),
            (("train/0.png", "test/1.png"), r"train holds no folders of classes; expected images in"),
            (("test/cat/0.png", "test/dog/0.png"), r"train is not a folder; expected images in .*/train/CLASS/"),
            (("0.png",), r"train is not a folder; expected images in"),
            (
                (*CATS_AND_DOGS, "train/emu/x.txt", "train/owl/x.gif.txt"),
                r"2 of 4 classes have no image file: emu, owl; expected images",
            ),
            (  # Intel's images on Kaggle
                (
                    *(
                        f"seg_{split}/seg_{split}/{name}/0.png"
                        for split in ("train", "test")
                        for name in ("cat", "dog")
                    ),
                    "seg_pred/seg_pred/0.png",
                ),
                r"and seg_test, seg_train in it are no classes: .*: --data\.root=/.*/seg_train/seg_train; if they are",
            ),
            (
                tuple(f"{split}_images/{name}/0.png" for split in ("train", "val") for name in ("cat", "dog")),
                r"'train', and train_images, val_images in it .* as /.*/train/CLASS/, .*root=/.*[^/]/train_images; if",
            ),
            (("cat/0.png", "dog/a/0.png", "dog/b/0.png"), r"dog in it are .* classes, move all of them to /.*/train$"),
        ],
    )
    def test_other_layouts_are_named(self, paths: tuple[str, ...], message: str, tmp_path: Path) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ImageFolder(tree(tmp_path, *paths)).classes  # noqa: B018

    def test_a_class_may_have_its_images_in_one_folder(self, tmp_path: Path) -> None:
        tree(tmp_path, "cat/images/0.png", "dog/images/0.png", "emu/0.png", "emu/a/0.png", "emu/b/0.png")
        assert ImageFolder(tmp_path).classes == ["cat", "dog", "emu"]  # as Tiny-ImageNet's training images

    def test_an_archive_is_to_be_unpacked(self, tmp_path: Path) -> None:
        (tmp_path / "a.zip").write_bytes(b"PK")
        with pytest.raises(
            FileNotFoundError, match=r"a\.zip/train is not a folder; .*; if it is an archive, unpack it"
        ):
            ImageFolder(tmp_path / "a.zip").classes  # noqa: B018

    def test_links_are_followed_and_no_circle_is(self, tmp_path: Path) -> None:
        tree(tmp_path, "store/0.png", "store/1.png", *CATS_AND_DOGS)
        (tmp_path / "train" / "emu").symlink_to(tmp_path / "store")
        (tmp_path / "store" / "circle").symlink_to(tmp_path / "store")
        (tmp_path / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
        data = ImageFolder(tmp_path, val_fraction=0, image_size=8)
        assert list(data.open("train").targets) == [0, 0, 0, 1, 1, 2, 2]
        with pytest.raises(BrokenImageError, match=r"cat/gone\.png: it is not a file"):
            data.dataset("train")

    def test_the_order_is_torchvisions(self, tmp_path: Path) -> None:
        names = ("b", "a/x", "a-b/x", "a/y/z", "a.b/x", "A/x", "a/Z")
        tree(tmp_path, *[f"train/{one}/{name}.png" for one in ("dog", "cat") for name in names])
        expected = torchvision.datasets.ImageFolder(str(tmp_path / "train"))
        source = ImageFolder(tmp_path).open("train")
        assert list(zip(source.files, source.targets, strict=True)) == expected.samples
        assert source.classes == expected.classes


def test_images_are_upright_and_limited_everywhere(tmp_path: Path) -> None:
    """A telephone's picture is the same in a folder, a Parquet file and a tar file."""
    stored = np.zeros((12, 8), np.uint8)
    stored[:3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "PNG", exif=exif)
    for name in ("cat", "dog"):
        tree(tmp_path, f"train/{name}/a.txt")
        (tmp_path / "train" / name / "a.png").write_bytes(buffer.getvalue())
    table = pa.table({"image": [buffer.getvalue()] * 2, "label": ["cat", "dog"]})
    pq.write_table(table, tmp_path / "a.parquet")
    labelled = {f"{label}.png": buffer.getvalue() for label in "01"} | {f"{label}.cls": label for label in "01"}
    write_tar(tmp_path / "a.tar", labelled)
    sources = {ImageFolder: tmp_path, Parquet: str(tmp_path / "a.parquet"), WebDataset: str(tmp_path / "a.tar")}
    for module, source in sources.items():
        image, _ = module(source).open("train")[0]
        assert np.array_equal(np.asarray(image), np.rot90(stored, -1))
        with pytest.raises(BrokenImageError, match=r"max_pixels = 95 allows .12x8.|max_pixels = 95 allows .8x12."):
            module(source, max_pixels=95).open("train")[0]
        assert module(source, max_pixels=96).open("train")[0][0].size == (12, 8)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_image_of_too_many_pixels_is_left_out_as_a_broken_one(in_memory: bool, tmp_path: Path) -> None:
    tree(tmp_path, *(path.replace("train", "val") for path in CATS_AND_DOGS), *CATS_AND_DOGS)
    digit(0, 100).save(tmp_path / "val" / "cat" / "large.png")
    data = ImageFolder(
        tmp_path, image_size=8, in_memory=in_memory, num_workers=0, max_pixels=9999, broken_images="skip"
    )
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 4
