"""VOC's format: what tools make of it, and what they get wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from awconv.data import Voc
from tests.photographs import CATEGORIES, SIZE, boxes, photograph

WIDTH, HEIGHT = SIZE


def write_voc(root: Path, difficult: int = 0, drop: str = "") -> Path:
    year = root / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / folder).mkdir(parents=True, exist_ok=True)
    for name in ("china", "flower"):
        photograph(name).save(year / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{category}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0] + 1}</xmin>"
            f"<ymin>{box[1] + 1}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
            for category, box in boxes(name)
        )
        text = f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{objects}</annotation>"
        (year / "Annotations" / f"{name}.xml").write_text(text.replace(drop, "", 1) if drop else text)
    for split in ("trainval", "test"):
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("china\nflower\n")
    return root


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    data = Voc(write_voc(tmp_path), train=["VOC2007/trainval"], categories=list(CATEGORIES), num_workers=0)
    assert data.classes == list(CATEGORIES)
    ((images, targets),) = list(data.test_dataloader())
    assert [tuple(image.shape) for image in images] == [(3, HEIGHT, WIDTH)] * 2
    torch.testing.assert_close(targets[0]["boxes"], torch.tensor([box for _, box in boxes("china")]))
    assert targets[0]["labels"].tolist() == [1, 3]
    assert len(Voc(tmp_path).classes) == 20
    archive = Path(shutil.make_archive(str(tmp_path / "voc"), "zip", tmp_path, "VOC2007"))  # one folder at the top
    packed = Voc(archive, train=["VOC2007/trainval"], categories=list(CATEGORIES)).dataset("test")
    assert packed is not None
    assert torch.equal(packed[0][0], images[0])  # type: ignore[index]
    difficult = Voc(
        write_voc(tmp_path / "difficult", difficult=1), ["VOC2007/trainval"], categories=["temple", "flower"]
    )
    with pytest.raises(ValueError, match=r"3 crowd regions not trained on; 1 boxes of other categories left out"):
        difficult.dataset("train")
    evaluated = difficult.dataset("test")
    assert evaluated is not None
    assert [image.crowd.tolist() for image in evaluated.images] == [[True], [True, True]]


def test_mistakes_in_vocs_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a split of VOC is YEAR/LIST, such as VOC2007/trainval, got 'trainval'"):
        Voc(tmp_path, train=["trainval"]).dataset("train")
    write_voc(tmp_path, drop="<xmin>")
    lists = dict(train=["VOC2007/trainval"], categories=list(CATEGORIES))
    with pytest.raises(ValueError, match=r"VOC2007/Annotations/china\.xml is not in VOC's format: mismatched tag"):
        Voc(tmp_path, **lists).dataset("train")
    write_voc(tmp_path, drop="<name>temple</name>")
    with pytest.raises(ValueError, match=r"china\.xml is not in VOC's format: there is no name"):
        Voc(tmp_path, **lists).dataset("train")
    write_voc(tmp_path)
    with pytest.raises(
        ValueError, match=r"no object of VOC2007/trainval is of the category tulip; there are flower, t"
    ):
        Voc(tmp_path, train=["VOC2007/trainval"], categories=["flower", "tulip"]).dataset("train")
    with pytest.raises(FileNotFoundError, match=r"Main/trainval\.txt is not a file; name the lists that are there"):
        Voc(tmp_path, train=["VOC2012/trainval"]).dataset("train")
