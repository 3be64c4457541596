"""convert: swaps the dynamic convolutions of a model for the ones of this package, and says what it did.

A module is known by its class's name; what it is, is then read from its attributes and parameters, and shown
by a trial: original and replacement, with the same random parameters, must give the same results. None of the
packages that these modules come from is imported.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ddrf_fast.nn.condconv import CondConv2d
from ddrf_fast.nn.dyconv import DyConv2d, DyConvAttention
from ddrf_fast.nn.dynamic_conv import DynamicConv2d
from ddrf_fast.nn.dynet import DyNetConv2d
from ddrf_fast.nn.modulated_conv import ModulatedConv2d
from ddrf_fast.nn.odconv import ODConv2d, ODConvAttention
from ddrf_fast.ops import use_backend

_OURS = (CondConv2d, DyConv2d, DynamicConv2d, DyNetConv2d, ModulatedConv2d, ODConv2d)
_LOOKS_DYNAMIC = re.compile(r"(cond|dynamic|dyn|dy|od|kw|modulated|adaptive)_?conv|conv2dmod", re.IGNORECASE)
# What a module's own hooks are kept in. The dictionaries themselves change hands, so that the handles that
# were given out still remove their hooks.
_CALL_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_TRIAL_BATCH = 3
_TRIAL_TOLERANCE = 1e-9  # in float64, relative to the largest value


class _UnfitError(Exception):
    """Why a module is left alone."""


@dataclass
class Swapped:
    """One module that was swapped: its qualified name, and the classes from and to."""

    name: str
    from_class: str
    to_class: str


@dataclass
class Left:
    """One module that looks like a dynamic convolution and was left alone, and why."""

    name: str
    from_class: str
    reason: str


@dataclass
class ConversionReport:
    """What :func:`convert` did; ``print`` it.

    Attributes:
        swapped: the modules that were swapped. A module that is in several places is listed for each.
        left: those that look like a dynamic convolution but were left as they are, with the reason.
    """

    swapped: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.left)} that look like dynamic convolutions"]
        lines += [f"  {s.name}: {s.from_class} -> {s.to_class}" for s in self.swapped]
        if self.swapped:
            lines.append("  isinstance of an old class no longer finds these (in a loop over temperatures)")
        lines += [f"  {s.name or '(the model)'}: {s.from_class} left: {s.reason}" for s in self.left]
        return "\n".join(lines)


def convert(model: nn.Module) -> ConversionReport:
    """Swaps, in place, the dynamic convolutions in ``model`` that are known here for those of this package.

    Known are, by the names of their classes:

    - ``CondConv2d`` of timm -> :class:`~ddrf_fast.nn.CondConv2d`
    - ``Dynamic_conv2d`` of kaijieshi7/Dynamic-convolution-Pytorch -> :class:`~ddrf_fast.nn.DyConv2d`
    - ``ODConv2d`` of OSVAI/ODConv -> :class:`~ddrf_fast.nn.ODConv2d`
    - ``ModulatedConv2d`` of rosinality/stylegan2-pytorch and its many copies, without resampling ->
      :class:`~ddrf_fast.nn.ModulatedConv2d`

    Copies of them that were changed are caught: a module is only swapped if its parameters have the expected
    names and if, in a trial on the CPU in float64, with random parameters and input, original and replacement
    agree in training and in evaluation. It takes a few times the memory of the module. The model itself is
    not run, and torch's random generators are left as they were. What is not swapped is not touched at all.

    What stays: parameters, buffers and the layers in a module (the very objects, so that optimizers, tied
    weights, ``requires_grad``, dtypes, devices and state dicts are as before), training or evaluation mode,
    and a module's own forward and backward hooks, with their handles. A module is left alone where something
    would be lost: hooks on its state dict or on a part that has no counterpart, or a ``forward`` that was set
    on the instance.

    What changes: the class, so that code that looks for the old one with ``isinstance`` (to lower a
    temperature, for example) no longer finds it, and attributes that others have set. References to a module
    from outside the tree of modules, in a list for example, keep the old one. Convert before
    ``torch.compile``, ``convert_sync_batchnorm`` and wrapping for distributed training.

    Args:
        model: any module. It cannot be swapped itself, only what is in it.

    Returns:
        The report.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from ddrf_fast.nn import convert
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> print(convert(model))
        swapped 0, left 0 that look like dynamic convolutions
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = ConversionReport()
    if type(model).__name__ in _KNOWN and not isinstance(model, _OURS):
        reason = "a model cannot be swapped in place itself; convert a container that holds it"
        report.left.append(Left("", _class_name(model), reason))
    _convert_children(model, "", report, {})
    return report


# For each module that was looked at, and for each replacement, by its identity: the original (kept, lest its
# identity be given to another), and the replacement, why there is none, or None.
_Outcomes = dict[int, tuple[nn.Module, nn.Module | str | None]]


def _convert_children(parent: nn.Module, prefix: str, report: ConversionReport, outcomes: _Outcomes) -> None:
    for key, child in parent._modules.items():
        if child is None or isinstance(child, torch.jit.ScriptModule):
            continue
        if id(child) not in outcomes:
            outcome = _outcome(child)
            outcomes[id(child)] = child, outcome
            if isinstance(outcome, nn.Module):
                outcomes[id(outcome)] = child, outcome
        original, outcome = outcomes[id(child)]
        name = prefix + key
        if isinstance(outcome, nn.Module):
            parent._modules[key] = outcome
            report.swapped.append(Swapped(name, _class_name(original), _class_name(outcome)))
            continue
        if outcome is not None:
            report.left.append(Left(name, _class_name(original), outcome))
        _convert_children(child, f"{name}.", report, outcomes)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _outcome(module: nn.Module) -> nn.Module | str | None:
    """The replacement, why there is none, or None for a module that is no dynamic convolution to swap."""
    if isinstance(module, _OURS):
        return None
    build = _KNOWN.get(type(module).__name__)
    if build is None:
        known = next((base.__name__ for base in type(module).__mro__ if base.__name__ in _KNOWN), None)
        if known is not None:
            return f"a subclass of {known}, which may compute something else"
        own = any(True for _ in module.parameters(recurse=False)) or is_parametrized(module)
        looks = own and _LOOKS_DYNAMIC.search(type(module).__name__)
        return f"not one of the classes {', '.join(_KNOWN)}" if looks else None
    try:
        replacement, _ = build(module)
        _check_parts(module, replacement)
        _try_out(module, build)
        _take_over(module, replacement)
    except _UnfitError as error:
        return str(error)
    except Exception as error:  # a module that only has the name: whatever is missing or breaks in it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return replacement


# ---------------------------------------------------------------------------------------------------------
# The known classes. Each function builds the replacement around the parts of the original, and gives the
# shapes of inputs to try both with.

Build = Callable[[Any], tuple[nn.Module, Sequence[tuple[int, ...]]]]


def _image(channels: int, kernel_size: Any, stride: Any, dilation: Any) -> tuple[int, ...]:
    """[B, C, H, W], a few outputs high and wide."""
    reach = [max(v) if isinstance(v, Sequence) else v for v in (kernel_size, stride, dilation)]
    size = (reach[0] - 1) * reach[2] + 2 * reach[1] + 2
    return _TRIAL_BATCH, channels, size, size + 1


def _adopt(new: nn.Module, old: nn.Module) -> None:
    for name in new._parameters:
        new._parameters[name] = old._parameters[name]


def _cond_conv(old: Any) -> tuple[nn.Module, Sequence[tuple[int, ...]]]:
    new = CondConv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        "same" if old.dynamic_padding else old.padding,
        old.dilation,
        old.groups,
        old.bias is not None,
        old.num_experts,
        device="meta",
    )
    _adopt(new, old)
    image = _image(old.in_channels, old.kernel_size, old.stride, old.dilation)
    return new, [image, (_TRIAL_BATCH, old.num_experts)]


def _dy_conv(old: Any) -> tuple[nn.Module, Sequence[tuple[int, ...]]]:
    with torch.device("meta"):
        new = DyConv2d(
            old.in_planes,
            old.out_planes,
            old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=old.groups,
            bias=old.bias is not None,
            K=old.K,
        )
    _adopt(new, old)
    part = old.attention
    new.attention = DyConvAttention(part.fc1, part.fc2, part.temperature)
    new.attention.training = part.training
    return new, [_image(old.in_planes, old.kernel_size, old.stride, old.dilation)]


def _od_conv(old: Any) -> tuple[nn.Module, Sequence[tuple[int, ...]]]:
    with torch.device("meta"):
        new = ODConv2d(
            old.in_planes,
            old.out_planes,
            old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=old.groups,
            kernel_num=old.kernel_num,
        )
    _adopt(new, old)
    part = old.attention
    new.attention = ODConvAttention(
        part.fc,
        part.bn,
        part.channel_fc,
        getattr(part, "filter_fc", None),
        getattr(part, "spatial_fc", None),
        getattr(part, "kernel_fc", None),
        part.temperature,
    )
    new.attention.training = part.training
    return new, [_image(old.in_planes, old.kernel_size, old.stride, old.dilation)]


def _modulated_conv(old: Any) -> tuple[nn.Module, Sequence[tuple[int, ...]]]:
    if any(getattr(old, name, None) for name in ("upsample", "downsample", "sample_mode")):
        raise _UnfitError("it resamples the image, which the replacement cannot")
    _, out_channels, in_channels, size, _ = old.weight.shape
    with torch.device("meta"):
        new = ModulatedConv2d(
            in_channels,
            out_channels,
            size,
            demodulate=old.demodulate,
            padding=getattr(old, "padding", None),
        )
    new.scale = getattr(old, "scale", 1.0)
    _adopt(new, old)
    new.modulation = old.modulation
    style_dim = old.modulation.weight.shape[1]
    return new, [_image(in_channels, size, 1, 1), (_TRIAL_BATCH, style_dim)]


_KNOWN: dict[str, Build] = {
    "CondConv2d": _cond_conv,
    "Dynamic_conv2d": _dy_conv,
    "ODConv2d": _od_conv,
    "ModulatedConv2d": _modulated_conv,
}

# ---------------------------------------------------------------------------------------------------------


def _check_parts(old: nn.Module, new: nn.Module) -> None:
    """Nothing is lost: the same parameters and buffers under the same names, and no hook on what goes."""
    if "forward" in vars(old):
        raise _UnfitError("its forward was replaced on the instance")
    mine = {name: id(value) for name, value in new.state_dict(keep_vars=True).items()}
    theirs = {name: id(value) for name, value in old.state_dict(keep_vars=True).items()}
    if mine != theirs:
        names = sorted({name for name, _ in set(mine.items()) ^ set(theirs.items())})
        raise _UnfitError(f"its parameters are not as expected: {', '.join(names)}")
    if any(getattr(old, name) for name in _STATE_HOOKS):
        raise _UnfitError("it has hooks on its state dict, which would be lost")
    kept = {id(module) for module in new.modules()}
    for name, part in old.named_modules():
        if part is not old and id(part) not in kept and any(_hook_dictionaries(part)):
            raise _UnfitError(f"its part {name} has hooks, which would be lost")


def _take_over(old: nn.Module, new: nn.Module) -> None:
    new.training = old.training
    for name in _CALL_HOOKS:
        vars(new)[name] = vars(old)[name]


def _try_out(module: nn.Module, build: Build) -> None:
    """Runs a copy of the module and its replacement on the same random parameters and input."""
    with torch.no_grad(), use_backend("auto"):  # on the CPU, whatever backend the model will run on
        old = _random_copy(module)
        new, shapes = build(old)
        generator = torch.Generator().manual_seed(0)
        # Large values as well, which show a limit where the original has none.
        for mode, scale in ((True, 1), (False, 100)):
            inputs = [
                scale * torch.randn(s, dtype=torch.float64, generator=generator, device="cpu") for s in shapes
            ]
            for part in (*old.modules(), *new.modules()):
                part.training = mode
            with torch.random.fork_rng(devices=[]):
                expected = old(*inputs)
            actual = new(*inputs)
            if expected.shape != actual.shape:
                raise _UnfitError(
                    f"on trial it gave shape {tuple(expected.shape)}, not {tuple(actual.shape)}"
                )
            error = float((actual - expected).abs().max() / expected.abs().max())
            if not error <= _TRIAL_TOLERANCE:
                raise _UnfitError(
                    f"on trial it did not compute what its name stands for (relative difference {error:.1e})"
                )


def _random_copy(module: nn.Module) -> Any:
    """A copy on the CPU in float64 with random parameters and buffers, and without hooks.

    Parameters and hooks are exchanged while it is copied: no large tensor and nothing behind a hook is.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}

    def random(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
        value = torch.rand(like.shape, dtype=torch.float64, generator=generator, device="cpu")
        # As large as initialisation makes them; vectors may be variances.
        return (2 * value - 1) / max(like[0].numel(), 1) ** 0.5 if like.dim() > 1 else value + 0.5

    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(random(parameter))
    for buffer in module.buffers():
        memo[id(buffer)] = random(buffer)
    for part in module.modules():
        for hooks in _hook_dictionaries(part):
            memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(module, memo)


def _hook_dictionaries(module: nn.Module) -> Iterator[dict[Any, Any]]:
    for name in (*_CALL_HOOKS, *_STATE_HOOKS):
        hooks = vars(module).get(name)
        if isinstance(hooks, dict):
            yield hooks
