"""Memory of one call: its peak on the GPU, and what the forward pass keeps for the backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.registry import Inputs, Run, targets


def peak_mib(step: Callable[[], object], device: str) -> float | None:
    """MiB that a call adds at its peak; None where torch does not count (CPU)."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def saved_mib(run: Run, inputs: Inputs) -> float:
    """MiB that autograd keeps between forward and backward, without the inputs and parameters."""
    known = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, Tensor)}
    known |= {t.untyped_storage().data_ptr() for t in targets(inputs).values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(inputs)
    del output
    return sum(kept.values()) / 2**20
