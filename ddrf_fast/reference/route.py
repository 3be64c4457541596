"""route in plain torch: the specification.

    pooled = mean of x over its pixels, or x itself where it is [B, C]; then code
    hidden = relu(pooled squeeze_weight^T + squeeze_bias), or pooled without squeeze_weight
    result = scale . normalization((hidden excite_weight^T + excite_bias) / temperature)

in float32 (float64 for float64), rounded once. Its gradient is ordinary autograd's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.reference._common import accumulation_dtype


def route(
    x: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    excite_weight: Tensor,
    excite_bias: Tensor | None,
    code: Tensor | None,
    temperature: Tensor | None,
    normalization: str,
    scale: float,
) -> Tensor:
    """Attention [B, N] of the equations above, in x's dtype."""
    dtype = accumulation_dtype(x.dtype)

    def linear(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(values, weight.to(dtype), None if bias is None else bias.to(dtype))

    hidden = x.mean(dim=(2, 3), dtype=dtype) if x.dim() == 4 else x.to(dtype)
    if code is not None:
        hidden = torch.cat((hidden, code.to(dtype)), dim=1)
    if squeeze_weight is not None:
        hidden = F.relu(linear(hidden, squeeze_weight, squeeze_bias))
    logits = linear(hidden, excite_weight, excite_bias)
    if temperature is not None:
        logits = logits / temperature.to(dtype)
    attention = F.softmax(logits, dim=1) if normalization == "softmax" else torch.sigmoid(logits)
    return (attention if scale == 1 else attention * scale).to(x.dtype)


def plan(op: str, *args: object) -> str:
    """How it runs, for `explain`."""
    return "a mean, a matrix product for each layer, and the normalization"
