"""CondConv as timm has it: the caller brings the routing weights, the experts are stored flat."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast.nn import _checks
from ddrf_fast.ops import dynamic_conv
from ddrf_fast.ops._checks import integer, pair, shape, tensor

# Leaves of torch.fx's symbolic traces.
torch.fx.wrap("dynamic_conv")
torch.fx.wrap("same_padding")
torch.fx.wrap("shape")
torch.fx.wrap("tensor")

Pair = int | tuple[int, int]


class CondConv2d(nn.Module):
    r"""Conditionally parameterised convolution: a mixture of experts, one for each sample.

    .. math::
        y_b = \Bigl(\sum_{k=1}^E r_{bk} W_k\Bigr) * x_b + \sum_{k=1}^E r_{bk} \beta_k

    Yang et al., *CondConv: Conditionally Parameterized Convolutions for Efficient Inference* (NeurIPS 2019,
    arXiv:1904.04971). Constructor, attributes, state dict and numbers are those of timm's ``CondConv2d``; its
    pretrained weights load. Each expert is initialised on its own, with the fan-in of one kernel.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: int or (height, width).
        stride: int or pair.
        padding: zeros at every side as an int or a pair; ``''`` for (stride - 1 + dilation (kernel - 1)) // 2
            at every side; ``'same'`` for TensorFlow's SAME, which gives ceil(size / stride) and pads one more
            at the bottom and right where it must; ``'valid'`` for none.
        dilation: int or pair.
        groups: as in ``torch.nn.Conv2d``.
        bias: mix a bias, too.
        num_experts: E.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: Parameter[E, O I/g kh kw].
        bias: Parameter[E, O], or None.

    Raises:
        TypeError: a size is not an int (or a pair).
        ValueError: a size is out of range, channels are not divisible by the groups, or the padding is an
            unknown string.

    Example:
        >>> layer = CondConv2d(8, 16, 3, stride=2, padding="same", num_experts=4)
        >>> layer(torch.randn(2, 8, 15, 15), torch.rand(2, 4)).shape
        torch.Size([2, 16, 8, 8])
    """

    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: str | Pair = "",
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = False,
        num_experts: int = 4,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.channels("in_channels", in_channels, "out_channels", out_channels, groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.dilation = pair("dilation", dilation, 1)
        self.groups = groups
        self.num_experts = integer("num_experts", num_experts, 1)
        self.padding, self.dynamic_padding = self._resolve(padding)
        self.weight_shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(
            torch.empty(num_experts, math.prod(self.weight_shape), device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def _resolve(self, padding: str | Pair) -> tuple[tuple[int, int], bool]:
        """The padding as a pair, and whether SAME must be worked out from the size of each input."""
        if not isinstance(padding, str):
            return pair("padding", padding, 0), False
        if padding.lower() == "valid":
            return (0, 0), False
        if padding.lower() not in ("", "same"):
            raise ValueError(f"padding must be an int, two ints, '', 'same' or 'valid', got {padding!r}")
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if padding and (self.stride != (1, 1) or any(r % 2 for r in reach)):
            return (0, 0), True
        height, width = ((s - 1 + r) // 2 for s, r in zip(self.stride, reach, strict=True))
        return (height, width), False

    def reset_parameters(self) -> None:
        """Draws each expert as ``torch.nn.Conv2d`` draws its kernel and bias."""
        for expert in self.weight.detach():
            nn.init.kaiming_uniform_(expert.view(self.weight_shape), a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: Tensor[B, in_channels, H, W].
            routing_weights: Tensor[B, E], of any sign and sum (CondConv takes a sigmoid).

        Returns:
            Tensor[B, out_channels, H', W'] in the dtype of ``x``.

        Raises:
            TypeError, ValueError: as ``ddrf_fast.dynamic_conv``.
        """
        _checks.image(x, self.in_channels)
        tensor("routing_weights", routing_weights, ["[B, E]"])
        shape("routing_weights", routing_weights, (x.shape[0], self.num_experts), "[B, E]")
        if self.dynamic_padding:
            x = F.pad(x, same_padding(x, self.kernel_size, self.stride, self.dilation))
        return dynamic_conv(
            x,
            self.weight.view(self.num_experts, *self.weight_shape),
            routing_weights,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        padding = "'same'" if self.dynamic_padding else self.padding
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, num_experts={self.num_experts}"
        )


def same_padding(
    x: Tensor, kernel_size: tuple[int, int], strides: tuple[int, int], dilations: tuple[int, int]
) -> list[int]:
    """Zeros at the left, right, top and bottom so that ceil(size / stride) results."""
    padding: list[int] = []
    for size, kernel, stride, dilation in zip(x.shape[2:], kernel_size, strides, dilations, strict=True):
        # Not -(-size // stride): ONNX divides negative numbers towards zero.
        outputs = (size + stride - 1) // stride
        total = max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
        padding = [total // 2, total - total // 2, *padding]
    return padding
