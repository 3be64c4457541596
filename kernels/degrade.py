"""degrade and its gradients in Triton; `ddrf_fast/reference/degrade.py` is the specification.

    out[b, c, y, x] = S + sqrt(shot_noise max(S, 0) + noise_std^2) n
    S = sum_{u, v} (sum_m w[b, m, y, x] kernels[m, u, v]) image[b, c, s y + o - u, s x + o - v]

Forward: a program has a block of output sites and up to four channels. A site's M weights stay in registers;
for each tap the mixed kernel value is made from them (M multiply-adds) and applied to every channel, so
nothing of the size of the image is stored between. Weights are read at the sites only, or interpolated from
the grid; with one weight vector a sample the kernels are mixed before, once. Padding is an index map. Noise
is drawn in the epilogue, before the one rounding.

Backward: every gradient has one owner and no atomics.
    image      Gathered on the padded image: a program has pixels of one residue class modulo the scale, so
               that all of them meet the same taps, and reads the gradient at the sites that touched them.
               Then the padding is folded back, rows first, columns after, with the same index map.
    weights    As the forward: per site, a_t = sum_c dout image is spread over the M kernels.
    kernels    A matrix product [taps, sites] x [sites, M] over a chunk of sites; a second pass adds chunks.
    noise_std  The noise is drawn again.

Operations and bytes, with S = B H'W' sites, e bytes an element:
    floor     S k^2 (M + C) multiply-adds to mix and apply (M = 0 with one weight vector a sample); read the
              image once and M weights a site (or the grid), write S C: e (B C H W + S M + S C).
    forward   That many, on the ordinary float32 units, which bind it for all but the smallest kernels. Image
              values come through the L1 cache, one load for each tap and channel, and kernel values by four.
    backward  S k^2 (M + C) again for each of image, weights and kernels; the image's gradient loads M + C
              values a tap, because every tap belongs to another site.
"""

import inspect
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common

# Sites a program, by architecture: with 128 threads each thread has four, and all M weights of each, so that
# mixing needs no exchange between threads. The image's gradient, whose weights change with the tap, has half.
SITES = {"interpreter": 32, "sm_80": 512, "sm_90": 512, "gfx942": 512}
# The kernels' gradient: sites and taps of a step.
KERNEL_GRAD_BLOCKS = {"interpreter": (16, 16), "sm_80": (64, 32), "sm_90": (64, 32), "gfx942": (64, 32)}
# How many programs fill the GPU: the sum over sites is split until then.
FULL_GRID = {"interpreter": 4, "sm_80": 512, "sm_90": 512, "gfx942": 1024}


# Sizes and strides that would let the compiler vectorise an access along the sites, or along the channels,
# are kept from it: lanes have neighbouring sites in any case, and one layout for everything in a loop needs
# no exchange in shared memory.
_UNSPECIALIZED = (
    "out_width",
    "columns",
    "image_stride_c",
    "grad_stride_c",
    "out_stride_c",
    "padded_stride_c",
)


def _site_kernel(kernel: Any) -> Any:
    """A Triton kernel whose threads own sites."""
    names = set(inspect.signature(kernel).parameters)
    return triton.jit(kernel, do_not_specialize=[name for name in _UNSPECIALIZED if name in names])


@triton.jit
def _source(position, size, PADDING: tl.constexpr):
    """The index that a position of the padded axis reads, and whether there is one."""
    index = position
    if PADDING == "reflect":
        index = tl.where(index < 0, -index, index)
        index = tl.where(index >= size, 2 * (size - 1) - index, index)
    elif PADDING == "circular":
        index = tl.where(index < 0, index + size, index)
        index = tl.where(index >= size, index - size, index)
    elif PADDING == "replicate":
        index = tl.minimum(tl.maximum(index, 0), size - 1)
    return index, (index >= 0) & (index < size)


@triton.jit
def _log(x):
    """ln x for float32 x in (0, 1], to about one unit in the last place; tl.log is far off near 1."""
    bits = x.to(tl.uint32, bitcast=True).to(tl.int32)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    high = mantissa > 1.4142135
    f = tl.where(high, 0.5 * mantissa, mantissa) - 1.0
    exponent = tl.where(high, exponent + 1, exponent)
    s = f / (2.0 + f)
    z = s * s
    series = 1.0 + z * (0.33333334 + z * (0.2 + z * (0.14285715 + z * (0.11111111 + z * 0.09090909))))
    return exponent.to(tl.float32) * 0.6931472 + 2.0 * s * series


@triton.jit
def _cos_or_sin(turns, sine):
    """cos(2 pi turns), or where `sine` sin(2 pi turns), for turns in [0, 1): exact reduction, series."""
    quarter = (4.0 * turns + 0.5).to(tl.int32)
    t = (turns - 0.25 * quarter.to(tl.float32)) * 6.2831855
    z = t * t
    sin_t = t * (1.0 + z * (-0.16666667 + z * (8.3333333e-3 + z * (-1.9841270e-4 + z * 2.7557319e-6))))
    cos_t = 1.0 + z * (-0.5 + z * (4.1666667e-2 + z * (-1.3888889e-3 + z * 2.4801587e-5)))
    quarter = tl.where(sine, quarter + 3, quarter)  # the sine runs a quarter behind the cosine
    value = tl.where(quarter % 2 == 0, cos_t, sin_t)
    return tl.where(((quarter + 1) // 2) % 2 == 0, value, -value)


@triton.jit
def _standard_normal(seed, sample, channel, y, x):
    """Philox 4x32-10 and Box-Muller as in reference/philox.py; seed and sample are int64 scalars."""
    c0 = (x // 4).to(tl.uint32)
    c1 = y.to(tl.uint32)
    c2 = channel.to(tl.uint32)
    c3 = (sample & 0xFFFFFFFF).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full((), 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full((), 0xCD9E8D57, tl.uint32))
        low0 = c0 * tl.full((), 0xD2511F53, tl.uint32)
        low1 = c2 * tl.full((), 0xCD9E8D57, tl.uint32)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    second_pair = (x % 4) >= 2
    u1 = ((tl.where(second_pair, c2, c0) >> 8) + 1).to(tl.float32) * 5.9604645e-08
    u2 = (tl.where(second_pair, c3, c1) >> 8).to(tl.float32) * 5.9604645e-08
    return tl.sqrt(-2.0 * _log(u1)) * _cos_or_sin(u2, x % 2 == 1)


@triton.jit
def _noise_channel(gray_noise, b, c):
    """Whose noise the channels c of the sample b have: the first's, where it is gray."""
    if gray_noise is not None:
        c = tl.where(tl.load(gray_noise + b) != 0, 0, c)
    return c


@triton.jit
def _site_weights(
    weights, b, y, x, ok, weights_height, weights_width, cells_y, cells_x, offset,
    M: tl.constexpr, M_BLOCK: tl.constexpr, SCALE: tl.constexpr, WEIGHTS_AT: tl.constexpr,
):  # fmt: skip
    """The weights [M_BLOCK, sites] of the sites (y, x), float32; a pixel is cells_y by cells_x grid cells."""
    m = tl.arange(0, M_BLOCK)
    at_ok = (m < M)[:, None] & ok[None, :]
    base = weights + ((b * M + m) * weights_height * weights_width)[:, None]
    if WEIGHTS_AT == "output":
        row = y.to(tl.int64)
        column = x
    elif WEIGHTS_AT == "image":
        row = (y * SCALE + offset).to(tl.int64)
        column = x * SCALE + offset
    else:
        place_y = (y * SCALE + offset).to(tl.float32) * cells_y
        place_x = (x * SCALE + offset).to(tl.float32) * cells_x
        row = tl.minimum(place_y.to(tl.int32), weights_height - 1)
        column = tl.minimum(place_x.to(tl.int32), weights_width - 1)
        part_y = (place_y - row.to(tl.float32))[None, :]
        part_x = (place_x - column.to(tl.float32))[None, :]
        down = tl.where(row + 1 < weights_height, weights_width, 0)[None, :]
        right = tl.where(column + 1 < weights_width, 1, 0)[None, :]
        cell = base + (row * weights_width + column)[None, :]
        upper_left = tl.load(cell, at_ok, 0.0).to(tl.float32)
        upper_right = tl.load(cell + right, at_ok, 0.0).to(tl.float32)
        lower_left = tl.load(cell + down, at_ok, 0.0).to(tl.float32)
        lower_right = tl.load(cell + down + right, at_ok, 0.0).to(tl.float32)
        upper = upper_left + part_x * (upper_right - upper_left)
        lower = lower_left + part_x * (lower_right - lower_left)
        return upper + part_y * (lower - upper)
    return tl.load(base + (row * weights_width + column)[None, :], at_ok, 0.0).to(tl.float32)


@triton.jit
def _mixed_tap(kernels, tap, weights, M: tl.constexpr, M_BLOCK: tl.constexpr):
    """[1, sites]: the mixed kernels at one tap; kernels is [taps, M], or [taps] where weights is None."""
    if weights is None:
        return tl.load(kernels + tap + tl.zeros((1, 1), tl.int32))
    else:  # noqa: RET505 - the compiler needs it
        m = tl.arange(0, M_BLOCK)
        values = tl.load(kernels + tap * M + m, m < M, 0.0)
        return tl.sum(weights * values[:, None], axis=0)[None, :]


@_site_kernel
def _forward_kernel(
    image, kernels, weights, noise_std, seed, sample_ids, gray_noise, shot_noise, out, channels, height,
    width, out_height, out_width, offset, weights_height, weights_width, cells_y, cells_x, kernels_stride_b,
    noise_stride_b, noise_stride_site, image_stride_b, image_stride_c, image_stride_h, image_stride_w,
    out_stride_b, out_stride_c, out_stride_h, out_stride_w, M: tl.constexpr, M_BLOCK: tl.constexpr,
    KERNEL: tl.constexpr, SCALE: tl.constexpr, PADDING: tl.constexpr, CORRELATION: tl.constexpr,
    WEIGHTS_AT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program has BLOCK sites and BLOCK_C channels of a sample."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(out_height * out_width, BLOCK)
    site = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    pid = pid // tiles
    blocks_c = tl.cdiv(channels, BLOCK_C)
    c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (pid // blocks_c).to(tl.int64)
    y = site // out_width
    x = site % out_width
    ok = site < out_height * out_width
    c_ok = c < channels
    kernels += b * kernels_stride_b
    image += b * image_stride_b + c.to(tl.int64)[:, None] * image_stride_c
    site_weights = None
    if weights is not None:
        site_weights = _site_weights(
            weights,
            b,
            y,
            x,
            ok,
            weights_height,
            weights_width,
            cells_y,
            cells_x,
            offset,
            M,
            M_BLOCK,
            SCALE,
            WEIGHTS_AT,
        )

    acc = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for u in range(KERNEL):
        row, row_ok = _source(
            y * SCALE + offset + (u - KERNEL // 2) * (1 if CORRELATION else -1), height, PADDING
        )
        line = row.to(tl.int64) * image_stride_h
        row_ok = row_ok & ok
        for v in range(KERNEL):
            column, column_ok = _source(
                x * SCALE + offset + (v - KERNEL // 2) * (1 if CORRELATION else -1), width, PADDING
            )
            place = line + column.to(tl.int64) * image_stride_w
            values = tl.load(image + place[None, :], c_ok[:, None] & (row_ok & column_ok)[None, :], 0.0).to(
                tl.float32
            )
            acc += _mixed_tap(kernels, u * KERNEL + v, site_weights, M, M_BLOCK) * values

    if noise_std is not None:
        std = tl.load(noise_std + b * noise_stride_b + site.to(tl.int64) * noise_stride_site, ok, 0.0).to(
            tl.float32
        )
        std = std[None, :]
        if shot_noise is not None:
            shot = tl.load(shot_noise + b).to(tl.float32)
            std = tl.sqrt(shot * tl.maximum(acc, 0.0) + std * std)
        channel = _noise_channel(gray_noise, b, c)[:, None]
        acc += std * _standard_normal(tl.load(seed), tl.load(sample_ids + b), channel, y[None, :], x[None, :])
    out += b * out_stride_b + y.to(tl.int64)[None, :] * out_stride_h + x.to(tl.int64)[None, :] * out_stride_w
    out += c.to(tl.int64)[:, None] * out_stride_c
    tl.store(out, acc.to(out.dtype.element_ty), c_ok[:, None] & ok[None, :])


@_site_kernel
def _image_grad_kernel(
    grad, kernels, weights, padded, channels, padded_height, padded_width, rows, columns, out_height,
    out_width, top, left, kernels_stride_b, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    padded_stride_b, padded_stride_c, padded_stride_h, padded_stride_w, M: tl.constexpr, M_BLOCK:
    tl.constexpr, KERNEL: tl.constexpr, SCALE: tl.constexpr, CORRELATION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient on the padded image, whose first pixel lies (top, left) before the first site.

    A padded pixel Y and a tap meet in the site y with SCALE y = Y - top + tap - radius (correlation: minus
    tap + radius). weights is [B, M, H', W'].
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows * columns, BLOCK)
    pixel = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    pid = pid // tiles
    residue_y = pid % SCALE
    residue_x = pid // SCALE % SCALE
    pid = pid // (SCALE * SCALE)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (pid // blocks_c).to(tl.int64)
    Y = pixel // columns * SCALE + residue_y
    X = pixel % columns * SCALE + residue_x
    ok = (pixel < rows * columns) & (padded_height > Y) & (padded_width > X)
    c_ok = c < channels
    m = tl.arange(0, M_BLOCK)
    kernels += b * kernels_stride_b
    grad += b * grad_stride_b + c.to(tl.int64)[:, None] * grad_stride_c

    # Both are congruent to the first tap that lands on a site.
    shift_y = residue_y - top - KERNEL // 2 if not CORRELATION else top - residue_y - KERNEL // 2
    shift_x = residue_x - left - KERNEL // 2 if not CORRELATION else left - residue_x - KERNEL // 2
    first_u = (SCALE - shift_y % SCALE) % SCALE
    first_v = (SCALE - shift_x % SCALE) % SCALE
    acc = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for u in range(first_u, KERNEL, SCALE):
        y = (Y - top + (u - KERNEL // 2) * (-1 if CORRELATION else 1)) // SCALE
        row_ok = ok & (Y - top + (u - KERNEL // 2) * (-1 if CORRELATION else 1) >= 0) & (y < out_height)
        for v in range(first_v, KERNEL, SCALE):
            x = (X - left + (v - KERNEL // 2) * (-1 if CORRELATION else 1)) // SCALE
            site_ok = (
                row_ok & (X - left + (v - KERNEL // 2) * (-1 if CORRELATION else 1) >= 0) & (x < out_width)
            )
            place = y.to(tl.int64) * grad_stride_h + x.to(tl.int64) * grad_stride_w
            values = tl.load(grad + place[None, :], c_ok[:, None] & site_ok[None, :], 0.0).to(tl.float32)
            site_weights = None
            if weights is not None:
                at = ((b * M + m) * out_height * out_width)[:, None] + (y * out_width + x)[None, :]
                site_weights = tl.load(weights + at, (m < M)[:, None] & site_ok[None, :], 0.0).to(tl.float32)
            acc += _mixed_tap(kernels, u * KERNEL + v, site_weights, M, M_BLOCK) * values
    padded += (
        b * padded_stride_b
        + Y.to(tl.int64)[None, :] * padded_stride_h
        + X.to(tl.int64)[None, :] * padded_stride_w
    )
    padded += c.to(tl.int64)[:, None] * padded_stride_c
    tl.store(padded, acc.to(padded.dtype.element_ty), c_ok[:, None] & ok[None, :])


@triton.jit
def _fold_kernel(
    padded, folded, lines, size, padded_size, before, channels, other,
    padded_stride_b, padded_stride_c, padded_stride_line, padded_stride_axis,
    folded_stride_b, folded_stride_c, folded_stride_line, folded_stride_axis,
    PADDING: tl.constexpr, INNERMOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The adjoint of padding one axis: each pixel collects the padded positions that read it.

    `lines` counts (sample, channel, place on the other axis); `before` positions precede the axis, which is
    or is not the INNERMOST of the two.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = index < lines * size
    if INNERMOST:
        place = index % size
        line = index // size
        across = line % other
        line = line // other
    else:
        across = index % other
        line = index // other
        place = line % size
        line = line // size
    c = line % channels
    b = line // channels
    source = padded + b * padded_stride_b + c * padded_stride_c + across * padded_stride_line
    total = tl.load(source + (place + before) * padded_stride_axis, ok, 0.0)
    for outside in range(padded_size - size):
        position = tl.where(outside < before, outside - before, size + outside - before)
        reads, reads_ok = _source(position, size, PADDING)
        total += tl.load(
            source + (position + before) * padded_stride_axis, ok & reads_ok & (place == reads), 0.0
        )
    to = b * folded_stride_b + c * folded_stride_c + across * folded_stride_line + place * folded_stride_axis
    tl.store(folded + to, total.to(folded.dtype.element_ty), ok)


@_site_kernel
def _weights_grad_kernel(
    grad, image, kernels, grad_weights,
    channels, height, width, out_height, out_width, offset, kernels_stride_b,
    grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    image_stride_b, image_stride_c, image_stride_h, image_stride_w,
    M: tl.constexpr, M_BLOCK: tl.constexpr, KERNEL: tl.constexpr, SCALE: tl.constexpr, PADDING: tl.constexpr,
    CORRELATION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_weights[b, m, site] = sum_tap kernels[m, tap] sum_c grad[b, c, site] image[b, c, tap of site]."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(out_height * out_width, BLOCK)
    site = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    b = (pid // tiles).to(tl.int64)
    y = site // out_width
    x = site % out_width
    ok = site < out_height * out_width
    m = tl.arange(0, M_BLOCK)
    kernels += b * kernels_stride_b

    total = tl.zeros((M_BLOCK, BLOCK), tl.float32)
    for first_c in range(0, channels, BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C)
        c_ok = c < channels
        to = y.to(tl.int64)[None, :] * grad_stride_h + x.to(tl.int64)[None, :] * grad_stride_w
        to += b * grad_stride_b + c.to(tl.int64)[:, None] * grad_stride_c
        dout = tl.load(grad + to, c_ok[:, None] & ok[None, :], 0.0).to(tl.float32)
        plane = image + b * image_stride_b + c.to(tl.int64)[:, None] * image_stride_c
        for u in range(KERNEL):
            row, row_ok = _source(
                y * SCALE + offset + (u - KERNEL // 2) * (1 if CORRELATION else -1), height, PADDING
            )
            line = row.to(tl.int64) * image_stride_h
            row_ok = row_ok & ok
            for v in range(KERNEL):
                column, column_ok = _source(
                    x * SCALE + offset + (v - KERNEL // 2) * (1 if CORRELATION else -1), width, PADDING
                )
                place = line + column.to(tl.int64) * image_stride_w
                values = tl.load(plane + place[None, :], c_ok[:, None] & (row_ok & column_ok)[None, :], 0.0)
                touched = tl.sum(dout * values.to(tl.float32), axis=0)
                total += tl.load(kernels + (u * KERNEL + v) * M + m, m < M, 0.0)[:, None] * touched[None, :]
    to = ((b * M + m) * out_height * out_width)[:, None] + site[None, :]
    tl.store(grad_weights + to, total, (m < M)[:, None] & ok[None, :])


@_site_kernel
def _kernels_grad_kernel(
    grad, image, weights, partial,
    channels, height, width, out_height, out_width, offset, chunks, sites_per_chunk,
    grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    image_stride_b, image_stride_c, image_stride_h, image_stride_w,
    M: tl.constexpr, M_BLOCK: tl.constexpr, KERNEL: tl.constexpr, SCALE: tl.constexpr, PADDING: tl.constexpr,
    CORRELATION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """partial[b, chunk, tap, m] = sum_site w[b, m, site] sum_c grad[b, c, site] image[b, c, tap of site].

    weights [B, M, H', W'], or None for M = 1 and ones.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    TILES: tl.constexpr = (TAPS + BLOCK_T - 1) // BLOCK_T
    pid = tl.program_id(0)
    t = (pid % TILES) * BLOCK_T + tl.arange(0, BLOCK_T)
    pid = pid // TILES
    chunk = pid % chunks
    b = (pid // chunks).to(tl.int64)
    t_ok = t < TAPS
    down = offset + (t // KERNEL - KERNEL // 2) * (1 if CORRELATION else -1)
    right = offset + (t % KERNEL - KERNEL // 2) * (1 if CORRELATION else -1)
    m = tl.arange(0, M_BLOCK)
    start = chunk * sites_per_chunk
    end = tl.minimum(start + sites_per_chunk, out_height * out_width)

    if weights is None:
        total = tl.zeros((BLOCK_T,), tl.float32)
    else:
        total = tl.zeros((BLOCK_T, M_BLOCK), tl.float32)
    for first in range(start, end, BLOCK):
        site = first + tl.arange(0, BLOCK)
        ok = site < end
        y = site // out_width
        x = site % out_width
        row, row_ok = _source((y * SCALE)[None, :] + down[:, None], height, PADDING)
        column, column_ok = _source((x * SCALE)[None, :] + right[:, None], width, PADDING)
        inside = row_ok & column_ok & ok[None, :] & t_ok[:, None]
        place = (
            image
            + b * image_stride_b
            + row.to(tl.int64) * image_stride_h
            + column.to(tl.int64) * image_stride_w
        )
        to = grad + b * grad_stride_b + y.to(tl.int64) * grad_stride_h + x.to(tl.int64) * grad_stride_w
        touched = tl.zeros((BLOCK_T, BLOCK), tl.float32)
        for _ in range(channels):
            dout = tl.load(to, ok, 0.0).to(tl.float32)
            touched += dout[None, :] * tl.load(place, inside, 0.0).to(tl.float32)
            to += grad_stride_c
            place += image_stride_c
        if weights is None:
            total += tl.sum(touched, axis=1)
        else:
            at = ((b * M + m) * out_height * out_width)[None, :] + site[:, None]
            site_weights = tl.load(weights + at, ok[:, None] & (m < M)[None, :], 0.0).to(tl.float32)
            total = tl.dot(touched, site_weights, total, input_precision="ieee")
    if weights is None:
        tl.store(partial + (b * chunks + chunk) * TAPS + t, total, t_ok)
    else:
        to = ((b * chunks + chunk) * TAPS + t)[:, None] * M + m[None, :]
        tl.store(partial + to, total, t_ok[:, None] & (m < M)[None, :])


@_site_kernel
def _noise_grad_kernel(
    grad, seed, sample_ids, gray_noise, product, channels, out_height, out_width, grad_stride_b,
    grad_stride_c, grad_stride_h, grad_stride_w, BLOCK: tl.constexpr,
):  # fmt: skip
    """product[b, y, x] = sum_c grad[b, c, y, x] n(b, c, y, x)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(out_height * out_width, BLOCK)
    site = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    b = (pid // tiles).to(tl.int64)
    y = site // out_width
    x = site % out_width
    ok = site < out_height * out_width
    grad += b * grad_stride_b + y.to(tl.int64) * grad_stride_h + x.to(tl.int64) * grad_stride_w
    total = tl.zeros((BLOCK,), tl.float32)
    for c in range(channels):
        channel = _noise_channel(gray_noise, b, tl.zeros((1,), tl.int32) + c)
        noise = _standard_normal(tl.load(seed), tl.load(sample_ids + b), channel, y, x)
        total += noise * tl.load(grad, ok, 0.0).to(tl.float32)
        grad += grad_stride_c
    tl.store(product + b * out_height * out_width + site, total, ok)


def _bank(image: Tensor, kernels: Tensor, weights: Tensor, weights_at: str) -> tuple[Tensor, int]:
    """The kernels in float32, taps outermost, [.., k k, M], and their stride over samples.

    With one weight vector a sample they are mixed here: [B, k k].
    """
    wide = _per_unit(kernels.float().flatten(-2), image)
    if weights_at == "sample":
        mixed = (weights.float()[:, :, None] * wide).sum(1)
        return mixed, mixed.stride(0)
    bank = wide.transpose(-1, -2).contiguous()
    return bank, bank.stride(0) if bank.dim() == 3 else 0


def _per_unit(value: Tensor, image: Tensor) -> Tensor:
    """For a factor of the image: kernels read integers as they are, but these stand for [0, 1]."""
    return value if image.is_floating_point() else value / torch.iinfo(image.dtype).max


def _empty_like(argument: Tensor | None, image: Tensor) -> Tensor:
    """In place of a gradient that is not asked for."""
    return (image if argument is None else argument).new_empty((0,))


def _constants(kernels: Tensor, weights: Tensor, scale: int, correlation: bool) -> dict[str, Any]:
    return {
        "M": weights.shape[1],
        "M_BLOCK": triton.next_power_of_2(weights.shape[1]),
        "KERNEL": kernels.shape[-1],
        "SCALE": scale,
        "CORRELATION": correlation,
    }


def _dense(*per_sample: Tensor | None) -> list[Tensor | None]:
    """[B], without gaps."""
    return [None if value is None else value.contiguous() for value in per_sample]


def _block(device: torch.device, num_weights: int) -> int:
    """Sites a program: fewer where a site has more than sixteen weights in registers."""
    sites = SITES[_common.architecture(device)]
    return max(16, min(sites, 16 * sites // triton.next_power_of_2(num_weights)))


def degrade(
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    noise_std: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    gray_noise: Tensor | None,
    shot_noise: Tensor | None,
    scale: int,
    offset: int,
    out_size: Any,
    padding: str,
    correlation: bool,
    weights_at: str,
) -> Tensor:
    """out [B, C, H', W'] in the kernels' dtype and the image's memory format; `ddrf_fast::degrade`."""
    batch, channels, height, width = image.shape
    out = _common.empty_like_format(image, (batch, channels, *out_size), kernels.dtype)
    if out.numel() == 0:
        return out
    bank, bank_stride = _bank(image, kernels, weights, weights_at)
    weights_size, cells = (1, 1), (0.0, 0.0)
    if weights_at != "sample":
        weights_size = weights.shape[2:]
    if weights_at == "grid":
        cells = tuple(_cells_per_pixel(weights_size[i], image.shape[2 + i]) for i in range(2))
    noise_strides = (0, 0)
    if noise_std is not None:
        noise_std = noise_std.contiguous()
        noise_strides = (noise_std.stride(0), 0 if noise_std[:1].numel() == 1 else 1)
    # Interpolating from a grid has more than one corner's weights in registers for a while.
    num_weights = {"sample": 1, "grid": 2 * weights.shape[1]}.get(weights_at, weights.shape[1])
    block, block_c = _block(image.device, num_weights), _common.power_of_two(channels, 1, 4)
    _common.launch(
        _forward_kernel,
        batch * triton.cdiv(channels, block_c) * triton.cdiv(math.prod(out_size), block),
        image, bank, None if weights_at == "sample" else weights.contiguous(),
        noise_std, seed, *_dense(sample_ids, gray_noise, shot_noise), out,
        channels, height, width, *out_size, offset, *weights_size, *cells,
        bank_stride, *noise_strides, *image.stride(), *out.stride(),
        **_constants(kernels, weights, scale, correlation), PADDING=padding, WEIGHTS_AT=weights_at,
        BLOCK=block, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out


def _cells_per_pixel(cells: int, size: int) -> float:
    """How far one pixel reaches in a grid whose ends lie on the image's."""
    return (cells - 1) / (size - 1) if size > 1 else 0.0


def _interpolation(sites: int, scale: int, offset: int, cells: int, size: int, like: Tensor) -> Tensor:
    """The matrix [sites, cells] of linear interpolation along one axis, float32."""
    place = (torch.arange(sites, device=like.device) * scale + offset) * _cells_per_pixel(cells, size)
    return (1 - (place[:, None] - torch.arange(cells, device=like.device)).abs()).clamp(min=0).float()


def _sites_of(maps: Tensor, scale: int, offset: int, size: Any) -> Tensor:
    """The strided sites of maps [B, M, H, W], as a view."""
    rows, columns = (slice(offset, offset + scale * (n - 1) + 1, scale) for n in size)
    return maps[:, :, rows, columns]


def _image_grad(
    grad: Tensor, image: Tensor, bank: Tensor, bank_stride: int, site_weights: Tensor | None, scale: int,
    offset: int, padding: str, constants: dict[str, Any], block: int,
) -> Tensor:  # fmt: skip
    batch, channels = image.shape[:2]
    radius = constants["KERNEL"] // 2
    before, after = [0, 0], [0, 0]
    if padding != "zeros":
        last = [offset + scale * (n - 1) + radius for n in grad.shape[2:]]
        before = [max(0, radius - offset)] * 2
        after = [max(0, last[i] - image.shape[2 + i] + 1) for i in range(2)]
    sizes = [before[i] + image.shape[2 + i] + after[i] for i in range(2)]
    rows, columns = (triton.cdiv(size, scale) for size in sizes)

    out = _common.empty_like_format(image, tuple(image.shape))
    padded = (
        out
        if sizes == list(image.shape[2:])
        else image.new_empty((batch, channels, *sizes), dtype=torch.float32)
    )
    block_c = _common.power_of_two(channels, 1, 4)
    _common.launch(
        _image_grad_kernel,
        batch * triton.cdiv(channels, block_c) * scale**2 * triton.cdiv(rows * columns, block),
        grad, bank, site_weights, padded,
        channels, *sizes, rows, columns, *grad.shape[2:], before[0] + offset, before[1] + offset,
        bank_stride, *grad.stride(), *padded.stride(), **constants, BLOCK=block, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip

    for axis, other in ((2, 3), (3, 2)):
        if padded.shape[axis] == image.shape[axis]:
            continue
        size = list(padded.shape)
        size[axis] = image.shape[axis]
        folded = out if size == list(image.shape) else padded.new_empty(size)
        lines = batch * channels * size[other]
        _common.launch(
            _fold_kernel, triton.cdiv(lines * size[axis], 1024),
            padded, folded, lines, size[axis], padded.shape[axis], before[axis - 2], channels, size[other],
            *padded.stride()[:2], padded.stride(other), padded.stride(axis),
            *folded.stride()[:2], folded.stride(other), folded.stride(axis),
            PADDING=padding, INNERMOST=axis == 3, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        padded = folded
    return out


def _kernels_grad(
    grad: Tensor,
    image: Tensor,
    site_weights: Tensor | None,
    offset: int,
    padding: str,
    constants: dict[str, Any],
) -> Tensor:
    """[B, k k, M] float32: each sample's own share; [B, k k], of the mixed kernel, without site weights."""
    batch, channels, height, width = image.shape
    sites, taps = math.prod(grad.shape[2:]), constants["KERNEL"] ** 2
    arch = _common.architecture(image.device)
    block, block_t = KERNEL_GRAD_BLOCKS[arch]
    tiles = triton.cdiv(taps, block_t)
    chunks = max(1, min(FULL_GRID[arch] // (batch * tiles), sites // (4 * block)))
    sites_per_chunk = triton.cdiv(triton.cdiv(sites, chunks), block) * block
    chunks = triton.cdiv(sites, sites_per_chunk)
    kept = () if site_weights is None else (constants["M"],)
    partial = image.new_empty((batch, chunks, taps, *kept), dtype=torch.float32)
    _common.launch(
        _kernels_grad_kernel,
        batch * chunks * tiles,
        grad, image, site_weights, partial,
        channels, height, width, *grad.shape[2:], offset, chunks, sites_per_chunk,
        *grad.stride(), *image.stride(),
        **constants | {"M_BLOCK": max(16, constants["M_BLOCK"])},
        PADDING=padding, BLOCK=block, BLOCK_T=block_t, num_warps=8,
    )  # fmt: skip
    return _per_unit(partial.sum(1), image)


def degrade_backward(
    grad: Tensor,
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    noise_std: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    gray_noise: Tensor | None,
    scale: int,
    offset: int,
    padding: str,
    correlation: bool,
    weights_at: str,
    output_mask: int,
) -> tuple[Tensor, ...]:
    """Gradients of image, kernels, weights and noise_std, without shot noise; (0,) where not asked for."""
    tensors = (image, kernels, weights, noise_std)
    want_image, want_kernels, want_weights, want_noise = wanted = [
        bool(output_mask >> i & 1) for i in range(4)
    ]
    if grad.numel() == 0:
        return tuple(
            torch.zeros_like(t) if want and t is not None else _empty_like(t, image)
            for t, want in zip(tensors, wanted, strict=True)
        )
    batch, channels, height, width = image.shape
    out_size = tuple(grad.shape[2:])
    sites = math.prod(out_size)
    block = _block(image.device, 1 if weights_at == "sample" else weights.shape[1])
    grads = [_empty_like(t, image) for t in tensors]

    bank, bank_stride = _bank(image, kernels, weights, weights_at)
    constants = _constants(kernels, weights, scale, correlation)
    site_weights = None
    if weights_at == "grid":
        along_y, along_x = (
            _interpolation(out_size[i], scale, offset, weights.shape[2 + i], image.shape[2 + i], weights)
            for i in range(2)
        )
    if weights_at == "grid" and (want_image or want_kernels):
        site_weights = along_y @ weights.float() @ along_x.T
    elif weights_at == "image":
        site_weights = _sites_of(weights, scale, offset, out_size).contiguous()
    elif weights_at == "output":
        site_weights = weights.contiguous()

    if want_image:
        grads[0] = _image_grad(
            grad, image, bank, bank_stride, site_weights, scale, offset, padding, constants, block // 2
        )
    if weights_at == "sample" and (want_kernels or want_weights):
        grad_mixed = _kernels_grad(grad, image, None, offset, padding, constants)[:, None]
        if want_kernels:
            own = weights.float()[:, :, None] * grad_mixed
            grads[1] = (own if kernels.dim() == 4 else own.sum(0)).view(kernels.shape).to(kernels.dtype)
        if want_weights:
            grads[2] = (grad_mixed * kernels.float().flatten(-2)).sum(2).to(kernels.dtype)
    elif want_kernels:
        own = _kernels_grad(grad, image, site_weights, offset, padding, constants)
        own = own if kernels.dim() == 4 else own.sum(0)
        grads[1] = own.transpose(-1, -2).contiguous().view(kernels.shape).to(kernels.dtype)
    if weights_at != "sample" and want_weights:
        at_sites = image.new_empty((batch, constants["M"], *out_size), dtype=torch.float32)
        _common.launch(
            _weights_grad_kernel,
            batch * triton.cdiv(sites, block),
            grad, image, bank, at_sites,
            channels, height, width, *out_size, offset, bank_stride, *grad.stride(), *image.stride(),
            **constants, PADDING=padding, BLOCK=block, BLOCK_C=_common.power_of_two(channels, 1, 4),
            num_warps=4,
        )  # fmt: skip
        if weights_at == "grid":
            at_sites = along_y.T @ at_sites @ along_x
        grads[2] = at_sites.to(kernels.dtype)
        if weights_at == "image":
            grads[2] = torch.zeros_like(weights, memory_format=torch.contiguous_format)
            _sites_of(grads[2], scale, offset, out_size).copy_(at_sites)
    if want_noise:
        product = image.new_empty((batch, 1, *out_size), dtype=torch.float32)
        _common.launch(
            _noise_grad_kernel, batch * triton.cdiv(sites, block),
            grad, seed, *_dense(sample_ids, gray_noise), product, channels, *out_size, *grad.stride(),
            BLOCK=block, num_warps=4,
        )  # fmt: skip
        grads[3] = product.sum_to_size(noise_std.shape).to(kernels.dtype)
    return tuple(grads)


def unsupported(op_name: str, *args: Any) -> str | None:
    """Why these kernels cannot run the raw operator `op_name` on `args`; None when they can."""
    tensors = args[1:5] if op_name.endswith("_backward") else args[:4]
    image, kernels, weights, noise_std = tensors
    floating = {"image": image, "kernels": kernels, "weights": weights, "noise_std": noise_std}
    if image.dtype in (torch.uint8, torch.uint16):
        del floating["image"]
    reason = _common.unsupported_tensor(*next(iter(floating.items())))
    if reason is not None:
        return reason
    for name, tensor in floating.items():
        if tensor is not None and tensor.dtype != kernels.dtype:
            return f"{name} is {tensor.dtype}, kernels {kernels.dtype}; the Triton kernels take one dtype"
    if math.prod(image.shape[2:]) > _common.MAX_INT32:
        return "an image has more than 2^31 - 1 pixels"
    if weights.shape[1] > 256:
        return f"a site has {weights.shape[1]} weights; the Triton kernels keep at most 256 in registers"
    return None
