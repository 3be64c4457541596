"""The compiled CPU kernels of degrade, called as raw operators, against the definition in float64."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from degrade_oracle import Case, definition, gradients, make, normal, philox4x32
from helpers import FLOOR, assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from ddrf_fast.ops import _native
from ddrf_fast.ops import degrade as _schemas  # noqa: F401  defines the operators

if not _native.status()["_C"][0]:
    pytest.skip(_native.status()["_C"][1], allow_module_level=True)

OP = torch.ops.ddrf_fast.degrade.default
BACKWARD = torch.ops.ddrf_fast.degrade_backward.default
PADDINGS = ("reflect", "replicate", "circular", "zeros")
WEIGHTS_AT = ("sample", "image", "output", "grid")
NAMES = ("image", "kernels", "weights", "noise_std")


@pytest.fixture(autouse=True)
def one_thread():
    """The inputs are tiny; what several threads change is a test of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Forward and all gradients, by the error of the same einsum in `dtype` (float32 for shorter ones)."""
    low, wide = case.to(dtype=dtype), case.to(dtype=dtype).to(dtype=torch.float64)
    torch_dtype = dtype if dtype == torch.float64 else torch.float32
    expected = definition(wide)
    out = low.forward(OP)
    torch_case = wide.to(dtype=torch_dtype)
    assert_accurate(out, expected, definition(torch_case).to(dtype), name="out")

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    actual = low.backward(BACKWARD, grad)
    expected = gradients(wide, grad.double())
    by_torch = gradients(torch_case, grad.to(torch_dtype))
    for name, value, reference, torch_value in zip(NAMES, actual, expected, by_torch, strict=False):
        assert value.dtype == dtype
        # Sums of both signs: a few roundings of the terms, where the sum itself may be close to zero.
        terms = float(grad.abs().max()) if reference.numel() else 0.0
        floor = FLOOR[dtype] * max(1.0, terms / max(float(reference.abs().max()), 1e-30)) if terms else None
        assert_accurate(value, reference, torch_value.to(dtype), floor=floor, name=f"gradient of {name}")


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_forward_and_gradients(scale, padding, weights_at):
    check(
        make(
            size=(13, 37 + scale),
            kernel=7,
            scale=scale,
            offset=scale - 1,
            padding=padding,
            weights_at=weights_at,
            per_sample=scale % 2 == 0,
            correlation=scale == 3,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_dtypes(weights_at, dtype):
    check(make(size=(12, 21), kernel=5, scale=2, weights_at=weights_at, noise="map"), dtype)


@pytest.mark.parametrize("kernel", [1, 3, 5, 9, 15, 25])
@pytest.mark.parametrize("weights_at", ["sample", "output"])
def test_kernel_sizes(weights_at, kernel):
    check(make(1, 1, size=(26, 27), kernel=kernel, scale=2, weights_at=weights_at))


def test_kernels_larger_than_41():
    check(make(1, 1, size=(5, 6), bank=2, kernel=43, padding="replicate", weights_at="output"))


@pytest.mark.parametrize("bank", [1, 2, 12, 65])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("weights_at", ["sample", "image"])
def test_banks_and_channels(weights_at, channels, bank):
    check(make(1, channels, size=(6, 9), bank=bank, kernel=3, weights_at=weights_at))


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 33, 64, 65])
@pytest.mark.parametrize("weights_at", ["sample", "output"])
def test_widths_around_whole_vectors(weights_at, width):
    check(make(1, 1, size=(5, width), kernel=5, padding="replicate", weights_at=weights_at, noise="number"))


def test_several_bands_and_blocks_of_rows():
    """Heights at which the backward pass cuts a sample into parts that overlap."""
    for weights_at in ("sample", "output"):
        check(make(1, 2, size=(67, 70), kernel=5, weights_at=weights_at))


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("padding", ["reflect", "circular", "zeros"])
def test_wide_images_are_cut_into_strips(padding, weights_at):
    """Of columns, also where the image is converted as it is read."""
    case = make(1, 1, size=(13, 9001), kernel=23, scale=3, offset=1, padding=padding, weights_at=weights_at)
    case = case.replace(image=(case.image * 255).to(torch.uint8))
    kernels, weights = case.kernels.float(), case.weights.float()
    integers = case.replace(kernels=kernels, weights=weights)
    floats = integers.replace(image=case.image / 255)
    assert "Fourier" not in plan_of(floats).split(";")[0]
    out = floats.forward(OP)
    assert_accurate(out, definition(floats.to(dtype=torch.float64)), definition(floats))
    assert torch.equal(integers.forward(OP), out)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (9, 3), (40, 40)])
def test_grids(grid):
    check(make(size=(9, 20), grid=grid, weights_at="grid", scale=2))
    check(make(size=(1, 1), grid=grid, weights_at="grid", padding="zeros"))


def test_agrees_with_scipy():
    case = make(1, 1, size=(17, 19), bank=1, kernel=7)
    case.weights = torch.ones_like(case.weights)
    modes = {"reflect": "mirror", "replicate": "nearest", "circular": "wrap", "zeros": "constant"}
    for padding, mode in modes.items():
        expected = scipy.ndimage.convolve(case.image[0, 0].numpy(), case.kernels[0].numpy(), mode=mode)
        assert_accurate(case.replace(padding=padding).forward(OP)[0, 0], torch.from_numpy(expected))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    size = draw(st.tuples(st.integers(1, 20), st.integers(1, 40)))
    padding = draw(st.sampled_from(PADDINGS))
    limit = min(size) - 1 if padding == "reflect" else min(size) if padding == "circular" else 6
    check(
        make(
            draw(st.integers(1, 3)),
            draw(st.integers(1, 4)),
            size,
            draw(st.integers(1, 5)),
            2 * draw(st.integers(0, min(limit, 6))) + 1,
            weights_at=draw(st.sampled_from(WEIGHTS_AT)),
            per_sample=draw(st.booleans()),
            noise=draw(st.sampled_from([None, "number", "map"])),
            grid=draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
            scale=draw(st.integers(1, 5)),
            offset=draw(st.integers(0, min(size) - 1)),
            padding=padding,
            correlation=draw(st.booleans()),
            random_seed=draw(st.integers(0, 1000)),
        )
    )


# ---- Layouts and edges


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_memory_layouts(weights_at):
    """The same numbers from any strides; channels_last in, channels_last out."""
    case = make(2, 3, size=(8, 10), kernel=3, weights_at=weights_at, noise="map").to(dtype=torch.float32)
    grad = torch.randn(2, 3, 8, 10)
    out, grads = case.forward(OP), case.backward(BACKWARD, grad)

    last = case.replace(image=case.image.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last.forward(OP), out)
    assert last.forward(OP).stride() == last.image.stride()
    last_grads = last.backward(BACKWARD, grad.contiguous(memory_format=torch.channels_last))
    assert last_grads[0].stride() == last.image.stride()
    assert all(torch.equal(a, b) for a, b in zip(last_grads, grads, strict=True))

    def spread(t):  # every second element of something larger, backwards in memory order
        larger = torch.full([2 * n for n in t.shape], float("nan"))
        view = (
            larger[tuple(slice(None, None, 2) for _ in t.shape)]
            .transpose(0, -1)
            .contiguous()
            .transpose(0, -1)
        )
        return view.copy_(t)

    strided = case.replace(**{name: spread(t) for name, t in zip(NAMES, case.tensors, strict=True)})
    assert not strided.image.is_contiguous()
    assert torch.equal(strided.forward(OP), out)
    assert strided.forward(OP).is_contiguous()
    strided_grads = strided.backward(BACKWARD, spread(grad))
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(strided_grads, grads, strict=True))


def far_apart(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, the last channel beyond 2^31 elements; what lies between is never touched."""
    step = 2**31 // (t.shape[1] - 1)
    size = (t.shape[1] - 1) * step + t[0, 0].numel()
    memory = torch.from_numpy(np.zeros(size * t.element_size(), dtype=np.uint8)).view(t.dtype)
    return memory.as_strided(t.shape, (0, step, *t[0, 0].contiguous().stride())).copy_(t)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("kernel", [5, 33])
def test_offsets_beyond_32_bits(kernel, weights_at, integers):
    """In both plans, forward and backward, in whatever is read."""
    case = make(1, 3, size=(60, 70), kernel=kernel, weights_at=weights_at, per_sample=True)
    case = case.to(dtype=torch.bfloat16)
    assert plan_of(case).count("Fourier") == (2 if kernel == 33 else 0)
    if integers:
        case.image = (case.image * 255).to(torch.uint8)
    grad = torch.randn(1, 3, 60, 70).bfloat16()
    mask = 6 if integers else 7
    expected = [case.forward(OP), *case.backward(BACKWARD, grad, mask)]
    far = case.replace(
        image=far_apart(case.image),
        kernels=far_apart(case.kernels),
        weights=far_apart(case.weights) if weights_at != "sample" else case.weights,
    )
    found = [far.forward(OP), *far.backward(BACKWARD, far_apart(grad), mask)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_expanded_inputs(weights_at):
    case = make(2, 3, size=(8, 10), weights_at=weights_at).to(dtype=torch.float32)
    once = case.replace(
        image=case.image[:1, :1].expand(2, 3, 8, 10), weights=case.weights[:1].expand_as(case.weights)
    )
    dense = once.replace(image=once.image.contiguous(), weights=once.weights.contiguous())
    assert torch.equal(once.forward(OP), dense.forward(OP))
    grad = torch.ones(()).expand(2, 3, 8, 10)
    for a, b in zip(once.backward(BACKWARD, grad), dense.backward(BACKWARD, grad.contiguous()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_empty_batch(weights_at):
    case = make(0, 3, size=(8, 10), weights_at=weights_at, noise="number")
    out = case.forward(OP)
    assert out.shape == (0, 3, 8, 10)
    grads = case.backward(BACKWARD, out)
    assert [g.shape for g in grads] == [t.shape for t in case.tensors]
    assert not grads[1].any()


def test_empty_outputs():
    case = make(2, 3, size=(8, 10))
    out = OP(*case.tensors, *[None] * 4, 1, 0, [0, 10], "reflect", False, "sample")
    assert out.shape == (2, 3, 0, 10)
    for g in case.backward(BACKWARD, out)[:3]:
        assert g.numel() and not g.any()


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_output_mask(weights_at):
    """Each gradient alone has the bits it has among all; the others are empty."""
    case = make(2, 2, size=(8, 10), kernel=5, weights_at=weights_at, noise="number").to(dtype=torch.float32)
    case.kernels[:] = torch.rand_like(case.kernels)  # no zero taps: their order depends on what is asked for
    grad = torch.randn(2, 2, 8, 10)
    everything = case.backward(BACKWARD, grad)
    for mask in range(16):
        for i, g in enumerate(case.backward(BACKWARD, grad, mask)):
            if mask >> i & 1:
                assert torch.equal(g, everything[i])
            else:
                assert g.shape == (0,)


# ---- Invariants


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("padding", ["reflect", "replicate", "circular"])
def test_a_constant_image_stays_constant(padding, weights_at):
    case = make(size=(9, 30), kernel=5, padding=padding, weights_at=weights_at)
    case.image.fill_(0.7)
    case.kernels /= case.kernels.sum(dim=(-2, -1), keepdim=True)
    case.weights /= case.weights.sum(dim=1, keepdim=True)
    out = case.forward(OP)
    assert_accurate(out, torch.full_like(out, 0.7))


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_a_delta_moves_the_image(weights_at):
    """Convolution moves along the delta's own direction, correlation against it."""
    case = make(1, 1, size=(9, 30), bank=1, kernel=5, padding="circular", weights_at=weights_at)
    case.kernels.zero_()
    case.kernels[0, 2 + 1, 2 - 2] = 1
    case.weights.fill_(1)
    assert torch.equal(case.forward(OP), case.image.roll((1, -2), (2, 3)))
    assert torch.equal(case.replace(correlation=True).forward(OP), case.image.roll((-1, 2), (2, 3)))


@pytest.mark.parametrize("weights_at", ["sample", "image", "grid"])
def test_strided_sites_are_those_of_the_full_result(weights_at):
    case = make(1, 2, size=(23, 41), kernel=5, weights_at=weights_at).to(dtype=torch.float32)
    full = case.forward(OP)
    for scale, offset in itertools.product((2, 3, 4), (0, 1, 2)):
        strided = case.replace(scale=scale, offset=offset).forward(OP)
        assert torch.equal(strided, full[:, :, offset::scale, offset::scale])


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("padding", PADDINGS)
def test_the_gradient_is_the_adjoint(padding, weights_at):
    case = make(size=(10, 33), kernel=5, scale=2, padding=padding, weights_at=weights_at)
    out = case.forward(OP)
    grad = torch.randn_like(out)
    grads = case.backward(BACKWARD, grad)
    products = [
        (grad * out).sum(),
        *((g * t).sum() for g, t in zip(grads[:3], case.tensors[:3], strict=True)),
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(4), rtol=1e-12, atol=1e-12)


# ---- Noise


def test_philox_known_answers():
    """Random123's vectors; the kernels are compared with this Python."""
    assert philox4x32((0,) * 4, (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox4x32((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def noise_only(
    batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype, seed: int, ids: list[int]
):
    case = Case(
        torch.zeros(batch, channels, *size, dtype=dtype),
        torch.ones(1, 1, 1, dtype=dtype),
        torch.ones(batch, 1, dtype=dtype),
        torch.ones(batch, 1, 1, 1, dtype=dtype),
        torch.tensor(seed),
        torch.tensor(ids),
    )
    return case.forward(OP)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1])
def test_noise_is_philox_and_box_muller(seed, dtype, tolerance):
    ids = [0, 3, 2**32 + 5]
    noise = noise_only(3, 2, (5, 70), dtype, seed, ids)
    for b, c, y, x in itertools.product(range(3), range(2), range(5), range(70)):
        assert abs(float(noise[b, c, y, x]) - normal(seed, ids[b], c, y, x)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_at", ["sample", "grid"])
@pytest.mark.parametrize("noise", ["number", "map"])
def test_shot_noise(noise, weights_at, dtype):
    """Its variance grows with the blurred image; where that is negative there is none."""
    case = make(3, 3, size=(9, 21), weights_at=weights_at, noise=noise, scale=2)
    case.image -= 0.3
    case.shot_noise = torch.tensor([0.0, 0.02, 0.5], dtype=torch.float64)
    case.gray_noise = torch.tensor([False, True, False])
    low, wide = case.to(dtype=dtype), case.to(dtype=dtype).to(dtype=torch.float64)
    by_torch = definition(wide.to(dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    assert_accurate(low.forward(OP), definition(wide), by_torch.to(dtype))


def test_noise_is_normal():
    noise = noise_only(1, 1, (300, 400), torch.float64, 11, [0]).flatten()
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / count) ** 0.5
    neighbours = (noise[1:] * noise[:-1]).mean()
    assert abs(neighbours) < 5 / count**0.5


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_split_batch_has_the_same_bits(per_sample, weights_at):
    case = make(3, 2, size=(9, 21), weights_at=weights_at, per_sample=per_sample, noise="number")
    case.gray_noise, case.shot_noise = torch.tensor([False, True, False]), torch.rand(3)
    case = case.to(dtype=torch.float32)
    whole = case.forward(OP)
    for b in range(3):
        part = case.replace(
            image=case.image[b : b + 1],
            kernels=case.kernels[b : b + 1] if per_sample else case.kernels,
            weights=case.weights[b : b + 1],
            noise_std=case.noise_std[b : b + 1],
            gray_noise=case.gray_noise[b : b + 1],
            shot_noise=case.shot_noise[b : b + 1],
            sample_ids=case.sample_ids[b : b + 1],
        )
        assert torch.equal(part.forward(OP), whole[b : b + 1])


# ---- Numerics and threads


@pytest.mark.parametrize("weights_at", ["sample", "output"])
def test_half_precision_denormals_survive(weights_at):
    """Flushing float32 denormals must not touch float16's, which are normal numbers in float32."""
    case = make(1, 1, size=(4, 5), bank=1, kernel=1, weights_at=weights_at).to(dtype=torch.float16)
    case.image = torch.arange(20, dtype=torch.float16).reshape(1, 1, 4, 5) * 2.0**-24
    case.kernels.fill_(1)
    case.weights.fill_(1)
    assert torch.equal(case.forward(OP), case.image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_short_float_is_read_and_written(dtype):
    """Identity on all 65536 bit patterns, and rounding to the nearest like torch's."""
    bits = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)
    )
    finite = bits.isfinite()
    case = Case(bits, torch.ones(1, 1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    out = case.forward(OP)
    tiny = bits.abs() < torch.finfo(torch.float32).tiny  # float32 denormals are flushed
    assert torch.equal(out[finite & ~tiny], bits[finite & ~tiny])
    assert out[bits.isnan()].isnan().all()

    weights = torch.full((1, 1), 1 / 3, dtype=dtype)
    product = bits.float() * weights.float()
    visible = finite & (product.abs() >= torch.finfo(torch.float32).tiny)
    assert torch.equal(case.replace(weights=weights).forward(OP)[visible], product.to(dtype)[visible])


def test_denormal_taps_count_as_zero():
    case = make(1, 1, size=(6, 7), weights_at="output").to(dtype=torch.float32)
    clean = case.kernels * (case.kernels > 0)
    case.kernels = torch.where(clean == 0, 1e-41, clean)
    assert torch.equal(case.forward(OP), case.replace(kernels=clean).forward(OP))


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_any_number_of_threads_gives_the_same_bits(weights_at):
    case = make(2, 2, size=(40, 50), kernel=7, weights_at=weights_at, noise="number").to(dtype=torch.float32)
    grad = torch.randn(2, 2, 40, 50)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append([case.forward(OP), *case.backward(BACKWARD, grad)])
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


CAPABILITY_SCRIPT = """
import sys, torch
from degrade_oracle import make
from ddrf_fast.ops import _native, degrade
assert _native.status()["_C"][0]
torch.set_num_threads(1)
results = []
for weights_at in ("sample", "output"):
    for dtype in (torch.float32, torch.float64):
        case = make(1, 2, size=(14, 43), kernel=5, scale=2, weights_at=weights_at, noise="map")
        case = case.to(dtype=dtype)
        out = case.forward(torch.ops.ddrf_fast.degrade.default)
        grads = case.backward(torch.ops.ddrf_fast.degrade_backward.default, torch.ones_like(out))
        results += [out, *grads]
    case = make(1, 2, size=(60, 70), bank=2, kernel=33, weights_at=weights_at).to(dtype=torch.float32)
    out = case.forward(torch.ops.ddrf_fast.degrade.default)
    grads = case.backward(torch.ops.ddrf_fast.degrade_backward.default, torch.ones_like(out), 7)
    results += [out, *grads[:3]]
torch.save(results, sys.argv[1])
"""


def test_every_instruction_set_agrees(tmp_path):
    results = {}
    for capability in ("default", "avx2", "avx512"):
        environment = {
            **os.environ,
            "DDRF_FAST_CPU_CAPABILITY": capability,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        command = [sys.executable, "-c", CAPABILITY_SCRIPT, str(tmp_path / capability)]
        done = subprocess.run(
            command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
        )
        if "has no" in done.stderr and capability != "default":
            continue
        assert done.returncode == 0, done.stderr
        results[capability] = torch.load(tmp_path / capability)
    for capability, values in results.items():
        for value, plain in zip(values, results["default"], strict=True):
            tolerance = 1e-13 if value.dtype == torch.float64 else 5e-6
            message = f"{capability} differs from default"
            assert np.allclose(value, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max())), (
                message
            )


@pytest.mark.parametrize("integers", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("kernel", [5, 33])
def test_integers_are_read_by_every_plan(kernel, weights_at, integers):
    """Summed directly and through the Fourier transform, the bits are those of the floats they stand for."""
    case = make(1, 2, size=(60, 70), bank=2, kernel=kernel, weights_at=weights_at).to(dtype=torch.float32)
    assert plan_of(case).count("Fourier") == (2 if kernel == 33 else 0)
    largest = torch.iinfo(integers).max
    image = (case.image * largest).round().to(torch.int32)
    last = image.contiguous(memory_format=torch.channels_last).to(integers)
    floats = case.replace(image=image / largest)
    grad = torch.randn(1, 2, 60, 70)
    expected = [floats.forward(OP), *floats.backward(BACKWARD, grad, 6)[1:3]]
    for variant in (image.to(integers), last):
        of_integers = case.replace(image=variant)
        found = [of_integers.forward(OP), *of_integers.backward(BACKWARD, grad, 6)[1:3]]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- Large kernels, through the Fourier transform


def plan_of(case: Case) -> str:
    """How forward and gradients run."""
    return torch.ops.ddrf_fast_native.degrade_plan.default(
        *case.tensors, case.seed, case.sample_ids, None, None, case.scale, case.offset, case.out_size,
        case.padding, case.correlation, case.weights_at,
    )  # fmt: skip


def make_fourier(*shape, tiles: bool = False, **options) -> Case:
    """A case that is run so, forward and backward; on several tiles if asked."""
    case = make(*shape, **options).to(dtype=torch.float32)
    plan = plan_of(case)
    assert plan.count("Fourier") == 2, plan
    assert not tiles or not re.search(r"of 1x1 tiles", plan), plan
    return case


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_fourier_forward_and_gradients(scale, padding, weights_at):
    """Tiles that overlap, the last of them cut; odd counts of tiles and channels."""
    check(
        make_fourier(
            1,
            1 + scale % 2,
            size=(83 + 10 * scale, 95 + 5 * scale),
            bank=2,
            kernel=55 if scale == 3 else 31,
            scale=scale,
            offset=scale - 1,
            padding=padding,
            weights_at=weights_at,
            per_sample=scale == 2,
            correlation=scale == 3,
            noise="map" if scale == 2 else "number",
            tiles=True,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_at", ["sample", "output"])
def test_fourier_dtypes(weights_at, dtype):
    check(make_fourier(2, 1, size=(60, 70), bank=2, kernel=33, weights_at=weights_at, noise="map"), dtype)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bank", [1, 5])
def test_fourier_banks_and_channels(bank, channels):
    for weights_at in ("sample", "image"):
        check(make_fourier(1, channels, size=(50, 60), bank=bank, kernel=41, weights_at=weights_at))


@pytest.mark.parametrize("length", [16 * n for n in (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18, 20)])
def test_fourier_lengths(length):
    """Every length that a tile may have, by images that just fit one."""
    size, kernel = max(length // 2 + 1, 9), length - max(length // 2 + 1, 9) + 1
    kernel -= 1 - kernel % 2
    case = make(1, 1, size=(size, size), bank=1, kernel=kernel, padding="replicate", weights_at="sample")
    case = case.to(dtype=torch.float32)
    assert_accurate(case.forward(OP), definition(case.to(dtype=torch.float64)), floor=3e-6)


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_fourier_output_mask(weights_at):
    case = make_fourier(1, 2, size=(60, 70), bank=2, kernel=33, weights_at=weights_at)
    grad = torch.randn(case.forward(OP).shape)
    whole = case.backward(BACKWARD, grad, 7)
    for mask in range(1, 7):
        for bit, (part, full) in enumerate(zip(case.backward(BACKWARD, grad, mask), whole, strict=True)):
            assert torch.equal(part, full) if mask >> bit & 1 else part.numel() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("weights_at", ["sample", "output"])
def test_a_wild_pixel_spoils_only_its_neighbours(weights_at, value):
    """A transform would mix it into its whole tile; such calls are summed directly."""
    case = make_fourier(1, 1, size=(80, 90), bank=2, kernel=21, weights_at=weights_at)
    expected, grad = case.forward(OP), torch.randn(1, 1, 80, 90)
    whole = case.backward(BACKWARD, grad, 7)
    case.image = case.image.clone()
    case.image[..., 40, 45] = value
    near = torch.zeros(80, 90, dtype=torch.bool)
    near[40 - 10 : 40 + 11, 45 - 10 : 45 + 11] = True
    assert_accurate(case.forward(OP)[..., ~near], expected[..., ~near].double(), floor=1e-5)
    assert_accurate(case.backward(BACKWARD, grad, 1)[0], whole[0].double(), floor=1e-5)


@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_fourier_bits_do_not_depend_on_threads_or_batch(weights_at):
    case = make_fourier(2, 1, size=(90, 120), bank=2, kernel=31, weights_at=weights_at, noise="number")
    grad = torch.randn(2, 1, 90, 120)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([case.forward(OP), *case.backward(BACKWARD, grad)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    one = case.replace(
        image=case.image[1:], weights=case.weights[1:], noise_std=case.noise_std[1:],
        sample_ids=case.sample_ids[1:],
    )  # fmt: skip
    assert torch.equal(one.forward(OP), results[0][0][1:])


def test_small_kernels_are_summed_directly():
    for weights_at, words in (("sample", "one kernel mixed"), ("output", "mixed in registers")):
        plan = plan_of(make(size=(64, 64), kernel=5, weights_at=weights_at).to(dtype=torch.float32))
        assert "Fourier" not in plan and plan.count(words) == 2


# ---- What must be refused before memory is read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(2, 9, 11)}, "image: expected 4 dimensions"),
        ({"kernels": torch.zeros(3, 4, 4)}, "odd"),
        ({"kernels": torch.zeros(3, 3, 5)}, "kernels: expected shape"),
        ({"kernels": torch.zeros(1, 3, 3, 3)}, "kernels: expected shape"),
        ({"kernels": torch.zeros(3, 3, 3, dtype=torch.float64)}, "kernels: expected dtype"),
        ({"kernels": torch.zeros(3, 3, 3, dtype=torch.uint8)}, "kernels: expected a floating dtype"),
        ({"image": torch.zeros(2, 2, 9, 11, dtype=torch.int32)}, "kernels: expected dtype"),
        (
            {
                "image": torch.zeros(2, 2, 9, 11, dtype=torch.uint8),
                "weights": torch.zeros(2, 3, dtype=torch.float64),
            },
            "weights: expected dtype",
        ),
        ({"weights": torch.zeros(2, 4)}, "weights: expected shape"),
        ({"weights_at": "image"}, "weights: expected shape"),
        ({"weights_at": "nowhere"}, "weights_at"),
        ({"padding": "valid"}, "padding"),
        ({"scale": 0}, "scale"),
        ({"offset": -1}, "offset"),
        ({"offset": 2**63 - 1}, "offset: expected from 0 to below"),
        ({"noise_std": torch.zeros(2, 1, 1, 1)}, "seed"),
        (
            {"noise_std": torch.zeros(2, 1, 3, 3), "seed": torch.tensor(1), "sample_ids": torch.arange(2)},
            "noise_std",
        ),
        (
            {"noise_std": torch.zeros(2, 1, 1, 1), "seed": torch.tensor(1), "sample_ids": torch.arange(3)},
            "sample_ids",
        ),
        ({"gray_noise": torch.zeros(2)}, "gray_noise: expected bool"),
        ({"gray_noise": torch.zeros(3, dtype=torch.bool)}, "gray_noise: expected bool"),
        ({"shot_noise": torch.zeros(2)}, "shot_noise: expected along with noise_std"),
        (
            {
                "noise_std": torch.zeros(2, 1, 1, 1),
                "seed": torch.tensor(1),
                "sample_ids": torch.arange(2),
                "shot_noise": torch.zeros(2, 1),
            },
            "shot_noise: expected shape",
        ),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    case = make().to(dtype=torch.float32).replace(**changes)
    noise = (case.seed, case.sample_ids, case.gray_noise, case.shot_noise)
    arguments = (*case.tensors, *noise, case.scale, case.offset)
    with pytest.raises((RuntimeError, ValueError), match=message):
        OP(*arguments, [9, 11], case.padding, case.correlation, case.weights_at)


def test_a_gradient_of_integers_is_refused():
    case = make().to(dtype=torch.float32).replace(image=torch.zeros(2, 2, 9, 11, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="asks for the gradient of image"):
        case.backward(BACKWARD, torch.zeros(2, 2, 9, 11), 1)


def test_sites_outside_the_image_are_refused():
    with pytest.raises(RuntimeError, match="outside the image"):
        OP(*make().tensors, *[None] * 4, 2, 0, [6, 6], "reflect", False, "sample")
