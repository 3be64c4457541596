"""The roof: how fast the machine multiplies and moves data, and what a shape can reach under it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import DTYPES, Work
from ddrf_fast._measuring import time_in_turn


@dataclass(frozen=True)
class Roof:
    """Operations per second of large dense arithmetic, bytes per second (in and out) of a large copy."""

    flops_per_s: float
    bytes_per_s: float

    def milliseconds(self, work: Work) -> float:
        """The least time for that work: the larger of arithmetic and traffic."""
        return 1e3 * max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)

    def bound(self, work: Work) -> str:
        """Which of the two it is."""
        return "arithmetic" if work.flops / self.flops_per_s > work.bytes / self.bytes_per_s else "traffic"


def measure(device: str, dtype: str) -> Roof:
    """Measures the roof for a dtype with all the threads that torch has now.

    Arithmetic is a matrix product; on CPUs, whose BLAS may stay far below the processor's peak (MKL on AMD
    does), also a dense 3x3 convolution, and the faster of both counts. Entries are random: zeros multiply
    faster on some GPUs.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPES[dtype])

    size = 8192 if device == "cuda" else 2048
    a, b = random(size, size), random(size, size)
    out = torch.empty_like(a)
    source = torch.ones((1 << 30) if device == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    arithmetic = {"product": (2 * size**3, lambda i: torch.mm(a, b, out=out))}
    if device == "cpu":
        batch, channels, side = 4, 256, 56
        x, weight = (
            random(*shape).contiguous(memory_format=torch.channels_last)
            for shape in ((batch, channels, side, side), (channels, channels, 3, 3))
        )
        flops = 2 * batch * side**2 * channels**2 * 9
        arithmetic["convolution"] = (flops, lambda i: F.conv2d(x, weight, padding=1))
    steps = {name: step for name, (_, step) in arithmetic.items()} | {"copy": lambda i: target.copy_(source)}
    for step in steps.values():
        step(0)
    seconds = {name: t.median_ms * 1e-3 for name, t in time_in_turn(steps, device, min_time=0.3).items()}
    return Roof(
        flops_per_s=max(flops / seconds[name] for name, (flops, _) in arithmetic.items()),
        bytes_per_s=2 * source.numel() / seconds["copy"],
    )
