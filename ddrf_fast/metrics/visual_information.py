"""Visual information fidelity: VIF in the pixel domain, and Han's VIFF made for fusion.

Both see an image as gain · reference + distortion, window by window, and compare how much an eye with some
noise of its own learns from either. They differ in that noise and in how sources and scales are put together.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddrf_fast.metrics._images import filter_valid, gaussian_window, moments, prepare

_TINY = 1e-10
_VIFF_CONSTANT = 1e-7 * math.log(10)  # beside natural logarithms


def vif(image: Tensor, reference: Tensor, *references: Tensor) -> Tensor:
    r"""VIF in the pixel domain (VIFp), summed over the references.

    .. math:: VIF = \sum_k \frac{\sum_{s,w} \log(1 + g^2 \sigma_X^2 / (\sigma_V^2 + 2))}
        {\sum_{s,w} \log(1 + \sigma_X^2 / 2)}, \quad
        g = \sigma_{XF} / \sigma_X^2, \; \sigma_V^2 = \sigma_F^2 - g \sigma_{XF}

    over four scales s and all windows w (Gaussian of 17, 9, 5 and 3 pixels, a fifth of it as sigma). Sheikh
    and Bovik, *Image information and visual quality* (IEEE Trans. Image Processing, 2006), in the multi-scale
    pixel-domain version of its authors. This is what fusion papers call VIF, and some of them VIFF, the same
    in every convention; :func:`viff` is another measure. The order of the arguments matters.

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].
        reference: the same shape.
        references: more of them.

    Returns:
        Tensor[B], at least 0; 1 for each reference that equals the image (a sharpened one can give more).
        Higher is better. A reference without any structure gives 1. Differentiable.

    Raises:
        ValueError: also where the image is smaller than 41x41.

    Example:
        >>> image = torch.rand(48, 48)
        >>> vif(image, image, image)
        tensor([2.])
    """
    image, *others = prepare(image, reference, *references, smallest=41)
    return torch.stack([_vif(image, other) for other in others]).sum(0)


def viff(fused: Tensor, visible: Tensor, infrared: Tensor) -> Tensor:
    r"""VIFF, visual information fidelity for fusion: one figure of both sources.

    .. math:: VIFF = \sum_{s=1}^4 p_s \frac{\sum_w (VID_s(w) + C)}{\sum_w (VIND_s(w) + C)}, \quad
        p = (1, 0, 0.15, 1) / 2.15, \; C = 10^{-7}

    with, of the two sources, the one of smaller gain g at w, :math:`VID = \log_{10}(1 + g^2 \sigma_X^2 /
    (\sigma_V^2 + \sigma_N^2))`, :math:`VIND = \log_{10}(1 + \sigma_X^2 / \sigma_N^2)`,
    :math:`\sigma_N^2 = 0.005 \cdot 255^2`, and the scales of :func:`vif`. Han, Cai, Cao and Xu, *A new image
    fusion performance metric based on visual information fidelity* (Information Fusion, 2013). The same in
    every convention.

    Args:
        fused: Tensor[B, 1, H, W] or Tensor[H, W].
        visible: the same shape.
        infrared: the same shape.

    Returns:
        Tensor[B], at least 0, about 1 at best, higher is better. Differentiable.

    Raises:
        ValueError: also where the image is smaller than 41x41.

    Example:
        >>> image = torch.rand(48, 48)
        >>> round(viff(image, image, image).item(), 4)
        1.0
    """
    images = prepare(fused, visible, infrared, smallest=41, names=("fused", "visible", "infrared"))
    # Which gain is smaller where there is no structure is a matter of rounding, less of this one.
    fused, visible, infrared = (image.double() for image in images)
    score = fused.new_zeros(len(fused))
    noise = 0.005 * 255**2
    for weight, first, second in zip(
        (1, 0, 0.15, 1), _scales(fused, visible, noise), _scales(fused, infrared, noise), strict=True
    ):
        smaller = first[0] < second[0]
        kept = torch.where(smaller, first[1], second[1]) + _VIFF_CONSTANT
        total = torch.where(smaller, first[2], second[2]) + _VIFF_CONSTANT
        score = score + weight / 2.15 * kept.sum((1, 2, 3)) / total.sum((1, 2, 3))
    return score.to(images[0].dtype)


def _vif(image: Tensor, reference: Tensor) -> Tensor:
    kept = reference.new_zeros(len(reference))
    total = reference.new_zeros(len(reference))
    for _, scale_kept, scale_total in _scales(image, reference, 2.0):
        kept = kept + scale_kept.sum((1, 2, 3))
        total = total + scale_total.sum((1, 2, 3))
    informative = total > 0
    return torch.where(informative, kept / torch.where(informative, total, 1.0), 1.0)


def _scales(image: Tensor, reference: Tensor, noise: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each of four scales: gain, information kept, and information there was, a map each."""
    # Variances do not change by it, and lose fewer digits.
    shift = reference.mean((1, 2, 3), keepdim=True)
    image, reference = image - shift, reference - shift
    for size in (17, 9, 5, 3):
        window = gaussian_window(size, size / 5, image)
        if size != 17:
            image = filter_valid(image, window, window, stride=2)
            reference = filter_valid(reference, window, window, stride=2)
        _, _, variance, variance_image, covariance = moments(reference, image, window)
        variance, variance_image = variance.clamp(min=0), variance_image.clamp(min=0)
        # The authors' rules where gain and distortion have no meaning.
        gain = covariance / (variance + _TINY)
        distortion = variance_image - gain * covariance
        flat_reference, flat_image = variance < _TINY, variance_image < _TINY
        distortion = torch.where(flat_reference, variance_image, distortion)
        distortion = torch.where(flat_image, 0.0, distortion)
        gain = torch.where(flat_reference | flat_image, 0.0, gain)
        variance = torch.where(flat_reference, 0.0, variance)
        distortion = torch.where(gain < 0, variance_image, distortion).clamp(min=_TINY)
        gain = gain.clamp(min=0)
        yield (
            gain,
            torch.log1p(gain.square() * variance / (distortion + noise)),
            torch.log1p(variance / noise),
        )
