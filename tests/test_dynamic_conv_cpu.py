"""The compiled CPU kernels of dynamic_conv (raw operators) against F.conv2d sample by sample in float64."""

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CAPABILITIES, FLOOR, assert_accurate, run_capability, run_elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddrf_fast.ops import _native, dynamic_conv

pytestmark = pytest.mark.skipif(not _native.status()["_C"][0], reason=_native.status()["_C"][1])

NAMES = ("x", "weight", "attention", "bias", "code", "in_scale", "out_scale", "tap_scale")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALL = 0xFF


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `extras` are the optional tensors it has."""

    batch: int = 2
    channels: tuple[int, int] = (3, 5)
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bank: int = 3
    attention: str = "sample"  # "channel": [B, N, O]; "none": each sample's own kernels
    code: int = 0
    extras: tuple[str, ...] = ("bias",)
    activation: str = "none"

    def geometry(self) -> tuple:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        """The operator's eight tensors, in the order of NAMES."""
        generator = torch.Generator().manual_seed(seed)
        (inputs, outputs), taps = self.channels, self.kernel
        own = self.batch if self.attention == "none" else self.bank
        shapes = {
            "x": (self.batch, inputs, *self.size),
            "weight": (own, outputs, inputs // self.groups + self.code, *taps),
            "attention": (self.batch, self.bank) + ((outputs,) if self.attention == "channel" else ()),
            "bias": (own, outputs),
            "code": (self.batch, self.code),
            "in_scale": (self.batch, inputs),
            "out_scale": (self.batch, outputs),
            "tap_scale": (self.batch, *taps),
        }
        present = {"x", "weight", *self.extras}
        present |= {"attention"} if self.attention != "none" else set()
        present |= {"code"} if self.code else set()
        return [
            torch.randn(shapes[name], generator=generator).to(dtype) if name in present else None
            for name in NAMES
        ]


SCALES = ("in_scale", "out_scale", "tap_scale")
EVERYTHING = ("bias", *SCALES)
CASES = {
    "3x3": Case(padding=(1, 1)),
    "1x1": Case(channels=(6, 4), kernel=(1, 1), extras=()),
    "3x5, odd sizes": Case(size=(11, 6), kernel=(3, 5), padding=(1, 0), extras=EVERYTHING),
    "5x5, each sample's own": Case(kernel=(5, 5), padding=(2, 2), attention="none", extras=EVERYTHING),
    "stride 2": Case(size=(10, 13), padding=(1, 1), stride=(2, 2)),
    "stride 3x2, each sample's own": Case(size=(10, 13), kernel=(2, 4), stride=(3, 2), attention="none"),
    "stride above the kernel": Case(size=(9, 8), kernel=(1, 2), stride=(3, 4), extras=()),
    "dilation": Case(size=(12, 15), dilation=(2, 3), padding=(2, 1), stride=(1, 2)),
    "dilation far apart": Case(size=(3, 4), dilation=(40, 30), padding=(40, 30), code=2),
    "padding beyond the kernel": Case(size=(2, 3), padding=(4, 3), code=2, extras=EVERYTHING),
    "groups": Case(channels=(6, 9), groups=3, padding=(1, 1), extras=EVERYTHING),
    "depthwise": Case(channels=(7, 7), groups=7, padding=(1, 1), extras=EVERYTHING),
    "depthwise, two each": Case(channels=(5, 10), groups=5, stride=(2, 1), attention="channel"),
    "code": Case(code=4, padding=(1, 1)),
    "code, everything": Case(code=3, padding=(2, 1), stride=(2, 1), attention="channel", extras=EVERYTHING),
    "code without padding": Case(code=3, extras=SCALES),
    "code, each sample's own": Case(code=2, padding=(1, 1), attention="none", extras=EVERYTHING),
    "per output channel": Case(attention="channel", padding=(1, 1)),
    "relu": Case(padding=(1, 1), activation="relu"),
    "leaky_relu": Case(padding=(1, 1), activation="leaky_relu", extras=EVERYTHING),
    "one output channel": Case(channels=(20, 1), padding=(1, 1)),
    "two output channels": Case(channels=(3, 2), padding=(1, 1), size=(20, 21)),
    "many channels": Case(channels=(70, 37), size=(9, 17), padding=(1, 1), bank=2),
    "rows of several tiles": Case(batch=1, channels=(2, 3), size=(5, 530), padding=(1, 1)),
    "columns of several tiles": Case(batch=1, channels=(34, 3), size=(97, 40), padding=(1, 1), bank=1),
    # With AMX: blocks of pairs of channels and some that are left, in one turn and in several.
    "pairs in blocks": Case(channels=(80, 36), size=(20, 37), padding=(1, 1), activation="relu"),
    "pairs in blocks, stride 2": Case(channels=(48, 70), size=(21, 30), padding=(1, 1), stride=(2, 2)),
    "pairs with a channel of ones": Case(channels=(32, 33), size=(20, 37), padding=(1, 1), code=2),
    "pairs with a last channel of ones": Case(channels=(31, 40), size=(30, 21), padding=(1, 1), code=3),
    "pairs in blocks, stride 3": Case(channels=(40, 33), size=(31, 40), padding=(2, 0), stride=(3, 3)),
    "pairs in blocks, dilation": Case(channels=(34, 20), size=(7, 9), dilation=(2, 3), padding=(2, 3)),
    "pairs in blocks, stride above the kernel": Case(
        channels=(20, 1100), kernel=(2, 2), size=(9, 9), stride=(3, 3), bank=1
    ),
    "pairs in turns": Case(channels=(230, 20), size=(9, 11), padding=(1, 1), code=2),
    "many outputs, 14x14": Case(batch=3, channels=(40, 130), size=(14, 14), padding=(1, 1), code=3, bank=2),
    # The plans (csrc/cpu): Winograd with kernels mixed once, or block by block; blocks of kernels for small
    # maps, with and without a pixel beyond the last whole vector; depthwise planes.
    "Winograd": Case(channels=(16, 21), size=(31, 62), padding=(1, 1), code=2, activation="leaky_relu"),
    "Winograd, everything": Case(
        channels=(9, 8), size=(40, 26), padding=(2, 1), attention="channel", extras=EVERYTHING
    ),
    "Winograd, groups": Case(channels=(16, 24), size=(29, 30), padding=(0, 2), groups=2, bank=1),
    "Winograd in blocks": Case(batch=3, channels=(18, 35), size=(14, 14), padding=(1, 1), code=3),
    "Winograd in blocks, wide": Case(batch=3, channels=(18, 35), size=(7, 62), padding=(1, 1), code=3),
    "Winograd in blocks, many channels": Case(channels=(60, 9), size=(14, 14), padding=(1, 1)),
    "Winograd, few inputs": Case(channels=(4, 18), size=(31, 70), padding=(1, 1), code=1),
    "Winograd, few outputs": Case(channels=(20, 4), size=(21, 67), padding=(1, 1)),
    "Winograd, each sample's own": Case(channels=(8, 8), size=(30, 33), padding=(1, 1), attention="none"),
    "Winograd, many channels": Case(batch=1, channels=(130, 9), size=(24, 24), padding=(1, 1), bank=2),
    # With AVX-512 on Intel's cores the pixels are copied as panels, the last one not whole.
    "1x1, 13x15, panels": Case(batch=3, channels=(70, 45), size=(13, 15), kernel=(1, 1), activation="relu"),
    "1x1, 7x7": Case(batch=9, channels=(50, 24), size=(7, 7), kernel=(1, 1)),
    "1x1, 7x7, a bank of one": Case(
        batch=5, channels=(150, 70), size=(7, 7), kernel=(1, 1), bank=1, activation="relu"
    ),
    "1x1, 14x14": Case(channels=(40, 70), size=(14, 14), kernel=(1, 1), bank=4, activation="relu"),
    "1x1, large map": Case(batch=1, channels=(5, 9), size=(30, 40), kernel=(1, 1)),
    "1x1, everything": Case(
        channels=(33, 50),
        size=(9, 5),
        kernel=(1, 1),
        attention="channel",
        extras=EVERYTHING,
        activation="leaky_relu",
    ),
    "1x1, many channels": Case(batch=5, channels=(600, 100), size=(7, 5), kernel=(1, 1), extras=()),
    "1x1, one sample": Case(batch=1, channels=(600, 100), size=(7, 5), kernel=(1, 1), extras=()),
    "1x1, one sample, everything": Case(
        batch=1, channels=(36, 28), size=(6, 7), kernel=(1, 1), groups=2, bank=2, extras=EVERYTHING
    ),
    "one sample, everything": Case(
        batch=1, channels=(150, 40), size=(7, 6), kernel=(3, 2), padding=(1, 1), code=3, extras=EVERYTHING
    ),
    "3x3, 7x7": Case(channels=(20, 17), size=(7, 7), padding=(1, 1), bank=4),
    "3x3, 7x7, each sample's own": Case(channels=(20, 17), size=(7, 7), padding=(1, 1), attention="none"),
    "3x3, stride 2, 14x14": Case(channels=(12, 16), size=(14, 14), padding=(1, 1), stride=(2, 2)),
    "3x3, stride 2, tiles": Case(channels=(36, 24), size=(56, 55), padding=(1, 1), stride=(2, 2)),
    "3x3, stride 2, many outputs": Case(
        channels=(20, 66), size=(41, 40), padding=(1, 1), stride=(2, 2), bank=5
    ),
    "3x3, groups, 14x14": Case(channels=(24, 16), size=(14, 13), padding=(1, 1), groups=2),
    "depthwise 3x3, 7x7": Case(channels=(7, 7), size=(7, 7), padding=(1, 1), groups=7),
    "depthwise 5x5, 7x7": Case(channels=(6, 6), size=(7, 7), kernel=(5, 5), padding=(2, 2), groups=6),
    # A vector of channels at a time: rows of 7 (AVX-512) and of 4 to 6, more than 8 samples, more rows than
    # a tap reaches, padding unlike "same".
    "depthwise 5x5, 7x7, vectors of channels": Case(
        batch=9, channels=(48, 48), size=(7, 7), kernel=(5, 5), padding=(2, 2), groups=48, activation="relu"
    ),
    "depthwise 7x7, 7x7, vectors of channels": Case(
        channels=(32, 32),
        size=(7, 7),
        kernel=(7, 7),
        padding=(3, 3),
        groups=32,
        extras=EVERYTHING,
        attention="channel",
    ),
    "depthwise 7x7, 9x6, vectors of channels": Case(
        channels=(16, 16), size=(9, 6), kernel=(7, 7), padding=(3, 3), groups=16, attention="none"
    ),
    "depthwise 3x3, 15x9, vectors of channels": Case(  # in channels_last
        batch=3, channels=(32, 32), size=(15, 9), padding=(1, 2), groups=32, activation="leaky_relu"
    ),
    "depthwise 5x5, stride 2, vectors of channels": Case(  # in channels_last
        channels=(32, 32), size=(14, 13), kernel=(5, 5), padding=(2, 2), stride=(2, 2), groups=32
    ),
    "depthwise 5x5, 3x8, vectors of channels": Case(
        channels=(16, 16), size=(3, 8), kernel=(5, 5), padding=(4, 0), groups=16, bank=1
    ),
    "depthwise 5x5, 14x14": Case(
        channels=(5, 5), size=(14, 14), kernel=(5, 5), padding=(2, 2), groups=5, extras=(), activation="relu"
    ),
    "depthwise 5x5, stride 2": Case(
        channels=(6, 6), size=(14, 14), kernel=(5, 5), padding=(2, 2), groups=6, stride=(2, 2)
    ),
    "depthwise 3x3, stride 2, wide": Case(
        channels=(3, 3), size=(15, 71), padding=(1, 1), groups=3, stride=(2, 2)
    ),
    "depthwise 5x5, stride 2, padded more": Case(
        channels=(3, 3), size=(9, 22), kernel=(5, 5), padding=(5, 6), groups=3, stride=(2, 2)
    ),
    "depthwise 3x3, wide": Case(channels=(5, 5), size=(8, 61), padding=(1, 1), groups=5),
    "depthwise 7x7, wide": Case(channels=(4, 4), size=(9, 40), kernel=(7, 7), padding=(3, 3), groups=4),
    "depthwise 5x5, not padded": Case(channels=(19, 19), size=(12, 13), kernel=(5, 5), groups=19),
    "depthwise 3x3, padded more": Case(
        channels=(3, 3), size=(6, 18), padding=(2, 3), groups=3, extras=EVERYTHING
    ),
    "depthwise, each sample's own": Case(
        channels=(4, 4), size=(9, 8), padding=(1, 1), groups=4, attention="none"
    ),
    "depthwise, dilation": Case(channels=(18, 18), size=(9, 20), padding=(2, 2), dilation=(2, 2), groups=18),
    # A bank of one: the kernel is shared by all samples, the attention scales the result.
    "shared, 1x1, 14x14": Case(batch=3, channels=(40, 70), size=(14, 14), kernel=(1, 1), bank=1),
    "shared, 1x1, many channels": Case(batch=9, channels=(600, 20), size=(7, 7), kernel=(1, 1), bank=1),
    "shared, 3x3, 7x7": Case(batch=4, channels=(20, 17), size=(7, 7), padding=(1, 1), bank=1),
    "shared, groups, large map": Case(
        batch=3, channels=(6, 8), size=(20, 21), kernel=(2, 2), groups=2, bank=1, activation="relu"
    ),
    "one pixel": Case(size=(1, 1), padding=(1, 1)),
    "all ones": Case(batch=1, channels=(1, 1), size=(1, 1), kernel=(1, 1), bank=1, extras=EVERYTHING),
}


def random_like(t: Tensor, seed: int) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t.dtype)


def forward(case: Case, tensors: list[Tensor | None]) -> Tensor:
    return torch.ops.ddrf_fast.dynamic_conv(*tensors, *case.geometry(), case.activation)


def backward(case: Case, grad: Tensor, tensors: list[Tensor | None], mask: int = ALL) -> list[Tensor]:
    present = sum(1 << i for i, t in enumerate(tensors) if t is not None)
    return torch.ops.ddrf_fast.dynamic_conv_backward(grad, *tensors, *case.geometry(), mask & present)


def definition(case: Case, tensors: list[Tensor | None]) -> Tensor:
    """The linear output: one F.conv2d for each sample, in the tensors' own precision."""
    x, weight, attention, bias, code, in_scale, out_scale, tap_scale = tensors
    assert x is not None and weight is not None
    samples = []
    for b in range(case.batch):
        if attention is None:
            kernel, beta = weight[b], None if bias is None else bias[b]
        else:
            share = attention[b].reshape(case.bank, -1)
            kernel = (share[..., None, None, None] * weight).sum(0)
            beta = None if bias is None else (share * bias).sum(0)
        sample = x[b]
        if in_scale is not None:
            scale = torch.cat((in_scale[b], in_scale.new_ones(case.code))).view(case.groups, -1)
            kernel = kernel * scale.repeat_interleave(kernel.shape[0] // case.groups, 0)[..., None, None]
        if out_scale is not None:
            kernel = kernel * out_scale[b][:, None, None, None]
        if tap_scale is not None:
            kernel = kernel * tap_scale[b]
        if code is not None:
            sample = torch.cat((sample, code[b][:, None, None].expand(-1, *case.size)))
        samples.append(F.conv2d(sample, kernel, beta, *case.geometry()))
    return torch.stack(samples)


def activated(case: Case, y: Tensor) -> Tensor:
    return {"none": lambda t: t, "relu": F.relu, "leaky_relu": F.leaky_relu}[case.activation](y)


def definition_with_gradients(
    case: Case, tensors: list[Tensor | None], grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The linear output and the gradients of all tensors, in float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    linear = definition(case, leaves)
    found = iter(torch.autograd.grad(linear, [t for t in leaves if t is not None], grad.double()))
    return linear.detach(), [None if t is None else next(found) for t in leaves]


def assert_rounded_once(actual: Tensor, exact: Tensor, terms: Tensor, name: str) -> None:
    """One rounding to the dtype, and what summing `terms` in float32 (float64 for float64) costs.

    Tighter than twice torch's own error, which in bfloat16 and float16 rounds the kernels too. (With pairs of
    bfloat16 so do we, once: about as much as the rounding of the result, and within the same floor.)
    """
    summing = 1e-15 if actual.dtype == torch.float64 else 5e-7
    largest, largest_term = (float(t.abs().max()) if t.numel() else 0.0 for t in (exact, terms))
    floor = FLOOR[actual.dtype] + summing * largest_term / max(largest, 1e-30)
    assert_accurate(actual, exact, floor=floor, name=name)


def check(
    case: Case, seed: int, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> None:
    """Output and all gradients of one random call."""
    tensors = case.tensors(seed, dtype)
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    y = forward(case, tensors)
    assert y.is_contiguous(memory_format=layout)
    grad = random_like(y, seed + 1).contiguous(memory_format=layout)
    linear, exact = definition_with_gradients(case, tensors, grad)
    # Everything is a sum of products: with absolute values, the sum of its terms' magnitudes.
    magnitudes = [None if t is None else t.abs() for t in tensors]
    linear_terms, terms = definition_with_gradients(case, magnitudes, grad.abs())
    assert_rounded_once(y, activated(case, linear), linear_terms, "y")
    for i, mine in enumerate(backward(case, grad, tensors)):
        if exact[i] is None:
            assert mine.shape == (0,)
        else:
            assert mine.is_contiguous(memory_format=layout if i == 0 else torch.contiguous_format)
            assert_rounded_once(mine, exact[i], terms[i], f"gradient of {NAMES[i]}")


def in_other_layout(t: Tensor, layout: str) -> Tensor:
    """The same values [B, C, H, W] with other strides."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.full((*t.shape[:3], 2 * t.shape[3] + 1), float("nan"), dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_definition(name: str, dtype: torch.dtype):
    check(CASES[name], seed=len(name), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "name",
    ["Winograd", "Winograd in blocks", "1x1, 7x7", "columns of several tiles", "depthwise 5x5, 7x7",
     "depthwise 5x5, 14x14", "depthwise 7x7, wide", "depthwise, dilation", "code, everything",
     "shared, 1x1, 14x14", "shared, 3x3, 7x7", "depthwise 5x5, 7x7, vectors of channels",
     "depthwise 7x7, 9x6, vectors of channels", "depthwise 3x3, 15x9, vectors of channels",
     "depthwise 5x5, stride 2, vectors of channels"],
)  # fmt: skip
def test_the_mean_is_that_of_the_output(name: str, layout: torch.memory_format, dtype: torch.dtype):
    case = CASES[name]
    tensors = case.tensors(3, dtype)
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    y, mean = torch.ops.ddrf_fast.dynamic_conv_mean(*tensors, *case.geometry(), case.activation)
    assert torch.equal(y, forward(case, tensors))
    wide = [None if t is None else t.double() for t in tensors]
    exact = activated(case, definition(case, wide))
    floor = FLOOR[dtype] * float(exact.abs().max() / exact.mean((2, 3)).abs().max())
    assert_accurate(mean, exact.mean((2, 3)), floor=floor, name="mean")


PLANS = {
    "Winograd": "Winograd F(4x4, 3x3), kernels mixed once; the code as a bias",
    "Winograd, groups": "Winograd F(4x2, 3x3), kernels mixed once",
    "Winograd in blocks, wide": "Winograd F(4x4, 3x3), kernels mixed a block at a time",
    "Winograd in blocks, many channels": "Winograd F(4x2, 3x3), kernels mixed a block at a time",
    "1x1, 7x7": "matrix products, kernels mixed a block at a time",
    "columns of several tiles": "matrix products, kernels mixed once, tile by tile",
    "3x3, stride 2, tiles": "matrix products, kernels mixed once, tile by tile",
    "depthwise 7x7, 9x6, vectors of channels": "depthwise, a vector of channels at a time",
    "depthwise 5x5, 14x14": "depthwise, rows waiting in registers",
    "depthwise, dilation": "depthwise, tap by tap",
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sums_over_many_pixels_keep_their_digits(layout: torch.memory_format):
    """The mean of a depthwise output, and the bias's gradient, of equal numbers, whose rounding does not
    cancel: of a million in a row it takes 1 % away, of a thousand 3e-5 at most."""
    x = torch.full((1, 16, 1024, 1024), 0.7).contiguous(memory_format=layout)
    attention, bias = torch.ones(1, 1), torch.zeros(1, 16, requires_grad=True)
    for kernel, stride in ((3, 1), (3, 2), (4, 1)):
        weight = torch.full((1, 16, 1, kernel, kernel), 1 / kernel**2)
        with torch.no_grad():
            y, mean = dynamic_conv(x, weight, attention, stride=stride, groups=16, return_mean=True)
        torch.testing.assert_close(mean, y.double().mean((2, 3)).float(), rtol=3e-5, atol=0)
    for kernel in (1, 3):
        y = dynamic_conv(x, torch.ones(1, 16, 16, kernel, kernel), attention, bias)
        (gradient,) = torch.autograd.grad(y, bias, torch.full_like(y, 0.7))
        expected = torch.full_like(bias, 0.7 * y[0, 0].numel())
        torch.testing.assert_close(gradient, expected, rtol=3e-5, atol=0)


@pytest.mark.parametrize("noise", [torch.randn, torch.rand], ids=["white noise", "positive"])
@pytest.mark.parametrize("inputs", [4, 8, 16, 33, 40, 48, 72, 256])
def test_winograd_is_as_accurate_as_torch(inputs: int, noise: Callable[..., Tensor]):
    case = Case(channels=(inputs, 32), size=(56, 56), padding=(1, 1), attention="none", extras=())
    tensors = case.tensors(inputs)
    tensors[0] = noise(2, inputs, 56, 56, generator=torch.Generator().manual_seed(inputs))
    exact = definition(case, [None if t is None else t.double() for t in tensors])
    # With a floor of three roundings; sums over all channels in one go exceed it.
    assert_accurate(forward(case, tensors), exact, definition(case, tensors), floor=3e-7)


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_told(name: str):
    case = CASES[name]
    plan = torch.ops.ddrf_fast_native.dynamic_conv_plan(*case.tensors(), *case.geometry(), case.activation)
    expected = PLANS[name]
    if not plan.startswith("AVX-512"):  # wide tiles take many registers
        expected = expected.replace("F(4x4", "F(4x2")
    assert expected in plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    ["1x1", "1x1, 7x7", "1x1, 14x14", "1x1, large map", "1x1, everything", "1x1, many channels",
     "1x1, one sample", "shared, 1x1, 14x14", "shared, 1x1, many channels"],
)  # fmt: skip
def test_pixels_as_rows(name: str, dtype: torch.dtype):
    case = CASES[name]
    x = case.tensors(0, dtype)[0].contiguous(memory_format=torch.channels_last)
    plan = torch.ops.ddrf_fast_native.dynamic_conv_plan(
        x, *case.tensors(0, dtype)[1:], *case.geometry(), case.activation
    )
    pairs = plan.startswith(("AVX-512 BF16", "AMX BF16")) and all(
        channels % 2 == 0 for channels in case.channels
    )
    assert ("pixels as rows" in plan) == (dtype in (torch.float32, torch.float64) or pairs)
    check(case, seed=5, dtype=dtype, layout=torch.channels_last)


# One kernel for the whole batch, that of the bank or of the only sample: in NCHW torch's convolution runs it
# and, with a stride of 1, its input gradient.
ONE_KERNEL = {
    "bank of one, stride 2": Case(
        batch=3, channels=(32, 40), size=(29, 30), padding=(1, 1), stride=(2, 2), bank=1, activation="relu"
    ),
    "bank of one, odd geometry": Case(
        batch=2, channels=(34, 33), size=(21, 18), kernel=(2, 5), stride=(1, 2), padding=(0, 3), bank=1,
        dilation=(3, 2), extras=(), activation="leaky_relu",
    ),
    "bank of one, 7x7": Case(batch=4, channels=(33, 32), size=(7, 7), padding=(1, 1), bank=1),
    "one sample": Case(batch=1, channels=(64, 65), size=(36, 35), padding=(1, 1), stride=(2, 2), bank=4),
    "one sample, everything": Case(
        batch=1, channels=(66, 64), size=(18, 17), kernel=(3, 2), attention="channel", extras=EVERYTHING,
        activation="leaky_relu",
    ),
    "one sample, its own kernel": Case(
        batch=1, channels=(64, 64), size=(16, 24), kernel=(4, 4), attention="none", activation="relu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ONE_KERNEL)
def test_one_kernel_for_all_samples(name: str, layout: torch.memory_format, dtype: torch.dtype):
    case = ONE_KERNEL[name]
    tensors = case.tensors(11, dtype)
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    plan = torch.ops.ddrf_fast_native.dynamic_conv_plan(*tensors, *case.geometry(), case.activation)
    pairs = plan.startswith("AVX-512 BF16") and case.batch > 1
    planes = layout == torch.contiguous_format
    assert ("torch's convolution" in plan) == (planes and (dtype == torch.float32 or pairs))
    check(case, 11, dtype, layout)
    y, mean = torch.ops.ddrf_fast.dynamic_conv_mean(*tensors, *case.geometry(), case.activation)
    assert torch.equal(y, forward(case, tensors))
    exact = y.double().mean((2, 3))
    floor = FLOOR[dtype] * float(y.abs().max() / exact.abs().max())
    assert_accurate(mean, exact, floor=floor, name="mean")


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([1, 2, 5]),
    channels=st.tuples(st.sampled_from([64, 66, 96, 128]), st.sampled_from([64, 65, 80, 128])),
    size=st.tuples(st.integers(14, 32), st.integers(14, 32)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_one_kernel_gives_the_same_bits_with_any_number_of_threads(dtype, layout, **shape):
    case, threads, results = Case(**shape, bank=1), torch.get_num_threads(), []
    tensors = case.tensors(7, dtype)
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    grad = random_like(forward(case, tensors), 8)
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        outputs = torch.ops.ddrf_fast.dynamic_conv_mean(*tensors, *case.geometry(), case.activation)
        results.append([*outputs, *backward(case, grad, tensors)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["bank of one, 7x7", "one sample, its own kernel"])
def test_the_input_gradient_of_one_kernel_is_that_of_torch(name: str):
    case = ONE_KERNEL[name]
    tensors = case.tensors(5)
    x, weight = tensors[:2]
    if case.bank == 1:
        tensors[2] = torch.ones_like(tensors[2])
    grad = random_like(forward(case, tensors), 6)
    dx = backward(case, grad, tensors)[0]
    assert torch.equal(dx, F.conv_transpose2d(grad, weight[0], padding=case.padding))
    exact = F.conv_transpose2d(grad.double(), weight[0].double(), padding=case.padding)
    # Neither the gradient's layout nor that of the image may keep it from its own.
    for other in ("channels_last", "sliced"):
        mine = backward(case, in_other_layout(grad, other), tensors)[0]
        assert mine.is_contiguous()
        assert_accurate(mine, exact, dx)
        mine = backward(case, grad, [in_other_layout(x, other), *tensors[1:]])[0]
        assert mine.is_contiguous(
            memory_format=torch.channels_last if other == "channels_last" else torch.contiguous_format
        )
        assert_accurate(mine, exact, dx)


def test_one_kernel_is_not_differentiated_by_torch():
    case = ONE_KERNEL["one sample"]
    tensors = case.tensors(12)
    expected = forward(case, tensors)
    tensors[0].requires_grad_()
    y = forward(case, tensors)
    assert torch.equal(y, expected)
    assert "NotImplemented" in y.grad_fn.name()  # that of the raw operator


def test_one_kernel_is_not_for_other_layouts():
    case = ONE_KERNEL["one sample"]
    tensors = case.tensors(12)
    other = [in_other_layout(tensors[0], "sliced"), *tensors[1:]]
    plan = torch.ops.ddrf_fast_native.dynamic_conv_plan(*other, *case.geometry(), case.activation)
    assert "torch's convolution" not in plan
    exact = definition(case, [t if t is None else t.double() for t in other])
    assert_accurate(forward(case, other), exact, forward(case, tensors))


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=600, channels=(64, 8), size=(7, 7), padding=(1, 1), bank=2),
        Case(
            batch=170, channels=(1000, 1000), size=(3, 3), kernel=(5, 5), padding=(2, 2), groups=1000, bank=1
        ),
        Case(batch=40, channels=(64, 64), size=(24, 24), padding=(1, 1), bank=1),
    ],
    ids=["small map", "depthwise", "Winograd"],
)
def test_batches_that_are_taken_in_parts(case: Case):
    check(case, seed=9, dtype=torch.float32)


def test_pixels_at_the_end_of_memory_are_not_read_beyond():
    """Samples that share their memory, and channels with gaps between them."""
    case = Case(batch=5, channels=(24, 16), size=(7, 7), kernel=(1, 1))
    tensors = case.tensors(2)
    shared = tensors[0][:1].expand(5, -1, -1, -1)
    y = forward(case, [shared, *tensors[1:]])
    assert_accurate(y, definition(case, [t if t is None else t.double() for t in [shared, *tensors[1:]]]), y)
    wide = torch.full((5, 48, 7, 7), float("nan"))
    wide[:, ::2] = tensors[0]
    assert torch.equal(forward(case, [wide[:, ::2], *tensors[1:]]), forward(case, tensors))


def at_the_end_of_memory(t: Tensor) -> Tensor:
    """A copy with NaN before it and no memory behind it: to read there ends the process."""
    size = t.numel() * t.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + whole
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0, os.strerror(ctypes.get_errno())
    torch.frombuffer(memory, dtype=t.dtype, count=whole // t.element_size()).fill_(float("nan"))
    return (
        torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=whole - size).view(t.shape).copy_(t)
    )


def read_at_the_end_of_memory() -> None:
    for name in (
        "1x1, 14x14",
        "1x1, 13x15, panels",
        "shared, 1x1, 14x14",
        "1x1, many channels",
        "3x3, 7x7",
        "3x3, stride 2, tiles",
    ):
        for dtype in DTYPES:
            case = CASES[name]
            tensors = case.tensors(5, dtype)
            moved = [None if t is None else at_the_end_of_memory(t) for t in tensors]
            assert torch.equal(forward(case, moved), forward(case, tensors)), (name, dtype)
    # Fewer pixels than a vector, in the last samples and in those before.
    for case in (
        Case(channels=(1, 1), size=(1, 1), kernel=(1, 1)),
        Case(batch=5, channels=(2, 2), size=(1, 3), kernel=(1, 1)),
        Case(batch=3, channels=(5, 3), size=(4, 4), kernel=(4, 4), stride=(4, 4)),
    ):
        for dtype in DTYPES:
            tensors = case.tensors(6, dtype)
            y = forward(case, tensors)
            grad = random_like(y, 7)
            moved = [None if t is None else at_the_end_of_memory(t) for t in tensors]
            assert torch.equal(forward(case, moved), y), (case, dtype)
            found = backward(case, at_the_end_of_memory(grad), moved)
            for mine, expected in zip(found, backward(case, grad, tensors), strict=True):
                assert torch.equal(mine, expected), (case, dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is looked up in the process itself")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_is_read_behind_the_tensors(capability: str):
    run_capability("import test_dynamic_conv_cpu as t; t.read_at_the_end_of_memory()", capability)


@pytest.mark.parametrize("reach", [5000, 2**31 - 1])
def test_taps_that_lie_far_apart_take_no_memory(reach: int):
    case = Case(
        batch=1, channels=(16, 16), size=(2, 2), groups=16, padding=(reach,) * 2, dilation=(reach,) * 2
    )
    tensors = case.tensors(0)
    y = forward(case, tensors)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(forward(case, tensors), y)


@pytest.mark.parametrize("empty", [Case(channels=(0, 5)), Case(channels=(3, 0)), Case(bank=0)])
def test_an_empty_bank_is_refused(empty):
    with pytest.raises(RuntimeError, match="weight: expected a kernel, an output channel, and an input"):
        forward(empty, empty.tensors())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject):
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    kernel, dilation, padding = ((draw(1, 4), draw(1, 5)), (draw(1, 3), draw(1, 2)), (draw(0, 4), draw(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    case = Case(
        batch=draw(1, 3),
        channels=(groups * draw(1, 9), groups * draw(1, 10)),
        size=(least[0] + draw(0, 9), least[1] + draw(0, 33)),
        kernel=kernel,
        stride=(draw(1, 3), draw(1, 3)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bank=draw(1, 3),
        attention=data.draw(st.sampled_from(("sample", "channel", "none"))),
        code=draw(0, 3) if groups == 1 else 0,
        extras=tuple(n for n in EVERYTHING if data.draw(st.booleans())),
        activation=data.draw(st.sampled_from(("none", "relu", "leaky_relu"))),
    )
    check(case, draw(0, 1 << 30), data.draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
@pytest.mark.parametrize(
    "name",
    [
        "3x3", "code, everything", "stride 2", "groups", "many channels", "Winograd", "Winograd in blocks",
        "3x3, stride 2, 14x14", "3x3, stride 2, many outputs", "depthwise 5x5, not padded",
        "depthwise 5x5, stride 2",
        "depthwise, dilation", "depthwise 7x7, 7x7, vectors of channels",
        "depthwise 3x3, 15x9, vectors of channels", "depthwise 5x5, stride 2, vectors of channels",
    ],
)  # fmt: skip
def test_layouts_give_the_same_numbers_and_keep_channels_last(name: str, layout: str, dtype: torch.dtype):
    case = CASES[name]
    tensors = case.tensors(3, dtype)
    other = [in_other_layout(tensors[0], layout), *tensors[1:]]
    y = forward(case, tensors)
    grad = random_like(y, 4)
    got = forward(case, other)
    grads = backward(case, grad, tensors)
    got_grads = backward(case, in_other_layout(grad, layout), other)
    assert torch.equal(got, y)
    kept = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert got.is_contiguous(memory_format=kept)
    assert got_grads[0].is_contiguous(memory_format=kept)
    for name, mine, expected in zip(NAMES, got_grads, grads, strict=True):
        assert_accurate(mine, expected.double(), name=f"gradient of {name}")


def test_expanded_and_non_contiguous_operands():
    case = Case(extras=EVERYTHING, padding=(1, 1), code=2)
    dense = case.tensors(5)
    dense[0] = dense[0][:, :1, :1].expand_as(dense[0])
    dense[2] = dense[2][:1].expand_as(dense[2])
    strided = [dense[0], *(torch.stack((t, t), -1)[..., 0] for t in dense[1:])]
    contiguous = [t.contiguous() for t in dense]
    assert torch.equal(forward(case, strided), forward(case, contiguous))
    grad = torch.ones(1, 1, 1, 1).expand_as(forward(case, strided))
    for mine, expected in zip(
        backward(case, grad, strided), backward(case, grad.contiguous(), contiguous), strict=True
    ):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("bit", range(8), ids=NAMES)
@pytest.mark.parametrize("attention", ["sample", "none"])
def test_each_gradient_alone(bit: int, attention: str):
    case = Case(attention=attention, extras=EVERYTHING, code=2, padding=(1, 1), stride=(1, 2))
    tensors = case.tensors(6)
    if tensors[bit] is None:
        pytest.skip("without attention there is no gradient of it")
    grad = torch.ones_like(forward(case, tensors))
    full, alone = backward(case, grad, tensors), backward(case, grad, tensors, 1 << bit)
    for i, (mine, expected) in enumerate(zip(alone, full, strict=True)):
        assert torch.equal(mine, expected) if i == bit else mine.shape == (0,)


@pytest.mark.parametrize(
    "name",
    [
        "1x1, 14x14",
        "1x1, many channels",
        "3x3, 7x7",
        "3x3, stride 2, 14x14",
        "3x3, stride 2, tiles",
        "3x3, stride 2, many outputs",
    ],
)
def test_the_same_bits_however_a_batch_is_split(name: str):
    case = replace(CASES[name], batch=11)
    x, weight, attention, *rest = case.tensors(6)
    y = forward(case, [x, weight, attention, *rest])
    for size in (1, 2, 5):
        parts = zip(x.split(size), attention.split(size), strict=True)
        split = torch.cat([forward(case, [part, weight, share, *rest]) for part, share in parts])
        assert torch.equal(split, y)


def test_the_same_bits_with_any_number_of_threads():
    threads = torch.get_num_threads()
    for case in (
        Case(batch=3, channels=(20, 18), size=(40, 33), padding=(1, 1), code=2, extras=EVERYTHING),
        Case(batch=1, channels=(33, 40), size=(50, 60), padding=(1, 1), stride=(2, 1)),
        Case(batch=2, channels=(24, 24), groups=24, size=(30, 31), padding=(1, 1)),
    ):
        tensors = case.tensors(7)
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            y = forward(case, tensors)
            results.append([y, *backward(case, y, tensors)])
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def nanoseconds_of_threads() -> dict[str, int]:
    """How long each thread of this process has run."""
    tasks = Path("/proc/self/task")
    time.sleep(0.001)  # what a thread has run since the last tick is counted when it gives up its core
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()}


def share_work(batch: int) -> None:
    case = Case(batch=batch, channels=(32, 32), size=(200, 200), padding=(1, 1), bank=2)
    tensors = case.tensors(8)
    torch.set_num_threads(2)
    y = forward(case, tensors)  # starts the threads
    for work in (lambda: forward(case, tensors), lambda: backward(case, y, tensors)):
        before = nanoseconds_of_threads()
        for _ in range(3):
            work()
        after = nanoseconds_of_threads()
        first, *others = sorted((after[task] - before.get(task, 0) for task in after), reverse=True)
        assert sum(others) > 0.5 * first, (first, others)  # the second thread need not be the same each time


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="threads' time is not counted here")
@pytest.mark.parametrize("batch", [1, 4])
def test_two_threads_share_the_work(batch: int):
    # Passive: a thread that waits for the other does not spin, which would count as work.
    done = run_elsewhere(
        f"import test_dynamic_conv_cpu as t; t.share_work({batch})", OMP_WAIT_POLICY="passive"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability: str):
    program = (
        "import test_dynamic_conv_cpu as t\n"
        "for dtype in t.DTYPES:\n"
        "    for name in ('3x5, odd sizes', 'code, everything', 'depthwise', 'many channels', '3x3, 7x7',\n"
        "                 '3x3, stride 2, 14x14', '3x3, stride 2, tiles', 'depthwise 5x5, 14x14',\n"
        "                 'depthwise 5x5, stride 2', 'depthwise 3x3, wide',\n"
        "                 'depthwise 7x7, 7x7, vectors of channels'):\n"
        "        t.check(t.CASES[name], 100, dtype)\n"
        "        t.test_layouts_give_the_same_numbers_and_keep_channels_last(name, 'channels_last', dtype)\n"
    )
    run_capability(program, capability)


def test_tiles_of_pairs():
    program = (
        "import torch, test_dynamic_conv_cpu as t\n"
        "bfloat16 = torch.bfloat16\n"
        "for name, case in {**t.CASES, **t.ONE_KERNEL}.items():\n"
        "    for layout in (torch.contiguous_format, torch.channels_last):\n"
        "        t.check(case, 101, bfloat16, layout)\n"
        "    plan = torch.ops.ddrf_fast_native.dynamic_conv_plan\n"
        "    found = plan(*case.tensors(0, bfloat16), *case.geometry(), case.activation)\n"
        "    assert found.startswith('AMX BF16: ') and 'Winograd' not in found, (name, found)\n"
        "    if name == '1x1, 13x15, panels':\n"
        "        assert found.endswith('kernels mixed for some samples at a time'), found\n"
    )
    run_capability(program, "amx_bf16")


def test_an_unknown_instruction_set_is_named():
    program = "import test_dynamic_conv_cpu as t; case = t.Case(); t.forward(case, case.tensors())"
    done = run_elsewhere(program, DDRF_FAST_CPU_CAPABILITY="sse9")
    assert done.returncode != 0
    assert (
        "DDRF_FAST_CPU_CAPABILITY: expected default, avx2, avx512, avx512_bf16 or amx_bf16, got 'sse9'"
        in done.stderr
    )


@pytest.mark.parametrize("attention", ["sample", "none"])
def test_empty_batch(attention: str):
    case = Case(batch=0, attention=attention, extras=EVERYTHING, code=2)
    tensors = case.tensors()
    y = forward(case, tensors)
    assert y.shape == (0, 5, 5, 7)
    for mine, tensor in zip(backward(case, y, tensors), tensors, strict=True):
        assert mine.shape == ((0,) if tensor is None else tensor.shape)
        assert not mine.any()


@pytest.mark.parametrize("bank", [1, 3])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1)])
def test_nothing_but_a_code(padding: tuple[int, int], bank: int):
    check(Case(channels=(0, 5), code=2, padding=padding, bank=bank), 13, torch.float32)


def test_kernels_too_large_to_be_mixed_at_once():
    case = Case(batch=5, channels=(512, 512), size=(1, 2), padding=(1, 1), bank=1)
    check(case, 9, torch.float32)


def test_an_infinite_pixel_stays_in_its_channel():
    case = Case(batch=1, channels=(3, 2), size=(6, 5), padding=(1, 1))
    tensors = case.tensors(10)
    tensors[0][0, 1, 0, 0] = float("inf")
    y = forward(case, tensors)
    assert y[..., 2:, 2:].isfinite().all()
    assert not y[..., :2, :2].isfinite().any()
    grad_weight = backward(case, torch.ones_like(y), tensors)[1]
    assert grad_weight[:, :, [0, 2]].isfinite().all()
    assert not grad_weight[:, :, 1].isfinite().all()


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_nan_and_infinity_pass_the_activation_as_in_torch(activation: str):
    case = Case(
        batch=1, channels=(1, 1), size=(1, 4), kernel=(1, 1), bank=1, extras=(), activation=activation
    )
    x = torch.tensor([[[[float("nan"), float("inf"), -float("inf"), -2.0]]]])
    one = torch.ones(1, 1, 1, 1, 1)
    y = forward(case, [x, one, one[0, 0, 0], None, None, None, None, None])
    torch.testing.assert_close(y, activated(case, x), equal_nan=True)


def test_denormals_are_flushed_inside_only():
    case = Case(batch=1, channels=(1, 1), size=(1, 1), kernel=(1, 1), bank=1, extras=())
    tensors = case.tensors()
    for i, value in enumerate((1e-30, 1e-10, 1.0)):
        tensors[i].fill_(value)
    assert forward(case, tensors).item() == 0.0
    assert (torch.tensor(1e-30) * torch.tensor(1e-10)).item() != 0.0


WRONG = {
    "x": {"x": torch.zeros(2, 3, 7)},
    "weight": {"weight": torch.zeros(3, 5, 4, 3, 3)},
    "attention": {"attention": torch.zeros(2, 4)},
    "bias": {"bias": torch.zeros(3, 6)},
    "code": {"code": torch.zeros(3, 2)},
    "in_scale": {"in_scale": torch.zeros(2, 4)},
    "out_scale": {"out_scale": torch.zeros(1, 5)},
    "tap_scale": {"tap_scale": torch.zeros(2, 3, 2)},
    "stride": {"stride": [0, 1]},
    "padding": {"padding": [1, -1]},
    "dilation": {"dilation": [1 << 40, 1]},
    "groups": {"groups": 2},
    "activation": {"activation": "gelu"},
    "attention: expected dtype": {"attention": torch.zeros(2, 3, dtype=torch.float64)},
    "does not fit the padded size": {"padding": [0, 0], "dilation": [4, 1]},
    "not implemented for": dict.fromkeys(NAMES[3:])
    | {
        "x": torch.zeros(2, 3, 7, 9, dtype=torch.int32),
        "weight": torch.zeros(3, 5, 3, 3, 3, dtype=torch.int32),
        "attention": torch.zeros(2, 3, dtype=torch.int32),
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_raw_operators_refuse_what_does_not_fit(message: str):
    case = Case(extras=EVERYTHING, code=2, padding=(1, 1))
    options = ("stride", "padding", "dilation", "groups", "activation")
    arguments = dict(zip(NAMES, case.tensors(), strict=True))
    arguments |= dict(zip(options, (*case.geometry(), "none"), strict=True)) | WRONG[message]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddrf_fast.dynamic_conv(*arguments.values())


def test_backward_refuses_a_wrong_grad_and_gradients_of_nothing():
    case = Case(extras=())
    tensors = case.tensors()
    grad = torch.zeros_like(forward(case, tensors))
    with pytest.raises(RuntimeError, match="grad: expected shape"):
        backward(case, grad[..., 1:], tensors)
    with pytest.raises(RuntimeError, match="output_mask: bit 3"):
        torch.ops.ddrf_fast.dynamic_conv_backward(grad, *tensors, *case.geometry(), 1 << 3)
