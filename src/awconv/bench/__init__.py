"""What AW-convolution costs beside a plain convolution: runtime measured interleaved, peak memory, a roofline."""

from awconv.extras import require

require("rich", extra="train")

from awconv.bench.detector import bench_detector
from awconv.bench.export import bench_export
from awconv.bench.model import bench_model
from awconv.bench.op import bench_op

__all__ = ["bench_detector", "bench_export", "bench_model", "bench_op"]
