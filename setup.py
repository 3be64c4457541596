"""Builds what is compiled; everything else about the package is in ``pyproject.toml``.

Four libraries, each a file of its own beside ``ddrf_fast/__init__.py``:

* ``_C``        CPU kernels on LibTorch's stable ABI, loaded with ``torch.ops.load_library``;
* ``_C_cuda``   CUDA kernels, likewise, where CUDA is built;
* ``_schemas``  the operators' schemas for processes without Python, generated from ``ddrf_fast/ops``;
* ``_numpy``    the torch-free side for NumPy (pybind11).

Environment: ``DDRF_FAST_FORCE_CUDA``, ``DDRF_FAST_SKIP_CUDA``, ``DDRF_FAST_SKIP_CPP``, ``DDRF_FAST_DEBUG``,
``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME``, ``MAX_JOBS``; README.md says what each does.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from csrc import flags  # noqa: E402

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension
except ImportError as error:  # metadata and source distributions need no torch; compiling does, and says so
    from setuptools.command.build_ext import build_ext as BuildExtension

    torch = None
    TORCH_ERROR = error

NVCC = flags.find_nvcc()
OLDEST_TORCH = (2, 10)
MEMORY_PER_JOB = 3 << 30  # bytes; nvcc on a templated kernel takes about this much


def is_set(variable: str) -> bool:
    """Whether an environment variable is switched on (unset, empty and "0" are off)."""
    return os.environ.get(variable, "") not in ("", "0")


def stop(message: str) -> NoReturn:
    """Ends the build with a message that a reader of pip's output can act on."""
    raise SystemExit(f"\nddrf_fast: {message}\n")


class CudaPlan(NamedTuple):
    """For which architectures the CUDA kernels are compiled (none: not at all), and why."""

    architectures: list[str]
    reason: str


def cuda_problem() -> str | None:
    """Why CUDA cannot be compiled here; None if it can."""
    if torch.version.hip:
        return f"torch {torch.__version__} is built for ROCm, where the Triton kernels are used"
    if NVCC is None:
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    toolkit = flags.nvcc_version(NVCC)
    if torch.version.cuda and torch.version.cuda.split(".")[0] != toolkit.split(".")[0]:
        return f"nvcc is of CUDA {toolkit} and torch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def plan_cuda() -> CudaPlan:
    """CUDA is built where it is asked for or a GPU is visible; asked for but impossible ends the build."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    forced = is_set("DDRF_FAST_FORCE_CUDA")
    if is_set("DDRF_FAST_SKIP_CUDA"):
        if forced:
            stop("DDRF_FAST_FORCE_CUDA and DDRF_FAST_SKIP_CUDA are both set; unset one of them")
        return CudaPlan([], "DDRF_FAST_SKIP_CUDA is set")

    visible = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if forced:
        reason = "DDRF_FAST_FORCE_CUDA is set"
    elif listed:
        reason = "TORCH_CUDA_ARCH_LIST is set"
    elif visible:
        reason = "a GPU is visible"
    else:
        return CudaPlan([], "no GPU is visible; to build without one, set DDRF_FAST_FORCE_CUDA=1")

    problem = cuda_problem()
    if problem and (forced or listed):
        stop(f"{reason}, but {problem}; or set DDRF_FAST_SKIP_CUDA=1 to go without the compiled CUDA kernels")
    if problem:
        return CudaPlan([], f"{reason}, but {problem}")
    if listed and listed != "native":
        try:
            return CudaPlan(flags.parse_architectures(listed), reason)
        except ValueError as error:
            stop(str(error))
    if visible:
        *others, newest = (f"{major}.{minor}" for major, minor in sorted(set(visible)))
        return CudaPlan([*others, f"{newest}+PTX"], reason)
    return CudaPlan(flags.DEFAULT_ARCHITECTURES, reason)


def default_jobs() -> int:
    """Compiler processes at a time: one for each CPU that we may use, fewer where memory is short."""
    meminfo = Path("/proc/meminfo").read_text()
    available = [1024 * int(number) for number in re.findall(r"MemAvailable:\s+(\d+) kB", meminfo)]
    cgroup = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" where there is none
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        available.append(limit - used)
    return max(1, min([len(os.sched_getaffinity(0)), *(memory // MEMORY_PER_JOB for memory in available)]))


def read_schemas() -> list[str]:
    """The ``SCHEMAS`` literals of ``ddrf_fast/ops/*.py``, read without importing anything."""
    schemas: list[str] = []
    for path in sorted((ROOT / "ddrf_fast" / "ops").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == "SCHEMAS" for target in targets):
                schemas.extend(ast.literal_eval(node.value))
    return schemas


def write_schemas(folder: Path) -> str:
    """Writes the C++ registration of the schemas into ``folder``; returns its path for setuptools."""
    definitions = "\n".join(f'  m.def(R"({schema})");' for schema in read_schemas())
    code = (
        "// Generated by setup.py from the SCHEMAS in ddrf_fast/ops, for processes without Python.\n"
        "#include <torch/csrc/stable/library.h>\n\n"
        f"STABLE_TORCH_LIBRARY(ddrf_fast, m) {{\n{definitions}\n}}\n"
    )
    path = folder / "schemas.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != code:  # an old time stamp is kept: nothing to compile again
        path.write_text(code)
    return os.path.relpath(path, ROOT)


def pybind11_include() -> str:
    """The headers of pybind11, or torch's copy: without build isolation it need not be installed."""
    try:
        import pybind11
    except ImportError:
        return os.path.join(os.path.dirname(torch.__file__), "include")
    return pybind11.get_include()


def extensions(cuda: CudaPlan) -> list[Extension]:
    """The libraries to compile, each with its flags."""
    debug = is_set("DDRF_FAST_DEBUG")
    torch_include = os.path.join(os.path.dirname(torch.__file__), "include")
    stable = [*flags.stable_flags(), *flags.include_flags(torch_include)]
    compile_args = {
        "cxx": [*flags.cxx_flags(debug), *stable],
        "nvcc": [*flags.nvcc_flags(cuda.architectures, debug), *stable],
    }
    link_args = [*flags.link_flags(debug), *flags.torch_link_flags(cpp_extension.TORCH_LIB_PATH)]

    def on_stable_abi(name: str, sources: list[str], link_more: Sequence[str] = ()) -> Extension:
        return Extension(
            name,
            sources,
            extra_compile_args=compile_args,
            extra_link_args=[*link_args, *link_more],
            py_limited_api=True,
        )

    result = [
        on_stable_abi("ddrf_fast._C", flags.sources("cpu", ".cpp")),
        on_stable_abi("ddrf_fast._schemas", [write_schemas(ROOT / "build")]),
        Extension(
            "ddrf_fast._numpy",
            flags.sources("python", ".cpp"),
            extra_compile_args=flags.cxx_flags(debug) + flags.include_flags(pybind11_include()),
            extra_link_args=flags.link_flags(debug),
        ),
    ]
    if cuda.architectures:
        root = flags.cuda_root(NVCC)
        cpp_extension.CUDA_HOME = str(root)  # torch's guess fails for a wrapper script and with a CPU torch
        cuda_sources = flags.sources("cuda", ".cu")
        result.append(on_stable_abi("ddrf_fast._C_cuda", cuda_sources, flags.cuda_link_flags(root)))
    for extension in result:
        extension.language = "c++"
    return [extension for extension in result if extension.sources]


class BuildNative(BuildExtension):
    """Prints what is built, compiles it, and leaves a record of it for ``ddrf_fast.collect_env``."""

    def run(self) -> None:
        if torch is None:
            stop(
                f"torch is needed to compile and could not be imported ({TORCH_ERROR}). Let pip fetch it "
                "(leave --no-build-isolation out), install torch first, or compile nothing: "
                "DDRF_FAST_SKIP_CPP=1"
            )
        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
            stop(f"torch {torch.__version__} is too old to compile against; 2.10 or newer is needed")
        os.environ.setdefault("MAX_JOBS", str(default_jobs()))
        record = {
            "torch": torch.__version__,
            "libraries": [extension.name for extension in self.extensions],
            "cuda": CUDA.architectures,
            "cuda_reason": CUDA.reason,
            "nvcc": flags.nvcc_version(NVCC) if NVCC else None,
            "debug": is_set("DDRF_FAST_DEBUG"),
        }
        print("ddrf_fast build configuration")
        for key, value in {**record, "jobs": os.environ["MAX_JOBS"]}.items():
            text = " ".join(value) if isinstance(value, list) else value
            print(f"  {key.replace('_', ' '):<12} {text or 'no'}", flush=True)
        super().run()
        package = ROOT / "ddrf_fast" if self.inplace else Path(self.build_lib) / "ddrf_fast"
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")


if is_set("DDRF_FAST_SKIP_CPP"):
    EXTENSIONS = []
elif torch is None:
    EXTENSIONS = [Extension("ddrf_fast._C", flags.sources("cpu", ".cpp"))]  # BuildNative stops before it
else:
    CUDA = plan_cuda()
    EXTENSIONS = extensions(CUDA)

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildNative})
