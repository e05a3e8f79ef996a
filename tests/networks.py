"""A small network to convert, and the kinds of its convolutions."""

from __future__ import annotations

from torch import nn

from awconv.branch import AttentionBranch


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False)),
        nn.Conv2d(8, 4, (1, 3), padding=(0, 1), padding_mode="circular"),
    )


def kinds(model: nn.Module) -> dict[str, str]:
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind for name, kind in names.items() if "Conv" in kind and "attention" not in name}


def converted(model: nn.Module) -> set[str]:
    return {name for name, kind in kinds(model).items() if kind.startswith("AW")}


def moved(model: nn.Module) -> nn.Module:
    """With branches as if they had been trained, in evaluation."""
    for branch in model.modules():
        if isinstance(branch, AttentionBranch):
            for parameter in branch.norm2.parameters():
                nn.init.normal_(parameter)
    return model.eval()


def without_batch_norm(network: nn.Module) -> nn.Module:
    """The network with norms, in place of BatchNorm, that do not look at the other images of a batch; in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network
