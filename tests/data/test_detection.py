"""Images with boxes: photographs in the layouts of COCO and VOC, and faults of real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from awconv.data import BrokenImageError, Coco
from awconv.data.boxes import Annotated, BoxSummary, clean
from awconv.data.order import Draw
from tests.photographs import CATEGORIES, SIZE, annotate, annotations, boxes, photograph, write_coco

WIDTH, HEIGHT = SIZE


def corners(name: str) -> torch.Tensor:
    return torch.tensor([box for _, box in boxes(name)])


def test_images_and_boxes_are_those_of_the_files(tmp_path: Path) -> None:
    data = Coco(write_coco(tmp_path), val="train2017", num_workers=0)
    assert data.classes == list(CATEGORIES)
    assert data.category_ids == list(CATEGORIES.values())
    ((images, targets),) = list(data.val_dataloader())
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(photograph("china")))
    assert targets[0]["labels"].tolist() == [1, 3]  # by the order of the categories, from 1
    assert targets[1]["labels"].tolist() == [2, 2]
    assert [target["image_id"].item() for target in targets] == [40, 41]
    torch.testing.assert_close(targets[0]["boxes"], corners("china"))
    area = (corners("flower")[:, 2:] - corners("flower")[:, :2]).prod(1)
    torch.testing.assert_close(targets[1]["area"], area)


def test_what_cannot_be_trained_on_is_counted(tmp_path: Path) -> None:
    content = annotations()
    annotate(content, 40, "temple", (10, 10, 10, 30))  # no width
    annotate(content, 40, "temple", (30, 30, 20, 40))  # a negative one
    annotate(content, 40, "tree", (WIDTH + 1, 5, WIDTH + 9, 9))
    annotate(content, 41, "flower", (-8, -4, 12, 16))
    annotate(content, 41, "flower", (0, 0, WIDTH, HEIGHT), iscrowd=1)
    for image_id, mode in enumerate(("L", "CMYK", "P"), 50):
        content["images"].append({"id": image_id, "file_name": f"{mode}.tiff", "width": WIDTH, "height": HEIGHT})
    annotate(content, 50, "temple", (1, 2, 30, 40))
    annotate(content, 51, "temple", (1, 2, 30, 40))
    annotate(content, 52, "tree", (1, 2, 30, 40), iscrowd=1)  # nothing else is in it
    write_coco(tmp_path, content)
    for mode in ("L", "CMYK", "P"):
        photograph("china").convert(mode).save(tmp_path / "train2017" / f"{mode}.tiff")

    data = Coco(tmp_path, val_fraction=0)
    dataset = data.dataset("train")
    assert dataset is not None
    summary = data.summary
    assert (summary.images, summary.boxes, summary.images_without_boxes) == (4, 7, 1)
    assert (summary.empty_boxes, summary.outside_boxes, summary.clipped_boxes) == (2, 1, 1)
    assert summary.crowd_regions == 2
    assert dict(summary.modes) == {"L": 1, "CMYK": 1}
    assert str(summary) == (
        "4 images, 7 boxes; 2 empty boxes (less than a pixel) left out; 1 boxes outside their image left out; 1 boxes "
        "clipped to their image; 2 crowd regions not trained on; 1 images without boxes; 1 images of mode CMYK "
        "converted to RGB; 1 images of mode L converted to RGB"
    )
    flower = next(image for image in dataset.images if image.image_id == 41)
    assert flower.boxes[-1].tolist() == [0, 0, 12, 16]
    for image, target in (dataset[index] for index in range(len(dataset))):  # type: ignore[misc]
        assert image.dtype == torch.uint8
        assert image.shape == (3, HEIGHT, WIDTH)
        assert len(target["boxes"])

    kept = Coco(tmp_path, val_fraction=0, images_without_boxes="keep")
    assert len(kept.dataset("train") or ()) == 5
    assert kept.summary.images_without_boxes == 1
    # An evaluation takes all as it is.
    evaluated = Coco(tmp_path, val="train2017").dataset("val")
    assert evaluated is not None
    assert [len(image.boxes) for image in evaluated.images] == [5, 4, 1, 1, 1]
    assert sum(image.crowd.sum() for image in evaluated.images) == 2


@given(st.lists(st.tuples(*[st.floats(-50, 250)] * 4, st.booleans()), max_size=8))
def test_cleaned_boxes_are_inside_and_counted_once(drawn: list[tuple[float, float, float, float, bool]]) -> None:
    image = Annotated(
        path="",
        image_id=1,
        width=WIDTH,
        height=HEIGHT,
        boxes=np.array([box[:4] for box in drawn], float).reshape(-1, 4),
        labels=np.arange(1, len(drawn) + 1),
        areas=np.ones(len(drawn)),
        crowd=np.array([box[4] for box in drawn], bool),
    )
    counts = BoxSummary()
    cleaned = clean(image, counts)
    assert counts.boxes + counts.empty_boxes + counts.outside_boxes + counts.crowd_regions == len(drawn)
    assert counts.boxes == len(cleaned.boxes) == len(cleaned.labels) == len(cleaned.areas) == len(cleaned.crowd)
    assert counts.images_without_boxes == (not len(cleaned.boxes))
    assert (cleaned.boxes[:, 2:] > cleaned.boxes[:, :2]).all()
    assert (cleaned.boxes >= 0).all()
    assert (cleaned.boxes <= [WIDTH, HEIGHT] * 2).all()
    assert (cleaned.boxes[:, 2:] - cleaned.boxes[:, :2] >= 1).all()
    for box, label in zip(cleaned.boxes, cleaned.labels, strict=True):  # none is changed that was inside
        given_box = np.array(drawn[label - 1][:4])
        if (given_box >= 0).all() and (given_box <= [WIDTH, HEIGHT] * 2).all():
            assert np.array_equal(box, given_box)


@pytest.mark.parametrize("top", ["", "coco"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_archive_is_as_good_as_its_folder(top: str, num_workers: int, tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "root" / top)
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "root"))
    batches = [
        next(iter(Coco(root, val="train2017", num_workers=num_workers).val_dataloader())) for root in (folder, archive)
    ]
    for one, other in zip(*(images for images, _ in batches), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(targets for _, targets in batches), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_categories_asked_for_are_there(tmp_path: Path) -> None:
    data = Coco(write_coco(tmp_path), categories=["tree", "temple"], val_fraction=0)
    assert data.classes == ["tree", "temple"]
    assert data.category_ids == [10, 3]
    dataset = data.dataset("train")
    assert dataset is not None
    assert [image.labels.tolist() for image in dataset.images] == [[2, 1]]  # nothing of it is in the other image
    assert data.summary.other_boxes == 2
    assert data.summary.images_without_boxes == 1
    with pytest.raises(ValueError, match="there is no category bush, hut; the categories are temple, flower, tree"):
        Coco(tmp_path, categories=["tree", "bush", "hut"]).classes  # noqa: B018


def test_the_images_of_a_batch_lie_or_stand_alike(tmp_path: Path) -> None:
    content = annotations()
    for image_id in range(100, 121):
        upright = image_id % 3 == 0
        content["images"].append(
            {
                "id": image_id,
                "file_name": f"{image_id}.png",
                "width": HEIGHT if upright else WIDTH,
                "height": WIDTH if upright else HEIGHT,
            }
        )
        annotate(content, image_id, "tree", (1, 2, 30, 40))
    write_coco(tmp_path, content)
    for image_id in range(100, 121):
        turned = photograph("china").rotate(90 if image_id % 3 == 0 else 0, expand=True)
        turned.save(tmp_path / "train2017" / f"{image_id}.png")
    data = Coco(tmp_path, val_fraction=0, batch_size=4, num_workers=0, augmentation="flip")
    seen = [[image.shape[1] > image.shape[2] for image in images] for images, _ in data.train_dataloader()]
    assert sorted(map(sum, seen)) == [0, 0, 0, 0, 4]  # of 16 lying and 7 upright images
    # Too few upright images for a batch of their own are seen all the same, with others.
    few = Coco(tmp_path, val_fraction=0, batch_size=11, num_workers=0)
    assert sorted(sum(i.shape[1] > i.shape[2] for i in images) for images, _ in few.train_dataloader()) in (
        [0, 6],
        [0, 7],
    )
    mixed = Coco(tmp_path, val_fraction=0, batch_size=4, num_workers=0, augmentation="scale_jitter", jitter_size=64)
    assert {image.shape for images, _ in mixed.train_dataloader() for image in images} == {(3, 64, 64)}
    held_out = Coco(tmp_path, val_fraction=0.25, batch_size=4, num_workers=0)
    assert sum(len(images) for images, _ in held_out.val_dataloader()) == 6
    assert len(held_out.dataset("train") or ()) == 17


def test_a_flip_moves_boxes_with_what_they_mark(tmp_path: Path) -> None:
    dataset = Coco(write_coco(tmp_path), val_fraction=0).dataset("train")
    assert dataset is not None
    expected = np.asarray(photograph("flower"))
    flipped = set()
    for number in range(12):
        image, target = dataset[Draw(1, 0, number)]  # type: ignore[misc]
        array = image.permute(1, 2, 0).numpy()
        mirrored = not np.array_equal(array, expected)
        flipped.add(mirrored)
        assert np.array_equal(array[:, ::-1] if mirrored else array, expected)
        found = target["boxes"]
        if mirrored:
            found = torch.stack([WIDTH - found[:, 2], found[:, 1], WIDTH - found[:, 0], found[:, 3]], 1)
        torch.testing.assert_close(found, corners("flower"))
        again, _ = dataset[Draw(1, 0, number)]  # type: ignore[misc]
        assert torch.equal(again, image)
    assert flipped == {True, False}


def test_without_augmentation_images_are_as_they_are(tmp_path: Path) -> None:
    dataset = Coco(write_coco(tmp_path), val_fraction=0, augmentation="none").dataset("train")
    assert dataset is not None
    for number in range(6):
        image, target = dataset[Draw(1, 0, number)]  # type: ignore[misc]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(photograph("flower")))
        torch.testing.assert_close(target["boxes"], corners("flower"))


@pytest.mark.parametrize("annotated_as", ["seen", "stored"])
def test_boxes_are_of_the_upright_image_unless_its_size_says_otherwise(annotated_as: str, tmp_path: Path) -> None:
    content = annotations()
    if annotated_as == "stored":
        content["images"][0] |= {"width": HEIGHT, "height": WIDTH}
    write_coco(tmp_path, content)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    stored = photograph("china").transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "train2017" / "china.png", exif=exif)
    data = Coco(tmp_path, val="train2017")
    assert len(data.dataset("train") or ()) == 2  # the look at the headers minds neither
    image, _ = (data.dataset("val") or ())[0]  # type: ignore[misc]
    expected = photograph("china") if annotated_as == "seen" else stored
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("augmentation", ["flip", "scale_jitter", "ssd"])
def test_augmented_boxes_stay_on_their_image(augmentation: Any, tmp_path: Path) -> None:
    data = Coco(write_coco(tmp_path), val_fraction=0, augmentation=augmentation, jitter_size=96)
    dataset = data.dataset("train")
    assert dataset is not None
    sizes = set()
    for number in range(40):
        image, target = dataset[Draw(number % 2, 0, number)]  # type: ignore[misc]
        assert image.dtype == torch.uint8
        assert type(image) is type(target["boxes"]) is torch.Tensor
        sizes.add(tuple(image.shape[1:]))
        found = target["boxes"]
        assert found.shape == (len(target["labels"]), 4)
        assert (found[:, 2:] > found[:, :2]).all()
        assert (found >= 0).all()
        assert (found <= torch.tensor([image.shape[2], image.shape[1]] * 2)).all()
    assert (len(sizes) > 5) == (augmentation == "ssd")
    if augmentation == "scale_jitter":
        assert sizes == {(96, 96)}


@pytest.mark.parametrize("damage", ["cut", "gone", "resized"])
def test_broken_images_are_named_and_skipped_if_wanted(damage: str, tmp_path: Path) -> None:
    write_coco(tmp_path)
    file = tmp_path / "train2017" / "flower.png"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:900])
    elif damage == "gone":
        file.unlink()
    else:
        Image.open(file).resize((20, 20)).save(file)
    data = Coco(tmp_path, val="train2017", inspect=False, num_workers=0)
    with pytest.raises(BrokenImageError, match=r"flower\.png.*--data\.broken_images=skip leaves broken images out"):
        list(data.val_dataloader())
    found_early = {"gone": "is not a file", "resized": "must have 160x106 pixels, as its annotations say, got 20x20"}
    if damage in found_early:
        with pytest.raises(BrokenImageError, match=rf"flower\.png.*{found_early[damage]}.*--data\.broken_images=skip"):
            Coco(tmp_path, val_fraction=0).dataset("train")
    skipping = Coco(tmp_path, val="train2017", broken_images="skip", num_workers=0)
    ((images, targets),) = list(skipping.val_dataloader())
    assert [target["image_id"].item() for target in targets] == [40]
    assert len(images) == 1
    alone = Coco(tmp_path, val="train2017", broken_images="skip", num_workers=0, batch_size=1)
    assert [len(images) for images, _ in alone.val_dataloader()] == [1, 0]
    assert [target["image_id"].item() for _, targets in alone.val_dataloader() for target in targets] == [40]
    trained = alone.dataset("train")
    assert trained is not None
    assert trained[Draw(1, 0, 0)][1]["labels"].tolist() == [1, 3]  # another in its place


def test_the_real_photographs_of_coco(shared_data: Path) -> None:
    data = Coco(shared_data / "coco128" / "coco128.zip", val="train2017")
    content = json.loads(data.files.read("annotations/instances_train2017.json"))
    dataset = data.dataset("train")
    assert dataset is not None
    with_boxes = {one["image_id"] for one in content["annotations"] if not one["iscrowd"]}
    assert len(dataset) == len(with_boxes) == data.summary.images
    assert data.summary.boxes + data.summary.crowd_regions == len(content["annotations"])
    assert len(data.dataset("val") or ()) == 128
