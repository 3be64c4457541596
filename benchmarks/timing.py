"""Timing providers in turn.

All providers of a case are timed in one process, block by block, in rotating order, so that a slow minute of
the machine hits everybody. A block is as many calls as make it long enough for the clock; the result is the
median over blocks and the distance between the quartiles. On GPUs a block lies between two CUDA events.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = 9
FEW_ROUNDS = 3
# So many times slower than the fastest: FEW_ROUNDS only, or nothing beyond the first two calls.
FAR_BEHIND = 4.0
HOPELESS = 20.0

Step = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call; `calls` is how many were timed."""

    median_ms: float
    iqr_ms: float
    calls: int


def _seconds_cpu(step: Step, first: int, calls: int) -> float:
    start = time.perf_counter()
    for i in range(first, first + calls):
        step(i)
    return time.perf_counter() - start


def _seconds_cuda(step: Step, first: int, calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for i in range(first, first + calls):
        step(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, by linear interpolation."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    low, middle, high = torch.quantile(ordered, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return low, middle, high


def time_in_turn(steps: Mapping[str, Step], device: str, min_time: float) -> dict[str, Timing]:
    """Times every step; a step is called with a running number, by which it picks its input set.

    Args:
        steps: By provider. Each must have run at least once already (warm).
        device: "cpu" or "cuda".
        min_time: Seconds that each provider is timed for; slow ones take what their fewer rounds take.
    """
    seconds = _seconds_cuda if device == "cuda" else _seconds_cpu
    first = {name: [seconds(step, i, 1) for i in range(2)] for name, step in steps.items()}
    fastest = min((min(pair) for pair in first.values()), default=0.0)

    samples, rounds, calls = {}, {}, {}
    for name, pair in first.items():
        once = min(pair)
        if once > max(HOPELESS * fastest, min_time):
            samples[name], rounds[name], calls[name] = [1e3 * value for value in pair], 0, 1
        else:
            samples[name] = []
            rounds[name] = FEW_ROUNDS if once > FAR_BEHIND * fastest else ROUNDS
            calls[name] = max(1, round(min_time / ROUNDS / max(once, 1e-9)))

    names = list(steps)
    for turn in range(max(rounds.values(), default=0)):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if turn < rounds[name]:
                elapsed = seconds(steps[name], turn * calls[name], calls[name])
                samples[name].append(1e3 * elapsed / calls[name])

    timings = {}
    for name, values in samples.items():
        low, middle, high = quartiles(values)
        timings[name] = Timing(median_ms=middle, iqr_ms=high - low, calls=len(values) * calls[name])
    return timings
