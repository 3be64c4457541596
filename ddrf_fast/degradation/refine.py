"""Refining a restoration whose degradation is known, until it explains the degraded image."""

import math

import torch
from torch import Tensor

from ddrf_fast.degradation.recipe import Degradation
from ddrf_fast.ops.degrade import degrade
from ddrf_fast.ops.degrade_adjoint import degrade_adjoint
from ddrf_fast.reference._common import unit_range

ROUNDING_STD = 1 / 255 / math.sqrt(12)  # of the error of an image that was rounded to 8 bit


def refine(
    restored: Tensor,
    degraded: Tensor,
    degradation: Degradation,
    *,
    error_std: float = 0.012,
    steps: int = 8,
) -> Tensor:
    r"""Corrects a restoration such that, degraded again, it is the degraded image.

    .. math::
        \arg\min_x \; \|A x - y\|^2 / \sigma^2 + \|x - \hat x\|^2 / e^2

    by conjugate gradients from :math:`\hat x`, the restoration. A is the known blur, which may vary over the
    image, with the down-sampling (:func:`ddrf_fast.degrade`); y the degraded image; σ its noise, and at least
    that of rounding to 8 bit; e how far the restoration is expected to be off. Such a data term is the second
    half of plug-and-play restoration (Zhang et al., "Plug-and-Play Image Restoration with Deep Denoiser
    Prior", 2021), with the network's result in the place of the denoiser's. The less noise there is the more
    it corrects: a blur without noise by decibels, a noisy image hardly at all. A kernel that is not the true
    one leaves rings.

    Args:
        restored: Tensor[B, C, H, W] in [0, 1], what a network made of the degraded images.
        degraded: Tensor[B, C, ceil(H / scale), ceil(W / scale)] in [0, 1], on the same device.
        degradation: how each of them was degraded; its seed does not matter.
        error_std: e, the expected standard deviation of the restoration's error (38 dB). Larger numbers
            trust the degraded image more, and bring noise back.
        steps: of conjugate gradients; each is a blur and its transpose.

    Returns:
        Tensor[B, C, H, W] in the dtype of ``restored``, not clipped; computed in float32 or more.

    Raises:
        ValueError: the shapes do not fit together, ``error_std`` is not positive, there are fewer steps than
            one, or the degradation darkens: that is not linear.

    Example:
        >>> from ddrf_fast.degradation import DynamicDegradation
        >>> image = torch.rand(2, 1, 24, 32)
        >>> degraded = DynamicDegradation("paper", spatial=True, noise_std=(0.0, 0.0))(image, seed=0)
        >>> refined = refine(degraded.image, degraded.image, degraded.recipe)
        >>> bool((refined - image).square().mean() < (degraded.image - image).square().mean())
        True
    """
    batch, height, width, scale = len(restored), *restored.shape[-2:], degradation.scale
    expected = [*restored.shape[:2], -(-height // scale), -(-width // scale)]
    if restored.dim() != 4 or list(degraded.shape) != expected:
        raise ValueError(
            f"degraded must be {expected} for restored {list(restored.shape)} at scale {scale}, "
            f"got {list(degraded.shape)}"
        )
    if len(degradation) != batch:
        raise ValueError(f"degradation must be that of {batch} images, got one of {len(degradation)}")
    if degradation.tone is not None:
        raise ValueError("degradation darkens (it has a tone); only blur, down-sampling and noise are linear")
    if not error_std > 0 or steps < 1:
        raise ValueError(f"error_std must be positive and steps at least 1, got {error_std} and {steps}")

    dtype = torch.promote_types(restored.dtype, torch.float32)
    recipe = degradation.to(restored.device)
    kernels, weights = recipe.kernels.to(dtype), recipe.weights.to(dtype)
    padding, grid = recipe.padding, weights.dim() == 4
    variance = recipe.noise_level.to(dtype).square() + ROUNDING_STD**2
    share = (variance / error_std**2).view(-1, 1, 1, 1)

    def blurred(image: Tensor) -> Tensor:
        return degrade(image, kernels, weights, scale=scale, padding=padding, grid=grid)

    def transposed(image: Tensor) -> Tensor:
        return degrade_adjoint(
            image, kernels, weights, size=(height, width), scale=scale, padding=padding, grid=grid
        )

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2, 3), keepdim=True)

    result = unit_range(restored, dtype)
    residual = transposed(unit_range(degraded, dtype) - blurred(result))
    direction, power = residual, dot(residual, residual)
    for _ in range(steps):
        image = transposed(blurred(direction)) + share * direction
        curvature = dot(direction, image)
        # An image that has arrived stays where it is.
        rate = torch.where(curvature > 0, power / curvature, 0)
        result = result + rate * direction
        residual = residual - rate * image
        previous, power = power, dot(residual, residual)
        direction = residual + torch.where(previous > 0, power / previous, 0) * direction
    return result.to(restored.dtype) if restored.is_floating_point() else result
