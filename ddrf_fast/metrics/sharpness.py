"""Contrast and sharpness of an image by itself: AG, SF and SD. Noise raises all of them."""

import torch
from torch import Tensor

from ddrf_fast.metrics._images import Convention, check_convention, prepare, square_root


def average_gradient(image: Tensor, *, convention: Convention = "standard") -> Tensor:
    r"""AG, the mean strength of the gradient.

    .. math:: AG = \frac{1}{HW} \sum_{y,x} \sqrt{\bigl(G_x^2 + G_y^2\bigr) / 2}

    with central differences, at the border one-sided (MATLAB's ``gradient``). Cui, Feng, Xu, Li and Chen,
    *Detail preserved fusion of visible and infrared images using regional saliency extraction and multi-scale
    image decomposition* (Optics Communications, 2015). Forward differences, as the formula is mostly printed,
    give about 30 % more; no convention here uses them.

    ================= =========================================
    convention
    ================= =========================================
    standard, cddfuse the sum over all pixels by H W
    vifb, tang        the same sum by (H - 1)(W - 1)
    ================= =========================================

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].
        convention: see above.

    Returns:
        Tensor[B], grey values per pixel, at least 0, higher is sharper. Differentiable.

    Raises:
        ValueError: also where the image has fewer than 2 rows or columns, or the convention is unknown.

    Example:
        >>> average_gradient(torch.tensor([[0, 30, 60, 90]] * 3, dtype=torch.uint8))
        tensor([21.2132], dtype=torch.float64)
    """
    check_convention(convention)
    (image,) = prepare(image, smallest=2)
    vertical, horizontal = torch.gradient(image, dim=(-2, -1))
    strength = square_root((vertical.square() + horizontal.square()) / 2)
    height, width = image.shape[-2:]
    count = (height - 1) * (width - 1) if convention in ("vifb", "tang") else height * width
    return strength.sum((1, 2, 3)) / count


def spatial_frequency(image: Tensor, *, convention: Convention = "standard") -> Tensor:
    r"""SF, the root of the mean squared differences between neighbours.

    .. math:: SF = \sqrt{RF^2 + CF^2}

    with RF² and CF² the mean squared differences within rows and within columns. Eskicioglu and Fisher,
    *Image quality measures and their performance* (IEEE Trans. Communications, 1995).

    ============== ===============================================================
    convention
    ============== ===============================================================
    standard, vifb both sums by H W
    cddfuse        each sum by the number of its differences, H (W - 1), (H - 1) W
    tang           the same of an image in [0, 1]: 1/255 of it
    ============== ===============================================================

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].
        convention: see above.

    Returns:
        Tensor[B], at least 0, higher is sharper. Differentiable.

    Raises:
        ValueError: also where the image has fewer than 2 rows or columns, or the convention is unknown.

    Example:
        >>> spatial_frequency(torch.tensor([[0, 30, 60, 90]] * 3, dtype=torch.uint8), convention="cddfuse")
        tensor([30.], dtype=torch.float64)
    """
    check_convention(convention)
    (image,) = prepare(image, smallest=2)
    rows, columns = image.diff(dim=-1).square(), image.diff(dim=-2).square()
    if convention in ("standard", "vifb"):
        return square_root((rows.sum((1, 2, 3)) + columns.sum((1, 2, 3))) / image.shape[-2:].numel())
    frequency = square_root(rows.mean((1, 2, 3)) + columns.mean((1, 2, 3)))
    return frequency / 255 if convention == "tang" else frequency


def standard_deviation(image: Tensor) -> Tensor:
    r"""SD of the grey values, the same in every convention.

    .. math:: SD = \sqrt{\frac{1}{HW} \sum_{y,x} (F_{yx} - \bar F)^2}

    Fusion papers cite Rao, *In-fibre Bragg grating sensors* (Measurement Science and Technology, 1997).

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].

    Returns:
        Tensor[B], grey values in [0, 127.5], higher is more contrast. Differentiable.

    Example:
        >>> standard_deviation(torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8))
        tensor([127.5000], dtype=torch.float64)
    """
    (image,) = prepare(image)
    deviation = image - image.mean((1, 2, 3), keepdim=True)
    return square_root(deviation.square().mean((1, 2, 3)))
