"""Memory of one call: what it adds at its peak, and what the forward pass keeps for the backward.

On GPUs torch's allocator counts. On CPUs nobody does: kernels take their scratch from malloc behind torch's
back, so the resident memory of the process is watched. `echo 5 > /proc/self/clear_refs` resets its high-water
mark, and the peak is the mark after the call less what was resident before it.

That is what is alive only where freed memory goes back at once. malloc keeps it (blocks below a threshold
that grows to 32 MiB), and the next allocation would not be seen; so calls are measured in a process of their
own, where every block from 64 KiB on is mapped and unmapped, MKL keeps no buffers, and the heap is trimmed
before the call. There it runs once beforehand, so that neither compiled kernels nor pages of libraries count.
Pages that are never touched do not count either. The kernel counts in lots of up to 32 pages per core, and
blocks below 64 KiB stay in the heap: figures are right to within one MiB on a few cores.
"""

import ctypes
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from benchmarks.registry import Case, Inputs, Run, Setting, load, targets
from benchmarks.timing import measured_step
from ddrf_fast._measuring import CPU_PEAKS, peak_memory, reset_peak, resident

MAPPED_FROM = 64 << 10
_M_MMAP_THRESHOLD = -3


def peak_on_gpu(step: Callable[[], object]) -> float:
    """MiB that a call adds at its peak."""
    before = torch.cuda.memory_allocated() / 2**20
    peak = peak_memory(step, torch.device("cuda"))
    assert peak is not None
    return peak - before


def peaks_on_cpu(operation: str, case: Case, setting: Setting, providers: Sequence[str]) -> dict[str, float]:
    """MiB that a call of each of the providers adds at its peak; nothing where the system does not tell."""
    if not CPU_PEAKS:
        return {}
    return worker(torch.get_num_threads()).submit(_peaks, operation, case, setting, providers).result()


@functools.cache
def worker(threads: int) -> ProcessPoolExecutor:
    """The process in which resident memory is memory in use."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(threads,))


def _prepare(threads: int) -> None:
    os.environ["MKL_DISABLE_FAST_MM"] = "1"
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
    torch.set_num_threads(threads)


def _peaks(operation: str, case: Case, setting: Setting, names: Sequence[str]) -> dict[str, float]:
    return {name: growth(call) for name, call in _calls(operation, case, setting, names)}


def _calls(
    operation: str, case: Case, setting: Setting, names: Sequence[str]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of one provider after the other."""
    loaded = load(operation)
    for provider in loaded.providers:
        if provider.name in names and provider.skip(case, setting) is None:
            computed = provider.of or loaded
            inputs = computed.draw(case, setting, provider, seed=2)
            step = measured_step(computed, provider.build(case, setting), [inputs], setting)
            yield provider.name, functools.partial(step, 0)


def peaks_of_processes(
    operation: str, case: Case, setting: Setting, providers: Sequence[str]
) -> dict[str, float]:
    """MiB that a process takes at its peak which builds one of the providers and calls it once.

    All of it counts, Python, libraries and weights too, and what malloc keeps; so each has its own.
    """
    if not CPU_PEAKS:
        return {}
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    found = {}
    for name in providers:
        with ProcessPoolExecutor(1, context) as process:
            found[name] = process.submit(_whole, operation, case, setting, name, threads).result()
    return found


def _whole(operation: str, case: Case, setting: Setting, provider: str, threads: int) -> float:
    torch.set_num_threads(threads)
    for _, call in _calls(operation, case, setting, [provider]):
        call()
    return resident("VmHWM")


def growth(step: Callable[[], object]) -> float:
    """MiB by which the resident memory grows at most during the second call."""
    step()
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = resident("VmRSS")
    step()
    return max(resident("VmHWM") - before, 0.0)


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
