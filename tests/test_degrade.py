"""degrade against its definition, written out pixel by pixel, and against SciPy."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from helpers import assert_accurate
from torch import Tensor

import ddrf_fast
from ddrf_fast.reference import philox

pytestmark = pytest.mark.usefixtures("cpu_backend")

PADDINGS = ("reflect", "replicate", "circular", "zeros", "valid")
SCIPY_MODE = {"reflect": "mirror", "replicate": "nearest", "circular": "wrap", "zeros": "constant"}


def _source(index: int, size: int, padding: str) -> int | None:
    if 0 <= index < size:
        return index
    if padding == "reflect":
        return -index if index < 0 else 2 * (size - 1) - index
    if padding == "replicate":
        return min(max(index, 0), size - 1)
    return index % size if padding == "circular" else None


def definition(
    image, kernels, weights, *, scale=1, offset=0, padding="reflect", correlation=False, grid=False
):
    """Eq. 1-3 as they are printed: loops over output pixels and taps (float64, without noise)."""
    batch, channels, height, width = image.shape
    size = kernels.shape[-1]
    radius = size // 2
    if grid:
        weights = F.interpolate(weights, (height, width), mode="bilinear", align_corners=True)
    first, last = (offset + radius, radius) if padding == "valid" else (offset, 0)
    rows, columns = range(first, height - last, scale), range(first, width - last, scale)
    out = torch.zeros(batch, channels, len(rows), len(columns), dtype=torch.float64)
    for b in range(batch):
        bank = kernels[b] if kernels.dim() == 4 else kernels
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                if weights.dim() == 2:
                    share = weights[b]
                else:
                    full = weights.shape[2:] == (height, width)
                    share = weights[b, :, row, column] if full else weights[b, :, i, j]
                mixed = torch.einsum("m,muv->uv", share, bank)
                for u in range(-radius, radius + 1):
                    for v in range(-radius, radius + 1):
                        sign = 1 if correlation else -1
                        y = _source(row + sign * u, height, padding)
                        x = _source(column + sign * v, width, padding)
                        if y is not None and x is not None:
                            out[b, :, i, j] += mixed[u + radius, v + radius] * image[b, :, y, x]
    return out


def tensors(weights="sample", batch=2, channels=2, size=(6, 7), bank=3, kernel=3, per_sample=False):
    shape = {"sample": (), "image": size, "grid": (2, 3), "output": ((size[0] + 1) // 2, (size[1] + 1) // 2)}[
        weights
    ]
    return (
        torch.rand(batch, channels, *size, dtype=torch.float64),
        torch.rand(*((batch,) if per_sample else ()), bank, kernel, kernel, dtype=torch.float64),
        torch.rand(batch, bank, *shape, dtype=torch.float64),
    )


@pytest.mark.parametrize("weights", ["sample", "image", "output", "grid"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_is_its_definition(padding, weights):
    if padding == "valid" and weights == "output":
        image, kernels, _ = tensors(kernel=5)
        shares = torch.rand(2, 3, 1, 2, dtype=torch.float64)
    else:
        image, kernels, shares = tensors(weights, kernel=5, per_sample=weights == "grid")
    options = {"scale": 2, "padding": padding, "grid": weights == "grid", "correlation": weights == "image"}
    assert_accurate(
        ddrf_fast.degrade(image, kernels, shares, **options), definition(image, kernels, shares, **options)
    )


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1, 2), (3, 1), (4, 5)])
def test_sites_are_scale_y_plus_offset(scale, offset):
    image, kernels, shares = tensors("image", size=(9, 10))
    options = {"scale": scale, "offset": offset}
    assert_accurate(
        ddrf_fast.degrade(image, kernels, shares, **options), definition(image, kernels, shares, **options)
    )


@pytest.mark.parametrize("padding", SCIPY_MODE)
def test_agrees_with_scipy(padding):
    image, kernels, shares = tensors("image", size=(17, 19), kernel=7)
    blurred = [
        [
            [scipy.ndimage.convolve(plane.numpy(), k.numpy(), mode=SCIPY_MODE[padding]) for k in kernels]
            for plane in planes
        ]
        for planes in image
    ]
    expected = (torch.from_numpy(np.array(blurred)) * shares[:, None]).sum(2)
    assert_accurate(ddrf_fast.degrade(image, kernels, shares, padding=padding), expected)


@pytest.mark.parametrize("padding", ["reflect", "replicate", "circular"])
def test_a_constant_image_stays_constant(padding):
    """This tells the gather model from the scatter model: it holds for convex weights that vary in space."""
    kernels = torch.softmax(torch.randn(4, 25, dtype=torch.float64), 1).view(4, 5, 5)
    weights = torch.softmax(torch.randn(1, 4, 12, 13, dtype=torch.float64), 1)
    image = torch.full((1, 1, 12, 13), 0.7, dtype=torch.float64)
    out = ddrf_fast.degrade(image, kernels, weights, padding=padding)
    assert_accurate(out, image)


def test_a_delta_kernel_is_the_identity_and_moves_the_right_way():
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    delta = torch.zeros(1, 5, 5, dtype=torch.float64)
    delta[0, 2, 2] = 1
    one = torch.ones(1, 1, dtype=torch.float64)
    assert torch.equal(ddrf_fast.degrade(image, delta, one), image)
    # A tap one to the right of the centre: true convolution carries the image to the right.
    moved = ddrf_fast.degrade(image, delta.roll(1, 2), one, padding="circular")
    assert torch.equal(moved, image.roll(1, 3))
    assert torch.equal(
        ddrf_fast.degrade(image, delta.roll(1, 2), one, padding="circular", correlation=True),
        image.roll(-1, 3),
    )


@pytest.mark.parametrize("weights", ["sample", "image", "output", "grid"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_to_second_order(padding, weights):
    image, kernels, shares = tensors(weights, channels=1, size=(5, 4), per_sample=weights == "sample")
    if padding == "valid" and weights == "output":
        shares = shares[:, :, :2, :1].clone()
    std = torch.rand(2, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (image, kernels, shares, std))

    def run(image, kernels, shares, std):
        return ddrf_fast.degrade(
            image, kernels, shares, noise_std=std, seed=3, scale=2, padding=padding, grid=weights == "grid"
        )

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_noise_map_has_a_gradient():
    image, kernels, shares = tensors(size=(4, 5))
    std = torch.rand(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    run = lambda s: ddrf_fast.degrade(image, kernels, shares, noise_std=s, seed=1)  # noqa: E731
    assert torch.autograd.gradcheck(run, (std,), fast_mode=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_as_little_as_torch(dtype, channels_last):
    image, kernels, shares = (t.to(dtype) for t in tensors("image", channels=3, size=(14, 13), kernel=5))
    kernels = kernels / 25
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    out = ddrf_fast.degrade(image, kernels, shares, padding="zeros")
    wide = [t.double() for t in (image, kernels, shares)]
    exact = definition(*wide, padding="zeros")
    blurred = F.conv2d(image.flatten(0, 1)[:, None], kernels.flip(1, 2)[:, None], padding=2).unflatten(
        0, (2, 3)
    )
    assert_accurate(out, exact, lowprec=(blurred * shares[:, None]).sum(2))
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last


INTEGERS = pytest.mark.parametrize("integers", [torch.uint8, torch.uint16])


def integer_image(integers: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(0, torch.iinfo(integers).max + 1, shape, dtype=torch.int32).to(integers)


@INTEGERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["sample", "image", "output", "grid"])
def test_integers_stand_for_the_unit_range(weights, dtype, integers):
    """What comes out has the dtype of the kernels and the layout of the image, which is not rounded first."""
    _, kernels, shares = (t.to(dtype) for t in tensors(weights, channels=3, size=(14, 13), kernel=5))
    image = integer_image(integers, 2, 3, 14, 13).contiguous(memory_format=torch.channels_last)
    options = {"scale": 2, "grid": weights == "grid"}
    out = ddrf_fast.degrade(image, kernels, shares, **options)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = image.double() / torch.iinfo(integers).max
    expected = definition(exact, kernels.double(), shares.double(), **options)
    assert_accurate(out, expected, expected.to(dtype))


@INTEGERS
def test_an_image_of_integers_is_that_of_floats_divided(integers):
    _, kernels, shares = (t.float() for t in tensors("image", size=(30, 20)))
    image = integer_image(integers, 2, 2, 30, 20)
    options = {"noise_std": 0.1, "shot_noise": 0.02, "gray_noise": True, "seed": 1}
    floats = image.float() / torch.iinfo(integers).max
    of_integers, of_floats = (ddrf_fast.degrade(x, kernels, shares, **options) for x in (image, floats))
    assert torch.equal(of_integers, of_floats)


@pytest.mark.parametrize("shot_noise", [0.0, 0.1])
def test_gradients_beside_an_image_of_integers(shot_noise):
    _, kernels, shares = tensors("image", channels=1, size=(5, 4))
    image = integer_image(torch.uint8, 2, 1, 5, 4)
    inputs = (kernels, shares, torch.rand(2, dtype=torch.float64))

    def run(kernels, shares, std):
        return ddrf_fast.degrade(
            image, kernels, shares, noise_std=std, shot_noise=shot_noise, seed=3, scale=2
        )

    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_philox_gives_its_published_words():
    """Known answers of Random123: counter and key all zeros, all ones, and digits of pi."""
    cases = {
        (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
            0xD16CFE09,
            0x94FDCCEB,
            0x5001E420,
            0x24126EA1,
        ),
    }
    for words, answer in cases.items():
        counter_and_key = [torch.tensor(w) for w in words]
        assert tuple(int(v) for v in philox.philox4x32(counter_and_key[:4], counter_and_key[4:])) == answer


def noise(
    batch: int, ids=None, seed: int | Tensor = 7, size=(9, 14), dtype=torch.float32, gray_noise=False
) -> Tensor:
    """The noise alone: of a black image, with a standard deviation of one."""
    image = torch.zeros(batch, 2, *size, dtype=dtype)
    return ddrf_fast.degrade(
        image,
        torch.ones(1, 1, 1, dtype=dtype),
        torch.ones(batch, 1, dtype=dtype),
        noise_std=1,
        seed=seed,
        sample_ids=ids,
        gray_noise=gray_noise,
    )


def test_noise_is_that_of_the_definition():
    ids = torch.arange(3)
    expected = philox.standard_normal(torch.tensor(7), ids, 2, 9, 14, torch.float64)
    assert_accurate(noise(3), expected, floor=1e-6)
    assert_accurate(noise(3, dtype=torch.float64), expected, floor=1e-13)
    # By hand, for one pixel: x = 6 is lane 2 of the quad 1, the cosine of the second pair.
    words = philox.philox4x32([torch.tensor(v) for v in (1, 4, 1, 2)], [torch.tensor(7), torch.tensor(0)])
    radius = math.sqrt(-2 * math.log(((int(words[2]) >> 8) + 1) / 2**24))
    angle = 2 * math.pi * (int(words[3]) >> 8) / 2**24
    assert float(expected[2, 1, 4, 6]) == pytest.approx(radius * math.cos(angle), abs=1e-12)


def test_noise_is_standard_normal():
    values = noise(2, size=(256, 255), dtype=torch.float64).flatten()
    count = values.numel()
    assert abs(float(values.mean())) < 5 / math.sqrt(count)
    assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((values**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    assert float(values.abs().max()) > 4


def test_noise_belongs_to_the_sample_not_to_its_batch():
    whole = noise(4)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(noise(4, ids=order), whole[order])
    assert torch.equal(noise(1, ids=torch.tensor([3])), whole[3:])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(noise(4, seed=8), whole)
    assert torch.equal(noise(4, seed=torch.tensor(7)), whole)
    high = noise(4, seed=7 + 2**40)
    assert not torch.equal(high, whole)


def test_noise_without_a_seed_follows_torch():
    image, kernels, shares = tensors()

    def run() -> Tensor:
        return ddrf_fast.degrade(image, kernels, shares, noise_std=0.1)

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


def test_noise_std_is_a_number_a_vector_or_a_map():
    image, kernels, shares = tensors(size=(4, 5))
    clean = ddrf_fast.degrade(image, kernels, shares)
    unit = ddrf_fast.degrade(image, kernels, shares, noise_std=1.0, seed=2) - clean
    vector, grid = torch.rand(2, dtype=torch.float64), torch.rand(2, 1, 4, 5, dtype=torch.float64)
    for std, factor in ((0.5, 0.5), (vector, vector[:, None, None, None]), (grid, grid)):
        noisy = ddrf_fast.degrade(image, kernels, shares, noise_std=std, seed=2)
        assert_accurate(noisy - clean, unit * factor, floor=1e-12)


@pytest.mark.parametrize("name", ["noise_std", "shot_noise"])
@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_numbers_of_numpy_are_taken(number, name):
    image, kernels, weights = torch.rand(2, 1, 6, 7), torch.rand(3, 3, 3), torch.rand(2, 3)
    run = lambda value: ddrf_fast.degrade(image, kernels, weights, seed=1, **{name: value})  # noqa: E731
    assert torch.equal(run(number), run(float(number)))
    assert not torch.equal(run(number), run(0))


def test_without_noise_no_seed_is_drawn():
    image, kernels, weights = torch.rand(2, 1, 6, 7), torch.rand(3, 3, 3), torch.rand(2, 3)
    state = torch.get_rng_state()
    plain = ddrf_fast.degrade(image, kernels, weights)
    assert torch.equal(torch.get_rng_state(), state)
    options = {"seed": 1, "sample_ids": torch.arange(2), "gray_noise": True}
    assert torch.equal(ddrf_fast.degrade(image, kernels, weights, **options), plain)


def test_gray_noise_has_that_of_the_first_channel():
    assert torch.equal(noise(3, gray_noise=True), noise(3)[:, :1].expand(-1, 2, -1, -1))
    some = noise(3, gray_noise=torch.tensor([False, True, False]))
    assert torch.equal(some[::2], noise(3)[::2])
    assert torch.equal(some[1], noise(3)[1, :1].expand(2, -1, -1))


def shot(**options) -> Tensor:
    """Of a ramp from -1 to 1, without blur."""
    ramp = torch.linspace(-1, 1, 40).expand(2, 3, 30, 40)
    return ddrf_fast.degrade(ramp, torch.ones(1, 1, 1), torch.ones(2, 1), seed=4, **options)


def test_shot_noise_grows_with_the_signal():
    clean = shot()
    unit = shot(noise_std=1.0) - clean
    shot_noise = torch.tensor([0.0, 0.09])
    expected = clean + (shot_noise[:, None, None, None] * clean.clamp(min=0) + 0.04**2).sqrt() * unit
    torch.testing.assert_close(shot(noise_std=0.04, shot_noise=shot_noise), expected, atol=1e-6, rtol=0)
    alone = shot(shot_noise=0.09)
    assert torch.equal(alone[..., :20], clean[..., :20])
    torch.testing.assert_close(alone, clean + 0.3 * clean.clamp(min=0).sqrt() * unit, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", ["sample", "grid"])
def test_shot_noise_has_gradients(weights):
    image, kernels, shares = tensors(weights, size=(5, 6))
    std = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    shot_noise = torch.rand(2, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (image, kernels, shares, std, shot_noise))

    def run(image, kernels, shares, std, shot_noise):
        return ddrf_fast.degrade(
            image,
            kernels,
            shares,
            noise_std=std,
            shot_noise=shot_noise,
            gray_noise=torch.tensor([True, False]),
            seed=3,
            scale=2,
            grid=weights == "grid",
        )

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert_accurate(run(*(t.detach() for t in inputs)), run(*inputs).detach())


def test_shot_noise_has_gradients_where_there_is_none():
    """At black, where the root has no slope."""
    black = torch.zeros(1, 1, 3, 3, requires_grad=True)
    out = ddrf_fast.degrade(black, torch.ones(1, 1, 1), torch.ones(1, 1), shot_noise=0.1, seed=1)
    (found,) = torch.autograd.grad(out.sum(), black)
    assert torch.equal(out, black)
    assert found.isfinite().all()


def test_empty_batch_and_smallest_image():
    out = ddrf_fast.degrade(
        torch.rand(0, 3, 8, 9), torch.rand(2, 3, 3), torch.rand(0, 2), scale=2, noise_std=0.1
    )
    assert out.shape == (0, 3, 4, 5)
    one = torch.rand(1, 1, 1, 1, dtype=torch.float64)
    kernel = torch.rand(1, 5, 5, dtype=torch.float64)
    out = ddrf_fast.degrade(one, kernel, torch.ones(1, 1, dtype=torch.float64), padding="replicate")
    assert_accurate(out, one * kernel.sum())


def test_two_runs_give_the_same_bits():
    inputs = [t.float().requires_grad_() for t in tensors("image", size=(16, 17), kernel=5)]

    def run() -> list[Tensor]:
        out = ddrf_fast.degrade(*inputs, noise_std=0.1, seed=1)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


NAN = float("nan")
WRONG = {
    r"image must be \[B, C, H, W\]": ({"image": torch.rand(6, 7)}, ValueError),
    "image must be one of .* got int32": ({"image": torch.ones(2, 2, 6, 7, dtype=torch.int32)}, TypeError),
    "kernels must be one of .* got uint8": (
        {
            "image": torch.ones(2, 2, 6, 7, dtype=torch.uint8),
            "kernels": torch.ones(3, 3, 3, dtype=torch.uint8),
        },
        TypeError,
    ),
    "weights must have the dtype of kernels": (
        {"image": torch.ones(2, 2, 6, 7, dtype=torch.uint8), "weights": torch.ones(2, 3).double()},
        TypeError,
    ),
    r"kernels must be square, of an odd size, and at least one, got shape \(3, 4, 4\)": (
        {"kernels": torch.rand(3, 4, 4)},
        ValueError,
    ),
    r"kernels must be square.* got shape \(3, 3, 5\)": ({"kernels": torch.rand(3, 3, 5)}, ValueError),
    "must hold a bank for each of the 2 samples, got 3": ({"kernels": torch.rand(3, 3, 3, 3)}, ValueError),
    "kernels must have the dtype of image": ({"kernels": torch.rand(3, 3, 3).double()}, TypeError),
    "kernels must be finite, got 1 values": (
        {
            "kernels": torch.ones(3, 3, 3)
            .index_fill(0, torch.tensor(1), 1.0)
            .put(torch.tensor(4), torch.tensor(NAN))
        },
        ValueError,
    ),
    "weights must be finite": ({"weights": torch.full((2, 3), NAN)}, ValueError),
    r"weights must start with \[B, M\] = \(2, 3\), got shape \(2, 4\)": (
        {"weights": torch.rand(2, 4)},
        ValueError,
    ),
    r"\[B, M, 6, 7\] \(the image's size\).* got shape \(2, 3, 5, 5\)": (
        {"weights": torch.rand(2, 3, 5, 5)},
        ValueError,
    ),
    "with grid=True, got shape": ({"grid": True}, ValueError),
    "scale must be at least 1, got 0": ({"scale": 0}, ValueError),
    "scale must be an int, got 2.0": ({"scale": 2.0}, TypeError),
    "offset must be at least 0, got -1": ({"offset": -1}, ValueError),
    "offset must be below 6, got 6": ({"offset": 6}, ValueError),
    "offset must be below 4, got 4": ({"offset": 4, "padding": "valid"}, ValueError),
    "image of 0x7 is too small for padding='circular' .* at least 1": (
        {"image": torch.rand(2, 2, 0, 7), "kernels": torch.rand(3, 1, 1), "padding": "circular"},
        ValueError,
    ),
    "padding must be one of reflect, replicate, circular, zeros, valid, got 'wrap'": (
        {"padding": "wrap"},
        ValueError,
    ),
    "too small for padding='reflect' with a kernel of 13x13: each side must be at least 7": (
        {"kernels": torch.rand(3, 13, 13)},
        ValueError,
    ),
    "too small for padding='valid'": ({"kernels": torch.rand(3, 7, 7), "padding": "valid"}, ValueError),
    "noise_std must be finite and not negative, got -0.1": ({"noise_std": -0.1}, ValueError),
    "noise_std must be finite": ({"noise_std": torch.tensor([0.1, NAN])}, ValueError),
    r"noise_std must be \[B\] = \(2,\), got shape \(3,\)": ({"noise_std": torch.rand(3)}, ValueError),
    r"noise_std must be \[B\] or \[B, 1, H', W'\]": ({"noise_std": torch.rand(2, 1, 3, 3)}, ValueError),
    "noise_std must be a number or a Tensor, got '0.1'": ({"noise_std": "0.1"}, TypeError),
    "noise_std must be a number or a Tensor, got True": ({"noise_std": True}, TypeError),
    "seed must be at least 0": ({"noise_std": 0.1, "seed": -1}, ValueError),
    "seed must be below": ({"noise_std": 0.1, "seed": 2**63}, ValueError),
    "seed must be an int": ({"noise_std": 0.1, "seed": 1.5}, TypeError),
    "seed must be an int or an int64 scalar": ({"noise_std": 0.1, "seed": torch.ones(2)}, TypeError),
    "sample_ids must be an int64 Tensor": ({"noise_std": 0.1, "sample_ids": [0, 1]}, TypeError),
    "gray_noise must be a bool or a bool Tensor": (
        {"noise_std": 0.1, "gray_noise": torch.ones(2)},
        TypeError,
    ),
    r"gray_noise must be \[B\] = \(2,\)": (
        {"noise_std": 0.1, "gray_noise": torch.ones(3, dtype=torch.bool)},
        ValueError,
    ),
    "shot_noise must be finite and not negative, got -1": ({"shot_noise": -1.0}, ValueError),
    "shot_noise must be finite and not negative, got -0.5 to 1": (
        {"shot_noise": torch.tensor([1.0, -0.5])},
        ValueError,
    ),
    r"shot_noise must be \[B\] = \(2,\)": ({"shot_noise": torch.ones(3)}, ValueError),
    "shot_noise must be a number or a Tensor": ({"shot_noise": "0.1"}, TypeError),
    r"sample_ids must be \[B\] = \(2,\)": ({"noise_std": 0.1, "sample_ids": torch.arange(3)}, ValueError),
    # Without noise, too, what is given is checked.
    "seed must be an int, got 'x'": ({"seed": "x"}, TypeError),
    "seed must be at least 0, got -1": ({"seed": -1}, ValueError),
    "sample_ids must be an int64 Tensor.*, got str": ({"sample_ids": "y"}, TypeError),
    "gray_noise must be a bool or a bool Tensor.*, got str": ({"gray_noise": "z"}, TypeError),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    change, error = WRONG[message]
    named = {"image": torch.rand(2, 2, 6, 7), "kernels": torch.rand(3, 3, 3), "weights": torch.rand(2, 3)}
    with pytest.raises(error, match=message):
        ddrf_fast.degrade(**(named | change))


@pytest.mark.parametrize("padding", ["reflect", "valid"])
def test_weights_are_refused_where_they_are_read(padding):
    image, kernels, weights = torch.rand(1, 1, 9, 9), torch.rand(2, 3, 3), torch.rand(1, 2, 9, 9)
    first = 2 if padding == "valid" else 1
    run = lambda: ddrf_fast.degrade(image, kernels, weights, scale=3, offset=1, padding=padding)  # noqa: E731
    expected = run()
    weights[:, :, first + 1] = NAN
    assert torch.equal(run(), expected)
    weights[0, 1, first + 3, first] = math.inf
    with pytest.raises(ValueError, match="weights must be finite, got 1 values"):
        run()


def test_a_sum_beyond_the_largest_number_is_no_fault():
    image, kernels = torch.full((1, 1, 3, 3), 1e-30), torch.full((2, 1, 1), 3e38)
    out = ddrf_fast.degrade(image, kernels, torch.full((1, 2), 0.25))
    torch.testing.assert_close(out, torch.full((1, 1, 3, 3), 1.5e8))
