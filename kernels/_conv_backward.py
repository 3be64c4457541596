"""The backward of dynamic_conv but for its input's gradient: kernels and launches.

With D[b, o, t, i] = sum_p dy[b, o, p] x[b, i, p at tap t], the gradient of W_b as if all scales were one, and
as its last column that of the channel of ones, which makes the code a scale of its own (`extended =
cat(in_scale, code)`):

    dweight    = sum_b      D extended out_scale tap_scale attention[b, k]
    E[b, k, o] = sum_{i, t} D extended tap_scale weight[k]             ->  dattention, dout_scale
    Q[b, i, t] = sum_o      D out_scale sum_k attention[b, k] weight[k]  ->  din_scale, dcode, dtap_scale

_bank_dot_kernel computes a tile of D for one sample after the other and contracts it with the bank at once:
dweight and E without D. Where that does not win, or Q is wanted too (`_conv_plan.choose_weight_gradient`), D
is written for a chunk of samples by _weight_dot_kernel or _weight_direct_kernel, float32, and read by the
kernels of the three sums. No atomics: every sum has one owner, or is made in parts that are then added in a
fixed order.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._conv_forward import attention_arguments, dot_dtype
from ._conv_plan import Problem, WeightGradient, choose_weight_gradient, direct_blocks
from ._pixels import (
    aligned,
    alignment,
    layout_of,
    load_tile,
    pixel_tiles,
    place,
    taps_inside,
    tile_pixels,
    tiles_of,
)


@triton.jit
def _weight_dot_kernel(
    grad, x, partial, batch, height, width, out_height, out_width, blocks_per_split, grad_stride_b,
    grad_stride_c, grad_stride_h, grad_stride_w, x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, ROW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GRAD_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, FLAT: tl.constexpr, PATCH: tl.constexpr,
    PIXELS_LAST: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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

    grad += aligned(b, grad_stride_b, GRAD_ALIGN)
    grad += aligned(g * OUT_PER_GROUP + m, grad_stride_c, GRAD_ALIGN)[:, None]
    x += aligned(b, x_stride_b, X_ALIGN) + aligned(g * IN_PER_GROUP + i, x_stride_c, X_ALIGN)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = pixel_tiles(out_height, out_width, BLOCK_K, PATCH, FLAT)
    start = split.to(tl.int32) * blocks_per_split
    for block in range(start, tl.minimum(start + blocks_per_split, blocks)):
        oy, ox, pixel_ok = tile_pixels(block, out_height, out_width, COLUMN_ALIGN, BLOCK_K, PATCH, FLAT)
        to = place(oy, ox, grad_stride_h, grad_stride_w, GRAD_ALIGN, FLAT)
        dy = tl.load(grad + to[None, :], m_ok[:, None] & pixel_ok[None, :], 0.0)
        if FLAT:
            at = place(oy, ox, x_stride_h, x_stride_w, X_ALIGN, FLAT)[:, None]
            inside = pixel_ok[:, None] & n_ok[None, :]
        else:
            iy = (oy * STRIDE_H)[:, None] + down[None, :]
            ix = (ox * STRIDE_W)[:, None] + right[None, :]
            at = place(iy, ix, x_stride_h, x_stride_w, X_ALIGN, FLAT)
            inside = pixel_ok[:, None] & n_ok[None, :] & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        values = load_tile(x + at, inside, PIXELS_LAST)
        acc = tl.dot(dy.to(DOT_DTYPE), values.to(DOT_DTYPE), acc, input_precision=PRECISION)
    o = (split * batch + b) * OUT_CHANNELS + g * OUT_PER_GROUP + m
    to = o[:, None] * (TAPS * ROW) + (t * ROW + i)[None, :]
    tl.store(partial + to, acc, m_ok[:, None] & n_ok[None, :])


@triton.jit
def _weight_direct_kernel(
    grad, x, partial, batch, height, width, out_height, out_width, blocks_per_split, grad_stride_b,
    grad_stride_c, grad_stride_h, grad_stride_w, x_stride_b, x_stride_c, x_stride_h, x_stride_w,
    OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr, ROW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GRAD_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, FLAT: tl.constexpr, PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
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

    grad += aligned(b, grad_stride_b, GRAD_ALIGN) + aligned(o, grad_stride_c, GRAD_ALIGN)[None, :]
    if x is not None:
        x += aligned(b, x_stride_b, X_ALIGN) + aligned(channel, x_stride_c, X_ALIGN)[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    blocks = pixel_tiles(out_height, out_width, BLOCK_P, PATCH, FLAT)
    start = split.to(tl.int32) * blocks_per_split
    for block in range(start, tl.minimum(start + blocks_per_split, blocks)):
        oy, ox, pixel_ok = tile_pixels(block, out_height, out_width, COLUMN_ALIGN, BLOCK_P, PATCH, FLAT)
        iy = oy * STRIDE_H + down
        ix = ox * STRIDE_W + right
        inside = pixel_ok & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        to = place(oy, ox, grad_stride_h, grad_stride_w, GRAD_ALIGN, FLAT)
        dy = tl.load(grad + to[:, None], pixel_ok[:, None] & o_ok[None, :], 0.0).to(tl.float32)
        if x is None:
            acc += tl.where(inside[:, None], dy, 0.0)
        else:
            at = place(iy, ix, x_stride_h, x_stride_w, X_ALIGN, FLAT)
            values = tl.load(x + at[:, None], inside[:, None] & channel_ok[None, :], 0.0)
            acc += dy * values.to(tl.float32)
    if x is None:
        i = IN_PER_GROUP
    to = ((split * batch + b) * OUT_CHANNELS + o) * (TAPS * ROW) + t * ROW + i
    tl.store(partial + to, tl.sum(acc, axis=0), o_ok)


@triton.jit
def _bank_dot_kernel(
    grad, x, weight, attention, out_scale, bank_parts, entry_parts, batch, height, width, out_height,
    out_width, blocks_per_split, pixel_splits, samples_per_split, attention_stride_b, attention_stride_k,
    grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w, x_stride_b, x_stride_c, x_stride_h,
    x_stride_w, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, IN_PER_GROUP: tl.constexpr,
    NUM_KERNELS: tl.constexpr, PER_CHANNEL: tl.constexpr, BY_CHANNEL: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, GRAD_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, FLAT: tl.constexpr, PATCH: tl.constexpr,
    PIXELS_LAST: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of D, sample after sample, contracted with the bank at once; D itself is never written.

    bank_parts[part, k, o, i, t] = sum_b attention[b, k(, o)] out_scale[b, o] D[b, o, t, i], over the part's
    samples and pixels; entry_parts[part of the pixels, tile, b, k, o] = sum_{i, t} D weight[k], over the
    tile's columns, or, unless BY_CHANNEL, [part of the pixels, tile, b, k], over its rows too. Either may be
    missing. D's columns are in the bank's order, taps innermost.
    """
    OUT_PER_GROUP: tl.constexpr = OUT_CHANNELS // GROUPS
    TAPS: tl.constexpr = KH * KW
    COLUMNS: tl.constexpr = TAPS * IN_PER_GROUP
    BANK: tl.constexpr = OUT_CHANNELS * COLUMNS
    TILES_M: tl.constexpr = (OUT_PER_GROUP + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    tile = pid % (GROUPS * TILES_M * TILES_N)
    tile_n = pid % TILES_N
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // TILES_N
    m = (pid % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // TILES_M
    g = pid % GROUPS
    part = (pid // GROUPS).to(tl.int64)
    pixel_split = part % pixel_splits
    first = part // pixel_splits * samples_per_split
    m_ok = m < OUT_PER_GROUP
    n_ok = n < COLUMNS
    ok = m_ok[:, None] & n_ok[None, :]
    i = n // TAPS
    t = n % TAPS
    o = g * OUT_PER_GROUP + m
    at_kernel = o.to(tl.int64)[:, None] * COLUMNS + n[None, :]

    grad += aligned(o, grad_stride_c, GRAD_ALIGN)[:, None]
    at_n = aligned(g * IN_PER_GROUP + i, x_stride_c, X_ALIGN)
    if TAPS > 1:
        at_n += place(t // KW * DILATION_H, t % KW * DILATION_W, x_stride_h, x_stride_w, X_ALIGN, FLAT)
    blocks = pixel_tiles(out_height, out_width, BLOCK_K, PATCH, FLAT)
    start = pixel_split.to(tl.int32) * blocks_per_split
    end = tl.minimum(start + blocks_per_split, blocks)
    totals = ()
    for _ in tl.static_range(NUM_KERNELS):
        totals += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for step in range(tl.minimum(samples_per_split, batch - first).to(tl.int32)):
        b = first + step
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(start, end):
            oy, ox, pixel_ok = tile_pixels(block, out_height, out_width, COLUMN_ALIGN, BLOCK_K, PATCH, FLAT)
            to = place(oy, ox, grad_stride_h, grad_stride_w, GRAD_ALIGN, FLAT)
            to += aligned(b, grad_stride_b, GRAD_ALIGN)
            dy = tl.load(grad + to[None, :], m_ok[:, None] & pixel_ok[None, :], 0.0)
            if FLAT:
                at = place(oy, ox, x_stride_h, x_stride_w, X_ALIGN, FLAT)
                inside = pixel_ok[:, None] & n_ok[None, :]
            else:
                y = oy * STRIDE_H - PAD_H
                z = ox * STRIDE_W - PAD_W
                at = place(y, z, x_stride_h, x_stride_w, X_ALIGN, FLAT)
                bits = taps_inside(y, z, pixel_ok, height, width, KH, KW, DILATION_H, DILATION_W)
                inside = (((bits[:, None] >> t[None, :]) & 1) != 0) & n_ok[None, :]
            at += aligned(b, x_stride_b, X_ALIGN)
            values = load_tile(x + at[:, None] + at_n[None, :], inside, PIXELS_LAST)
            acc = tl.dot(dy.to(DOT_DTYPE), values.to(DOT_DTYPE), acc, input_precision=PRECISION)

        if entry_parts is not None:
            if BY_CHANNEL:
                to_entry = ((pixel_split * TILES_N + tile_n) * batch + b) * NUM_KERNELS
            else:
                to_entry = ((pixel_split * (GROUPS * TILES_M * TILES_N) + tile) * batch + b) * NUM_KERNELS
            for j in tl.static_range(NUM_KERNELS):
                entries = tl.load(weight + j * BANK + at_kernel, ok, 0.0).to(tl.float32)
                sums = tl.sum(acc * entries, axis=1)
                if BY_CHANNEL:
                    tl.store(entry_parts + (to_entry + j) * OUT_CHANNELS + o, sums, m_ok)
                else:
                    tl.store(entry_parts + to_entry + j, tl.sum(sums))
        if bank_parts is not None:
            if out_scale is not None:
                acc *= tl.load(out_scale + b * OUT_CHANNELS + o, m_ok, 0.0)[:, None]
            added = ()
            for j in tl.static_range(NUM_KERNELS):
                coefficient = attention + b * attention_stride_b + j * attention_stride_k
                if PER_CHANNEL:
                    a = tl.load(coefficient + o, m_ok, 0.0)[:, None]
                else:
                    a = tl.load(coefficient)
                added += (totals[j] + a * acc,)
            totals = added
    if bank_parts is not None:
        for j in tl.static_range(NUM_KERNELS):
            to = bank_parts + (part * NUM_KERNELS + j) * BANK + at_kernel
            tl.store(to, totals[j].to(bank_parts.dtype.element_ty), ok)


@triton.jit
def _bank_grad_kernel(
    mixed_grad, attention, extended, out_scale, tap_scale, grad_weight, batch, num_kernels,
    attention_stride_b, attention_stride_k, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    IN_PER_GROUP: tl.constexpr, WEIGHT_IN: tl.constexpr, ROW: tl.constexpr, TAPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_weight[k, o, i, t] = sum_b attention[b, k(, o)] D extended[b, i] out_scale[b, o] tap_scale[b, t].

    One program has BLOCK pairs (o, i) of one tap and BLOCK_N kernels; without attention, one sample. ADD
    goes on with the sum of earlier samples.
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
        ROWS: tl.constexpr = 1
    else:
        k = pid * BLOCK_N + tl.arange(0, BLOCK_N)
        k_ok = k < num_kernels
        first = 0
        last = batch
        ROWS: tl.constexpr = BLOCK_N
    to = k.to(tl.int64)[:, None] * (OUT_CHANNELS * WEIGHT_IN * TAPS) + (pair.to(tl.int64) * TAPS + t)[None, :]
    if ADD:
        total = tl.load(grad_weight + to, k_ok[:, None] & ok[None, :], 0.0)
    else:
        total = tl.zeros((ROWS, BLOCK), tl.float32)

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


class Coefficients(NamedTuple):
    """What D is weighed with, float32 and contiguous: they are small, and so are their gradients."""

    attention: Tensor | None
    extended: Tensor | None
    out_scale: Tensor | None
    tap_scale: Tensor | None

    def of_samples(self, first: int, last: int) -> "Coefficients":
        return Coefficients(*(t if t is None else t[first:last] for t in self))


class WeightGradients(NamedTuple):
    """What was wanted, None for the rest.

    Attributes:
        bank: dweight, in the bank's dtype.
        entries: E [B, N, O] float32; or its sum over O, [B, N, 1], where nothing is for each output channel.
        channels: Q [B, I + D, T] float32.
    """

    bank: Tensor | None
    entries: Tensor | None
    channels: Tensor | None


def weight_gradients(
    p: Problem,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    coefficients: Coefficients,
    *,
    want_bank: bool,
    want_entries: bool,
    first_channel: int | None,
) -> WeightGradients:
    """The three sums of D above; Q from `first_channel` on (zero before), not at all where that is None."""
    scaled = coefficients.extended is not None or coefficients.tap_scale is not None
    w = choose_weight_gradient(p, grad, x, scaled=scaled)
    if w.path == "bank":
        return _contracted(p, w, grad, x, weight, coefficients, want_bank, want_entries)

    bank = None
    if want_bank:
        adds_up = w.chunk < p.batch and not p.per_sample
        bank = weight.new_empty(weight.shape, dtype=torch.float32 if adds_up else None)
    entries, channels = [], []
    for first in range(0, p.batch, w.chunk):
        last = min(first + w.chunk, p.batch)
        part = p._replace(batch=last - first)
        of_part = coefficients.of_samples(first, last)
        own = weight[first:last] if p.per_sample else weight
        mixed_grad = _mixed_grad(part, w, grad[first:last], x[first:last])
        if bank is not None:
            rows = bank[first:last] if p.per_sample else bank
            _bank_grad(part, mixed_grad, of_part, rows, add=first > 0 and not p.per_sample)
        if want_entries:
            entries.append(_entry_sums(part, mixed_grad, own, of_part))
        if first_channel is not None:
            channels.append(_channel_sums(part, mixed_grad, own, of_part, first_channel))
        del mixed_grad
    return WeightGradients(None if bank is None else bank.to(weight.dtype), _cat(entries), _cat(channels))


def _cat(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _contracted(
    p: Problem,
    w: WeightGradient,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    coefficients: Coefficients,
    want_bank: bool,
    want_entries: bool,
) -> WeightGradients:
    """dweight and E without D."""
    parts = w.sample_splits * w.pixel_splits
    by_channel = p.per_channel or coefficients.out_scale is not None
    tiles = triton.cdiv(p.in_per_group * p.taps, w.tile.block_n)
    if not by_channel:
        tiles *= p.groups * triton.cdiv(p.out_per_group, w.tile.block_m)
    bank_parts = entry_parts = None
    if want_bank:
        bank_parts = weight.new_empty((parts, *weight.shape), dtype=torch.float32 if parts > 1 else None)
    if want_entries:
        entry_parts = x.new_empty(
            (w.pixel_splits * tiles, p.batch, p.num_kernels, p.out_channels if by_channel else 1),
            dtype=torch.float32,
        )
    if want_bank or want_entries:
        stride_b, stride_k, per_channel = attention_arguments(coefficients.attention)
        if w.flat:
            p = p.flattened()
        _common.launch(
            _bank_dot_kernel, w.programs,
            grad, x, weight, coefficients.attention, coefficients.out_scale, bank_parts, entry_parts,
            p.batch, *p.in_size, *p.out_size, w.blocks_per_split, w.pixel_splits, w.samples_per_split,
            stride_b, stride_k, *grad.stride(), *x.stride(),
            **p.constants(), **p.geometry(), NUM_KERNELS=p.num_kernels, PER_CHANNEL=per_channel,
            BY_CHANNEL=by_channel, GRAD_ALIGN=alignment(grad), X_ALIGN=alignment(x),
            COLUMN_ALIGN=math.gcd(8, p.out_size[1]), FLAT=w.flat, PATCH=w.patch,
            PIXELS_LAST=p.stride[1] > 1 and layout_of(x).rows, PRECISION=w.precision,
            DOT_DTYPE=dot_dtype(x.dtype, _common.architecture(x.device)),
            BLOCK_M=w.tile.block_m, BLOCK_N=w.tile.block_n, BLOCK_K=w.tile.block_k,
            num_warps=w.tile.warps, num_stages=w.tile.stages,
        )  # fmt: skip
    return WeightGradients(
        None if bank_parts is None else _sum_parts(bank_parts).to(weight.dtype),
        None if entry_parts is None else _sum_parts(entry_parts),
        None,
    )


def _sum_parts(parts: Tensor) -> Tensor:
    return parts.sum(0) if parts.shape[0] > 1 else parts[0]


def _mixed_grad(p: Problem, w: WeightGradient, grad: Tensor, x: Tensor) -> Tensor:
    """D [B, O, T, I/g], with a last column for the channel of ones where there is a code; float32."""
    arch = _common.architecture(x.device)
    row = p.in_per_group + bool(p.code_channels)
    splits = w.pixel_splits
    partial = x.new_empty((splits, p.batch, p.out_channels, p.taps, row), dtype=torch.float32)
    columns = p.in_per_group * p.taps
    if w.flat:
        p = p.flattened()
    sizes = (p.batch, *p.in_size, *p.out_size)
    strides = (*grad.stride(), *x.stride())
    options = {
        **p.constants(), **p.geometry(), "ROW": row, "GRAD_ALIGN": alignment(grad), "X_ALIGN": alignment(x),
        "COLUMN_ALIGN": math.gcd(8, p.out_size[1]), "FLAT": w.flat,
    }  # fmt: skip
    t = w.tile
    if w.path == "product":
        tiles = p.groups * triton.cdiv(p.out_per_group, t.block_m) * triton.cdiv(columns, t.block_n)
        _common.launch(
            _weight_dot_kernel, splits * p.batch * tiles,
            grad, x, partial, *sizes, w.blocks_per_split, *strides,
            **options, PATCH=w.patch, PIXELS_LAST=p.stride[1] > 1 and layout_of(x).rows,
            PRECISION=w.precision, DOT_DTYPE=dot_dtype(x.dtype, arch),
            BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_K=t.block_k, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    else:
        _common.launch(
            _weight_direct_kernel, splits * p.batch * columns * triton.cdiv(p.out_channels, t.block_m),
            grad, x, partial, *sizes, w.blocks_per_split, *strides,
            **options, PATCH=w.patch, BLOCK_M=t.block_m, BLOCK_P=t.block_k, num_warps=t.warps,
        )  # fmt: skip
    if p.code_channels:
        block_p, block_m = direct_blocks(
            math.prod(p.out_size), p.out_channels, layout_of(grad).channels, arch
        )
        blocks, patch = tiles_of(p.out_size, block_p, layout_of(grad))
        _common.launch(
            _weight_direct_kernel, splits * p.batch * p.taps * triton.cdiv(p.out_channels, block_m),
            grad, None, partial, *sizes, triton.cdiv(blocks, splits), *strides,
            **options, PATCH=patch, BLOCK_M=block_m, BLOCK_P=block_p, num_warps=4,
        )  # fmt: skip
    return _sum_parts(partial)


def _bank_grad(
    p: Problem, mixed_grad: Tensor, coefficients: Coefficients, grad_weight: Tensor, *, add: bool
) -> None:
    """Fills the gradient of the bank (of the samples' kernels without attention), or adds to it."""
    attention = coefficients.attention
    stride_b, stride_k, per_channel = attention_arguments(attention)
    rows = grad_weight.shape[0]
    block_n = 1 if attention is None else _common.power_of_two(rows, 1, 16)
    pairs = p.out_channels * p.weight_in
    block = _common.power_of_two(pairs, 16, 2048 // max(block_n, 4))
    _common.launch(
        _bank_grad_kernel,
        triton.cdiv(rows, block_n) * p.taps * triton.cdiv(pairs, block),
        mixed_grad, *coefficients, grad_weight, p.batch, rows, stride_b, stride_k,
        **p.constants(), WEIGHT_IN=p.weight_in, ROW=mixed_grad.shape[-1], TAPS=p.taps,
        PER_CHANNEL=per_channel, ADD=add, BLOCK_N=block_n, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _entry_sums(p: Problem, mixed_grad: Tensor, weight: Tensor, coefficients: Coefficients) -> Tensor:
    """E [B, N, O] float32; N = 1 without attention."""
    sums = mixed_grad.new_empty((p.batch, p.num_kernels, p.out_channels))
    block_n = _common.power_of_two(p.num_kernels, 1, 16)
    _common.launch(
        _entry_sums_kernel,
        p.batch * p.out_channels * triton.cdiv(p.num_kernels, block_n),
        mixed_grad, weight, coefficients.extended, coefficients.tap_scale, sums,
        p.num_kernels, weight.stride(0) if p.per_sample else 0,
        **p.constants(), WEIGHT_IN=p.weight_in, ROW=mixed_grad.shape[-1], TAPS=p.taps,
        BLOCK_N=block_n, BLOCK=_common.power_of_two(p.weight_in, 16, 2048 // max(block_n, 8)), num_warps=4,
    )  # fmt: skip
    return sums


def _channel_sums(
    p: Problem, mixed_grad: Tensor, weight: Tensor, coefficients: Coefficients, first_channel: int
) -> Tensor:
    """Q [B, I + D, T] float32, zero before `first_channel`."""
    channels = p.in_channels + p.code_channels
    sums = mixed_grad.new_zeros((p.batch, channels, p.taps))
    stride_b, stride_k, per_channel = attention_arguments(coefficients.attention)
    block = _common.power_of_two(channels - first_channel, 16, 128)
    _common.launch(
        _channel_sums_kernel,
        p.batch * p.taps * triton.cdiv(channels - first_channel, block),
        mixed_grad, weight, coefficients.attention, coefficients.out_scale, sums,
        p.num_kernels, first_channel, stride_b, stride_k, weight.stride(0) if p.per_sample else 0,
        **p.constants(), WEIGHT_IN=p.weight_in, ROW=mixed_grad.shape[-1], TAPS=p.taps,
        PER_CHANNEL=per_channel, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return sums
