"""The operations. Importing this registers them with torch, e.g. before an exported program is loaded."""

from ddrf_fast.ops._backend import BackendUnavailableError, Explanation, use_backend
from ddrf_fast.ops.degrade import degrade
from ddrf_fast.ops.degrade_adjoint import degrade_adjoint
from ddrf_fast.ops.dynamic_conv import dynamic_conv
from ddrf_fast.ops.explain import explain
from ddrf_fast.ops.route import route
from ddrf_fast.ops.sample_conv2d import sample_conv2d

__all__ = [
    "BackendUnavailableError",
    "Explanation",
    "degrade",
    "degrade_adjoint",
    "dynamic_conv",
    "explain",
    "route",
    "sample_conv2d",
    "use_backend",
]
