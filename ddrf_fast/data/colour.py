"""Colour as the network sees it: luminance and two colour differences, BT.601 in full range (that of JPEG).

The visible image is fused by its luminance; its colour differences are put back afterwards.
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Image = TypeVar("Image", np.ndarray, Tensor)

_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114


def luminance(image: Image) -> Image:
    """The Y of :func:`rgb_to_ycbcr` alone.

    Args:
        image: floating array [..., 3], or floating Tensor[..., 3, H, W].

    Returns:
        One channel less: array [...], or Tensor[..., H, W].

    Raises:
        TypeError: `image` is not floating.
        ValueError: it has not three channels where they belong.

    Example:
        >>> luminance(np.array([[[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]])).round(3)
        array([[1.   , 0.114]])
    """
    red, green, blue = _channels(image)
    return _RED * red + _GREEN * green + _BLUE * blue


def rgb_to_ycbcr(image: Image) -> Image:
    """RGB in [0, 1] as Y in [0, 1] and Cb, Cr in [0, 1] with 0.5 for no colour.

        Y = 0.299 R + 0.587 G + 0.114 B,   Cb = (B - Y) / 1.772 + 0.5,   Cr = (R - Y) / 1.402 + 0.5

    Args:
        image: floating array [..., 3], or floating Tensor[..., 3, H, W].

    Returns:
        The same shape and dtype.

    Raises:
        TypeError: `image` is not floating.
        ValueError: it has not three channels where they belong.

    Example:
        >>> rgb_to_ycbcr(np.array([[[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]])).round(3)
        array([[[1.   , 0.5  , 0.5  ],
                [0.114, 1.   , 0.419]]])
    """
    red, _, blue = _channels(image)
    y = luminance(image)
    cb = (blue - y) / (2 - 2 * _BLUE) + 0.5
    cr = (red - y) / (2 - 2 * _RED) + 0.5
    return _join(y, cb, cr)


def ycbcr_to_rgb(image: Image) -> Image:
    """The inverse of :func:`rgb_to_ycbcr`, not clipped: a changed Y can lead out of [0, 1].

    Args:
        image: floating array [..., 3], or floating Tensor[..., 3, H, W].

    Returns:
        The same shape and dtype.

    Raises:
        TypeError: `image` is not floating.
        ValueError: it has not three channels where they belong.

    Example:
        >>> image = torch.rand(3, 4, 5)
        >>> torch.allclose(ycbcr_to_rgb(rgb_to_ycbcr(image)), image, atol=1e-6)
        True
    """
    y, cb, cr = _channels(image)
    red = y + (2 - 2 * _RED) * (cr - 0.5)
    blue = y + (2 - 2 * _BLUE) * (cb - 0.5)
    green = (y - _RED * red - _BLUE * blue) / _GREEN
    return _join(red, green, blue)


def _channels(image: Image) -> tuple[Image, Image, Image]:
    if isinstance(image, Tensor):
        floating, axis, smallest, form = image.is_floating_point(), -3, 3, "[..., 3, H, W]"
    else:
        floating, axis, smallest, form = np.issubdtype(image.dtype, np.floating), -1, 1, "[..., 3]"
    if not floating:
        raise TypeError(f"image must be floating, in [0, 1], got {image.dtype}")
    if image.ndim < smallest or image.shape[axis] != 3:
        raise ValueError(f"image must be {form}, got {list(image.shape)}")
    if isinstance(image, Tensor):
        return image[..., 0, :, :], image[..., 1, :, :], image[..., 2, :, :]
    return image[..., 0], image[..., 1], image[..., 2]


def _join(*channels: Image) -> Image:
    if isinstance(channels[0], Tensor):
        return torch.stack(channels, dim=-3)
    return np.stack(channels, axis=-1)
