"""Networks for inference: norms folded into convolutions, and each attention branch in one call."""

from __future__ import annotations

import types
from collections import Counter
from typing import Any, NoReturn

import torch
import torch.fx
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from awconv.activation import Start
from awconv.branch import AttentionBranch
from awconv.convert import has_hooks, weight_owners
from awconv.layers import AW_LAYERS, AWConv1d, AWConv2d, AWConv2dSame, AWConv3d
from awconv.ops.folded_branch import folded_branch
from awconv.pairs import pairs
from awconv.relative import BaseBranch

_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(BatchNormAct2d, SyncBatchNormAct, FrozenBatchNorm2d, FrozenBatchNormAct2d),
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, AWConv1d, AWConv2d, AWConv2dSame, AWConv3d)


def fuse(model: nn.Module) -> nn.Module:
    """Makes a model faster for inference, in place. It computes the same, to rounding, and cannot be trained any more.

    Norms with running statistics become part of the convolutions that they follow, AW-convolutions and attention
    branches included. On a CPU a branch then runs in one call of C code, up to its activation; on a GPU, where a branch
    runs in one kernel already, it stays as it is. What follows what is found by torch.fx, in the parts of a model that
    it can trace; norms elsewhere stay, and those between which something watches or computes by itself: hooks, a
    ``forward`` of an instance, weights that are read.

    Args:
        model: any module. Put it on its device before.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        TypeError: the model is no module.

    Examples:
        >>> import timm
        >>> import torch
        >>> import awconv
        >>> model, images = timm.create_model("aw_resnet8_cifar").eval(), torch.randn(2, 3, 32, 32)
        >>> expected = model(images)
        >>> torch.allclose(awconv.fuse(model)(images), expected, atol=1e-4)
        True
        >>> sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be an nn.Module, got {model!r}")
    model.eval().requires_grad_(False)
    owners = weight_owners(model)
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for parent, conv_name, norm_name in list(pairs(model, (*_CONVOLUTIONS, *_NORMS))):
        conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
        if places[conv] == places[norm] == 1 and _is_foldable(conv, owners) and _has_statistics(norm):
            _fold(conv, norm)
            parent.set_submodule(norm_name, _without_norm(norm))
    _fuse_branches(model)
    if "train" not in vars(model):
        model.train = types.MethodType(train, model)  # type: ignore[method-assign]
    return model


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of a fused model's own method.

    Raises:
        ValueError: the model is to be trained.
    """
    if mode:
        _refuse_training(type(self).__name__)
    return type(self).train(self, mode)


def _refuse_training(name: str) -> NoReturn:
    raise ValueError(
        f"{name} was fused for inference (awconv.fuse): its norms are gone, and it cannot be trained. Train the "
        "network first, and fuse a copy of it: awconv.fuse(copy.deepcopy(network))"
    )


def _is_foldable(conv: nn.Module, owners: dict[nn.Parameter, list[str]]) -> bool:
    return (
        type(conv) in _CONVOLUTIONS
        and _is_untouched(conv)
        and isinstance(conv.weight, nn.Parameter)
        and all(len(owners[each]) == 1 for each in (conv.weight, conv.bias) if isinstance(each, nn.Parameter))
    )


def _has_statistics(norm: nn.Module) -> bool:
    """Whether a norm is a factor and a shift for each channel in evaluation, and what else it does is known."""
    return type(norm) in _NORMS and norm.running_mean is not None and _is_untouched(norm)


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module computes what its class says, and nothing watches it."""
    return "forward" not in vars(module) and not is_parametrized(module) and not has_hooks(module)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a norm multiplies each channel with and adds to it in evaluation, in double precision."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _fold(conv: Any, norm: nn.Module) -> None:
    """Makes a norm part of the convolution before it: O = conv(I, K (1 + A)) + b gives s O + t with s K and s b + t."""
    scale, shift = _scale_and_shift(norm)
    weight = conv.weight.double() * scale.reshape(-1, *[1] * (conv.weight.dim() - 1))
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)


def _without_norm(norm: nn.Module) -> nn.Module:
    """What is left: timm's norms have an activation of their own."""
    parts = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    return nn.Identity() if not parts else parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _fuse_branches(model: nn.Module) -> None:
    fused: dict[nn.Module, FusedBranch] = {}  # layers may share one
    for layer in [module for module in model.modules() if isinstance(module, AW_LAYERS)]:
        for branch in layer.branches():
            if isinstance(branch, AttentionBranch) and _is_fusible(branch):
                if branch not in fused:
                    fused[branch] = FusedBranch(branch)
                name = "attention" if branch is layer.attention else "input_attention"
                setattr(layer, name, fused[branch])


def _is_fusible(branch: AttentionBranch) -> bool:
    norms = (branch.norm1, branch.norm2)
    return (
        type(branch) is AttentionBranch
        and branch.pool is None
        and branch.conv1.weight.device.type == "cpu"
        and branch.conv1.weight.is_floating_point()
        and type(branch.conv1) in _CONVOLUTIONS
        and type(branch.conv2) in _CONVOLUTIONS
        and type(branch.act1) is nn.ReLU
        and all(_is_untouched(module) for module in branch.modules())
        and all(isinstance(norm, nn.Identity) or _has_statistics(norm) for norm in norms)
        and not any(True for norm in norms for _ in norm.children())
    )


class FusedBranch(BaseBranch):
    """An :class:`AttentionBranch` for inference, its norms folded into its convolutions.

    Args:
        branch: in evaluation mode, with average pooling.
    """

    fused = True

    def __init__(self, branch: AttentionBranch) -> None:
        super().__init__(branch.attention_size, branch.residual)
        weight1, bias1 = _folded(branch.conv1, branch.norm1)
        weight2, bias2 = _folded(branch.conv2, branch.norm2)
        self.register_buffer("weight1", weight1)
        self.register_buffer("bias1", bias1)
        self.register_buffer("weight2", weight2.t().contiguous())
        self.register_buffer("bias2", bias2)
        self.act2, self.activation = branch.act2, branch.activation
        self._start = branch.start
        self._set_relative(branch.relative)
        self.training = False

    @property
    def start(self) -> Start | None:
        return self._start

    def forward(self, input: Tensor) -> Tensor:
        """Maps an input of shape (N, C1, H, W) to a compact attention map, shape (N, \\*attention_size)."""
        size, (weight1, bias1, weight2, bias2) = self.attention_size, self._folded()
        attention: Tensor = self.act2(folded_branch(input, weight1, bias1, weight2, bias2, size[2:]))
        if self.relative_to is not None and self._start is not None and self._start[1:] != (0, 1):
            attention = (attention - self.relative_to) / self._start.gain
        return attention.reshape(-1, *size)

    def _folded(self) -> tuple[Any, ...]:
        buffers = self._buffers  # in less time than attributes
        return buffers["weight1"], buffers["bias1"], buffers["weight2"], buffers["bias2"]

    def train(self, mode: bool = True) -> FusedBranch:
        """Stays in evaluation mode.

        Raises:
            ValueError: the network is to be trained.
        """
        if mode:
            _refuse_training("the network of this branch")
        return super().train(False)

    def start_as_identity(self) -> None:
        _refuse_training("the network of this branch")

    def is_identity(self) -> bool:
        return False  # asked for to go back to plain convolutions, whose norms are gone


def _folded(conv: Any, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight, shape (output channels, input channels), and the bias of a pointwise convolution and its norm."""
    weight = conv.weight.detach().double().flatten(1)
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
    if not isinstance(norm, nn.Identity):
        scale, shift = _scale_and_shift(norm)
        weight, bias = weight * scale[:, None], bias * scale + shift
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


torch.fx.wrap("folded_branch")  # torch.fx does not look into it: it depends on the shapes of its arguments
