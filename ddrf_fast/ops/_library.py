"""The one torch Library, and what every operation does with it.

An operation is two raw operators, `x` and `x_backward`, and two autograd Functions around them. The raw
operators have a schema, a fake, an autocast rule and a vmap rule; plain torch is registered for every device,
and compiled kernels take precedence where they are loaded. Autograd stays outside of the operators, in
`setup_context`-style Functions: with torch.library.register_autograd neither torch.func nor double backward
would work. In forward mode plain torch runs in their place: within a Function's `jvp` higher derivatives get
lost (torch 2.13). Operators for inference alone (`route`, `dynamic_conv_mean`) have no gradient: public
functions call them where nothing needs one (`needs_gradient`), and otherwise what autograd knows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ddrf_fast.ops import _backend, _native
from ddrf_fast.reference._common import is_channels_last

_LIBRARY = torch.library.Library("ddrf_fast", "DEF")
# Where the CUDA C++ kernels register, so that Python can choose between them and Triton.
_NATIVE_LIBRARY = torch.library.Library("ddrf_fast_native", "DEF")
_NATIVE_LIBRARY.define("cpu_capability() -> str")
_native.status()  # the first call loads what is compiled, which registers itself

# The positions, among an operator's tensors, of those that have the batch as their first dimension; it is
# told the number of dimensions of each (None for a missing one), because some may come shared or per sample.
PerSample = Callable[[Sequence[int | None]], set[int]]


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    autocast: Callable[[Sequence[Any]], Sequence[Any]],
    num_tensors: int,
    per_sample: PerSample,
    *,
    native_cuda: bool = False,
) -> None:
    """Registers one raw operator.

    Args:
        schema: As in torch.library, without the namespace.
        reference: The plain torch implementation, for every device.
        fake: Shapes, dtypes and strides of the outputs.
        autocast: Casts the arguments, under autocast.
        num_tensors: How many of its arguments are tensors, a `grad` before them not counted.
        per_sample: Which of them have the batch as their first dimension; for torch.vmap.
        native_cuda: Whether there is a CUDA C++ kernel.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, functools.partial(_backend.run_on_cuda, name), "CUDA")
    if native_cuda:
        _NATIVE_LIBRARY.define(schema)
    torch.library.register_fake(f"ddrf_fast::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"ddrf_fast::{name}", _vmap_rule(name, num_tensors, per_sample), lib=_LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        _LIBRARY.impl(name, _autocast_rule(name, key, autocast), key)


def define_native(schema: str) -> None:
    """Declares an operator of the compiled libraries alone, which may be without it."""
    _NATIVE_LIBRARY.define(schema)


def _autocast_rule(name: str, key: str, cast: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(*args: Any) -> Any:
        args = tuple(cast(args))  # outside of the guard, which makes autocast look disabled
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(torch.ops.ddrf_fast, name).default(*args)

    return rule


def autocast_to_lower(args: Sequence[Any]) -> Sequence[Any]:
    """Under autocast for the first tensor's device: floats but float64 in its dtype, as for convolutions."""
    device = args[0].device.type
    if not is_autocast_enabled(device):
        return args
    return _cast(args, torch.get_autocast_dtype(device))


def autocast_to_float32(args: Sequence[Any]) -> Sequence[Any]:
    """Under autocast for the first tensor's device: floats but float64 in float32, as for losses."""
    device = args[0].device.type
    return _cast(args, torch.float32) if is_autocast_enabled(device) else args


def is_autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a kind of device; some, such as "meta", have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _cast(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    def cast(a: Any) -> Any:
        castable = isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
        return a.to(dtype) if castable else a

    return [cast(a) for a in args]


def _vmap_rule(name: str, num_tensors: int, per_sample: PerSample) -> Callable[..., Any]:
    """The rule of a raw operator: the mapped dimension is folded into the batch.

    Where that cannot be (a tensor that all samples share is itself mapped, or its gradient is asked for,
    which then is wanted for each slice; or there are no slices) the slices run one by one.
    """
    operator = getattr(torch.ops.ddrf_fast, name).default
    backward = name.endswith("_backward")
    first = int(backward)  # a gradient comes before the tensors, and is per sample

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        size, tensors = info.batch_size, range(first, first + num_tensors)
        # For a list of ints there comes a list of Nones.
        in_dims = [d if isinstance(a, Tensor) else None for a, d in zip(args, in_dims, strict=True)]
        samples = per_sample(
            [None if args[i] is None else args[i].dim() - (in_dims[i] is not None) for i in tensors]
        )
        wanted = [bool(args[-1] >> i & 1) for i in range(num_tensors)] if backward else []
        shared_mapped = any(in_dims[i] is not None for i in tensors if i - first not in samples)
        shared_wanted = any(want and i not in samples for i, want in enumerate(wanted))
        if shared_mapped or shared_wanted or size == 0:
            if size == 0:  # one slice, of zeros, tells the shapes
                args = tuple(
                    a if d is None else a.new_zeros((*a.shape[:d], 1, *a.shape[d + 1 :]))
                    for a, d in zip(args, in_dims, strict=True)
                )
            slices = [
                operator(*(a if d is None else a.select(d, v) for a, d in zip(args, in_dims, strict=True)))
                for v in range(max(size, 1))
            ]
            if isinstance(slices[0], Tensor):
                return torch.stack(slices)[:size], 0
            stacked = tuple(torch.stack(s)[:size] for s in zip(*slices, strict=True))
            return stacked, (0,) * len(stacked)

        def fold(a: Tensor, dim: int | None) -> Tensor:
            a = a.unsqueeze(0).expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
            return a.flatten(0, 1)

        def unfold(out: Tensor) -> Tensor:
            return out.unflatten(0, (size, out.shape[0] // size))

        folded = {i + first for i in samples} | set(range(first))
        out = operator(
            *(fold(a, in_dims[i]) if i in folded and a is not None else a for i, a in enumerate(args))
        )
        if isinstance(out, Tensor):
            return unfold(out), 0
        # A gradient that was not asked for is empty, and has no batch.
        has_batch = wanted if backward else [True] * len(out)
        pairs = [(unfold(o), 0) if has else (o, None) for o, has in zip(out, has_batch, strict=False)]
        return tuple(zip(*pairs, strict=True))

    return rule


def layout_of(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor [B, C, H, W] in the layout of an operation's answer to `x`; for fakes.

    Of the dtype of `x`, unless another is asked for.
    """
    if is_channels_last(x):
        batch, channels, height, width = shape
        return x.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
    return x.new_empty(shape, dtype=dtype)


def fake_gradients(tensors: Sequence[Tensor | None], output_mask: int) -> tuple[Tensor, ...]:
    """The fake of a `_backward` operator: the first gradient in its tensor's layout, others contiguous."""
    x = tensors[0]
    assert x is not None

    def gradient(i: int, t: Tensor | None) -> Tensor:
        if not output_mask >> i & 1:
            return (x if t is None else t).new_empty((0,))
        assert t is not None
        return layout_of(x, x.shape) if i == 0 else t.new_empty(t.shape)

    return tuple(gradient(i, t) for i, t in enumerate(tensors))


def differentiable(
    name: str,
    num_tensors: int,
    reference: Callable[..., Tensor],
    reference_backward: Callable[..., tuple[Tensor, ...]],
    backward_arguments: Callable[[Sequence[Any]], tuple[Any, ...]],
    negative_slope: Callable[[Sequence[Any]], float | None] = lambda rest: None,
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The raw operators `name` and `<name>_backward` as functions that autograd and torch.func see through.

    To any order.

    Saved for the backward are the tensors as they came, and the output where a rectifier needs its sign.

    Args:
        name: The raw operator; its gradient is `<name>_backward`.
        num_tensors: How many of its first arguments are tensors; the rest is called `rest` here.
        reference: The operator in plain torch.
        reference_backward: The gradient in plain torch, which is differentiated for double backward.
        backward_arguments: From `rest`, what the backward operator takes between its tensors and the output
            mask.
        negative_slope: From `rest`, that of the (leaky) rectifier at the operator's end; None without one.

    Returns:
        Both, taking the arguments of the raw operators; the second for use in another backward.
    """

    class Backward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return _backend.run(f"{name}_backward", *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*inputs[: num_tensors + 1])
            ctx.rest = inputs[num_tensors + 1 :]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            tensors, rest = ctx.saved_tensors, ctx.rest
            asked = [i for i in range(num_tensors) if rest[-1] >> i & 1]
            floating = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

            def gradients(*values: Tensor) -> tuple[Tensor, ...]:
                full = list(tensors)
                for i, value in zip(floating, values, strict=True):
                    full[i] = value
                out = reference_backward(*full, *rest)
                return tuple(out[i] for i in asked)

            pullback = torch.func.vjp(gradients, *(tensors[i] for i in floating))[1]
            found = dict(zip(floating, pullback(tuple(grads[i] for i in asked)), strict=True))
            return *(found.get(i) for i in range(num_tensors + 1)), *(None for _ in rest)

    def call_backward(*args: Any) -> tuple[Tensor, ...]:
        if in_forward_mode():
            return reference_backward(*args)
        # torch.compile differentiates once only, and cannot trace a Function within a Function's backward.
        second_order = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        if second_order and not torch.compiler.is_compiling():
            return Backward.apply(*args)
        return _backend.run(f"{name}_backward", *args)

    class Forward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return _backend.run(name, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.rest = inputs[num_tensors:]
            ctx.save_for_backward(*inputs[:num_tensors], None if negative_slope(ctx.rest) is None else output)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            *tensors, output = ctx.saved_tensors  # once: checkpointing unpacks nothing twice
            slope = negative_slope(ctx.rest)
            if slope is not None:
                grad = _through_rectifier(grad, output, slope)
            wanted = ctx.needs_input_grad[:num_tensors]
            mask = sum(1 << i for i, want in enumerate(wanted) if want)
            grads = call_backward(grad, *tensors, *backward_arguments(ctx.rest), mask)
            return *(grads[i] if want else None for i, want in enumerate(wanted)), *(None for _ in ctx.rest)

    def call(*args: Any) -> Tensor:
        if not needs_gradient(args[:num_tensors]):
            return _backend.run(name, *args)  # a third of the Function's overhead
        if in_forward_mode():
            return reference(*args)
        transformed = torch._C._are_functorch_transforms_active()
        if torch.compiler.is_compiling():
            # Dynamo cannot trace a Function within a transform.
            return reference(*args) if transformed else Forward.apply(*args)
        if transformed:
            return Forward.apply(*args)
        # What Function.apply comes down to, but for binding default arguments, which takes longer than that.
        return super(Function, Forward).apply(*args)

    return call, call_backward


def _through_rectifier(grad: Tensor, output: Tensor, slope: float) -> Tensor:
    """The gradient before a rectifier, from its output. Torch's own kernels are far faster than a `where`."""
    if slope == 0:
        return torch.ops.aten.threshold_backward(grad, output, 0)
    return torch.ops.aten.leaky_relu_backward(grad, output, slope, True)


def in_forward_mode() -> bool:
    """Whether derivatives are carried along, by torch.func.jvp, jacfwd and hessian or torch.autograd's dual
    numbers; Dynamo, which cannot ask, sees the transforms."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _is_transformed() -> bool:
    """Whether torch.func or forward mode follow what is computed."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def reaches_native(operands: Sequence[Any]) -> bool:
    """Whether an operation is a call of its compiled CPU kernel: nothing is traced, transformed or cast.

    An operand is a tensor, None, or a mistake.
    """
    # After a kernel has filled the caches, each function that is entered takes microseconds: nothing is asked
    # twice here, and there is no generator.
    if torch.compiler.is_compiling() or not _backend.is_native_first() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    for operand in operands:
        if operand is not None and not (isinstance(operand, Tensor) and operand.is_cpu):
            return False
    return True


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something may differentiate; transforms and forward mode don't show in `requires_grad`."""
    if _is_transformed():
        return True
    # Also when compiling: Dynamo cannot trace a Function that nothing differentiates (torch 2.13).
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
