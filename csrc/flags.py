"""Compiler flags, toolkit paths and source lists of everything compiled here: the one place for them.

Used by ``setup.py`` for the build and by the tests that compile single files (``nvcc -c`` needs no GPU).
Imports nothing but the standard library; whoever has torch passes the folder of its headers in.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

CSRC = Path(__file__).resolve().parent

#: The oldest libtorch that the compiled libraries load in: 2.10, the first with a stable ``parallel_for``.
TORCH_TARGET_VERSION = "0x020a000000000000"

#: What is compiled when CUDA is asked for without a list of architectures and without a visible GPU.
DEFAULT_ARCHITECTURES = ["8.0", "9.0+PTX"]

# Every library is reached through the dispatcher or PyInit alone, so nothing else needs to be visible.
_VISIBILITY = ["-fvisibility=hidden"]


def sources(folder: str, suffix: str) -> list[str]:
    """Source files of ``csrc/<folder>``, sorted, relative to the repository (what setuptools asks for)."""
    return sorted(str(path.relative_to(CSRC.parent)) for path in (CSRC / folder).glob(f"*{suffix}"))


def include_flags(*libraries: str | os.PathLike[str]) -> list[str]:
    """``csrc`` itself, and the headers of others as system headers, so that their warnings are not ours."""
    return [f"-I{CSRC}", *(flag for library in libraries for flag in ("-isystem", os.fspath(library)))]


def stable_flags() -> list[str]:
    """What makes a file depend on LibTorch's stable ABI only."""
    return [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]


def cxx_flags(debug: bool = False) -> list[str]:
    """Flags of every C++ file.

    No ``-march=native`` (the CPU is chosen at run time) and no ``-ffast-math`` (NaN and infinity keep their
    meaning); ``-fno-math-errno`` because nobody reads the errno of a square root, which would keep loops from
    being vectorised. Contraction to FMA is asked for because ``-std=c++20`` switches gcc's default off. No
    ``-fopenmp``: threads come from libtorch through ``torch::stable::parallel_for``, and a second OpenMP
    runtime beside it would do harm; ``-fopenmp-simd`` is the part that needs no runtime.
    """
    optimisation = ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3", "-g0", "-DNDEBUG"]
    code = ["-std=c++20", *optimisation, "-ffp-contract=fast", "-fno-math-errno", "-fopenmp-simd", "-pthread"]
    # gcc takes the deliberately undefined registers of its own AVX-512 header for a mistake of ours.
    warnings = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
    return [*code, *warnings, *_VISIBILITY]


def nvcc_flags(architectures: Iterable[str], debug: bool = False) -> list[str]:
    """Flags of every CUDA file, for architectures such as ``["8.0", "9.0+PTX"]``.

    ``USE_CUDA`` opens the stream functions of the stable ABI. The five that follow are those that torch's own
    build command adds, written out so that a file compiled alone in a test is the file that is built.
    """
    return [
        "-std=c++20",
        "-O3",
        "-DUSE_CUDA",
        "-D__CUDA_NO_HALF_OPERATORS__",
        "-D__CUDA_NO_HALF_CONVERSIONS__",
        "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
        "-D__CUDA_NO_HALF2_OPERATORS__",
        "--expt-relaxed-constexpr",
        "-lineinfo",
        "-g" if debug else "-DNDEBUG",
        "-Xcompiler",
        ",".join(["-fPIC", *_VISIBILITY]),
        *gencode_flags(architectures),
    ]


def link_flags(debug: bool = False) -> list[str]:
    """Flags of every link."""
    return ["-pthread", *([] if debug else ["-Wl,--strip-all"])]


def torch_link_flags(torch_lib: str | os.PathLike[str]) -> list[str]:
    """Links libtorch, which the process has loaded before.

    ``libtorch.so`` defines nothing itself and is kept all the same: it is what brings ``libtorch_cuda`` in,
    without our naming that (a torch for the CPU alone has none).
    """
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    return ["-Wl,--no-as-needed", f"-L{os.fspath(torch_lib)}", *libraries, "-Wl,--as-needed"]


def cuda_link_flags(root: Path) -> list[str]:
    """Links the runtime of the CUDA toolkit ``root``, statically: torch may bring another ``libcudart``."""
    folders = [path for path in (root / "lib64", root / "lib", *root.glob("targets/*/lib")) if path.is_dir()]
    return [*(f"-L{path}" for path in folders), "-lcudart_static", "-lrt", "-ldl"]


def parse_architectures(text: str) -> list[str]:
    """Splits ``TORCH_CUDA_ARCH_LIST``: ``"8.0 9.0a;12.0+PTX"`` -> ``["8.0", "9.0a", "12.0+PTX"]``.

    Raises:
        ValueError: The list is empty or holds something that is not an architecture.
    """
    architectures = re.split(r"[;,\s]+", text.strip("; ,\t\n"))
    for architecture in architectures:
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", architecture):
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: {architecture!r} in {text!r} is not an architecture; "
                "expected numbers such as '8.0;9.0+PTX'"
            )
    return architectures


def gencode_flags(architectures: Iterable[str]) -> list[str]:
    """``-gencode`` for machine code of each architecture, and for PTX where ``+PTX`` asks for it."""
    result = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        result.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            result.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return result


def find_nvcc() -> str | None:
    """The CUDA compiler: of ``CUDA_HOME`` if that is set, else of ``PATH``, else of the usual folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_root(nvcc: str) -> Path:
    """The toolkit that ``nvcc`` belongs to, as it says itself: on ``PATH`` may be a link or a script."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", answer, re.MULTILINE)
    return Path(top.group(1).strip() if top else Path(nvcc).resolve().parents[1]).resolve()


def nvcc_version(nvcc: str) -> str:
    """Version of ``nvcc``, such as ``"13.0"``; ``"unknown"`` where it does not say."""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", answer)
    return release.group(1) if release else "unknown"
