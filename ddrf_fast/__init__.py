"""Custom kernels for dynamic convolution and dynamic degradation, and DDRF-Net built on them.

    ddrf_fast.dynamic_conv(x, weight, attention)       a kernel for each sample, mixed from a bank
    ddrf_fast.route(x, w1, b1, w2, b2)                 the attention that mixes it
    ddrf_fast.degrade(image, kernels, weights, ...)    spatially-varying blur, down-sampling and noise
    ddrf_fast.degrade_adjoint(y, kernels, weights)     its transpose, for plug-and-play and unrolled methods
    ddrf_fast.fuse(visible, infrared)                  an infrared and a visible image, fused
    ddrf_fast.restore(visible, infrared)               either of them, or both, restored

Names are loaded when they are first used, so `import ddrf_fast` itself costs nothing: no torch, no triton, no
GPU.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ddrf_fast._version import __version__

if TYPE_CHECKING:
    from ddrf_fast.inference import Fuser, Restorer, fuse, restore
    from ddrf_fast.models import DDRFNet
    from ddrf_fast.ops import (
        BackendUnavailableError,
        Explanation,
        degrade,
        degrade_adjoint,
        dynamic_conv,
        explain,
        route,
        sample_conv2d,
        use_backend,
    )

_HOME = {
    "BackendUnavailableError": "ddrf_fast.ops",
    "DDRFNet": "ddrf_fast.models",
    "Explanation": "ddrf_fast.ops",
    "Fuser": "ddrf_fast.inference",
    "Restorer": "ddrf_fast.inference",
    "degrade": "ddrf_fast.ops",
    "degrade_adjoint": "ddrf_fast.ops",
    "dynamic_conv": "ddrf_fast.ops",
    "explain": "ddrf_fast.ops",
    "fuse": "ddrf_fast.inference",
    "restore": "ddrf_fast.inference",
    "route": "ddrf_fast.ops",
    "sample_conv2d": "ddrf_fast.ops",
    "use_backend": "ddrf_fast.ops",
}

__all__ = [
    "BackendUnavailableError",
    "DDRFNet",
    "Explanation",
    "Fuser",
    "Restorer",
    "__version__",
    "degrade",
    "degrade_adjoint",
    "dynamic_conv",
    "explain",
    "fuse",
    "restore",
    "route",
    "sample_conv2d",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        # Kept, so that it is found without this function from now on.
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
        return value
    try:
        return importlib.import_module(f"ddrf_fast.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"ddrf_fast.{name}":
            raise
        raise AttributeError(f"module 'ddrf_fast' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
