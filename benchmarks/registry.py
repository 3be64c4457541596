"""What is measured: operations, their cases (shapes), and the providers that compete on them.

An operation module (dynamic_conv.py, degrade.py, model.py, efficientnet.py) builds one `Operation`.
Everything else - the gate, the timing, the roof, the runner, the microbenchmarks under pytest - works on
these types and knows no operation.
"""

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

OPERATIONS = ("dynamic_conv", "degrade", "model", "efficientnet")
PASSES = ("fwd", "fwdbwd")
# "step" is a whole training step, with the loss, the backward pass and the optimiser; "arrays" all that a
# user waits for, from arrays of uint8 to such arrays.
MODES = (*PASSES, "step", "arrays")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# "tf32" is float32 tensors with TF32 allowed; "float32" is IEEE float32 for everybody, on GPUs too.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Tensors and modules by name. What requires a gradient in them is what a training step computes gradients
# for.
Inputs = dict[str, Any]
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Setting:
    """How a case is run: everything that is not its shape."""

    device: str = "cpu"
    dtype: str = "float32"
    layout: str = "nchw"
    mode: str = "fwd"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def backward(self) -> bool:
        return self.mode in ("fwdbwd", "step")

    @property
    def whole_process(self) -> bool:
        """Whether memory is that of a process with all that it holds, not what one call adds."""
        return self.mode == "arrays" and self.device == "cpu"


@dataclass(frozen=True)
class Case:
    """One shape of an operation.

    Attributes:
        name: As in the results.
        shape: Its parameters; each can be read as an attribute of the case, too.
        quick: Whether it is part of --quick.
        compiled: Whether torch.compile may compete.
        modes: In which it makes sense.
    """

    name: str
    shape: Mapping[str, int | str | bool]
    quick: bool = False
    compiled: bool = False
    modes: Sequence[str] = PASSES

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["shape"][key]
        except KeyError:
            raise AttributeError(key) from None


def never(case: Case, setting: Setting) -> str | None:
    """Runs everywhere."""
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation.

    Attributes:
        name: As in the results.
        build: Case, setting -> function of the inputs. What a user would do once for a model (compiling) is
            done here, what he would do at every call (mixing kernels, say) in the function.
        skip: Why it does not take part in a case, or None.
        layout: The memory format that it wants its inputs in; it gets them so, for nothing. None: that of the
            setting.
        peer: Whether it counts when the best peer is looked for. False for ddrf_fast, and for what computes
            something less (a lower precision, say) and is shown for information.
        precision: Name of the dtype whose error it is allowed; None: the setting's.
        warm_up: Whether building is so slow that it only takes part with --compile.
        of: What it computes instead of the operation, for comparison: with inputs and a reference of its own.
        banks: Names of the banks of kernels that it wants in that memory format as well.
    """

    name: str
    build: Callable[[Case, Setting], Run]
    skip: Callable[[Case, Setting], str | None] = never
    layout: str | None = None
    peer: bool = True
    precision: str | None = None
    warm_up: bool = False
    of: "Operation | None" = None
    banks: Sequence[str] = ()


@dataclass(frozen=True)
class Work:
    """What a case must at least do: floating-point operations (two to a multiply-add) and bytes moved."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Target:
    """What ddrf_fast was to reach in a case, and what it reached: reported, never asserted."""

    case: str
    figure: str
    value: float
    limit: float
    at_most: bool = False  # else at least

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass(frozen=True)
class Operation:
    """An operation with its cases and providers.

    Attributes:
        inputs: Case, setting, seed -> random inputs of the setting's dtype and device, NCHW.
        reference: Case, inputs -> output. It is given float64 inputs and is the truth.
        work: Case, setting -> the least work, for the roof.
        per_sample: Names of the inputs with a batch dimension; the gate compares some samples of a batch.
        images: Names of the inputs (networks too) that come in the layout of the setting, or the provider.
        exact: Inputs -> inputs without what providers may legitimately draw differently (noise).
        plan: Case, inputs -> how ddrf_fast runs it, in words.
        depth: How many roundings deep it is, roughly: a factor on the error that the gate allows.
        loss: Inputs, output -> the number that a training step lowers; for the mode "step".
        kinked: Whether there are rectifiers inside, so that a number rounded to the other side of a kink
            changes the gradients by far more than itself.
        coupled: Whether the samples of a training batch depend on each other (by batch normalisation).
        targets: Records -> what was to be reached, as far as they tell.
    """

    name: str
    cases: Sequence[Case]
    providers: Sequence[Provider]
    inputs: Callable[[Case, Setting, int], Inputs]
    reference: Callable[[Case, Inputs], Tensor]
    work: Callable[[Case, Setting], Work]
    per_sample: Sequence[str]
    images: Sequence[str]
    plan: Callable[[Case, Inputs], str]
    exact: Callable[[Inputs], Inputs] = field(default=lambda inputs: inputs)
    depth: float = 1.0
    loss: Callable[[Inputs, Tensor], Tensor] | None = None
    kinked: bool = False
    coupled: bool = False
    targets: Callable[[Sequence[Mapping[str, Any]]], list[Target]] = field(default=lambda records: [])

    def draw(self, case: Case, setting: Setting, provider: Provider, seed: int) -> Inputs:
        """Random inputs as the provider wants to have them."""
        return self.arrange(self.inputs(case, setting, seed), setting, provider)

    def arrange(self, inputs: Inputs, setting: Setting, provider: Provider) -> Inputs:
        """A copy of the inputs in the provider's layout; leaves stay leaves."""
        layout, names = provider.layout or setting.layout, (*self.images, *provider.banks)
        return {n: convert(v, layout=layout if n in names else None) for n, v in inputs.items()}


def load(name: str) -> Operation:
    """The operation of that name; its module is imported only here: a broken one leaves the others."""
    return importlib.import_module(f"benchmarks.{name}").OPERATION


def convert(value: Any, dtype: torch.dtype | None = None, layout: str | None = None) -> Any:
    """A copy of an input in another floating dtype or layout: a leaf that requires a gradient if it did."""
    if isinstance(value, nn.Module):
        module = copy.deepcopy(value)
        module = module if dtype is None else module.to(dtype)
        for parameter in module.parameters():
            # Not Module.to, which takes banks of kernels [N, O, I, kh, kw] for volumes.
            if layout is not None and parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[layout])
        return module
    if not isinstance(value, Tensor):
        return value
    copied = value.detach().clone()
    if dtype is not None and copied.is_floating_point():
        copied = copied.to(dtype)
    if layout is not None and copied.dim() == 4:
        copied = copied.contiguous(memory_format=LAYOUTS[layout])
    if layout == "channels_last" and copied.dim() == 5:  # [N, O, I, kh, kw]
        copied = copied.movedim(2, -1).contiguous().movedim(-1, 2)
    return copied.requires_grad_(value.requires_grad)


def targets(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that gradients are computed for, by name."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, nn.Module):
            found.update({f"{name}.{key}": p for key, p in value.named_parameters() if p.requires_grad})
        elif isinstance(value, Tensor) and value.requires_grad:
            found[name] = value
    return found


def input_bytes(inputs: Inputs) -> int:
    """Size of all the tensors and parameters of an input set."""
    total = 0
    for value in inputs.values():
        tensors = value.parameters() if isinstance(value, nn.Module) else [value]
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    return total
