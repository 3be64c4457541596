"""How near an image is to its references, pixel by pixel and in structure: PSNR and SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.metrics._images import (
    Convention,
    check_convention,
    gaussian_window,
    moments,
    prepare,
    square_root,
)


def psnr(
    image: Tensor, reference: Tensor, *references: Tensor, convention: Convention = "standard"
) -> Tensor:
    r"""PSNR over the mean of the references' mean squared errors.

    .. math:: PSNR = 10 \log_{10} \frac{L^2}{\frac1K \sum_k MSE(F, X_k)}

    with L = 255. With one reference, the usual PSNR of a restored image.

    ========== ==============================================================================
    convention
    ========== ==============================================================================
    standard   as above; 10 to 20 dB for fused images
    cddfuse    L is the largest value of the image itself
    tang       errors of images in [0, 1] under L = 255: 48.13 dB more
    vifb       the root of the summed squares over H W instead of the MSE: 57 to 60 dB
    ========== ==============================================================================

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].
        reference: the same shape.
        references: more of them.
        convention: see above.

    Returns:
        Tensor[B], decibels, higher is better; infinite where image and references are equal. Differentiable.

    Raises:
        ValueError: also where the convention is unknown.

    Example:
        >>> image, reference = torch.zeros(4, 4), torch.full((4, 4), 0.1)
        >>> psnr(image, reference)
        tensor([20.])
    """
    check_convention(convention)
    image, *others = prepare(image, reference, *references)
    errors = torch.stack([(image - other).square().mean((1, 2, 3)) for other in others])
    if convention == "vifb":
        errors = square_root(errors / image.shape[-2:].numel())
    if convention == "tang":
        errors = errors / 255**2
    peak = image.amax((1, 2, 3)) if convention == "cddfuse" else image.new_full((len(image),), 255.0)
    error = errors.mean(0)
    usual = (error > 0) & (peak > 0)  # the others have no gradient, instead of NaN
    value = 10 * torch.log10(torch.where(usual, peak, 1.0) ** 2 / torch.where(usual, error, 1.0))
    return torch.where(usual, value, torch.where(error > 0, -torch.inf, torch.inf))


def ssim(
    image: Tensor, reference: Tensor, *references: Tensor, convention: Convention = "standard"
) -> Tensor:
    r"""Structural similarity.

    .. math:: SSIM(F, X) = \Bigl\langle \frac{2\mu_F\mu_X + C_1}{\mu_F^2 + \mu_X^2 + C_1} \cdot
        \frac{2\sigma_{FX} + C_2}{\sigma_F^2 + \sigma_X^2 + C_2} \Bigr\rangle, \quad
        C_1 = (0.01 L)^2, \; C_2 = (0.03 L)^2

    Wang, Bovik, Sheikh and Simoncelli, *Image quality assessment: from error visibility to structural
    similarity* (IEEE Trans. Image Processing, 2004).

    ========== ================== =================================================== ===
    convention over references    window                                              L
    ========== ================== =================================================== ===
    standard   mean               Gaussian 11x11, sigma 1.5, wholly in the image      255
    vifb       sum                the same                                            255
    tang       mean               the same, border replicated (MATLAB's ``ssim``)     1
    cddfuse    sum                uniform 7x7, sample covariance (scikit-image)       2
    ========== ================== =================================================== ===

    The last two have nearly no constants, since their L is that of other images than the ones they are given;
    that lowers the figure of flat regions.

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].
        reference: the same shape.
        references: more of them.
        convention: see above.

    Returns:
        Tensor[B], at most 1, or at most the number of references where they are summed; higher is better.
        Differentiable.

    Raises:
        ValueError: also where the image is smaller than 11x11, or the convention is unknown.

    Example:
        >>> image = torch.rand(2, 1, 16, 16)
        >>> ssim(image, image)
        tensor([1., 1.])
        >>> ssim(image, image, image, convention="vifb")
        tensor([2., 2.])
    """
    check_convention(convention)
    images = prepare(image, reference, *references, smallest=11)
    dtype = images[0].dtype
    if convention in ("tang", "cddfuse"):  # constants of the size of what float32 rounds
        images = [values.double() for values in images]
    window = gaussian_window(11, 1.5, images[0])
    data_range, sampled = 255.0, 1.0
    if convention == "tang":
        images, data_range = [F.pad(values, (5, 5, 5, 5), mode="replicate") for values in images], 1.0
    if convention == "cddfuse":
        window, data_range, sampled = torch.full_like(window[:7], 1 / 7), 2.0, 49 / 48
    image, *others = images
    scores = torch.stack([_ssim(image, other, window, data_range, sampled) for other in others])
    return (scores.sum(0) if convention in ("vifb", "cddfuse") else scores.mean(0)).to(dtype)


def _ssim(image: Tensor, reference: Tensor, window: Tensor, data_range: float, sampled: float) -> Tensor:
    """Tensor[B]; `sampled` turns the variances of a window into those of a sample."""
    mean1, mean2, variance1, variance2, covariance = moments(image, reference, window)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean1 * mean2 + c1) / (mean1.square() + mean2.square() + c1)
    structure = (2 * sampled * covariance + c2) / (sampled * (variance1 + variance2) + c2)
    return (luminance * structure).mean((1, 2, 3))
