"""Which kernels and tiles a shape of dynamic_conv takes: the tables and the rules, without a kernel.

Whatever is chosen is chosen here, from shapes, strides and the architecture alone: the launches
(`_conv_forward`, `_conv_backward`) and the words of `dynamic_conv.plan` read the same `Convolution` and
`WeightGradient`. Nothing is tried out at run time; `python -m benchmarks.tune` measures the tables.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _common
from ._pixels import Layout, layout_of, tiles_of


class Tile(NamedTuple):
    """The configuration of a matrix product; heuristics shrink the blocks for small problems."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# By architecture and kind of the product: "half" and "tf32" run on tensor cores, "ieee" on the ordinary
# float32 units; "scattered" is half precision whose channels are not innermost in memory (NCHW), where a tap
# other than the middle one begins at an odd place of a row: such loads cannot be asynchronous, and registers
# are short. `python -m benchmarks.tune dynamic_conv` prints these tables as it measures them.
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
# The same product whose kernel is mixed in registers.
FUSED_TILES = {
    "interpreter": dict.fromkeys(("half", "scattered", "tf32", "ieee"), Tile(32, 16, 16, 1, 1)),
    "sm_80": {
        "half": Tile(64, 64, 32, 8, 3),
        "scattered": Tile(64, 64, 32, 8, 2),
        "tf32": Tile(64, 64, 32, 8, 2),
        "ieee": Tile(64, 32, 16, 8, 2),
    },
    "sm_90": {
        "half": Tile(64, 64, 32, 8, 3),
        "scattered": Tile(64, 64, 32, 8, 2),
        "tf32": Tile(64, 64, 32, 8, 2),
        "ieee": Tile(64, 32, 16, 8, 2),
    },
    "gfx942": {
        "half": Tile(64, 32, 32, 4, 2),
        "scattered": Tile(64, 32, 32, 4, 2),
        "tf32": Tile(64, 32, 16, 4, 2),
        "ieee": Tile(64, 32, 16, 4, 2),
    },
}
# M = output channels, N = taps times input channels, K = pixels.
WEIGHT_TILES = {
    "interpreter": dict.fromkeys(("half", "scattered", "tf32", "ieee"), Tile(16, 16, 32, 1, 1)),
    "sm_80": {
        "half": Tile(64, 64, 64, 4, 3),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(64, 64, 32, 8, 3),
        "ieee": Tile(64, 64, 16, 8, 2),
    },
    "sm_90": {
        "half": Tile(64, 128, 64, 4, 3),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(64, 64, 32, 8, 3),
        "ieee": Tile(64, 64, 16, 8, 2),
    },
    "gfx942": {
        "half": Tile(64, 64, 32, 4, 2),
        "scattered": Tile(64, 64, 32, 4, 2),
        "tf32": Tile(64, 64, 32, 4, 2),
        "ieee": Tile(64, 64, 16, 4, 2),
    },
}
# The same product, contracted with the bank: a sum for each of its kernels stays in registers.
BANK_TILES = {
    "interpreter": dict.fromkeys(("half", "scattered", "tf32", "ieee"), Tile(16, 16, 16, 1, 1)),
    "sm_80": dict.fromkeys(("half", "scattered", "tf32"), Tile(64, 32, 32, 8, 2))
    | {"ieee": Tile(32, 32, 16, 4, 2)},
    "sm_90": dict.fromkeys(("half", "scattered", "tf32"), Tile(64, 32, 32, 8, 2))
    | {"ieee": Tile(32, 32, 16, 4, 2)},
    "gfx942": dict.fromkeys(("half", "scattered", "tf32"), Tile(32, 16, 32, 4, 2))
    | {"ieee": Tile(32, 32, 16, 4, 2)},
}
# Pixels and channels of a direct program, at most: where rows are contiguous, and where channels are.
DIRECT_BLOCKS = {
    "interpreter": ((32, 8), (32, 8)),
    "sm_80": ((256, 8), (64, 64)),
    "sm_90": ((256, 8), (64, 64)),
    "gfx942": ((128, 8), (16, 32)),
}

# How many programs fill the GPU: below it, blocks shrink and sums over pixels are split.
FULL_GRID = {"interpreter": 4, "sm_80": 256, "sm_90": 256, "gfx942": 512}

# Mixing W_b once costs a launch, a write and a read of W_b; mixing it in registers costs N reads of the tile
# of the bank for each tile of pixels and each group of samples that share a program, and no launch. A count
# of bytes decides (`_once_bytes` against `_fused_bytes`), in bytes of the last cache that all programs share:
# what is larger than RESIDENT_BYTES (about half of that cache) goes to memory, where a byte counts for
# MEMORY_COST; a launch and the wait between two kernels count as LAUNCH_BYTES; and what keeps the ordinary
# units busy counts too: MIX_BYTES an entry of the bank that is mixed in registers, GATHER_BYTES an element of
# x that is loaded alone, at an address of its own. All but the cache sizes are assumptions, not measurements:
# `python -m benchmarks.tune dynamic_conv --paths` holds them against times.
RESIDENT_BYTES = {"interpreter": 1 << 20, "sm_80": 16 << 20, "sm_90": 24 << 20, "gfx942": 96 << 20}
MEMORY_COST = 3
LAUNCH_BYTES = 8 << 20
MIX_BYTES = 1
GATHER_BYTES = 2
# The bank's tiles are unrolled where they are mixed in registers: more kernels are more code and registers.
MOST_FUSED_KERNELS = 8
# Where a tap lies inside the image is a bit of an int32 there.
MOST_FUSED_TAPS = 31
# Accumulators of a warp that samples sharing the bank's tile may take together: 32 registers a thread.
FUSED_ACCUMULATORS = 32 * 32
# And how many samples they may be, by the registers that the mixed kernels of each take.
MOST_SHARING = {"interpreter": 4, "sm_80": 2, "sm_90": 4, "gfx942": 1}

# The contraction with the bank in the weight gradient's epilogue reads kernels in the bank's own order, taps
# innermost. On maps above this many pixels, kernels of several taps on channels_last inputs would load x one
# by one for too long.
SMALL_MAP = 256

# The most that the temporary D of the backward takes (unless one sample alone takes more): samples are taken
# in chunks. It is written once and read twice, so that a larger one would not be faster, and it is small
# beside the activations of a batch for which it matters.
MAX_MIXED_GRAD_BYTES = 64 << 20


class Problem(NamedTuple):
    """The sizes of one call, as the kernels' constants."""

    batch: int
    num_kernels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    out_channels: int
    in_channels: int
    groups: int
    weight_in: int
    per_sample: bool  # kernels come so, without attention
    per_channel: bool  # attention is for each output channel
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

    @property
    def kernel_elements(self) -> int:
        """Of one kernel, without the code's channels."""
        return self.out_channels * self.in_per_group * self.taps

    def uses_dot(self, reduced: int) -> bool:
        """A matrix product pads to 16: with few channels, or few to sum over, it would multiply zeros."""
        return reduced >= 4 and self.in_per_group * self.out_per_group >= 64

    def pointwise(self, *images: Layout) -> bool:
        """Whether pixels may be counted through: 1x1, and no rows to tell apart in these images."""
        one_tap = self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0)
        return one_tap and all(image.flat for image in images)

    def flattened(self) -> "Problem":
        """The same with images of a single row."""
        return self._replace(in_size=(1, math.prod(self.in_size)), out_size=(1, math.prod(self.out_size)))

    def constants(self) -> dict[str, int]:
        return {"OUT_CHANNELS": self.out_channels, "GROUPS": self.groups, "IN_PER_GROUP": self.in_per_group}

    def geometry(self) -> dict[str, int]:
        pairs = {"K": self.kernel, "STRIDE_": self.stride, "PAD_": self.padding, "DILATION_": self.dilation}
        return {name + axis: pair[i] for name, pair in pairs.items() for i, axis in enumerate("HW")}


def problem(
    x: Tensor, weight: Tensor, attention: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Problem:
    """The sizes of a call of the raw operator."""
    kernel = (weight.shape[3], weight.shape[4])
    out_size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return Problem(
        batch=x.shape[0],
        num_kernels=1 if attention is None else weight.shape[0],
        in_size=(x.shape[2], x.shape[3]),
        out_size=(out_size[0], out_size[1]),
        out_channels=weight.shape[1],
        in_channels=x.shape[1],
        groups=groups,
        weight_in=weight.shape[2],
        per_sample=attention is None,
        per_channel=attention is not None and attention.dim() == 3,
        kernel=kernel,
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
    )


def _kind(dtype: torch.dtype, *images: Layout) -> tuple[str, str]:
    """The key of the configuration tables, and tl.dot's input_precision, which only float32 looks at."""
    if dtype != torch.float32:
        # The code's product is in float32 in any case, and TF32 keeps more bits than the result has.
        return "half" if all(image.channels for image in images) else "scattered", "tf32"
    # As for torch's own convolutions; on by default.
    return ("tf32", "tf32") if torch.backends.cudnn.conv.fp32_precision == "tf32" else ("ieee", "ieee")


def _fit(tile: Tile, m: int, n: int, k: int) -> Tile:
    """`tile` without blocks that are mostly empty."""
    return tile._replace(
        block_m=_common.power_of_two(m, 16, tile.block_m),
        block_n=_common.power_of_two(n, 16, tile.block_n),
        block_k=_common.power_of_two(k, 16, tile.block_k),
    )


class Convolution(NamedTuple):
    """How one convolution, forward or transposed, runs.

    Attributes:
        path: "fused" (a matrix product, W_b mixed in registers), "materialised" (a matrix product, W_b mixed
            once), "direct" (no tensor cores, W_b mixed in registers) or "direct, materialised".
        kind: The key of the tile tables.
        precision: tl.dot's input_precision.
        tile: Of the product; of a direct kernel, its pixels and channels (block_k is 1).
        samples: That share a program, which reads the bank's tile once for all of them (fused only).
        flat: Whether pixels are counted through, without rows.
        patch: The width of the patches that pixels are taken in; 0 without patches.
        rows, columns: Of the destination's pixels, of one residue class of the stride where transposed.
        pixel_tiles: Blocks of pixels of a sample and class.
        programs: Of the convolution's launch.
    """

    path: str
    kind: str
    precision: str
    tile: Tile
    samples: int
    flat: bool
    patch: int
    rows: int
    columns: int
    pixel_tiles: int
    programs: int

    @property
    def mixes_in_registers(self) -> bool:
        return self.path in ("fused", "direct")

    def __str__(self) -> str:
        t = self.tile
        pixels = "pixels in one row" if self.flat else "pixels"
        if self.patch and not self.flat:
            pixels += f" in patches {t.block_m // self.patch}x{self.patch}"
        if self.path.startswith("direct"):
            how = f"direct, {t.block_m} {pixels} x {t.block_n} channels"
        else:
            units = {"half": "tensor cores", "scattered": "tensor cores", "tf32": "tensor cores, TF32"}
            how = f"implicit matrix product on {units.get(self.kind, 'float32 units')}, "
            how += f"{t.block_m} {pixels} x {t.block_n} channels x {t.block_k}"
        mixing = "W_b mixed in registers" if self.mixes_in_registers else "W_b mixed once into a workspace"
        shared = f", {self.samples} samples a program" if self.samples > 1 else ""
        return f"{how}, {t.warps} warps, {t.stages} stages, {self.programs} programs{shared}; {mixing}"


def choose_convolution(p: Problem, source: Tensor, out: Tensor, *, transposed: bool) -> Convolution:
    """How `out`, the convolution of `source`, is computed; `transposed` is the gradient of the input.

    The one place that decides: the launch and `plan` both ask here. A choice is remembered.
    """
    layouts = (layout_of(source), layout_of(out))
    kind, precision = _kind(source.dtype, layouts[0])
    arch = _common.architecture(source.device)
    return _convolution(p, *layouts, kind, precision, source.element_size(), transposed, arch)


def forget_choices() -> None:
    """After a table or a constant of this module has been changed."""
    _convolution.cache_clear()
    _weight_gradient.cache_clear()


@functools.lru_cache(maxsize=4096)
def _convolution(
    p: Problem,
    source: Layout,
    out: Layout,
    kind: str,
    precision: str,
    element: int,
    transposed: bool,
    arch: str,
) -> Convolution:
    classes = p.stride if transposed else (1, 1)
    flat = p.pointwise(source, out)
    if flat:
        p = p.flattened()
    destination = p.in_size if transposed else p.out_size
    rows, columns = (triton.cdiv(size, c) for size, c in zip(destination, classes, strict=True))
    pixels, images = rows * columns, p.batch * math.prod(classes)
    n, k = (p.in_per_group, p.out_per_group) if transposed else (p.out_per_group, p.in_per_group)

    def finished(path: str, tile: Tile, channels: int, images: int, samples: int = 1) -> Convolution:
        tiles, patch = tiles_of((rows, columns), tile.block_m, source)
        programs = tiles * triton.cdiv(channels, tile.block_n) * images
        return Convolution(path, kind, precision, tile, samples, flat, patch, rows, columns, tiles, programs)

    if not p.uses_dot(k):
        block_m, block_n = direct_blocks(pixels, p.groups * n, out.channels, arch)
        # In registers every program mixes for itself: cheap beside its block_m multiply-adds.
        path = "direct" if 4 * p.num_kernels <= block_m else "direct, materialised"
        return finished(path, Tile(block_m, block_n, 1, 4, 1), p.groups * n, images)

    def with_full_grid(tile: Tile, images: int) -> Convolution:
        candidates = [tile]
        while tile.block_m > 64:
            tile = tile._replace(block_m=tile.block_m // 2)
            candidates.append(tile)
        while tile.block_n > 32:
            tile = tile._replace(block_n=tile.block_n // 2)
            candidates.append(tile)
        found = [finished("materialised", t, n, images * p.groups) for t in candidates]
        return next((c for c in found if c.programs >= FULL_GRID[arch]), found[-1])

    once = with_full_grid(_fit(FORWARD_TILES[arch][kind], pixels, n, k), images)
    # The transposed product would read the bank across its rows, unless it has one tap.
    if (
        p.num_kernels > MOST_FUSED_KERNELS
        or p.taps > MOST_FUSED_TAPS
        or (transposed and p.taps * math.prod(p.stride) > 1)
    ):
        return once

    # Samples that have kernels of their own share nothing; coefficients for each channel, of several samples
    # and kernels, would not fit into the registers.
    most_sharing = 1 if p.per_sample or p.per_channel else min(p.batch, MOST_SHARING[arch])

    def fused_candidates() -> Iterator[Convolution]:
        tile = _fit(FUSED_TILES[arch][kind], pixels, n, k * p.taps)
        for block_n in (tile.block_n, max(16, tile.block_n // 2)):
            narrow = tile._replace(block_n=block_n)
            for samples in (1, 2, 4):
                fits = samples * tile.block_m * block_n <= FUSED_ACCUMULATORS * tile.warps
                if samples == 1 or (fits and samples <= most_sharing):
                    groups_of_samples = triton.cdiv(p.batch, samples) * p.groups
                    yield finished("fused", narrow, n, groups_of_samples, samples)

    costs = [(_fused_bytes(p, c, (n, k), element, arch), c) for c in fused_candidates()]
    cost, fused = min(costs, key=lambda pair: pair[0])
    return fused if cost <= _once_bytes(p, once, (n, k), element, arch) else once


def _waiting(programs: int, arch: str) -> float:
    """How much longer traffic takes because its programs do not fill the GPU."""
    return max(1.0, FULL_GRID[arch] / 2 / programs)


def _source_bytes(p: Problem, c: Convolution, channels: tuple[int, int], element: int, alone: bool) -> float:
    """Loading the source: every tile of pixels, for every tile of channels, with every tap."""
    n, k = channels
    rows = p.batch * c.pixel_tiles * c.tile.block_m * p.groups * triton.cdiv(n, c.tile.block_n)
    return rows * k * p.taps * (element + GATHER_BYTES * alone)


def _fused_bytes(p: Problem, c: Convolution, channels: tuple[int, int], element: int, arch: str) -> float:
    """Reading N tiles of the bank for each tile of pixels and each `samples` samples, and mixing them."""
    entries = p.num_kernels * p.kernel_elements * c.pixel_tiles
    bank = p.num_kernels * p.kernel_elements * element * (p.batch if p.per_sample else 1)
    cost = 1 if bank <= RESIDENT_BYTES[arch] else MEMORY_COST
    reads = entries * element * triton.cdiv(p.batch, c.samples) * cost
    mixing = 0 if p.per_sample else entries * p.batch * MIX_BYTES
    source = _source_bytes(p, c, channels, element, alone=p.taps > 1)
    return (reads + mixing + source) * _waiting(c.programs, arch)


def _once_bytes(p: Problem, c: Convolution, channels: tuple[int, int], element: int, arch: str) -> float:
    """A launch that reads the bank every MIX_SAMPLES samples and writes W_b, which pixel tiles then read."""
    kernel = p.kernel_elements * element
    bank, mixed = p.num_kernels * kernel, p.batch * kernel
    cost = 1 if mixed <= RESIDENT_BYTES[arch] else MEMORY_COST
    mixing = bank * triton.cdiv(p.batch, MIX_SAMPLES) + cost * mixed
    source = _source_bytes(p, c, channels, element, alone=p.taps > 1 and c.kind == "scattered")
    return LAUNCH_BYTES + mixing + (mixed * (cost + c.pixel_tiles - 1) + source) * _waiting(c.programs, arch)


# Samples of a program that mixes kernels once: it reads the bank once for all of them.
MIX_SAMPLES = 8


def direct_blocks(pixels: int, channels: int, channels_innermost: bool, arch: str) -> tuple[int, int]:
    """Pixels and channels of a direct program: long along the axis that is contiguous in memory."""
    most_pixels, most_channels = DIRECT_BLOCKS[arch][channels_innermost]
    return _common.power_of_two(pixels, 16, most_pixels), _common.power_of_two(channels, 1, most_channels)


class WeightGradient(NamedTuple):
    """How the gradients of bank, attention and scales are computed.

    Attributes:
        path: "bank" (contracted with the bank in the epilogue), "product" (D by a matrix product) or "direct"
            (D without tensor cores).
        kind, precision, tile, flat, patch: As in `Convolution`; a direct kernel sums over block_k pixels.
        pixel_splits: Parts of the pixels that are summed by programs of their own.
        blocks_per_split: Blocks of pixels in each.
        samples_per_split: Samples that one program goes through ("bank" only).
        sample_splits: Parts of the batch ("bank" only).
        chunk: Samples whose D is held at a time.
        programs: Of the launch, for one chunk.
    """

    path: str
    kind: str
    precision: str
    tile: Tile
    flat: bool
    patch: int
    pixel_splits: int
    blocks_per_split: int
    samples_per_split: int
    sample_splits: int
    chunk: int
    programs: int

    def __str__(self) -> str:
        t = self.tile
        names = {"bank": "contracted with the bank in the epilogue", "product": "D by a matrix product"}
        how = f"{names.get(self.path, 'D, direct')}, {t.block_m} channels x {t.block_n} x {t.block_k} pixels"
        how += f", {t.warps} warps, {t.stages} stages, {self.programs} programs"
        if self.pixel_splits > 1:
            how += f", pixels in {self.pixel_splits} parts"
        if self.path == "bank":
            return how + (f", samples in {self.sample_splits} parts" if self.sample_splits > 1 else "")
        return f"{how}, {self.chunk} samples at a time"


def choose_weight_gradient(p: Problem, grad: Tensor, x: Tensor, *, scaled: bool) -> WeightGradient:
    """How the gradients but x's are computed; `scaled` where there is an in_scale, a tap_scale or a code.

    It must not depend on which gradients are asked for: one asked for alone has the same bits.
    """
    layouts = (layout_of(grad), layout_of(x))
    kind, precision = _kind(x.dtype, *layouts)
    arch = _common.architecture(x.device)
    return _weight_gradient(p, *layouts, kind, precision, x.element_size(), scaled, arch)


@functools.lru_cache(maxsize=4096)
def _weight_gradient(
    p: Problem,
    grad: Layout,
    x: Layout,
    kind: str,
    precision: str,
    element: int,
    scaled: bool,
    arch: str,
) -> WeightGradient:
    flat = p.pointwise(grad, x)
    if flat:
        p = p.flattened()
    pixels, columns = math.prod(p.out_size), p.in_per_group * p.taps
    uses_dot = p.uses_dot(pixels)

    # The contraction reads a tile of each kernel for each sample and writes the bank's gradient (in parts of
    # the batch until the grid is full); D is written once and read twice, in float32. The bank's gradient by
    # itself is the same in both.
    few = p.num_kernels <= MOST_FUSED_KERNELS and p.taps <= MOST_FUSED_TAPS
    if uses_dot and few and not scaled and not p.per_sample:
        tile = _fit(BANK_TILES[arch][kind], p.out_per_group, columns, pixels)
        if p.num_kernels > 4:
            tile = tile._replace(warps=2 * tile.warps)
        tiles = p.groups * triton.cdiv(p.out_per_group, tile.block_m) * triton.cdiv(columns, tile.block_n)
        blocks, patch = tiles_of(p.out_size, tile.block_k, grad)
        sample_splits = min(p.batch, max(1, FULL_GRID[arch] // tiles))
        per_split = triton.cdiv(p.batch, sample_splits)
        sample_splits = triton.cdiv(p.batch, per_split)
        pixel_splits, per_pixels = _split(blocks, FULL_GRID[arch] // (tiles * sample_splits))
        parts = sample_splits * pixel_splits
        kernel = p.kernel_elements
        contracted = kernel * p.num_kernels * (element * p.batch * pixel_splits + 8 * (parts > 1) * parts)
        through_memory = 12 * kernel * p.batch + LAUNCH_BYTES
        reads_well = p.taps == 1 or pixels <= SMALL_MAP or not x.channels
        if reads_well and contracted <= through_memory:
            return WeightGradient(
                "bank", kind, precision, tile, flat, patch, pixel_splits, per_pixels, per_split,
                sample_splits, p.batch, tiles * parts,
            )  # fmt: skip

    row = p.in_per_group + bool(p.code_channels)
    sample_bytes = 4 * p.out_channels * p.taps * row
    chunk = max(1, min(p.batch, MAX_MIXED_GRAD_BYTES // sample_bytes))
    chunk = triton.cdiv(p.batch, triton.cdiv(p.batch, chunk))
    if uses_dot:
        path = "product"
        tile = _fit(WEIGHT_TILES[arch][kind], p.out_per_group, columns, pixels)
        tiles = p.groups * triton.cdiv(p.out_per_group, tile.block_m) * triton.cdiv(columns, tile.block_n)
    else:
        path = "direct"
        block_p, block_m = direct_blocks(pixels, p.out_channels, grad.channels, arch)
        tile = Tile(block_m, 1, block_p, 4, 1)
        tiles = columns * triton.cdiv(p.out_channels, block_m)
    blocks, patch = tiles_of(p.out_size, tile.block_k, grad)
    # Parts of D are there together with their sum.
    most = min(FULL_GRID[arch] // (chunk * tiles), MAX_MIXED_GRAD_BYTES // (chunk * sample_bytes) - 1)
    splits, per_split = _split(blocks, most)
    return WeightGradient(
        path, kind, precision, tile, flat, patch, splits, per_split, 1, 1, chunk, splits * chunk * tiles
    )


def _split(blocks: int, most: int) -> tuple[int, int]:
    """In how many parts, at most `most` and of four blocks or more, and how many blocks in each."""
    parts = max(1, min(most, blocks // 4))
    each = triton.cdiv(blocks, parts)
    return triton.cdiv(blocks, each), each
