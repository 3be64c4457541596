"""One Triton call against plain torch in float64; as a script: the tiny calls, in the interpreter.

Not collected by pytest: TRITON_INTERPRET must be set before Triton is imported, hence in a process of its
own.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from helpers import assert_accurate
from torch import Tensor
from triton_cases import TINY, Conv, Degrade, Route, wide

from ddrf_fast.kernels import degrade as degrade_kernels
from ddrf_fast.kernels import dynamic_conv as conv_kernels
from ddrf_fast.kernels import route as route_kernels
from ddrf_fast.reference import degrade as degrade_reference
from ddrf_fast.reference import dynamic_conv as conv_reference
from ddrf_fast.reference import route as route_reference

# In the interpreter, those that ask for every gradient on its own: with all scales, and each form of the
# weights.
ALONE = (
    "conv code, scales",
    "conv per sample",
    "conv bfloat16, mixed in registers",
    "conv chunks",
    "degrade one kernel, one pixel",
    "degrade grid",
    "degrade sample",
)


def operators(case: Conv | Degrade | Route) -> tuple[ModuleType, ModuleType, str]:
    """Kernels, reference and the operator's name."""
    if isinstance(case, Conv):
        return conv_kernels, conv_reference, "dynamic_conv"
    if isinstance(case, Route):
        return route_kernels, route_reference, "route"
    return degrade_kernels, degrade_reference, "degrade"


def check(
    case: Conv | Degrade | Route, device: str, *, each_alone: bool = True, floor: float | None = None
) -> None:
    """Forward, backward and layouts of one call, and whether each gradient asked for alone is the same."""
    with case.as_asked():
        _check(case, device, each_alone, floor)


def _check(case: Conv | Degrade | Route, device: str, each_alone: bool, floor: float | None) -> None:
    kernels, reference, name = operators(case)
    torch.manual_seed(0)
    args = case.arguments(device)
    assert kernels.unsupported(name, *args) is None
    out = _compare(getattr(kernels, name), getattr(reference, name), args, "output", floor)[0]
    if isinstance(case, Route):
        assert kernels.plan(name, *args)
        return
    if isinstance(case, Conv):
        with_mean = f"{name}_mean"
        assert kernels.unsupported(with_mean, *args) is None
        same, _ = _compare(getattr(kernels, with_mean), getattr(reference, with_mean), args, "mean", floor)
        assert torch.equal(out, same), "the output differs where its mean is asked for"
        assert kernels.plan(name, *args)
    grad = torch.randn(out.shape).to(device=device, dtype=out.dtype)
    if isinstance(case, Conv) and case.mixed == "once":
        grad = grad.contiguous(
            memory_format=torch.channels_last if case.channels_last else torch.contiguous_format
        )
    else:
        grad = grad.transpose(2, 3).contiguous().transpose(2, 3)
    backward = f"{name}_backward"
    args = case.backward_arguments(args, grad)
    assert kernels.unsupported(backward, *args) is None
    grads = _compare(getattr(kernels, backward), getattr(reference, backward), args, "gradient", floor)
    *tensors, mask = args
    for i in range(len(grads) if each_alone else 0):
        only = getattr(kernels, backward)(*tensors, mask & 1 << i)
        assert [g.numel() for g in only] == [g.numel() if i == j else 0 for j, g in enumerate(grads)]
        assert torch.equal(only[i], grads[i]), f"gradient {i} asked for alone differs"


def _compare(
    actual: Callable[..., Any],
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    name: str,
    floor: float | None,
) -> tuple[Tensor, ...]:
    results = [f(*a) for f, a in ((actual, args), (reference, wide(args)), (reference, args))]
    results = [(r,) if isinstance(r, Tensor) else r for r in results]
    for i, (mine, exact, own) in enumerate(zip(*results, strict=True)):
        assert _strides(mine) == _strides(own), f"{name} {i}: {mine.stride()} != {own.stride()}"
        if not mine.is_floating_point():  # in place of the gradient of integers
            assert mine.numel() == 0
            continue
        assert_accurate(mine, exact, own, floor, name=f"{name} {i}")
    return results[0]


def _strides(tensor: Tensor) -> list[int]:
    """Those that mean something."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1] if tensor.numel() else []


def check_standard_normal() -> None:
    """The noise is standard normal, deep in the logarithm's tail too."""
    case = Degrade((1, 1, 64, 64), size=1, num_kernels=1, weights_at="sample", noise="sample")
    args = list(case.arguments("cpu"))
    args[0], args[3] = torch.zeros_like(args[0]), torch.ones_like(args[3])
    noise = degrade_kernels.degrade(*args)
    assert abs(float(noise.mean())) < 0.06
    assert abs(float(noise.std()) - 1) < 0.04


def check_tuning() -> None:
    """benchmarks.tune on a tiny shape: both ways are timed, a tile is chosen, and the table can be pasted."""
    from benchmarks import tune
    from ddrf_fast.kernels import _conv_plan

    args = Conv((1, 8, 3, 3), 8, num_kernels=2, dtype=torch.bfloat16).arguments("cpu")
    call = tune.Call("tiny", args, torch.randn_like(conv_kernels.dynamic_conv(*args)))
    tune.compare_paths([call], "cpu", 0.0)
    tune.BLOCKS = dict.fromkeys(tune.BLOCKS, ((16, 16),))
    tune.WARPS_AND_STAGES = ((1, 1),)
    for table in tune.TABLES:
        tile = tune.best_tile(table, "scattered", [call], "interpreter", "cpu", 0.0)
        assert tile in tune.candidates(table, "scattered", tile)
        row = getattr(_conv_plan, table)["interpreter"]
        pasted = eval("{" + tune.render(table, "interpreter", row) + "}", {"Tile": _conv_plan.Tile})
        assert pasted == {"interpreter": row}


def main(prefix: str) -> None:
    """Every tiny call whose name begins with `prefix`; poisoned memory shows what is not written."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, case in TINY.items():
        if name.startswith(prefix):
            try:
                check(case, "cpu", each_alone=name in ALONE)
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error
            print("ok:", name)
    if prefix == "degrade":
        check_standard_normal()
    if prefix == "tune":
        check_tuning()
        print("ok: tune")


if __name__ == "__main__":
    main(sys.argv[1])
