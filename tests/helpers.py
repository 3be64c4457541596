"""What tests share: comparison by flash-attention's rule, and C++ programs against libtorch.

The rule: an error is judged by what torch itself loses at that precision.
"""

import subprocess
from pathlib import Path

import torch
from torch import Tensor

# The relative floor: a few units in the last place, for sums short enough that torch happens to lose nothing.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in float64; infinite where only one of both is finite."""
    difference = (actual.detach().double() - expected.detach().double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


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
