"""ddrf_fast.numpy.degrade against the torch operation, bit by bit, and as a NumPy function."""

import concurrent.futures
import multiprocessing
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch

import ddrf_fast
from ddrf_fast.ops import _native

numpy_side = pytest.importorskip(
    "ddrf_fast.numpy", reason="ddrf_fast._numpy is not built", exc_type=ImportError
)

DTYPES = (np.uint8, np.uint16, np.float32)
RNG = np.random.default_rng(0)


def random_image(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if dtype == np.float32:
        return RNG.random(shape, dtype=np.float32)
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def random_bank(count: int, size: int) -> np.ndarray:
    kernels = RNG.random((count, size, size), dtype=np.float32)
    return kernels / kernels.sum(axis=(1, 2), keepdims=True)


def by_torch(image, kernels, weights, *, noise_std=0.0, sample_id=0, **options) -> np.ndarray:
    """ddrf_fast.degrade on the float image, rounded back."""
    maximum = 1 if image.dtype == np.float32 else np.iinfo(image.dtype).max
    planes = np.atleast_3d(image).astype(np.float32) / np.float32(maximum)
    tensor = torch.from_numpy(planes).permute(2, 0, 1)[None].contiguous()
    if isinstance(noise_std, np.ndarray):
        noise_std = torch.from_numpy(noise_std)[None, None]
    with ddrf_fast.use_backend("native"):
        out = ddrf_fast.degrade(
            tensor,
            torch.from_numpy(kernels),
            torch.from_numpy(weights)[None],
            noise_std=noise_std,
            sample_ids=torch.tensor([sample_id]),
            **options,
        )
    out = out[0].permute(1, 2, 0).numpy()
    if maximum != 1:
        out = np.rint(np.clip(out, 0, 1) * np.float32(maximum)).astype(image.dtype)
    return out if image.ndim == 3 else out[:, :, 0]


@pytest.mark.skipif(not _native.status()["_C"][0], reason=_native.status()["_C"][1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(21, 38), (21, 38, 1), (21, 38, 3)])
@pytest.mark.parametrize("weights_at", ["sample", "image", "output", "grid"])
def test_the_numbers_of_the_torch_operation(weights_at, shape, dtype):
    image, kernels = random_image(shape, dtype), random_bank(3, 7)
    places = {"sample": (), "image": (21, 38), "output": (7, 13), "grid": (3, 4)}[weights_at]
    weights = RNG.dirichlet(np.ones(3), size=places).astype(np.float32)
    weights = np.ascontiguousarray(np.moveaxis(weights, -1, 0))
    for padding in ("reflect", "replicate", "circular", "zeros"):
        options = {"scale": 3, "padding": padding, "grid": weights_at == "grid", "noise_std": 0.05, "seed": 7}
        options["gray_noise"] = padding == "zeros"
        options["shot_noise"] = 0.02 if padding in ("replicate", "zeros") else 0.0
        expected = by_torch(image, kernels, weights, sample_id=9, **options)
        actual = numpy_side.degrade(image, kernels, weights, sample_id=9, **options)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)


def test_a_scale_beyond_the_size_keeps_one_site():
    image, kernels = random_image((8, 9), np.uint8), random_bank(2, 3)
    expected = numpy_side.degrade(image, kernels, np.float32([0.5, 0.5]), scale=9)
    assert expected.shape == (1, 1)
    for scale in (10, 2**31, 2**60, 2**62):
        actual = numpy_side.degrade(image, kernels, np.float32([0.5, 0.5]), scale=scale)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.skipif(not _native.status()["_C"][0], reason=_native.status()["_C"][1])
@pytest.mark.parametrize("correlation", [False, True])
def test_valid_padding_offsets_and_noise_maps(correlation):
    image, kernels, weights = random_image((20, 30, 2), np.uint8), random_bank(2, 5), np.float32([0.3, 0.7])
    options = {"padding": "valid", "scale": 2, "offset": 1, "correlation": correlation, "seed": 2**63 - 1}
    out_size = ((20 - 4 - 1 + 1) // 2, (30 - 4 - 1 + 1) // 2)
    options["noise_std"] = RNG.random(out_size, dtype=np.float32) / 10
    actual = numpy_side.degrade(image, kernels, weights, **options)
    assert actual.shape == (*out_size, 2)
    np.testing.assert_array_equal(actual, by_torch(image, kernels, weights, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_gives_the_image_back(dtype):
    image, delta = random_image((9, 70, 3), dtype), np.zeros((1, 3, 3))
    delta[0, 1, 1] = 1
    result = numpy_side.degrade(image, delta, [1.0])
    np.testing.assert_array_equal(result, image)
    assert not np.shares_memory(result, image)


def test_integers_are_rounded_and_clipped():
    image = np.array([[0, 100, 101, 200, 255]], dtype=np.uint8)

    def times(factor):
        return numpy_side.degrade(image, np.full((1, 1, 1), factor), [1.0]).tolist()

    assert times(0.5) == [[0, 50, 50, 100, 128]]  # 50.5 and 127.5 go to the even neighbour
    assert times(2.0) == [[0, 200, 202, 255, 255]]
    assert times(-1.0) == [[0, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_in_units_of_the_full_range(dtype):
    maximum = 1 if dtype == np.float32 else np.iinfo(dtype).max
    image = np.full((200, 200), maximum * 0.5, dtype=dtype)
    noise = numpy_side.degrade(image, np.ones((1, 1, 1)), [1.0], noise_std=0.1, seed=3) / maximum - 0.5
    assert abs(noise.std() - 0.1) < 0.002
    assert abs(noise.mean()) < 0.004


def test_gray_noise_is_the_same_in_all_channels():
    image = np.full((20, 30, 3), 0.5, dtype=np.float32)
    options = {"noise_std": 0.1, "seed": 1}
    gray = numpy_side.degrade(image, np.ones((1, 1, 1)), [1.0], gray_noise=True, **options)
    np.testing.assert_array_equal(gray, gray[:, :, :1].repeat(3, axis=2))
    colour = numpy_side.degrade(image, np.ones((1, 1, 1)), [1.0], **options)
    np.testing.assert_array_equal(gray[:, :, 0], colour[:, :, 0])


def test_shot_noise_alone_grows_with_the_signal():
    image = np.repeat(np.float32([[0.0, 0.25, 1.0]]), 20000, axis=0)
    noisy = numpy_side.degrade(image, np.ones((1, 1, 1)), [1.0], shot_noise=0.04, seed=1)
    np.testing.assert_allclose((noisy - image).std(axis=0), [0, 0.1, 0.2], rtol=0.02)


def test_seeds_and_sample_ids():
    image = np.full((30, 30), 128, dtype=np.uint8)

    def draw(**options):
        return numpy_side.degrade(image, np.ones((1, 1, 1)), [1.0], noise_std=0.1, **options)

    np.testing.assert_array_equal(draw(seed=1, sample_id=2), draw(seed=1, sample_id=2))
    assert (draw(seed=1, sample_id=2) != draw(seed=1, sample_id=3)).any()
    assert (draw(seed=1, sample_id=2) != draw(seed=2, sample_id=2)).any()
    assert (draw() != draw()).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    larger, kernels = random_image((40, 3, 60), dtype), random_bank(2, 5)
    view = larger.transpose(0, 2, 1)[::-2, 5:50:3, ::-1]
    assert not view.flags.c_contiguous
    weights = RNG.random((2, *view.shape[:2]))
    np.testing.assert_array_equal(
        numpy_side.degrade(view, kernels, weights), numpy_side.degrade(view.copy(), kernels, weights)
    )


def test_foreign_memory_is_read():
    """The other byte order, and fields of a record, which the kernels do not read in place."""
    image, kernels = random_image((12, 13), np.uint16), random_bank(1, 3)
    expected = numpy_side.degrade(image, kernels, [1.0])
    np.testing.assert_array_equal(numpy_side.degrade(image.astype(">u2"), kernels, [1.0]), expected)
    record = np.zeros((12, 13), dtype=[("tag", "u1"), ("value", "u2")])
    record["value"] = image
    np.testing.assert_array_equal(numpy_side.degrade(record["value"], kernels, [1.0]), expected)


def test_a_read_only_image_is_left_alone():
    image = random_image((12, 13, 3), np.uint8)
    before = image.copy()
    image.flags.writeable = False
    numpy_side.degrade(image, random_bank(2, 3), [0.5, 0.5], noise_std=0.1, seed=1)
    np.testing.assert_array_equal(image, before)


def test_the_gil_is_released():
    """Python runs in another thread while a long call is on its way."""
    image, kernels = np.zeros((700, 700, 3), dtype=np.float32), random_bank(1, 41)
    kernels = np.repeat(kernels, 8, axis=0)
    weights = np.full((8, 700, 700), 1 / 8, dtype=np.float32)
    thread = threading.Thread(target=numpy_side.degrade, args=(image, kernels, weights))
    thread.start()
    ticks = 0
    while thread.is_alive():
        ticks += 1
        time.sleep(0.001)
    # With the GIL held, this loop could run before and after the call, never within.
    assert ticks > 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_image_is_not_copied(dtype):
    """What NumPy allocates during the call is the result, a 64th of the image."""
    image = random_image((512, 3, 640), dtype).transpose(0, 2, 1)[:, ::-1]
    options = {"scale": 8, "noise_std": 0.1, "seed": 1, "shot_noise": 0.01}
    tracemalloc.start()
    try:
        numpy_side.degrade(image, random_bank(2, 5), [0.5, 0.5], **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < image.nbytes / 8


def degraded_in_worker(sample_id: int) -> np.ndarray:
    image = np.random.default_rng(sample_id).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    return numpy_side.degrade(
        image, np.full((2, 9, 9), 1 / 81), [0.3, 0.7], scale=2, noise_std=0.1, seed=5, sample_id=sample_id
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same(method):
    """After the parent has run on threads of torch and on its own."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this platform")
    expected = [degraded_in_worker(i) for i in range(8)]
    by_torch(random_image((40, 50, 3), np.uint8), random_bank(2, 9), np.float32([0.3, 0.7]), scale=2)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert all(map(np.array_equal, threads.map(degraded_in_worker, range(8)), expected))
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map_async(degraded_in_worker, range(8)).get(timeout=120)
    assert all(map(np.array_equal, found, expected))


def test_torch_is_not_needed():
    code = "import sys, ddrf_fast.numpy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


IMAGE, BANK = np.zeros((8, 9), dtype=np.uint8), np.ones((2, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[1, 2]], BANK, [1, 1]), {}, TypeError, "image must be a NumPy array, got list"),
        (
            (IMAGE.astype(np.float64), BANK, [1, 1]),
            {},
            TypeError,
            "image must be uint8, uint16 or float32, got float64",
        ),
        (
            (IMAGE[0], BANK, [1, 1]),
            {},
            ValueError,
            r"image must be \[H, W\] or \[H, W, C\], got shape \(9,\)",
        ),
        ((IMAGE, "blur", [1, 1]), {}, TypeError, "kernels must be an array of numbers"),
        ((IMAGE, np.ones((2, 3, 4)), [1, 1]), {}, ValueError, r"kernels must be \[M, k, k\] with an odd k"),
        ((IMAGE, np.ones((3, 3)), [1, 1]), {}, ValueError, r"kernels must be \[M, k, k\]"),
        ((IMAGE, np.full((1, 3, 3), np.nan), [1]), {}, ValueError, "kernels must be finite, got 9 values"),
        ((IMAGE, BANK, [1]), {}, ValueError, r"weights must be \[2\] or \[2, 8, 9\]"),
        ((IMAGE, BANK, np.ones((2, 8, 8))), {}, ValueError, r"got shape \(2, 8, 8\)"),
        ((IMAGE, BANK, [1, 1]), {"grid": True}, ValueError, r"weights must be \[2, gh, gw\] with grid=True"),
        ((IMAGE, BANK, [1, np.inf]), {}, ValueError, "weights must be finite, got 1 values"),
        ((IMAGE, BANK, [1, 1]), {"scale": 0}, ValueError, "scale must be at least 1"),
        ((IMAGE, BANK, [1, 1]), {"scale": 1.5}, TypeError, "scale must be an int, got 1.5"),
        ((IMAGE, BANK, [1, 1]), {"offset": 8}, ValueError, "offset must be below 8, got 8"),
        (
            (IMAGE, BANK, [1, 1]),
            {"offset": 6, "padding": "valid"},
            ValueError,
            "offset must be below 6, got 6",
        ),
        ((IMAGE, BANK, [1, 1]), {"padding": "mirror"}, ValueError, "padding must be one of reflect"),
        (
            (IMAGE, np.ones((1, 17, 17)), [1]),
            {},
            ValueError,
            "image of 8x9 is too small for padding='reflect'",
        ),
        ((IMAGE, BANK, [1, 1]), {"noise_std": -1.0}, ValueError, "noise_std must not be negative, got -1"),
        (
            (IMAGE, BANK, [1, 1]),
            {"noise_std": np.ones(8)},
            ValueError,
            r"noise_std must be a number or \[H', W'\]",
        ),
        ((IMAGE, BANK, [1, 1]), {"noise_std": 1.0, "seed": -1}, ValueError, "seed must be at least 0"),
        ((IMAGE, BANK, [1, 1]), {"shot_noise": -1.0}, ValueError, "shot_noise must be a number and not neg"),
        ((IMAGE, BANK, [1, 1]), {"shot_noise": [1, 1]}, ValueError, "shot_noise must be a number"),
        ((IMAGE, BANK, [1, 1]), {"sample_id": "first"}, TypeError, "sample_id must be an int"),
        (
            (IMAGE, BANK, [1, 1]),
            {"gray_noise": np.array([1, 2])},
            TypeError,
            "gray_noise must be a bool, got",
        ),
        ((IMAGE, BANK, [1, 1]), {"gray_noise": "no"}, TypeError, "gray_noise must be a bool, got 'no'"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        numpy_side.degrade(*arguments, **options)
