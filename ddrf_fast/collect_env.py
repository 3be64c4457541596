"""Says what is installed, what is compiled, what the machine has, and why something is missing.

    python -m ddrf_fast.collect_env

prints it; its output belongs into a bug report.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import ddrf_fast

PACKAGE = Path(__file__).resolve().parent
VARIABLES = re.compile(r"DDRF_FAST_\w+|TRITON_INTERPRET|CUDA_VISIBLE_DEVICES|(OMP|MKL)_NUM_THREADS")
# Instruction sets that the kernels here, or those of oneDNN under torch, choose between.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16")


def versions() -> dict[str, str]:
    """Of this package, of Python, and of what it stands on."""
    result = {
        "ddrf_fast": f"{ddrf_fast.__version__} ({PACKAGE})",
        "python": f"{platform.python_version()} ({platform.platform()})",
    }
    for name in ("torch", "triton", "numpy", "opencv-python-headless", "safetensors", "lightning"):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


def build_record() -> dict[str, object]:
    """What the build left about itself; empty where nothing was compiled."""
    path = PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def compiled() -> dict[str, str]:
    """Of each compiled library: whether it is loaded, and if not, why."""
    record = build_record()
    result = {"built": "no; reinstall with a C++ compiler"}
    if record:
        result["built"] = f"with torch {record['torch']}" + (", for debugging" if record["debug"] else "")
    try:
        from ddrf_fast.ops import _native
    except Exception as error:  # whatever is wrong, the report is what shows it
        return result | {"operators": f"not available: {type(error).__name__}: {error}"}
    for name, (loaded, detail) in _native.status().items():
        result[name] = f"loaded: {detail}" if loaded else f"not loaded: {detail}"
    if record and not record["cuda"]:
        result["_C_cuda"] = f"not built: {record['cuda_reason']}"
    schemas = _native.find("_schemas")
    result["_schemas"] = f"built: {schemas.name}" if schemas else "not built"
    try:
        module = importlib.import_module("ddrf_fast._numpy")
        result["_numpy"] = f"loaded: {Path(str(module.__file__)).name}"
    except ImportError as error:
        result["_numpy"] = f"not loaded: {error}"
    return result


def cpu() -> dict[str, str]:
    """Model, instruction sets and threads."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    result = {
        "model": model.group(1) if model else platform.processor() or platform.machine(),
        "features": " ".join(feature for feature in CPU_FEATURES if feature in present) or "unknown",
        "cpus": str(os.cpu_count()),
    }
    if importlib.util.find_spec("torch"):
        import torch

        result["torch threads"] = str(torch.get_num_threads())
        try:
            from ddrf_fast.ops import _native

            result["kernels run with"] = _native.cpu_capability()
        except Exception as error:  # as in `compiled`
            result["kernels run with"] = f"not available: {type(error).__name__}: {error}"
    return result


def gpu() -> dict[str, str]:
    """The visible devices and the CUDA compiler, or why there are none."""
    nvcc = shutil.which("nvcc")
    result = {"nvcc": "not on PATH"}
    if nvcc:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\S+),", answer)
        result["nvcc"] = f"{release.group(1) if release else 'of unknown version'} ({nvcc})"
    if not importlib.util.find_spec("torch"):
        return {"devices": "unknown: torch is not installed"} | result
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return {"devices": f"none: torch {torch.__version__} is built for CPUs only"} | result
    if not torch.cuda.is_available():
        return {"devices": "none: torch sees no GPU or no driver for it"} | result
    devices = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        devices[f"device {index}"] = f"{about.name}, sm_{about.major}{about.minor}, {memory:.0f} GiB"
    return devices | {"CUDA of torch": str(torch.version.cuda or torch.version.hip)} | result


def report() -> str:
    """The whole report as text.

    Example:
        >>> from ddrf_fast import collect_env
        >>> print(collect_env.report())
        versions
          ddrf_fast                ...
        ...
    """
    sections = {
        "versions": versions(),
        "compiled libraries": compiled(),
        "processor": cpu(),
        "GPU": gpu(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)
        },
    }
    lines = []
    for title, entries in sections.items():
        lines.append(title)
        lines += [f"  {name:<24} {value}" for name, value in entries.items()] or ["  none set"]
    return "\n".join(lines)


def main() -> None:
    """Prints the report."""
    print(report())


if __name__ == "__main__":
    main()
