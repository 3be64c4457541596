"""`fuse` and `Fuser`: what goes in comes out, in type, depth, size and colour, and bad input is named."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import ddrf_fast
from ddrf_fast.inference import Fuser
from ddrf_fast.models import DDRFNet, DDRFNetConfig, save_model

SIZE = (45, 62)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("weights") / "small.safetensors", seed=0)


@pytest.fixture(scope="module")
def fuser(weights):
    return Fuser(weights, "cpu")


def _save(path, seed):
    torch.manual_seed(seed)
    model = DDRFNet(DDRFNetConfig(width=8, blocks=1, num_kernels=2))
    with (
        torch.no_grad()
    ):  # an untrained network returns the mean of its inputs; this one adds something of its own
        model.fusion.output.weight.mul_(2)
    return save_model(model, path)


def _pair(seed=0, size=SIZE):
    """A smooth image in colour and a grey one, float64 in 0.25..0.75 so that nothing is clipped."""
    rng = np.random.default_rng(seed)
    images = [
        cv2.resize(rng.random((5, 6, channels)), size[::-1], interpolation=cv2.INTER_LINEAR)
        for channels in (3, 1)
    ]
    return tuple(0.25 + 0.5 * image for image in images)


def _as(image, dtype):
    if np.issubdtype(dtype, np.floating):
        return image.astype(dtype)
    return np.round(image * np.iinfo(dtype).max).astype(dtype)


def _luma(image):
    """BT.601, from OpenCV: an opinion of its own."""
    return cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2YCrCb)[..., 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_colour_is_the_visible_images_and_luma_the_networks(fuser, dtype):
    visible, infrared = (_as(image, dtype) for image in _pair())
    peak = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    fused = fuser(visible, infrared)
    assert fused.dtype == dtype
    assert fused.shape == visible.shape
    assert fused.flags.c_contiguous  # as OpenCV's drawing functions need it

    before, after = (
        cv2.cvtColor((image / peak).astype(np.float32), cv2.COLOR_RGB2YCrCb) for image in (visible, fused)
    )
    # A rounding of half a grey value in each channel changes Cb by at most 0.564 * 1, Cr by 0.713.
    tolerance = 0.72 / peak if peak > 1 else 2e-6
    np.testing.assert_allclose(after[..., 1:], before[..., 1:], atol=tolerance, rtol=0)

    with torch.inference_mode():
        inputs = (torch.from_numpy(image)[None, None].float() for image in (before[..., 0], infrared / peak))
        expected = fuser.model(*inputs).fused[0, 0].numpy()
    assert np.abs(expected - before[..., 0]).max() > 0.05  # the network did change it
    np.testing.assert_allclose(after[..., 0], expected, atol=0.5 / peak + 1e-5 if peak > 1 else 1e-5, rtol=0)


def test_array_tensor_pil_and_path_give_the_same_numbers(fuser, tmp_path):
    image = pytest.importorskip("PIL.Image")
    visible, infrared = (_as(image_, np.uint8) for image_ in _pair())
    expected = fuser(visible, infrared)

    tensors = [torch.from_numpy(visible).permute(2, 0, 1), torch.from_numpy(infrared)]
    result = fuser(*tensors)
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), expected)

    result = fuser(image.fromarray(visible), image.fromarray(infrared))
    assert (result.mode, result.size) == ("RGB", SIZE[::-1])
    np.testing.assert_array_equal(np.asarray(result), expected)

    cv2.imwrite(str(tmp_path / "visible.png"), visible[..., ::-1])
    cv2.imwrite(str(tmp_path / "infrared.png"), infrared)
    np.testing.assert_array_equal(fuser(tmp_path / "visible.png", str(tmp_path / "infrared.png")), expected)


def test_sixteen_bit_files_and_images_stay_sixteen_bit(fuser, tmp_path):
    image = pytest.importorskip("PIL.Image")
    visible, infrared = (_as(image_, np.uint16) for image_ in _pair())
    grey = visible[..., 0].copy()
    expected = fuser(visible, infrared)
    cv2.imwrite(str(tmp_path / "visible.png"), visible[..., ::-1])
    cv2.imwrite(str(tmp_path / "infrared.tif"), infrared)
    np.testing.assert_array_equal(fuser(tmp_path / "visible.png", tmp_path / "infrared.tif"), expected)

    result = fuser(image.fromarray(grey), infrared)
    assert result.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(result), fuser(grey, infrared))


def test_depth_is_that_of_the_dtype_however_dark_the_image(fuser):
    visible, infrared = (np.round(image * 200).astype(np.uint16) for image in _pair())
    with pytest.warns(UserWarning, match="values from 52 to 148 only"):
        fused = fuser(visible, infrared)
    expected = fuser((visible / 65535).astype(np.float32), (infrared / 65535).astype(np.float32))
    np.testing.assert_allclose(fused, expected * 65535, atol=0.51)


def test_depths_may_differ(fuser):
    visible, infrared = _pair()
    fused = fuser(_as(visible, np.uint8), _as(infrared, np.uint16))
    assert fused.dtype == np.uint8
    assert np.abs(fused.astype(int) - fuser(_as(visible, np.uint8), _as(infrared, np.uint8))).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (37, 51), (64, 64)])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_any_size_grey_or_colour(fuser, size, shape):
    rng = np.random.default_rng(1)
    visible = rng.integers(0, 256, (*size, *shape), np.uint8)
    fused = fuser(visible, rng.integers(0, 256, size, np.uint8))
    assert fused.shape == visible.shape
    assert fused.dtype == np.uint8


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3)])
def test_tensors_of_every_shape_and_dtype(fuser, dtype, shape):
    torch.manual_seed(0)
    visible, infrared = torch.rand(*shape, 20, 31), torch.rand(*shape[:-1], 1, 20, 31)
    if not dtype.is_floating_point:
        peak = 2**8 - 1 if dtype == torch.uint8 else 2**16 - 1
        visible, infrared = ((image * peak).round().to(dtype) for image in (visible, infrared))
    fused = fuser(visible.to(dtype), infrared.to(dtype))
    assert (fused.shape, fused.dtype) == (visible.shape, dtype)
    assert torch.isfinite(fused.float()).all()


def test_a_batch_is_its_samples(fuser):
    torch.manual_seed(0)
    visible, infrared = torch.rand(3, 3, 24, 33), torch.rand(3, 1, 24, 33)
    together = fuser(visible, infrared)
    for sample in range(3):
        torch.testing.assert_close(
            together[sample], fuser(visible[sample], infrared[sample]), atol=1e-5, rtol=0
        )


def test_views_are_taken_as_they_look_and_left_as_they_were(fuser):
    visible, infrared = (_as(image, np.uint8) for image in _pair())
    expected = fuser(np.rot90(visible).copy(), np.rot90(infrared).copy())
    copies = visible.copy(), infrared.copy()
    np.testing.assert_array_equal(fuser(np.rot90(visible), np.rot90(infrared)), expected)
    big_endian = fuser(_as(_pair()[0], np.uint16).astype(">u2"), infrared)
    assert big_endian.dtype == np.dtype(">u2")
    np.testing.assert_array_equal(big_endian, fuser(_as(_pair()[0], np.uint16), infrared))
    np.testing.assert_array_equal(visible, copies[0])
    np.testing.assert_array_equal(infrared, copies[1])


def test_the_result_can_take_part_in_a_computation_with_gradients(fuser):
    visible = torch.rand(3, 16, 16, requires_grad=True)
    fused = fuser(visible, torch.rand(16, 16))
    assert not fused.requires_grad
    (fused * visible).sum().backward()
    torch.testing.assert_close(visible.grad, fused)


def test_an_infrared_image_of_three_equal_channels_is_grey(fuser):
    visible, infrared = (_as(image, np.uint8) for image in _pair())
    expected = fuser(visible, infrared)
    fused = fuser(visible, np.repeat(infrared[..., None], 3, axis=2))
    assert np.abs(fused.astype(int) - expected).max() <= 1  # 0.299 + 0.587 + 0.114 is 1 but for a rounding


def test_fuse_loads_once_and_again_when_the_file_has_changed(tmp_path):
    visible, infrared = _pair()
    path = _save(tmp_path / "weights.safetensors", seed=1)
    first = ddrf_fast.fuse(visible, infrared, weights=path, device="cpu")
    np.testing.assert_array_equal(first, Fuser(path, "cpu")(visible, infrared))
    _save(path, seed=2)
    second = ddrf_fast.fuse(visible, infrared, weights=path, device="cpu")
    assert np.abs(first - second).max() > 0.01
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        ddrf_fast.fuse(visible, infrared, weights=path, device="cpu")


GREY, COLOUR = np.zeros((8, 10), np.uint8), np.zeros((8, 10, 3), np.uint8)
NAN = np.full((8, 10), np.nan, np.float32)


@pytest.mark.parametrize(
    ("visible", "infrared", "error", "message"),
    [
        (COLOUR, np.zeros((10, 8), np.uint8), ValueError, r"visible is 10x8 and infrared is 8x10"),
        (
            torch.zeros(2, 1, 8, 10),
            torch.zeros(3, 1, 8, 10),
            ValueError,
            r"visible is 2 of 10x8 and infrared is 3 of",
        ),
        (NAN, GREY, ValueError, "visible holds NaN"),
        (GREY, torch.from_numpy(NAN), ValueError, "infrared holds NaN"),
        (GREY.astype(np.float32) + 255, GREY, ValueError, r"visible must be in \[0, 1\].*255 to 255"),
        (torch.full((8, 10), -0.5), GREY, ValueError, r"visible must be in \[0, 1\].*-0.5"),
        (GREY.astype(np.int64), GREY, TypeError, "visible must be uint8, uint16 or floating.*int64"),
        (GREY, GREY > 0, TypeError, "infrared must be uint8, uint16 or floating.*bool"),
        (torch.zeros(8, 10, dtype=torch.int32), GREY, TypeError, "visible must be uint8.*int32"),
        (np.zeros((3, 8, 10), np.uint8), GREY, ValueError, r"visible must be \[H, W\].*\[3, 8, 10\]"),
        (torch.zeros(8, 10, 3), GREY, ValueError, r"visible must be \[H, W\].*\[8, 10, 3\]"),
        (np.zeros((8, 10, 5), np.uint8), GREY, ValueError, r"visible must be .*\[8, 10, 5\]"),
        (np.zeros((0, 10), np.uint8), GREY, ValueError, "visible is empty"),
        (7, GREY, TypeError, "visible must be a NumPy array, a tensor, a PIL image or a path, got int"),
        (GREY, COLOUR + np.uint8((0, 120, 240)), ValueError, "infrared is in colour.*swapped"),
    ],
)
def test_bad_images_are_named(fuser, visible, infrared, error, message):
    with pytest.raises(error, match=message):
        fuser(visible, infrared)


def test_bad_files_are_named(fuser, tmp_path):
    (tmp_path / "no_image.png").write_bytes(b"this is text")
    for name in ("no_image.png", "missing.png"):
        with pytest.raises((ValueError, OSError), match=name):
            fuser(tmp_path / name, GREY)
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match=r"mode L, LA, RGB, RGBA or I;16, got CMYK"):
        fuser(image.new("CMYK", (10, 8)), GREY)


def test_bad_devices_and_weights_are_named(weights, tmp_path):
    with pytest.raises(ValueError, match="'toaster'"):
        Fuser(weights, "toaster")
    with pytest.raises(ValueError, match=r"cuda:77.*CUDA devices are there"):
        Fuser(weights, "cuda:77")
    (tmp_path / "text.safetensors").write_text("weights?")
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        Fuser(tmp_path / "text.safetensors", "cpu")


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives(weights, fuser):
    visible, infrared = (_as(image, np.uint8) for image in _pair())
    on_gpu = Fuser(weights, "cuda")(visible, infrared)
    assert np.abs(on_gpu.astype(int) - fuser(visible, infrared)).max() <= 1
    result = ddrf_fast.fuse(torch.rand(3, 16, 16, device="cuda"), torch.rand(16, 16), weights=weights)
    assert result.is_cuda


def test_the_shipped_weights_bring_the_sample_pair_together():
    """A pedestrian that only the infrared image shows bright, a sign that only the visible image shows."""
    assets = Path(ddrf_fast.__file__).parent / "assets"
    visible = cv2.imread(str(assets / "sample_visible.png"))[..., ::-1]
    infrared = cv2.imread(str(assets / "sample_infrared.png"), cv2.IMREAD_GRAYSCALE)
    fused = ddrf_fast.fuse(visible, infrared, device="cpu")
    visible, fused = (255 * _luma(image / 255) for image in (visible, fused))
    person, road, sign = np.s_[215:250, 396:412], np.s_[215:250, 356:376], np.s_[132:150, 330:358]
    assert visible[person].mean() < visible[road].mean() - 20
    assert fused[person].mean() > fused[road].mean() + 20
    assert infrared[sign].std() < 5
    assert fused[sign].std() > 25
