"""What an installation promises: light imports, every file shipped, libraries that need what they say."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import ddrf_fast
from csrc import flags
from ddrf_fast.data import read_image
from ddrf_fast.ops import _native

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in an environment without the variables that steer a build."""
    steering = re.compile(r"DDRF_FAST_(FORCE|SKIP|DEBUG)\w*|TORCH_CUDA_ARCH_LIST|CUDA_(HOME|PATH)|MAX_JOBS")
    inherited = {name: value for name, value in os.environ.items() if not steering.fullmatch(name)}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a fresh Python prints that runs `code`; fails the test where it fails."""
    result = run(sys.executable, "-c", code, cwd=cwd, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def library(name: str) -> Path:
    """The compiled library `name`."""
    path = _native.find(name)
    assert path is not None, f"{name} is not compiled; `make test` compiles it"
    return path


@pytest.mark.slow
def test_the_sample_pair_is_what_its_program_renders(tmp_path):
    result = run(sys.executable, "docs/render_sample.py", tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("sample_visible.png", "sample_infrared.png"):
        rendered, shipped = (read_image(folder / name) for folder in (tmp_path, ROOT / "ddrf_fast/assets"))
        assert np.abs(rendered.astype(int) - shipped).max() <= 1  # another OpenCV may round otherwise


def test_import_is_light():
    heavy = ("torch", "triton", "numpy", "cv2", "lightning")
    loaded = python(
        f"import sys, ddrf_fast, ddrf_fast.kernels; print([m for m in {heavy} if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_help_needs_no_torch():
    hide = "import sys; sys.modules.update(torch=None, triton=None, numpy=None, cv2=None);"
    result = run(
        sys.executable,
        "-c",
        f"{hide} sys.argv = ['ddrf-fast', '--help']; import ddrf_fast.cli as c; c.main()",
    )
    assert result.returncode == 0, result.stderr
    assert "fuse" in result.stdout


def test_installed_metadata_fits_the_package():
    assert importlib.metadata.version("ddrf-fast") == ddrf_fast.__version__
    scripts = importlib.metadata.distribution("ddrf-fast").entry_points.select(group="console_scripts")
    assert [(script.name, script.value) for script in scripts] == [("ddrf-fast", "ddrf_fast.cli:main")]


def test_collect_env_says_what_is_loaded():
    result = run(sys.executable, "-m", "ddrf_fast.collect_env")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^  _C +loaded: _C\.", result.stdout, re.MULTILINE), result.stdout
    assert re.search(r"^  _numpy +loaded: _numpy\.", result.stdout, re.MULTILINE), result.stdout
    assert re.search(
        r"^  kernels run with +(default|avx2|avx512|avx512_bf16|amx_bf16)$", result.stdout, re.MULTILINE
    )
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", result.stdout, re.MULTILINE), (
        result.stdout
    )


def undefined_symbols(path: Path) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    return [line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).stdout.splitlines()]


# Of the C and C++ run time: versioned, or in namespace std (without a version where libtorch exports it too).
RUNTIME = re.compile(
    r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_.+|_Z(T[ISV])?(N[KRVO]*)?S[tosiad].*|_ITM_.+|__gmon_start__"
)
STABLE_ABI = re.compile(r"aoti_\w+|torch_\w+")


@pytest.mark.parametrize("name", ["_C", "_schemas"])
def test_stable_libraries_use_the_stable_abi_only(name: str):
    symbols = undefined_symbols(library(name))
    assert any(STABLE_ABI.fullmatch(symbol) for symbol in symbols)
    foreign = [s for s in symbols if not STABLE_ABI.fullmatch(s) and not RUNTIME.fullmatch(s)]
    assert not foreign


def test_numpy_library_is_torch_free():
    foreign = [symbol for symbol in undefined_symbols(library("_numpy")) if not RUNTIME.fullmatch(symbol)]
    assert [symbol for symbol in foreign if not re.fullmatch(r"_?Py\w+", symbol)] == []


LIST_AND_CONVOLVE = """
import json
names = torch._C._dispatch_get_all_op_names()
names = {name.split(".")[0] for name in names if name.startswith("ddrf_fast::")}
print(json.dumps({name: str(getattr(torch.ops.ddrf_fast, name[11:]).default._schema) for name in names}))
x, weight = torch.arange(32.0).view(1, 2, 4, 4), torch.arange(54.0).view(1, 3, 2, 3, 3)
geometry = [1, 1], [1, 1], [1, 1], 1, "none"
print(torch.ops.ddrf_fast.dynamic_conv(x, weight, *[None] * 6, *geometry).tolist())
"""


def test_schemas_for_processes_without_python_are_those_of_python():
    from_python = python("import torch, ddrf_fast.ops" + LIST_AND_CONVOLVE).splitlines()
    load = "".join(f"\ntorch.ops.load_library({str(library(name))!r})" for name in ("_schemas", "_C"))
    from_cpp = python("import torch" + load + LIST_AND_CONVOLVE).splitlines()
    schemas = json.loads(from_python[0])
    assert {"ddrf_fast::dynamic_conv", "ddrf_fast::degrade", "ddrf_fast::degrade_backward"} <= set(schemas)
    assert json.loads(from_cpp[0]) == schemas
    assert from_cpp[1] == from_python[1]  # and the kernels register under them


def test_cpu_kernels_use_more_than_one_thread():
    # A parallel loop without a thread pool behind it runs on one thread and says nothing: look at who worked.
    code = """
import glob, time, torch
import ddrf_fast.ops
torch.set_num_threads(2)
x, weight = torch.rand(8, 16, 64, 64), torch.rand(8, 16, 16, 3, 3)
geometry = [1, 1], [1, 1], [1, 1], 1, "none"
end = time.process_time() + 1
while time.process_time() < end:
    torch.ops.ddrf_fast.dynamic_conv(x, weight, *[None] * 6, *geometry)
stats = [open(path).read().rsplit(")", 1)[1].split() for path in glob.glob("/proc/self/task/*/stat")]
print(sum(int(stat[11]) + int(stat[12]) > 20 for stat in stats))  # user and system time, in 1/100 s
"""
    assert int(python(code, OMP_WAIT_POLICY="passive")) >= 2


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    result = run(sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder)
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build_wheel(source: Path, folder: Path, **environment: str) -> Path:
    arguments = [
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        folder,
        source,
    ]
    result = run(sys.executable, *arguments, cwd=folder, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def files(root: Path, *patterns: str) -> set[str]:
    """Files under `root`, relative to it, without caches and compiled ones."""
    found = (path for pattern in patterns for path in root.glob(pattern) if path.is_file())
    return {str(path.relative_to(root)) for path in found if path.suffix not in (".pyc", ".so")}


def test_source_distribution_is_complete(source_distribution: Path):
    patterns = (
        "ddrf_fast/**/*.py",
        "ddrf_fast/assets/*",
        "csrc/**/*",
        "kernels/**/*",
        "*.toml",
        "*.py",
        "LICENSE",
    )
    expected = files(ROOT, *patterns)
    assert {"csrc/flags.py", "csrc/cpu/dynamic_conv.cpp", "kernels/dynamic_conv.py"} <= expected
    assert expected - files(source_distribution, "**/*") == set()
    assert not files(source_distribution, "build/**/*", "**/_build.json")


def test_wheel_has_kernels_and_data(source_distribution: Path, tmp_path: Path):
    site = build_wheel(source_distribution, tmp_path, DDRF_FAST_SKIP_CPP="1")
    expected = files(ROOT, "ddrf_fast/**/*.py", "ddrf_fast/assets/*", "ddrf_fast/py.typed")
    expected |= files(ROOT, "ddrf_fast/training/presets/*.yaml")
    expected |= {f"ddrf_fast/{name}" for name in files(ROOT, "kernels/*.py")}
    assert files(site, "ddrf_fast/**/*") == expected
    assert not [
        path.name for path in site.iterdir() if path.name in ("kernels", "csrc", "tests", "benchmarks")
    ]
    # The folder itself takes the place of the shim that finds it in a clone.
    assert (site / "ddrf_fast/kernels/__init__.py").read_text() == (ROOT / "kernels/__init__.py").read_text()
    where = "import ddrf_fast.kernels.dynamic_conv as module; print(module.__file__)"
    assert Path(python(where, cwd=tmp_path, PYTHONPATH=str(site)).strip()).is_relative_to(site)


@pytest.mark.slow
def test_wheel_compiles_from_the_source_distribution(source_distribution: Path, tmp_path: Path):
    site = build_wheel(source_distribution, tmp_path, DDRF_FAST_DEBUG="1", DDRF_FAST_SKIP_CUDA="1")
    code = "import ddrf_fast._numpy; from ddrf_fast.ops import _native; print(_native.status()['_C'])"
    printed = python(code, cwd=tmp_path, PYTHONPATH=str(site))
    assert printed.startswith("(True,")
    record = json.loads((site / "ddrf_fast/_build.json").read_text())
    assert record["debug"]
    assert record["cuda_reason"] == "DDRF_FAST_SKIP_CUDA is set"


def test_architectures():
    assert flags.parse_architectures("8.0 9.0a;12.0+PTX") == ["8.0", "9.0a", "12.0+PTX"]
    assert flags.gencode_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    for wrong in ("", "sm_90", "9.0;ampere"):
        with pytest.raises(ValueError, match="is not an architecture"):
            flags.parse_architectures(wrong)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DDRF_FAST_FORCE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "FORCE_CUDA is set, but nvcc was not found"),
        (
            {"TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": "/nowhere"},
            "ARCH_LIST is set, but nvcc was not found",
        ),
        ({"DDRF_FAST_FORCE_CUDA": "1", "DDRF_FAST_SKIP_CUDA": "1"}, "are both set"),
    ],
)
def test_a_build_asked_for_that_is_impossible_fails(environment: dict[str, str], message: str):
    result = run(sys.executable, "setup.py", "--version", **environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_build_without_nvcc_goes_without_cuda():
    result = run(sys.executable, "setup.py", "--version", CUDA_HOME="/nowhere")
    assert (result.returncode, result.stdout.split()) == (0, [ddrf_fast.__version__])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_make_gpu_says_that_there_is_no_gpu(tmp_path: Path):
    result = run("bash", "benchmarks/gpu.sh", PYTHON=sys.executable, OUT=str(tmp_path))
    assert result.returncode != 0
    assert "sees no CUDA device" in result.stderr
    assert not list(tmp_path.iterdir())


README_EXAMPLES = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize("number", range(len(README_EXAMPLES)))
def test_examples_of_the_readme_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(README_EXAMPLES[number], f"README.md, example {number + 1}", "exec"), {})
