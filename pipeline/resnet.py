"""ResNet-18 for small images (He et al. 2016, arXiv 1512.03385), with torchvision's parameter names.

The first convolution is 3x3 without pooling, as is usual for 32 x 32 images. No operation works in place, so that many
networks can be evaluated at once.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Images (rows, channels_in, h, w) to (rows, channels, h / stride, w / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


def resnet18(channels: int, outputs: int) -> nn.Module:
    """ResNet-18 with 11 173 962 parameters for 3 channels and 10 outputs.

    Args:
        channels: Channels of the images.
        outputs: Columns of the output.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(64)
    layers["relu"] = nn.ReLU()
    width = 64
    for number in range(1, 5):
        wider = 64 * 2 ** (number - 1)
        first = BasicBlock(width, wider, 1 if number == 1 else 2)
        layers[f"layer{number}"] = nn.Sequential(first, BasicBlock(wider, wider, 1))
        width = wider
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)
