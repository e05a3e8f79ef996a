"""COCO's figures, compared with those of pycocotools."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from awconv.tasks import DetectionTask
from awconv.tasks.coco import Evaluated, coco_figures, coco_results

# A detector that learns two photographs in seconds.


def pycocotools(truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, float]:
    with redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = truth
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    names += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # of all sizes, and at most 100 detections
    per_class = {
        f"AP/{category['name']}": float(values[values > -1].mean())
        for category, values in zip(truth["categories"], precision.transpose(2, 0, 1), strict=True)
        if (values > -1).any()
    }
    return dict(zip(names, map(float, evaluation.stats), strict=True)) | per_class


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_those_of_pycocotools(seed: int) -> None:
    generator = np.random.default_rng(seed)
    names = ["a", "b", "c", "never there"]
    truth: dict[str, Any] = {
        "images": [{"id": number, "width": 640, "height": 480} for number in range(12)],
        "annotations": [],
        "categories": [{"id": 10 * index + 3, "name": name} for index, name in enumerate(names)],
        "info": {},
    }
    images = []
    for image_id in range(12):
        count = int(generator.integers(0, 9)) if image_id else 0  # the first has no box
        corner = generator.uniform(0, 400, (count, 2))
        size = 2 ** generator.uniform(3, 7.5, (count, 2))  # of 8 to 181 pixels: small, medium and large
        labels = generator.integers(1, 4, count)
        crowd = generator.random(count) < 0.15
        true = np.hstack([corner, corner + size]).astype(np.float32)
        for box, label, region in zip(true.astype(float), labels, crowd, strict=True):
            extent = (box[2:] - box[:2]).tolist()
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": 10 * (int(label) - 1) + 3,
                    "bbox": [*box[:2].tolist(), *extent],
                    "area": 0.7 * extent[0] * extent[1],  # as of masks, which are smaller than boxes
                    "iscrowd": int(region),
                }
            )
        areas = [one["area"] for one in truth["annotations"] if one["image_id"] == image_id]
        # Each box found several times, more or less displaced, some under another label, and some where nothing is.
        drawn = np.repeat(true, 3, 0) + generator.normal(0, 6, (3 * count, 4)).astype(np.float32)
        drawn = np.vstack([drawn, generator.uniform(0, 200, (5, 4))]).astype(np.float32)
        drawn[:, 2:] = np.maximum(drawn[:, 2:], drawn[:, :2] + 2)
        found = np.concatenate([np.repeat(labels, 3), generator.integers(1, 5, 5)])
        found[generator.random(len(found)) < 0.1] = 1
        images.append(
            Evaluated(
                image_id,
                {
                    "boxes": torch.from_numpy(drawn),
                    "labels": torch.from_numpy(found),
                    "scores": torch.from_numpy(generator.random(len(found)).astype(np.float32)),
                },
                {
                    "boxes": torch.from_numpy(true),
                    "labels": torch.from_numpy(labels),
                    "area": torch.tensor(areas, dtype=torch.float32),
                    "iscrowd": torch.from_numpy(crowd.astype(np.int64)),
                },
            )
        )
    ours = coco_figures(images, names)
    expected = pycocotools(truth, coco_results(images, [10 * index + 3 for index in range(4)]))
    found_figures = ours.overall | {f"AP/{name}": value for name, value in ours.per_class.items()}
    assert found_figures.keys() == expected.keys()
    assert 0.05 < expected["AP"] < 0.95
    # Both count matches in double precision; torchmetrics then rounds to single.
    assert found_figures == pytest.approx(expected, abs=1e-6)


def test_equal_scores_count_in_the_order_of_the_images_numbers() -> None:
    box, far = torch.tensor([[1.0, 1, 60, 60]]), torch.tensor([[200.0, 200, 260, 260]])
    label, score = torch.tensor([1]), torch.tensor([0.5])
    target = {"boxes": box, "labels": label, "area": torch.tensor([3481.0]), "iscrowd": torch.tensor([0])}
    right, wrong = ({"boxes": where, "labels": label, "scores": score} for where in (box, far))
    in_the_files_order = [Evaluated(9, right, target), Evaluated(2, wrong, target), Evaluated(5, right, target)]
    truth = {
        "images": [{"id": image.image_id, "width": 640, "height": 480} for image in in_the_files_order],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 59, 59], "area": 3481, "iscrowd": 0}
            for n in (9, 2, 5)
        ],
        "categories": [{"id": 1, "name": "a"}],
        "info": {},
    }
    task = DetectionTask(["a"], [1], network="resnet8_cifar")
    task.evaluation = in_the_files_order
    logged: dict[str, float] = {}
    task.log_dict = lambda values: logged.update(values)  # type: ignore[method-assign,assignment]
    task.on_validation_epoch_end()
    expected = pycocotools(truth, coco_results(in_the_files_order, [1]))
    assert logged["val/AP50"] == pytest.approx(expected["AP50"], abs=1e-6)
    # By number the wrong one is first: a precision of 2/3 up to a recall of 2/3. In the file's order it is 1 up to 1/3.
    unordered = coco_figures(in_the_files_order, ["a"]).overall["AP50"]
    assert abs(unordered - expected["AP50"]) > 0.01


def test_an_evaluation_without_detections_is_zero() -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    target = {
        "boxes": torch.tensor([[1.0, 1, 60, 60]]),
        "labels": torch.tensor([1]),
        "area": torch.tensor([3481.0]),
        "iscrowd": torch.tensor([0]),
    }
    figures_of = coco_figures([Evaluated(1, empty, target)], ["a", "b"])
    assert figures_of.overall["AP"] == figures_of.overall["AR_100"] == 0
    assert figures_of.overall["AP_small"] == -1
    assert figures_of.per_class == {"a": 0}
