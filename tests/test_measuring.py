"""How calls are timed in turn, and what memory they take."""

import subprocess
import sys

import pytest

from ddrf_fast import _measuring


def test_quartiles_interpolate():
    assert _measuring.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx((2.0, 3.0, 4.0))
    assert _measuring.quartiles([1.0, 2.0]) == pytest.approx((1.25, 1.5, 1.75))


def test_slow_providers_take_few_calls(monkeypatch: pytest.MonkeyPatch):
    """Seconds a call, and how often each is called: those that can be the best peer at least five times."""
    seconds = {"fastest": 1.0, "behind": 3.9, "far behind": 5.0, "hopeless": 21.0}
    called = dict.fromkeys(seconds, 0)

    def clock(step, first: int, calls: int) -> float:
        called[step] += calls
        return seconds[step] * calls

    monkeypatch.setattr(_measuring, "_seconds_cpu", clock)
    timings = _measuring.time_in_turn({name: name for name in seconds}, "cpu", min_time=0.5)
    assert {name: t.calls for name, t in timings.items()} == {
        "fastest": 5,
        "behind": 5,
        "far behind": 2,
        "hopeless": 1,
    }
    assert called == {"fastest": 7, "behind": 7, "far behind": 2, "hopeless": 1}
    assert {name: t.median_ms / 1e3 for name, t in timings.items()} == pytest.approx(seconds)
    timings = _measuring.time_in_turn({name: name for name in seconds}, "cpu", min_time=90.0)
    assert {name: t.calls for name, t in timings.items()} == {
        "fastest": 9 * 10,
        "behind": 9 * 3,
        "far behind": 3 * 2,
        "hopeless": 3,
    }
    steps = {name: name for name in seconds}
    # However fast ddrf_fast is, its peers are judged among themselves.
    timings = _measuring.time_in_turn(steps, "cpu", 0.5, ["far behind", "hopeless"])
    assert [t.calls for t in timings.values()] == [5, 5, 5, 2]
    # Very long calls are few, whoever makes them.
    called["fastest"] = 0
    assert _measuring.time_in_turn({"fastest": "fastest"}, "cpu", min_time=0.05)["fastest"].calls == 3
    assert called["fastest"] == 3
    assert _measuring.time_in_turn({}, "cpu", min_time=1.0) == {}


def test_rounds_begin_with_another_each_time(monkeypatch: pytest.MonkeyPatch):
    order = []

    def clock(step, first: int, calls: int) -> float:
        order.append(step)
        return float(calls)

    monkeypatch.setattr(_measuring, "_seconds_cpu", clock)
    _measuring.time_in_turn({"a": "a", "b": "b"}, "cpu", min_time=0.5)
    assert "".join(order) == "ab" + "ab" + "abbaabbaab"


@pytest.mark.skipif(not _measuring.CPU_PEAKS, reason="the system does not tell")
def test_peak_memory_is_that_of_the_process_during_the_call():
    """In a new process: one that has run other tests may be given back memory of theirs meanwhile."""
    program = """
import torch
from ddrf_fast._measuring import peak_memory
for call in (lambda: None, lambda: torch.ones(16 << 20), lambda: None):
    print(peak_memory(call, torch.device("cpu")))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    idle, during, after = map(float, run.stdout.split())
    assert during == pytest.approx(idle + 64, abs=8)
    assert after == pytest.approx(idle, abs=8)
