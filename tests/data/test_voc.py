"""VOC's format: as tools write it, and their faults."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

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
    with pytest.raises(ValueError, match=r"must name YEAR/LIST, such as VOC2007/trainval, .* got 'trainval'"):
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
        ValueError, match=r"no object of VOC2007/trainval has the category tulip; its categories are flower, t"
    ):
        Voc(tmp_path, train=["VOC2007/trainval"], categories=["flower", "tulip"]).dataset("train")
    with pytest.raises(FileNotFoundError, match=r"Main/trainval\.txt is not a file; give lists that exist"):
        Voc(tmp_path, train=["VOC2012/trainval"]).dataset("train")


LISTS: dict[str, Any] = dict(train=["VOC2007/trainval"], categories=list(CATEGORIES), val_fraction=0)


def edit(root: Path, old: str, new: str, name: str = "china") -> Path:
    """Replaces text in an image's annotations."""
    path = root / "VOC2007" / "Annotations" / f"{name}.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return root


@pytest.mark.parametrize(
    ("text", "crowd"), [("1", True), ("true", True), (" True ", True), ("0", False), ("false", False), ("", False)]
)
def test_difficult_objects_are_regions_of_a_crowd(text: str, crowd: bool, tmp_path: Path) -> None:
    edit(write_voc(tmp_path), "<difficult>0", f"<difficult>{text}")
    dataset = Voc(tmp_path, **LISTS, val="VOC2007/trainval").dataset("val")
    assert dataset is not None
    assert dataset.images[0].crowd.tolist() == [crowd, False]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<difficult>0", "<difficult>yes", "difficult must be 0 or 1, got 'yes'"),
        ("<difficult>0", "<difficult>2", "difficult must be 0 or 1, got '2'"),
        ("<xmin>", "<xmin>nan</xmin><xmin>", "bndbox/xmin must be a number of pixels, got 'nan'"),
        ("<ymax>", "<ymax>1e999</ymax><ymax>", "bndbox/ymax must be a number of pixels, got '1e999'"),
        ("<ymax>", "<ymax>1_0</ymax><ymax>", "bndbox/ymax must be a number of pixels, got '1_0'"),
        ("<name>temple", "<name> </name><name>temple", "the name of an object is empty"),
        ("<width>160", "<width>wide", "size/width must be a number of pixels, got 'wide"),
        ("<annotation>", "<annotations><annotation>", "mismatched tag|no element found|is not in VOC's format"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "it has a DTD"),
        ("<annotation>", '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation>', "it has a DTD"),
        ("<name>temple", "<name>&b;", "undefined entity"),
        ("<annotation>", "<annotation>" + "<part>" * 200, "it nests more than 100 elements"),
        ("<annotation>", '<?xml version="1.0" encoding="none"?><annotation>', "unknown encoding"),
    ],
)
def test_values_that_cannot_be_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    edit(write_voc(tmp_path), old, new)
    with pytest.raises(ValueError, match=rf"Annotations/china\.xml is not in VOC's format: .*({message})"):
        Voc(tmp_path, **LISTS).dataset("train")


def test_a_file_of_another_kind_is_no_image_without_objects(tmp_path: Path) -> None:
    (write_voc(tmp_path) / "VOC2007" / "Annotations" / "china.xml").write_text("<html></html>")
    with pytest.raises(
        ValueError, match=r"china\.xml is not in VOC's format: its root must be 'annotation', got 'html'"
    ):
        Voc(tmp_path, **LISTS).dataset("train")


def test_entities_that_would_grow_without_end_are_not_expanded(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 30))  # 10^30 letters
    edit(write_voc(tmp_path), "<annotation>", f'<!DOCTYPE a [<!ENTITY a0 "a">{entities}]><annotation>')
    edit(tmp_path, "<name>temple", "<name>&a29;")
    with pytest.raises(ValueError, match=r"china\.xml is not in VOC's format: it has a DTD"):
        Voc(tmp_path, **LISTS).dataset("train")


@pytest.mark.parametrize("size", ["-1", "0", "", "160.5", "nan"])
def test_an_image_says_its_size_where_the_annotations_do_not(size: str, tmp_path: Path) -> None:
    data = Voc(edit(write_voc(tmp_path), "<width>160", f"<width>{size}"), **LISTS)
    dataset = data.dataset("train")
    assert dataset is not None
    assert [(image.width, image.height) for image in dataset.images] == [SIZE, SIZE]
    assert (data.summary.boxes, data.summary.outside_boxes, data.summary.measured_images) == (4, 0, 1)


def test_lists_may_say_what_is_in_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lists = write_voc(tmp_path) / "VOC2007" / "ImageSets" / "Main"
    (lists / "temple_train.txt").write_text("\ufeffchina  1\r\nflower -1\r\n\r\n", encoding="utf-8")
    (lists / "tree_train.txt").write_text("china.jpg\nflower 0\n")  # the same images
    with caplog.at_level("INFO"):
        dataset = Voc(
            tmp_path, ["VOC2007/temple_train", "VOC2007/tree_train"], categories=list(CATEGORIES), val_fraction=0
        ).dataset("train")
    assert dataset is not None
    assert [image.path for image in dataset.images] == [
        "VOC2007/JPEGImages/china.jpg",
        "VOC2007/JPEGImages/flower.jpg",
    ]
    assert "train images: 2 listed twice, counted once" in caplog.text


def test_lists_may_quote_names(tmp_path: Path) -> None:
    year = write_voc(tmp_path) / "VOC2007"
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (year / folder / f"china.{ending}").rename(year / folder / f"img 1.{ending}")
        (year / folder / f"flower.{ending}").rename(year / folder / f'"2".{ending}')  # whose own quotes are no list's
    for listed in ('"img 1"\n"2"\n', '"img 1"  1\n"2" -1\n', 'img 1 0\n"2".jpg\n', '"img 1.jpg" 1\n""2"" 0\n'):
        (year / "ImageSets" / "Main" / "trainval.txt").write_text(listed)
        dataset = Voc(tmp_path, **LISTS, test=None).dataset("train")
        assert dataset is not None
        assert [Path(image.path).name for image in dataset.images] == ["img 1.jpg", '"2".jpg']


@pytest.mark.parametrize(("image", "xml"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
@pytest.mark.parametrize("moved", [False, True])
def test_an_accent_is_the_same_in_both_of_unicodes_forms(
    image: str, xml: str, listed: str, moved: bool, tmp_path: Path
) -> None:
    def form(kind: str, text: str) -> str:
        return unicodedata.normalize(kind, text)  # type: ignore[arg-type]

    edit(write_voc(tmp_path), "<name>temple", f"<name>{form(xml, 'pagodé')}")
    edit(tmp_path, "<annotation>", f"<annotation><filename>{form(xml, 'né.jpg')}</filename>")
    year = tmp_path / "VOC2007"
    file = year / "JPEGImages" / form(image, "né.jpg")
    (year / "JPEGImages" / "china.jpg").rename(file)
    stem = "01" if moved else "né"  # where the name in the annotations counts
    (year / "Annotations" / "china.xml").rename(year / "Annotations" / form(xml, f"{stem}.xml"))
    (year / "ImageSets" / "Main" / "trainval.txt").write_text(form(listed, f"{stem}\nflower\n"))
    data = Voc(
        tmp_path, "VOC2007/trainval", test=None, categories=[form(listed, "pagodé"), "tree", "flower"], val_fraction=0
    )
    dataset = data.dataset("train")
    assert dataset is not None
    assert dataset.images[0].path == f"VOC2007/JPEGImages/{file.name}"
    assert dataset[0] is not None
    assert data.summary.boxes == 4


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_list_is_refused(content: str, tmp_path: Path) -> None:
    (write_voc(tmp_path) / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text(content)
    with pytest.raises(ValueError, match=r"trainval\.txt lists no image; give another list with --data\.train"):
        Voc(tmp_path, **LISTS).dataset("train")
    with pytest.raises(ValueError, match=r"--data\.train must name a split"):
        Voc(tmp_path, train=[]).dataset("train")


def test_a_listed_image_without_annotations_is_named(tmp_path: Path) -> None:
    (write_voc(tmp_path) / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text("china\nplate 1\n")
    with pytest.raises(FileNotFoundError, match=r"trainval\.txt lists 'plate', and .*Annotations/plate\.xml is"):
        Voc(tmp_path, **LISTS).dataset("train")


@pytest.mark.parametrize("ending", [".png", ".JPG", ".jpeg"])
def test_images_may_have_any_ending(ending: str, tmp_path: Path) -> None:
    images = write_voc(tmp_path) / "VOC2007" / "JPEGImages"
    (images / "china.jpg").rename(images / f"china{ending}")
    dataset = Voc(tmp_path, **LISTS).dataset("train")
    assert dataset is not None
    assert dataset.images[0].path.endswith(f"china{ending}")
    # Of two with the same name, the one that the annotations name.
    shutil.copy(images / f"china{ending}", images / "china.bmp")
    with pytest.raises(ValueError, match=r"china\.xml is not in VOC's format: its image could be .*china\..* or "):
        Voc(tmp_path, **LISTS).dataset("train")
    edit(tmp_path, "<annotation>", f"<annotation><filename>C:\\x\\china{ending}</filename>")
    dataset = Voc(tmp_path, **LISTS).dataset("train")
    assert dataset is not None
    assert dataset.images[0].path.endswith(f"china{ending}")


# Where tools put images and annotations, and what names the training split then; {0} is "china" or "flower".
_LAYOUTS: dict[str, tuple[str, str, str | None, str]] = {
    "labelImg": ("{0}.jpg", "{0}.xml", None, "."),
    "Roboflow": ("train/{0}.jpg", "train/{0}.xml", None, "train"),
    "CVAT": ("JPEGImages/{0}.jpg", "Annotations/{0}.xml", "ImageSets/Main/default.txt", "default"),
    "Label Studio": ("images/{0}.jpg", "Annotations/{0}.xml", None, "."),
    "Kaggle": ("images/{0}.jpg", "annotations/{0}.xml", None, "."),
    "FiftyOne": ("data/{0}.jpg", "labels/{0}.xml", None, "."),
    "FiftyOne, by its labels": ("data/{0}.jpg", "labels/{0}.xml", None, "labels"),
    "year without lists": ("VOC2007/JPEGImages/{0}.jpg", "VOC2007/Annotations/{0}.xml", None, "VOC2007"),
    "one list as text": (
        "VOC2007/JPEGImages/{0}.jpg",
        "VOC2007/Annotations/{0}.xml",
        "VOC2007/ImageSets/Main/train.txt",
        "VOC2007/train",
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tool", _LAYOUTS)
def test_the_layouts_that_tools_write(tool: str, packed: bool, tmp_path: Path) -> None:
    image, xml, listed, train = _LAYOUTS[tool]
    written = write_voc(tmp_path / "written") / "VOC2007"
    for name in ("china", "flower"):
        for kind, source in ((image, f"JPEGImages/{name}.jpg"), (xml, f"Annotations/{name}.xml")):
            target = tmp_path / "data" / kind.format(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(written / source, target)
    if listed is not None:
        (tmp_path / "data" / listed).parent.mkdir(parents=True)
        (tmp_path / "data" / listed).write_text("china\nflower\n")
    root = Path(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path, "data")) if packed else tmp_path / "data"
    data = Voc(root, train=train, test=None, categories=list(CATEGORIES), val_fraction=0, augmentation="none")
    dataset = data.dataset("train")
    assert dataset is not None
    assert data.summary.boxes == 4
    for index, name in enumerate(("china", "flower")):
        item = dataset[index]
        assert item is not None
        torch.testing.assert_close(item[1]["boxes"], torch.tensor([box for _, box in boxes(name)]))
        expected = np.asarray(Image.open(written / "JPEGImages" / f"{name}.jpg"))
        assert np.array_equal(item[0].permute(1, 2, 0).numpy(), expected)


def test_folders_without_images_or_xml_are_not_taken_for_theirs(tmp_path: Path) -> None:
    written = write_voc(tmp_path / "written") / "VOC2007"
    root = tmp_path / "root"
    shutil.copytree(written / "JPEGImages", root / "images")
    shutil.copytree(written / "Annotations", root, dirs_exist_ok=True)
    for leftover in ("data/notes.txt", "labels/china.txt", "annotations/china.txt"):  # as YOLO has them
        (root / leftover).parent.mkdir()
        (root / leftover).write_text("0 0.5 0.5 1 1")
    dataset = Voc(root, train=".", test=None, categories=list(CATEGORIES), val_fraction=0).dataset("train")
    assert dataset is not None
    assert [image.path for image in dataset.images] == ["images/china.jpg", "images/flower.jpg"]
    shutil.rmtree(root / "images")
    for xml in root.glob("*.xml"):
        xml.rename(root / "labels" / xml.name)
    with pytest.raises(ValueError, match=r"or a folder of .* with XML files, got 'train'; there are: \.$"):
        Voc(root, train="train").dataset("train")


def test_images_are_found_by_the_name_in_their_annotations(tmp_path: Path) -> None:
    images = write_voc(tmp_path) / "VOC2007" / "JPEGImages"
    (images / "china.jpg").rename(images / "IMG 7.jpg")
    edit(tmp_path, "<annotation>", "<annotation><filename>IMG 7.jpg</filename>")
    dataset = Voc(tmp_path, **LISTS).dataset("train")
    assert dataset is not None
    assert dataset.images[0].path == "VOC2007/JPEGImages/IMG 7.jpg"
    (images / "flower.jpg").unlink()
    edit(tmp_path, "<annotation>", "<annotation><filename>IMG 7.jpg</filename>", "flower")
    with pytest.raises(
        ValueError, match=r"china\.xml and .*flower\.xml annotate the same image, .*IMG 7\.jpg; keep one"
    ):
        Voc(tmp_path, **LISTS).dataset("train")


def test_what_is_there_is_named_or_said_to_be_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    year = write_voc(tmp_path) / "VOC2007"
    with pytest.raises(FileNotFoundError, match=r"there are: VOC2007/test, VOC2007/trainval$"):
        Voc(tmp_path, train="VOC2007/train").dataset("train")
    with pytest.raises(
        ValueError, match=r"no object of VOC2007/trainval has one of VOC's 20 categories; its categories are f"
    ):
        Voc(tmp_path, train="VOC2007/trainval").dataset("train")
    (tmp_path / "VOC2012").mkdir()
    (year / "ImageSets" / "Main" / "trainval.txt").write_text("china\n")
    with caplog.at_level("INFO"):
        Voc(tmp_path, train="VOC2007/trainval", test=None, categories=["temple"], val_fraction=0).dataset("train")
    assert f"not used: VOC2012 in {tmp_path}" in caplog.text
    assert "no split uses: 2 in" in caplog.text
    assert "such as VOC2007/Annotations/flower.xml, VOC2007/JPEGImages/flower.jpg" in caplog.text
