"""COCO's format: errors name wrong annotations, and image files give what annotations lack."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from awconv.data import BrokenImageError, Coco
from tests.photographs import CATEGORIES, SIZE, annotate, annotations, boxes, photograph, write_coco

WIDTH, HEIGHT = SIZE


def test_files_that_are_not_there_or_not_cocos_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none is neither a folder nor a zip archive"):
        Coco(tmp_path / "none").classes  # noqa: B018
    (tmp_path / "a.zip").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"a\.zip is neither a folder nor a zip archive"):
        Coco(tmp_path / "a.zip").classes  # noqa: B018
    write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"instances_val\.json do not exist; .* give --data\.annotations"):
        Coco(tmp_path, train="val").classes  # noqa: B018
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2017\.json is not JSON"):
        Coco(tmp_path).classes  # noqa: B018
    file.write_text('{"images": []}')
    with pytest.raises(ValueError, match="it has no annotations and no categories"):
        Coco(tmp_path).classes  # noqa: B018


def test_mistakes_in_cocos_format_are_named(tmp_path: Path) -> None:
    content = annotations()
    content["annotations"][0]["category_id"] = 99
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match="annotation 1 of split train2017 refers to image 40 and category 99"):
        Coco(tmp_path).dataset("train")
    for part, entry, mistake, message in (
        ("images", 0, {"width": "160"}, "image 40 of .*: width must be a whole number, got '160'"),
        ("images", 1, {"id": "a"}, "image a of .*: id must be a whole number, got 'a'"),
        ("images", 1, {"id": 40}, "2 images have the same id, 40; each must"),
        ("categories", 0, {"name": 7}, "category 3 of .*: name must be text, got 7"),
        ("categories", 0, {"name": "tree"}, "2 categories have the same name, 'tree'"),
        ("annotations", 0, {"bbox": [1, 2, 3]}, r"annotation 1 of .*: bbox must be x, y, .*, got \[1, 2, 3\]"),
        ("annotations", 0, {"bbox": [1, 2, 3, float("nan")]}, "bbox must be x, y, width and height"),
        ("annotations", 0, {"bbox": None}, "bbox must be x, y, width and height in pixels, got None"),
    ):
        content = annotations()
        content[part][entry] |= mistake
        write_coco(tmp_path, content)
        with pytest.raises(ValueError, match=message):
            Coco(tmp_path).dataset("train")


def test_what_is_missing_in_annotations_is_named(tmp_path: Path) -> None:
    content = annotations()
    del content["images"][1]["id"]
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match=r"image at position 1 of split train2017 .* it has no id"):
        Coco(tmp_path).dataset("train")
    write_coco(tmp_path, annotations() | {"annotations": None})
    with pytest.raises(ValueError, match="annotations must be a list, got None"):
        Coco(tmp_path).dataset("train")
    content = annotations()
    del content["annotations"][1]["bbox"]
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match="annotation 2 of split train2017 is not in COCO's format: it has no bbox"):
        Coco(tmp_path).dataset("train")
    content = annotations()
    del content["images"][0]["file_name"], content["images"][0]["id"]
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match=r"image at position 0 of split train2017 .* has no id and no file_name"):
        Coco(tmp_path).dataset("train")


def test_splits_that_cannot_be_trained_on_are_named(tmp_path: Path) -> None:
    content = annotations()
    for annotation in content["annotations"]:  # shares of the width and height, as others have them
        annotation["bbox"] = [edge / WIDTH for edge in annotation["bbox"]]
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match=r"has a box to train on .*4 empty boxes.*boxes are counted in pixels"):
        Coco(tmp_path, val_fraction=0).dataset("train")
    content = annotations()
    content["categories"].pop()
    content["annotations"] = []
    write_coco(tmp_path, content, split="val2017")
    write_coco(tmp_path)
    with pytest.raises(ValueError, match=r"split val2017 must have the categories of train2017.*tree \(10\)"):
        Coco(tmp_path, val="val2017").dataset("val")
    write_coco(tmp_path, annotations() | {"annotations": []})
    with pytest.raises(ValueError, match=r"no image of .* has a box to train on \(0 images, 0 boxes; 2 images without"):
        Coco(tmp_path, val_fraction=0).dataset("train")


def test_arguments_out_of_range_are_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for name, value in (("val_fraction", 1.0), ("jitter_size", 0), ("batch_size", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Coco(tmp_path, **{name: value})  # type: ignore[arg-type]


def test_objects_without_an_area_have_that_of_their_box(tmp_path: Path) -> None:
    content = annotations()
    content["annotations"][0]["area"] = 0
    del content["annotations"][1]["area"]
    dataset = Coco(write_coco(tmp_path, content), val="train2017").dataset("val")
    assert dataset is not None
    found = dataset[0]
    assert found is not None
    areas = [(right - left) * (bottom - top) for _, (left, top, right, bottom) in boxes("china")]
    torch.testing.assert_close(found[1]["area"], torch.tensor(areas))


def test_a_category_that_only_groups_others_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = annotations()
    for category in content["categories"]:
        category["supercategory"] = "park"
    content["categories"].insert(0, {"id": 0, "name": "park", "supercategory": "none"})  # as Roboflow writes it
    data = Coco(write_coco(tmp_path, content), val_fraction=0)
    with caplog.at_level("INFO"):
        assert data.classes == list(CATEGORIES)
    assert data.category_ids == list(CATEGORIES.values())
    assert "category 'park' (0) left out: it only groups others" in caplog.text
    assert Coco(tmp_path, categories=["park", "tree"]).category_ids == [0, 10]  # where it is asked for
    # A project that has the name of its only category.
    content["categories"][0]["name"] = content["categories"][1]["supercategory"] = "temple"
    assert Coco(write_coco(tmp_path, content)).category_ids == list(CATEGORIES.values())
    assert Coco(tmp_path, categories=["temple"]).category_ids == [3]
    write_coco(tmp_path, content | {"categories": content["categories"][1:]}, split="valid")
    assert len(Coco(tmp_path, val="valid").dataset("val") or ()) == 2  # which may leave it out
    content["annotations"][0]["category_id"] = 0
    write_coco(tmp_path, content, split="valid")
    with pytest.raises(ValueError, match=r"annotation 1 of split valid has the category 'temple' \(0\), whi"):
        Coco(tmp_path, val="valid").dataset("val")
    with pytest.raises(ValueError, match="2 categories have the same name, 'temple'"):  # both are annotated
        Coco(tmp_path, train="valid").dataset("train")


@pytest.mark.parametrize("given", [-1, 0, 160.5, 10**400, None, "nan", "inf", "missing"])
def test_an_image_says_its_size_where_the_annotations_do_not(given: Any, tmp_path: Path) -> None:
    content = annotations()
    image = content["images"][0]
    if given == "missing":
        del image["width"], image["height"]
    else:
        image["width"] = float(given) if isinstance(given, str) else given
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: boxes are those of the upright image
    write_coco(tmp_path, content)
    photograph("china").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "train2017" / "china.png", exif=exif)
    data = Coco(tmp_path, val_fraction=0, augmentation="none")
    dataset = data.dataset("train")
    assert dataset is not None
    assert [(one.width, one.height) for one in dataset.images] == [SIZE, SIZE]
    assert (data.summary.boxes, data.summary.outside_boxes, data.summary.measured_images) == (4, 0, 1)
    assert "; 1 images whose size is that of their file" in str(data.summary)
    item = dataset[0]
    assert item is not None
    assert item[0].shape == (3, HEIGHT, WIDTH)
    evaluated = Coco(tmp_path, val="train2017").dataset("val")
    assert evaluated is not None
    assert (evaluated.images[0].width, evaluated.images[0].height) == SIZE


def test_images_that_cannot_say_their_size_are_named_or_left_out(tmp_path: Path) -> None:
    content = annotations()
    content["images"][1] |= {"width": -1, "height": -1}
    write_coco(tmp_path, content)
    (tmp_path / "train2017" / "flower.png").write_bytes(b"no image")
    for split in ("train", "val"):
        with pytest.raises(BrokenImageError, match=r"flower\.png: cannot identify.*broken_images=skip"):
            Coco(tmp_path, val="train2017").dataset(split)  # type: ignore[arg-type]
    data = Coco(tmp_path, val="train2017", broken_images="skip")
    assert len(data.dataset("train") or ()) == len(data.dataset("val") or ()) == 1
    assert str(data.summary) == "1 images, 2 boxes; 1 images missing or broken, and skipped"
    content["images"] = content["images"][1:]
    content["annotations"] = content["annotations"][2:]
    write_coco(tmp_path, content, split="val")
    (tmp_path / "val" / "flower.png").write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match="none of the 1 images of the val split can be read"):
        Coco(tmp_path, val="val", broken_images="skip").dataset("val")


def test_broken_images_that_are_skipped_are_not_counted_as_trained_on(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "train2017" / "flower.png").unlink()
    data = Coco(tmp_path, val_fraction=0, broken_images="skip")
    data.dataset("train")
    assert str(data.summary) == "1 images, 2 boxes; 1 images missing or broken, and skipped"


@pytest.mark.parametrize(
    ("part", "mistake", "message"),
    [
        ("annotations", {"iscrowd": "0"}, "annotation 1 .*: iscrowd must be 0 or 1, got '0'"),
        ("annotations", {"iscrowd": 2}, "iscrowd must be 0 or 1, got 2"),
        ("annotations", {"bbox": [True, 1, 20, 30]}, r"bbox must be x, y, .* got \[True, 1, 20, 30\]"),
        ("annotations", {"bbox": [0, 0, 20, 1e308]}, "bbox must be x, y, width and height"),
        ("annotations", {"bbox": [0, 0, 20, 10**400]}, "bbox must be x, y, width and height"),
        ("annotations", {"bbox": [0, 0, 20, float("inf")]}, "bbox must be x, y, width and height"),
        ("annotations", {"area": float("nan")}, "area must be a number, in square pixels, got nan"),
        ("annotations", {"area": "30"}, "area must be a number"),
        ("annotations", {"category_id": True}, "category_id must be a whole number, got True"),
        ("annotations", {"image_id": 10**30}, "image_id must be a whole number"),
        ("annotations", {"id": 2}, "2 annotations have the same id, 2; each must"),
        ("annotations", {"id": [2]}, r"annotation \[2\] .*: id must be a whole number"),
        ("images", {"width": True}, "image 40 .*: width must be a whole number, got True"),
        ("images", {"file_name": " "}, "image 40 .*: file_name must be text, got ' '"),
        ("categories", {"name": " "}, "category 3 .*: name must be text, got ' '"),
    ],
)
def test_values_that_cannot_be_are_named(part: str, mistake: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = annotations()
    content[part][0] |= mistake
    with pytest.raises(ValueError, match=message):
        Coco(write_coco(tmp_path, content)).dataset("train")


def test_crowds_may_be_true_and_false(tmp_path: Path) -> None:
    content = annotations()
    for annotation, crowd in zip(content["annotations"], (True, False, 1.0, None), strict=True):
        annotation["iscrowd"] = crowd
    dataset = Coco(write_coco(tmp_path, content), val="train2017").dataset("val")
    assert dataset is not None
    assert [image.crowd.tolist() for image in dataset.images] == [[True, False], [True, False]]


def test_a_box_that_is_given_twice_is_trained_on_once(tmp_path: Path) -> None:
    content = annotations()
    for category, box in boxes("china")[:1] * 2:
        annotate(content, 40, category, box)
    annotate(content, 40, "flower", boxes("china")[0][1])  # of another category
    data = Coco(write_coco(tmp_path, content), val_fraction=0)
    dataset = data.dataset("train")
    assert dataset is not None
    assert dataset.images[0].labels.tolist() == [1, 3, 2]
    assert (data.summary.boxes, data.summary.repeated_boxes) == (5, 2)
    assert "2 boxes given twice taken once" in str(data.summary)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"images": ' * 10**5, "[1" + "0" * 5000 + "]", "", "\ufeff[]"])
def test_json_that_is_none_or_nests_too_deeply_is_named(text: str, tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(ValueError, match=r"instances_train2017\.json is n"):
        Coco(tmp_path).dataset("train")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    nothing = {"images": [], "annotations": [], "categories": annotations()["categories"]}
    with pytest.raises(ValueError, match=r"--data\.train must name a split of .* with images in it"):
        Coco(write_coco(tmp_path, nothing)).dataset("train")
    write_coco(tmp_path)
    write_coco(tmp_path, nothing, split="val")
    with pytest.raises(ValueError, match=r"--data\.val must name a split of .* with images in it"):
        Coco(tmp_path, val="val").dataset("val")
    with pytest.raises(ValueError, match=r"val_fraction = 0\.9 holds out all of 2 images"):
        Coco(tmp_path, val_fraction=0.9).dataset("train")


def test_annotations_that_are_too_large_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"instances_train2017\.json has [\d,]+ bytes; expected at most 100 \(max_annotations\)"
    ):
        Coco(write_coco(tmp_path), max_annotations=100).dataset("train")


def test_an_image_too_narrow_for_a_detector_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    Image.new("RGB", (6000, 2)).save(tmp_path / "train2017" / "china.png")
    content = annotations()
    content["images"][0] |= {"width": 6000, "height": 2}
    content["annotations"][0]["bbox"] = [0, 0, 50, 2]
    write_coco(tmp_path / "again", content)
    shutil.copytree(tmp_path / "train2017", tmp_path / "again" / "train2017", dirs_exist_ok=True)
    for inspect in (True, False):
        data = Coco(tmp_path / "again", val_fraction=0, inspect=inspect, num_workers=0)
        with pytest.raises(BrokenImageError, match=r"china\.png: it has 6000x2 pixels; one side must be at most"):
            list(data.train_dataloader())


def test_a_test_split_needs_no_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_coco(tmp_path)
    content = annotations()
    del content["annotations"]
    write_coco(tmp_path, content, split="test2017")
    with caplog.at_level("INFO"):
        dataset = Coco(tmp_path, test="test2017").dataset("test")
    assert dataset is not None
    assert [len(image.boxes) for image in dataset.images] == [0, 0]
    assert "split test2017 has no annotations: its figures are -1 and mean nothing" in caplog.text
    for other in (dict(val="test2017"), dict(train="test2017")):
        with pytest.raises(ValueError, match="it has no annotations"):
            Coco(tmp_path, **other).dataset("train")  # type: ignore[arg-type]


@pytest.mark.parametrize("categories", [[], ["tree", "tree"], [" "]])
def test_categories_are_different_names(categories: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="categories must be a list of different names, or null for all, got"):
        Coco(write_coco(tmp_path), categories=categories)
