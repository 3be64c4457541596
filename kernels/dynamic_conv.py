"""dynamic_conv and its gradients in Triton; `ddrf_fast/reference/dynamic_conv.py` is the specification.

    W_b = out_scale_b . in_scale_b . tap_scale_b . sum_k attention[b, k] weight[k]
    y_b = act(W_b * x_b + beta_b)

The raw operators. `_conv_plan` chooses kernels and tiles; `_conv_forward` and `_conv_backward` hold them. The
gradient of x is the forward's product, transposed: with a stride the pixels are taken by residue class, so
that each meets only the taps that reach it. The code's channels are constant over the image, so they are one
channel of ones whose kernel is S_b[t, o] = sum_d W_b[o, I + d, t] code[b, d], of which each pixel collects
the taps that lie inside the image.

Nothing but the arguments is saved from the forward. There are no atomics: every sum has one owner or is made
in two passes whose split depends on the shapes only.

Operations and bytes, with P = H'W' and F = B P O (I/g) T multiply-adds, e bytes an element:
    floor, forward      2 F; read x and the bank, write y: e (B I HW + N O (I/g) T + B O P)
    mixed once          + 2 B N O (I/g) T to mix, a fraction N / P of the floor, and the workspace, written
                        and read: 2 e B O (I/g) T, more than x and y where P < 2 (I/g) T O / (I + O)
    mixed in registers  + the mixing, for each tile of pixels, and N tiles of the bank, from the cache, for
                        each tile of pixels and each group of samples that share a program
    floor, backward     4 F; read x and dy, write dx, read and write the bank
    contracted          + as the forward, for dx; N tiles of the bank for each sample, from the cache
    through D           + as the forward, for dx; D, written once and read twice: 12 B O (I/g) T bytes, of
                        which at most _conv_plan.MAX_MIXED_GRAD_BYTES exist at a time
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import _common
from ._conv_backward import Coefficients, weight_gradients
from ._conv_forward import Kernels, convolve
from ._conv_plan import Problem, choose_convolution, choose_weight_gradient, problem

_TENSOR_NAMES = ("x", "weight", "attention", "bias", "code", "in_scale", "out_scale", "tap_scale")


def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    attention: Tensor | None,
    bias: Tensor | None,
    code: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    tap_scale: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    activation: str,
    means: Tensor | None = None,
) -> Tensor:
    """y [B, O, H', W'] in x's dtype and memory format; the raw operator `ddrf_fast::dynamic_conv`.

    The mean of y over its pixels goes into `means` [B, O], if given.
    """
    p = problem(x, weight, attention, stride, padding, dilation, groups)
    y = _common.empty_like_format(x, (p.batch, p.out_channels, *p.out_size))
    if y.numel():
        kernels = _contiguous(weight, attention, bias, code, in_scale, out_scale, tap_scale)
        convolve(p, x, kernels, y, transposed=False, activation=activation, means=means)
    return y


def dynamic_conv_mean(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """y as above, and its mean over the pixels [B, O] in x's dtype, summed in float32 where y is made."""
    means = x.new_empty((x.shape[0], weight.shape[1]))
    return dynamic_conv(x, weight, *args, means=means), means


def _contiguous(weight: Tensor, *others: Tensor | None) -> Kernels:
    return Kernels(weight.contiguous(), *(t if t is None else t.contiguous() for t in others))


def dynamic_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    attention: Tensor | None,
    bias: Tensor | None,
    code: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    tap_scale: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_mask: int,
) -> tuple[Tensor, ...]:
    """Gradients of the eight tensors for `grad` of the linear output, (0,) where not asked for."""
    tensors = (x, weight, attention, bias, code, in_scale, out_scale, tap_scale)
    wanted = [bool(output_mask >> i & 1) for i in range(len(tensors))]
    want_x, want_weight, want_attention, want_bias, want_code, want_in, want_out, want_tap = wanted
    if grad.numel() == 0:
        return tuple(
            torch.zeros_like(t) if want and t is not None else (x if t is None else t).new_empty((0,))
            for t, want in zip(tensors, wanted, strict=True)
        )
    p = problem(x, weight, attention, stride, padding, dilation, groups)
    kernels = _contiguous(weight, attention, bias, code, in_scale, out_scale, tap_scale)
    grads = [x.new_empty((0,)) for _ in tensors]

    if want_x:
        grads[0] = _common.empty_like_format(x, tuple(x.shape))
        convolve(p, grad, kernels, grads[0], transposed=True)

    # Coefficients in float32 from here on: they are small, and so are their gradients.
    attention_f, code_f, in_f, out_f = (
        t if t is None else t.float()
        for t in (kernels.attention, kernels.code, kernels.in_scale, kernels.out_scale)
    )
    tap_f = None if kernels.tap_scale is None else kernels.tap_scale.float().flatten(1)
    extended = _extended_scale(p, in_f, code_f)
    want_channels = want_code or want_in or want_tap
    grad_attention: Tensor | None = None
    if want_weight or want_attention or want_out or want_channels:
        first = 0 if want_in or want_tap else p.in_channels
        found = weight_gradients(
            p,
            grad,
            x,
            kernels.weight,
            Coefficients(attention_f, extended, out_f, tap_f),
            want_bank=want_weight,
            want_entries=want_attention or want_out,
            first_channel=first if want_channels else None,
        )
        if found.bank is not None:
            grads[1] = found.bank
        if found.entries is not None:
            grad_attention = found.entries if out_f is None else found.entries * out_f[:, None]
            if not p.per_channel:
                grad_attention = grad_attention.sum(2)
            if want_out:
                grads[6] = _weigh(found.entries, attention_f)
        if found.channels is not None:
            by_tap = found.channels
            by_channel = (by_tap if tap_f is None else by_tap * tap_f[:, None]).sum(2)
            if want_code:
                grads[4] = by_channel[:, p.in_channels :]
            if want_in:
                grads[5] = by_channel[:, : p.in_channels]
            if want_tap:
                scaled = by_tap if extended is None else by_tap * extended[:, :, None]
                grads[7] = scaled.sum(1).view(p.batch, *p.kernel)

    if bias is not None and (want_bias or want_attention):
        grad_beta = grad.sum((2, 3), dtype=torch.float32)
        if want_bias:
            grads[3] = _spread(grad_beta, attention_f)
        if grad_attention is not None and want_attention:
            by_channel = grad_beta[:, None] * bias.float()
            grad_attention = grad_attention + (by_channel if p.per_channel else by_channel.sum(2))
    if grad_attention is not None and want_attention:
        grads[2] = grad_attention
    grads = [g if t is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
    return tuple(g.contiguous() if i else g for i, g in enumerate(grads))


def _extended_scale(p: Problem, in_scale: Tensor | None, code: Tensor | None) -> Tensor | None:
    """The scale [B, I + D] of all input channels: in_scale or ones, then the code; None where all are one."""
    if code is None or not p.code_channels:
        return in_scale
    return torch.cat(
        (torch.ones_like(code[:, :1]).expand(-1, p.in_channels) if in_scale is None else in_scale, code),
        dim=1,
    )


def _weigh(sums: Tensor, attention: Tensor | None) -> Tensor:
    """sum_k attention[b, k(, o)] sums[b, k, o]."""
    if attention is None:
        return sums[:, 0]
    return (sums * (attention if attention.dim() == 3 else attention[:, :, None])).sum(1)


def _spread(grad_beta: Tensor, attention: Tensor | None) -> Tensor:
    """sum_b attention[b, k(, o)] grad_beta[b, o]."""
    if attention is None:
        return grad_beta
    return ((attention if attention.dim() == 3 else attention[:, :, None]) * grad_beta[:, None]).sum(0)


def plan(op_name: str, *args: Any) -> str:
    """In words, which kernels and tiles the raw operator `op_name` takes for `args`."""
    backward = op_name.endswith("_backward")
    tensors, (stride, padding, dilation, groups) = (
        (args[1:9], args[9:13]) if backward else (args[:8], args[8:12])
    )
    x, weight, attention, _, _, in_scale, _, tap_scale = tensors
    p = problem(x, weight, attention, stride, padding, dilation, groups)
    if 0 in (p.batch, *p.out_size):
        return "nothing to compute"
    if not backward:
        y = _common.empty_like_format(x, (p.batch, p.out_channels, *p.out_size), device="meta")
        text = str(choose_convolution(p, x, y, transposed=False))
        if p.code_channels:
            text += "; the code by a small kernel"
        if op_name.endswith("_mean"):
            text += "; the mean in the epilogue"
        return text
    grad, mask = args[0], args[13]
    parts = []
    if mask & 1:
        parts.append(f"x: {choose_convolution(p, grad, x, transposed=True)}")
    if mask & ~1 & ~(1 << 3):
        scaled = p.code_channels > 0 or in_scale is not None or tap_scale is not None
        parts.append(f"the others: {choose_weight_gradient(p, grad, x, scaled=scaled)}")
    return "\n".join(parts)


def unsupported(op_name: str, *args: Any) -> str | None:
    """Why these kernels cannot run the raw operator `op_name` on `args`; None when they can."""
    tensors = args[1:9] if op_name.endswith("_backward") else args[:8]
    x, weight = tensors[:2]
    reason = _common.unsupported_tensor("x", x)
    if reason is not None:
        return reason
    for name, tensor in zip(_TENSOR_NAMES[1:], tensors[1:], strict=True):
        wide_scale = name.endswith("_scale") and tensor is not None and tensor.dtype == torch.float32
        if tensor is not None and tensor.dtype != x.dtype and not wide_scale:
            return f"{name} is {tensor.dtype} and x is {x.dtype}; the Triton kernels take one dtype"
    if math.prod(x.shape[2:]) > _common.MAX_INT32 or math.prod(weight.shape[1:]) > _common.MAX_INT32:
        return "an image or a kernel has more than 2^31 - 1 elements"
    return None
