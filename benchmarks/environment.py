"""What a result depends on besides the code that is measured: device, versions, commit."""

import importlib
import platform
import subprocess
from pathlib import Path

import torch

from ddrf_fast import collect_env


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = collect_env.cpu()
    return f"{about['model']}, {about['cpus']} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Of ddrf_fast and what it runs on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("ddrf_fast", "triton"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            found[name] = "missing"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def peer_versions() -> dict[str, str]:
    """Of the libraries that peers use."""
    found = {}
    for name in ("numpy", "scipy", "cv2"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            found[name] = "missing"
    return found


def commit() -> str:
    """The short hash of HEAD, "+changes" where the tree differs from it; "unknown" outside a repository."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
