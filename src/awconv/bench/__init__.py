"""What AW-convolution costs beside a plain convolution, and loading beside torchvision's, measured interleaved."""

from awconv.extras import require

require("rich", extra="train")

from awconv.bench.data import bench_data
from awconv.bench.detector import bench_detector
from awconv.bench.export import bench_export
from awconv.bench.model import bench_model
from awconv.bench.op import bench_op

__all__ = ["bench_data", "bench_detector", "bench_export", "bench_model", "bench_op"]
