"""The gate: a provider that does not compute the operation is reported and not ranked.

Providers run on the whole case, at its true size, on inputs drawn for this check alone. The float64 reference
runs on the first and the last sample of the batch only, which is what makes it affordable: the gradient that
is sent back is zero for the other samples, so that gradients summed over the batch (of a kernel bank, of a
network's parameters) can be compared as well. Where samples depend on each other (batch normalisation in
training) it runs on all of them.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.registry import Case, Inputs, Operation, Provider, Run, Setting, convert, targets

# Largest relative error in the Euclidean norm, of the output and of every gradient. Low precisions round the
# mixed kernels and sum millions of rounded products; a wrong index or a missing term is far above any of
# these.
TOLERANCE = {"float32": 1e-4, "tf32": 2e-3, "float16": 4e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Verdict:
    """`status` is "ok", "wrong" or "failed"; `error` the largest relative error; `detail` where, or why."""

    status: str
    error: float | None
    detail: str


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64; infinite when anything is not finite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def gradients(output: Tensor, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """The gradients by input, those of a module's parameters as one vector.

    Some parameters of a network have gradients that are small differences of large sums: their own relative
    error says nothing.
    """
    wanted = targets(inputs)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, gradient in zip(wanted, torch.autograd.grad(output, list(wanted.values()), grad), strict=True):
        parts[name.split(".")[0]].append(gradient)
    return {
        name: torch.cat([g.flatten() for g in found]) if isinstance(inputs[name], nn.Module) else found[0]
        for name, found in parts.items()
    }


class Truth:
    """Inputs of an operation, and what the float64 reference makes of them."""

    def __init__(self, operation: Operation, case: Case, setting: Setting, seed: int):
        self.inputs = operation.exact(operation.inputs(case, setting, seed))
        batch = self.inputs[operation.per_sample[0]].shape[0]
        every = operation.coupled and setting.backward
        self.samples = list(range(batch)) if every else sorted({0, batch - 1})

        truth = {}
        for name, value in self.inputs.items():
            value = convert(value, dtype=torch.float64)
            if name in operation.per_sample:
                value = value.detach()[self.samples].requires_grad_(value.requires_grad)
            truth[name] = value
        with torch.set_grad_enabled(setting.backward):
            output = operation.reference(case, truth)
        self.expected = {"output": output.detach()}
        if setting.backward:
            generator = torch.Generator().manual_seed(seed)
            grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            # What providers are sent must be what the reference is sent, in their precision too; and nothing
            # where the output is so near zero that rounding decides the side of an activation's kink.
            near_zero = output.abs() < TOLERANCE[setting.dtype] * output.square().mean().sqrt()
            grad = grad.to(setting.torch_dtype).double().masked_fill(near_zero, 0.0)
            for name, gradient in gradients(output, truth, grad).items():
                self.expected[f"gradient of {name}"] = gradient
            self.grad = grad.new_zeros((batch, *grad.shape[1:]))
            self.grad[self.samples] = grad


class Gate:
    """Judges the providers of one case in one setting."""

    def __init__(self, operation: Operation, case: Case, setting: Setting, seed: int = 1):
        self.operation, self.case, self.setting, self.seed = operation, case, setting, seed
        self.truths: dict[str, Truth] = {}

    def truth(self, operation: Operation) -> Truth:
        """Computed when it is first asked for."""
        if operation.name not in self.truths:
            self.truths[operation.name] = Truth(operation, self.case, self.setting, self.seed)
        return self.truths[operation.name]

    @functools.cached_property
    def _next_draw(self) -> "Gate":
        return Gate(self.operation, self.case, self.setting, self.seed + 1)

    def judge(self, provider: Provider, run: Run, draws: int = 4) -> Verdict:
        """Runs the provider and compares.

        On other draws, too, where rounding may have decided the side of a kink inside: what is wrong is wrong
        on every draw.
        """
        verdict = self._judge(provider, run)
        kinked = (provider.of or self.operation).kinked and self.setting.backward
        if verdict.status != "wrong" or not kinked or draws == 1:
            return verdict
        return self._next_draw.judge(provider, run, draws - 1)

    def _judge(self, provider: Provider, run: Run) -> Verdict:
        operation = provider.of or self.operation
        truth = self.truth(operation)
        inputs = operation.arrange(truth.inputs, self.setting, provider)
        try:
            with torch.set_grad_enabled(self.setting.backward):
                output = run(inputs)
            actual = {"output": output[truth.samples]}
            shape, expected_shape = list(actual["output"].shape), list(truth.expected["output"].shape)
            if shape != expected_shape:
                return Verdict("wrong", None, f"output has shape {shape}, expected {expected_shape}")
            if self.setting.backward:
                for name, gradient in gradients(output, inputs, truth.grad.to(output)).items():
                    per_sample = name in operation.per_sample
                    actual[f"gradient of {name}"] = gradient[truth.samples] if per_sample else gradient
        except Exception as error:  # whatever a peer raises must not end the run: it is part of the result
            first_line = str(error).strip().partition("\n")[0]
            return Verdict("failed", None, f"{type(error).__name__}: {first_line[:200]}")

        worst, where = 0.0, "output"
        for name, expected in truth.expected.items():
            error = relative_error(actual[name], expected)
            if error >= worst:
                worst, where = error, name
        allowed = TOLERANCE[provider.precision or self.setting.dtype] * operation.depth
        status = "ok" if worst <= allowed else "wrong"
        return Verdict(status, worst, f"largest error {worst:.1e} in {where}, allowed {allowed:g}")
