"""How much of the sources' edges a fused image keeps: Qabf."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.metrics._images import Convention, check_convention, filter_valid, prepare, square_root


def qabf(fused: Tensor, visible: Tensor, infrared: Tensor, *, convention: Convention = "standard") -> Tensor:
    r"""Q^{AB/F}, how much of the sources' edges the fused image keeps.

    .. math:: Q^{AB/F} = \frac{\sum_{k,w} Q_g Q_\alpha\, g_k}{\sum_{k,w} g_k}, \quad
        Q_g = \frac{0.9994}{1 + e^{-15 (G - 0.5)}}, \; Q_\alpha = \frac{0.9879}{1 + e^{-22 (A - 0.8)}}

    with g the strength of the Sobel edges, G the ratio of the weaker to the stronger edge of source k and
    fused image, and :math:`A = 1 - |\alpha_k - \alpha_F| / (\pi/2)` of their orientations in [-π/2, π/2],
    compared without wrapping round, as published code does. Xydeas and Petrovic, *Objective image fusion
    performance measure* (Electronics Letters, 2000).

    ============= ===========================================================================
    convention
    ============= ===========================================================================
    standard      border mirrored, as OpenCV's Sobel does; G = 1 where both edges are equally strong
    vifb, cddfuse zeros beyond the border; G = g there, as their common ancestor in MATLAB does
    tang          the same of images in [0, 1]
    ============= ===========================================================================

    Args:
        fused: Tensor[B, 1, H, W] or Tensor[H, W].
        visible: the same shape.
        infrared: the same shape.
        convention: see above.

    Returns:
        Tensor[B] in [0, 1], higher is better. Sources without any edge give 1. Differentiable.

    Raises:
        ValueError: also where the image is smaller than 2x2, or the convention is unknown.

    Example:
        >>> image = torch.rand(16, 16, dtype=torch.float64)
        >>> round(qabf(image, image, image).item(), 3)
        0.975
    """
    check_convention(convention)
    fused, *sources = prepare(fused, visible, infrared, smallest=2, names=("fused", "visible", "infrared"))
    border = "reflect" if convention == "standard" else "constant"
    strength_fused, orientation_fused = _edges(fused, border)
    kept = fused.new_zeros(len(fused))
    total = fused.new_zeros(len(fused))
    for source in sources:
        strength, orientation = _edges(source, border)
        larger = torch.maximum(strength, strength_fused)
        there = larger > 0
        ratio = torch.minimum(strength, strength_fused) / torch.where(there, larger, 1.0)
        if convention == "standard":
            ratio = torch.where(there, ratio, 1.0)
        else:
            scale = 255 if convention == "tang" else 1
            ratio = torch.where(strength == strength_fused, strength / scale, ratio)
        alignment = 1 - (orientation - orientation_fused).abs() / (math.pi / 2)
        quality = 0.9994 * torch.sigmoid(15 * (ratio - 0.5)) * 0.9879 * torch.sigmoid(22 * (alignment - 0.8))
        kept = kept + (quality * strength).sum((1, 2, 3))
        total = total + strength.sum((1, 2, 3))
    edged = total > 0
    return torch.where(edged, kept / torch.where(edged, total, 1.0), 1.0)


def _edges(image: Tensor, border: str) -> tuple[Tensor, Tensor]:
    """Strength and orientation (in [-π/2, π/2], y upwards) of the Sobel edges."""
    smooth = torch.tensor([1.0, 2.0, 1.0], dtype=image.dtype, device=image.device)
    slope = torch.tensor([-1.0, 0.0, 1.0], dtype=image.dtype, device=image.device)
    padded = F.pad(image, (1, 1, 1, 1), mode=border)
    x, y = filter_valid(padded, smooth, slope), filter_valid(padded, -slope, smooth)
    upright = x == 0
    orientation = torch.where(upright, math.pi / 2, torch.atan(y / torch.where(upright, 1.0, x)))
    return square_root(x.square() + y.square()), orientation
