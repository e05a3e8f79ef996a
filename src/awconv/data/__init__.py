"""Real data sets as Lightning data modules (extra ``train``)."""

from awconv.extras import require

require("lightning", extra="train")

from awconv.data.cifar import Cifar10, Cifar100
from awconv.data.classification import ImageDataModule
from awconv.data.coco import Coco
from awconv.data.detection import DetectionDataModule
from awconv.data.digits import Digits
from awconv.data.folder import ImageFolder
from awconv.data.images import BrokenImageError
from awconv.data.loading import DataModule
from awconv.data.parquet import Parquet
from awconv.data.scenes import DigitScenes
from awconv.data.transforms import to_uint8
from awconv.data.voc import Voc
from awconv.data.webdataset import WebDataset

__all__ = [
    "BrokenImageError",
    "Cifar10",
    "Cifar100",
    "Coco",
    "DataModule",
    "DetectionDataModule",
    "DigitScenes",
    "Digits",
    "ImageDataModule",
    "ImageFolder",
    "Parquet",
    "Voc",
    "WebDataset",
    "to_uint8",
]
