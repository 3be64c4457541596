"""sample_conv2d: a convolution with a kernel of its own for each sample; dynamic_conv after the mixing.

It is the raw operator `ddrf_fast::dynamic_conv` without attention (ops/dynamic_conv.py). For hypernetworks,
KernelWarehouse, GigaGAN: wherever the kernels come from elsewhere.
"""

from typing import Any

from torch import Tensor

from ddrf_fast.ops import _checks, _library
from ddrf_fast.ops.dynamic_conv import (
    Activation,
    Size,
    call,
    check_convolution,
    convolution_geometry,
    unchecked,
    without_excess,
)


def arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    activation: Activation | None = None,
) -> tuple[Any, ...]:
    """Checks the arguments of `sample_conv2d` and returns those of the raw operator."""
    _checks.tensor("x", x, ["[B, I, H, W]"])
    _checks.tensor("weight", weight, ["[B, O, I/g, kh, kw]"])
    x, weight, bias = _library.autocast_to_lower((x, weight, bias))
    _checks.like("weight", weight, "x", x)
    if weight.shape[0] != x.shape[0]:
        raise ValueError(
            f"weight must hold one kernel for each of the {x.shape[0]} samples, got {weight.shape[0]}"
        )
    _checks.operand("bias", bias, weight.shape[:2], "[B, O]", "x", x)
    geometry = convolution_geometry(weight.shape[-2:], stride, padding, dilation)
    check_convolution(x, weight, geometry, groups, 0, activation)
    return x, weight, None, bias, None, None, None, None, *geometry, groups, activation or "none"


def sample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    activation: Activation | None = None,
) -> Tensor:
    """Convolves each sample with its own kernel: y_b = act(conv2d(x_b, weight_b) + bias_b).

    The batch size is nowhere a number of groups, so the operation compiles and exports with a free batch.
    Differentiable in every tensor, in reverse and forward mode, to any order.

    Args:
        x (Tensor[B, I, H, W]): Input, in NCHW or channels_last; the output keeps that layout.
        weight (Tensor[B, O, I/g, kh, kw]): One kernel per sample.
        bias (Tensor[B, O], optional): One bias per sample.
        stride: One int or two, at least 1.
        padding: One int or two (zeros), "same" or "valid" as in torch.nn.functional.conv2d.
        dilation: One int or two, at least 1.
        groups: Divides I and O.
        activation: None, "relu" or "leaky_relu" (slope 0.01), applied last.

    Returns:
        Tensor[B, O, H', W'] with x's dtype and layout.

    Dtypes and autocast are as for `dynamic_conv`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or an option does not fit; the message names it.

    Example:
        >>> import torch, ddrf_fast
        >>> x, weight = torch.rand(2, 8, 32, 32), torch.rand(2, 16, 8, 3, 3)
        >>> ddrf_fast.sample_conv2d(x, weight, padding="same").shape
        torch.Size([2, 16, 32, 32])
    """
    tensors = (x, weight, None, bias, None, None, None, None)
    y = unchecked(tensors, stride, padding, dilation, groups, activation)
    if y is not None:
        return y
    args = arguments(
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation=activation,
    )
    return without_excess(call(*args), x, padding)
