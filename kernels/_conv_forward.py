"""The forward of dynamic_conv, and the gradient of its input: kernels and launches.

Three kernels compute the convolution, which `_conv_plan.choose_convolution` chooses from:

_conv_dot_kernel     W_b has been mixed into a workspace [B, O, T, I/g] (T = kh kw taps, channels innermost,
                     x's dtype) by _mix_kernel. An implicit matrix product for each sample and group:
                     M = pixels, N = output channels, K = taps times input channels.
_conv_fused_kernel   The same without a workspace, for small maps: a tile of W_b is mixed in registers from
                     those of the N kernels, which stay in the cache; several samples may share them. K runs
                     in the bank's own order, taps innermost, so that its tiles are contiguous in memory.
_conv_direct_kernel  Few channels a group (depthwise, a first or last layer): no matrix product, and W_b is
                     mixed tap by tap.

All three compute, with the source x and the destination y (or, TRANSPOSED, the source dy and the destination
dx), over the taps (u, v) of the destination's residue class:

    destination[CLASSES q + residue] = sum_taps W[tap] source[STRIDE q + shift(tap)]

Forward there is one class; transposed the classes are the stride's residues and the source advances by one.
Bias, code, activation and the mean over the pixels are the epilogue.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._conv_plan import MIX_SAMPLES, Problem, choose_convolution
from ._pixels import aligned, alignment, layout_of, load_tile, pixel_tiles, place, taps_inside, tile_pixels


class Kernels(NamedTuple):
    """What W_b and beta_b are mixed from, all contiguous."""

    weight: Tensor
    attention: Tensor | None
    bias: Tensor | None = None
    code: Tensor | None = None
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    tap_scale: Tensor | None = None


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
def _mixed_entries(
    entries, ok, attention, coefficient, coefficient_ok, num_kernels, attention_stride_k,
    ELEMENTS: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """sum_k attention[b, k(, o)] times what lies at `entries` in kernel k of ELEMENTS elements, float32."""
    if attention is None:
        total = tl.load(entries, ok, 0.0).to(tl.float32)
    else:
        total = tl.zeros(entries.shape, tl.float32)
        for _ in range(num_kernels):
            if PER_CHANNEL:
                a = tl.load(coefficient, coefficient_ok, 0.0).to(tl.float32)
            else:
                a = tl.load(coefficient).to(tl.float32)
            total += a * tl.load(entries, ok, 0.0).to(tl.float32)
            entries += ELEMENTS
            coefficient += attention_stride_k
    return total


@triton.jit
def _ones_product(
    acc, ones_kernel, b, qy, qx, n, n_ok, source_height, source_width, OUT_CHANNELS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc and the channel of ones, a product too: whether a tap lies inside, times its kernel."""
    TAPS: tl.constexpr = KH * KW
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
    return acc


@triton.jit
def _finish(
    acc, bias, attention, out, partial_means, b, tile, tiles, y, x, pixel_ok, channel, channel_ok,
    num_kernels, attention_stride_b, attention_stride_k, out_stride_b, out_stride_c, out_stride_h,
    out_stride_w, OUT_CHANNELS: tl.constexpr, PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr,
    OUT_ALIGN: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Bias, activation, the store, and this tile's sum over its pixels for the mean of what was stored."""
    if bias is not None:
        if attention is None:
            entries = bias + b * OUT_CHANNELS + channel
        else:
            entries = bias + channel
        if PER_CHANNEL:
            coefficient = attention + b * attention_stride_b + channel
        else:
            coefficient = attention + b * attention_stride_b if attention is not None else None
        beta = _mixed_entries(
            entries, channel_ok, attention, coefficient, channel_ok, num_kernels, attention_stride_k,
            OUT_CHANNELS, PER_CHANNEL,
        )  # fmt: skip
        acc += beta[None, :]
    if ACTIVATION == "relu":
        acc = tl.maximum(acc, 0.0)
    elif ACTIVATION == "leaky_relu":
        acc = tl.where(acc > 0, acc, 0.01 * acc)
    to = aligned(b, out_stride_b, OUT_ALIGN) + place(y, x, out_stride_h, out_stride_w, OUT_ALIGN, FLAT)
    ok = pixel_ok[:, None] & channel_ok[None, :]
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + to[:, None] + aligned(channel, out_stride_c, OUT_ALIGN)[None, :], rounded, ok)
    if partial_means is not None:
        sums = tl.sum(tl.where(ok, rounded.to(tl.float32), 0.0), axis=0)
        tl.store(partial_means + (b * tiles + tile) * OUT_CHANNELS + channel, sums, channel_ok)


@triton.jit
def _conv_dot_kernel(
    source, mixed, bias, attention, ones_kernel, out, partial_means,
    source_height, source_width, out_height, out_width, rows, columns, source_stride_b,
    source_stride_c, source_stride_h, source_stride_w, out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    num_kernels, attention_stride_b, attention_stride_k, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    IN_PER_GROUP: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, SOURCE_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, FLAT: tl.constexpr, PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEP_H: tl.constexpr,
    STEP_W: tl.constexpr, PIXELS_LAST: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr,
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
    tiles_m = pixel_tiles(rows, columns, BLOCK_M, PATCH, FLAT)
    n = (pid % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // TILES_N
    tile = pid % tiles_m
    qy, qx, pixel_ok = tile_pixels(tile, rows, columns, COLUMN_ALIGN, BLOCK_M, PATCH, FLAT)
    pid = pid // tiles_m
    residue_h = pid % CLASSES_H
    residue_w = pid // CLASSES_H % CLASSES_W
    pid = pid // (CLASSES_H * CLASSES_W)
    g = pid % GROUPS
    b = (pid // GROUPS).to(tl.int64)
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
    source += aligned(b, source_stride_b, SOURCE_ALIGN) + aligned(g * K, source_stride_c, SOURCE_ALIGN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ones_kernel is not None:
        acc = _ones_product(
            acc, ones_kernel, b, qy, qx, n, n_ok, source_height, source_width, OUT_CHANNELS, KH, KW, STRIDE_H,
            STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, PRECISION,
        )  # fmt: skip

    # One flat loop over taps and channels, which is what the compiler pipelines.
    for step in range(count_u * count_v * K_BLOCKS):
        tap = step // K_BLOCKS
        u = first_u + tap // count_v * STEP_H
        v = first_v + tap % count_v * STEP_W
        k = step % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
        k_ok = k < K
        if TRANSPOSED:
            at = (k * (TAPS * IN_PER_GROUP))[:, None] + ((u * KW + v) * IN_PER_GROUP + n)[None, :]
        else:
            at = ((u * KW + v) * IN_PER_GROUP + k)[:, None] + (n * (TAPS * IN_PER_GROUP))[None, :]
        if FLAT:
            iy = qy
            ix = qx
            inside = pixel_ok
        else:
            if TRANSPOSED:
                iy = qy + (residue_h + PAD_H - u * DILATION_H) // STRIDE_H
                ix = qx + (residue_w + PAD_W - v * DILATION_W) // STRIDE_W
            else:
                iy = qy * STRIDE_H - PAD_H + u * DILATION_H
                ix = qx * STRIDE_W - PAD_W + v * DILATION_W
            inside = pixel_ok & (iy >= 0) & (iy < source_height) & (ix >= 0) & (ix < source_width)
        pixel_at = place(iy, ix, source_stride_h, source_stride_w, SOURCE_ALIGN, FLAT)
        at_k = aligned(k, source_stride_c, SOURCE_ALIGN)
        values = load_tile(
            source + pixel_at[:, None] + at_k[None, :], inside[:, None] & k_ok[None, :], PIXELS_LAST
        )
        kernel = tl.load(mixed + at, k_ok[:, None] & n_ok[None, :], 0.0)
        acc = tl.dot(values.to(DOT_DTYPE), kernel.to(DOT_DTYPE), acc, input_precision=PRECISION)

    channel = g * N + n
    y = qy * CLASSES_H + residue_h
    x = qx * CLASSES_W + residue_w
    if CLASSES_H * CLASSES_W > 1:
        pixel_ok = pixel_ok & (y < out_height) & (x < out_width)
    _finish(
        acc, bias, attention, out, partial_means, b, tile, tiles_m, y, x, pixel_ok, channel, n_ok,
        num_kernels, attention_stride_b, attention_stride_k, out_stride_b, out_stride_c, out_stride_h,
        out_stride_w, OUT_CHANNELS, PER_CHANNEL, ACTIVATION, OUT_ALIGN, FLAT,
    )  # fmt: skip


@triton.jit
def _conv_fused_kernel(
    source, weight, row_scale, column_scale, tap_scale, bias, attention, ones_kernel, out, partial_means,
    batch, source_height, source_width, out_height, out_width, rows, columns, source_stride_b,
    source_stride_c, source_stride_h, source_stride_w, out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    num_kernels, attention_stride_b, attention_stride_k, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    IN_PER_GROUP: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, SOURCE_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, FLAT: tl.constexpr, PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHT_IN: tl.constexpr, NUM_KERNELS: tl.constexpr, SAMPLES: tl.constexpr, PIXELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels of each of SAMPLES samples, and BLOCK_N channels of one group, a program.

    row_scale is that of the channels that are summed over (in_scale, or TRANSPOSED out_scale), column_scale
    that of the destination's. TRANSPOSED there is one tap and no stride.
    """
    OUT_PER_GROUP: tl.constexpr = OUT_CHANNELS // GROUPS
    TAPS: tl.constexpr = KH * KW
    if TRANSPOSED:
        N: tl.constexpr = IN_PER_GROUP
        K: tl.constexpr = OUT_PER_GROUP
    else:
        N: tl.constexpr = OUT_PER_GROUP
        K: tl.constexpr = IN_PER_GROUP
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    BANK: tl.constexpr = OUT_CHANNELS * WEIGHT_IN * TAPS

    pid = tl.program_id(0)
    tiles_m = pixel_tiles(rows, columns, BLOCK_M, PATCH, FLAT)
    n = (pid % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // TILES_N
    tile = pid % tiles_m
    qy, qx, tile_ok = tile_pixels(tile, rows, columns, COLUMN_ALIGN, BLOCK_M, PATCH, FLAT)
    pid = pid // tiles_m
    g = pid % GROUPS
    first = (pid // GROUPS).to(tl.int64) * SAMPLES
    n_ok = n < N
    channel = g * N + n
    weight += g.to(tl.int64) * (OUT_PER_GROUP * WEIGHT_IN * TAPS)
    source += aligned(g * K, source_stride_c, SOURCE_ALIGN)

    # Where each pixel's first tap lies, and a bit for each tap that lies inside the image.
    if TRANSPOSED:
        first_y = qy + PAD_H
        first_x = qx + PAD_W
    else:
        first_y = qy * STRIDE_H - PAD_H
        first_x = qx * STRIDE_W - PAD_W
    if FLAT:
        inside = tile_ok.to(tl.int32)
    else:
        inside = taps_inside(
            first_y, first_x, tile_ok, source_height, source_width, KH, KW, DILATION_H, DILATION_W
        )
    pixel_at = place(first_y, first_x, source_stride_h, source_stride_w, SOURCE_ALIGN, FLAT)

    sums = ()
    for _ in tl.static_range(SAMPLES):
        sums += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for start in range(0, K * TAPS, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        row_ok = row < K * TAPS
        if TRANSPOSED:
            k = row
            t = row * 0
            at = (row * WEIGHT_IN)[:, None] + n[None, :]
        else:
            k = row // TAPS
            t = row % TAPS
            at = row[:, None] + (n * (WEIGHT_IN * TAPS))[None, :]
        kernel_ok = row_ok[:, None] & n_ok[None, :]
        summed = g * K + k
        at_k = aligned(k, source_stride_c, SOURCE_ALIGN)
        if TAPS > 1:
            at_k += place(
                t // KW * DILATION_H,
                t % KW * DILATION_W,
                source_stride_h,
                source_stride_w,
                SOURCE_ALIGN,
                FLAT,
            )
            ok = ((inside[:, None] >> t[None, :]) & 1) != 0
            ok = ok & row_ok[None, :]
        else:
            ok = (inside != 0)[:, None] & row_ok[None, :]

        kernels = ()
        for _ in tl.static_range(SAMPLES):
            kernels += (tl.zeros((BLOCK_K, BLOCK_N), tl.float32),)
        for j in tl.static_range(NUM_KERNELS):
            if attention is None:
                entries = tl.load(weight + first * BANK + at, kernel_ok, 0.0)
                kernels = (entries,)
            else:
                entries = tl.load(weight + j * BANK + at, kernel_ok, 0.0).to(tl.float32)
                added = ()
                for s in tl.static_range(SAMPLES):
                    b = tl.minimum(first + s, batch - 1)
                    coefficient = attention + b * attention_stride_b + j * attention_stride_k
                    if not PER_CHANNEL:
                        a = tl.load(coefficient).to(tl.float32)
                    elif TRANSPOSED:
                        a = tl.load(coefficient + summed, row_ok, 0.0).to(tl.float32)[:, None]
                    else:
                        a = tl.load(coefficient + channel, n_ok, 0.0).to(tl.float32)[None, :]
                    added += (kernels[s] + a * entries,)
                kernels = added

        added = ()
        for s in tl.static_range(SAMPLES):
            b = tl.minimum(first + s, batch - 1)
            kernel = kernels[s]
            if row_scale is not None:
                scale = tl.load(row_scale + b * (GROUPS * K) + summed, row_ok, 0.0).to(tl.float32)
                kernel = kernel.to(tl.float32) * scale[:, None]
            if tap_scale is not None:
                scale = tl.load(tap_scale + b * TAPS + t).to(tl.float32)
                kernel = kernel.to(tl.float32) * scale[:, None]
            at_b = aligned(b, source_stride_b, SOURCE_ALIGN)
            values = load_tile(source + at_b + pixel_at[:, None] + at_k[None, :], ok, PIXELS_LAST)
            added += (tl.dot(values.to(DOT_DTYPE), kernel.to(DOT_DTYPE), sums[s], input_precision=PRECISION),)
        sums = added

    for s in tl.static_range(SAMPLES):
        b = tl.minimum(first + s, batch - 1)
        acc = sums[s]
        if column_scale is not None:
            acc *= tl.load(column_scale + b * (GROUPS * N) + channel, n_ok, 0.0).to(tl.float32)[None, :]
        if ones_kernel is not None:
            acc = _ones_product(
                acc, ones_kernel, b, qy, qx, n, n_ok, source_height, source_width, OUT_CHANNELS, KH, KW,
                STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, PRECISION,
            )  # fmt: skip
        _finish(
            acc, bias, attention, out, partial_means, b, tile, tiles_m, qy, qx,
            tile_ok & (first + s < batch), channel, n_ok & (first + s < batch),
            num_kernels, attention_stride_b, attention_stride_k, out_stride_b, out_stride_c, out_stride_h,
            out_stride_w, OUT_CHANNELS, PER_CHANNEL, ACTIVATION, OUT_ALIGN, FLAT,
        )  # fmt: skip


@triton.jit
def _conv_direct_kernel(
    source, weight, in_scale, out_scale, tap_scale, bias, attention, ones_kernel, out, partial_means,
    source_height, source_width, out_height, out_width, rows, columns, source_stride_b,
    source_stride_c, source_stride_h, source_stride_w, out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    num_kernels, attention_stride_b, attention_stride_k, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    IN_PER_GROUP: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, SOURCE_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, FLAT: tl.constexpr, PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHT_IN: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M destination pixels of one sample and class, and BLOCK_N channels of any groups, a program.

    FUSED, `weight` is the bank; otherwise the workspace that holds W_b, scales included.
    """
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
    BANK: tl.constexpr = OUT_CHANNELS * WEIGHT_IN * TAPS

    pid = tl.program_id(0)
    tiles_m = pixel_tiles(rows, columns, BLOCK_M, PATCH, FLAT)
    channel = (pid % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // TILES_N
    tile = pid % tiles_m
    qy, qx, pixel_ok = tile_pixels(tile, rows, columns, COLUMN_ALIGN, BLOCK_M, PATCH, FLAT)
    pid = pid // tiles_m
    residue_h = pid % CLASSES_H
    residue_w = pid // CLASSES_H % CLASSES_W
    b = (pid // (CLASSES_H * CLASSES_W)).to(tl.int64)
    channel_ok = channel < GROUPS * N
    # The first of the channels that are summed over.
    first = channel // N * K
    if GROUPS == 1:
        # All channels read the same source channels: one column of them, which is broadcast.
        first_source = tl.zeros((1,), tl.int32)
        first_ok = tl.full((1,), True, tl.int1)
    else:
        first_source = first
        first_ok = channel_ok
    source += aligned(b, source_stride_b, SOURCE_ALIGN)
    source += aligned(first_source, source_stride_c, SOURCE_ALIGN)[None, :]

    # Kernels in memory: the steps from one channel that is summed over to the next, and from tap to tap.
    if FUSED:
        ROW: tl.constexpr = WEIGHT_IN * TAPS
        IN_STEP: tl.constexpr = TAPS
        TAP_STEP: tl.constexpr = 1
        if attention is None:
            weight += b * BANK
    else:
        ROW: tl.constexpr = IN_PER_GROUP * TAPS
        IN_STEP: tl.constexpr = 1
        TAP_STEP: tl.constexpr = IN_PER_GROUP
        weight += b * (OUT_CHANNELS * ROW)
    if TRANSPOSED:
        weight += first.to(tl.int64) * ROW + channel % N * IN_STEP
        K_STEP: tl.constexpr = ROW
    else:
        weight += channel.to(tl.int64) * ROW
        K_STEP: tl.constexpr = IN_STEP

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
                tap = u * KW + v
                at = source + place(iy, ix, source_stride_h, source_stride_w, SOURCE_ALIGN, FLAT)[:, None]
                entries = weight + tap * TAP_STEP
                if FUSED and tap_scale is not None:
                    scale = tl.load(tap_scale + b * TAPS + tap).to(tl.float32)
                for k in range(K):
                    values = tl.load(at, inside[:, None] & first_ok[None, :], 0.0).to(tl.float32)
                    if FUSED:
                        if TRANSPOSED:
                            o = first + k
                            i = channel
                        else:
                            o = channel
                            i = first + k
                        if PER_CHANNEL:
                            coefficient = attention + b * attention_stride_b + o
                        else:
                            coefficient = (
                                attention + b * attention_stride_b if attention is not None else None
                            )
                        kernel = _mixed_entries(
                            entries, channel_ok, attention, coefficient, channel_ok, num_kernels,
                            attention_stride_k, BANK, PER_CHANNEL,
                        )  # fmt: skip
                        if in_scale is not None:
                            kernel *= tl.load(in_scale + b * (GROUPS * IN_PER_GROUP) + i, channel_ok, 0.0).to(
                                tl.float32
                            )
                        if out_scale is not None:
                            kernel *= tl.load(out_scale + b * OUT_CHANNELS + o, channel_ok, 0.0).to(
                                tl.float32
                            )
                        if tap_scale is not None:
                            kernel *= scale
                    else:
                        kernel = tl.load(entries, channel_ok, 0.0).to(tl.float32)
                    acc += values * kernel[None, :]
                    at += source_stride_c
                    entries += K_STEP
                if ones_kernel is not None:
                    ones = tl.load(ones_kernel + (b * TAPS + tap) * OUT_CHANNELS + channel, channel_ok, 0.0)
                    acc += inside.to(tl.float32)[:, None] * ones[None, :]
    y = qy * CLASSES_H + residue_h
    x = qx * CLASSES_W + residue_w
    if CLASSES_H * CLASSES_W > 1:
        pixel_ok = pixel_ok & (y < out_height) & (x < out_width)
    _finish(
        acc, bias, attention, out, partial_means, b, tile, tiles_m, y, x, pixel_ok, channel, channel_ok,
        num_kernels, attention_stride_b, attention_stride_k, out_stride_b, out_stride_c, out_stride_h,
        out_stride_w, OUT_CHANNELS, PER_CHANNEL, ACTIVATION, OUT_ALIGN, FLAT,
    )  # fmt: skip


@triton.jit
def _mean_kernel(
    partial_means, means, tiles, pixels, OUT_CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """means[b, o] = sum_tile partial_means[b, tile, o] / pixels, in a fixed order."""
    TILES_O: tl.constexpr = (OUT_CHANNELS + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    o = (pid % TILES_O) * BLOCK + tl.arange(0, BLOCK)
    b = (pid // TILES_O).to(tl.int64)
    ok = o < OUT_CHANNELS
    total = tl.zeros((BLOCK_T, BLOCK), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        at = (b * tiles + tile)[:, None] * OUT_CHANNELS + o[None, :]
        total += tl.load(partial_means + at, (tile < tiles)[:, None] & ok[None, :], 0.0)
    mean = tl.sum(total, axis=0) / pixels
    tl.store(means + b * OUT_CHANNELS + o, mean.to(means.dtype.element_ty), ok)


def attention_arguments(attention: Tensor | None) -> tuple[int, int, bool]:
    """Strides over samples and kernels of a contiguous attention, and whether it is per output channel."""
    if attention is None:
        return 0, 0, False
    return attention.stride(0), attention.stride(1), attention.dim() == 3


def dot_dtype(dtype: torch.dtype, arch: str) -> tl.dtype:
    """What the operands of a product are in."""
    if arch == "interpreter":  # NumPy has no bfloat16
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _mix(p: Problem, kernels: Kernels) -> Tensor:
    """W_b [B, O, T, I/g] in the bank's dtype."""
    weight, attention = kernels.weight, kernels.attention
    scales = (kernels.in_scale, kernels.out_scale, kernels.tap_scale)
    if attention is None and p.taps == 1 and p.code_channels == 0 and all(s is None for s in scales):
        return weight
    mixed = weight.new_empty((p.batch, p.out_channels, p.taps, p.in_per_group))
    stride_b, stride_k, per_channel = attention_arguments(attention)
    pairs = p.out_channels * p.in_per_group
    block_b = _common.power_of_two(p.batch, 1, MIX_SAMPLES)
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


def _mix_code(p: Problem, kernels: Kernels) -> Tensor:
    """S_b [B, T, O] float32."""
    weight, attention = kernels.weight, kernels.attention
    ones_kernel = weight.new_empty((p.batch, p.taps, p.out_channels), dtype=torch.float32)
    stride_b, stride_k, per_channel = attention_arguments(attention)
    block_o = _common.power_of_two(p.out_channels, 1, 32)
    _common.launch(
        _code_kernel,
        triton.cdiv(p.out_channels, block_o) * p.taps * p.batch,
        weight, attention, kernels.code, kernels.out_scale, kernels.tap_scale, ones_kernel,
        p.num_kernels, stride_b, stride_k,
        OUT_CHANNELS=p.out_channels, IN_CHANNELS=p.in_channels, CODE_CHANNELS=p.code_channels, TAPS=p.taps,
        PER_CHANNEL=per_channel, BLOCK_O=block_o, BLOCK_D=_common.power_of_two(p.code_channels, 1, 64),
        num_warps=4,
    )  # fmt: skip
    return ones_kernel


def convolve(
    p: Problem,
    source: Tensor,
    kernels: Kernels,
    out: Tensor,
    *,
    transposed: bool,
    activation: str = "none",
    means: Tensor | None = None,
) -> None:
    """out = the convolution of source with W_b; transposed, without bias, code and activation.

    `means` [B, O] is filled with the mean of `out` over its pixels.
    """
    c = choose_convolution(p, source, out, transposed=transposed)
    mixed = None if c.mixes_in_registers else _mix(p, kernels)
    ones_kernel = _mix_code(p, kernels) if p.code_channels and not transposed else None
    bias = None if transposed else kernels.bias
    partial_means = None
    if means is not None:
        partial_means = means.new_empty((p.batch, c.pixel_tiles, p.out_channels), dtype=torch.float32)

    stride_b, stride_k, per_channel = attention_arguments(kernels.attention)
    source_size, out_size = tuple(source.shape[2:]), tuple(out.shape[2:])
    if c.flat:
        p = p.flattened()
        source_size, out_size = (p.out_size, p.in_size) if transposed else (p.in_size, p.out_size)
    epilogue = (bias, kernels.attention, ones_kernel, out, partial_means)
    sizes = (
        *source_size, *out_size, c.rows, c.columns, *source.stride(), *out.stride(),
        p.num_kernels, stride_b, stride_k,
    )  # fmt: skip
    options = {
        **p.constants(),
        **p.geometry(),
        "TRANSPOSED": transposed,
        "PER_CHANNEL": per_channel,
        "ACTIVATION": activation,
        "SOURCE_ALIGN": alignment(source),
        "OUT_ALIGN": alignment(out),
        "COLUMN_ALIGN": math.gcd(8, c.columns),
        "FLAT": c.flat,
        "PATCH": c.patch,
        "BLOCK_M": c.tile.block_m,
        "BLOCK_N": c.tile.block_n,
        "num_warps": c.tile.warps,
        "num_stages": c.tile.stages,
    }
    product = {
        "BLOCK_K": c.tile.block_k,
        "PIXELS_LAST": not transposed and p.stride[1] > 1 and layout_of(source).rows,
        "PRECISION": c.precision,
        "DOT_DTYPE": dot_dtype(source.dtype, _common.architecture(source.device)),
    }
    scales = (kernels.in_scale, kernels.out_scale, kernels.tap_scale)
    if c.path == "fused":
        if transposed:
            scales = (kernels.out_scale, kernels.in_scale, kernels.tap_scale)
        _common.launch(
            _conv_fused_kernel, c.programs, source, kernels.weight, *scales, *epilogue, p.batch, *sizes,
            **options, **product, WEIGHT_IN=p.weight_in, NUM_KERNELS=p.num_kernels, SAMPLES=c.samples,
        )  # fmt: skip
    elif c.path == "materialised":
        steps = [s // math.gcd(s, d) if transposed else 1 for s, d in zip(p.stride, p.dilation, strict=True)]
        _common.launch(
            _conv_dot_kernel, c.programs, source, mixed, *epilogue, *sizes,
            **options, **product, STEP_H=steps[0], STEP_W=steps[1],
        )  # fmt: skip
    else:
        weight, scales = (kernels.weight, scales) if mixed is None else (mixed, (None, None, None))
        _common.launch(
            _conv_direct_kernel, c.programs, source, weight, *scales, *epilogue, *sizes,
            **options, WEIGHT_IN=p.weight_in, FUSED=mixed is None,
        )  # fmt: skip

    if means is not None:
        block = _common.power_of_two(p.out_channels, 16, 64)
        _common.launch(
            _mean_kernel, triton.cdiv(p.out_channels, block) * p.batch,
            partial_means, means, c.pixel_tiles, math.prod(p.out_size),
            OUT_CHANNELS=p.out_channels, BLOCK_T=_common.power_of_two(c.pixel_tiles, 1, 32), BLOCK=block,
            num_warps=4,
        )  # fmt: skip
