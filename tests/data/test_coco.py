"""COCO's format: what tools make of it, and what they get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from awconv.data import Coco
from tests.photographs import SIZE, annotations, boxes, write_coco

WIDTH, HEIGHT = SIZE


def test_mistakes_in_cocos_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none is neither a folder nor a zip archive"):
        Coco(tmp_path / "none").classes  # noqa: B018
    (tmp_path / "a.zip").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"a\.zip is neither a folder nor a zip archive"):
        Coco(tmp_path / "a.zip").classes  # noqa: B018
    write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"instances_val\.json are not there; give --data\.annotations"):
        Coco(tmp_path, train="val").classes  # noqa: B018
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"instances_train2017\.json is no JSON"):
        Coco(tmp_path).classes  # noqa: B018
    file.write_text('{"images": []}')
    with pytest.raises(ValueError, match="it has no annotations and no categories"):
        Coco(tmp_path).classes  # noqa: B018
    content = annotations()
    content["annotations"][0]["category_id"] = 99
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match="annotation 1 of split train2017 names image 40 and category 99"):
        Coco(tmp_path).dataset("train")
    for part, entry, mistake, message in (
        ("images", 0, {"width": "160"}, "image 40 of .*: width must be a whole number, got '160'"),
        ("images", 1, {"id": "a"}, "image a of .*: id must be a whole number, got 'a'"),
        ("images", 1, {"id": 40}, "2 images have the id 40, of which there must be one"),
        ("categories", 0, {"name": 7}, "category 3 of .*: name must be text, got 7"),
        ("categories", 0, {"name": "tree"}, "2 categories have the name 'tree'"),
        ("annotations", 0, {"bbox": [1, 2, 3]}, r"annotation 1 of .*: bbox must be x, y, .*, got \[1, 2, 3\]"),
        ("annotations", 0, {"bbox": [1, 2, 3, float("nan")]}, "bbox must be x, y, width and height"),
        ("annotations", 0, {"bbox": None}, "bbox must be x, y, width and height in pixels, got None"),
    ):
        content = annotations()
        content[part][entry] |= mistake
        write_coco(tmp_path, content)
        with pytest.raises(ValueError, match=message):
            Coco(tmp_path).dataset("train")
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
