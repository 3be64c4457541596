"""How dynamic convolution is computed without ddrf_fast. All of these mix the kernels too.

    grouped   the common trick: mix, fold the batch into the channels, one convolution with groups = B
    loop      mix, one convolution for each sample
    combine   convolve with every kernel of the bank, mix the results: N times the work, but dense
    bmm       1x1 only: mix, one batched matrix product
    upcast    grouped, computed in float32: on CPUs the low precisions are not always the fast ones

The layout in a name is that of the input and of the bank, which are handed over in it for nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Case, Inputs, Provider, Run, Setting

Formula = Callable[[Case, Inputs, Tensor], Tensor]


def mixed_kernels(t: Inputs) -> tuple[Tensor, Tensor | None]:
    """W_b [B, O, I, kh, kw], each in the layout of the bank's, and β_b [B, O] (or None)."""
    weight, attention, bias = t["weight"], t["attention"], t.get("bias")
    if weight.is_contiguous():
        kernels = (attention @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    else:
        channels_last = weight.movedim(2, -1)
        kernels = (attention @ channels_last.flatten(1)).unflatten(1, channels_last.shape[1:]).movedim(-1, 2)
    return kernels, None if bias is None else attention @ bias


def with_code(t: Inputs, x: Tensor) -> Tensor:
    """x and, after it, the code stretched over the image: what ddrf_fast never materialises."""
    if "code" not in t:
        return x
    stretched = t["code"][:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat((x, stretched), dim=1)


def grouped_nchw(case: Case, t: Inputs, x: Tensor) -> Tensor:
    kernels, bias = mixed_kernels(t)
    batch, _, height, width = x.shape
    y = F.conv2d(
        x.reshape(1, -1, height, width),
        kernels.flatten(0, 1),
        None if bias is None else bias.flatten(),
        case.stride,
        case.padding,
        groups=batch * case.groups,
    )
    return y.view(batch, -1, *y.shape[2:])


def grouped_channels_last(case: Case, t: Inputs, x: Tensor) -> Tensor:
    """Pixels first throughout: samples become groups by moving the batch beside the channels."""
    kernels, bias = mixed_kernels(t)
    batch = x.shape[0]
    folded = x.permute(2, 3, 0, 1).flatten(2)[None].permute(0, 3, 1, 2)
    y = F.conv2d(
        folded,
        kernels.flatten(0, 1).contiguous(memory_format=torch.channels_last),
        None if bias is None else bias.flatten(),
        case.stride,
        case.padding,
        groups=batch * case.groups,
    )
    return y.unflatten(1, (batch, -1))[0]


def loop(case: Case, t: Inputs, x: Tensor) -> Tensor:
    kernels, bias = mixed_kernels(t)
    return torch.cat(
        [
            F.conv2d(
                x[b : b + 1],
                kernels[b],
                None if bias is None else bias[b],
                case.stride,
                case.padding,
                groups=case.groups,
            )
            for b in range(x.shape[0])
        ]
    )


def combine(case: Case, t: Inputs, x: Tensor) -> Tensor:
    weight, attention, bias = t["weight"], t["attention"], t.get("bias")
    count = weight.shape[0]
    # Groups are outermost in a convolution's output channels: [g, N, O/g].
    bank = weight.unflatten(1, (case.groups, -1)).transpose(0, 1).reshape(-1, *weight.shape[2:])
    y = F.conv2d(x, bank, None, case.stride, case.padding, groups=case.groups)
    if count == 1:
        y = y * attention[:, :, None, None]
    elif y.is_contiguous():
        y = y.unflatten(1, (case.groups, count, -1))
        y = torch.einsum("bn,bgnohw->bgohw", attention, y).flatten(1, 2)
    else:
        y = y.unflatten(1, (case.groups, count, -1))
        y = (y * attention[:, None, :, None, None, None]).sum(dim=2).flatten(1, 2)
    return y if bias is None else y + (attention @ bias)[:, :, None, None]


def bmm_nchw(case: Case, t: Inputs, x: Tensor) -> Tensor:
    kernels, bias = mixed_kernels(t)
    x = x[:, :, :: case.stride, :: case.stride]
    matrix, pixels = kernels.flatten(2), x.flatten(2)
    y = torch.bmm(matrix, pixels) if bias is None else torch.baddbmm(bias[:, :, None], matrix, pixels)
    return y.unflatten(2, x.shape[2:])


def bmm_channels_last(case: Case, t: Inputs, x: Tensor) -> Tensor:
    kernels, bias = mixed_kernels(t)
    x = x[:, :, :: case.stride, :: case.stride]
    matrix, pixels = kernels.flatten(2).transpose(1, 2), x.permute(0, 2, 3, 1).flatten(1, 2)
    y = torch.bmm(pixels, matrix) if bias is None else torch.baddbmm(bias[:, None, :], pixels, matrix)
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def upcast(case: Case, t: Inputs, x: Tensor) -> Tensor:
    wide = {name: None if value is None else value.float() for name, value in t.items()}
    return grouped_nchw(case, wide, x.float()).to(x.dtype)


def complete(formula: Formula, case: Case, t: Inputs) -> Tensor:
    """The formula with the code before it and the activation after it."""
    y = formula(case, t, with_code(t, t["x"]))
    return F.leaky_relu(y, 0.01) if case.activation == "leaky_relu" else y


def as_public(formula: Formula) -> Callable[..., Any]:
    """The formula with the signature of `ddrf_fast.dynamic_conv`, as far as networks use it."""

    def function(
        x: Tensor,
        weight: Tensor,
        attention: Tensor,
        bias: Tensor | None = None,
        *,
        code: Tensor | None = None,
        return_mean: bool = False,
        **keywords: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        case = Case("layer", {"activation": None} | keywords)
        t = {"x": x, "weight": weight, "attention": attention, "bias": bias}
        y = complete(formula, case, t if code is None else t | {"code": code})
        return (y, y.mean(dim=(2, 3))) if return_mean else y

    return function


def _provider(name: str, formula: Formula, layout: str, skip=None, compiled: bool = False) -> Provider:
    def build(case: Case, setting: Setting) -> Run:
        run = functools.partial(complete, formula, case)
        return torch.compile(run, dynamic=False) if compiled else run

    def skips(case: Case, setting: Setting) -> str | None:
        if compiled and not case.compiled:
            return "compiled for a few representative cases only"
        return skip(case, setting) if skip else None

    return Provider(name, build, skips, layout, warm_up=compiled, banks=("weight",))


def _one_by_one_only(case: Case, setting: Setting) -> str | None:
    return None if case.k == 1 and case.groups == 1 else "dense 1x1 only"


def _low_precision_on_cpu_only(case: Case, setting: Setting) -> str | None:
    low = setting.dtype in ("bfloat16", "float16") and setting.device == "cpu"
    return None if low else "low precision on CPUs only"


PEERS = (
    _provider("grouped_nchw", grouped_nchw, "nchw"),
    _provider("grouped_channels_last", grouped_channels_last, "channels_last"),
    _provider("loop_nchw", loop, "nchw"),
    _provider("loop_channels_last", loop, "channels_last"),
    _provider("combine_nchw", combine, "nchw"),
    _provider("combine_channels_last", combine, "channels_last"),
    _provider("bmm_nchw", bmm_nchw, "nchw", _one_by_one_only),
    _provider("bmm_channels_last", bmm_channels_last, "channels_last", _one_by_one_only),
    _provider("upcast_nchw", upcast, "nchw", _low_precision_on_cpu_only),
    _provider("compiled_grouped_nchw", grouped_nchw, "nchw", compiled=True),
    _provider("compiled_loop_channels_last", loop, "channels_last", compiled=True),
    _provider("compiled_bmm_nchw", bmm_nchw, "nchw", _one_by_one_only, compiled=True),
)
