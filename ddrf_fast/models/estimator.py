"""The blind estimator: guesses a degradation code from the degraded image alone."""

import torch.nn.functional as F
from torch import Tensor, nn


class CodeEstimator(nn.Module):
    """Small strided network that predicts one degradation code for an image.

    At inference nobody knows the blur kernel of a photograph. The estimator stands in for it: four 3x3
    convolutions, each but the first at half the resolution of the one before, global average pooling, and a
    linear layer.

    Args:
        code_channels: length of the code (PCA of the kernel, then the noise level).
        width: channels of the first layer; they grow to three times as many.

    Example:
        >>> import torch
        >>> CodeEstimator(16)(torch.rand(2, 1, 40, 50)).shape
        torch.Size([2, 16])
    """

    def __init__(self, code_channels: int, width: int = 24) -> None:
        super().__init__()
        channels = (4, width, 4 * width // 3, 2 * width, 3 * width)
        self.layers = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=1 if i == 0 else 2, padding=1) for i in range(4)
        )
        self.head = nn.Linear(channels[-1], code_channels)

    def forward(self, image: Tensor) -> Tensor:
        """Predicts the code.

        Args:
            image: Tensor[B, 1, H, W] in [0, 1], H and W even.

        Returns:
            Tensor[B, code_channels].
        """
        x = F.pixel_unshuffle(image, 2)
        for layer in self.layers:
            x = F.leaky_relu(layer(x))
        return self.head(x.mean(dim=(2, 3)))
