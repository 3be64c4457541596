"""IFCNN with fusion by the maximum (Zhang et al., Information Fusion 54, 2020), untrained: to be timed.

    image 1 --> conv1 --> conv2 --+
                                  +--> maximum --> conv3 --> conv4 --> fused
    image 2 --> conv1 --> conv2 --+

conv1 is the first convolution of ResNet-101 without its stride (and without what follows it there); all of it
runs at full resolution. As published, borders are replicated, and infrared and visible images are grey, three
times the same channel, and not normalised.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 64


class ConvBlock(nn.Module):
    """A 3x3 convolution, batch normalisation, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(_extended(x, 1))), inplace=True)


class IFCNN(nn.Module):
    """Images Tensor[B, 3, H, W] in [0, 1] -> Tensor[B, 3, H, W], not clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 7, bias=False)
        self.conv2 = ConvBlock()
        self.conv3 = ConvBlock()
        self.conv4 = nn.Conv2d(CHANNELS, 3, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """By He's rule, and so that most of what comes out is in [0, 1]."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()))
        with torch.no_grad():
            self.conv4.weight.mul_(0.1)
        nn.init.constant_(self.conv4.bias, 0.5)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        features = [self.conv2(self.conv1(_extended(image, 3))) for image in (first, second)]
        return self.conv4(self.conv3(torch.maximum(*features)))


def _extended(x: Tensor, pixels: int) -> Tensor:
    return F.pad(x, (pixels, pixels, pixels, pixels), mode="replicate")
