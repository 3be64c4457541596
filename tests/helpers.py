"""What tests share: comparison by flash-attention's rule, programs in processes of their own, and C++ ones.

The rule: an error is judged by what torch itself loses at that precision.
"""

import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

CAPABILITIES = ["default", "avx2", "avx512", "avx512_bf16", "amx_bf16"]

# The relative floor: a few units in the last place, for sums short enough that torch happens to lose nothing.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in float64; infinite where only one of both is finite."""
    difference = (actual.detach().double() - expected.detach().double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def off_the_kink(draw: Callable[[], dict[str, Tensor]], before: Callable[..., Tensor]) -> dict[str, Tensor]:
    """What `draw` makes, until no value `before` a ReLU is within the steps of finite differences of zero."""
    while True:
        named = draw()
        if float(before(**named).abs().min()) > 1e-3:
            return {name: t.requires_grad_() for name, t in named.items()}


def assert_accurate(
    actual: Tensor,
    reference64: Tensor,
    lowprec: Tensor | None = None,
    floor: float | None = None,
    factor: float = 2.0,
    name: str = "result",
) -> None:
    """Asserts that `actual` errs at most `factor` times as much as `lowprec` does, plus a floor.

    Args:
        actual: What is tested, of any floating dtype.
        reference64: The same in float64.
        lowprec: The same by torch at `actual`'s precision; None allows the floor only.
        floor: Relative to the largest magnitude of the reference; by default a few roundings of `actual`'s
            dtype.
        factor: How many times torch's own error is allowed.
        name: For the message.
    """
    assert actual.shape == reference64.shape, (
        f"{name}: shape {tuple(actual.shape)} != {tuple(reference64.shape)}"
    )
    if lowprec is not None:
        assert actual.dtype == lowprec.dtype, f"{name}: dtype {actual.dtype} != {lowprec.dtype}"
    scale = float(reference64.detach().abs().max()) if reference64.numel() else 0.0
    allowed = (FLOOR[actual.dtype] if floor is None else floor) * max(scale, 1e-30)
    if lowprec is not None:
        allowed += factor * max_error(lowprec, reference64)
    error = max_error(actual, reference64)
    assert error <= allowed, (
        f"{name}: error {error:.3e} is above {allowed:.3e} ({actual.dtype}, magnitude {scale:.3e})"
    )


def run_elsewhere(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in a process of its own, which can import the tests."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def run_capability(program: str, capability: str) -> str:
    """Runs a program, which must succeed, with one of `CAPABILITIES`; returns what it printed.

    AMX is emulated where the processor has none. The test is skipped where there is no other way.
    """
    variables = {"DDRF_FAST_CPU_CAPABILITY": capability}
    if capability == "amx_bf16" and "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        variables["LD_PRELOAD"] = str(amx_emulator())
    done = run_elsewhere(program, **variables)
    if "this processor or this build has no" in done.stderr:
        pytest.skip(f"no {capability} on this machine")
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def amx_emulator() -> Path:
    """The library that executes AMX instructions in software for a process that preloads it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler for x86-64, for the emulator of AMX")
    library = Path(_libraries().name) / "amx.so"
    source = Path(__file__).parent / "amx_on_cpu" / "amx.cpp"
    command = [compiler, "-std=c++20", "-O2", "-mfma", "-fPIC", "-shared", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@functools.cache
def _libraries() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes with the process."""
    return tempfile.TemporaryDirectory()


def compile_against_torch(source: Path, program: Path) -> Path:
    """Compiles a C++ program that links the libtorch of this process; returns the program."""
    root = Path(torch.__file__).parent
    command = ["c++", "-std=c++20", "-O0", str(source), "-o", str(program)]
    command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-L{root / 'lib'}"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{root / 'lib'}"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return program
