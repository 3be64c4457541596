"""What the plain-torch operations share."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_range(image: Tensor, dtype: torch.dtype) -> Tensor:
    """`image` in a floating dtype; integers stand for [0, 1] and are divided by their maximum."""
    wide = image.to(dtype)
    return wide if image.is_floating_point() else wide / torch.iinfo(image.dtype).max


def is_channels_last(x: Tensor) -> bool:
    """Whether an operation on `x` answers in channels_last; what is dense in both senses counts as NCHW."""
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False  # Dynamo would not come to the exception
    try:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    except RuntimeError:  # a tensor that vmap has batched does not tell
        return False


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """`y`, dense in the memory format of `x`."""
    return y.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
