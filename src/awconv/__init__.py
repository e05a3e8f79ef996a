"""awconv: convolutions whose kernels adapt to each image (arXiv 2108.08205).

Importing it registers the AW models with timm.
"""

from awconv import models, other_adapters  # noqa: F401 - the second one registers a check
from awconv.adapter import adapter_state_dict, load_adapter, save_adapter
from awconv.branch_spec import BranchSpec
from awconv.check_optimizer import check_optimizer
from awconv.convert import convert
from awconv.explain import attention_maps
from awconv.fold import fold
from awconv.fuse import fuse
from awconv.layers import AWConv1d, AWConv2d, AWConv3d
from awconv.load import Loaded, load
from awconv.odconv import ODConv2d
from awconv.ops import aw_conv1d, aw_conv2d, aw_conv3d, use_algorithm
from awconv.parameter_groups import parameter_groups
from awconv.revert import is_converted, revert
from awconv.summary import Summary, summary
from awconv.train_only import train_only
from awconv.version import __version__

__all__ = [
    "AWConv1d",
    "AWConv2d",
    "AWConv3d",
    "BranchSpec",
    "Loaded",
    "ODConv2d",
    "Summary",
    "__version__",
    "adapter_state_dict",
    "attention_maps",
    "aw_conv1d",
    "aw_conv2d",
    "aw_conv3d",
    "check_optimizer",
    "convert",
    "fold",
    "fuse",
    "is_converted",
    "load",
    "load_adapter",
    "models",
    "parameter_groups",
    "revert",
    "save_adapter",
    "summary",
    "train_only",
    "use_algorithm",
]
