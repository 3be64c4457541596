"""Which implementation of an operation runs, why, and how to force one.

    native      C++ on the CPU
    cuda        CUDA C++ (degrade)
    triton      Triton on CUDA devices; on the CPU in Triton's interpreter only, when asked for
    reference   plain torch, anywhere

Without a wish the dispatcher calls the compiled CPU kernels for CPU tensors, and `run_on_cuda` below, for
CUDA tensors, takes the first of cuda, triton and reference that can run. A backend asked for by name runs or
raises.
"""

import importlib
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from ddrf_fast.ops import _native

BACKENDS = ("native", "cuda", "triton", "reference")
_ORDER = {"cpu": ("native", "reference"), "cuda": ("cuda", "triton", "reference")}
# The module of an operation's implementations; its gradient is `<name>_backward` beside it.
_MODULE = {
    "dynamic_conv": "dynamic_conv",
    "dynamic_conv_backward": "dynamic_conv",
    "dynamic_conv_mean": "dynamic_conv",
    "degrade": "degrade",
    "degrade_backward": "degrade",
    "route": "route",
}


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


def _checked(name: str, source: str) -> str | None:
    if name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(('auto', *BACKENDS))}, got {name!r}")
    return name


# What was asked for: the last of the blocks that some thread is in, else the last call. One for the process,
# not for the thread: autograd runs a backward in threads of its own.
_blocks: list["use_backend"] = []
# A `with` is a call first, which is taken out again on entering; so each call is kept with the object that it
# made, and the one before it too, while that object exists. The environment is the first call.
_calls: list[tuple[str | None, Callable[[], "use_backend | None"]]] = [
    (_checked(os.environ.get("DDRF_FAST_BACKEND", "auto"), "DDRF_FAST_BACKEND"), lambda: None)
]
_forced = _calls[0][0]
_lock = threading.Lock()


class use_backend:
    """Makes every operation run on one backend: for good when called, for a block as a context manager.

    It holds for all threads. Where blocks of several overlap, the one that was entered last counts. A call
    replaces the one before, and counts outside of blocks.

    Args:
        name: "auto", "reference", "native", "triton" or "cuda". A backend that cannot run an operation then
            raises `BackendUnavailableError` with the reason instead of giving way to another. (`route` is
            plain torch under any name where something needs a gradient.)

    Raises:
        ValueError: `name` is none of these.

    Example:
        >>> import torch, ddrf_fast
        >>> x, weight, attention = torch.rand(1, 2, 5, 5), torch.rand(4, 3, 2, 3, 3), torch.full((1, 4), 0.25)
        >>> with ddrf_fast.use_backend("reference"):
        ...     tuple(ddrf_fast.dynamic_conv(x, weight, attention, padding=1).shape)
        (1, 3, 5, 5)
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "name")
        with _lock:
            # A call whose object is gone is for good, and replaces those before.
            del _calls[: max(i for i, (_, made) in enumerate(_calls) if made() is None)]
            _calls.append((self._name, weakref.ref(self)))
            self._apply()

    def __enter__(self) -> "use_backend":
        with _lock:
            _calls[:] = [call for call in _calls if call[1]() is not self]
            _blocks.append(self)
            self._apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            # The innermost, where a block is entered again within itself.
            del _blocks[max(i for i, block in enumerate(_blocks) if block is self)]
            self._apply()

    @staticmethod
    def _apply() -> None:
        global _forced
        _forced = _blocks[-1]._name if _blocks else _calls[-1][0]


def asked_for() -> str | None:
    """The backend that was asked for by name; None: each call takes the first that can run."""
    return _forced


def is_native_first() -> bool:
    """Whether the compiled kernels run what they can run on the CPU."""
    return _forced in (None, "native") and _native.status()["_C"][0]


def _device(args: tuple[Any, ...]) -> str:
    return args[0].device.type


def _triton_reason(op: str, args: tuple[Any, ...]) -> str | None:
    try:
        module = _module("triton", op)
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if _device(args) == "cpu":
        from triton import knobs

        if not knobs.runtime.interpret:
            return (
                "Triton runs on CPU tensors in its interpreter only (TRITON_INTERPRET=1 before Python starts)"
            )
    elif _device(args) != "cuda":
        return f"Triton kernels are for CUDA tensors, not for {_device(args)!r}"
    if not hasattr(module, op):
        return f"there is no Triton kernel for {op}"
    return module.unsupported(op, *args)


def unavailable(name: str, op: str, args: tuple[Any, ...]) -> str | None:
    """Why backend `name` cannot run the raw operator `op` on these arguments; None where it can."""
    device = _device(args)
    if name == "reference":
        return None
    if name == "native":
        if device != "cpu":
            return f"the C++ kernels are for CPU tensors, not for {device!r}"
        loaded, detail = _native.status()["_C"]
        return None if loaded else detail
    if name == "cuda":
        if _MODULE[op] != "degrade":
            return f"{op} has no CUDA C++ kernel; Triton runs it"
        if device != "cuda":
            return f"the CUDA C++ kernels are for CUDA tensors, not for {device!r}"
        loaded, detail = _native.status()["_C_cuda"]
        return None if loaded else detail
    return _triton_reason(op, args)


def _module(name: str, op: str) -> Any:
    """Where the reference or the Triton kernels of an operation are."""
    package = "reference" if name == "reference" else "kernels"
    return importlib.import_module(f"ddrf_fast.{package}.{_MODULE[op]}")


def _implementation(name: str, op: str) -> Callable[..., Any]:
    """The function of a backend that is called from Python; the native one is behind the dispatcher."""
    if name == "cuda":
        return getattr(torch.ops.ddrf_fast_native, op).default
    return getattr(_module(name, op), op)


def _choose(op: str, args: tuple[Any, ...]) -> tuple[str, dict[str, str]]:
    """The backend for these arguments, and why those before it were passed over."""
    if _forced is not None:
        reason = unavailable(_forced, op, args)
        if reason:
            raise BackendUnavailableError(f"{op}: backend {_forced!r} was asked for, but {reason}")
        return _forced, {}
    refused: dict[str, str] = {}
    for name in _ORDER.get(_device(args), ("reference",)):
        reason = unavailable(name, op, args)
        if reason is None:
            return name, refused
        refused[name] = reason
    raise AssertionError("the reference runs everywhere")


def run(op: str, *args: Any) -> Any:
    """Calls the raw operator `op`, on the backend asked for if there is one."""
    if _forced is not None:
        name, _ = _choose(op, args)
        # The others are reached through the dispatcher, so that tracing sees one operator.
        if name == "reference" or (name == "triton" and _device(args) == "cpu"):
            return _implementation(name, op)(*args)
    return getattr(torch.ops.ddrf_fast, op).default(*args)


def run_on_cuda(op: str, *args: Any) -> Any:
    """The CUDA implementation of a raw operator: the best backend that can run it."""
    name, _ = _choose(op, args)
    return _implementation(name, op)(*args)


@dataclass(frozen=True)
class Explanation:
    """What runs an operation, and why.

    Attributes:
        op: The operation.
        backend: What runs it.
        asked_for: Whether that backend was asked for by name.
        refused: The backends that come before it and cannot run, with the reason.
        plan: How it runs this shape, in words; empty where it does not tell.
    """

    op: str
    backend: str
    asked_for: bool
    refused: dict[str, str]
    plan: str = ""

    def __str__(self) -> str:
        why = "asked for by name" if self.asked_for else "the first that can run"
        lines = [f"{self.op}: {self.backend} ({why})"]
        lines += [f"  {self.plan}"] if self.plan else []
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def _plan(name: str, op: str, args: tuple[Any, ...]) -> str:
    """How a backend runs these arguments: its own words, or none."""
    if name in ("native", "cuda"):
        planner = f"{op.removesuffix('_mean')}_plan"
        if not hasattr(torch.ops.ddrf_fast_native, planner):
            return ""
        key = "CPU" if name == "native" else "CUDA"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ddrf_fast_native::{planner}", key):
            return ""
        return getattr(torch.ops.ddrf_fast_native, planner).default(*args)
    plan = getattr(_module(name, op), "plan", None)
    return "" if plan is None else plan(op, *args)


def explain_raw(op: str, args: tuple[Any, ...]) -> Explanation:
    """What would run the raw operator `op` on these arguments."""
    name, refused = _choose(op, args)
    return Explanation(op, name, _forced is not None, refused, _plan(name, op, args))
