"""COCO's format as tools lay it out."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from awconv.data import BrokenImageError, Coco
from tests.photographs import SIZE, annotations, photograph, write_coco

WIDTH, HEIGHT = SIZE


def test_what_no_split_uses_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, split="val2017")
    (tmp_path / "train2017" / "other.PNG").write_bytes(b"")
    (tmp_path / "train2017" / "._china.png").write_bytes(b"")  # a Mac's own
    with caplog.at_level("INFO"):
        Coco(tmp_path).dataset("train")
    assert f"not used: val2017 in {tmp_path}" in caplog.text
    assert "no split uses: 2 in" in caplog.text
    assert "such as annotations/instances_val2017.json, train2017/other.PNG" in caplog.text


# How the tools lay out files, and name images in their annotations; {0} is "china" or "flower".
_LAYOUTS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "COCO": ("annotations/instances_train2017.json", "train2017/{0}.png", "{0}.png", {}),
    "Roboflow": (
        "train/_annotations.coco.json",
        "train/{0}.png",
        "{0}.png",
        {"train": "train", "annotations": "{split}/_annotations.coco.json"},
    ),
    "CVAT": (
        "annotations/instances_default.json",
        "images/default/{0}.png",
        "{0}.png",
        {"train": "default", "images": "images"},
    ),
    "CVAT, absolute": (
        "annotations/instances_default.json",
        "images/{0}.png",
        "/home/django/share/{0}.png",
        {"train": "default", "images": "images"},
    ),
    "datumaro": (
        "annotations/instances_train.json",
        "images/train/{0}.png",
        "{0}.png",
        {"train": "train", "images": "images/{split}"},
    ),
    "FiftyOne": ("labels.json", "data/{0}.png", "{0}.png", {"images": "data", "annotations": "labels.json"}),
    "Label Studio": (
        "result.json",
        "images/1b-{0} (1).png",
        "images\\1b-{0} (1).png",
        {"images": "images", "annotations": "result.json"},
    ),
    "Label Studio, uploaded": (
        "result.json",
        "images/1b-{0} (1).png",
        "/data/upload/3/1b-{0}%20(1).png",
        {"images": "images", "annotations": "result.json"},
    ),
    "Label Studio, local": (
        "result.json",
        "park/{0}.png",
        "/data/local-files/?d=park/{0}.png",
        {"images": ".", "annotations": "result.json"},
    ),
    "VIA": ("via_export_coco.json", "{0}.png", "{0}.png", {"images": "", "annotations": "via_export_coco.json"}),
    "Windows": (
        "annotations/instances_train2017.json",
        "train2017/{0}.png",
        "C:\\Users\\me\\train2017\\{0}.png",
        {},
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tool", _LAYOUTS)
def test_the_layouts_that_tools_write(tool: str, packed: bool, tmp_path: Path) -> None:
    annotated_in, image, file_name, options = _LAYOUTS[tool]
    content = annotations()
    for one, name in zip(content["images"], ("china", "flower"), strict=True):
        one["file_name"] = file_name.format(name)
        path = tmp_path / "data" / image.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(name).save(path)
    (tmp_path / "data" / annotated_in).parent.mkdir(exist_ok=True)
    (tmp_path / "data" / annotated_in).write_text(json.dumps(content))
    root = Path(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path, "data")) if packed else tmp_path / "data"
    dataset = Coco(root, val_fraction=0, augmentation="none", **options).dataset("train")  # type: ignore[arg-type]
    assert dataset is not None
    for index, name in enumerate(("china", "flower")):
        item = dataset[index]
        assert item is not None
        assert np.array_equal(item[0].permute(1, 2, 0).numpy(), np.asarray(photograph(name)))


def test_an_image_that_may_be_one_of_several_is_none(tmp_path: Path) -> None:
    content = annotations()
    content["images"][0]["file_name"] = "D:\\china.png"
    write_coco(tmp_path, content)
    for folder in ("a", "b"):
        (tmp_path / "train2017" / folder).mkdir()
        shutil.copy(tmp_path / "train2017" / "china.png", tmp_path / "train2017" / folder)
    assert Coco(tmp_path).files.below("train2017")[0] == "train2017/a/china.png"
    (tmp_path / "train2017" / "china.png").unlink()
    with pytest.raises(ValueError, match=r"could be train2017/a/china\.png or train2017/b/china\.png; give"):
        Coco(tmp_path).dataset("train")
    content["images"][0]["file_name"] = "D:\\b\\china.png"  # the longer end decides
    write_coco(tmp_path, content)
    (tmp_path / "train2017" / "china.png").unlink()
    dataset = Coco(tmp_path, val_fraction=0).dataset("train")
    assert dataset is not None
    assert dataset.images[0].path == "train2017/b/china.png"


def test_an_image_of_another_split_takes_no_ones_place(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, split="val2017")
    (tmp_path / "train2017" / "china.png").unlink()
    with pytest.raises(BrokenImageError, match=r"train2017/china\.png is not a file"):
        Coco(tmp_path, val="val2017").dataset("train")


def test_cocos_test_images_have_a_file_without_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, split="test2017")
    content = annotations()
    del content["annotations"], content["images"][0]
    (tmp_path / "annotations" / "image_info_test2017.json").write_text(json.dumps(content))
    annotated = Coco(tmp_path, test="test2017").dataset("test")  # the file with annotations comes first
    assert annotated is not None
    assert [len(image.boxes) for image in annotated.images] == [2, 2]
    (tmp_path / "annotations" / "instances_test2017.json").unlink()
    with caplog.at_level("INFO"):
        dataset = Coco(tmp_path, test="test2017").dataset("test")
    assert dataset is not None
    assert [(image.path, len(image.boxes)) for image in dataset.images] == [("test2017/flower.png", 0)]
    assert "split test2017 has no annotations: its figures are -1" in caplog.text
    assert "such as test2017/china.png" in caplog.text  # and not the file that was read
    for options in ({"val": "test2017"}, {"test": "test2017", "annotations": "annotations//instances_{split}.json"}):
        with pytest.raises(FileNotFoundError, match=r"instances_test2017\.json do not exist; .*image_info_test2017"):
            Coco(tmp_path, **options).dataset("train")
    with pytest.raises(FileNotFoundError, match=r"instances_test2018\.json do not exist"):
        Coco(tmp_path, test="test2018").dataset("test")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("place", ["", "D:\\", "é/"])
def test_an_accent_is_the_same_in_both_of_unicodes_forms(
    on_disk: str, written: str, place: str, packed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def form(kind: str, text: str) -> str:
        return unicodedata.normalize(kind, text)  # type: ignore[arg-type]

    inside = place if place.endswith("/") else ""
    content = annotations()
    content["images"][0]["file_name"] = form(written, f"{place}né.png")
    content["categories"][0]["name"] = form(written, "pagodé")
    write_coco(tmp_path / "data", content)
    content["categories"][0]["name"] = form(on_disk, "pagodé")
    write_coco(tmp_path / "data", content, "val")
    for split in ("train2017", "val"):
        path = tmp_path / "data" / split / form(on_disk, f"{inside}né.png")
        path.parent.mkdir(exist_ok=True)
        (tmp_path / "data" / split / "china.png").rename(path)
        shutil.copy(path, path.parent / form(on_disk, "é.png"))  # of which the other name is no end
    root = Path(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path, "data")) if packed else tmp_path / "data"
    data = Coco(root, val="val", categories=[form(on_disk, "pagodé"), "tree"], images_without_boxes="keep")
    with caplog.at_level("INFO"):
        dataset = data.dataset("train")
    assert dataset is not None
    assert data.classes == [form("NFC", "pagodé"), "tree"]
    assert dataset.images[0].path == f"train2017/{form(on_disk, f'{inside}né.png')}"
    assert dataset[0] is not None
    assert data.dataset("val") is not None
    assert "no split uses: 2 in" in caplog.text  # the copies
    assert ("were found by the end of their path" in caplog.text) == (place == "D:\\")


def test_of_two_names_that_differ_in_unicodes_form_the_exact_one_counts(tmp_path: Path) -> None:
    content = annotations()
    names = [unicodedata.normalize("NFC", "né.png"), unicodedata.normalize("NFD", "né.png")]
    for image, name in zip(content["images"], names, strict=True):
        image["file_name"] = name
    write_coco(tmp_path, content)
    for old, name in zip(("china.png", "flower.png"), names, strict=True):
        (tmp_path / "train2017" / old).rename(tmp_path / "train2017" / name)
    dataset = Coco(tmp_path, val_fraction=0).dataset("train")
    assert dataset is not None
    assert [image.path for image in dataset.images] == [f"train2017/{name}" for name in names]


@pytest.mark.parametrize("path", ["../a.json", "/etc/a.json"])
def test_paths_that_lead_out_of_the_root_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data\.annotations must be paths below --data\.root"):
        Coco(write_coco(tmp_path), annotations=path).dataset("train")
    content = annotations()
    content["images"][0]["file_name"] = "../../outside.png"
    photograph("china").save(tmp_path.parent / "outside.png")
    with pytest.raises(BrokenImageError, match=r"outside\.png is not in "):
        Coco(write_coco(tmp_path, content)).dataset("train")


def test_the_annotations_that_are_there_are_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the JSON files are annotations/instances_train2017\.json"):
        Coco(tmp_path, train="train").dataset("train")
