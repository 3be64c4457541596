"""DyNet's dynamic convolution: every output channel mixes a group of kernels of its own."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ddrf_fast.nn import _checks
from ddrf_fast.nn._bank import BankModule
from ddrf_fast.ops import dynamic_conv
from ddrf_fast.ops._checks import integer, pair, shape
from ddrf_fast.ops.dynamic_conv import convolution_geometry

# Leaves of torch.fx's symbolic traces.
torch.fx.wrap("dynamic_conv")
torch.fx.wrap("shape")


class CoefficientPredictor(nn.Module):
    r"""DyNet's coefficients from a pooled input: sigmoid(FC(GAP(x))).

    One predictor may serve all the convolutions of a block: give it as many coefficients as they need
    together, and each of them its part.

    Args:
        in_channels: channels of the input.
        num_coefficients: how many coefficients are predicted for each sample.
        reduction: None for one fully connected layer; otherwise two, without a nonlinearity, with
            ``in_channels // reduction`` units between them (4 in DyNet's ResNets, to save parameters).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or ``reduction`` is above ``in_channels``.

    Example:
        >>> block = CoefficientPredictor(8, 6 * (16 + 32))  # for two layers, of 16 and 32 output channels
        >>> first, second = block(torch.randn(2, 8, 5, 5)).split([6 * 16, 6 * 32], dim=1)
        >>> layer = DyNetConv2d(8, 16, 3, predict=False)
        >>> layer(torch.randn(2, 8, 5, 5), first.unflatten(1, (6, 16))).shape
        torch.Size([2, 16, 3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        num_coefficients: int,
        reduction: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        integer("in_channels", in_channels, 1)
        integer("num_coefficients", num_coefficients, 1)
        if reduction is None:
            self.layers = nn.Sequential(nn.Linear(in_channels, num_coefficients))
        else:
            if integer("reduction", reduction, 1) > in_channels:
                raise ValueError(f"reduction must be at most in_channels={in_channels}, got {reduction}")
            hidden = in_channels // reduction
            self.layers = nn.Sequential(nn.Linear(in_channels, hidden), nn.Linear(hidden, num_coefficients))
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, in_channels, H, W] -> Tensor[B, num_coefficients], each in 0..1."""
        return self.layers(x.mean(dim=(2, 3))).sigmoid()


class DyNetConv2d(BankModule):
    r"""Convolution whose output channel t mixes, for each sample, its own group of g kernels.

    .. math::
        \tilde w_{bt} = \sum_{i=1}^{g} \eta_{bti}\, w_{ti}, \qquad y_{bt} = \tilde w_{bt} * x_b

    Zhang et al., *DyNet: Dynamic Convolution for Accelerating Convolutional Neural Networks* (2020,
    arXiv:2004.10694), with their group size of 6. Their training mixes feature maps, at g times the cost;
    here kernels are mixed in training as well, with the same result. There is no bias.

    Initialisation: each kernel is drawn on its own, and so that the mixture at :math:`\eta = 1/2`, where the
    training starts, has the variance that He et al. give a static convolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: int or (height, width).
        stride: int or pair.
        padding: zeros at every side, int or pair; "same" or "valid", as in ``torch.nn.Conv2d``.
        dilation: int or pair.
        groups: as in ``torch.nn.Conv2d``.
        group_size: g.
        reduction: of the predictor, :class:`CoefficientPredictor`.
        predict: False for a layer without a predictor, which is given its coefficients.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: Parameter[g, O, I/g', kh, kw], g' being ``groups``.
        predictor: :class:`CoefficientPredictor`, or None.

    Raises:
        TypeError: a size is not an int (or a pair).
        ValueError: a size is out of range, or channels are not divisible by the groups.

    Example:
        >>> layer = DyNetConv2d(8, 16, 3, padding=1)
        >>> layer(torch.randn(2, 8, 12, 10)).shape
        torch.Size([2, 16, 12, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        group_size: int = 6,
        reduction: int | None = None,
        predict: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.channels("in_channels", in_channels, "out_channels", out_channels, groups)
        integer("group_size", group_size, 1)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        convolution_geometry(self.kernel_size, stride, padding, dilation)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.group_size = group_size
        self.predictor = (
            CoefficientPredictor(in_channels, group_size * out_channels, reduction) if predict else None
        )
        self.weight = nn.Parameter(
            torch.empty(group_size, out_channels, in_channels // groups, *self.kernel_size)
        )
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the kernels (class docstring)."""
        fan_in = self.weight[0, 0].numel()
        nn.init.normal_(self.weight, std=2 / math.sqrt(self.group_size) * math.sqrt(2 / fan_in))

    def forward(self, x: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """Applies the layer.

        Args:
            x: Tensor[B, in_channels, H, W].
            coefficients: Tensor[B, group_size, out_channels], needed where there is no predictor, and used in
                its place where there is one.

        Returns:
            Tensor[B, out_channels, H', W'] in the dtype of ``x``.

        Raises:
            TypeError: as ``ddrf_fast.dynamic_conv``.
            ValueError: coefficients are missing or of another shape; as ``ddrf_fast.dynamic_conv``.
        """
        _checks.image(x, self.in_channels)
        expected = (x.shape[0], self.group_size, self.out_channels)
        if coefficients is not None:
            shape("coefficients", coefficients, expected, "[B, group_size, out_channels]")
        elif self.predictor is not None:
            coefficients = self.predictor(x).unflatten(1, expected[1:])
        else:
            raise ValueError("coefficients must be given to a layer with predict=False, got None")
        return dynamic_conv(
            x,
            self.weight,
            coefficients,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"group_size={self.group_size}"
        )
