"""route in Triton; `ddrf_fast/reference/route.py` is the specification.

    pooled = mean of x over its pixels, or x itself where it is [B, C]; then code
    hidden = relu(pooled squeeze_weight^T + squeeze_bias), or pooled without squeeze_weight
    result = scale . normalization((hidden excite_weight^T + excite_bias) / temperature)

One launch, a program for each sample: it goes through the inputs block by block, takes the mean over the
pixels of a block's channels, and adds that block's part of the first layer; what it sums in between stays in
registers, in float32. Where a sample is large, one program would wait for memory: another launch makes the
sums over the pixels first, in parts, which the program then adds in order. No atomics.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._conv_plan import FULL_GRID
from ._pixels import aligned, alignment, layout_of, pixel_tiles, place, tile_pixels, tiles_of

# Above so many elements a sample, the sums over its pixels are a launch of their own: one program loads a few
# bytes a cycle only. An assumption, not a measurement.
POOLED_ELEMENTS = 1 << 16
# Elements that a program holds at a time.
BLOCK_ELEMENTS = 2048
# The layers' results stay in registers.
MOST_UNITS = 4096


@triton.jit
def _pool_kernel(
    x, parts, channels, height, width, blocks_per_split, stride_b, stride_c, stride_h, stride_w,
    ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, FLAT: tl.constexpr, PATCH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """parts[b, split, c] = sum_p x[b, c, p], over the split's pixels."""
    pid = tl.program_id(0)
    split = pid % SPLITS
    pid = pid // SPLITS
    tiles = tl.cdiv(channels, BLOCK_C)
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (pid // tiles).to(tl.int64)
    c_ok = c < channels
    x += aligned(b, stride_b, ALIGN) + aligned(c, stride_c, ALIGN)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    blocks = pixel_tiles(height, width, BLOCK_P, PATCH, FLAT)
    start = split * blocks_per_split
    for block in range(start, tl.minimum(start + blocks_per_split, blocks)):
        iy, ix, ok = tile_pixels(block, height, width, COLUMN_ALIGN, BLOCK_P, PATCH, FLAT)
        at = place(iy, ix, stride_h, stride_w, ALIGN, FLAT)
        total += tl.load(x + at[:, None], ok[:, None] & c_ok[None, :], 0.0).to(tl.float32)
    tl.store(parts + (b * SPLITS + split) * channels + c, tl.sum(total, axis=0), c_ok)


@triton.jit
def _route_kernel(
    x, squeeze_weight, squeeze_bias, excite_weight, excite_bias, code, temperature, result, channels,
    code_channels, units, num_kernels, pixels, scale, height, width, stride_b, stride_c, stride_h, stride_w,
    ALIGN: tl.constexpr, COLUMN_ALIGN: tl.constexpr, FLAT: tl.constexpr, PATCH: tl.constexpr,
    SIGMOID: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One sample; `units` are those of the first layer, BLOCK_U the smallest power of two above.

    x is an image, or the parts of its sums: an image of one column, of which `pixels` is the divisor.
    """
    b = tl.program_id(0).to(tl.int64)
    u = tl.arange(0, BLOCK_U)
    u_ok = u < units
    if squeeze_weight is not None:
        weight = squeeze_weight
        bias = squeeze_bias
    else:
        weight = excite_weight
        bias = excite_bias
    inputs = channels + code_channels
    x += aligned(b, stride_b, ALIGN)
    sums = tl.zeros((BLOCK_U,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_ok = c < channels
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for block in range(pixel_tiles(height, width, BLOCK_P, PATCH, FLAT)):
            iy, ix, ok = tile_pixels(block, height, width, COLUMN_ALIGN, BLOCK_P, PATCH, FLAT)
            at = place(iy, ix, stride_h, stride_w, ALIGN, FLAT)
            total += tl.load(
                x + at[:, None] + aligned(c, stride_c, ALIGN)[None, :], ok[:, None] & c_ok[None, :], 0.0
            ).to(tl.float32)
        pooled = tl.sum(total, axis=0) / pixels
        rows = tl.load(
            weight + u.to(tl.int64)[:, None] * inputs + c[None, :], u_ok[:, None] & c_ok[None, :], 0.0
        )
        sums += tl.sum(rows.to(tl.float32) * pooled[None, :], axis=1)
    if code is not None:
        for start in range(0, code_channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            c_ok = c < code_channels
            values = tl.load(code + b * code_channels + c, c_ok, 0.0).to(tl.float32)
            at = u.to(tl.int64)[:, None] * inputs + channels + c[None, :]
            rows = tl.load(weight + at, u_ok[:, None] & c_ok[None, :], 0.0)
            sums += tl.sum(rows.to(tl.float32) * values[None, :], axis=1)
    if bias is not None:
        sums += tl.load(bias + u, u_ok, 0.0).to(tl.float32)

    n = tl.arange(0, BLOCK_N)
    n_ok = n < num_kernels
    if squeeze_weight is not None:
        hidden = tl.maximum(sums, 0.0)
        logits = tl.zeros((BLOCK_N,), tl.float32)
        for k in range(num_kernels):
            row = tl.load(excite_weight + k * units + u, u_ok, 0.0).to(tl.float32)
            logits += tl.where(n == k, tl.sum(row * hidden), 0.0)
        if excite_bias is not None:
            logits += tl.load(excite_bias + n, n_ok, 0.0).to(tl.float32)
    else:
        logits = sums
    if temperature is not None:
        logits /= tl.load(temperature).to(tl.float32)
    if SIGMOID:
        values = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(n_ok, logits, float("-inf"))
        values = tl.exp(logits - tl.max(logits, axis=0))
        values /= tl.sum(values, axis=0)
    tl.store(result + b * num_kernels + n, (values * scale).to(result.dtype.element_ty), n_ok)


def route(
    x: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    excite_weight: Tensor,
    excite_bias: Tensor | None,
    code: Tensor | None,
    temperature: Tensor | None,
    normalization: str,
    scale: float,
) -> Tensor:
    """Attention [B, N] in x's dtype; the raw operator `ddrf_fast::route`."""
    batch, channels = x.shape[:2]
    result = x.new_empty((batch, excite_weight.shape[0]))
    if batch == 0:
        return result
    excite_weight = excite_weight.contiguous()
    squeeze_weight, squeeze_bias, excite_bias, code = (
        t if t is None else t.contiguous() for t in (squeeze_weight, squeeze_bias, excite_bias, code)
    )
    pixels = math.prod(x.shape[2:])
    image = x if x.dim() == 4 else x[:, :, None, None]
    if image[0].numel() > POOLED_ELEMENTS:
        image = _pool(image)
    units = (excite_weight if squeeze_weight is None else squeeze_weight).shape[0]
    height, width = image.shape[2:]
    block_u = triton.next_power_of_2(units)
    block_c = _common.power_of_two(channels, 1, max(1, min(64, BLOCK_ELEMENTS // block_u)))
    block_p = _common.power_of_two(height * width, 1, BLOCK_ELEMENTS // block_c)
    flat = layout_of(image).flat
    if flat:
        height, width = 1, height * width
    _common.launch(
        _route_kernel, batch,
        image, squeeze_weight, squeeze_bias, excite_weight, excite_bias, code, temperature, result,
        channels, 0 if code is None else code.shape[1], units, excite_weight.shape[0], pixels, float(scale),
        height, width, *image.stride(),
        ALIGN=alignment(image), COLUMN_ALIGN=math.gcd(8, width), FLAT=flat, PATCH=0,
        SIGMOID=normalization == "sigmoid", BLOCK_P=block_p, BLOCK_C=block_c, BLOCK_U=block_u,
        BLOCK_N=triton.next_power_of_2(excite_weight.shape[0]), num_warps=4,
    )  # fmt: skip
    return result


def _pool(x: Tensor) -> Tensor:
    """Sums of x over parts of its pixels, [B, C, parts, 1] float32."""
    batch, channels, height, width = x.shape
    layout = layout_of(x)
    block_c = _common.power_of_two(channels, 1, 64 if layout.channels else 8)
    block_p = _common.power_of_two(height * width, 1, BLOCK_ELEMENTS // block_c)
    size = (1, height * width) if layout.flat else (height, width)
    blocks, patch = tiles_of(size, block_p, layout)
    tiles = batch * triton.cdiv(channels, block_c)
    splits = max(1, min(FULL_GRID[_common.architecture(x.device)] // tiles, blocks // 2))
    each = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, each)
    parts = x.new_empty((batch, splits, channels), dtype=torch.float32)
    _common.launch(
        _pool_kernel, tiles * splits,
        x, parts, channels, *size, each, *x.stride(),
        ALIGN=alignment(x), COLUMN_ALIGN=math.gcd(8, size[1]), FLAT=layout.flat, PATCH=patch,
        BLOCK_P=block_p, BLOCK_C=block_c, SPLITS=splits, num_warps=4,
    )  # fmt: skip
    return parts.transpose(1, 2)[..., None]


def plan(op_name: str, x: Tensor, *args: Any) -> str:
    """In words, how `route` runs for these arguments."""
    if x.dim() == 4 and math.prod(x.shape[1:]) > POOLED_ELEMENTS:
        return "two launches: the sums over the pixels in parts, then a program for each sample"
    return "one launch, a program for each sample"


def unsupported(op_name: str, *args: Any) -> str | None:
    """Why these kernels cannot run the raw operator `op_name` on `args`; None when they can."""
    x, squeeze_weight, squeeze_bias, excite_weight, excite_bias, code, temperature = args[:7]
    reason = _common.unsupported_tensor("x", x)
    if reason is not None:
        return reason
    others = {
        "squeeze_weight": squeeze_weight,
        "squeeze_bias": squeeze_bias,
        "excite_weight": excite_weight,
        "excite_bias": excite_bias,
        "code": code,
    }
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype} and x is {x.dtype}; the Triton kernels take one dtype"
        if tensor is not None and name.endswith("weight") and tensor.shape[0] > MOST_UNITS:
            return f"{name} has {tensor.shape[0]} rows; the Triton kernel holds at most {MOST_UNITS}"
    if temperature is not None and not temperature.is_floating_point():
        return f"temperature is {temperature.dtype}"
    if math.prod(x.shape[1:]) > _common.MAX_INT32:
        return "a sample has more than 2^31 - 1 elements"
    return None
