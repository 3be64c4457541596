"""What is timed: a forward pass, one with all gradients, or a whole training step.

How it is timed is in `ddrf_fast/_measuring.py`, as `ddrf-fast bench` does it in the same way.
"""

import torch

from benchmarks.registry import Inputs, Operation, Run, Setting, targets
from ddrf_fast._measuring import Step


def measured_step(operation: Operation, run: Run, sets: list[Inputs], setting: Setting) -> Step:
    """A function of a running number: one call on the next inputs.

    Forward, forward and all gradients, or a whole training step.
    """
    if not setting.backward:

        def forward(i: int) -> None:
            with torch.no_grad():
                run(sets[i % len(sets)])

        return forward

    wanted = [list(targets(inputs).values()) for inputs in sets]
    if setting.mode == "step":
        return _training_step(operation, run, sets, wanted)
    grads: list[torch.Tensor] = []

    def step(i: int) -> None:
        output = run(sets[i % len(sets)])
        if not grads:
            grads.append(torch.randn_like(output))
        torch.autograd.grad(output, wanted[i % len(sets)], grads[0])

    return step


def _training_step(
    operation: Operation, run: Run, sets: list[Inputs], wanted: list[list[torch.Tensor]]
) -> Step:
    assert operation.loss is not None
    loss = operation.loss
    optimizers = [torch.optim.Adam(tensors) for tensors in wanted]

    def step(i: int) -> None:
        inputs, optimizer = sets[i % len(sets)], optimizers[i % len(sets)]
        optimizer.zero_grad()
        loss(inputs, run(inputs)).backward()
        optimizer.step()

    return step
