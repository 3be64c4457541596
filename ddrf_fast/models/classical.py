"""Classical fusions: positive samples for the training (eq. 9), and baselines to compare with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Fusion = Callable[[Tensor, Tensor], Tensor]


def average(visible: Tensor, infrared: Tensor) -> Tensor:
    """Mean of both images, Tensor[B, C, H, W]."""
    return (visible + infrared) / 2


def maximum(visible: Tensor, infrared: Tensor) -> Tensor:
    """The brighter of both pixels, Tensor[B, C, H, W]."""
    return torch.maximum(visible, infrared)


def laplacian_pyramid(
    visible: Tensor, infrared: Tensor, *, levels: int = 4, base: Fusion = average
) -> Tensor:
    """Fuses Laplacian pyramids: of each detail coefficient the larger in magnitude, and ``base`` of the rest.

    After Burt and Adelson, "The Laplacian Pyramid as a Compact Image Code" (1983), and Burt's use of it for
    fusion.

    Args:
        visible: Tensor[B, C, H, W].
        infrared: Tensor[B, C, H, W].
        levels: levels of detail, fewer where the next would have less than 4 pixels to a side.
        base: how to fuse what remains below them.

    Returns:
        Tensor[B, C, H, W], not clipped.

    Example:
        >>> image = torch.rand(1, 1, 32, 40)
        >>> torch.allclose(laplacian_pyramid(image, image), image, atol=1e-6)
        True
    """
    if levels == 0 or min(visible.shape[2:]) < 8:
        return base(visible, infrared)
    coarse_visible, coarse_infrared = _reduce(visible), _reduce(infrared)
    detail_visible = visible - _expand(coarse_visible, visible)
    detail_infrared = infrared - _expand(coarse_infrared, infrared)
    detail = torch.where(detail_visible.abs() >= detail_infrared.abs(), detail_visible, detail_infrared)
    coarse = laplacian_pyramid(coarse_visible, coarse_infrared, levels=levels - 1, base=base)
    return detail + _expand(coarse, visible)


def salient(visible: Tensor, infrared: Tensor) -> Tensor:
    """Mean of both images, each pixel weighted by its squared distance from its image's mean.

    A warm body on a cold ground is far from the mean of the infrared image and is taken over; the ground is
    not.

    Args:
        visible: Tensor[B, C, H, W].
        infrared: Tensor[B, C, H, W].

    Returns:
        Tensor[B, C, H, W].

    Example:
        >>> image = torch.rand(1, 1, 32, 40)
        >>> torch.allclose(salient(image, image), image)
        True
    """
    weights = [
        (image - image.mean(dim=(2, 3), keepdim=True)).square() + 1e-3 for image in (visible, infrared)
    ]  # 1e-3: where neither stands out, the plain mean
    return (weights[0] * visible + weights[1] * infrared) / (weights[0] + weights[1])


def laplacian_salient(visible: Tensor, infrared: Tensor) -> Tensor:
    """:func:`laplacian_pyramid` over a :func:`salient` base."""
    return laplacian_pyramid(visible, infrared, base=salient)


def laplacian_maximum(visible: Tensor, infrared: Tensor) -> Tensor:
    """:func:`laplacian_pyramid` over a :func:`maximum` base."""
    return laplacian_pyramid(visible, infrared, base=maximum)


def guided_filter(visible: Tensor, infrared: Tensor) -> Tensor:
    r"""Fusion by guided filters (GFF), of a base (means of 31x31) and a detail layer.

    .. math:: P = \sum_k \bar W^B_k B_k + \bar W^D_k D_k, \quad
        W^B_k = G_{45,\,0.3}(M_k, X_k), \; W^D_k = G_{7,\,10^{-6}}(M_k, X_k)

    where :math:`M_k` is 1 where source k is the more salient (smoothed magnitude of its Laplacian), G filters
    it guided by the source, and the bars make the weights sum to 1. Li, Kang and Hu, "Image Fusion with
    Guided Filtering" (IEEE Trans. Image Processing, 2013), with its parameters.

    Args:
        visible: Tensor[B, C, H, W] in [0, 1].
        infrared: Tensor[B, C, H, W] in [0, 1].

    Returns:
        Tensor[B, C, H, W], not clipped.

    Example:
        >>> image = torch.rand(1, 1, 32, 40)
        >>> torch.allclose(guided_filter(image, image), image, atol=1e-6)
        True
    """
    sources = torch.stack((visible, infrared))
    size, batch = sources.shape, sources.flatten(0, 1)
    first = _saliency(visible) >= _saliency(infrared)
    masks = torch.stack((first, ~first)).flatten(0, 1).to(batch.dtype)
    base = _box(batch, 15)
    fused = torch.zeros_like(visible)
    for layer, radius, epsilon in ((base, 45, 0.3), (batch - base, 7, 1e-6)):
        weights = _guided_filter(masks, batch, radius, epsilon).clamp(0, 1).view(size) + 1e-12
        fused = fused + (weights * layer.view(size)).sum(0) / weights.sum(0)
    return fused


CLASSICAL_FUSIONS: dict[str, Fusion] = {
    "average": average,
    "maximum": maximum,
    "laplacian_pyramid": laplacian_pyramid,
    "laplacian_salient": laplacian_salient,
    "laplacian_maximum": laplacian_maximum,
    "guided_filter": guided_filter,
}
"""The classical fusions by name."""


def _reduce(image: Tensor) -> Tensor:
    """Binomial blur and every second pixel: Tensor[B, C, H, W] to Tensor[B, C, ceil(H/2), ceil(W/2)]."""
    image = F.pad(image, (2, 2, 2, 2), mode="reflect")
    image = F.conv2d(image, _binomial(image, (1, 5)), stride=(1, 2), groups=image.shape[1])
    return F.conv2d(image, _binomial(image, (5, 1)), stride=(2, 1), groups=image.shape[1])


def _expand(image: Tensor, like: Tensor) -> Tensor:
    """The same blur of twice the image with zeros in between: each pixel is back where it was taken."""
    image = 2 * F.pad(image, (1, 1, 1, 1), mode="reflect")
    image = F.conv_transpose2d(image, _binomial(image, (1, 5)), stride=(1, 2), groups=image.shape[1])
    image = F.conv_transpose2d(2 * image, _binomial(image, (5, 1)), stride=(2, 1), groups=image.shape[1])
    return image[..., 4 : 4 + like.shape[2], 4 : 4 + like.shape[3]]


def _binomial(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Five binomial taps for each channel of an image, along one axis."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=image.dtype, device=image.device) / 16
    return taps.view(1, 1, *size).expand(image.shape[1], -1, -1, -1)


def _saliency(image: Tensor) -> Tensor:
    """Magnitude of the Laplacian, smoothed by a Gaussian of 11x11 with sigma 5."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    neighbours = (
        padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    )
    position = torch.arange(-5, 6, dtype=image.dtype, device=image.device)
    taps = torch.exp(-0.5 * (position / 5).square())
    taps = (taps / taps.sum()).expand(image.shape[1], 1, -1)
    edges = F.pad((neighbours - 4 * image).abs(), (5, 5, 5, 5), mode="replicate")
    edges = F.conv2d(edges, taps[..., None], groups=image.shape[1])
    return F.conv2d(edges, taps[..., None, :], groups=image.shape[1])


def _box(image: Tensor, radius: int) -> Tensor:
    """Mean of the pixels that are at most `radius` rows and columns away and in the image."""
    size = 2 * radius + 1
    rows = F.avg_pool2d(image, (size, 1), stride=1, padding=(radius, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, size), stride=1, padding=(0, radius), count_include_pad=False)


def _guided_filter(image: Tensor, guide: Tensor, radius: int, epsilon: float) -> Tensor:
    """He, Sun and Tang's: in each window the image as an affine function of the guide."""
    mean, guide_mean = _box(image, radius), _box(guide, radius)
    variance = (_box(guide * guide, radius) - guide_mean * guide_mean).clamp(min=0)
    slope = (_box(guide * image, radius) - guide_mean * mean) / (variance + epsilon)
    return _box(slope, radius) * guide + _box(mean - slope * guide_mean, radius)
