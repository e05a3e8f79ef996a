"""Trained networks as files of other runtimes: ONNX, OpenVINO and AOTInductor (extra ``train``)."""

from awconv.extras import require

require("lightning", extra="train")

from awconv.export.command import export
from awconv.export.ort import ort_library

__all__ = ["export", "ort_library"]
