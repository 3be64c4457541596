"""Timing providers in turn.

All providers of a case are timed in one process, block by block, in rotating order, so that a slow minute of
the machine hits everybody. A block is as many calls as make it long enough for the clock; the result is the
median over blocks and the distance between the quartiles. On GPUs a block lies between two CUDA events.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from benchmarks.registry import Inputs, Operation, Run, Setting, targets

ROUNDS = 9
# When one call takes longer than all the rounds should.
ROUNDS_OF_LONG_CALLS = 5
# So many times slower than the fastest peer: FEW_ROUNDS, or only the first two calls when they are long.
FAR_BEHIND = 4.0
FEW_ROUNDS = 3
# Only the first call when it is long.
HOPELESS = 20.0

Step = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call; `calls` is how many were timed."""

    median_ms: float
    iqr_ms: float
    calls: int


def measured_step(operation: Operation, run: Run, sets: list[Inputs], setting: Setting) -> Step:
    """A function of a running number: one call on the next inputs.

    Forward, forward and all gradients, or a whole training step.
    """
    if not setting.backward:

        def forward(i: int) -> None:
            with torch.no_grad():
                run(sets[i % len(sets)])

        return forward

    wanted = [list(targets(inputs).values()) for inputs in sets]
    if setting.mode == "step":
        return _training_step(operation, run, sets, wanted)
    grads: list[torch.Tensor] = []

    def step(i: int) -> None:
        output = run(sets[i % len(sets)])
        if not grads:
            grads.append(torch.randn_like(output))
        torch.autograd.grad(output, wanted[i % len(sets)], grads[0])

    return step


def _training_step(
    operation: Operation, run: Run, sets: list[Inputs], wanted: list[list[torch.Tensor]]
) -> Step:
    assert operation.loss is not None
    loss = operation.loss
    optimizers = [torch.optim.Adam(tensors) for tensors in wanted]

    def step(i: int) -> None:
        inputs, optimizer = sets[i % len(sets)], optimizers[i % len(sets)]
        optimizer.zero_grad()
        loss(inputs, run(inputs)).backward()
        optimizer.step()

    return step


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


def time_in_turn(
    steps: Mapping[str, Step], device: str, min_time: float, peers: Collection[str] = ()
) -> dict[str, Timing]:
    """Times every step; a step is called with a running number, by which it picks its input set.

    Args:
        steps: By provider. Each must have run at least once already (warm).
        device: "cpu" or "cuda".
        min_time: Seconds that each provider is timed for; slow ones take what their fewer rounds take.
        peers: Names of those whose fastest says who is slow; all where there is none of them.
    """
    if not steps:
        return {}
    seconds = _seconds_cuda if device == "cuda" else _seconds_cpu
    first = {name: seconds(step, 0, 1) for name, step in steps.items()}
    peers = [name for name in steps if name in peers] or list(steps)
    long = max(HOPELESS * min(first[name] for name in peers), min_time)
    tried = {name: [t] if t > long else [t, seconds(steps[name], 1, 1)] for name, t in first.items()}
    fastest = min(min(tried[name]) for name in peers)

    samples, rounds, calls = {}, {}, {}
    for name, pair in tried.items():
        once = min(pair)
        if once > max(FAR_BEHIND * fastest, min_time):
            samples[name], rounds[name], calls[name] = [1e3 * t for t in pair], 0, 1
            continue
        rounds[name] = ROUNDS_OF_LONG_CALLS if once > min_time else ROUNDS
        if once > FAR_BEHIND * fastest:
            rounds[name] = FEW_ROUNDS
        samples[name], calls[name] = [], max(1, round(min_time / ROUNDS / max(once, 1e-9)))

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
