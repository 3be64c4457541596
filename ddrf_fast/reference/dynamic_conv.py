"""dynamic_conv and its gradients in plain torch: the specification.

    W_b = out_scale_b . in_scale_b . tap_scale_b . sum_k attention[b, k] weight[k]
    y_b = act(conv2d(cat(x_b, code_b), W_b) + sum_k attention[b, k] bias[k])

The convolution is written as a matrix product over unfolded patches, so that every sample may have its own
kernel and the batch size appears nowhere but in the batch dimension:

    y = W c + beta          c = unfold(cat(x, code)) [B, g, K, P],  K = I'/g kh kw,  P = H' W'
    dc = W^T dy             dx, dcode = fold(dc)
    dW = dy c^T             contracted with the bank: dweight, dattention, and the three scales

Kernels are mixed in float32 (float64 for float64) and rounded once; the scales may be float32 where the other
tensors are shorter. Arguments are those of the raw operator `ddrf_fast::dynamic_conv` (ops/dynamic_conv.py);
`attention=None` means that `weight` [B, O, I', kh, kw] and `bias` [B, O] are each sample's own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.reference._common import accumulation_dtype, in_layout_of

LEAKY_SLOPE = 0.01


def _mix(bank: Tensor, attention: Tensor | None) -> Tensor:
    """sum_k attention[b, k(, o)] bank[k, o, ...] -> [B, O, ...], in the accumulation dtype."""
    dtype = accumulation_dtype(bank.dtype)
    if attention is None:
        return bank.to(dtype)
    subscripts = "bno,no...->bo..." if attention.dim() == 3 else "bn,no...->bo..."
    return torch.einsum(subscripts, attention.to(dtype), bank.to(dtype))


def _scales(
    weight: Tensor, in_scale: Tensor | None, out_scale: Tensor | None, tap_scale: Tensor | None, groups: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The three scales in the accumulation dtype, each shaped to multiply W_b [B, O, I'/g, kh, kw]."""
    dtype = accumulation_dtype(weight.dtype)
    out_channels, in_per_group = weight.shape[1:3]
    if in_scale is not None:
        # x's channels only: code channels, which come after them, keep their weight.
        padded = F.pad(in_scale.to(dtype), (0, groups * in_per_group - in_scale.shape[1]), value=1.0)
        per_group = padded.unflatten(1, (groups, in_per_group))
        in_scale = per_group.repeat_interleave(out_channels // groups, dim=1)[..., None, None]
    if out_scale is not None:
        out_scale = out_scale.to(dtype)[:, :, None, None, None]
    if tap_scale is not None:
        tap_scale = tap_scale.to(dtype)[:, None, None]
    return in_scale, out_scale, tap_scale


def _product(first: Tensor, *others: Tensor | None) -> Tensor:
    for other in others:
        if other is not None:
            first = first * other
    return first


def _with_code(x: Tensor, code: Tensor | None) -> Tensor:
    if code is None:
        return x
    return torch.cat((x, code[:, :, None, None].expand(-1, -1, *x.shape[2:])), dim=1)


def _columns(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Patches [B, g, I'/g kh kw, P]."""
    columns = F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    return columns.unflatten(1, (groups, columns.shape[1] // groups))


def output_size(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Sequence[int]:
    """(H', W') of the convolution."""
    return [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]


def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    attention: Tensor | None,
    bias: Tensor | None,
    code: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    tap_scale: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """y [B, O, H', W'] of the equation above, in x's dtype and memory format."""
    kernel = weight.shape[3:]
    mixed = _product(_mix(weight, attention), *_scales(weight, in_scale, out_scale, tap_scale, groups)).to(
        x.dtype
    )
    columns = _columns(_with_code(x, code), kernel, stride, padding, dilation, groups)
    # Shapes are spelled out (no -1), so that empty batches work too.
    matrix = mixed.reshape(x.shape[0], groups, mixed.shape[1] // groups, columns.shape[2])
    y = torch.matmul(matrix, columns)
    y = y.reshape(x.shape[0], mixed.shape[1], *output_size(x, kernel, stride, padding, dilation))
    if bias is not None:
        y = (y + _mix(bias, attention)[:, :, None, None]).to(x.dtype)
    if activation == "relu":
        y = F.relu(y)
    elif activation == "leaky_relu":
        y = F.leaky_relu(y, LEAKY_SLOPE)
    return in_layout_of(x, y)


def dynamic_conv_mean(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """y as above, and its mean over the pixels [B, O], summed in the accumulation dtype."""
    y = dynamic_conv(x, *args)
    return y, spatial_mean(y)


def spatial_mean(y: Tensor) -> Tensor:
    """[B, C] of [B, C, H, W], in y's dtype."""
    # Torch sums bfloat16 and float16 in float32 and rounds once; asked to by `dtype`, it would make the
    # gradient in float32 as well.
    return y.mean(dim=(2, 3))


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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: int,
) -> tuple[Tensor, ...]:
    """Gradients of the eight tensors, given that of the linear output; (0,) where not asked for."""
    tensors = (x, weight, attention, bias, code, in_scale, out_scale, tap_scale)
    wanted = [bool(output_mask >> i & 1) for i in range(8)]
    want_x, want_weight, want_attention, want_bias, want_code, want_in, want_out, want_tap = wanted
    batch, in_channels = x.shape[:2]
    kernel = weight.shape[3:]
    grads: list[Tensor] = [x.new_empty((0,)) for _ in wanted]
    grad_rows = grad.reshape(batch, groups, grad.shape[1] // groups, grad.shape[2] * grad.shape[3])

    shared = _mix(weight, attention)
    in_factor, out_factor, tap_factor = _scales(weight, in_scale, out_scale, tap_scale, groups)

    if want_x or want_code:
        mixed = _product(shared, in_factor, out_factor, tap_factor).to(x.dtype)
        matrix = mixed.reshape(batch, groups, mixed.shape[1] // groups, math.prod(weight.shape[2:]))
        grad_columns = torch.matmul(matrix.transpose(2, 3), grad_rows).flatten(1, 2)
        grad_input = F.fold(
            grad_columns, x.shape[2:], tuple(kernel), tuple(dilation), tuple(padding), tuple(stride)
        )
        if want_x:
            grads[0] = in_layout_of(x, grad_input[:, :in_channels])
        if want_code:
            grads[4] = grad_input[:, in_channels:].sum(dim=(2, 3))

    if want_weight or want_attention or want_in or want_out or want_tap:
        columns = _columns(_with_code(x, code), kernel, stride, padding, dilation, groups)
        grad_mixed = torch.matmul(grad_rows, columns.transpose(2, 3)).reshape(shared.shape).to(shared.dtype)
        if want_in:
            per_channel = _product(grad_mixed * shared, out_factor, tap_factor).sum(dim=(3, 4))
            per_channel = per_channel.unflatten(1, (groups, per_channel.shape[1] // groups)).sum(dim=2)
            grads[5] = per_channel.flatten(1)[:, :in_channels]
        if want_out:
            grads[6] = _product(grad_mixed * shared, in_factor, tap_factor).sum(dim=(2, 3, 4))
        if want_tap:
            grads[7] = _product(grad_mixed * shared, in_factor, out_factor).sum(dim=(1, 2))
        grad_shared = _product(grad_mixed, in_factor, out_factor, tap_factor)
        if want_weight:
            grads[1] = _spread(grad_shared, attention)
        if want_attention:
            grads[2] = _contract(grad_shared, weight, attention)

    if want_bias or (want_attention and bias is not None):
        grad_beta = grad_rows.to(shared.dtype).sum(dim=3).flatten(1)
        if want_bias:
            grads[3] = _spread(grad_beta, attention)
        if want_attention and bias is not None:
            grads[2] = grads[2] + _contract(grad_beta, bias, attention)

    grads = [g if t is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
    return grads[0], *(g.contiguous() for g in grads[1:])


def _spread(grad_mixed: Tensor, attention: Tensor | None) -> Tensor:
    """The gradient of the bank: sum_b attention[b, k(, o)] grad_mixed[b, o, ...] -> [N, O, ...]."""
    if attention is None:
        return grad_mixed
    subscripts = "bno,bo...->no..." if attention.dim() == 3 else "bn,bo...->no..."
    return torch.einsum(subscripts, attention.to(grad_mixed.dtype), grad_mixed)


def _contract(grad_mixed: Tensor, bank: Tensor, attention: Tensor | None) -> Tensor:
    """The gradient of the attention: <grad_mixed[b], bank[k]>, over everything or for each output channel."""
    assert attention is not None
    subscripts = "bop,nop->bno" if attention.dim() == 3 else "bop,nop->bn"
    # A bias has no dimension after the output channel: give both one.
    grad_mixed, bank = (t[..., None].flatten(2) for t in (grad_mixed, bank.to(grad_mixed.dtype)))
    return torch.einsum(subscripts, grad_mixed, bank)


def plan(op: str, *args: Any) -> str:
    """How it runs, for `explain`."""
    return "unfolded patches, and a matrix product for each sample and group"
