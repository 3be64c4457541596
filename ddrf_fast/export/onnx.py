"""The operators of this package in standard ONNX operators; needs onnx and onnxscript.

ONNX has no convolution with a kernel for each sample of a batch whose size is free: the `group` of `Conv` is
a constant. So `Scan` goes over the batch, with one `Conv` for a sample in it: as many multiplications as the
operator itself, nothing as large as an unfolded image, and any batch size.

Translations have the arguments of the raw operators; torch.onnx reads from the annotations which of them are
tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript import opset20 as op
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat

import ddrf_fast.ops  # noqa: F401  defines the operators
from ddrf_fast.reference.dynamic_conv import LEAKY_SLOPE

_ELEMENT = {
    onnx_ir.DataType.FLOAT: "float",
    onnx_ir.DataType.FLOAT16: "float16",
    onnx_ir.DataType.BFLOAT16: "bfloat16",
    onnx_ir.DataType.DOUBLE: "double",
}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx writes `dynamic_conv`, `sample_conv2d` and `route`, in any model that calls them.

    Returns:
        The ``custom_translation_table`` of ``torch.onnx.export(model, ..., dynamo=True)``. The model is to be
        exported under ``torch.no_grad()``.

    Example:
        >>> from ddrf_fast.nn import DynamicConv2d
        >>> layer, x = DynamicConv2d(3, 8, 3).eval(), torch.rand(2, 3, 16, 16)
        >>> with torch.no_grad():
        ...     program = torch.onnx.export(
        ...         layer,
        ...         (x,),
        ...         dynamic_shapes=({0: torch.export.Dim("batch")},),
        ...         custom_translation_table=translations(),
        ...         dynamo=True,
        ...         verbose=False,
        ...     )
        >>> "Scan" in {node.op_type for node in program.model.graph}
        True
    """
    operators = torch.ops.ddrf_fast
    return {
        operators.dynamic_conv.default: _dynamic_conv,
        operators.dynamic_conv_mean.default: _dynamic_conv_mean,
        operators.route.default: _route,
    }


def _dynamic_conv(
    x: TFloat,
    weight: TFloat,
    attention: TFloat | None,
    bias: TFloat | None,
    code: TFloat | None,
    in_scale: TFloat | None,
    out_scale: TFloat | None,
    tap_scale: TFloat | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> TFloat:
    channels = x.shape[1]
    mixed = _mix(weight, attention)
    # Scales may be float32 beside half precision.
    in_scale, out_scale, tap_scale = (
        None if scale is None else op.CastLike(scale, x) for scale in (in_scale, out_scale, tap_scale)
    )
    if in_scale is not None:
        x = op.Mul(x, _unsqueeze(in_scale, 2, 3))
    if out_scale is not None:
        mixed = op.Mul(mixed, _unsqueeze(out_scale, 2, 3, 4))
    if tap_scale is not None:
        mixed = op.Mul(mixed, _unsqueeze(tap_scale, 1, 2))
    if code is not None:
        # Its channels are constant over the image: together they are one channel of ones, with the kernel
        # that is the sum of theirs, each times its code.
        own, others = _slice(mixed, 2, 0, channels), _slice(mixed, 2, channels, weight.shape[2])
        summed = op.ReduceSum(op.Mul(others, _unsqueeze(code, 1, 3, 4)), _ints(2), keepdims=1)
        mixed = op.Concat(own, summed, axis=2)
        one = op.CastLike(op.Constant(value_float=1.0), x)
        x = op.Concat(x, op.Expand(one, op.Shape(_slice(x, 1, 0, 1))), axis=1)
    scanned = [x, mixed] if bias is None else [x, mixed, _mix(bias, attention)]
    body = _convolution_of_a_sample(weight, bias is not None, stride, padding, dilation, groups)
    y = op.Scan(*scanned, body=body, num_scan_inputs=len(scanned))
    if activation == "relu":
        return op.Relu(y)
    return op.LeakyRelu(y, alpha=LEAKY_SLOPE) if activation == "leaky_relu" else y


def _dynamic_conv_mean(
    x: TFloat,
    weight: TFloat,
    attention: TFloat | None,
    bias: TFloat | None,
    code: TFloat | None,
    in_scale: TFloat | None,
    out_scale: TFloat | None,
    tap_scale: TFloat | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> tuple[TFloat, TFloat]:
    tensors = x, weight, attention, bias, code, in_scale, out_scale, tap_scale
    y = _dynamic_conv(*tensors, stride, padding, dilation, groups, activation)
    return y, op.ReduceMean(y, _ints(2, 3), keepdims=0)


def _route(
    x: TFloat,
    squeeze_weight: TFloat | None,
    squeeze_bias: TFloat | None,
    excite_weight: TFloat,
    excite_bias: TFloat | None,
    code: TFloat | None,
    temperature: TFloat | None,
    normalization: str,
    scale: float,
) -> TFloat:
    hidden = op.ReduceMean(x, _ints(2, 3), keepdims=0) if len(x.shape) == 4 else x
    if code is not None:
        hidden = op.Concat(hidden, code, axis=1)
    if squeeze_weight is not None:
        hidden = op.Relu(op.Gemm(hidden, squeeze_weight, squeeze_bias, transB=1))
    logits = op.Gemm(hidden, excite_weight, excite_bias, transB=1)
    if temperature is not None:
        logits = op.Div(logits, op.CastLike(temperature, logits))
    attention = op.Softmax(logits, axis=1) if normalization == "softmax" else op.Sigmoid(logits)
    return op.Mul(attention, op.CastLike(op.Constant(value_float=scale), attention))


def _mix(bank: TFloat, attention: TFloat | None) -> TFloat:
    """sum_k attention[b, k(, o)] bank[k, o, ...] -> [B, O, ...]."""
    if attention is None:
        return bank
    weights = "bno" if len(attention.shape) == 3 else "bn"
    rest = "ikl"[: len(bank.shape) - 2]
    return op.Einsum(attention, bank, equation=f"{weights},no{rest}->bo{rest}")


def _convolution_of_a_sample(
    weight: TFloat,
    has_bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> onnx_ir.Graph:
    """The body of the scan: x [C, H, W], kernel [O, I, kh, kw] and bias [O] -> y [O, H', W']."""

    def numbers(values: Sequence[int]) -> str:
        return f"[{', '.join(map(str, values))}]"

    # Sizes without names: a name would stand for the same size in every scan of a model.
    element = _ELEMENT[weight.dtype]
    bias, use = (f", {element}[?] bias", ", bias") if has_bias else ("", "")
    text = f"""
        sample ({element}[?,?,?] x, {element}[?,?,?,?] kernel{bias}) => ({element}[?,?,?] y) {{
            axis = Constant <value_ints = [0]> ()
            batch = Unsqueeze (x, axis)
            convolved = Conv <
                strides = {numbers(stride)}, pads = {numbers([*padding, *padding])},
                dilations = {numbers(dilation)}, group = {groups}
            > (batch, kernel{use})
            y = Squeeze (convolved, axis)
        }}"""
    return onnx_ir.from_proto(onnx.parser.parse_graph(text))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _unsqueeze(x: TFloat, *axes: int) -> TFloat:
    return op.Unsqueeze(x, _ints(*axes))


def _slice(x: TFloat, axis: int, start: int, stop: int) -> TFloat:
    return op.Slice(x, _ints(start), _ints(stop), _ints(axis))
