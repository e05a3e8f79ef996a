"""The norm of a branch that suits the norms of its network."""

from __future__ import annotations

import functools
from collections import Counter

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.ops import FrozenBatchNorm2d

from awconv.branch_spec import NormLayer
from awconv.layers import BATCH_NORMS
from awconv.selection import parts_of_branches


def most_common_norm(model: nn.Module) -> str:
    """The kind of norm that a model has most of: ``"batch"``, ``"sync"``, ``"group"`` or ``"frozen"``."""
    branches = parts_of_branches(model)
    kinds: Counter[str] = Counter()
    for module in model.modules():
        if module in branches:
            continue
        if isinstance(module, nn.SyncBatchNorm):
            kinds["sync"] += 1
        elif isinstance(module, _BatchNorm):
            kinds["batch"] += 1
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm | _InstanceNorm):
            kinds["group"] += 1
        elif type(module).__name__.startswith("FrozenBatchNorm"):  # torchvision's, timm's, Detectron2's
            kinds["frozen"] += 1
    return kinds.most_common(1)[0][0] if kinds else "batch"


# A branch has few channels, and a group of one loses what its channel says of the whole image.
_ONE_GROUP = functools.partial(nn.GroupNorm, 1)


def norm_like(kind: str, dims: int) -> NormLayer:
    """What makes a branch's norm for a model with norms of a kind, for inputs with so many spatial axes."""
    if kind == "sync":
        return nn.SyncBatchNorm
    if kind == "group":
        return _ONE_GROUP
    if kind == "frozen" and dims == 2:
        frozen: NormLayer = FrozenBatchNorm2d
        return frozen
    return BATCH_NORMS[dims]
