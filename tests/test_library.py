"""What holds for every operation in torch: opcheck, torch.func, autocast, compile, export, no Python."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import compile_against_torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import ddrf_fast
from ddrf_fast.ops import _native

B, C, O, N, D, M = 2, 4, 6, 3, 2, 3


def conv_inputs(dtype=torch.float32, channels_last=False, batch=B) -> dict[str, Tensor]:
    shapes = {
        "x": (batch, C, 7, 10),
        "weight": (N, O, C + D, 3, 3),
        "attention": (batch, N),
        "bias": (N, O),
        "code": (batch, D),
        "in_scale": (batch, C),
        "out_scale": (batch, O),
        "tap_scale": (batch, 3, 3),
    }
    named = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    if channels_last:
        named["x"] = named["x"].contiguous(memory_format=torch.channels_last)
    return named


def degrade_inputs(dtype=torch.float32, channels_last=False, batch=B) -> dict[str, Tensor]:
    named = {
        "image": torch.rand(batch, 3, 8, 9, dtype=dtype),
        "kernels": torch.rand(M, 3, 3, dtype=dtype),
        "weights": torch.rand(batch, M, 8, 9, dtype=dtype),
        "noise_std": torch.rand(batch, dtype=dtype),
    }
    if channels_last:
        named["image"] = named["image"].contiguous(memory_format=torch.channels_last)
    return named


def conv(**named: Tensor) -> Tensor:
    return ddrf_fast.dynamic_conv(**named, padding=1, stride=2, activation="leaky_relu")


def degraded(**named: Tensor) -> Tensor:
    return ddrf_fast.degrade(**named, scale=2, seed=3)


OPERATIONS = pytest.mark.parametrize(
    ("operation", "inputs"),
    [(conv, conv_inputs), (degraded, degrade_inputs)],
    ids=["dynamic_conv", "degrade"],
)


def raw_conv(named: dict[str, Tensor]) -> tuple:
    return *named.values(), [2, 2], [1, 1], [1, 1], 1


def raw_degrade(named: dict[str, Tensor]) -> tuple:
    std = named["noise_std"][:, None, None, None]
    ids = torch.arange(named["image"].shape[0])
    return *list(named.values())[:3], std, torch.tensor(3), ids, ids % 2 == 1, 2, 1


def layouts(named: dict[str, Tensor], first: str) -> list[dict[str, Tensor]]:
    """The same inputs contiguous, in channels_last, permuted and expanded."""
    permuted = {**named, first: named[first].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)}
    expanded = {**named, first: named[first][:1].expand_as(named[first])}
    last = {**named, first: named[first].contiguous(memory_format=torch.channels_last)}
    return [named, last, permuted, expanded]


@pytest.mark.parametrize("batch", [B, 0])
@pytest.mark.parametrize("layout", range(4), ids=["contiguous", "channels_last", "permuted", "expanded"])
def test_opcheck_dynamic_conv(layout, batch):
    named = layouts(conv_inputs(batch=batch), "x")[layout]
    raw = raw_conv(named)
    opcheck(torch.ops.ddrf_fast.dynamic_conv.default, (*raw, "relu"))
    y = torch.ops.ddrf_fast.dynamic_conv(*raw, "none")
    opcheck(torch.ops.ddrf_fast.dynamic_conv_backward.default, (torch.rand_like(y), *raw, 0b11111111))
    opcheck(torch.ops.ddrf_fast.dynamic_conv_backward.default, (torch.rand_like(y), *raw, 0b00100101))


def test_opcheck_dynamic_conv_with_scales_of_float32():
    named = conv_inputs(torch.bfloat16)
    raw = raw_conv(named | {name: named[name].float() for name in ("in_scale", "tap_scale")})
    opcheck(torch.ops.ddrf_fast.dynamic_conv.default, (*raw, "relu"))
    grad = torch.ops.ddrf_fast.dynamic_conv(*raw, "none")
    for mask in (0b11111111, 0b01000001):
        opcheck(torch.ops.ddrf_fast.dynamic_conv_backward.default, (grad, *raw, mask))


@pytest.mark.parametrize("batch", [B, 0])
@pytest.mark.parametrize("layout", range(4), ids=["contiguous", "channels_last", "permuted", "expanded"])
def test_opcheck_degrade(layout, batch):
    named = layouts(degrade_inputs(batch=batch), "image")[layout]
    raw = raw_degrade(named)
    for shot in (None, torch.rand(batch)):
        forward = (*raw[:7], shot, *raw[7:], [4, 4], "reflect", False, "image")
        opcheck(torch.ops.ddrf_fast.degrade.default, forward)
    out = torch.ops.ddrf_fast.degrade(*forward)
    for mask in (0b1111, 0b0010):
        arguments = (torch.rand_like(out), *raw, "reflect", False, "image", mask)
        opcheck(torch.ops.ddrf_fast.degrade_backward.default, arguments)


@pytest.mark.parametrize("batch", [B, 0])
@pytest.mark.parametrize("layout", range(4), ids=["contiguous", "channels_last", "permuted", "expanded"])
@pytest.mark.parametrize("integers", [torch.uint8, torch.uint16])
def test_opcheck_degrade_of_integers(integers, layout, batch):
    named = degrade_inputs(batch=batch)
    named["image"] = (named["image"] * 255).to(integers)
    raw = raw_degrade(layouts(named, "image")[layout])
    forward = (*raw[:7], None, *raw[7:], [4, 4], "reflect", False, "image")
    opcheck(torch.ops.ddrf_fast.degrade.default, forward)
    arguments = (torch.rand(batch, 3, 4, 4), *raw, "reflect", False, "image", 0b1110)
    opcheck(torch.ops.ddrf_fast.degrade_backward.default, arguments)


def integer_inputs(batch=B) -> dict[str, Tensor]:
    named = degrade_inputs(batch=batch)
    return named | {"image": (named["image"] * 255).to(torch.uint8)}


def test_degrade_of_integers_is_mapped_and_compiled():
    named = integer_inputs()
    images = torch.stack([named["image"], named["image"].flip(0)])
    one_by_one = torch.stack([degraded(**{**named, "image": image}) for image in images])
    torch.testing.assert_close(vmap(lambda image: degraded(**{**named, "image": image}))(images), one_by_one)

    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(degraded, fullgraph=True, dynamic=True, backend=counter)
    for batch in (12, 14):
        named = integer_inputs(batch)
        leaves = [named[name].requires_grad_() for name in ("kernels", "weights", "noise_std")]
        out, expected = compiled(**named), degraded(**named)
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            torch.autograd.grad(out.sin().sum(), leaves),
            torch.autograd.grad(expected.sin().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert counter.graphs == 1


@OPERATIONS
def test_torch_func(operation, inputs):
    named = inputs(torch.float64)
    first = next(iter(named))

    def loss(value: Tensor) -> Tensor:
        return operation(**{**named, first: value}).square().sum()

    value = named[first].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(value), value)
    torch.testing.assert_close(grad(loss)(named[first]), expected)
    # Twice backwards, as a Hessian's rows.
    hessian = (
        jacrev(jacrev(loss))(named[first][:, :, :4, :4])
        if operation is conv
        else jacrev(grad(loss))(named[first])
    )
    assert hessian.isfinite().all()
    assert hessian.abs().sum() > 0


@OPERATIONS
def test_vmap_folds_or_loops(operation, inputs):
    """Over what each sample owns, over what all share, and over a gradient that all share."""
    named = inputs(torch.float64)
    names = list(named)
    per_sample, shared = names[0], names[1]
    many = torch.stack([named[per_sample] * s for s in (1.0, 0.5, -2.0)], dim=1)
    banks = torch.stack([named[shared], named[shared].flip(0)])

    def call(value: Tensor, bank: Tensor) -> Tensor:
        return operation(**{**named, per_sample: value, shared: bank})

    one_by_one = torch.stack([call(v, named[shared]) for v in many.unbind(1)])
    torch.testing.assert_close(vmap(call, in_dims=(1, None))(many, named[shared]), one_by_one)
    one_by_one = torch.stack([call(named[per_sample], b) for b in banks])
    torch.testing.assert_close(vmap(call, in_dims=(None, 0))(named[per_sample], banks), one_by_one)

    def bank_gradient(value: Tensor) -> Tensor:
        return grad(lambda bank: call(value, bank).square().sum())(named[shared])

    def image_gradient(value: Tensor) -> Tensor:
        return grad(lambda v: call(v, named[shared]).square().sum())(value)

    for function in (bank_gradient, image_gradient):
        one_by_one = torch.stack([function(v) for v in many.unbind(1)])
        torch.testing.assert_close(vmap(function, in_dims=1)(many), one_by_one)


@OPERATIONS
@pytest.mark.parametrize("batch", [B, 0])
def test_vmap_over_nothing_gives_nothing(operation, inputs, batch):
    named = inputs(batch=batch)
    per_sample, shared = list(named)[:2]

    def call(value: Tensor, bank: Tensor) -> Tensor:
        return operation(**{**named, per_sample: value, shared: bank})

    def bank_gradient(value: Tensor) -> Tensor:
        return grad(lambda bank: call(value, bank).sum())(named[shared])

    image, bank = named[per_sample], named[shared]
    images, banks = (t.new_empty((0, *t.shape)) for t in (image, bank))
    expected = (0, *call(image, bank).shape)
    assert vmap(call, in_dims=(0, None))(images, bank).shape == expected
    assert vmap(call, in_dims=(None, 0))(image, banks).shape == expected
    assert vmap(bank_gradient)(images).shape == banks.shape


@OPERATIONS
def test_forward_mode(operation, inputs):
    named = {name: value.requires_grad_() for name, value in inputs(torch.float64).items()}

    def call(*values: Tensor) -> Tensor:
        return operation(**dict(zip(named, values, strict=True)))

    values = tuple(named.values())
    torch.autograd.gradcheck(call, values, check_forward_ad=True, check_backward_ad=False)


@OPERATIONS
def test_forward_mode_meets_itself_and_reverse_mode(operation, inputs):
    """The second derivatives in four ways, of tensors that are not linear in the loss."""
    named = inputs(torch.float64)
    for name in list(named)[2:]:
        if named[name].numel() > 50:
            continue

        def loss(value: Tensor, name: str = name) -> Tensor:
            return operation(**{**named, name: value}).pow(3).sum()

        expected = jacrev(jacrev(loss))(named[name])
        assert expected.abs().sum() > 0
        for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
            torch.testing.assert_close(outer(inner(loss))(named[name]), expected)


@OPERATIONS
def test_forward_mode_is_mapped_and_compiled(operation, inputs):
    named = inputs(torch.float64)
    first = next(iter(named))

    def tangent(value: Tensor) -> Tensor:
        return jvp(lambda v: operation(**{**named, first: v}), (value,), (value.cos(),))[1]

    many = torch.stack([named[first], named[first].flip(0)])
    expected = torch.stack([tangent(value) for value in many])
    torch.testing.assert_close(vmap(tangent)(many), expected)
    torch._dynamo.reset()
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(named[first]), expected[0])


def test_autocast_casts_convolutions_down_and_degradations_up():
    wide, low = conv_inputs(), conv_inputs(torch.bfloat16)
    mixed = {**wide, "x": low["x"], "attention": low["attention"]}
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(**wide).dtype == torch.bfloat16
        assert conv(**mixed).dtype == torch.bfloat16
        assert conv(**conv_inputs(torch.float64)).dtype == torch.float64
        assert degraded(**degrade_inputs(torch.bfloat16)).dtype == torch.float32
        # The raw operators follow the same rule, for exported programs.
        assert torch.ops.ddrf_fast.dynamic_conv(*raw_conv(wide), "none").dtype == torch.bfloat16
        raw = raw_degrade(degrade_inputs(torch.bfloat16))
        raw = (*raw[:7], None, *raw[7:], [4, 4], "reflect", False, "image")
        assert torch.ops.ddrf_fast.degrade(*raw).dtype == torch.float32
    named = {k: v.requires_grad_() for k, v in wide.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(**named)
    y.float().sum().backward()
    assert all(v.grad.dtype == torch.float32 and v.grad.isfinite().all() for v in named.values())


class Counter:
    """A torch.compile backend that counts graphs, and runs AOTAutograd's."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, example_inputs)


@OPERATIONS
def test_compiles_whole_with_free_batch_and_size(operation, inputs):
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend=counter)
    first, others = next(iter(inputs())), {}
    for batch in (12, 14, 15):  # unlike every other size, or they would share a symbol
        named = {k: v.requires_grad_() for k, v in inputs(batch=batch).items()}
        out = compiled(**named)
        torch.testing.assert_close(out, operation(**named))
        ours = torch.autograd.grad(out.sin().sum(), list(named.values()))
        theirs = torch.autograd.grad(operation(**named).sin().sum(), list(named.values()))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        others = named
    if operation is conv:  # another size; degrade's weights map would have to follow it
        others[first] = torch.rand(15, C, 11, 13, requires_grad=True)
        torch.testing.assert_close(compiled(**others), operation(**others))
    assert counter.graphs == 1, "a new batch size or image size compiled again"


@pytest.mark.slow
@OPERATIONS
def test_inductor_gives_the_same(operation, inputs):
    torch._dynamo.reset()
    named = {k: v.requires_grad_() for k, v in inputs(channels_last=True).items()}

    def around(**named: Tensor) -> Tensor:  # something to fuse on both sides, so that layouts meet
        first = next(iter(named))
        return operation(**{**named, first: named[first] * 2}).sin()

    compiled = torch.compile(around, fullgraph=True)
    torch.testing.assert_close(compiled(**named), around(**named))
    # Gradients in float64: those of a bank are sums that cancel, and in float32 their order shows.
    named = {k: v.detach().double().requires_grad_() for k, v in named.items()}
    ours = torch.autograd.grad(compiled(**named).sum(), list(named.values()))
    theirs = torch.autograd.grad(around(**named).sum(), list(named.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Net(torch.nn.Module):
    """Both operations in a row, for export."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(N, 4, 3, 3, 3))
        self.bank = torch.nn.Buffer(torch.rand(M, 5, 5))

    def forward(self, image: Tensor, attention: Tensor, weights: Tensor) -> Tensor:
        blurred = ddrf_fast.degrade(image, self.bank, weights, scale=2)
        return ddrf_fast.dynamic_conv(blurred, self.weight, attention, padding=1, activation="relu")


def net_inputs(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    return torch.rand(batch, 3, height, width), torch.rand(batch, N), torch.rand(batch, M)


def exported(net: Net) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    height, width = torch.export.Dim("height", min=8, max=2048), torch.export.Dim("width", min=8, max=2048)
    shapes = ({0: batch, 2: height, 3: width}, {0: batch}, {0: batch})
    return torch.export.export(net, net_inputs(2, 16, 18), dynamic_shapes=shapes)


def test_exports_with_free_batch_and_size(tmp_path):
    net = Net().eval()
    torch.export.save(exported(net), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"ddrf_fast.dynamic_conv.default", "ddrf_fast.degrade.default"} <= targets
    for sizes in ((2, 16, 18), (5, 9, 31)):
        inputs = net_inputs(*sizes)
        torch.testing.assert_close(program.module()(*inputs), net(*inputs))


RUNNER = """
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <torch/script.h>
#include <iostream>

// argv: package, input file, output file, libraries to load
int main(int argc, char** argv) {
  for (int i = 4; i < argc; ++i) {
    if (!dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL)) {
      std::cerr << dlerror() << std::endl;
      return 1;
    }
  }
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  std::vector<torch::Tensor> inputs;
  torch::load(inputs, argv[2]);
  auto outputs = loader.run(inputs);
  torch::save(outputs, argv[3]);
  return 0;
}
"""


@pytest.mark.slow
def test_runs_ahead_of_time_compiled_without_python(tmp_path):
    """AOTInductor's package in a C++ program: schemas and kernels come from our libraries."""
    libraries = [_native.find("_schemas"), _native.find("_C")]
    if None in libraries:
        pytest.skip("the compiled libraries are not built")
    net = Net().eval()
    package = torch._inductor.aoti_compile_and_package(exported(net), package_path=str(tmp_path / "net.pt2"))
    inputs = net_inputs(3, 20, 14)
    with torch.no_grad():
        expected = net(*inputs)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*inputs), expected)

    (tmp_path / "run.cpp").write_text(RUNNER)
    program = compile_against_torch(tmp_path / "run.cpp", tmp_path / "run")

    class Values(torch.nn.Module):
        """How C++ reads a list of tensors."""

        def __init__(self) -> None:
            super().__init__()
            for i, value in enumerate(inputs):
                self.register_buffer(str(i), value)

    torch.jit.script(Values()).save(str(tmp_path / "in.pt"))
    ran = subprocess.run(
        [
            program,
            package,
            str(tmp_path / "in.pt"),
            str(tmp_path / "out.pt"),
            *map(str, libraries),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHOME": "/nonexistent"},
    )
    assert ran.returncode == 0, ran.stderr
    found = next(iter(torch.jit.load(str(tmp_path / "out.pt")).parameters()))
    torch.testing.assert_close(found, expected)


class MallInfo(ctypes.Structure):
    """Of glibc's mallinfo2; ``uordblks`` counts the bytes that are allocated."""

    _fields_ = [
        *((f"before_{number}", ctypes.c_size_t) for number in range(7)),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 tells what is allocated")
@pytest.mark.parametrize("name", ["route", "dynamic_conv", "degrade"])
def test_calls_keep_no_memory(cpu_backend, name):
    """Not even a few bytes: over the frames of a video they keep freed memory from being used again."""
    x, kernel, ones = torch.zeros(1, 4, 5, 5), torch.zeros(2, 4, 4, 3, 3), torch.ones(1, 2)
    arguments = {
        "route": (x, None, None, torch.zeros(2, 4), None),
        "dynamic_conv": (x, kernel, ones),
        "degrade": (x, torch.ones(2, 1, 1), ones),
    }[name]
    allocated = ctypes.CDLL(None).mallinfo2
    allocated.restype = MallInfo
    calls = 2000
    counts = []
    for _ in range(2):
        for _ in range(calls):
            getattr(ddrf_fast, name)(*arguments)
        counts.append(allocated().uordblks)
    assert counts[1] - counts[0] < 8 * calls


@pytest.mark.gpu
@OPERATIONS
def test_cuda_graph_replays(operation, inputs):
    named = {k: v.cuda() for k, v in inputs().items()}
    operation(**named)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operation(**named)
    first = next(iter(named))
    named[first].copy_(torch.rand_like(named[first]))
    graph.replay()
    torch.testing.assert_close(out, operation(**named))


def test_works_without_anything_compiled(tmp_path):
    """The package without its libraries and without triton, as on a platform with no compiler."""
    package = Path(ddrf_fast.__file__).parent
    shutil.copytree(package, tmp_path / "ddrf_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """
import sys
sys.modules["triton"] = None  # cannot be imported
import torch, ddrf_fast
x, weight, attention = torch.rand(2, 3, 9, 9), torch.rand(4, 5, 3, 3, 3), torch.rand(2, 4)
print(ddrf_fast.explain("dynamic_conv", x, weight, attention))
print(tuple(ddrf_fast.dynamic_conv(x, weight, attention).shape))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    assert "dynamic_conv: reference" in ran.stdout
    assert "_C is not built" in ran.stdout
    assert "(2, 5, 7, 7)" in ran.stdout
