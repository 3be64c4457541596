"""dynamic_conv and its gradients in Triton; `ddrf_fast/reference/dynamic_conv.py` is the specification.

    W_b = out_scale_b . in_scale_b . tap_scale_b . sum_k attention[b, k] weight[k]
    y_b = act(W_b * x_b + beta_b)

Forward: W_b is mixed once into a workspace [B, O, T, I/g] (T = kh kw taps, channels innermost, x's dtype),
then an implicit matrix product per sample and group multiplies pixels by channels: M = output pixels, N =
output channels, K = taps times input channels. Bias, code and activation are its epilogue. Few channels a
group (depthwise, a first layer) take a direct kernel instead. The code's channels are constant over the
image, so they are one channel of ones whose kernel is S_b[t, o] = sum_d W_b[o, I + d, t] code[b, d], of which
each pixel collects the taps that lie inside the image.

Backward: dx is the same product, transposed; with a stride the pixels are taken by residue class, so that
each meets only the taps that reach it. For the rest, dW_b is accumulated tile by tile over the pixels into D
[B, O, T, I/g (+ 1)], float32: the gradient of the kernel as if all scales were one, and of the channel of
ones last, which makes the code a scale of its own (`extended = cat(in_scale, code)`). D is read twice more:

    dweight    = sum_b      D extended out_scale tap_scale attention[b, k]
    E[b, k, o] = sum_{i, t} D extended tap_scale weight[k]             ->  dattention, dout_scale
    Q[b, i, t] = sum_o      D out_scale sum_k attention[b, k] weight[k]  ->  din_scale, dcode, dtap_scale

Nothing but the arguments is saved from the forward. There are no atomics: every sum has one owner or is made
in two passes whose split depends on the shapes only.

Operations and bytes, with P = H'W' and F = B P O (I/g) T multiply-adds, e bytes an element:
    floor, forward      2 F; read x and the bank, write y: e (B I HW + N O (I/g) T + B O P)
    this file, forward  + 2 B N O (I/g) T to mix, a fraction N / P of the floor, and the workspace, written
                        and read: 2 e B O (I/g) T, more than x and y where P < 2 (I/g) T O / (I + O): 3x3
                        kernels on maps up to 28x28 with hundreds of channels are bound by it.
    floor, backward     4 F; read x and dy, write dx, read and write the bank
    this file, backward 4 F + the workspace again + D, written once and read twice: 12 B O (I/g) T bytes
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common


class Tile(NamedTuple):
    """The configuration of a matrix product; heuristics shrink the blocks for small problems."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# By architecture and kind of the product: "half" and "tf32" run on tensor cores, "ieee" on the ordinary
# float32 units; "scattered" is half precision whose channels are not innermost in memory, loaded one by one:
# registers are short there.
FORWARD_TILES = {
    "interpreter": dict.fromkeys(("half", "scattered", "tf32", "ieee"), Tile(32, 16, 16, 1, 1)),
    "sm_80": {
        "half": Tile(128, 64, 32, 4, 4),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(128, 64, 32, 8, 3),
        "ieee": Tile(64, 64, 16, 8, 2),
    },
    "sm_90": {
        "half": Tile(128, 128, 64, 8, 3),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(128, 64, 32, 8, 3),
        "ieee": Tile(64, 64, 16, 8, 2),
    },
    "gfx942": {
        "half": Tile(128, 64, 32, 4, 2),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(64, 64, 32, 4, 2),
        "ieee": Tile(64, 64, 16, 4, 2),
    },
}
# M = output channels, N = taps times input channels, K = pixels.
WEIGHT_TILES = {
    "interpreter": dict.fromkeys(("half", "scattered", "tf32", "ieee"), Tile(16, 16, 32, 1, 1)),
    "sm_80": {
        "half": Tile(64, 64, 64, 4, 3),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(64, 64, 32, 4, 3),
        "ieee": Tile(64, 64, 16, 8, 2),
    },
    "sm_90": {
        "half": Tile(64, 128, 64, 4, 3),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(64, 64, 32, 4, 3),
        "ieee": Tile(64, 64, 16, 8, 2),
    },
    "gfx942": {
        "half": Tile(64, 64, 32, 4, 2),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(64, 64, 32, 4, 2),
        "ieee": Tile(64, 64, 16, 4, 2),
    },
}
# How many programs fill the GPU: below it, blocks shrink and sums over pixels are split.
FULL_GRID = {"interpreter": 4, "sm_80": 256, "sm_90": 256, "gfx942": 512}

_TENSOR_NAMES = ("x", "weight", "attention", "bias", "code", "in_scale", "out_scale", "tap_scale")


@triton.jit
def _mix_kernel(
    weight, attention, in_scale, out_scale, tap_scale, mixed,
    batch, num_kernels, attention_stride_b, attention_stride_k,
    OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, WEIGHT_IN: tl.constexpr,
    TAPS: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mixed[b, o, t, i] = W_b[o, i, t]; a program has BLOCK_B samples, BLOCK pairs (o, i), all taps."""
    TILES: tl.constexpr = (OUT_CHANNELS * IN_PER_GROUP + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    pair = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    b = ((pid // TILES) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    pair_ok = pair < OUT_CHANNELS * IN_PER_GROUP
    b_ok = b < batch
    ok = b_ok[:, None] & pair_ok[None, :]
    o = pair // IN_PER_GROUP
    i = pair % IN_PER_GROUP

    factor = tl.full((BLOCK_B, BLOCK), 1.0, tl.float32)
    if in_scale is not None:
        channel = o // (OUT_CHANNELS // GROUPS) * IN_PER_GROUP + i
        factor *= tl.load(in_scale + b[:, None] * (GROUPS * IN_PER_GROUP) + channel[None, :], ok, 0.0).to(
            tl.float32
        )
    if out_scale is not None:
        factor *= tl.load(out_scale + b[:, None] * OUT_CHANNELS + o[None, :], ok, 0.0).to(tl.float32)

    for t in range(TAPS):
        at = (o.to(tl.int64) * WEIGHT_IN + i) * TAPS + t
        if attention is None:
            total = tl.load(
                weight + b[:, None] * (OUT_CHANNELS * WEIGHT_IN * TAPS) + at[None, :], ok, 0.0
            ).to(tl.float32)
        else:
            total = tl.zeros((BLOCK_B, BLOCK), tl.float32)
            kernel = weight + at
            coefficient = attention + b * attention_stride_b
            for _ in range(num_kernels):
                if PER_CHANNEL:
                    a = tl.load(coefficient[:, None] + o[None, :], ok, 0.0).to(tl.float32)
                else:
                    a = tl.load(coefficient, b_ok, 0.0).to(tl.float32)[:, None]
                total += a * tl.load(kernel, pair_ok, 0.0).to(tl.float32)[None, :]
                kernel += OUT_CHANNELS * WEIGHT_IN * TAPS
                coefficient += attention_stride_k
        total *= factor
        if tap_scale is not None:
            total *= tl.load(tap_scale + b * TAPS + t, b_ok, 0.0).to(tl.float32)[:, None]
        to = (b[:, None] * OUT_CHANNELS + o[None, :]) * (TAPS * IN_PER_GROUP) + t * IN_PER_GROUP + i[None, :]
        tl.store(mixed + to, total.to(mixed.dtype.element_ty), ok)


@triton.jit
def _code_kernel(
    weight, attention, code, out_scale, tap_scale, ones_kernel,
    num_kernels, attention_stride_b, attention_stride_k,
    OUT_CHANNELS: tl.constexpr, IN_CHANNELS: tl.constexpr, CODE_CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """S_b[t, o] = sum_d W_b[o, I + d, t] code[b, d], float32: the kernel of the channel of ones."""
    TILES: tl.constexpr = (OUT_CHANNELS + BLOCK_O - 1) // BLOCK_O
    WEIGHT_IN: tl.constexpr = IN_CHANNELS + CODE_CHANNELS
    pid = tl.program_id(0)
    o = (pid % TILES) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = pid // TILES % TAPS
    b = (pid // (TILES * TAPS)).to(tl.int64)
    o_ok = o < OUT_CHANNELS

    total = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, CODE_CHANNELS, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_ok = d < CODE_CHANNELS
        value = tl.load(code + b * CODE_CHANNELS + d, d_ok, 0.0).to(tl.float32)
        kernel = weight + (o.to(tl.int64)[:, None] * WEIGHT_IN + IN_CHANNELS + d[None, :]) * TAPS + t
        if attention is None:
            kernel += b * (OUT_CHANNELS * WEIGHT_IN * TAPS)
            rows = tl.load(kernel, o_ok[:, None] & d_ok[None, :], 0.0).to(tl.float32)
            total += tl.sum(rows * value[None, :], axis=1)
        else:
            coefficient = attention + b * attention_stride_b
            for _ in range(num_kernels):
                if PER_CHANNEL:
                    a = tl.load(coefficient + o, o_ok, 0.0).to(tl.float32)
                else:
                    a = tl.load(coefficient).to(tl.float32)
                rows = tl.load(kernel, o_ok[:, None] & d_ok[None, :], 0.0).to(tl.float32)
                total += a * tl.sum(rows * value[None, :], axis=1)
                kernel += OUT_CHANNELS * WEIGHT_IN * TAPS
                coefficient += attention_stride_k
    if out_scale is not None:
        total *= tl.load(out_scale + b * OUT_CHANNELS + o, o_ok, 0.0).to(tl.float32)
    if tap_scale is not None:
        total *= tl.load(tap_scale + b * TAPS + t).to(tl.float32)
    tl.store(ones_kernel + (b * TAPS + t) * OUT_CHANNELS + o, total, o_ok)


@triton.jit
def _first_tap(
    residue,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The first u < SIZE that reaches this residue: (residue + PADDING - u DILATION) % STRIDE == 0."""
    first = SIZE
    for back in tl.static_range(STEP):
        u = STEP - 1 - back
        first = tl.where((residue + PADDING + u * (STRIDE - DILATION % STRIDE)) % STRIDE == 0, u, first)
    return first


@triton.jit
def _mixed_bias(bias, attention, b, o, ok, num_kernels, attention_stride_b, attention_stride_k,
                OUT_CHANNELS: tl.constexpr, PER_CHANNEL: tl.constexpr):  # fmt: skip
    """beta_b at the output channels o, float32."""
    if attention is None:
        beta = tl.load(bias + b * OUT_CHANNELS + o, ok, 0.0).to(tl.float32)
    else:
        beta = tl.zeros(o.shape, tl.float32)
        entry = bias + o
        coefficient = attention + b * attention_stride_b
        for _ in range(num_kernels):
            if PER_CHANNEL:
                a = tl.load(coefficient + o, ok, 0.0).to(tl.float32)
            else:
                a = tl.load(coefficient).to(tl.float32)
            beta += a * tl.load(entry, ok, 0.0).to(tl.float32)
            entry += OUT_CHANNELS
            coefficient += attention_stride_k
    return beta


@triton.jit
def _activate(values, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        values = tl.maximum(values, 0.0)
    elif ACTIVATION == "leaky_relu":
        values = tl.where(values > 0, values, 0.01 * values)
    return values


# Both convolution kernels compute, with the source x and the destination y (or, TRANSPOSED, the source dy and
# the destination dx), over the taps (u, v) of the destination's residue class: destination[CLASSES q +
# residue] = sum_taps W[tap] source[STRIDE q + shift(tap)] Forward there is one class; transposed the classes
# are the stride's residues and the source advances by one.


@triton.jit
def _conv_dot_kernel(
    source, mixed, bias, attention, ones_kernel, out, source_height, source_width, out_height, out_width,
    rows, columns, source_stride_b, source_stride_c, source_stride_h, source_stride_w, out_stride_b,
    out_stride_c, out_stride_h, out_stride_w, num_kernels, attention_stride_b, attention_stride_k,
    OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, KH: tl.constexpr, KW:
    tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_M destination pixels of one sample and class, and BLOCK_N channels of one group."""
    OUT_PER_GROUP: tl.constexpr = OUT_CHANNELS // GROUPS
    TAPS: tl.constexpr = KH * KW
    if TRANSPOSED:
        N: tl.constexpr = IN_PER_GROUP
        K: tl.constexpr = OUT_PER_GROUP
        CLASSES_H: tl.constexpr = STRIDE_H
        CLASSES_W: tl.constexpr = STRIDE_W
    else:
        N: tl.constexpr = OUT_PER_GROUP
        K: tl.constexpr = IN_PER_GROUP
        CLASSES_H: tl.constexpr = 1
        CLASSES_W: tl.constexpr = 1
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows * columns, BLOCK_M)
    n = (pid % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // TILES_N
    pixel = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // tiles_m
    residue_h = pid % CLASSES_H
    residue_w = pid // CLASSES_H % CLASSES_W
    pid = pid // (CLASSES_H * CLASSES_W)
    g = pid % GROUPS
    b = (pid // GROUPS).to(tl.int64)
    qy = pixel // columns
    qx = pixel % columns
    pixel_ok = pixel < rows * columns
    n_ok = n < N

    if TRANSPOSED and STRIDE_H * STRIDE_W > 1:
        first_u = _first_tap(residue_h, PAD_H, DILATION_H, STRIDE_H, STEP_H, KH)
        first_v = _first_tap(residue_w, PAD_W, DILATION_W, STRIDE_W, STEP_W, KW)
        count_u = tl.cdiv(KH - first_u, STEP_H)
        count_v = tl.cdiv(KW - first_v, STEP_W)
    else:
        first_u = 0
        first_v = 0
        count_u = KH
        count_v = KW

    mixed += b * (OUT_CHANNELS * TAPS * IN_PER_GROUP) + g.to(tl.int64) * (OUT_PER_GROUP * TAPS * IN_PER_GROUP)
    source += b * source_stride_b + (g * K).to(tl.int64) * source_stride_c
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ones_kernel is not None:
        # The channel of ones is a product too: whether a tap lies inside, times its kernel.
        for start in range(0, TAPS, 16):
            t = start + tl.arange(0, 16)
            iy = qy[:, None] * STRIDE_H - PAD_H + (t // KW * DILATION_H)[None, :]
            ix = qx[:, None] * STRIDE_W - PAD_W + (t % KW * DILATION_W)[None, :]
            inside = (iy >= 0) & (iy < source_height) & (ix >= 0) & (ix < source_width)
            kernel = tl.load(
                ones_kernel + (b * TAPS + t)[:, None] * OUT_CHANNELS + n[None, :],
                (t < TAPS)[:, None] & n_ok[None, :],
                0.0,
            )
            acc = tl.dot(inside.to(tl.float32), kernel, acc, input_precision=PRECISION)

    # One flat loop over taps and channels, which is what the compiler pipelines.
    for step in range(count_u * count_v * K_BLOCKS):
        tap = step // K_BLOCKS
        u = first_u + tap // count_v * STEP_H
        v = first_v + tap % count_v * STEP_W
        k = step % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
        k_ok = k < K
        if TRANSPOSED:
            iy = qy + (residue_h + PAD_H - u * DILATION_H) // STRIDE_H
            ix = qx + (residue_w + PAD_W - v * DILATION_W) // STRIDE_W
            at = (k * (TAPS * IN_PER_GROUP))[:, None] + ((u * KW + v) * IN_PER_GROUP + n)[None, :]
        else:
            iy = qy * STRIDE_H - PAD_H + u * DILATION_H
            ix = qx * STRIDE_W - PAD_W + v * DILATION_W
            at = ((u * KW + v) * IN_PER_GROUP + k)[:, None] + (n * (TAPS * IN_PER_GROUP))[None, :]
        inside = pixel_ok & (iy >= 0) & (iy < source_height) & (ix >= 0) & (ix < source_width)
        place = iy.to(tl.int64) * source_stride_h + ix.to(tl.int64) * source_stride_w
        values = tl.load(
            source + place[:, None] + (k.to(tl.int64) * source_stride_c)[None, :],
            inside[:, None] & k_ok[None, :],
            0.0,
        )
        kernel = tl.load(mixed + at, k_ok[:, None] & n_ok[None, :], 0.0)
        acc = tl.dot(values.to(DOT_DTYPE), kernel.to(DOT_DTYPE), acc, input_precision=PRECISION)

    channel = g * N + n
    if bias is not None:
        acc += _mixed_bias(
            bias,
            attention,
            b,
            channel,
            n_ok,
            num_kernels,
            attention_stride_b,
            attention_stride_k,
            OUT_CHANNELS,
            PER_CHANNEL,
        )[None, :]
    acc = _activate(acc, ACTIVATION)
    y = qy * CLASSES_H + residue_h
    x = qx * CLASSES_W + residue_w
    out += b * out_stride_b + y.to(tl.int64)[:, None] * out_stride_h + x.to(tl.int64)[:, None] * out_stride_w
    out += channel.to(tl.int64)[None, :] * out_stride_c
    tl.store(
        out,
        acc.to(out.dtype.element_ty),
        (pixel_ok & (y < out_height) & (x < out_width))[:, None] & n_ok[None, :],
    )


@triton.jit
def _conv_direct_kernel(
    source, mixed, bias, attention, ones_kernel, out, source_height, source_width, out_height, out_width,
    rows, columns, source_stride_b, source_stride_c, source_stride_h, source_stride_w, out_stride_b,
    out_stride_c, out_stride_h, out_stride_w, num_kernels, attention_stride_b, attention_stride_k,
    OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, KH: tl.constexpr, KW:
    tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M destination pixels of one sample and class, and BLOCK_N channels of any groups, a program."""
    OUT_PER_GROUP: tl.constexpr = OUT_CHANNELS // GROUPS
    TAPS: tl.constexpr = KH * KW
    if TRANSPOSED:
        N: tl.constexpr = IN_PER_GROUP
        K: tl.constexpr = OUT_PER_GROUP
        CLASSES_H: tl.constexpr = STRIDE_H
        CLASSES_W: tl.constexpr = STRIDE_W
    else:
        N: tl.constexpr = OUT_PER_GROUP
        K: tl.constexpr = IN_PER_GROUP
        CLASSES_H: tl.constexpr = 1
        CLASSES_W: tl.constexpr = 1
    TILES_N: tl.constexpr = (GROUPS * N + BLOCK_N - 1) // BLOCK_N

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows * columns, BLOCK_M)
    channel = (pid % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // TILES_N
    pixel = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // tiles_m
    residue_h = pid % CLASSES_H
    residue_w = pid // CLASSES_H % CLASSES_W
    b = (pid // (CLASSES_H * CLASSES_W)).to(tl.int64)
    qy = pixel // columns
    qx = pixel % columns
    pixel_ok = pixel < rows * columns
    channel_ok = channel < GROUPS * N
    if GROUPS == 1:
        # All channels read the same source channels: one column of them, which is broadcast.
        first_k = tl.zeros((1,), tl.int32)
        first_ok = tl.full((1,), True, tl.int1)
    else:
        first_k = channel // N * K
        first_ok = channel_ok

    source += b * source_stride_b + first_k.to(tl.int64)[None, :] * source_stride_c
    mixed += b * (OUT_CHANNELS * TAPS * IN_PER_GROUP)
    if TRANSPOSED:
        mixed += (channel // N * K).to(tl.int64) * (TAPS * IN_PER_GROUP) + channel % N
    else:
        mixed += channel.to(tl.int64) * (TAPS * IN_PER_GROUP)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for u in range(KH):
        for v in range(KW):
            if TRANSPOSED:
                up = residue_h + PAD_H - u * DILATION_H
                left = residue_w + PAD_W - v * DILATION_W
                iy = qy + up // STRIDE_H
                ix = qx + left // STRIDE_W
                reaches = (up % STRIDE_H == 0) & (left % STRIDE_W == 0)
            else:
                iy = qy * STRIDE_H - PAD_H + u * DILATION_H
                ix = qx * STRIDE_W - PAD_W + v * DILATION_W
                reaches = True
            if reaches:
                inside = pixel_ok & (iy >= 0) & (iy < source_height) & (ix >= 0) & (ix < source_width)
                place = (
                    source + (iy.to(tl.int64) * source_stride_h + ix.to(tl.int64) * source_stride_w)[:, None]
                )
                kernel = mixed + (u * KW + v) * IN_PER_GROUP
                for _ in range(K):
                    values = tl.load(place, inside[:, None] & first_ok[None, :], 0.0).to(tl.float32)
                    acc += values * tl.load(kernel, channel_ok, 0.0).to(tl.float32)[None, :]
                    place += source_stride_c
                    kernel += TAPS * IN_PER_GROUP if TRANSPOSED else 1
                if ones_kernel is not None:
                    ones = tl.load(
                        ones_kernel + (b * TAPS + u * KW + v) * OUT_CHANNELS + channel, channel_ok, 0.0
                    )
                    acc += inside.to(tl.float32)[:, None] * ones[None, :]

    if bias is not None:
        acc += _mixed_bias(
            bias, attention, b, channel, channel_ok, num_kernels, attention_stride_b, attention_stride_k,
            OUT_CHANNELS, PER_CHANNEL,
        )[None, :]  # fmt: skip
    acc = _activate(acc, ACTIVATION)
    y = qy * CLASSES_H + residue_h
    x = qx * CLASSES_W + residue_w
    out += b * out_stride_b + y.to(tl.int64)[:, None] * out_stride_h + x.to(tl.int64)[:, None] * out_stride_w
    out += channel.to(tl.int64)[None, :] * out_stride_c
    ok = (pixel_ok & (y < out_height) & (x < out_width))[:, None] & channel_ok[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), ok)


@triton.jit
def _weight_dot_kernel(
    grad, x, partial, batch, height, width, out_height, out_width, pixels_per_split, grad_stride_b,
    grad_stride_c, grad_stride_h, grad_stride_w, x_stride_b, x_stride_c, x_stride_h, x_stride_w, OUT_CHANNELS:
    tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, ROW: tl.constexpr, KH: tl.constexpr, KW:
    tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, b, o, t, i] = sum_p grad[b, o, p] x[b, i, p at tap t], over the split's pixels."""
    OUT_PER_GROUP: tl.constexpr = OUT_CHANNELS // GROUPS
    TAPS: tl.constexpr = KH * KW
    TILES_M: tl.constexpr = (OUT_PER_GROUP + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (TAPS * IN_PER_GROUP + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    n = (pid % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // TILES_N
    m = (pid % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // TILES_M
    g = pid % GROUPS
    pid = pid // GROUPS
    b = (pid % batch).to(tl.int64)
    split = (pid // batch).to(tl.int64)
    m_ok = m < OUT_PER_GROUP
    n_ok = n < TAPS * IN_PER_GROUP
    t = n // IN_PER_GROUP
    i = n % IN_PER_GROUP
    down = t // KW * DILATION_H - PAD_H
    right = t % KW * DILATION_W - PAD_W

    grad += b * grad_stride_b + (g * OUT_PER_GROUP + m).to(tl.int64)[:, None] * grad_stride_c
    x += b * x_stride_b + (g * IN_PER_GROUP + i).to(tl.int64)[None, :] * x_stride_c
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = split.to(tl.int32) * pixels_per_split
    end = tl.minimum(start + pixels_per_split, out_height * out_width)
    for first in range(start, end, BLOCK_K):
        pixel = first + tl.arange(0, BLOCK_K)
        pixel_ok = pixel < end
        oy = pixel // out_width
        ox = pixel % out_width
        to = oy.to(tl.int64) * grad_stride_h + ox.to(tl.int64) * grad_stride_w
        dy = tl.load(grad + to[None, :], m_ok[:, None] & pixel_ok[None, :], 0.0)
        iy = (oy * STRIDE_H)[:, None] + down[None, :]
        ix = (ox * STRIDE_W)[:, None] + right[None, :]
        inside = pixel_ok[:, None] & n_ok[None, :] & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        values = tl.load(x + iy.to(tl.int64) * x_stride_h + ix.to(tl.int64) * x_stride_w, inside, 0.0)
        acc = tl.dot(dy.to(DOT_DTYPE), values.to(DOT_DTYPE), acc, input_precision=PRECISION)
    o = (split * batch + b) * OUT_CHANNELS + g * OUT_PER_GROUP + m
    to = o[:, None] * (TAPS * ROW) + (t * ROW + i)[None, :]
    tl.store(partial + to, acc, m_ok[:, None] & n_ok[None, :])


@triton.jit
def _weight_direct_kernel(
    grad, x, partial, batch, height, width, out_height, out_width, pixels_per_split, grad_stride_b,
    grad_stride_c, grad_stride_h, grad_stride_w, x_stride_b, x_stride_c, x_stride_h, x_stride_w, OUT_CHANNELS:
    tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, ROW: tl.constexpr, KH: tl.constexpr, KW:
    tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The same, one input channel and tap a program; without x, the channel of ones, which comes last."""
    OUT_PER_GROUP: tl.constexpr = OUT_CHANNELS // GROUPS
    TAPS: tl.constexpr = KH * KW
    TILES: tl.constexpr = (OUT_CHANNELS + BLOCK_M - 1) // BLOCK_M
    if x is None:
        COLUMNS: tl.constexpr = 1
    else:
        COLUMNS: tl.constexpr = IN_PER_GROUP
    pid = tl.program_id(0)
    o = (pid % TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // TILES
    t = pid % TAPS
    pid = pid // TAPS
    i = pid % COLUMNS
    pid = pid // COLUMNS
    b = (pid % batch).to(tl.int64)
    split = (pid // batch).to(tl.int64)
    o_ok = o < OUT_CHANNELS
    down = t // KW * DILATION_H - PAD_H
    right = t % KW * DILATION_W - PAD_W
    if GROUPS == 1:
        channel = tl.zeros((1,), tl.int32) + i
        channel_ok = tl.full((1,), True, tl.int1)
    else:
        channel = o // OUT_PER_GROUP * IN_PER_GROUP + i
        channel_ok = o_ok

    acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    start = split.to(tl.int32) * pixels_per_split
    end = tl.minimum(start + pixels_per_split, out_height * out_width)
    for first in range(start, end, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        oy = pixel // out_width
        ox = pixel % out_width
        iy = oy * STRIDE_H + down
        ix = ox * STRIDE_W + right
        inside = (pixel < end) & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        to = b * grad_stride_b + oy.to(tl.int64) * grad_stride_h + ox.to(tl.int64) * grad_stride_w
        dy = tl.load(
            grad + to[:, None] + o.to(tl.int64)[None, :] * grad_stride_c, inside[:, None] & o_ok[None, :], 0.0
        ).to(tl.float32)
        if x is None:
            acc += dy
        else:
            at = b * x_stride_b + iy.to(tl.int64) * x_stride_h + ix.to(tl.int64) * x_stride_w
            acc += dy * tl.load(
                x + at[:, None] + channel.to(tl.int64)[None, :] * x_stride_c,
                inside[:, None] & channel_ok[None, :],
                0.0,
            ).to(tl.float32)
    if x is None:
        i = IN_PER_GROUP
    to = ((split * batch + b) * OUT_CHANNELS + o) * (TAPS * ROW) + t * ROW + i
    tl.store(partial + to, tl.sum(acc, axis=0), o_ok)


@triton.jit
def _bank_grad_kernel(
    mixed_grad, attention, extended, out_scale, tap_scale, grad_weight, batch, num_kernels,
    attention_stride_b, attention_stride_k, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP:
    tl.constexpr, WEIGHT_IN: tl.constexpr, ROW: tl.constexpr, TAPS: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_weight[k, o, i, t] = sum_b attention[b, k(, o)] D extended[b, i] out_scale[b, o] tap_scale[b, t].

    One program has BLOCK pairs (o, i) of one tap and BLOCK_N kernels; without attention, one sample.
    """
    TILES: tl.constexpr = (OUT_CHANNELS * WEIGHT_IN + BLOCK - 1) // BLOCK
    EXTENDED: tl.constexpr = (GROUPS - 1) * IN_PER_GROUP + WEIGHT_IN
    pid = tl.program_id(0)
    pair = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    pid = pid // TILES
    t = pid % TAPS
    pid = pid // TAPS
    ok = pair < OUT_CHANNELS * WEIGHT_IN
    o = pair // WEIGHT_IN
    i = pair % WEIGHT_IN
    channel = o // (OUT_CHANNELS // GROUPS) * IN_PER_GROUP + i
    if attention is None:
        k = pid + tl.arange(0, 1)
        k_ok = k < num_kernels
        first = pid
        last = pid + 1
        total = tl.zeros((1, BLOCK), tl.float32)
    else:
        k = pid * BLOCK_N + tl.arange(0, BLOCK_N)
        k_ok = k < num_kernels
        first = 0
        last = batch
        total = tl.zeros((BLOCK_N, BLOCK), tl.float32)

    at = (o.to(tl.int64) * TAPS + t) * ROW + tl.minimum(i, ROW - 1)
    for sample in range(first, last):
        b = sample + tl.zeros((1,), tl.int64)
        value = tl.load(mixed_grad + b * (OUT_CHANNELS * TAPS * ROW) + at, ok, 0.0)
        if extended is not None:
            value *= tl.load(extended + b * EXTENDED + channel, ok, 0.0)
        if out_scale is not None:
            value *= tl.load(out_scale + b * OUT_CHANNELS + o, ok, 0.0)
        if tap_scale is not None:
            value *= tl.load(tap_scale + b * TAPS + t)
        if attention is None:
            total += value[None, :]
        else:
            coefficient = attention + (b * attention_stride_b + k * attention_stride_k)[:, None]
            if PER_CHANNEL:
                total += tl.load(coefficient + o[None, :], k_ok[:, None] & ok[None, :], 0.0) * value[None, :]
            else:
                total += tl.load(coefficient, k_ok[:, None], 0.0) * value[None, :]
    to = k.to(tl.int64)[:, None] * (OUT_CHANNELS * WEIGHT_IN * TAPS) + (pair.to(tl.int64) * TAPS + t)[None, :]
    tl.store(grad_weight + to, total.to(grad_weight.dtype.element_ty), k_ok[:, None] & ok[None, :])


@triton.jit
def _entry_sums_kernel(
    mixed_grad, weight, extended, tap_scale, entry_sums,
    num_kernels, weight_stride_b,
    OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, WEIGHT_IN: tl.constexpr,
    ROW: tl.constexpr, TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """E[b, k, o] = sum_{i, t} D[b, o, t, i] extended[b, i] tap_scale[b, t] weight[k, o, i, t], for one o."""
    TILES: tl.constexpr = (WEIGHT_IN + BLOCK - 1) // BLOCK
    EXTENDED: tl.constexpr = (GROUPS - 1) * IN_PER_GROUP + WEIGHT_IN
    pid = tl.program_id(0)
    o = (pid % OUT_CHANNELS).to(tl.int64)
    pid = pid // OUT_CHANNELS
    blocks = tl.cdiv(num_kernels, BLOCK_N)
    k = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (pid // blocks).to(tl.int64)
    k_ok = k < num_kernels
    mixed_grad += (b * OUT_CHANNELS + o) * (TAPS * ROW)
    weight += b * weight_stride_b + (k.to(tl.int64) * OUT_CHANNELS + o)[:, None] * (WEIGHT_IN * TAPS)

    total = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    for step in range(TILES * TAPS):
        t = step % TAPS
        i = step // TAPS * BLOCK + tl.arange(0, BLOCK)
        ok = i < WEIGHT_IN
        value = tl.load(mixed_grad + t * ROW + tl.minimum(i, ROW - 1), ok, 0.0)
        if extended is not None:
            channel = o // (OUT_CHANNELS // GROUPS) * IN_PER_GROUP + i
            value *= tl.load(extended + b * EXTENDED + channel, ok, 0.0)
        if tap_scale is not None:
            value *= tl.load(tap_scale + b * TAPS + t)
        entries = tl.load(weight + (i * TAPS + t)[None, :], k_ok[:, None] & ok[None, :], 0.0).to(tl.float32)
        total += entries * value[None, :]
    tl.store(entry_sums + (b * num_kernels + k) * OUT_CHANNELS + o, tl.sum(total, axis=1), k_ok)


@triton.jit
def _channel_sums_kernel(
    mixed_grad, weight, attention, out_scale, channel_sums,
    num_kernels, first_channel, attention_stride_b, attention_stride_k, weight_stride_b,
    OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, WEIGHT_IN: tl.constexpr,
    ROW: tl.constexpr, TAPS: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Q[b, c, t] = sum_o D[b, o, t, c] out_scale[b, o] sum_k attention[b, k(, o)] weight[k, o, c, t]."""
    OUT_PER_GROUP: tl.constexpr = OUT_CHANNELS // GROUPS
    EXTENDED: tl.constexpr = (GROUPS - 1) * IN_PER_GROUP + WEIGHT_IN
    pid = tl.program_id(0)
    tiles = tl.cdiv(EXTENDED - first_channel, BLOCK)
    channel = first_channel + pid % tiles * BLOCK + tl.arange(0, BLOCK)
    pid = pid // tiles
    t = pid % TAPS
    b = (pid // TAPS).to(tl.int64)
    ok = channel < EXTENDED
    g = tl.minimum(channel // IN_PER_GROUP, GROUPS - 1)
    i = channel - g * IN_PER_GROUP
    first_o = (g * OUT_PER_GROUP).to(tl.int64)

    grads = mixed_grad + ((b * OUT_CHANNELS + first_o) * TAPS + t) * ROW + tl.minimum(i, ROW - 1)
    entries = weight + b * weight_stride_b + (first_o * WEIGHT_IN + i) * TAPS + t
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(OUT_PER_GROUP):
        o = first_o + step
        if attention is None:
            entry = tl.load(entries, ok, 0.0).to(tl.float32)
        else:
            entry = tl.zeros((BLOCK,), tl.float32)
            row = entries
            coefficient = attention + b * attention_stride_b
            for _ in range(num_kernels):
                if PER_CHANNEL:
                    a = tl.load(coefficient + o, ok, 0.0)
                else:
                    a = tl.load(coefficient)
                entry += a * tl.load(row, ok, 0.0).to(tl.float32)
                row += OUT_CHANNELS * WEIGHT_IN * TAPS
                coefficient += attention_stride_k
        if out_scale is not None:
            entry *= tl.load(out_scale + b * OUT_CHANNELS + o, ok, 0.0)
        total += entry * tl.load(grads, ok, 0.0)
        grads += TAPS * ROW
        entries += WEIGHT_IN * TAPS
    tl.store(channel_sums + (b * EXTENDED + channel) * TAPS + t, total, ok)


class _Problem(NamedTuple):
    """The sizes of one call, as the kernels' constants."""

    batch: int
    num_kernels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    out_channels: int
    in_channels: int
    groups: int
    weight_in: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def in_per_group(self) -> int:
        return self.in_channels // self.groups

    @property
    def out_per_group(self) -> int:
        return self.out_channels // self.groups

    @property
    def code_channels(self) -> int:
        return self.groups * self.weight_in - self.in_channels

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def uses_dot(self, reduced: int) -> bool:
        """A matrix product pads to 16: with few channels, or few to sum over, it would multiply zeros."""
        return reduced >= 4 and self.in_per_group * self.out_per_group >= 64

    def constants(self) -> dict[str, int]:
        return {"OUT_CHANNELS": self.out_channels, "GROUPS": self.groups, "IN_PER_GROUP": self.in_per_group}

    def geometry(self) -> dict[str, int]:
        pairs = {"K": self.kernel, "STRIDE_": self.stride, "PAD_": self.padding, "DILATION_": self.dilation}
        return {name + axis: pair[i] for name, pair in pairs.items() for i, axis in enumerate("HW")}


def _problem(
    x: Tensor, weight: Tensor, attention: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> _Problem:
    kernel = (weight.shape[3], weight.shape[4])
    out_size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return _Problem(
        batch=x.shape[0],
        num_kernels=1 if attention is None else weight.shape[0],
        in_size=(x.shape[2], x.shape[3]),
        out_size=(out_size[0], out_size[1]),
        out_channels=weight.shape[1],
        in_channels=x.shape[1],
        groups=groups,
        weight_in=weight.shape[2],
        kernel=kernel,
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
    )


def _attention_arguments(attention: Tensor | None) -> tuple[int, int, bool]:
    """Strides over samples and kernels of a contiguous attention, and whether it is per output channel."""
    if attention is None:
        return 0, 0, False
    return attention.stride(0), attention.stride(1), attention.dim() == 3


def _precision(*operands: Tensor) -> tuple[str, str]:
    """The key of the configuration tables, and tl.dot's input_precision, which only float32 looks at."""
    if operands[0].dtype != torch.float32:
        # The code's product is in float32 in any case, and TF32 keeps more bits than the result has.
        return "half" if all(t.stride(1) == 1 for t in operands) else "scattered", "tf32"
    # As for torch's own convolutions; on by default.
    return ("tf32", "tf32") if torch.backends.cudnn.conv.fp32_precision == "tf32" else ("ieee", "ieee")


def _dot_dtype(dtype: torch.dtype, arch: str) -> tl.dtype:
    if arch == "interpreter":  # NumPy has no bfloat16
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _fit(tile: Tile, m: int, n: int, k: int) -> Tile:
    """`tile` without blocks that are mostly empty."""
    return tile._replace(
        block_m=_common.power_of_two(m, 16, tile.block_m),
        block_n=_common.power_of_two(n, 16, tile.block_n),
        block_k=_common.power_of_two(k, 16, tile.block_k),
    )


def _mix(p: _Problem, weight: Tensor, attention: Tensor | None, scales: tuple[Tensor | None, ...]) -> Tensor:
    """W_b [B, O, T, I/g] in the bank's dtype."""
    if attention is None and p.taps == 1 and p.code_channels == 0 and all(s is None for s in scales):
        return weight
    mixed = weight.new_empty((p.batch, p.out_channels, p.taps, p.in_per_group))
    stride_b, stride_k, per_channel = _attention_arguments(attention)
    pairs = p.out_channels * p.in_per_group
    block_b = _common.power_of_two(p.batch, 1, 8)
    block = _common.power_of_two(pairs, 16, 256)
    _common.launch(
        _mix_kernel,
        triton.cdiv(pairs, block) * triton.cdiv(p.batch, block_b),
        weight, attention, *scales, mixed,
        p.batch, p.num_kernels, stride_b, stride_k,
        **p.constants(), WEIGHT_IN=p.weight_in, TAPS=p.taps, PER_CHANNEL=per_channel,
        BLOCK_B=block_b, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return mixed


def _mix_code(
    p: _Problem,
    weight: Tensor,
    attention: Tensor | None,
    code: Tensor,
    out_scale: Tensor | None,
    tap_scale: Tensor | None,
) -> Tensor:
    """S_b [B, T, O] float32."""
    ones_kernel = weight.new_empty((p.batch, p.taps, p.out_channels), dtype=torch.float32)
    stride_b, stride_k, per_channel = _attention_arguments(attention)
    block_o = _common.power_of_two(p.out_channels, 1, 32)
    _common.launch(
        _code_kernel,
        triton.cdiv(p.out_channels, block_o) * p.taps * p.batch,
        weight, attention, code, out_scale, tap_scale, ones_kernel,
        p.num_kernels, stride_b, stride_k,
        OUT_CHANNELS=p.out_channels, IN_CHANNELS=p.in_channels, CODE_CHANNELS=p.code_channels, TAPS=p.taps,
        PER_CHANNEL=per_channel, BLOCK_O=block_o, BLOCK_D=_common.power_of_two(p.code_channels, 1, 64),
        num_warps=4,
    )  # fmt: skip
    return ones_kernel


def _convolve(
    p: _Problem,
    source: Tensor,
    mixed: Tensor,
    out: Tensor,
    *,
    transposed: bool,
    bias: Tensor | None = None,
    attention: Tensor | None = None,
    ones_kernel: Tensor | None = None,
    activation: str = "none",
) -> None:
    """out = the convolution of source with W_b, or transposed, with its epilogue."""
    arch = _common.architecture(source.device)
    classes = p.stride if transposed else (1, 1)
    rows, columns = (triton.cdiv(size, c) for size, c in zip(out.shape[2:], classes, strict=True))
    groups_of_pixels = p.batch * math.prod(classes)
    n, k = (p.in_per_group, p.out_per_group) if transposed else (p.out_per_group, p.in_per_group)
    stride_b, stride_k, per_channel = _attention_arguments(attention)
    steps = [s // math.gcd(s, d) if transposed else 1 for s, d in zip(p.stride, p.dilation, strict=True)]
    arguments = (
        source, mixed, bias, attention, ones_kernel, out,
        *source.shape[2:], *out.shape[2:], rows, columns, *source.stride(), *out.stride(),
        p.num_kernels, stride_b, stride_k,
    )  # fmt: skip
    constants = {
        **p.constants(),
        **p.geometry(),
        "STEP_H": steps[0],
        "STEP_W": steps[1],
        "TRANSPOSED": transposed,
        "PER_CHANNEL": per_channel,
        "ACTIVATION": activation,
    }
    if p.uses_dot(k):
        key, precision = _precision(source)
        tile = _fit(FORWARD_TILES[arch][key], rows * columns, n, k)
        rest = groups_of_pixels * p.groups * triton.cdiv(n, tile.block_n)
        while tile.block_m > 64 and triton.cdiv(rows * columns, tile.block_m) * rest < FULL_GRID[arch]:
            tile = tile._replace(block_m=tile.block_m // 2)
        _common.launch(
            _conv_dot_kernel,
            triton.cdiv(rows * columns, tile.block_m) * rest,
            *arguments,
            **constants,
            PRECISION=precision,
            DOT_DTYPE=_dot_dtype(source.dtype, arch),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    else:
        channels = p.groups * n
        block_m, block_n = _direct_blocks(rows * columns, channels, out.stride(1) == 1, arch)
        _common.launch(
            _conv_direct_kernel,
            triton.cdiv(channels, block_n) * triton.cdiv(rows * columns, block_m) * groups_of_pixels,
            *arguments,
            **constants,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )


def _direct_blocks(pixels: int, channels: int, channels_innermost: bool, arch: str) -> tuple[int, int]:
    """Pixels and channels of a direct program: long along the axis that is contiguous in memory."""
    if arch == "interpreter":
        return 32, 8
    most_pixels, most_channels = (32, 64) if channels_innermost else (256, 8)
    return _common.power_of_two(pixels, 16, most_pixels), _common.power_of_two(channels, 1, most_channels)


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
) -> Tensor:
    """y [B, O, H', W'] in x's dtype and memory format; the raw operator `ddrf_fast::dynamic_conv`."""
    p = _problem(x, weight, attention, stride, padding, dilation, groups)
    y = _common.empty_like_format(x, (p.batch, p.out_channels, *p.out_size))
    if y.numel() == 0:
        return y
    weight, attention, bias, code, in_scale, out_scale, tap_scale = _contiguous(
        weight, attention, bias, code, in_scale, out_scale, tap_scale
    )
    mixed = _mix(p, weight, attention, (in_scale, out_scale, tap_scale))
    ones_kernel = None
    if p.code_channels:
        ones_kernel = _mix_code(p, weight, attention, code, out_scale, tap_scale)
    _convolve(
        p,
        x,
        mixed,
        y,
        transposed=False,
        bias=bias,
        attention=attention,
        ones_kernel=ones_kernel,
        activation=activation,
    )
    return y


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _mixed_grad(p: _Problem, grad: Tensor, x: Tensor) -> Tensor:
    """D [B, O, T, I/g], with a last column for the channel of ones where there is a code; float32."""
    arch = _common.architecture(x.device)
    row = p.in_per_group + bool(p.code_channels)
    pixels = math.prod(p.out_size)
    uses_dot = p.uses_dot(pixels)
    if uses_dot:
        key, precision = _precision(grad, x)
        tile = _fit(WEIGHT_TILES[arch][key], p.out_per_group, p.taps * p.in_per_group, pixels)
        programs = (
            p.groups
            * triton.cdiv(p.out_per_group, tile.block_m)
            * triton.cdiv(p.taps * p.in_per_group, tile.block_n)
        )
        block_p = tile.block_k
    else:
        block_p, block_m = _direct_blocks(pixels, p.out_channels, grad.stride(1) == 1, arch)
        programs = p.in_per_group * p.taps * triton.cdiv(p.out_channels, block_m)
    # The sum over pixels is split until the grid is full, but never below a few blocks each.
    splits = max(1, min(FULL_GRID[arch] // (p.batch * programs), pixels // (4 * block_p)))
    pixels_per_split = triton.cdiv(triton.cdiv(pixels, splits), block_p) * block_p
    splits = triton.cdiv(pixels, pixels_per_split)

    partial = x.new_empty((splits, p.batch, p.out_channels, p.taps, row), dtype=torch.float32)
    sizes = (p.batch, *p.in_size, *p.out_size, pixels_per_split, *grad.stride(), *x.stride())
    constants = {**p.constants(), **p.geometry(), "ROW": row}
    if uses_dot:
        _common.launch(
            _weight_dot_kernel,
            splits * p.batch * programs,
            grad, x, partial, *sizes, **constants,
            PRECISION=precision, DOT_DTYPE=_dot_dtype(x.dtype, arch),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    else:
        _common.launch(
            _weight_direct_kernel, splits * p.batch * programs,
            grad, x, partial, *sizes, **constants, BLOCK_M=block_m, BLOCK_P=block_p, num_warps=4,
        )  # fmt: skip
    if p.code_channels:
        block_p, block_m = _direct_blocks(pixels, p.out_channels, grad.stride(1) == 1, arch)
        _common.launch(
            _weight_direct_kernel, splits * p.batch * p.taps * triton.cdiv(p.out_channels, block_m),
            grad, None, partial, *sizes, **constants, BLOCK_M=block_m, BLOCK_P=block_p, num_warps=4,
        )  # fmt: skip
    return partial.sum(0) if splits > 1 else partial[0]


def _bank_grad(
    p: _Problem,
    mixed_grad: Tensor,
    weight: Tensor,
    attention: Tensor | None,
    extended: Tensor | None,
    out_scale: Tensor | None,
    tap_scale: Tensor | None,
) -> Tensor:
    """The gradient of the bank (of the samples' kernels without attention)."""
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    stride_b, stride_k, per_channel = _attention_arguments(attention)
    rows = weight.shape[0]
    block_n = 1 if attention is None else _common.power_of_two(rows, 1, 16)
    pairs = p.out_channels * p.weight_in
    block = _common.power_of_two(pairs, 16, 2048 // max(block_n, 4))
    _common.launch(
        _bank_grad_kernel,
        triton.cdiv(rows, block_n) * p.taps * triton.cdiv(pairs, block),
        mixed_grad, attention, extended, out_scale, tap_scale, grad_weight,
        p.batch, rows, stride_b, stride_k,
        **p.constants(), WEIGHT_IN=p.weight_in, ROW=mixed_grad.shape[-1], TAPS=p.taps,
        PER_CHANNEL=per_channel, BLOCK_N=block_n, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return grad_weight


def _entry_sums(
    p: _Problem,
    mixed_grad: Tensor,
    weight: Tensor,
    attention: Tensor | None,
    extended: Tensor | None,
    tap_scale: Tensor | None,
) -> Tensor:
    """E [B, N, O] float32; N = 1 without attention."""
    sums = mixed_grad.new_empty((p.batch, p.num_kernels, p.out_channels))
    block_n = _common.power_of_two(p.num_kernels, 1, 16)
    _common.launch(
        _entry_sums_kernel,
        p.batch * p.out_channels * triton.cdiv(p.num_kernels, block_n),
        mixed_grad, weight, extended, tap_scale, sums,
        p.num_kernels, weight.stride(0) if attention is None else 0,
        **p.constants(), WEIGHT_IN=p.weight_in, ROW=mixed_grad.shape[-1], TAPS=p.taps,
        BLOCK_N=block_n, BLOCK=_common.power_of_two(p.weight_in, 16, 2048 // max(block_n, 8)), num_warps=4,
    )  # fmt: skip
    return sums


def _channel_sums(
    p: _Problem,
    mixed_grad: Tensor,
    weight: Tensor,
    attention: Tensor | None,
    out_scale: Tensor | None,
    first_channel: int,
) -> Tensor:
    """Q [B, I + D, T] float32, zero before `first_channel`."""
    channels = p.in_channels + p.code_channels
    sums = mixed_grad.new_zeros((p.batch, channels, p.taps))
    stride_b, stride_k, per_channel = _attention_arguments(attention)
    block = _common.power_of_two(channels - first_channel, 16, 128)
    _common.launch(
        _channel_sums_kernel,
        p.batch * p.taps * triton.cdiv(channels - first_channel, block),
        mixed_grad, weight, attention, out_scale, sums,
        p.num_kernels, first_channel, stride_b, stride_k, weight.stride(0) if attention is None else 0,
        **p.constants(), WEIGHT_IN=p.weight_in, ROW=mixed_grad.shape[-1], TAPS=p.taps,
        PER_CHANNEL=per_channel, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return sums


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
            torch.zeros_like(t) if want and t is not None else x.new_empty((0,))
            for t, want in zip(tensors, wanted, strict=True)
        )
    p = _problem(x, weight, attention, stride, padding, dilation, groups)
    weight, attention, bias, code, in_scale, out_scale, tap_scale = _contiguous(
        weight, attention, bias, code, in_scale, out_scale, tap_scale
    )
    grads = [x.new_empty((0,)) for _ in tensors]

    if want_x:
        mixed = _mix(p, weight, attention, (in_scale, out_scale, tap_scale))
        grads[0] = _common.empty_like_format(x, tuple(x.shape))
        _convolve(p, grad, mixed, grads[0], transposed=True)

    # Coefficients in float32 from here on: they are small, and so are their gradients.
    attention_f, code_f, in_f, out_f = (
        t if t is None else t.float() for t in (attention, code, in_scale, out_scale)
    )
    tap_f = None if tap_scale is None else tap_scale.float().flatten(1)
    extended = _extended_scale(p, in_f, code_f)
    grad_attention = 0.0
    if want_weight or want_attention or want_code or want_in or want_out or want_tap:
        mixed_grad = _mixed_grad(p, grad, x)
        if want_weight:
            grads[1] = _bank_grad(p, mixed_grad, weight, attention_f, extended, out_f, tap_f)
        if want_attention or want_out:
            sums = _entry_sums(p, mixed_grad, weight, attention_f, extended, tap_f)
            if want_attention:
                grad_attention = sums if out_f is None else sums * out_f[:, None]
            if want_out:
                grads[6] = _weigh(sums, attention_f).to(x.dtype)
        if want_code or want_in or want_tap:
            first = 0 if want_in or want_tap else p.in_channels
            by_tap = _channel_sums(p, mixed_grad, weight, attention_f, out_f, first)
            by_channel = (by_tap if tap_f is None else by_tap * tap_f[:, None]).sum(2)
            if want_code:
                grads[4] = by_channel[:, p.in_channels :].to(x.dtype)
            if want_in:
                grads[5] = by_channel[:, : p.in_channels].to(x.dtype)
            if want_tap:
                scaled = by_tap if extended is None else by_tap * extended[:, :, None]
                grads[7] = scaled.sum(1).view(p.batch, *p.kernel).to(x.dtype)

    if bias is not None and (want_bias or want_attention):
        grad_beta = grad.sum((2, 3), dtype=torch.float32)
        if want_bias:
            grads[3] = _spread(grad_beta, attention_f).to(x.dtype)
        grad_attention = grad_attention + grad_beta[:, None] * bias.float()
    if want_attention:
        grads[2] = (grad_attention if attention.dim() == 3 else grad_attention.sum(2)).to(x.dtype)
    return tuple(g.contiguous() if i else g for i, g in enumerate(grads))


def _extended_scale(p: _Problem, in_scale: Tensor | None, code: Tensor | None) -> Tensor | None:
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


def unsupported(op_name: str, *args: Any) -> str | None:
    """Why these kernels cannot run the raw operator `op_name` on `args`; None when they can."""
    tensors = args[1:9] if op_name.endswith("_backward") else args[:8]
    x, weight = tensors[:2]
    reason = _common.unsupported_tensor("x", x)
    if reason is not None:
        return reason
    for name, tensor in zip(_TENSOR_NAMES[1:], tensors[1:], strict=True):
        if tensor is not None and tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype} and x is {x.dtype}; the Triton kernels take one dtype"
    if math.prod(x.shape[2:]) > _common.MAX_INT32 or math.prod(weight.shape[1:]) > _common.MAX_INT32:
        return "an image or a kernel has more than 2^31 - 1 elements"
    return None
