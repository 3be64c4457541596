r"""The losses of DDRF-Net (section 3.4): restoration, and eq. 7 to 10 for the fused image.

All take images as Tensor[B, 1, H, W] in [0, 1], work in batches on any device, are differentiable in the
network's outputs, and return a scalar where they do not say otherwise. :math:`S` is SSIM
(:func:`similarity`), per image in [-1, 1].

Eq. 8 as printed, :math:`1 - \frac1N \sum_i S(X_i * H_i, P)`, is small when the fused image P *resembles* the
degraded images, while the text says that P is to be driven away from them. :func:`negative_loss` follows the
text by default; ``mode="literal"`` follows the print.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.metrics._images import gaussian_window
from ddrf_fast.models.classical import CLASSICAL_FUSIONS, Fusion

Evaluation = Callable[[Tensor, Tensor, Tensor], Tensor]


def charbonnier(prediction: Tensor, target: Tensor, epsilon: float = 1e-3) -> Tensor:
    r"""Mean of :math:`\sqrt{(p - t)^2 + \epsilon^2} - \epsilon`: the absolute error, smooth at zero.

    Args:
        prediction: Tensor of any shape.
        target: Tensor of the same shape.
        epsilon: where the square turns into the absolute value, in image units.

    Example:
        >>> charbonnier(torch.ones(3), torch.ones(3)).item()
        0.0
    """
    return (torch.sqrt((prediction - target).square() + epsilon**2) - epsilon).mean()


def gradient_difference(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the horizontal, plus that of the vertical forward differences.

    Args:
        prediction: Tensor[B, C, H, W].
        target: Tensor[B, C, H, W].

    Example:
        >>> ramp = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> gradient_difference(ramp, 3 * ramp).item()
        2.0
    """
    error = prediction - target
    return error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()


def activity_difference(prediction: Tensor, target: Tensor, window: int = 8) -> Tensor:
    """Mean absolute error of the forward differences' mean magnitudes, in windows of Tensor[B, C, H, W].

    An image that is undecided between two places of an edge is flatter than either, and so are the
    minimisers of errors pixel by pixel. This asks for as much activity as in the target, wherever in the
    window it is.

    Args:
        prediction: Tensor[B, C, H, W], H and W larger than the window.
        target: Tensor[B, C, H, W].
        window: side of the windows, side by side, in pixels.

    Example:
        >>> edge, moved = torch.zeros(2, 1, 1, 17, 17)
        >>> edge[..., 4:], moved[..., 6:] = 1, 1
        >>> activity_difference(moved, edge).item()
        0.0
    """
    rows, columns = (
        F.avg_pool2d(prediction.diff(dim=dim).abs(), window)
        - F.avg_pool2d(target.diff(dim=dim).abs(), window)
        for dim in (2, 3)
    )
    return rows.abs().mean() + columns.abs().mean()


def restoration_loss(restored: Tensor, clean: Tensor, ssim_weight: float = 0.1) -> Tensor:
    r"""Restoration loss of H1 and H2: :math:`\mathrm{charbonnier}(H, X) + w\,(1 - S(H, X))`.

    Args:
        restored: Tensor[B, 1, H, W], output of a branch.
        clean: Tensor[B, 1, H, W], the image before it was degraded.
        ssim_weight: w.

    Raises:
        ValueError: the images are smaller than 11x11.

    Example:
        >>> image = torch.rand(2, 1, 16, 16)
        >>> round(restoration_loss(image, image).item(), 5)
        0.0
    """
    return charbonnier(restored, clean) + ssim_weight * (1 - similarity(restored, clean).mean())


def similarity_loss(fused: Tensor, sources: Sequence[Tensor]) -> Tensor:
    r"""Eq. 7: :math:`L(\theta) = 1 - \frac1N \sum_i S(X_i, P)`.

    Args:
        fused: Tensor[B, 1, H, W], P.
        sources: the N clean sources :math:`X_i`, each Tensor[B, 1, H, W].

    Returns:
        Scalar in [0, 2]; 0 only if P equals every source.

    Example:
        >>> image = torch.rand(1, 1, 16, 16)
        >>> round(similarity_loss(image, [image, image]).item(), 5)
        0.0
    """
    return 1 - torch.stack([similarity(fused, source) for source in sources]).mean()


def negative_loss(
    fused: Tensor, degraded: Sequence[Tensor], clean: Sequence[Tensor] | None = None, mode: str = "text"
) -> Tensor:
    r"""Eq. 8: drives P away from the dynamic negative samples, the degraded images :math:`X_i * H_i`.

    ``mode="text"``: :math:`L(H) = \frac1N \sum_i \max(0, S(X_i * H_i, P) - m_i)`, where :math:`m_i` is 0, or
    :math:`S(X_i * H_i, X_i)` if the clean images are given: P is driven away until it resembles the degraded
    image no more than the clean one does, and no farther, for that would spoil it.

    ``mode="literal"``: :math:`L(H) = 1 - \frac1N \sum_i S(X_i * H_i, P)`, as printed.

    Args:
        fused: Tensor[B, 1, H, W], P.
        degraded: the negative samples, each Tensor[B, 1, H, W].
        clean: the same images before they were degraded, for the margins; not used by ``"literal"``.
        mode: "text" or "literal".

    Returns:
        Scalar, in [0, 2].

    Raises:
        ValueError: the mode is unknown, there are not as many clean as degraded images, or images are smaller
            than 11x11.

    Example:
        >>> image = torch.rand(2, 1, 16, 16)
        >>> round(negative_loss(image, [image]).item(), 5)
        1.0
    """
    if mode not in ("text", "literal"):
        raise ValueError(f'mode must be "text" or "literal", got {mode!r}')
    if clean is not None and len(clean) != len(degraded):
        raise ValueError(
            f"clean must have one image for each degraded one ({len(degraded)}), got {len(clean)}"
        )
    towards = torch.stack([similarity(fused, image) for image in degraded])
    if mode == "literal":
        return 1 - towards.mean()
    if clean is not None:
        with torch.no_grad():
            margins = torch.stack([similarity(*pair) for pair in zip(clean, degraded, strict=True)])
        towards = towards - margins
    return towards.clamp(min=0).mean()


def positive_sample(
    visible: Tensor,
    infrared: Tensor,
    fusions: dict[str, Fusion] | None = None,
    evaluate: Evaluation | None = None,
) -> tuple[Tensor, Tensor]:
    """The positive sample of eq. 9: the best of several classical fusions, chosen for each image.

    Args:
        visible: Tensor[B, 1, H, W], clean.
        infrared: Tensor[B, 1, H, W], clean.
        fusions: the methods M_i, default :data:`ddrf_fast.models.classical.CLASSICAL_FUSIONS`.
        evaluate: O, (fused, visible, infrared) -> Tensor[B], larger is better; by default
            :func:`fusion_quality`.

    Returns:
        The best fusions Tensor[B, 1, H, W], clipped to [0, 1], and the index of each one's method, int64
        Tensor[B].

    Example:
        >>> images, methods = positive_sample(*torch.rand(2, 3, 1, 32, 40))
        >>> images.shape, methods.shape
        (torch.Size([3, 1, 32, 40]), torch.Size([3]))
    """
    evaluate = evaluate or fusion_quality
    methods = (fusions or CLASSICAL_FUSIONS).values()
    with torch.no_grad():
        candidates = torch.stack([method(visible, infrared).clamp(0, 1) for method in methods])
        scores = torch.stack([evaluate(candidate, visible, infrared) for candidate in candidates])
        best = scores.argmax(dim=0)
        return candidates[best, torch.arange(len(best), device=best.device)], best


def positive_loss(
    fused: Tensor,
    positive: Tensor,
    gradient_weight: float = 2.0,
    ssim_weight: float = 0.5,
    activity_weight: float = 2.0,
) -> Tensor:
    r"""Eq. 9: distance of P to the positive sample :math:`M^* = \arg\max_i O(M_i)`.

    .. math::
        L(O) = \mathrm{charbonnier}(P, M^*) + w_g \lVert \nabla P - \nabla M^* \rVert_1
            + w_a A(P, M^*) + w_s (1 - S(P, M^*))

    Args:
        fused: Tensor[B, 1, H, W], P.
        positive: Tensor[B, 1, H, W] from :func:`positive_sample`.
        gradient_weight: :math:`w_g`.
        ssim_weight: :math:`w_s`.
        activity_weight: :math:`w_a`, of :func:`activity_difference`.

    Raises:
        ValueError: the images are smaller than 11x11.

    Example:
        >>> image = torch.rand(2, 1, 16, 16)
        >>> round(positive_loss(image, image).item(), 5)
        0.0
    """
    return (
        charbonnier(fused, positive)
        + gradient_weight * gradient_difference(fused, positive)
        + activity_weight * activity_difference(fused, positive)
        + ssim_weight * (1 - similarity(fused, positive).mean())
    )


def fusion_quality(fused: Tensor, visible: Tensor, infrared: Tensor, window: int = 7) -> Tensor:
    r"""Weighted fusion quality index (Piella, Heijmans, "A new quality metric for image fusion", ICIP 2003).

    .. math::
        Q = \sum_w c(w) \bigl(\lambda(w)\, q(X_v, P | w) + (1 - \lambda(w))\, q(X_i, P | w)\bigr)

    with q the local similarity of eq. 7's SSIM constants, :math:`\lambda = \sigma_v^2 / (\sigma_v^2 +
    \sigma_i^2)` the share of the livelier source, and c the normalised larger variance: what stands out
    counts, from wherever it comes.

    Args:
        fused: Tensor[B, 1, H, W] in [0, 1].
        visible: Tensor[B, 1, H, W] in [0, 1].
        infrared: Tensor[B, 1, H, W] in [0, 1].
        window: side of the uniform window in pixels, made smaller for smaller images.

    Returns:
        Tensor[B], at most 1, larger is better.

    Example:
        >>> image = torch.rand(1, 1, 16, 16)
        >>> round(fusion_quality(image, image, image).item(), 4)
        1.0
    """
    window = min(window, *fused.shape[2:])
    sources = torch.cat((visible, infrared), dim=1)
    images = torch.cat((fused, sources), dim=1)
    mean = _window_mean(images, window)
    # Clamped: the difference of two rounded means can fall below zero where the image is flat.
    variance = (_window_mean(images.square(), window) - mean.square()).clamp(min=0)
    covariance = _window_mean(fused * sources, window) - mean[:, :1] * mean[:, 1:]
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean[:, :1] * mean[:, 1:] + c1) / (mean[:, :1].square() + mean[:, 1:].square() + c1)
    structure = (2 * covariance + c2) / (variance[:, :1] + variance[:, 1:] + c2)
    saliency = variance[:, 1:] + 1e-6
    local = (saliency * luminance * structure).sum(dim=1) / saliency.sum(dim=1)
    weight = saliency.amax(dim=1)
    return (weight * local).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


def _window_mean(images: Tensor, window: int) -> Tensor:
    """Means over all square windows that lie in the image: over rows, then over columns."""
    rows = F.avg_pool2d(images, (window, 1), stride=1)
    return F.avg_pool2d(rows, (1, window), stride=1)


def fidelity_loss(
    fused: Tensor, visible: Tensor, infrared: Tensor, deviation_weight: float = 100.0
) -> Tensor:
    r"""What a fused image should keep where no positive sample can be hoped for: of degraded pairs.

    .. math:: 1 - I(P, X_v, X_i) + w\, \overline{(P - (X_v + X_i) / 2)^2}

    with the information I that is kept (:func:`information`). The mean of both sources is the image of least
    mean squared error to both, so the second term asks for the largest PSNR; the first one for the contrast
    that a mean loses.

    Args:
        fused: Tensor[B, 1, H, W], P.
        visible: Tensor[B, 1, H, W], clean.
        infrared: Tensor[B, 1, H, W], clean.
        deviation_weight: w.

    Returns:
        Tensor[B], at least 0.

    Example:
        >>> image = torch.rand(2, 1, 48, 48)
        >>> fidelity_loss(image, image, image).round(decimals=3)
        tensor([0., 0.])
    """
    deviation = (fused - (visible + infrared) / 2).square().mean(dim=(1, 2, 3))
    return 1 - information(fused, visible, infrared) + deviation_weight * deviation


class FusionLoss(NamedTuple):
    """Eq. 10 and its terms, each a scalar.

    Attributes:
        total: the weighted sum.
        similarity: eq. 7.
        negative: eq. 8.
        positive: eq. 9.
        fidelity: :func:`fidelity_loss` of the pairs that have no positive sample.
    """

    total: Tensor
    similarity: Tensor
    negative: Tensor
    positive: Tensor
    fidelity: Tensor


def fusion_loss(
    fused: Tensor,
    sources: Sequence[Tensor],
    degraded: Sequence[Tensor],
    positive: Tensor,
    *,
    degraded_positive: Tensor | None = None,
    lost: Tensor | None = None,
    similarity_weight: float = 1.0,
    negative_weight: float = 1.0,
    positive_weight: float = 1.0,
    fidelity_weight: float = 1.0,
    negative_mode: str = "text",
) -> FusionLoss:
    r"""Eq. 10: :math:`L = \frac13 \sum_{i=1}^3 L(H_i) + L(\theta) + L(O)`, each term with a weight.

    The three degradation models are those of the visible image (H1), of the infrared image (H2) and of the
    fused image (H3); the last one's negative sample is the degraded positive sample.

    Args:
        fused: Tensor[B, 1, H, W], P.
        sources: the clean visible and infrared images.
        degraded: the degraded visible and infrared images.
        positive: Tensor[B, 1, H, W] from :func:`positive_sample`.
        degraded_positive: Tensor[B, 1, H, W]; None leaves H3 out.
        lost: bool Tensor[B], pairs too degraded for a positive sample, for which :func:`fidelity_loss` takes
            the place of eq. 9; None: of none.
        similarity_weight: of eq. 7.
        negative_weight: of eq. 8.
        positive_weight: of eq. 9.
        fidelity_weight: of :func:`fidelity_loss`.
        negative_mode: see :func:`negative_loss`.

    Raises:
        ValueError: as :func:`negative_loss`.

    Example:
        >>> visible, infrared = sources = list(torch.rand(2, 3, 1, 48, 48))
        >>> positive, _ = positive_sample(visible, infrared)
        >>> loss = fusion_loss((visible + infrared) / 2, sources, sources, positive)
        >>> torch.allclose(loss.total, loss.similarity + loss.negative + loss.positive)
        True
    """
    clean = list(sources)
    negatives = list(degraded)
    if degraded_positive is not None:
        clean.append(positive)
        negatives.append(degraded_positive)
    fidelity = fused.new_zeros(())
    if lost is not None:
        visible, infrared = sources
        fidelity = (lost * fidelity_loss(fused, visible, infrared)).mean()
        # An image is at no distance from itself: nothing more is asked of these.
        positive = torch.where(lost.view(-1, 1, 1, 1), fused.detach(), positive)
    terms = (
        similarity_loss(fused, sources),
        negative_loss(fused, negatives, clean, mode=negative_mode),
        positive_loss(fused, positive),
        fidelity,
    )
    weights = (similarity_weight, negative_weight, positive_weight, fidelity_weight)
    total = torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()
    return FusionLoss(total, *terms)


def similarity(image: Tensor, reference: Tensor) -> Tensor:
    r"""S: the SSIM of :func:`ddrf_fast.metrics.ssim`, as a loss needs it.

    The Gaussian filters are products with banded matrices, :math:`G_h X G_w^T`. On the crops of a training
    these and their gradients are many times faster than convolutions with a single channel. No values are
    refused: the network may be far outside [0, 1] at the start. float16 and bfloat16 are computed in float32,
    and autocast changes nothing.

    Args:
        image: Tensor[B, 1, H, W], H and W at least 11.
        reference: Tensor[B, 1, H, W].

    Returns:
        Tensor[B], in [-1, 1].

    Raises:
        ValueError: the images are smaller than 11x11.

    Example:
        >>> from ddrf_fast.metrics import ssim
        >>> first, second = torch.rand(2, 3, 1, 20, 24)
        >>> torch.allclose(similarity(first, second), ssim(first, second), atol=1e-5)
        True
    """
    if min(image.shape[2:]) < 11:
        raise ValueError(f"image must be at least 11x11 pixels, got {list(image.shape)}")
    image, reference = (x.float() if x.element_size() < 4 else x for x in (image, reference))
    maps = torch.cat((image, reference, image.square(), reference.square(), image * reference), dim=1)
    mean1, mean2, square1, square2, product = _gaussian(maps, 11, 1.5).unbind(dim=1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean1 * mean2 + c1) / (mean1.square() + mean2.square() + c1)
    variances = square1 - mean1.square() + square2 - mean2.square()
    structure = (2 * (product - mean1 * mean2) + c2) / (variances + c2)
    return (luminance * structure).mean(dim=(1, 2))


def information(fused: Tensor, visible: Tensor, infrared: Tensor) -> Tensor:
    r"""I: the VIFF of :func:`ddrf_fast.metrics.viff`, but that no window counts more than it had.

    .. math:: I = \sum_{s=1}^4 p_s \frac{\sum_w \min(VID_s(w), VIND_s(w))}{\sum_w VIND_s(w)}

    VIFF rises with whatever contrast is given to an image; this is 1 at most, so nothing is gained by more
    than the sources have. Filters and dtypes are as in :func:`similarity`.

    Args:
        fused: Tensor[B, 1, H, W], H and W at least 41.
        visible: Tensor[B, 1, H, W].
        infrared: Tensor[B, 1, H, W].

    Returns:
        Tensor[B], in [0, 1].

    Example:
        >>> from ddrf_fast.metrics import viff
        >>> visible, infrared = torch.rand(2, 3, 1, 48, 48)
        >>> fused = (visible + infrared) / 2
        >>> bool((information(fused, visible, infrared) <= viff(fused, visible, infrared) + 1e-5).all())
        True
    """
    images = torch.cat([x.float() if x.element_size() < 4 else x for x in (fused, visible, infrared)], dim=1)
    images = images - images[:, 1:].mean(dim=(1, 2, 3), keepdim=True)  # saves digits of the variances
    noise, tiny = 0.005, 1e-8
    score = images.new_zeros(len(images))
    for weight, size in ((1.0, 17), (0.0, 9), (0.15, 5), (1.0, 3)):
        if size != 17:
            images = _gaussian(images, size, size / 5, stride=2)
        if not weight:
            continue
        maps = torch.cat((images, images.square(), images[:, :1] * images[:, 1:]), dim=1)
        mean, square, product = _gaussian(maps, size, size / 5).split((3, 3, 2), dim=1)
        covariance = product - mean[:, :1] * mean[:, 1:]
        own, source = (square - mean.square()).clamp(min=0).split((1, 2), dim=1)
        gain = (covariance / (source + tiny)).clamp(min=0)
        distortion = (own - gain * covariance).clamp(min=0)
        there = torch.log1p(source / noise)
        kept = torch.minimum(torch.log1p(gain.square() * source / (distortion + noise)), there)
        smaller = gain.argmin(dim=1, keepdim=True)
        kept, there = (x.gather(1, smaller).sum(dim=(1, 2, 3)) + tiny for x in (kept, there))
        score = score + weight / 2.15 * kept / there
    return score


def _gaussian(maps: Tensor, size: int, sigma: float, stride: int = 1) -> Tensor:
    """Filters Tensor[B, C, H, W] with Gaussians of `size` taps a side, where these lie in the image."""
    rows, columns = (_gaussian_rows(length, size, sigma, stride, maps) for length in maps.shape[2:])
    with torch.autocast(maps.device.type, enabled=False):  # variances are small differences
        return rows @ maps @ columns.mT


def _gaussian_rows(length: int, size: int, sigma: float, stride: int, like: Tensor) -> Tensor:
    """Tensor[(length - size) // stride + 1, length] that filters a line of so many pixels."""
    starts = torch.arange(0, length - size + 1, stride, device=like.device)[:, None]
    distance = torch.arange(length, device=like.device) - starts
    inside = (distance >= 0) & (distance < size)
    return torch.where(inside, gaussian_window(size, sigma, like)[distance.clamp(0, size - 1)], 0)
