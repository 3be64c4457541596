"""Dynamic Convolution in the form most models use it: constructor and state dict of `Dynamic_conv2d`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast.nn import _checks
from ddrf_fast.nn._bank import BankModule
from ddrf_fast.ops import dynamic_conv
from ddrf_fast.ops._checks import integer
from ddrf_fast.ops.dynamic_conv import convolution_geometry

# Leaves of torch.fx's symbolic traces.
torch.fx.wrap("dynamic_conv")


class DyConvAttention(nn.Module):
    r"""Attention of :class:`DyConv2d`: softmax(fc2(relu(fc1(GAP(x)))) / temperature).

    Args:
        fc1: from the input's channels to the hidden ones, on [B, C, 1, 1].
        fc2: from the hidden channels to one for each kernel.
        temperature: of the softmax. Not in the state dict, as in the original.
    """

    def __init__(self, fc1: nn.Conv2d, fc2: nn.Conv2d, temperature: float) -> None:
        super().__init__()
        self.fc1 = fc1
        self.fc2 = fc2
        self.temperature = float(temperature)  # a float, which torch.compile makes dynamic when it changes

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, C, H, W] -> Tensor[B, K], positive, each row summing to 1."""
        logits = self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))).flatten(1)
        return F.softmax(logits / self.temperature, dim=1)


class DyConv2d(BankModule):
    r"""Dynamic convolution: K kernels, mixed for each sample by an attention with softmax.

    .. math::
        y_b = \Bigl(\sum_{k=1}^K \pi_{bk} W_k\Bigr) * x_b + \sum_{k=1}^K \pi_{bk} \beta_k, \qquad
        \pi_b = \operatorname{softmax}\bigl(\mathrm{FC}_2(\mathrm{ReLU}(\mathrm{FC}_1(\mathrm{GAP}(x_b)))) /
        \tau\bigr)

    Chen et al., *Dynamic Convolution: Attention over Convolution Kernels* (CVPR 2020, arXiv:1912.03458).
    Constructor, attributes, state dict and numbers are those of ``Dynamic_conv2d`` of
    kaijieshi7/Dynamic-convolution-Pytorch. Each kernel is initialised on its own (He et al., its own fan-in),
    and biases are zero. For a new model, :class:`~ddrf_fast.nn.DynamicConv2d` is the plainer choice.

    Args:
        in_planes: channels of the input.
        out_planes: channels of the output.
        kernel_size: height and width.
        ratio: the attention has int(in_planes * ratio) + 1 hidden channels, or K where in_planes is 3.
        stride: int or pair.
        padding: zeros at every side, int or pair; "same" or "valid", as in ``torch.nn.Conv2d``.
        dilation: int or pair.
        groups: as in ``torch.nn.Conv2d``.
        bias: mix a bias, too.
        K: number of kernels.
        temperature: where the softmax starts, one of 1, 4, 7, ...; see :meth:`update_temperature`.
        init_weight: False leaves parameters as torch makes them, the kernels uninitialised: for a state dict.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: Parameter[K, O, I/g, k, k].
        bias: Parameter[K, O], or None.
        attention: ``fc1.weight``, ``fc2.weight``, ``fc2.bias``.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is out of range, channels are not divisible by the groups, or the temperature is
            not one of 1, 4, 7, ...

    Example:
        >>> layer = DyConv2d(8, 16, 3, padding=1, temperature=31)
        >>> layer(torch.randn(2, 8, 12, 10)).shape
        torch.Size([2, 16, 12, 10])
        >>> layer.update_temperature()
        >>> layer.attention.temperature
        28.0
    """

    bias: Tensor | None

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        kernel_size: int,
        ratio: float = 0.25,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        K: int = 4,
        temperature: float = 34,
        init_weight: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.channels("in_planes", in_planes, "out_planes", out_planes, groups)
        integer("kernel_size", kernel_size, 1)
        convolution_geometry((kernel_size, kernel_size), stride, padding, dilation)
        integer("K", K, 1)
        if not (temperature >= 1 and temperature % 3 == 1):
            raise ValueError(f"temperature must be one of 1, 4, 7, ... (34 by default), got {temperature}")
        self.in_planes = in_planes
        self.out_planes = out_planes
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.K = K
        hidden = K if in_planes == 3 else int(in_planes * ratio) + 1
        self.attention = DyConvAttention(
            nn.Conv2d(in_planes, hidden, 1, bias=False), nn.Conv2d(hidden, K, 1), temperature
        )
        self.weight = nn.Parameter(torch.empty(K, out_planes, in_planes // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(K, out_planes)) if bias else None
        if init_weight:
            self.reset_parameters()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the kernels, each with its own fan-in, and the attention's layers; biases are zero."""
        for kernel in self.weight.detach():
            nn.init.kaiming_uniform_(kernel)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for layer in (self.attention.fc1, self.attention.fc2):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def update_temperature(self) -> None:
        """Lowers the attention's temperature by 3, not below 1; called after each of the first epochs."""
        self.attention.temperature = max(self.attention.temperature - 3, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, in_planes, H, W] -> Tensor[B, out_planes, H', W'], in the dtype of ``x``.

        Raises:
            TypeError, ValueError: as ``ddrf_fast.dynamic_conv``.
        """
        _checks.image(x, self.in_planes)
        return dynamic_conv(
            x,
            self.weight,
            self.attention(x),
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_planes}, {self.out_planes}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, K={self.K}"
        )
