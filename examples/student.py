"""AW-convolution beside its definition, on scanned digits, and a branch of one's own: python examples/student.py

The paper is "An Attention Module for Convolutional Neural Networks", 2021, arXiv 2108.08205.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from awconv import AWConv2d
from awconv.ops.naive import attention_map, batch_norm

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # 1,797 scanned digits of 8x8 pixels
labels = torch.tensor(digits.target)

# 1. The definition. A layer has weights K, and a branch with two pointwise convolutions W1 and W2.
layer = AWConv2d(1, 8, kernel_size=3, padding=1)
branch = layer.attention
few = images[:16]
A = attention_map(
    few, branch.conv1.weight.flatten(1), branch.conv2.weight.flatten(1), batch_norm, batch_norm, (8, 1, 3, 3)
)
print("attention map A, a number for each image, output channel and tap:", tuple(A.shape))
print("  the layer's branch gives the same:", torch.allclose(branch(few), A, atol=1e-5))

# 2. Each image is convolved with weights of its own, K + A * K.
K = layer.weight
output = torch.cat([F.conv2d(image[None], K + a * K, layer.bias, padding=1) for image, a in zip(few, A, strict=True)])
print("output O, each image convolved with K + A * K:", tuple(output.shape))
print("  the layer gives the same:", torch.allclose(layer(few), output, atol=1e-5))


# 3. A branch of one's own: the maximum of each part of the image, one pointwise convolution, a sigmoid.
class MaxBranch(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.size = spec.attention_size
        self.pool = nn.AdaptiveMaxPool2d(self.size[2:])
        self.conv = nn.Conv2d(spec.in_channels, self.size[0] * self.size[1], 1)

    def forward(self, input):
        return self.conv(self.pool(input)).sigmoid().unflatten(1, self.size[:2])


# 4. Train a small network with plain convolutions, with the default branch, and with that one.
def train(make_convolution):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(make_convolution(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(make_convolution(32, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    return (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item(), sum(
        p.numel() for p in model.parameters()
    )


print("5 epochs on 1,500 digits; accuracy on the other 297, from one seed, which does not compare them:")
for name, make in {
    "plain": nn.Conv2d,
    "AW": AWConv2d,
    "AW, max pooling": lambda *sizes, **options: AWConv2d(*sizes, **options, pool=nn.AdaptiveMaxPool2d),
    "AW, MaxBranch": lambda *sizes, **options: AWConv2d(*sizes, **options, branch=MaxBranch),
}.items():
    accuracy, parameters = train(make)
    print(f"  {name:16} {accuracy:6.1%}  {parameters:,} parameters")
