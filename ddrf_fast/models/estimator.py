"""The blind estimator: guesses a degradation code from the degraded image alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DETAIL_GAIN = 10.0  # brings details, a few hundredths of the range, to the order of 1
ENERGY_FLOOR = 1e-3  # below it, less energy is no information


class CodeEstimator(nn.Module):
    """Small strided network that predicts one degradation code for an image.

    At inference nobody knows the blur kernel of a photograph. The estimator stands in for it. It sees details
    alone (differences within blocks of 2x2 pixels), which four 3x3 convolutions filter, each but the first at
    half the resolution of the one before. What blur and noise leave their mark on is how much energy which
    filter finds, in proportion to the others: so the energies are averaged over the image, and two linear
    layers see their logarithms.

    Args:
        code_channels: length of the code (PCA of the kernel, then the noise level).

    Example:
        >>> import torch
        >>> CodeEstimator(16)(torch.rand(2, 1, 40, 50)).shape
        torch.Size([2, 16])
    """

    def __init__(self, code_channels: int) -> None:
        super().__init__()
        channels = (4, 24, 32, 48, 72)
        layers = [
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=1 if i == 0 else 2, padding=1) for i in range(4)
        ]
        for layer in layers:  # torch's default lets the signal fade, and with it all that it says
            nn.init.kaiming_normal_(layer.weight, a=0.01)
        self.layers = nn.ModuleList(layers)
        self.hidden = nn.Linear(channels[-1], 64)
        self.head = nn.Linear(64, code_channels)

    def forward(self, image: Tensor) -> Tensor:
        """Predicts the code.

        Args:
            image: Tensor[B, 1, H, W] in [0, 1], H and W even.

        Returns:
            Tensor[B, code_channels].
        """
        x = details(F.pixel_unshuffle(image, 2))
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x))
        return self.code(energy(self.layers[-1](x)))

    def code(self, energy: Tensor) -> Tensor:
        """The code of the mean squares Tensor[B, C] of what the last layer finds."""
        x = torch.log(energy + ENERGY_FLOOR).to(self.hidden.weight.dtype)
        return self.head(F.leaky_relu(self.hidden(x)))


def details(blocks: Tensor) -> Tensor:
    """What the first layer sees of an image's blocks of 2x2 pixels, Tensor[B, 4, H/2, W/2]."""
    return DETAIL_GAIN * (blocks - blocks.mean(dim=1, keepdim=True))


def energy(x: Tensor) -> Tensor:
    """Mean square of each channel of Tensor[B, C, H, W], in float32 at least: Tensor[B, C]."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(dim=(2, 3))
