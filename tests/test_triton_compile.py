"""Every Triton kernel compiled without a GPU, for the signatures of real calls, within a budget.

The launches of the calls in triton_cases.REAL are recorded (on `meta` tensors) and compiled as the JIT would:
the same constants, the same arguments specialised on 1 and on divisibility by 16.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402
from triton_cases import REAL, TINY, Conv, Degrade, Route  # noqa: E402

from ddrf_fast.kernels import (  # noqa: E402
    _common,
    _conv_backward,
    _conv_forward,
    degrade,
    dynamic_conv,
    route,
)

pytestmark = pytest.mark.skipif(_common.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a block may take of shared memory, in bytes; a thread of registers (192 let ten warps share NVIDIA's
# 65536, 168 let three waves share AMD's 512, which hides latency); and what it may spill, in bytes (a few
# cost nothing, a row of them does).
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = {"sm_80": 192, "sm_90": 192, "gfx942": 168}
SPILL_BYTES = 64
MATRIX_INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}
WIDE_ACCESS = {"sm_80": r"cp\.async\.cg|ld\.global[.\w:]*\.v4", "gfx942": r"load_dwordx4"}
WIDE_ACCESS["sm_90"] = WIDE_ACCESS["sm_80"]
DOT_KERNELS = ("_conv_dot_kernel", "_conv_fused_kernel", "_weight_dot_kernel", "_bank_dot_kernel")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def launches(case: Conv | Degrade | Route, architecture: str) -> list[_common.Launch]:
    args = case.arguments("meta")
    with case.as_asked(), _common.record(architecture) as caught:
        if isinstance(case, Route):
            route.route(*args)
        elif isinstance(case, Conv):
            out, _ = dynamic_conv.dynamic_conv_mean(*args)
            dynamic_conv.dynamic_conv_backward(*case.backward_arguments(args, out))
        else:
            out = degrade.degrade(*args)
            degrade.degrade_backward(*case.backward_arguments(args, out))
    return caught


def source(launch: _common.Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What the JIT would compile for this launch, and the compiler's options."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.args, strict=False))
    values |= {k: v for k, v in launch.options.items() if k in kernel.arg_names}
    assert list(values) == kernel.arg_names or set(values) == set(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, free = values[parameter.name], parameter.do_not_specialize
        aligned = False
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            kind, constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kind, aligned = POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind, aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0 and not free
        signature[parameter.name] = kind
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in launch.options.items() if k not in kernel.arg_names}
    return ASTSource(kernel, signature, constants, attributes), options


def registers_and_spills(compiled: Any, architecture: str, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that it spills."""
    if architecture == "gfx942":

        def largest(field: str) -> int:
            return max(map(int, re.findall(rf"\.{field}:\s*(\d+)", compiled.asm["amdgcn"])))

        return largest("vgpr_count"), 4 * largest("vgpr_spill_count")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack, local = (
        max(map(int, re.findall(rf"{what}:(\d+)", run.stdout))) for what in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def parameters() -> list[Any]:
    found = []
    for architecture in TARGETS:
        for name in REAL:
            marks = [] if architecture == "sm_90" else [pytest.mark.slow]
            found.append(pytest.param(name, architecture, marks=marks, id=f"{name}-{architecture}"))
    return found


@pytest.mark.parametrize(("name", "architecture"), parameters())
def test_compiles_within_budget(name: str, architecture: str, tmp_path: Path) -> None:
    case = REAL[name]
    for launch in launches(case, architecture):
        compiled_source, options = source(launch)
        compiled = triton.compile(compiled_source, target=TARGETS[architecture], options=options)
        kernel = launch.kernel.__name__
        assert compiled.metadata.shared <= SHARED[architecture], kernel
        registers, spilled = registers_and_spills(compiled, architecture, tmp_path)
        assert registers <= REGISTERS[architecture], kernel
        assert spilled <= SPILL_BYTES, kernel
        if kernel in DOT_KERNELS:
            assembly = compiled.asm["amdgcn" if architecture == "gfx942" else "ptx"]
            assert MATRIX_INSTRUCTIONS[architecture] in assembly, kernel
            # A thread has but four elements of the small tiles that are contracted with the bank.
            if case.channels_last and case.dtype.itemsize == 2 and kernel != "_bank_dot_kernel":
                assert re.search(WIDE_ACCESS[architecture], assembly), kernel


@pytest.mark.parametrize("module", [_conv_forward, _conv_backward, degrade, route])
def test_every_kernel_is_compiled(module: Any) -> None:
    kernels = {n for n, f in vars(module).items() if isinstance(f, JITFunction) and n.endswith("_kernel")}
    launched = {launch.kernel.__name__ for case in REAL.values() for launch in launches(case, "sm_90")}
    assert kernels
    assert kernels <= launched


def test_tiny_calls_take_every_path() -> None:
    """What the interpreter checks is all there is: every kernel, with what makes it other code."""
    flags = ("TRANSPOSED", "PER_CHANNEL", "FLAT", "FUSED", "ADD", "BY_CHANNEL", "PIXELS_LAST", "SIGMOID")
    taken = set()
    for case in TINY.values():
        for launch in launches(case, "interpreter"):
            options, name = launch.options, launch.kernel.__name__
            taken |= {(name, flag, bool(options[flag])) for flag in flags if flag in options}
            taken |= {(name, key, options[key] > least) for key, least in (("PATCH", 0), ("SAMPLES", 1))
                      if key in options}  # fmt: skip
            taken |= {(name, "parts", launch.args[5].shape[0] > 1)} if name == "_bank_dot_kernel" else set()
    both = {(name, flag) for name, flag, _ in taken}
    # Patches are for images of several rows; the router takes none, and its pixels in rows where it can.
    missing = {key for key in both if {(*key, True), (*key, False)} - taken} - {("_route_kernel", "PATCH")}
    assert not missing


@pytest.mark.parametrize("name", [name for name, case in REAL.items() if isinstance(case, Conv)])
def test_plan_tells_what_is_launched(name: str) -> None:
    case = REAL[name]
    args = case.arguments("meta")
    with case.as_asked(), _common.record("sm_90") as caught:
        out = dynamic_conv.dynamic_conv(*args)
        forward = {launch.kernel.__name__: launch for launch in caught}
        caught.clear()
        backward_args = case.backward_arguments(args, out)
        dynamic_conv.dynamic_conv_backward(*backward_args)
        backward = {launch.kernel.__name__: launch for launch in reversed(caught)}  # of the first chunk
        told = dynamic_conv.plan("dynamic_conv", *args)
        told_backward = dynamic_conv.plan("dynamic_conv_backward", *backward_args)
    assert ("mixed in registers" in told) == ("_mix_kernel" not in forward)
    assert ("direct" in told) == ("_conv_direct_kernel" in forward)
    (programs,) = (k.programs for n, k in forward.items() if n.startswith("_conv"))
    assert f" {programs} programs" in told
    assert ("contracted with the bank" in told_backward) == ("_bank_dot_kernel" in backward)
    assert all(f" {k.programs} programs" in told_backward for n, k in backward.items() if "_dot_" in n)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in TINY.items() if case.shape[0]])
def test_tiny_calls_compile(name: str) -> None:
    """Sizes of one become constants, which is other code."""
    for launch in launches(TINY[name], "sm_90"):
        compiled_source, options = source(launch)
        triton.compile(compiled_source, target=TARGETS["sm_90"], options=options)


@pytest.mark.parametrize("name", ["conv half, NCHW", "conv half, 1x1, NCHW", "conv half, strided, NCHW"])
def test_channels_first_in_half_precision_moves_neighbours_together(name: str) -> None:
    """Without a copy of x: what can be aligned (every store; the loads of 1x1) is 16 bytes wide. The loads of
    a 3x3 begin at odd elements, and those of a stride leave gaps, but neighbouring threads load neighbouring
    pixels."""
    case = REAL[name]
    launch = next(c for c in launches(case, "sm_90") if c.kernel.__name__ in DOT_KERNELS[:2])
    compiled_source, options = source(launch)
    compiled = triton.compile(compiled_source, target=TARGETS["sm_90"], options=options)
    tile, order = (launch.options["BLOCK_M"], launch.options["BLOCK_K"]), "0, 1"
    if case.stride != (1, 1):
        tile, order = tile[::-1], "1, 0"
    ttgir, ptx = compiled.asm["ttgir"], compiled.asm["ptx"]
    layouts = set(re.findall(rf"tensor<{tile[0]}x{tile[1]}x!tt\.ptr<bf16>, (#\w+)>", ttgir))
    assert layouts
    ordered = [bool(re.search(rf"{layout} = .*order = \[{order}\]", ttgir)) for layout in layouts]
    # Transposed, x's tile may have the shape of the kernel's, whose order is another.
    assert all(ordered) if case.stride == (1, 1) else any(ordered)
    if case.stride == (1, 1):
        # The last store is of the partial sums for the mean, one float32 a thread.
        assert all(".v4.b32" in store for store in re.findall(r"st\.global\S*", ptx)[:-1])
    if case.kernel == (1, 1):
        # The two loads that are left are of a bias and a coefficient.
        assert len(re.findall(r"ld\.global\S*", ptx)) <= 2
        assert re.search(WIDE_ACCESS["sm_90"], ptx)


SINGLE = [name for name, case in REAL.items() if isinstance(case, Conv) and case.dtype == torch.float32]


@pytest.mark.parametrize("name", SINGLE)
def test_float32_product_without_tensor_cores(name: str, tmp_path: Path) -> None:
    """With TF32 off for convolutions, products are in float32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        caught = launches(REAL[name], "sm_90")
    for launch in caught:
        if launch.kernel.__name__ in DOT_KERNELS:
            compiled_source, options = source(launch)
            compiled = triton.compile(compiled_source, target=TARGETS["sm_90"], options=options)
            assert "mma" not in compiled.asm["ptx"]
            assert registers_and_spills(compiled, "sm_90", tmp_path)[1] <= SPILL_BYTES


def test_unsupported_says_why() -> None:
    case = Conv((1, 4, 5, 5), 4)
    args = list(case.arguments("cpu"))
    assert "Triton kernels need a GPU" in dynamic_conv.unsupported("dynamic_conv", *args)
    args[0] = args[0].double()
    assert "x is torch.float64" in dynamic_conv.unsupported("dynamic_conv", *args)
    args = Degrade((1, 1, 5, 5)).arguments("cpu")
    assert "Triton kernels need a GPU" in degrade.unsupported("degrade_backward", args[0], *args)
