"""dynamic_conv: a convolution whose kernel is mixed for each sample from a bank, by attention.

    W_b = out_scale_b . in_scale_b . tap_scale_b . sum_k attention[b, k] weight[k]
    y_b = act(conv2d(cat(x_b, code_b), W_b) + sum_k attention[b, k] bias[k])

Eq. 6 of the DDRF-Net paper (without its 1/N, which belongs into the attention); CondConv (Yang et al. 2019),
Dynamic Convolution (Chen et al. 2020), DyNet (Zhang et al. 2020), ODConv (Li et al. 2022) and StyleGAN's
modulated convolution are special cases. The same raw operator, with attention=None, takes kernels that are
per sample already: sample_conv2d.

Saved for the backward: the tensors as they came, and y where an activation needs its sign. Mixed kernels are
never saved.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from ddrf_fast.ops import _backend, _checks, _library
from ddrf_fast.reference import dynamic_conv as reference
from ddrf_fast.reference._common import accumulation_dtype, in_layout_of

SCHEMAS = (
    "dynamic_conv(Tensor x, Tensor weight, Tensor? attention, Tensor? bias, Tensor? code, Tensor? in_scale, "
    "Tensor? out_scale, Tensor? tap_scale, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, str activation) -> Tensor",
    "dynamic_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? attention, Tensor? bias, "
    "Tensor? code, Tensor? in_scale, Tensor? out_scale, Tensor? tap_scale, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, int output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "dynamic_conv_mean(Tensor x, Tensor weight, Tensor? attention, Tensor? bias, Tensor? code, "
    "Tensor? in_scale, Tensor? out_scale, Tensor? tap_scale, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, SymInt groups, str activation) -> (Tensor, Tensor)",
)
# How the compiled CPU kernels run a shape, in words; for `explain`.
_PLAN_SCHEMA = SCHEMAS[0].replace("dynamic_conv(", "dynamic_conv_plan(").replace("-> Tensor", "-> str")

# Of the compiled CPU kernels, behind `dynamic_conv_into`.
_INTO_SCHEMA = (
    "dynamic_conv_into(Tensor(a!) y, bool accumulate, Tensor x, Tensor weight, Tensor attention, "
    "Tensor? bias, Tensor? code, int[2] stride, int[2] padding, str activation) -> Tensor"
)

Activation = Literal["relu", "leaky_relu"]
Size = int | Sequence[int]
_TENSORS = ("x", "weight", "attention", "bias", "code", "in_scale", "out_scale", "tap_scale")
_ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    stride, padding, dilation = args[6:9]
    height, width = reference.output_size(x, weight.shape[3:], stride, padding, dilation)
    return _library.layout_of(x, (x.shape[0], weight.shape[1], height, width))


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _library.fake_gradients(args[: len(_TENSORS)], args[-1])


def _mean(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Where a device has a kernel for dynamic_conv and none that makes the mean along the way."""
    y = torch.ops.ddrf_fast.dynamic_conv.default(x, *args)
    return y, reference.spatial_mean(y)


def _fake_mean(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake(x, weight, *args), x.new_empty((x.shape[0], weight.shape[1]))


def _autocast(args: Sequence[Any], first: int = 0) -> Sequence[Any]:
    """Under autocast: in its dtype, but scales in float32 as they come. The tensors begin at `first`."""
    cast = _library.autocast_to_lower(args)
    if cast is args:
        return args
    scales = range(first + _TENSORS.index("in_scale"), first + len(_TENSORS))
    wide = [i for i in scales if args[i] is not None and args[i].dtype == torch.float32]
    return [args[i] if i in wide else a for i, a in enumerate(cast)]


def _per_sample(dims: Sequence[int | None]) -> set[int]:
    shared = (
        set() if dims[2] is None else {1, 3}
    )  # the bank and its biases; without attention each sample has its own
    return set(range(len(_TENSORS))) - shared


def _negative_slope(rest: Sequence[Any]) -> float | None:
    # reference.LEAKY_SLOPE as a literal: with dynamic=True torch.compile makes another module's float an
    # input of the graph, and the graph of a Function's backward cannot take it.
    return {"none": None, "relu": 0.0, "leaky_relu": 0.01}[rest[-1]]


for _schema, _reference, _fake_of, _first in (
    (SCHEMAS[0], reference.dynamic_conv, _fake, 0),
    (SCHEMAS[1], reference.dynamic_conv_backward, _fake_backward, 1),
    (SCHEMAS[2], _mean, _fake_mean, 0),
):
    _library.define(
        _schema,
        _reference,
        _fake_of,
        autocast=functools.partial(_autocast, first=_first),
        num_tensors=len(_TENSORS),
        per_sample=_per_sample,
    )

_library.define_native(_PLAN_SCHEMA)
_library.define_native(_INTO_SCHEMA)

call, _ = _library.differentiable(
    "dynamic_conv",
    len(_TENSORS),
    reference.dynamic_conv,
    reference.dynamic_conv_backward,
    backward_arguments=lambda rest: tuple(rest[:-1]),
    negative_slope=_negative_slope,
)


def unchecked(
    tensors: Sequence[Any],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any,
    return_mean: bool = False,
) -> Any:
    """The convolution in the usual case, without the checks of `arguments`; None in any other.

    They would take longer than a small convolution. The compiled kernels check the tensors too, if not in the
    caller's words: where something is refused, `arguments` is to be asked why.
    """
    if not (
        type(tensors[0]) is Tensor
        and type(groups) is int
        and not isinstance(padding, str)
        and (activation is None or activation in _ACTIVATIONS)
        and _library.reaches_native(tensors)
        and not (return_mean and _library.needs_gradient(tensors))
    ):
        return None
    try:
        geometry = convolution_geometry((), stride, padding, dilation)
        args = (*tensors, *geometry, groups, activation or "none")
        if return_mean:
            return torch.ops.ddrf_fast.dynamic_conv_mean.default(*args)
        # Without gradients nothing is left of `call`.
        return call(*args) if torch.is_grad_enabled() else torch.ops.ddrf_fast.dynamic_conv.default(*args)
    except (RuntimeError, TypeError, ValueError):
        return None


def convolution_geometry(
    kernel: Sequence[int], stride: Size, padding: Size | str, dilation: Size
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(stride, padding, dilation) as pairs, for a kernel of (kh, kw).

    The strings "same" and "valid" are resolved as torch does, but that both ends are padded alike: where
    "same" wants an odd number of zeros, there is one too many at the top or left (`without_excess`).

    Raises:
        TypeError: One of them is neither an int nor two ints.
        ValueError: A value is out of range, or "same" comes with a stride.
    """
    strides, dilations = _checks.pair("stride", stride, 1), _checks.pair("dilation", dilation, 1)
    if padding == "valid":
        return strides, (0, 0), dilations
    if padding == "same":
        if strides != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, got {strides}')
        height, width = (d * (k - 1) for d, k in zip(dilations, kernel, strict=True))
        return strides, ((height + 1) // 2, (width + 1) // 2), dilations
    if isinstance(padding, str):
        raise ValueError(f'padding must be an int, two ints, "same" or "valid", got {padding!r}')
    return strides, _checks.pair("padding", padding, 0), dilations


def without_excess(y: Tensor, x: Tensor, padding: Size | str) -> Tensor:
    """The convolution of x without the first row and column, where padding="same" made one too many.

    Cutting y rather than padding x leaves a code zero beyond the image.
    """
    if padding != "same" or y.shape[2:] == x.shape[2:]:
        return y
    return in_layout_of(x, y[:, :, y.shape[2] - x.shape[2] :, y.shape[3] - x.shape[3] :])


def check_convolution(
    x: Tensor,
    weight: Tensor,
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    groups: int,
    code_channels: int,
    activation: str | None,
) -> None:
    """What x, weight [*, O, I/g, kh, kw] and the options must fulfil together."""
    _checks.integer("groups", groups, 1)
    in_channels, (_, out_channels, per_group, *kernel) = x.shape[1], weight.shape
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups must divide the {in_channels} input and the {out_channels} output channels, got {groups}"
        )
    if code_channels and groups != 1:
        raise ValueError(f"code needs groups=1, got groups={groups}")
    if per_group * groups != in_channels + code_channels:
        extra = f" and code {code_channels}" if code_channels else ""
        raise ValueError(
            f"weight expects {per_group * groups} input channels (shape {tuple(weight.shape)}, "
            f"groups={groups}), but x has {in_channels}{extra}"
        )
    if min(out_channels, per_group, *kernel) < 1:
        raise ValueError(
            f"weight must have no empty dimension but the batch's, got shape {tuple(weight.shape)}"
        )
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be None, {' or '.join(map(repr, _ACTIVATIONS))}, got {activation!r}"
        )
    height, width = reference.output_size(x, kernel, *geometry)
    if height < 1 or width < 1:
        raise ValueError(
            f"the kernel {tuple(kernel)} with dilation {geometry[2]} does not fit into x of "
            f"{tuple(x.shape[2:])} with padding {geometry[1]}"
        )


def arguments(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    code: Tensor | None = None,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    tap_scale: Tensor | None = None,
    activation: Activation | None = None,
) -> tuple[Any, ...]:
    """Checks the arguments of `dynamic_conv` and returns those of the raw operator."""
    _checks.tensor("x", x, ["[B, I, H, W]"])
    _checks.tensor("weight", weight, ["[N, O, I/g, kh, kw]"])
    _checks.tensor("attention", attention, ["[B, N]", "[B, N, O]"])
    x, weight, attention, bias, code, in_scale, out_scale, tap_scale = _autocast(
        (x, weight, attention, bias, code, in_scale, out_scale, tap_scale)
    )
    _checks.like("weight", weight, "x", x)
    batch, in_channels, _, _ = x.shape
    num_kernels, out_channels, _, *kernel = weight.shape
    per_channel = attention.dim() == 3
    sizes: tuple[int, ...] = (batch, num_kernels, out_channels) if per_channel else (batch, num_kernels)
    _checks.operand("attention", attention, sizes, "[B, N, O]" if per_channel else "[B, N]", "x", x)
    _checks.operand("bias", bias, (num_kernels, out_channels), "[N, O]", "x", x)
    if code is not None:
        _checks.tensor("code", code, ["[B, D]"])
        _checks.operand("code", code, (batch, code.shape[1]), "[B, D]", "x", x)
    wide = accumulation_dtype(x.dtype)
    _checks.operand("in_scale", in_scale, (batch, in_channels), "[B, I]", "x", x, wide)
    _checks.operand("out_scale", out_scale, (batch, out_channels), "[B, O]", "x", x, wide)
    _checks.operand("tap_scale", tap_scale, (batch, *kernel), "[B, kh, kw]", "x", x, wide)
    if num_kernels < 1:
        raise ValueError("weight must hold at least one kernel, got N = 0")

    geometry = convolution_geometry(kernel, stride, padding, dilation)
    check_convolution(x, weight, geometry, groups, 0 if code is None else code.shape[1], activation)
    tensors = (x, weight, attention, bias, code, in_scale, out_scale, tap_scale)
    return *tensors, *geometry, groups, activation or "none"


@overload
def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = ...,
    *,
    stride: Size = ...,
    padding: Size | str = ...,
    dilation: Size = ...,
    groups: int = ...,
    code: Tensor | None = ...,
    in_scale: Tensor | None = ...,
    out_scale: Tensor | None = ...,
    tap_scale: Tensor | None = ...,
    activation: Activation | None = ...,
    return_mean: Literal[False] = ...,
) -> Tensor: ...


@overload
def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = ...,
    *,
    stride: Size = ...,
    padding: Size | str = ...,
    dilation: Size = ...,
    groups: int = ...,
    code: Tensor | None = ...,
    in_scale: Tensor | None = ...,
    out_scale: Tensor | None = ...,
    tap_scale: Tensor | None = ...,
    activation: Activation | None = ...,
    return_mean: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def dynamic_conv(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    code: Tensor | None = None,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    tap_scale: Tensor | None = None,
    activation: Activation | None = None,
    return_mean: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Convolves each sample with its own kernel, mixed from a bank by attention.

    .. math::
        W_b = \sum_k \pi_{bk} W_k, \quad \beta_b = \sum_k \pi_{bk} \beta_k, \quad y_b = \mathrm{act}(W_b * x_b
        + \beta_b)

    Eq. 6 of the DDRF-Net paper; CondConv (arXiv:1904.04971) and Dynamic Convolution (arXiv:1912.03458)
    compute the same. Like torch.nn.functional.conv2d it is a correlation. Differentiable in every tensor, in
    reverse and forward mode, to any order.

    Args:
        x (Tensor[B, I, H, W]): Input, in NCHW or channels_last; the output keeps that layout.
        weight (Tensor[N, O, I/g, kh, kw]): The bank of N kernels; with `code`, of I + D input channels.
        attention (Tensor[B, N] or Tensor[B, N, O]): Mixing weights, for each sample or for each of its output
            channels (DyNet). Nothing is assumed of their sign or their sum.
        bias (Tensor[N, O], optional): Biases of the bank, mixed by the same attention.
        stride: One int or two, at least 1.
        padding: One int or two (zeros), "same" or "valid" as in torch.nn.functional.conv2d.
        dilation: One int or two, at least 1.
        groups: Divides I and O.
        code (Tensor[B, D], optional): D more input channels after x's, constant over the image and
            zero-padded like the others (the paper's stretched degradation kernel). They are never
            materialised. Needs groups=1.
        in_scale (Tensor[B, I], optional): Multiplies the mixed kernel per input channel of x (ODConv,
            StyleGAN).
        out_scale (Tensor[B, O], optional): Multiplies the mixed kernel, not the bias, per output channel.
        tap_scale (Tensor[B, kh, kw], optional): Multiplies the mixed kernel per tap (ODConv).
        activation: None, "relu" or "leaky_relu" (slope 0.01), applied last.
        return_mean: Return the mean of the output over its pixels, too: what the router of the next dynamic
            layer pools (`route`). Without gradients it is made along the way.

    Returns:
        Tensor[B, O, H', W'] with x's dtype and layout; H' = floor((H + 2 padding - dilation (kh - 1) - 1) /
        stride) + 1. With `return_mean` a pair: that, and its mean Tensor[B, O].

    All tensors are float32, float64, bfloat16 or float16 with x's dtype; sums run in float32 (float64 for
    float64), and the mixed kernel is rounded once, with its scales. Beside bfloat16 and float16 the scales
    may be float32, and are then not rounded themselves. Under torch.autocast all but scales in float32 are
    cast to its dtype. On CPUs a 3x3 kernel may be applied by Winograd's transform (:func:`explain` tells),
    whose rounding is relative to the largest number that a tile of 4x4 outputs reads.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or an option does not fit; the message names it.

    Example:
        >>> import torch, ddrf_fast
        >>> x, weight = torch.rand(2, 8, 32, 32), torch.rand(4, 16, 8, 3, 3)
        >>> attention = torch.softmax(torch.rand(2, 4), dim=1)
        >>> ddrf_fast.dynamic_conv(x, weight, attention, padding=1, activation="relu").shape
        torch.Size([2, 16, 32, 32])
    """
    # Without attention the raw operator takes kernels that are per sample.
    if attention is not None:
        tensors = (x, weight, attention, bias, code, in_scale, out_scale, tap_scale)
        result = unchecked(tensors, stride, padding, dilation, groups, activation, return_mean)
        if result is not None:
            return result
    args = arguments(
        x,
        weight,
        attention,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        code=code,
        in_scale=in_scale,
        out_scale=out_scale,
        tap_scale=tap_scale,
        activation=activation,
    )
    if not return_mean:
        return without_excess(call(*args), x, padding)
    if _library.needs_gradient(args[: len(_TENSORS)]):
        y = without_excess(call(*args), x, padding)
        return y, reference.spatial_mean(y)
    y, mean = _backend.run("dynamic_conv_mean", *args)
    cut = without_excess(y, x, padding)
    return (y, mean) if cut is y else (cut, reference.spatial_mean(cut))


def dynamic_conv_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor,
    code: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    activation: Activation | None,
    accumulate: bool = False,
) -> Tensor:
    """:func:`dynamic_conv` into memory of the caller's, for inference; nothing is differentiated.

    Args:
        y: Tensor[B, O, H', W'], may be some channels of a larger tensor; the result is written there, or
            with ``accumulate`` added to what is there. x must not lie in the same memory.

    Returns:
        The mean of the convolution over its pixels, Tensor[B, O].
    """
    if x.is_cpu and _backend.is_native_first():
        return torch.ops.ddrf_fast_native.dynamic_conv_into.default(
            y, accumulate, x, weight, attention, bias, code, stride, padding, activation or "none"
        )
    result, mean = dynamic_conv(
        x,
        weight,
        attention,
        bias,
        stride=stride,
        padding=padding,
        code=code,
        activation=activation,
        return_mean=True,
    )
    y.add_(result) if accumulate else y.copy_(result)
    return mean
