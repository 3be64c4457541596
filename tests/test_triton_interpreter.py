"""The Triton kernels in Triton's interpreter, on CPU tensors, against plain torch in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_cases import TINY

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize("prefix", ["conv", "route", "degrade", "tune"])
def test_tiny_calls(prefix: str) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
    }
    run = subprocess.run(
        [sys.executable, "-m", "triton_checks", prefix],
        capture_output=True, text=True, cwd=TESTS, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok:") == max(1, sum(name.startswith(prefix) for name in TINY))
