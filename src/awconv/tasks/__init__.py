"""What is trained: one LightningModule for each kind of problem (extra ``train``)."""

from awconv.extras import require

require("lightning", extra="train")

from awconv.tasks.classification import ClassificationTask
from awconv.tasks.detection import DetectionTask
from awconv.tasks.task import Task

__all__ = ["ClassificationTask", "DetectionTask", "Task"]
