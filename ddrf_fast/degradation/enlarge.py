"""Bringing images that were down-sampled back to their size."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.ops._checks import integer


def enlarge(image: Tensor, size: Sequence[int], scale: int) -> Tensor:
    """Enlarges by cubic interpolation what kept every `scale`-th row and column, each pixel where it was.

    Pixel (i, j) of the result lies at (i / scale, j / scale) of the image, as :func:`ddrf_fast.degrade` takes
    its samples. Common resizing functions lay centres of areas on one another instead, which moves such an
    image by (scale - 1) / 2 pixels (hence ``shift_pixel`` in Zhang et al., "Deep Unfolding Network for Image
    Super-Resolution", 2020).

    Args:
        image: Tensor[B, C, ceil(H / scale), ceil(W / scale)], floating.
        size: (H, W).
        scale: of the down-sampling.

    Returns:
        Tensor[B, C, H, W]. Cubic interpolation leaves the range of the image a little.

    Raises:
        ValueError: the image is not what is left of that size, or the scale is no positive integer.

    Example:
        >>> import torch
        >>> small = torch.rand(1, 1, 8, 10)
        >>> large = enlarge(small, (15, 20), 2)
        >>> large.shape, torch.allclose(large[..., ::2, ::2], small)
        (torch.Size([1, 1, 15, 20]), True)
    """
    scale = integer("scale", scale, 1)
    height, width = size
    expected = [-(-height // scale), -(-width // scale)]
    if image.dim() != 4 or list(image.shape[2:]) != expected:
        raise ValueError(
            f"image must be [B, C, {expected[0]}, {expected[1]}], what is left of {height}x{width} at scale "
            f"{scale}, got {list(image.shape)}"
        )
    if scale == 1:
        return image
    # A border pixel more, so that corners lie on corners and the last rows and columns are there.
    image = F.pad(image, (0, 1, 0, 1), mode="replicate")
    rows, columns = (scale * length + 1 for length in expected)
    large = F.interpolate(image, size=(rows, columns), mode="bicubic", align_corners=True)
    return large[:, :, :height, :width]
