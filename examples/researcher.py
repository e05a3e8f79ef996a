"""A network and a training loop of one's own, plain and with AW, over three seeds: python examples/researcher.py

docs/own_loop.md explains the steps, and what three seeds on 597 test images can say: one image is 0.17 points.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models import register_model
from torch import nn

import awconv
from awconv.cli import main
from awconv.compare import paired

EPOCHS, SEEDS = 6, 3
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # 1,797 scanned digits of 8x8 pixels
labels = torch.tensor(digits.target)
train_images, train_labels, test_images, test_labels = images[:1200], labels[:1200], images[1200:], labels[1200:]


# 1. The network: residual blocks, as anyone writes them.
class Block(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, input):
        hidden = F.relu(self.norm1(self.conv1(input)))
        return F.relu(self.shortcut(input) + self.norm2(self.conv2(hidden)))


@register_model  # with timm, for the commands of awconv
def block_net(pretrained=False, num_classes=10, in_chans=1, **kwargs):
    return nn.Sequential(
        *(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)),
    )


# 2. The loop: the same weights, images, order and epochs for both networks of a seed.
def accuracy(with_attention, seed):
    torch.manual_seed(seed)
    model = block_net()
    if with_attention:
        awconv.convert(model, reduction=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    awconv.check_optimizer(model, optimizer)  # it was made after the conversion
    torch.manual_seed(seed)  # the branches drew random numbers: begin the order of the images anew
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * 20)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train_images)).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(train_images[batch]), train_labels[batch]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return 100 * (model.eval()(test_images).argmax(1) == test_labels).float().mean().item()


if __name__ == "__main__":
    print(awconv.summary(awconv.convert(block_net(), reduction=2), images[:2]))

    # 3. The comparison: differences between runs of the same seed.
    plain, aw = {}, {}
    for seed in range(SEEDS):
        plain[seed], aw[seed] = accuracy(False, seed), accuracy(True, seed)
        print(f"seed {seed}: plain {plain[seed]:.2f} %, AW {aw[seed]:.2f} %")
    print("AW - plain, percentage points:", paired(plain, aw))

    # 4. Or leave loop, seeds, interruptions and report to awconv: it imports this file.
    recipe = Path(tempfile.mkdtemp()) / "block_net.yaml"
    recipe.write_text(f"import: {__file__}\nmodel: {{network: block_net, lr: 0.05}}\ntrainer: {{max_epochs: 3}}\n")
    main(["compare", str(recipe), "--variants=plain,aw", "--seeds=2", f"--out={recipe.parent / 'runs'}"])
