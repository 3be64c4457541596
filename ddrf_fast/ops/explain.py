"""explain: which backend runs an operation, and why."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ddrf_fast.ops._backend import Explanation, explain_raw
from ddrf_fast.ops._library import needs_gradient
from ddrf_fast.ops.degrade import arguments as degrade_arguments
from ddrf_fast.ops.degrade_adjoint import arguments as degrade_adjoint_arguments
from ddrf_fast.ops.dynamic_conv import arguments as dynamic_conv_arguments
from ddrf_fast.ops.route import arguments as route_arguments
from ddrf_fast.ops.sample_conv2d import arguments as sample_conv2d_arguments
from ddrf_fast.reference import route as route_reference

# Public name -> (the check that makes the raw operator's arguments, the raw operator).
_OPERATIONS: dict[str, tuple[Callable[..., tuple[Any, ...]], str]] = {
    "dynamic_conv": (dynamic_conv_arguments, "dynamic_conv"),
    "sample_conv2d": (sample_conv2d_arguments, "dynamic_conv"),
    "degrade": (degrade_arguments, "degrade"),
    "degrade_adjoint": (degrade_adjoint_arguments, "degrade_backward"),
    "route": (route_arguments, "route"),
}


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells which backend would run an operation on these arguments, and why the others would not.

    Args:
        op: The operation, by name or as the function: "dynamic_conv", "sample_conv2d", "degrade",
            "degrade_adjoint" or "route".
        *args: As for the operation.
        **kwargs: As for the operation.

    Returns:
        An `Explanation`; printed, it reads as a sentence for the choice, a line on how that backend runs
        this shape where it tells, and a line for each backend passed over.

    Raises:
        ValueError: There is no such operation, or its arguments are wrong.
        TypeError: As the operation.
        BackendUnavailableError: A backend was asked for by name and cannot run this.

    Example:
        >>> import torch, ddrf_fast
        >>> x, weight = torch.rand(1, 2, 5, 5), torch.rand(1, 3, 2, 3, 3)
        >>> with ddrf_fast.use_backend("reference"):
        ...     print(ddrf_fast.explain("sample_conv2d", x, weight))
        sample_conv2d: reference (asked for by name)
          unfolded patches, and a matrix product for each sample and group
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPERATIONS:
        raise ValueError(f"op must be one of {', '.join(_OPERATIONS)}, got {name!r}")
    arguments, raw = _OPERATIONS[name]
    if name == "dynamic_conv" and kwargs.pop("return_mean", False):
        raw = "dynamic_conv_mean"
    checked = arguments(*args, **kwargs)
    found = explain_raw(raw, checked)
    tensors = [value for value in checked if isinstance(value, Tensor)]
    if name == "route" and found.backend != "reference" and needs_gradient(tensors):
        refused = {**found.refused, found.backend: "its gradient is that of plain torch"}
        return Explanation(name, "reference", False, refused, route_reference.plan(name, *checked))
    return replace(found, op=name)
