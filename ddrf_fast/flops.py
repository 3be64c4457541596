"""Formulas for torch's counter of operations; importing this module registers them.

It is a module of its own because the counter takes long to import.

Example:
    >>> import torch, ddrf_fast.flops
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> layer = ddrf_fast.nn.DynamicConv2d(8, 6, 3, num_kernels=4, bias=False)
    >>> with FlopCounterMode(display=False) as counter, torch.no_grad():
    ...     layer(torch.randn(2, 8, 9, 9)).shape
    torch.Size([2, 6, 7, 7])
    >>> counter.get_flop_counts()["Global"][torch.ops.ddrf_fast.dynamic_conv]
    91584
    >>> counter.get_flop_counts()["Global"][torch.ops.ddrf_fast.route]
    384
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import ddrf_fast.ops  # noqa: F401 (defines the operators)

Shape = Sequence[int]


def _convolution(x: Shape, weight: Shape, code: Shape | None, out: Shape) -> int:
    """Of the convolution alone; a code is a bias, nearly."""
    per_group = weight[2] - (0 if code is None else code[1])
    return 2 * x[0] * per_group * math.prod(weight[3:]) * math.prod(out[1:])


def _mixing(x: Shape, weight: Shape, attention: Shape | None) -> int:
    return 0 if attention is None else 2 * x[0] * math.prod(weight)


@register_flop_formula([torch.ops.ddrf_fast.dynamic_conv, torch.ops.ddrf_fast.dynamic_conv_mean])
def _dynamic_conv(
    x: Shape, weight: Shape, attention: Shape | None, bias: Any, code: Shape | None, *_: Any, out_shape: Any
) -> int:
    """Two for each multiplication, as torch counts."""
    out = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]  # the mean comes second
    return _convolution(x, weight, code, out) + _mixing(x, weight, attention)


@register_flop_formula(torch.ops.ddrf_fast.dynamic_conv_backward)
def _dynamic_conv_backward(
    grad: Shape,
    x: Shape,
    weight: Shape,
    attention: Shape | None,
    bias: Any,
    code: Shape | None,
    *rest: Any,
    **_: Any,
) -> int:
    """The input gradient mixes anew; that of the kernels is contracted with the bank and the attention."""
    convolution, mixing = _convolution(x, weight, code, grad), _mixing(x, weight, attention)
    output_mask = rest[-1]
    wants = [bool(output_mask >> i & 1) for i in range(8)]
    total = convolution + mixing if wants[0] else 0
    if wants[1] or wants[2] or any(wants[4:]):
        total += convolution + mixing * (wants[1] + wants[2])
    return total


@register_flop_formula(torch.ops.ddrf_fast.route)
def _route(
    x: Shape, squeeze_weight: Shape | None, squeeze_bias: Any, excite_weight: Shape, *_: Any, **__: Any
) -> int:
    """The two linear layers; torch counts no means, and no biases."""
    weights = [excite_weight] if squeeze_weight is None else [squeeze_weight, excite_weight]
    return sum(2 * x[0] * math.prod(weight) for weight in weights)
