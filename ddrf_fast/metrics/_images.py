"""What all measures share: checked images on one scale, separable filters, local moments."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Convention = Literal["standard", "vifb", "tang", "cddfuse"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


def check_convention(convention: str) -> None:
    """Raises ValueError where the convention is unknown."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")


def prepare(image: Tensor, *others: Tensor, smallest: int = 1, names: Sequence[str] = ()) -> list[Tensor]:
    """Checks the images and gives them as floating Tensor[B, 1, H, W] in [0, 255], all of one dtype."""
    names = names or ("image", *(f"reference {i + 1}" for i in range(len(others))))
    prepared = []
    for name, tensor in zip(names, (image, *others), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be floating or integer, got {tensor.dtype}")
        shape = list(tensor.shape)
        if not (len(shape) == 2 or (len(shape) == 4 and shape[1] == 1)):
            raise ValueError(f"{name} must be [B, 1, H, W] or [H, W] (colour: its luminance), got {shape}")
        if min(shape[-2:]) < smallest:
            raise ValueError(f"{name} must be at least {smallest}x{smallest} pixels, got {shape}")
        if tensor.shape != image.shape:
            raise ValueError(f"{name} must have the shape of {names[0]}, {list(image.shape)}, got {shape}")
        floating = tensor.is_floating_point()
        values = tensor.to(torch.float32 if floating and tensor.dtype != torch.float64 else torch.float64)
        # Networks overshoot [0, 1] a little; those in [-1, 1] are on another scale.
        lowest, highest = (-0.5, 1.5) if floating else (0.0, 255.0)
        checked = values.numel() > 0 and not torch.compiler.is_compiling()
        if checked and not bool((values.amin() >= lowest) & (values.amax() <= highest)):
            scale = "[0, 1]" if floating else "[0, 255]"
            found = f"{values.min().item():g} to {values.max().item():g}"
            raise ValueError(f"{name} must be in {scale} for {tensor.dtype}, got values from {found}")
        values = values * 255 if floating else values
        prepared.append(values if tensor.ndim == 4 else values[None, None])
    common = torch.float64 if any(values.dtype == torch.float64 for values in prepared) else torch.float32
    return [values.to(common) for values in prepared]


def grey_levels(image: Tensor) -> Tensor:
    """Whole grey values in [0, 255], int64."""
    return image.round().clamp(0, 255).long()


def square_root(values: Tensor) -> Tensor:
    """The square root, with a gradient of 0 instead of infinity at 0."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


def gaussian_window(size: int, sigma: float, like: Tensor) -> Tensor:
    """A Gaussian of `size` taps that sum to 1."""
    position = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    window = torch.exp(-0.5 * (position / sigma).square())
    return window / window.sum()


def filter_valid(image: Tensor, vertical: Tensor, horizontal: Tensor, stride: int = 1) -> Tensor:
    """Correlation of Tensor[B, 1, H, W] with a separable window, where this lies wholly in the image."""
    with torch.autocast(image.device.type, enabled=False):
        return _filter_along(_filter_along(image, vertical, 2, stride), horizontal, 3, stride)


def _filter_along(image: Tensor, window: Tensor, dim: int, stride: int) -> Tensor:
    """A sum of shifted images; a convolution of one channel copies the image for each tap beforehand."""
    first, *others = image.unfold(dim, len(window), stride).unbind(-1)
    result = first * window[0]
    for tap, shifted in zip(window[1:], others, strict=True):
        result = torch.addcmul(result, shifted, tap)
    return result


def moments(first: Tensor, second: Tensor, window: Tensor) -> tuple[Tensor, ...]:
    """Local means, variances and covariance of two images."""
    # In one filter call: the five images go through as samples of a batch.
    stack = torch.cat((first, second, first * first, second * second, first * second))
    mean1, mean2, square1, square2, product = filter_valid(stack, window, window).chunk(5)
    return mean1, mean2, square1 - mean1 * mean1, square2 - mean2 * mean2, product - mean1 * mean2
