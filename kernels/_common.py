"""What the Triton kernels share: the launch, the architecture that configurations are chosen by, and checks.

Importing a kernel module touches no GPU. A launch goes through `launch`, which selects the device of the
tensors (Triton itself launches on the current one) and lets `record` list launches without running them:
the compile tests get the exact signatures of real calls in this way.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True when TRITON_INTERPRET=1 was set at import: kernels run in Python, on CPU tensors."""

ARCHITECTURES = ("interpreter", "sm_80", "sm_90", "gfx942")
"""The keys of every configuration table: sm_80 stands for every NVIDIA GPU with about 100 KB of shared memory
a block (8.x, 12.x), sm_90 for 9.x and 10.x, gfx942 for AMD."""

MAX_INT32 = 2**31 - 1


class Launch(NamedTuple):
    """A launch that `record` caught: `kernel[(programs,)](*args, **options)`."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Recorder(NamedTuple):
    architecture: str
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def record(architecture: str) -> Iterator[list[Launch]]:
    """Collect the launches made inside, for `architecture`, instead of running them.

    Outputs stay uninitialised, so tensors on the `meta` device will do; not thread-safe.
    """
    global _recorder
    _recorder = _Recorder(architecture, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = None


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run `programs` programs of `kernel` on the device of its first argument, on the current stream."""
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, programs, args, options))
        return
    if programs > MAX_INT32:
        raise ValueError(
            f"{kernel.__name__} would need {programs} programs, more than a grid holds ({MAX_INT32})"
        )
    if programs == 0:
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **options)


def architecture(device: torch.device) -> str:
    """The key of `device` in the configuration tables, one of `ARCHITECTURES`."""
    if _recorder is not None:
        return _recorder.architecture
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def unsupported_tensor(name: str, tensor: torch.Tensor) -> str | None:
    """Why Triton kernels cannot take `tensor` (device, dtype), or None when they can."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{name} is {tensor.dtype}; the Triton kernels take float32, float16 and bfloat16"
    if INTERPRETED:
        return None
    if tensor.device.type != "cuda":
        return f"{name} is on {tensor.device}; Triton kernels need a GPU (or TRITON_INTERPRET=1)"
    if torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return f"{torch.cuda.get_device_name(tensor.device)} has a compute capability below 8.0"
    return None


def empty_like_format(
    like: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """An uninitialised tensor, channels_last where `like` is so and not contiguous too; by default of its
    dtype and on its device."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=device or like.device, memory_format=memory_format
    )


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least `n`, kept in [low, high]."""
    return max(low, min(high, triton.next_power_of_2(n)))
