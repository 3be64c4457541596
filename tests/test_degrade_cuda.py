"""The CUDA kernels of degrade: their arithmetic on the CPU, their compilation by nvcc, and on a GPU.

tests/cuda_on_cpu runs the device code as it stands with a host compiler, thread by thread; it finds wrong
indices, missing barriers and overrun shared memory wherever there is a C++ compiler, but not what only a GPU
does.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from degrade_oracle import Case, definition, gradients, make
from helpers import assert_accurate

from ddrf_fast.ops import _native
from ddrf_fast.ops import degrade as _schemas  # noqa: F401  defines the operators

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from csrc import flags  # noqa: E402

SOURCE = ROOT / "csrc" / "cuda" / "degrade.cu"
TORCH = Path(torch.__file__).parent
WEIGHTS_AT = ("sample", "image", "output", "grid")
NAMES = ("image", "kernels", "weights", "noise_std")

OP = torch.ops.ddrf_fast_native.degrade.default
BACKWARD = torch.ops.ddrf_fast_native.degrade_backward.default


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Forward and all gradients in `dtype` against the definition in float64."""
    wide = case.to(dtype=dtype).to(dtype=torch.float64)
    torch_dtype = dtype if dtype == torch.float64 else torch.float32
    torch_case, low = wide.to(dtype=torch_dtype), case.to(dtype=dtype).on(device)
    out = low.forward(OP)
    assert_accurate(out.cpu(), definition(wide), definition(torch_case).to(dtype), name="out")

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    actual = low.backward(BACKWARD, grad.to(device))
    expected, by_torch = gradients(wide, grad.double()), gradients(torch_case, grad.to(torch_dtype))
    for name, value, reference, torch_value in zip(NAMES, actual, expected, by_torch, strict=False):
        assert_accurate(value.cpu(), reference, torch_value.to(dtype), name=f"gradient of {name}")


def cases() -> list[Case]:
    """Every padding, form of the weights and scale; ragged tiles, several chunks of channels and kernels."""
    result = []
    for i, weights_at in enumerate(WEIGHTS_AT):
        for j, padding in enumerate(("reflect", "replicate", "circular", "zeros")):
            number = 4 * i + j
            result.append(
                make(
                    1 + j % 2,
                    (1, 3, 5)[number % 3],
                    (19, 37 + j),
                    (1, 3, 17)[(i + j) % 3],
                    (7, 1, 5, 9)[j],
                    weights_at=weights_at,
                    padding=padding,
                    scale=1 + (i + j) % 4,
                    offset=j % 2,
                    per_sample=number % 3 == 0,
                    noise=(None, "number", "map")[number % 3],
                    correlation=i == 1,
                )
            )
    return result


CASES = cases()
CASE_NAMES = [f"{case.weights_at}-{case.padding}-{case.scale}" for case in CASES]


# ---- The device code on the CPU


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """Registers the CUDA operators, compiled for the host, for CPU tensors."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "degrade.so"
    command = [
        compiler,
        "-x",
        "c++",
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-Wno-unknown-pragmas",
        "-fvisibility=hidden",
    ]
    command += [
        f"-I{Path(__file__).parent / 'cuda_on_cpu'}",
        *flags.include_flags(TORCH / "include"),
        *flags.stable_flags(),
    ]
    command += [str(SOURCE), "-o", str(library), f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)


@pytest.fixture(params=[227 << 10, 56 << 10, 0], ids=["large", "small", "none"])
def shared_memory(request, monkeypatch):
    """How much shared memory the emulated device has, which decides between three ways to compute."""
    monkeypatch.setenv("DDRF_FAST_TEST_SHARED", str(request.param))


def check_shot_noise(dtype: torch.dtype, device: str) -> None:
    """The forward alone: its gradients are composed in Python."""
    case = make(3, 3, size=(9, 21), weights_at="grid", noise="map", scale=2)
    case.image -= 0.3
    case.shot_noise = torch.tensor([0.0, 0.02, 0.5], dtype=torch.float64)
    wide, low = case.to(dtype=dtype).to(dtype=torch.float64), case.to(dtype=dtype).on(device)
    assert_accurate(low.forward(OP).cpu(), definition(wide), floor=1e-5 if dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shot_noise_on_the_cpu(dtype, emulator, shared_memory):
    check_shot_noise(dtype, "cpu")


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_device_code_on_the_cpu(case, emulator, shared_memory):
    check(case, torch.float64, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_at", ["sample", "grid"])
def test_short_dtypes_on_the_cpu(weights_at, dtype, emulator):
    check(make(size=(9, 35), kernel=5, scale=2, weights_at=weights_at, noise="map"), dtype, "cpu")


def check_integers(device: str) -> None:
    for weights_at in ("sample", "grid"):
        case = make(2, 3, size=(9, 35), kernel=5, scale=2, weights_at=weights_at)
        for integers in (torch.uint8, torch.uint16):
            largest = torch.iinfo(integers).max
            image = (case.image * largest).round().to(torch.int32)
            floats = case.replace(image=image / torch.tensor(largest, dtype=torch.float64)).on(device)
            of_integers = case.replace(image=image.to(integers)).on(device)
            grad = torch.randn(2, 3, 5, 18, dtype=torch.float64, device=device)
            assert_accurate(of_integers.forward(OP).cpu(), floats.forward(OP).cpu())
            pairs = zip(
                of_integers.backward(BACKWARD, grad, 6), floats.backward(BACKWARD, grad, 6), strict=True
            )
            for value, expected in pairs:
                assert_accurate(value.cpu().double(), expected.cpu())


def test_integers_on_the_cpu(emulator, shared_memory):
    check_integers("cpu")


def assert_layouts_and_edges(device: str) -> None:
    case = make(2, 5, size=(8, 10), weights_at="output", noise="map").to(dtype=torch.float32).on(device)
    grad = torch.randn(2, 5, 8, 10, device=device)
    out, grads = case.forward(OP), case.backward(BACKWARD, grad)
    last = case.replace(image=case.image.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last.forward(OP), out)
    assert last.forward(OP).stride() == last.image.stride()
    last_grads = last.backward(BACKWARD, grad.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))
    assert last_grads[0].stride() == last.image.stride()
    for mask in range(16):
        for i, g in enumerate(case.backward(BACKWARD, grad, mask)):
            if mask >> i & 1:
                assert torch.equal(g, grads[i])
                assert torch.equal(g, last_grads[i])
            else:
                assert g.shape == (0,)
    empty = make(0, 3, size=(8, 10), noise="number").on(device)
    assert empty.forward(OP).shape == (0, 3, 8, 10)
    grads = empty.backward(BACKWARD, empty.forward(OP))
    assert [g.shape for g in grads] == [t.shape for t in empty.tensors]
    assert not grads[1].any()


def test_layouts_and_edges_on_the_cpu(emulator):
    assert_layouts_and_edges("cpu")


@pytest.mark.parametrize("weights_at", ["sample", "output"])
def test_blocks_with_several_tiles_on_the_cpu(weights_at, emulator):
    """More samples than the backward pass has blocks: each then walks over the tiles of one sample."""
    case = make(520, 1, size=(9, 33), bank=1, kernel=1, weights_at=weights_at)
    grad = torch.randn(520, 1, 9, 33, dtype=torch.float64)
    for value, expected in zip(case.backward(BACKWARD, grad, 6)[1:3], gradients(case, grad)[1:], strict=True):
        assert_accurate(value, expected)


def test_bad_arguments_are_refused(emulator):
    case = make().replace(weights=torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="weights: expected shape"):
        case.forward(OP)


# ---- Compiled for GPUs


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of spills of each kernel, from `-Xptxas -v`."""
    pattern = (
        r"Compiling entry function '(\S+)' for '\S+'\n.*\n\s+\d+ bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\nptxas info\s+: Used (\d+) registers"
    )
    return {
        name: (int(regs), int(stores) + int(loads)) for name, stores, loads, regs in re.findall(pattern, log)
    }


@pytest.mark.slow
@pytest.mark.skipif(flags.find_nvcc() is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("architecture", ["8.0", "9.0"])
def test_compiles_within_its_budget(architecture, tmp_path):
    """Three blocks of 128 threads fit a multiprocessor's registers, and nothing spills."""
    command = [flags.find_nvcc(), *flags.nvcc_flags([architecture]), *flags.stable_flags()]
    command += [
        *flags.include_flags(TORCH / "include"),
        "-Xptxas",
        "-v",
        "-c",
        str(SOURCE),
        "-o",
        str(tmp_path / "degrade.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = resources(done.stdout + done.stderr)
    for kernel in ("forward_kernel", "product_kernel", "gather_kernel", "fold_kernel", "noise_kernel"):
        assert any(kernel in name for name in used), f"{kernel} is missing"
    assert {name: use for name, use in used.items() if use[0] > 168 or use[1] > 0} == {}


# ---- On a GPU


@pytest.fixture
def cuda_library():
    if not _native.status()["_C_cuda"][0]:
        pytest.skip(_native.status()["_C_cuda"][1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_on_a_gpu(case, dtype, cuda_library):
    check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("kernel", [25, 41])
def test_large_tiles_on_a_gpu(kernel, scale, weights_at, cuda_library):
    """Shared memory beyond 48 KiB, and beyond what a block may have (k = 41 at scale 4 in float64)."""
    case = make(2, 3, size=(70, 90), bank=12, kernel=kernel, scale=scale, weights_at=weights_at)
    for dtype in (torch.float32, torch.float64):
        check(case, dtype, "cuda")


@pytest.mark.gpu
def test_integers_on_a_gpu(cuda_library):
    check_integers("cuda")


@pytest.mark.gpu
def test_layouts_and_edges_on_a_gpu(cuda_library):
    assert_layouts_and_edges("cuda")


@pytest.mark.gpu
def test_noise_on_a_gpu_is_that_of_the_cpu(cuda_library):
    case = make(2, 3, size=(20, 40), noise="number").to(dtype=torch.float64)
    torch.testing.assert_close(
        case.on("cuda").forward(OP).cpu(),
        case.forward(torch.ops.ddrf_fast.degrade.default),
        rtol=0,
        atol=1e-13,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shot_noise_on_a_gpu(dtype, cuda_library):
    check_shot_noise(dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_two_runs_on_a_gpu_have_the_same_bits(weights_at, cuda_library):
    case = (
        make(3, 3, size=(60, 70), kernel=9, weights_at=weights_at, noise="number")
        .to(dtype=torch.float32)
        .on("cuda")
    )
    grad = torch.randn(3, 3, 60, 70, device="cuda")
    first, second = ([case.forward(OP), *case.backward(BACKWARD, grad)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_the_current_stream_and_device_are_used(cuda_library):
    case = make(1, 1, size=(200, 200), bank=1, kernel=25).to(dtype=torch.float32).on("cuda")
    expected = case.forward(OP)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the image below is not there before this ends
        image = case.image.clone()
        out = case.replace(image=image).forward(OP)
    stream.synchronize()
    assert torch.equal(out, expected)
    last = f"cuda:{torch.cuda.device_count() - 1}"
    moved = case.on(last).forward(OP)
    assert moved.device == torch.device(last)
    assert torch.equal(moved.cpu(), expected.cpu())
