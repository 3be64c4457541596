"""Loads the compiled libraries, once, and remembers why one could not be loaded.

`_C` holds the CPU kernels and `_C_cuda` the CUDA ones. Both are built on LibTorch's stable ABI and hold no
Python code: loading one registers its kernels with the dispatcher.
"""

import functools
import importlib.machinery
from pathlib import Path

import torch

LIBRARIES = ("_C", "_C_cuda")


def find(name: str) -> Path | None:
    """The compiled library `name` beside the package's modules, or None."""
    folder = Path(__file__).resolve().parent.parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.exists():
            return path
    return None


def _load_one(name: str) -> tuple[bool, str]:
    path = find(name)
    if path is None:
        return (
            False,
            f"{name} is not built (reinstall with a C++ compiler{' and nvcc' if name == '_C_cuda' else ''})",
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return False, f"{path.name} could not be loaded with torch {torch.__version__}: {error}"
    return True, path.name


@functools.cache
def status() -> dict[str, tuple[bool, str]]:
    """For each library: whether it is loaded, and its file or what is wrong. The first call loads them."""
    return {name: _load_one(name) for name in LIBRARIES}


def cpu_capability() -> str:
    """The instruction set that the compiled CPU kernels run with; "none" where they are not loaded.

    One of "default", "avx2", "avx512", "avx512_bf16" and "amx_bf16": the best that the processor has, or
    what the environment variable ``DDRF_FAST_CPU_CAPABILITY`` asks for.

    Raises:
        RuntimeError: that variable asks for another, or for one that the processor has not.
    """
    if not status()["_C"][0]:
        return "none"
    return torch.ops.ddrf_fast_native.cpu_capability.default()
