"""How the pixels of an image are laid out in tiles, for every kernel that takes them in blocks.

The compiler makes wide loads of what it can prove to be contiguous and aligned. Pixels that are counted
through a map lie in rows whose ends it cannot see, and the JIT tells it of strides that 16 divides only. So,
where rows are contiguous in memory (NCHW), a tile of pixels is a patch as wide as a power of two, and the
greatest common divisor of the strides and 8 is a constant.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Layout(NamedTuple):
    """What matters of an image's strides.

    Attributes:
        rows: Whether pixels of a row are neighbours in memory, and not channels (NCHW).
        channels: Whether channels are (channels_last).
        flat: Whether rows follow each other without a gap, so that pixels may be counted through.
    """

    rows: bool
    channels: bool
    flat: bool


def layout_of(image: Tensor) -> Layout:
    """The layout of a tensor [B, C, H, W]."""
    _, channel, row, pixel = image.stride()
    flat = image.shape[2] == 1 or row == image.shape[3] * pixel
    return Layout(pixel == 1 and channel != 1, channel == 1, flat)


def alignment(image: Tensor) -> int:
    """Elements, at most 8, that divide all strides of an image whose rows are contiguous: the kernels cannot
    see it, since the JIT tells them of divisibility by 16 only. 1 for other images."""
    if image.stride(3) != 1:
        return 1
    strides = [s for s, n in zip(image.stride()[:3], image.shape[:3], strict=True) if n > 1]
    return math.gcd(8, *strides)


def _patch_width(rows: int, columns: int, block: int) -> int:
    """The width of the patches that lose the fewest pixels to the edges; 0 where they lose over a third more
    than blocks that take pixels row after row, wherever rows end."""
    if rows == 1:
        return block

    def covered(width: int) -> int:
        return triton.cdiv(rows, block // width) * triton.cdiv(columns, width) * block

    best = min((width for width in (32, 16, 8, 4) if width <= block), key=covered)
    return best if 3 * covered(best) <= 4 * triton.cdiv(rows * columns, block) * block else 0


def tiles_of(size: tuple[int, int], block: int, layout: Layout) -> tuple[int, int]:
    """How many blocks the pixels of a map take, and the width of their patches.

    Patches let neighbouring threads load and store neighbouring pixels where these are neighbours in memory;
    the width is 0 where pixels are taken row after row.
    """
    patch = _patch_width(*size, block) if layout.rows else 0
    return _pixel_tiles(*size, block, patch), patch


def _pixel_tiles(rows: int, columns: int, block: int, patch: int) -> int:
    if patch:
        return triton.cdiv(rows, block // patch) * triton.cdiv(columns, patch)
    return triton.cdiv(rows * columns, block)


@triton.jit
def tile_pixels(
    tile, rows, columns, COLUMN_ALIGN: tl.constexpr, BLOCK: tl.constexpr, PATCH: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Row and column of the BLOCK pixels of a tile, and which exist; COLUMN_ALIGN divides the columns."""
    at = tl.arange(0, BLOCK)
    columns = columns // COLUMN_ALIGN * COLUMN_ALIGN
    if FLAT:
        x = tile * BLOCK + at
        y = tl.zeros((BLOCK,), tl.int32)
        ok = x < columns
    elif PATCH > 0:
        across = tl.cdiv(columns, PATCH)
        y = tile // across * (BLOCK // PATCH) + at // PATCH
        x = tile % across * PATCH + at % PATCH
        ok = (y < rows) & (x < columns)
    else:
        pixel = tile * BLOCK + at
        y = pixel // columns
        x = pixel % columns
        ok = pixel < rows * columns
    return y, x, ok


@triton.jit
def pixel_tiles(rows, columns, BLOCK: tl.constexpr, PATCH: tl.constexpr, FLAT: tl.constexpr):
    """How many tiles there are."""
    if PATCH > 0 and not FLAT:
        tiles = tl.cdiv(rows, BLOCK // PATCH) * tl.cdiv(columns, PATCH)
    else:
        tiles = tl.cdiv(rows * columns, BLOCK)
    return tiles


@triton.jit
def aligned(index, stride, ALIGN: tl.constexpr):
    """index * stride, for a stride that ALIGN divides: the compiler sees that."""
    if ALIGN == 1:
        offset = index.to(tl.int64) * stride
    else:
        offset = (index.to(tl.int64) * (stride // ALIGN)) * ALIGN
    return offset


@triton.jit
def place(y, x, stride_h, stride_w, ALIGN: tl.constexpr, FLAT: tl.constexpr):
    """The offset of pixels within a channel."""
    if FLAT:
        at = x.to(tl.int64) * stride_w
    else:
        at = aligned(y, stride_h, ALIGN) + x.to(tl.int64) * stride_w
    return at


@triton.jit
def taps_inside(
    y, x, ok, height, width, KH: tl.constexpr, KW: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
):  # fmt: skip
    """A bit for each tap that lies inside the image, int32, for pixels whose first tap is at (y, x)."""
    bits = tl.zeros(y.shape, tl.int32)
    for u in tl.static_range(KH):
        for v in tl.static_range(KW):
            iy = y + u * DILATION_H
            ix = x + v * DILATION_W
            inside = ok & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
            bits |= inside.to(tl.int32) << (u * KW + v)
    return bits


@triton.jit
def load_tile(pointers, ok, PIXELS_LAST: tl.constexpr):
    """The values at a tile [pixels, channels] of pointers, zero where not ok.

    PIXELS_LAST is for pixels that are near in memory without being neighbours (a stride within rows): of a
    tile with nothing contiguous the compiler gives neighbouring threads the last axis.
    """
    if PIXELS_LAST:
        values = tl.trans(tl.load(tl.trans(pointers), tl.trans(ok), 0.0))
    else:
        values = tl.load(pointers, ok, 0.0)
    return values
