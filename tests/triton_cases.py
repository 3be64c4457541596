"""The calls that the Triton tests make: tiny for the interpreter, real sizes for the compiler and a GPU."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def _random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers that are the same in every dtype up to rounding; nothing but a shape on `meta`."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=torch.float32).to(device=device, dtype=dtype)


def _image(device: str, case: "Conv | Route") -> Tensor:
    """x, in the layout that the case asks for."""
    if case.cut_out:
        return _random(device, case.dtype, *case.shape[:3], case.shape[3] + 3)[..., 1:-2]
    x = _random(device, case.dtype, *case.shape)
    return x.contiguous(memory_format=torch.channels_last) if case.channels_last else x


def wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments in float64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def mask_of(tensors: tuple[Any, ...]) -> int:
    """The output mask that asks for every gradient there is."""
    return sum(1 << i for i, t in enumerate(tensors) if t is not None and t.is_floating_point())


@dataclass(frozen=True)
class Conv:
    """Arguments of the raw operators dynamic_conv and dynamic_conv_backward."""

    shape: tuple[int, int, int, int]  # of x
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    num_kernels: int = 3
    attention: str | None = "BN"  # or "BNO", or None for kernels per sample
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    code: int = 0
    scales: str = ""  # of "i", "o", "t"
    wide_scales: bool = False  # in float32
    bias: bool = True
    activation: str = "none"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    cut_out: bool = False  # x is a part of wider rows
    mixed: str | None = None  # "in registers" or "once", whatever the byte count says
    chunk_bytes: int | None = None  # what the backward's temporary may take

    @contextlib.contextmanager
    def as_asked(self) -> Iterator[None]:
        """Within it, kernels are mixed as asked for, and the backward's temporary is as small."""
        from ddrf_fast.kernels import _conv_plan

        patched = {}
        if self.mixed is not None:
            patched["LAUNCH_BYTES"] = {"in registers": 1 << 60, "once": -1 << 60}[self.mixed]
        if self.chunk_bytes is not None:
            patched["MAX_MIXED_GRAD_BYTES"] = self.chunk_bytes
        if not patched:
            yield
            return
        _conv_plan.forget_choices()
        try:
            with mock.patch.multiple(_conv_plan, **patched):
                yield
        finally:
            _conv_plan.forget_choices()

    def arguments(self, device: str) -> tuple[Any, ...]:
        batch, channels, *_ = self.shape
        rows = self.num_kernels if self.attention else batch
        fan_in = (channels + self.code) // self.groups * self.kernel[0] * self.kernel[1]

        def random(*shape: int) -> Tensor:
            return _random(device, self.dtype, *shape)

        def scale(*shape: int) -> Tensor:
            return _random(device, torch.float32 if self.wide_scales else self.dtype, *shape)

        tensors = (
            _image(device, self),
            random(rows, self.out_channels, (channels + self.code) // self.groups, *self.kernel)
            / fan_in**0.5,
            random(batch, rows, *[self.out_channels][: self.attention == "BNO"]) if self.attention else None,
            random(rows, self.out_channels) if self.bias else None,
            random(batch, self.code) if self.code else None,
            scale(batch, channels) if "i" in self.scales else None,
            scale(batch, self.out_channels) if "o" in self.scales else None,
            scale(batch, *self.kernel) if "t" in self.scales else None,
        )
        geometry = (list(self.stride), list(self.padding), list(self.dilation))
        return *tensors, *geometry, self.groups, self.activation

    @staticmethod
    def backward_arguments(args: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
        return grad, *args[:-1], mask_of(args[:8])


@dataclass(frozen=True)
class Route:
    """Arguments of the raw operator route, which has no gradient of its own."""

    shape: tuple[int, ...]  # of x
    hidden: int = 0  # no first layer where 0
    num_kernels: int = 4
    code: int = 0
    biases: bool = True
    temperature: float | None = None
    normalization: str = "softmax"
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    cut_out: bool = False

    def as_asked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def arguments(self, device: str) -> tuple[Any, ...]:
        def random(*shape: int) -> Tensor:
            return _random(device, self.dtype, *shape)

        batch, channels = self.shape[:2]
        inputs = channels + self.code
        return (
            _image(device, self),
            random(self.hidden, inputs) / inputs**0.5 if self.hidden else None,
            random(self.hidden) if self.hidden and self.biases else None,
            random(self.num_kernels, self.hidden or inputs),
            random(self.num_kernels) if self.biases else None,
            random(batch, self.code) if self.code else None,
            None if self.temperature is None else torch.tensor(self.temperature, device=device),
            self.normalization,
            self.scale,
        )


@dataclass(frozen=True)
class Degrade:
    """Arguments of the raw operators degrade and degrade_backward."""

    shape: tuple[int, int, int, int]  # of the image
    size: int = 3
    num_kernels: int = 4
    weights_at: str = "output"
    grid: tuple[int, int] = (3, 2)
    scale: int = 1
    offset: int = 0
    padding: str = "reflect"
    correlation: bool = False
    per_sample: bool = False
    noise: str | None = None  # "sample" or "site", where every second sample is gray
    shot: bool = False
    dtype: torch.dtype = torch.float32
    image_dtype: torch.dtype | None = None  # uint8 or uint16; else `dtype`
    channels_last: bool = False

    def as_asked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def arguments(self, device: str) -> tuple[Any, ...]:
        batch, _, *in_size = self.shape
        out_size = [(n - self.offset + self.scale - 1) // self.scale for n in in_size]

        def positive(*shape: int) -> Tensor:
            return _random(device, self.dtype, *shape).abs()

        image = positive(*self.shape)
        if self.image_dtype is not None:
            image = (image * 100).to(self.image_dtype)
        kernels = positive(*[batch][: self.per_sample], self.num_kernels, self.size, self.size) / self.size**2
        weights_size = {"sample": [], "image": in_size, "output": out_size, "grid": self.grid}[
            self.weights_at
        ]
        noise_std = seed = sample_ids = gray_noise = shot_noise = None
        if self.noise:
            noise_std = positive(batch, 1, *([1, 1] if self.noise == "sample" else out_size))
            seed = torch.tensor(0x123456789ABCDEF, device=device)
            sample_ids = torch.arange(batch, device=device) * 7919 - 1
            if self.noise == "site":
                gray_noise = torch.arange(batch, device=device) % 2 == 1
            if self.shot:
                shot_noise = positive(1).expand(batch)
        return (
            image.contiguous(memory_format=torch.channels_last) if self.channels_last else image,
            kernels,
            positive(batch, self.num_kernels, *weights_size) / self.num_kernels,
            noise_std,
            seed,
            sample_ids,
            gray_noise,
            shot_noise,
            self.scale,
            self.offset,
            out_size,
            self.padding,
            self.correlation,
            self.weights_at,
        )

    @staticmethod
    def backward_arguments(args: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
        return grad, *args[:7], *args[8:10], *args[11:], mask_of(args[:4])


HALF = torch.bfloat16

# The interpreter takes about a millisecond a program: every feature once, at sizes with more than one tile.
TINY: dict[str, Conv | Degrade | Route] = {
    "conv": Conv((2, 16, 6, 5), 8),
    "conv strided, per channel": Conv(
        (2, 8, 6, 5), 20, (3, 2), attention="BNO", stride=(2, 3), padding=(1, 2), activation="relu"
    ),
    "conv dilated, groups, scales": Conv(
        (1, 16, 8, 7), 16, groups=2, stride=(2, 2), padding=(2, 2), dilation=(2, 1), scales="iot"
    ),
    "conv stride and dilation share a factor": Conv(
        (1, 8, 7, 8), 8, stride=(2, 2), padding=(2, 1), dilation=(2, 3), num_kernels=1
    ),
    "conv code, channels_last": Conv((2, 8, 5, 6), 8, code=5, activation="leaky_relu", channels_last=True),
    "conv code, scales": Conv((1, 8, 4, 5), 12, (2, 2), attention="BNO", code=3, scales="iot", num_kernels=2),
    "conv without bias, 1x1": Conv((2, 16, 5, 4), 16, (1, 1), padding=(0, 0), bias=False),
    "conv depthwise": Conv((2, 6, 6, 5), 6, groups=6, stride=(2, 2), scales="iot"),
    "conv depthwise, multiplier, channels_last": Conv(
        (2, 6, 6, 5), 12, groups=6, stride=(1, 2), attention="BNO", channels_last=True
    ),
    "conv first layer, code": Conv((2, 1, 5, 6), 10, code=4),
    "conv last layer": Conv((1, 64, 4, 5), 1),
    "conv per sample": Conv((2, 8, 5, 4), 8, attention=None, scales="iot"),
    "conv per sample, 1x1": Conv((2, 8, 5, 4), 8, (1, 1), attention=None, padding=(0, 0)),
    "conv per sample, code": Conv((2, 8, 5, 4), 8, (1, 1), attention=None, padding=(1, 0), code=3),
    "conv bfloat16": Conv((2, 8, 5, 4), 8, code=3, dtype=HALF),
    "conv float16": Conv((2, 8, 5, 4), 8, scales="i", dtype=torch.float16, channels_last=True),
    "conv bfloat16, scales of float32": Conv(
        (2, 8, 5, 4), 8, code=2, scales="iot", dtype=HALF, wide_scales=True
    ),
    "conv float16, NCHW": Conv((1, 8, 9, 8), 8, code=2, dtype=torch.float16),
    "conv 1x1, rows apart": Conv((2, 8, 4, 5), 16, (1, 1), stride=(1, 2), padding=(0, 0), scales="io"),
    "conv 1x1, direct": Conv((2, 1, 4, 5), 6, (1, 1), padding=(0, 0)),
    "conv cut out": Conv((2, 8, 4, 8), 8, stride=(1, 2), dtype=torch.float16, cut_out=True),
    "conv 1x1, cut out": Conv((2, 8, 4, 8), 8, (1, 1), padding=(0, 0), bias=False, cut_out=True),
    "conv five samples": Conv((5, 8, 4, 4), 8, num_kernels=2, mixed="in registers", scales="io"),
    "conv many kernels": Conv((3, 8, 4, 3), 8, num_kernels=9),
    "conv many taps": Conv((1, 8, 7, 8), 8, (7, 5), padding=(3, 2), num_kernels=2),
    "conv chunks": Conv((3, 8, 4, 5), 8, mixed="once", chunk_bytes=5000, scales="o"),
    "conv chunks, code": Conv((3, 8, 4, 5), 8, code=3, attention="BNO", chunk_bytes=1),
    "conv chunks, per sample": Conv((3, 8, 4, 5), 8, attention=None, scales="it", chunk_bytes=1),
    "conv depthwise, many kernels": Conv((2, 6, 6, 5), 6, groups=6, num_kernels=9, scales="iot"),
    "conv depthwise, float16": Conv((2, 8, 8, 8), 8, (5, 5), groups=8, padding=(2, 2), dtype=torch.float16),
    "conv depthwise, per sample": Conv((2, 6, 5, 6), 6, groups=6, attention=None, scales="t"),
    "conv empty batch": Conv((0, 8, 5, 4), 8),
    "route": Route((2, 5, 4, 3), 6, code=3, temperature=30.0),
    "route one layer, sigmoid": Route((3, 70, 5, 5), num_kernels=5, normalization="sigmoid", scale=0.25),
    "route pooled already": Route((3, 20), 17, num_kernels=1, biases=False, code=2, normalization="sigmoid"),
    "route without biases": Route((1, 9, 1, 1), 4, num_kernels=3, biases=False, channels_last=True),
    "route large": Route((2, 4, 130, 131), 8, temperature=1.5),
    "route large, channels_last": Route((1, 3, 150, 152), 8, code=1, channels_last=True),
    "route large, cut out": Route((1, 4, 130, 131), normalization="sigmoid", cut_out=True),
    "route bfloat16": Route((2, 16, 8, 8), 4, dtype=HALF, channels_last=True),
    "route float16": Route((2, 16, 8, 8), 4, dtype=torch.float16, normalization="sigmoid"),
    "route empty batch": Route((0, 4, 3, 3), 4),
    "degrade": Degrade((2, 3, 7, 9)),
    "degrade one kernel, one pixel": Degrade((1, 1, 1, 1), size=1, num_kernels=1, noise="site"),
    "degrade strided, replicate, noise": Degrade(
        (2, 1, 9, 8), 5, scale=2, offset=1, padding="replicate", noise="site"
    ),
    "degrade correlation, circular": Degrade(
        (2, 2, 9, 10), 5, scale=3, padding="circular", correlation=True, channels_last=True
    ),
    "degrade zeros, own kernels": Degrade(
        (2, 5, 8, 7), 5, scale=2, offset=1, padding="zeros", per_sample=True, noise="sample"
    ),
    "degrade weights per image pixel": Degrade((2, 1, 8, 9), weights_at="image", scale=2, offset=1),
    "degrade grid": Degrade((2, 1, 8, 9), weights_at="grid", scale=2, offset=1, correlation=True),
    "degrade grid of one cell": Degrade((1, 1, 8, 1), weights_at="grid", grid=(1, 1), padding="replicate"),
    "degrade sample": Degrade((2, 3, 8, 9), 5, weights_at="sample", scale=2, noise="sample"),
    "degrade sample, own kernels": Degrade(
        (2, 5, 8, 9), weights_at="sample", per_sample=True, padding="circular"
    ),
    "degrade shot noise": Degrade((3, 3, 8, 9), noise="site", shot=True, channels_last=True),
    "degrade gray and shot noise": Degrade((2, 3, 8, 9), weights_at="sample", noise="site", shot=True),
    "degrade bfloat16": Degrade((1, 3, 8, 9), dtype=HALF, noise="site"),
    "degrade float16": Degrade((1, 3, 8, 9), weights_at="sample", dtype=torch.float16, noise="site"),
    "degrade uint8": Degrade((2, 3, 8, 9), scale=2, image_dtype=torch.uint8, channels_last=True),
    "degrade uint8, sample": Degrade((2, 1, 8, 9), weights_at="sample", image_dtype=torch.uint8, dtype=HALF),
    "degrade uint16, grid": Degrade((1, 1, 8, 9), weights_at="grid", image_dtype=torch.uint16, noise="site"),
    "degrade empty batch": Degrade((0, 1, 8, 9)),
}

# Matrix products mix their kernels once or in registers, and the backward goes through the bank or not: every
# feature in both ways.
for _name in (
    "conv",
    "conv strided, per channel",
    "conv dilated, groups, scales",
    "conv code, channels_last",
    "conv code, scales",
    "conv without bias, 1x1",
    "conv per sample",
    "conv bfloat16",
    "conv float16",
    "conv bfloat16, scales of float32",
    "conv float16, NCHW",
    "conv cut out",
    "conv 1x1, cut out",
    "conv 1x1, rows apart",
):
    for _how in ("in registers", "once"):
        TINY[f"{_name}, mixed {_how}"] = replace(TINY[_name], mixed=_how)

# What people run: residual and mobile networks, the paper's fusion layers and its degradations.
REAL: dict[str, Conv | Degrade | Route] = {
    "conv half": Conv((32, 64, 56, 56), 128, num_kernels=4, dtype=HALF, channels_last=True),
    "conv half, code": Conv(
        (2, 64, 96, 96), 64, num_kernels=4, code=32, activation="leaky_relu", dtype=HALF, channels_last=True
    ),
    "conv half, strided, scales": Conv(
        (32, 256, 28, 28),
        256,
        attention="BNO",
        num_kernels=4,
        stride=(2, 2),
        scales="iot",
        dtype=HALF,
        channels_last=True,
    ),
    "conv half, NCHW": Conv((32, 64, 56, 56), 128, num_kernels=4, dtype=HALF),
    "conv half, strided, NCHW": Conv((32, 64, 56, 56), 128, num_kernels=4, stride=(2, 2), dtype=HALF),
    "conv half, small map": Conv((32, 512, 7, 7), 512, num_kernels=4, dtype=HALF, channels_last=True),
    "conv half, small map, NCHW": Conv((8, 512, 7, 7), 512, num_kernels=4, dtype=HALF),
    "conv half, small map, scales": Conv(
        (8, 256, 14, 14), 256, num_kernels=4, groups=2, scales="iot", dtype=HALF, mixed="in registers"
    ),
    "conv half, 1x1": Conv(
        (8, 192, 7, 7), 1152, (1, 1), num_kernels=4, padding=(0, 0), dtype=HALF, channels_last=True
    ),
    "conv half, 1x1, eight kernels": Conv(
        (8, 112, 14, 14),
        672,
        (1, 1),
        8,
        "BNO",
        padding=(0, 0),
        dtype=torch.float16,
        channels_last=True,
        mixed="in registers",
    ),
    "conv half, 1x1, NCHW": Conv((8, 80, 28, 28), 480, (1, 1), 4, padding=(0, 0), dtype=HALF),
    "conv single, 1x1": Conv((8, 80, 14, 14), 480, (1, 1), 4, padding=(0, 0), bias=False),
    "conv single, odd sizes": Conv((3, 60, 31, 29), 52, num_kernels=4, code=7),
    "conv per sample": Conv((8, 64, 28, 28), 64, attention=None, scales="o"),
    "conv depthwise": Conv(
        (32, 96, 56, 56), 96, (5, 5), groups=96, stride=(2, 2), padding=(2, 2), dtype=HALF, channels_last=True
    ),
    "conv depthwise, NCHW": Conv(
        (8, 480, 14, 14), 480, (5, 5), 4, groups=480, padding=(2, 2), bias=False, dtype=torch.float16
    ),
    "conv depthwise, many kernels": Conv(
        (8, 96, 28, 28), 96, num_kernels=32, groups=96, dtype=HALF, channels_last=True
    ),
    "conv first layer": Conv((4, 1, 160, 160), 32, code=16, activation="relu"),
    "route": Route((8, 64, 28, 28), 16, code=32, temperature=30.0, dtype=HALF, channels_last=True),
    "route large": Route((1, 32, 200, 200), 16, 8, code=32, temperature=1.0, scale=0.125, dtype=HALF),
    "route one layer": Route((8, 1152, 7, 7), 0, 8, normalization="sigmoid"),
    "route pooled already": Route((16, 32), 16, 8, code=32, dtype=HALF),
    "degrade grid": Degrade((16, 3, 256, 256), 25, 12, "grid", (5, 5), scale=4, offset=1, noise="sample"),
    "degrade per site": Degrade((2, 3, 128, 128), 25, 12, padding="replicate", noise="site"),
    "degrade per pixel, half": Degrade(
        (2, 1, 128, 128), 25, 12, "image", scale=2, padding="circular", dtype=HALF
    ),
    "degrade sample": Degrade((8, 3, 128, 128), 21, 12, "sample", padding="reflect", channels_last=True),
}
