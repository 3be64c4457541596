"""route: the attention of a dynamic convolution, from its input to the mixing weights, in one launch.

    pooled = mean of x over its pixels, or x itself where it is [B, C]; then code
    hidden = relu(pooled squeeze_weight^T + squeeze_bias), or pooled without squeeze_weight
    result = scale . normalization((hidden excite_weight^T + excite_bias) / temperature)

The router of Dynamic Convolution (Chen et al. 2020), which DDRF-Net uses, and, with one layer and a sigmoid,
that of CondConv (Yang et al. 2019). Step by step it is half a dozen launches that do next to nothing.

The raw operator is for inference. Where something may differentiate, the same in plain torch runs
(reference/route.py), which autograd knows.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddrf_fast.ops import _backend, _checks, _library, _native
from ddrf_fast.reference import route as reference
from ddrf_fast.reference._common import accumulation_dtype

SCHEMAS = (
    "route(Tensor x, Tensor? squeeze_weight, Tensor? squeeze_bias, Tensor excite_weight, "
    "Tensor? excite_bias, Tensor? code, Tensor? temperature, str normalization, float scale) -> Tensor",
)

Normalization = Literal["softmax", "sigmoid"]
_TENSORS = ("x", "squeeze_weight", "squeeze_bias", "excite_weight", "excite_bias", "code", "temperature")
_NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)


def _fake(
    x: Tensor, squeeze_weight: Tensor | None, squeeze_bias: Tensor | None, excite_weight: Tensor, *args: Any
) -> Tensor:
    return x.new_empty((x.shape[0], excite_weight.shape[0]))


def _autocast(args: Sequence[Any]) -> list[Any]:
    """Under autocast: the small tensors but the temperature in x's dtype, so that x is never copied."""
    x = args[0]
    if not _library.is_autocast_enabled(x.device.type):
        return list(args)
    cast = _TENSORS.index("temperature")
    return [a.to(x.dtype) if isinstance(a, Tensor) and i < cast else a for i, a in enumerate(args)]


def _per_sample(dims: Sequence[int | None]) -> set[int]:
    return {_TENSORS.index("x"), _TENSORS.index("code")}


_library.define(
    SCHEMAS[0],
    reference.route,
    _fake,
    autocast=_autocast,
    num_tensors=len(_TENSORS),
    per_sample=_per_sample,
)
_operator = torch.ops.ddrf_fast.route.default
_COMPILED = _native.status()["_C"][0]


def arguments(
    x: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    excite_weight: Tensor,
    excite_bias: Tensor | None,
    *,
    code: Tensor | None = None,
    temperature: float | Tensor | None = None,
    normalization: Normalization = "softmax",
    scale: float = 1.0,
) -> tuple[Any, ...]:
    """Checks the arguments of `route` and returns those of the raw operator."""
    _checks.tensor("x", x, ["[B, C, H, W]", "[B, C]"])
    x, squeeze_weight, squeeze_bias, excite_weight, excite_bias, code = _autocast(
        (x, squeeze_weight, squeeze_bias, excite_weight, excite_bias, code)
    )
    if x.dim() == 4 and (x.shape[2] < 1 or x.shape[3] < 1):
        raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
    batch, units = x.shape[:2]
    dims = "C"
    if code is not None:
        _checks.tensor("code", code, ["[B, D]"])
        units, dims = units + code.shape[1], "C + D"
    _checks.operand("code", code, (batch, units - x.shape[1]), "[B, D]", "x", x)
    if squeeze_weight is not None:
        _checks.tensor("squeeze_weight", squeeze_weight, [f"[hidden, {dims}]"])
        hidden = squeeze_weight.shape[0]
        _checks.operand("squeeze_weight", squeeze_weight, (hidden, units), f"[hidden, {dims}]", "x", x)
        _checks.operand("squeeze_bias", squeeze_bias, (hidden,), "[hidden]", "x", x)
        units, dims = hidden, "hidden"
    elif squeeze_bias is not None:
        raise ValueError("squeeze_bias needs squeeze_weight, got squeeze_weight=None")
    _checks.tensor("excite_weight", excite_weight, [f"[N, {dims}]"])
    num_kernels = excite_weight.shape[0]
    _checks.operand("excite_weight", excite_weight, (num_kernels, units), f"[N, {dims}]", "x", x)
    _checks.operand("excite_bias", excite_bias, (num_kernels,), "[N]", "x", x)
    if num_kernels < 1:
        raise ValueError("excite_weight must give at least one weight, got N = 0")
    if normalization not in _NORMALIZATIONS:
        raise ValueError(
            f"normalization must be {' or '.join(map(repr, _NORMALIZATIONS))}, got {normalization!r}"
        )
    tensors = x, squeeze_weight, squeeze_bias, excite_weight, excite_bias, code
    return *tensors, _temperature(temperature, x), normalization, _checks.number("scale", scale)


def _temperature(value: float | Tensor | None, x: Tensor) -> Tensor | None:
    """As a tensor without dimensions, so that another one compiles nothing again."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                "temperature must be a number or a floating tensor without dimensions, "
                f"got {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"temperature must be on the device of x, {x.device}, got {value.device}")
        return value
    number = _checks.number("temperature", value)
    if not number > 0:
        raise ValueError(f"temperature must be positive, got {value}")
    # Not new_full: torch.compile keeps a number free only where it meets a tensor in arithmetic.
    return x.new_ones((), dtype=accumulation_dtype(x.dtype)) * number


def _runs_compiled(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would take these to the compiled operator."""
    for t in tensors:
        if t is not None and not t.is_cpu:
            return False
    return _backend.asked_for() is None and not _library.needs_gradient(tensors)


def route(
    x: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    excite_weight: Tensor,
    excite_bias: Tensor | None,
    *,
    code: Tensor | None = None,
    temperature: float | Tensor | None = None,
    normalization: Normalization = "softmax",
    scale: float = 1.0,
) -> Tensor:
    r"""Attention over the kernels of a bank, computed from the input of a dynamic convolution.

    .. math::
        \pi = s \cdot \mathrm{norm}\bigl((\mathrm{ReLU}(C(\mathrm{GAP}(x), c) W_1^T + b_1) W_2^T + b_2) /
        \tau\bigr)

    The attention of Dynamic Convolution (arXiv:1912.03458) and of eq. 6 of the DDRF-Net paper; with
    ``squeeze_weight=None`` and ``normalization="sigmoid"`` that of CondConv (arXiv:1904.04971).
    Differentiable in every tensor, in reverse and forward mode, to any order.

    Args:
        x (Tensor[B, C, H, W] or Tensor[B, C]): Input of the convolution, or its mean over the pixels where
            that is known already: from ``dynamic_conv(..., return_mean=True)`` of the layer before.
        squeeze_weight (Tensor[hidden, C + D], optional): First layer; without it there is one layer only.
        squeeze_bias (Tensor[hidden], optional): Its bias.
        excite_weight (Tensor[N, hidden]): Last layer; [N, C + D] without a first one.
        excite_bias (Tensor[N], optional): Its bias.
        code (Tensor[B, D], optional): D more inputs, after x's channels.
        temperature: Divides the logits; a positive number, or a floating tensor without dimensions, whose
            value is not looked at (a buffer may change without a new compilation). None is 1.
        normalization: "softmax" or "sigmoid".
        scale: Multiplies the result: the 1/N of eq. 6.

    Returns:
        Tensor[B, N] with x's dtype.

    All tensors but the temperature are float32, float64, bfloat16 or float16 with x's dtype; sums run in
    float32 (float64 for float64). Under torch.autocast they are cast to x's dtype.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or an option does not fit; the message names it.

    Example:
        >>> import torch, ddrf_fast
        >>> x, first, last = torch.rand(2, 8, 32, 32), torch.rand(16, 8), torch.rand(4, 16)
        >>> attention = ddrf_fast.route(x, first, None, last, None, temperature=30.0)
        >>> attention.shape, attention.sum(dim=1).round(decimals=4)
        (torch.Size([2, 4]), tensor([1., 1.]))
    """
    if _COMPILED and type(x) is Tensor and not torch.compiler.is_compiling():
        # The compiled operator checks everything itself, at a fraction of the cost. What it refuses, and
        # whatever else is not usual, comes to the checks below, which find the words.
        divisor: Any = temperature
        if type(divisor) in (float, int) and divisor > 0:
            divisor = torch.scalar_tensor(divisor, dtype=torch.float64)
        tensors = x, squeeze_weight, squeeze_bias, excite_weight, excite_bias, code, divisor
        try:
            if type(scale) is float and _runs_compiled(tensors):
                return _operator(*tensors, normalization, scale)
        except (AttributeError, RuntimeError, TypeError):
            pass
    args = arguments(
        x,
        squeeze_weight,
        squeeze_bias,
        excite_weight,
        excite_bias,
        code=code,
        temperature=temperature,
        normalization=normalization,
        scale=scale,
    )
    if _library.needs_gradient(args[: len(_TENSORS)]):
        return reference.route(*args)
    return _backend.run("route", *args)
