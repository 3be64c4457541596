"""The static twin of a dynamic convolution, for the comparison of both."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast.nn.dynamic_conv import Activation, stretch


class StaticConv2d(nn.Conv2d):
    """One kernel for all samples where :class:`~ddrf_fast.nn.DynamicConv2d` mixes one for each.

    A plain convolution over the same input, code included, with the same initial variance and activation: the
    same operations for each pixel, and the parameters of one kernel of the bank.

    Args:
        in_channels: channels of the input, without the code.
        out_channels: channels of the output.
        kernel_size: odd; the size of the image is kept.
        code_channels: length of the code; 0 for none.
        activation: None, "relu" or "leaky_relu".

    Example:
        >>> layer = StaticConv2d(8, 16, 3, code_channels=5, activation="relu")
        >>> layer(torch.randn(2, 8, 12, 10), code=torch.randn(2, 5)).shape
        torch.Size([2, 16, 12, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        code_channels: int = 0,
        activation: Activation | None = None,
    ) -> None:
        self.activation = activation
        super().__init__(in_channels + code_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def reset_parameters(self) -> None:
        """As a dynamic convolution starts, at uniform attention."""
        gain = nn.init.calculate_gain(self.activation) if self.activation else 1.0
        bound = gain * math.sqrt(3 / self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, code: Tensor | None = None, pooled: Tensor | None = None) -> Tensor:
        """Applies the layer.

        Args:
            x: Tensor[B, in_channels, H, W].
            code: Tensor[B, D], or a map Tensor[B, D, h, w], stretched over the image.
            pooled: not used; a dynamic convolution takes it.

        Returns:
            Tensor[B, out_channels, H, W].
        """
        if code is not None:
            code = code[:, :, None, None] if code.dim() == 2 else code
            size = x.shape[2:]
            code = code.expand(-1, -1, *size) if code.shape[2:] == (1, 1) else stretch(code, *size)
            x = torch.cat((x, code.to(x.dtype)), dim=1)
        y = super().forward(x)
        return y if self.activation is None else getattr(F, self.activation)(y)
