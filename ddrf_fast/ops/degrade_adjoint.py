"""degrade_adjoint: the transpose of degrade with respect to the image.

    <degrade(x, k, w), y> = <x, degrade_adjoint(y, k, w)>   for every x and y, without noise

Each output pixel is spread over the pixels that it was made of, with the same mixed kernel; what falls into
the padding is folded back onto the pixels that were shown there. It is the image's gradient in the backward
of degrade, so the same kernels compute it. The bilinear form above has no other terms, hence its own
gradients are those of degrade, at the image g that comes back:

    dy = degrade(g, k, w)      dk, dw = those of degrade(g, k, w) for the gradient y

Saved for the backward: the tensors as they came.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ddrf_fast.ops import _backend, _checks, _library
from ddrf_fast.ops.degrade import NO_NOISE, Padding, blur_arguments, call, call_backward

_NO_NOISE = NO_NOISE[:-1]  # of the backward, which has no shot noise


def _adjoint(degraded: Tensor, kernels: Tensor, weights: Tensor, size: tuple[int, int], *rest: Any) -> Tensor:
    """The image's gradient; it depends on the image's size and layout only."""
    shape = (*degraded.shape[:2], *size)
    # Under vmap a tensor does not tell its layout.
    transformed = torch._C._are_functorch_transforms_active()
    image = degraded.new_empty(shape) if transformed else _library.layout_of(degraded, shape)
    return _backend.run("degrade_backward", degraded, image, kernels, weights, *_NO_NOISE, *rest, 1)[0]


class _Adjoint(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _adjoint(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.rest = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        degraded, kernels, weights = ctx.saved_tensors
        scale, offset, *options = ctx.rest
        found: list[Tensor | None] = [None] * 3
        if ctx.needs_input_grad[0]:
            size = tuple(degraded.shape[2:])
            found[0] = call(grad, kernels, weights, *NO_NOISE, scale, offset, size, *options)
        mask = sum(1 << i for i in (1, 2) if ctx.needs_input_grad[i])
        if mask:
            both = call_backward(degraded, grad, kernels, weights, *_NO_NOISE, *ctx.rest, mask)
            found[1:] = [both[i] if ctx.needs_input_grad[i] else None for i in (1, 2)]
        return *found, None, *(None for _ in ctx.rest)


def arguments(
    degraded: Tensor,
    kernels: Tensor,
    weights: Tensor,
    *,
    size: tuple[int, int] | None = None,
    scale: int = 1,
    offset: int = 0,
    padding: Padding = "reflect",
    correlation: bool = False,
    grid: bool = False,
) -> tuple[Any, ...]:
    """Checks the arguments of `degrade_adjoint` and returns those of the raw operator degrade_backward.

    Of the image, in its place, there are the shape and the dtype alone.
    """
    _checks.tensor("degraded", degraded, ["[B, C, H', W']"])
    _checks.tensor("kernels", kernels, ["[M, k, k]", "[B, M, k, k]"])
    _checks.tensor("weights", weights, ["[B, M]", "[B, M, H, W]"])
    degraded, kernels, weights = _library.autocast_to_float32((degraded, kernels, weights))
    scale = _checks.integer("scale", scale, 1)
    if size is None:
        margin = 2 * (kernels.shape[-1] // 2) if padding == "valid" else 0
        height, width = (scale * n + margin for n in degraded.shape[2:])
    else:
        height, width = _checks.pair("size", size, 1)
    scale, offset, out_size, *options = blur_arguments(
        "degraded",
        degraded,
        kernels,
        weights,
        "size",
        (height, width),
        scale=scale,
        offset=offset,
        padding=padding,
        correlation=correlation,
        grid=grid,
    )
    if tuple(degraded.shape[2:]) != tuple(out_size):
        raise ValueError(
            f"degraded must be [B, C, {out_size[0]}, {out_size[1]}], what an image of {height}x{width} is "
            f"degraded to at scale={scale}, got shape {tuple(degraded.shape)}"
        )
    image = degraded.new_empty(()).expand(*degraded.shape[:2], height, width)
    return degraded, image, kernels, weights, *_NO_NOISE, scale, offset, *options, 1


def degrade_adjoint(
    degraded: Tensor,
    kernels: Tensor,
    weights: Tensor,
    *,
    size: tuple[int, int] | None = None,
    scale: int = 1,
    offset: int = 0,
    padding: Padding = "reflect",
    correlation: bool = False,
    grid: bool = False,
) -> Tensor:
    r"""Applies the transpose of :func:`ddrf_fast.degrade`, without noise, as a linear map of the image.

    .. math::
        \langle \mathrm{degrade}(x),\, y \rangle = \langle x,\, \mathrm{degrade\_adjoint}(y) \rangle

    The step back of plug-and-play and unrolled restoration: the gradient of :math:`\frac12\|D x - y\|^2` is
    :math:`D^\top (D x - y)`. Exact for every padding: what was read beyond the border is added back where it
    was read from. In the terms of Escande and Weiss (2017) it is the scatter model to degrade's gather model.
    Differentiable in all three tensors, in reverse and forward mode, to any order.

    Args:
        degraded (Tensor[B, C, H', W']): y, NCHW or channels_last; the result keeps that layout.
        kernels (Tensor[M, k, k] or Tensor[B, M, k, k]): As for degrade.
        weights (Tensor): As for degrade: [B, M], [B, M, H, W], [B, M, H', W'], or with `grid=True` a coarse
            [B, M, gh, gw].
        size: (H, W) of the image; by default the largest of which each s-by-s block has one site: (s H', s
            W'), and with padding="valid" 2 (k // 2) more.
        scale: Down-sampling factor s, at least 1.
        offset: First site, from 0.
        padding: "reflect", "replicate", "circular", "zeros" or "valid", as for degrade.
        correlation: Flips the kernels, as for degrade.
        grid: Whether `weights` is a coarse grid.

    Returns:
        Tensor[B, C, H, W] with the dtype and the layout of `degraded`.

    Dtypes, sums and autocast are those of degrade.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or a value does not fit; the message names it.

    Example:
        Five steps of gradient descent on a data term:

        >>> import torch, ddrf_fast
        >>> image, kernels = torch.rand(1, 3, 32, 32), torch.full((1, 5, 5), 1 / 25)
        >>> weights = torch.ones(1, 1)
        >>> observed = ddrf_fast.degrade(image, kernels, weights, scale=2)
        >>> estimate = torch.zeros_like(image)
        >>> for _ in range(5):
        ...     residual = ddrf_fast.degrade(estimate, kernels, weights, scale=2) - observed
        ...     estimate -= 4 * ddrf_fast.degrade_adjoint(residual, kernels, weights, scale=2)
        >>> estimate.shape
        torch.Size([1, 3, 32, 32])
    """
    raw = arguments(
        degraded,
        kernels,
        weights,
        size=size,
        scale=scale,
        offset=offset,
        padding=padding,
        correlation=correlation,
        grid=grid,
    )
    if _library.in_forward_mode():
        return call_backward(*raw)[0]
    degraded, image, kernels, weights, *rest = raw
    options = rest[len(_NO_NOISE) : -1]
    call_adjoint = _Adjoint.apply if _library.needs_gradient((degraded, kernels, weights)) else _adjoint
    return call_adjoint(degraded, kernels, weights, tuple(image.shape[2:]), *options)
