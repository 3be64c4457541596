"""What `ddrf-fast bench` and the project's benchmarks share: calls timed in turn, and the memory they take.

Everything that is compared is timed in one process, block by block, in rotating order, so that a slow minute
of the machine hits all of it. A block is as many calls as make it long enough for the clock; the result is
the median over blocks and the distance between the quartiles. On GPUs a block lies between two CUDA events.
"""

import functools
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

ROUNDS = 9
# When one call takes longer than all the rounds should; when it takes VERY_LONG times as long, FEW_ROUNDS,
# the first two calls counted.
ROUNDS_OF_LONG_CALLS = 5
FEW_ROUNDS = 3
VERY_LONG = 10.0
# So many times slower than the fastest peer: FEW_ROUNDS, or only the first two calls when they are long.
FAR_BEHIND = 4.0
# Only the first call when it is long.
HOPELESS = 20.0

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
CPU_PEAKS = os.access(_CLEAR_REFS, os.W_OK)  # whether the system tells what a process took at its peak

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


def _seconds_cuda(device: torch.device, step: Step, first: int, calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    begin.record(stream)
    for i in range(first, first + calls):
        step(i)
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, by linear interpolation."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    low, middle, high = torch.quantile(ordered, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return low, middle, high


def time_in_turn(
    steps: Mapping[str, Step], device: str | torch.device, min_time: float, peers: Collection[str] = ()
) -> dict[str, Timing]:
    """Times every step; a step is called with a running number, by which it may pick its inputs.

    Args:
        steps: by name. Each must have run at least once already (warm).
        device: what they run on.
        min_time: seconds that each is timed for; slow ones take what their fewer rounds take.
        peers: names of those whose fastest says who is slow; all where there is none of them.

    Example:
        >>> timings = time_in_turn({"sum": lambda i: torch.ones(9).sum()}, "cpu", min_time=0.01)
        >>> timings["sum"].median_ms > 0
        True
    """
    if not steps:
        return {}
    device = torch.device(device)
    seconds = functools.partial(_seconds_cuda, device) if device.type == "cuda" else _seconds_cpu
    first = {name: seconds(step, 0, 1) for name, step in steps.items()}
    peers = [name for name in steps if name in peers] or list(steps)
    long = max(HOPELESS * min(first[name] for name in peers), min_time)
    tried = {name: [t] if t > long else [t, seconds(steps[name], 1, 1)] for name, t in first.items()}
    fastest = min(min(tried[name]) for name in peers)

    samples: dict[str, list[float]] = {}
    rounds, calls = {}, {}
    for name, pair in tried.items():
        once = min(pair)
        if once > max(FAR_BEHIND * fastest, min_time):
            samples[name], rounds[name], calls[name] = [1e3 * t for t in pair], 0, 1
            continue
        samples[name], calls[name] = [], max(1, round(min_time / ROUNDS / max(once, 1e-9)))
        rounds[name] = ROUNDS_OF_LONG_CALLS if once > min_time else ROUNDS
        if once > VERY_LONG * min_time:
            samples[name] = [1e3 * t for t in pair]
            rounds[name] = FEW_ROUNDS - len(pair)
        elif once > FAR_BEHIND * fastest:
            rounds[name] = FEW_ROUNDS

    names = list(steps)
    for turn in range(max(rounds.values())):
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


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that are taken at the peak of a call, with all that was taken before.

    Of a CPU by the process (its resident memory, the interpreter and libraries included); of a CUDA device
    by torch's allocator. None where the system does not tell it (other than Linux).

    Example:
        >>> peak = peak_memory(lambda: torch.ones(1 << 20), torch.device("cpu"))
        >>> peak is None or peak > 4
        True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not CPU_PEAKS:
        return None
    reset_peak()
    call()
    return resident("VmHWM")


def reset_peak() -> None:
    """Lowers the high-water mark of this process's resident memory to what is resident now."""
    _CLEAR_REFS.write_text("5")


def resident(field: str) -> float:
    """MiB of this process's memory that are resident: now ("VmRSS"), or at its peak ("VmHWM")."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10
