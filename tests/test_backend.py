"""Choosing an implementation: by itself, by name, by environment."""

import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import ddrf_fast
from ddrf_fast.ops import _backend, _native

ARGUMENTS = (torch.rand(1, 2, 5, 5), torch.rand(3, 4, 2, 3, 3), torch.rand(1, 3))


def test_the_compiled_library_is_loaded():
    assert _native.status()["_C"] == (True, _native.find("_C").name)


def test_the_choice_is_explained():
    explained = ddrf_fast.explain(ddrf_fast.dynamic_conv, *ARGUMENTS)
    assert (explained.backend, explained.asked_for, explained.refused) == ("native", False, {})
    assert str(explained).splitlines()[0] == "dynamic_conv: native (the first that can run)"
    with pytest.raises(
        ValueError,
        match="op must be one of dynamic_conv, sample_conv2d, degrade, degrade_adjoint, route, got 'conv'",
    ):
        ddrf_fast.explain("conv", *ARGUMENTS)


def test_the_plan_is_explained():
    """A line more, where the backend tells how it runs a shape."""
    for options in ({}, {"return_mean": True}):
        explained = ddrf_fast.explain("dynamic_conv", *ARGUMENTS, **options)
        expected = [f"  {explained.plan}"] if explained.plan else []
        assert str(explained).splitlines()[1:] == expected
    with ddrf_fast.use_backend("reference"):
        explained = ddrf_fast.explain("dynamic_conv", *ARGUMENTS)
        degraded = ddrf_fast.explain("degrade", torch.rand(1, 1, 5, 5), torch.ones(1, 1, 1), torch.ones(1, 1))
    assert explained.plan == "unfolded patches, and a matrix product for each sample and group"
    assert str(explained) == f"dynamic_conv: reference (asked for by name)\n  {explained.plan}"
    assert degraded.plan


def test_a_module_of_triton_kernels_may_lack_an_operation(monkeypatch):
    class Module:
        def unsupported(op, *args):
            return None

        def plan(op, *args):
            return f"{op} in one tile"

        def dynamic_conv(*args):
            return None

    monkeypatch.setattr(_backend, "_module", lambda name, op: Module)
    monkeypatch.setattr(_backend, "_device", lambda args: "cuda")
    assert _backend.unavailable("triton", "dynamic_conv", ARGUMENTS) is None
    assert _backend.unavailable("triton", "route", ARGUMENTS) == "there is no Triton kernel for route"
    assert ddrf_fast.explain("dynamic_conv", *ARGUMENTS).plan == "dynamic_conv in one tile"


def test_a_backend_is_forced_for_a_block_and_for_good():
    with ddrf_fast.use_backend("reference"):
        assert ddrf_fast.explain("dynamic_conv", *ARGUMENTS).backend == "reference"
        with ddrf_fast.use_backend("auto"):
            assert ddrf_fast.explain("dynamic_conv", *ARGUMENTS).backend == "native"
        assert ddrf_fast.explain("dynamic_conv", *ARGUMENTS).asked_for
    ddrf_fast.use_backend("reference")
    assert ddrf_fast.explain("dynamic_conv", *ARGUMENTS).backend == "reference"
    ddrf_fast.use_backend("auto")
    assert not ddrf_fast.explain("dynamic_conv", *ARGUMENTS).asked_for


def test_a_forced_backend_may_be_forced_again():
    forced = ddrf_fast.use_backend("reference")
    for _ in range(2):
        with forced:
            assert _backend.asked_for() == "reference"
        assert _backend.asked_for() is None


def test_a_block_may_be_entered_within_itself():
    with ddrf_fast.use_backend("reference") as forced:
        with ddrf_fast.use_backend("native"):
            with forced:
                assert _backend.asked_for() == "reference"
            assert _backend.asked_for() == "native"
        assert _backend.asked_for() == "reference"
    assert _backend.asked_for() is None


def test_a_call_replaces_the_one_before():
    first = weakref.ref(ddrf_fast.use_backend("native"))
    assert first() is None  # nothing keeps it
    kept = len(_backend._calls)
    for _ in range(3):
        ddrf_fast.use_backend("native")
        ddrf_fast.use_backend("reference")
    assert len(_backend._calls) <= kept + 2
    with ddrf_fast.use_backend("native"):
        ddrf_fast.use_backend("auto")
        assert _backend.asked_for() == "native"
    assert _backend.asked_for() is None


def test_what_is_called_before_a_block_is_entered_stays():
    """As it may happen with blocks of two threads, which are called and entered in turn."""
    ddrf_fast.use_backend("reference")
    first, second = ddrf_fast.use_backend("native"), ddrf_fast.use_backend("triton")
    with first, second:
        assert _backend.asked_for() == "triton"
    assert _backend.asked_for() == "reference"
    ddrf_fast.use_backend("auto")


def test_blocks_of_threads_that_overlap_leave_nothing_behind():
    entered, left = threading.Event(), threading.Event()

    def other():
        with ddrf_fast.use_backend("native"):
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with ddrf_fast.use_backend("reference"):
        thread.start()
        entered.wait()
        assert _backend.asked_for() == "native"
    assert _backend.asked_for() == "native"
    left.set()
    thread.join()
    assert _backend.asked_for() is None


def test_a_forced_backend_runs_the_backward_too():
    calls = []
    x, weight, attention = (t.clone().requires_grad_() for t in ARGUMENTS)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    for backend, seen in (("native", True), ("reference", False)):
        calls.clear()
        with ddrf_fast.use_backend(backend), Record():
            ddrf_fast.dynamic_conv(x, weight, attention).sum().backward()
        assert ("ddrf_fast.dynamic_conv_backward.default" in calls) == seen


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why(backend):
    with (
        ddrf_fast.use_backend(backend),
        pytest.raises(ddrf_fast.BackendUnavailableError, match=f"backend '{backend}' was asked for, but"),
    ):
        ddrf_fast.dynamic_conv(*ARGUMENTS)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="name must be one of auto, native, cuda, triton, reference, got 'fast'"
    ):
        ddrf_fast.use_backend("fast")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", "reference (asked for by name)"), ("quick", "DDRF_FAST_BACKEND must be one of")],
)
def test_environment_variable(value, expected):
    program = (
        "import torch, ddrf_fast; "
        "print(ddrf_fast.explain('sample_conv2d', torch.rand(1, 1, 3, 3), torch.rand(1, 1, 1, 1, 1)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "DDRF_FAST_BACKEND": value},
    )
    assert expected in ran.stdout + ran.stderr
