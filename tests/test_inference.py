"""Sessions: what goes in comes out, in type, depth, size and colour, and bad input is named."""

import copy
import inspect
import itertools
import pickle
import threading
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import run_capability
from PIL import Image

import ddrf_fast
from ddrf_fast.data import read_image, thermal, write_image
from ddrf_fast.data.thermal import SteadyRange, ThermalRange, percentiles
from ddrf_fast.degradation import DynamicDegradation, low_light, reduce_contrast, undo_darkness
from ddrf_fast.demo.sample import SAMPLE_INFRARED, SAMPLE_VISIBLE
from ddrf_fast.inference import Degrader, Fuser, Network, Restorer, functions, pictures
from ddrf_fast.inference.alignment import as_homography, warp
from ddrf_fast.inference.pictures import Picture
from ddrf_fast.inference.streaming import ahead
from ddrf_fast.models import DDRFNet, DDRFNetConfig, ddrfnet, load_model, save_model
from ddrf_fast.models.ddrfnet import pad_to_even

SIZE = (45, 62)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("weights") / "small.safetensors", seed=3)


@pytest.fixture(scope="module")
def fuser(weights):
    return Fuser(weights, "cpu", dtype="float32")


def _save(path, seed):
    torch.manual_seed(seed)
    model = DDRFNet(DDRFNetConfig(width=8, blocks=1, num_kernels=2))
    with torch.no_grad():
        # An untrained network returns little but its inputs; this one adds something of its own. And it does
        # not choose the livelier detail, which turns a rounding of the inputs into several of the output:
        # what sessions do to the inputs is to be seen. Codes mean nothing without a training.
        model.fusion.output.weight.mul_(2)
        model.fusion.output.weight[:, :, -2 * model.config.code_channels :] = 0
        model.fusion.selectivity.zero_()
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
    with torch.inference_mode():
        inputs = (torch.from_numpy(image)[None, None].float() for image in (before[..., 0], infrared / peak))
        expected = fuser.model(*inputs).fused[0, 0].numpy()
    change = expected - before[..., 0]
    assert np.abs(change).max() > 0.05  # the network did change it
    # What leaves [0, 1] is clipped, and changes its colour; the rest keeps it.
    exact = visible / peak + change[..., None]
    inside = ((exact >= 0) & (exact <= 1)).all(axis=2)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(fused / peak, exact.clip(0, 1), atol=0.5 / peak + 1e-5 if peak > 1 else 1e-5)
    # A rounding of half a grey value in each channel changes Cb by at most 0.564 * 1, Cr by 0.713.
    tolerance = 0.72 / peak if peak > 1 else 2e-6
    np.testing.assert_allclose(after[inside, 1:], before[inside, 1:], atol=tolerance, rtol=0)
    tolerance = 0.5 / peak + 1e-5 if peak > 1 else 1e-5
    np.testing.assert_allclose(after[inside, 0], expected[inside], atol=tolerance, rtol=0)


def test_array_tensor_pil_and_path_give_the_same_numbers(fuser, tmp_path):
    visible, infrared = (_as(image_, np.uint8) for image_ in _pair())
    expected = fuser(visible, infrared)

    tensors = [torch.from_numpy(visible).permute(2, 0, 1), torch.from_numpy(infrared)]
    result = fuser(*tensors)
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), expected)

    result = fuser(Image.fromarray(visible), Image.fromarray(infrared))
    assert (result.mode, result.size) == ("RGB", SIZE[::-1])
    np.testing.assert_array_equal(np.asarray(result), expected)

    cv2.imwrite(str(tmp_path / "visible.png"), visible[..., ::-1])
    cv2.imwrite(str(tmp_path / "infrared.png"), infrared)
    np.testing.assert_array_equal(fuser(tmp_path / "visible.png", str(tmp_path / "infrared.png")), expected)


def test_sixteen_bit_files_and_images_stay_sixteen_bit(fuser, tmp_path):
    visible, infrared = (_as(image_, np.uint16) for image_ in _pair())
    grey = visible[..., 0].copy()
    expected = fuser(visible, infrared)
    cv2.imwrite(str(tmp_path / "visible.png"), visible[..., ::-1])
    cv2.imwrite(str(tmp_path / "infrared.tif"), infrared)
    np.testing.assert_array_equal(fuser(tmp_path / "visible.png", tmp_path / "infrared.tif"), expected)

    result = fuser(Image.fromarray(grey), infrared)
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


def test_a_grey_image_is_known_for_one_by_its_shape(monkeypatch):
    monkeypatch.setattr(Picture, "_strips", lambda picture: pytest.fail("its values were converted"))
    assert not Picture.take(_as(_pair()[1], np.uint16), "infrared", ThermalRange()).colour


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


def test_weights_in_a_folder_are_loaded_again_when_they_have_changed(tmp_path):
    visible, infrared = _pair()
    models = [load_model(_save(tmp_path / f"{seed}.safetensors", seed)) for seed in (1, 2)]
    for model in models:
        path = model.save_pretrained(tmp_path / "weights")
        fused = ddrf_fast.fuse(visible, infrared, weights=path, device="cpu")
        np.testing.assert_array_equal(fused, Fuser(path, "cpu")(visible, infrared))


def test_sessions_can_be_copied_and_sent_to_other_processes(fuser):
    visible, infrared = _pair()
    expected = fuser(visible, infrared)
    for other in (copy.deepcopy(fuser), pickle.loads(pickle.dumps(fuser))):
        assert other.network is not fuser.network
        np.testing.assert_array_equal(other(visible, infrared), expected)


def test_torchs_default_dtype_is_no_matter(weights):
    visible, infrared = (image.astype(np.float32) for image in _pair(size=(70, 80)))

    def results():
        network = Network(weights, "cpu", "float32")
        yield Fuser(network, clean=True)(visible, infrared)
        for settings in ({"noise_std": 0.05}, {"kernel": np.ones((3, 3))}, {"refine": True}):
            yield Restorer(network, **settings)(visible)

    expected = list(results())
    torch.set_default_dtype(torch.float64)
    try:
        for found, other in zip(results(), expected, strict=True):
            np.testing.assert_allclose(found, other, atol=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_liners_take_what_the_network_computes_in(weights):
    visible, infrared = _pair()
    given = {"weights": weights, "device": "cpu"}
    for settings in ({"dtype": "bfloat16"}, {"dtype": "float32", "tile": 16}):
        fused = ddrf_fast.fuse(visible, infrared, **given, **settings)
        np.testing.assert_array_equal(fused, Fuser(**given, **settings)(visible, infrared))
        restored = ddrf_fast.restore(visible, **given, **settings)
        np.testing.assert_array_equal(restored, Restorer(**given, **settings)(visible))
        # Told by their last digits from what the usual settings give.
        assert (fused != ddrf_fast.fuse(visible, infrared, **given, dtype="float32")).any()
        assert (restored != ddrf_fast.restore(visible, **given, dtype="float32")).any()
    by_name = ddrf_fast.fuse(visible, infrared, **given, dtype="float32", tile=0)
    np.testing.assert_array_equal(
        ddrf_fast.fuse(visible, infrared, **given, dtype=torch.float32, tile=0), by_name
    )
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, .*, got 'int8'"):
        ddrf_fast.fuse(visible, infrared, **given, dtype="int8")
    with pytest.raises(ValueError, match=r"tile must be 'auto', 0 for no strips or their height.*, got -1"):
        ddrf_fast.restore(visible, **given, tile=-1)


@pytest.mark.parametrize(
    ("settings", "session"),
    [(functions.FuserSettings, Fuser), (functions.RestorerSettings, Restorer)],
)
def test_one_liners_pass_on_every_setting_of_their_session(settings, session):
    taken = list(inspect.signature(session).parameters)
    assert taken[:4] == ["weights", "device", "dtype", "tile"]
    assert list(settings.__annotations__) == taken[4:]


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
    with pytest.raises(ValueError, match=r"mode L, LA, RGB, RGBA or I;16, got CMYK"):
        fuser(Image.new("CMYK", (10, 8)), GREY)


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


# --- alpha, orientation, colour ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_alpha_is_kept(fuser, dtype):
    visible, infrared = (_as(image_, dtype) for image_ in _pair())
    alpha = _as(np.random.default_rng(3).random((*SIZE, 1)), dtype)
    expected = fuser(visible, infrared)
    for colour in (visible, visible[..., :1]):
        with_alpha = np.concatenate((colour, alpha), axis=2)
        fused = fuser(with_alpha, np.concatenate((infrared[..., None], alpha), axis=2))
        assert fused.dtype == dtype
        np.testing.assert_array_equal(fused[..., -1:], alpha)
        np.testing.assert_array_equal(fused[..., :-1], fuser(colour, infrared))
    planes = torch.from_numpy(np.concatenate((visible, alpha), axis=2)).permute(2, 0, 1)
    np.testing.assert_array_equal(fuser(planes, infrared)[:3].permute(1, 2, 0).numpy(), expected)
    if dtype == np.uint8:
        for mode, channels in (("RGBA", 4), ("LA", 2)):
            given = np.concatenate((visible, alpha), axis=2)[..., -channels:]
            result = fuser(Image.fromarray(given), infrared)
            assert result.mode == mode
            np.testing.assert_array_equal(np.asarray(result), fuser(given, infrared))


def test_pil_images_are_turned_upright(fuser):
    visible, infrared = (_as(image_, np.uint8) for image_ in _pair())
    turned = Image.fromarray(np.rot90(visible).copy())
    turned.getexif()[0x0112] = 6  # to be turned back
    result = fuser(turned, infrared)
    np.testing.assert_array_equal(np.asarray(result), fuser(visible, infrared))
    assert 0x0112 not in result.getexif()


def test_pil_images_keep_the_profile_of_their_colours(fuser):
    visible, infrared = (_as(image_, np.uint8) for image_ in _pair())
    given = Image.fromarray(visible)
    given.info["icc_profile"] = b"of colours"
    assert fuser(given, infrared).info["icc_profile"] == b"of colours"
    assert "icc_profile" not in Fuser(fuser.network, color="gray")(given, infrared).info


def test_color_rgb_fuses_each_channel_and_gray_gives_the_luminance(weights, fuser):
    visible, infrared = _pair()
    by_channel = Fuser(fuser.network, color="rgb")(visible, infrared)
    for channel in range(3):
        expected = fuser(visible[..., channel], infrared)
        np.testing.assert_allclose(by_channel[..., channel], expected, atol=1e-5)
    gray = Fuser(fuser.network, color="gray")(visible, infrared)
    assert gray.shape == SIZE
    np.testing.assert_allclose(gray, fuser(_luma(visible), infrared), atol=1e-5)
    pil = Image.fromarray(_as(visible, np.uint8))
    assert Fuser(fuser.network, color="gray")(pil, infrared).mode == "L"


def test_large_images_are_converted_in_strips_without_a_difference(fuser, monkeypatch):
    visible, infrared = (_as(image, np.uint16) for image in _pair())
    expected = fuser(visible, infrared)
    monkeypatch.setitem(pictures._STRIP, "cpu", 7 * SIZE[1])
    np.testing.assert_array_equal(fuser(visible, infrared), expected)


# --- thermal values ----------------------------------------------------------------------------------------


def test_thermal_values_are_mapped_as_asked(fuser):
    visible, infrared = _pair()
    raw = np.round(7000 + 1000 * infrared).astype(np.uint16)
    low, high = np.percentile(raw, (1, 99))
    for given, bounds in (
        ((7100, 7900), (7100, 7900)),
        ("7100,7900", (7100, 7900)),
        ("minmax", (raw.min(), raw.max())),
        ("percentile", (low, high)),
        ("1%,99%", (low, high)),
    ):
        expected = fuser(visible, ((raw - bounds[0]) / (bounds[1] - bounds[0])).clip(0, 1))
        session = Fuser(fuser.network, thermal_range=given)
        np.testing.assert_allclose(session(visible, raw), expected, atol=1e-5)
        kelvin = (raw / 25).astype(np.float32)
        if not isinstance(given, tuple) and given != "7100,7900":
            np.testing.assert_allclose(session(visible, kelvin), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_percentiles_are_those_of_numpy(monkeypatch, dtype):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(thermal, "_COUNTED", 37)
    for size in (1, 2, 3, 36, 37, 38, 400):
        for values in (rng.integers(0, np.iinfo(dtype).max + 1, (size, 2)), rng.integers(100, 110, size)):
            image, asked = values.astype(dtype), (0, 0.5, 1, 33, 50, 99, 99.9, 100)
            found = percentiles(image, asked)
            np.testing.assert_allclose(found, np.percentile(image, asked), rtol=1e-14, atol=0)
            np.testing.assert_array_equal(percentiles(image[::-1].T, asked), found)


def test_a_steady_range_follows_the_images_little_by_little():
    """The grey of each value goes a part of its way to that of the image alone."""
    lows, highs = np.array([[500, 100, 100, 4000, 100], [500, 200, 1100, 4050, 1100]], np.uint16)
    values, grey = np.linspace(0, 5000, 7), None
    steady = SteadyRange(ThermalRange.parse("minmax"), smoothing=4)
    for low, high in zip(lows, highs, strict=True):
        found = steady(np.array([[low, high]]))
        if low == high:
            assert (found.low, found.high) == (low, high)
            continue
        own = (values - low) / (float(high) - low)
        grey = own if grey is None else grey + (own - grey) / 4
        np.testing.assert_allclose((values - found.low) / (found.high - found.low), grey)
    assert steady(np.full((2, 3), 7000, np.uint16)) == found, "one value says nothing of contrast"
    for value, smoothing in (("minmax", 1), ("full", 4), ((5, 9), 4)):
        asked = ThermalRange.parse(value)
        assert SteadyRange(asked, smoothing)(values) == asked


def test_a_pair_may_have_a_thermal_range_of_its_own(fuser):
    visible, infrared = _pair()
    raw = np.round(7000 + 1000 * infrared).astype(np.uint16)
    session = Fuser(fuser.network, thermal_range="minmax")
    request = session.prepare(visible, raw, thermal_range=ThermalRange.parse((7000, 8000)))
    assert request.mapped == (7000, 8000)
    expected = ((raw - 7000.0) / 1000)[None, None]
    np.testing.assert_allclose(request.infrared.numpy(), expected, atol=1e-6)


def test_thermal_values_are_taken_as_they_are_and_told_of_otherwise(fuser):
    visible, infrared = _pair()
    with pytest.warns(UserWarning, match=r"16 bit, but values from 72\d\d to 77\d\d only.*thermal_range="):
        fuser(visible, np.round(7000 + 1000 * infrared).astype(np.uint16))
    with pytest.warns(UserWarning, match="16 bit") as told:
        list(
            fuser.stream(
                (visible, np.round((7000 + n) + 1000 * infrared).astype(np.uint16)) for n in range(3)
            )
        )
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuser(visible, _as(infrared, np.uint16))
        fuser(visible, np.full(SIZE, 7000, np.uint16))  # nothing to spread
        Fuser(fuser.network, thermal_range="minmax")(visible, np.full(SIZE, 7000, np.uint16))
    with pytest.raises(ValueError, match=r"got values from 280 to 300 \(thermal_range maps other values\)"):
        fuser(visible, np.linspace(280, 300, visible[..., 0].size).reshape(SIZE))


@pytest.mark.filterwarnings("ignore:the infrared image has 16 bit")
@pytest.mark.parametrize("color", ["ycbcr", "rgb"])
def test_raw_thermal_values_are_low_and_not_dark(weights, color):
    network = Network(weights, "cpu", "float32")
    with torch.no_grad():
        network.model.infrared_tone.head.bias[0] = 3.0  # takes every image for dark
        network.model.visible_tone.head.bias[0] = -3.0
    visible, infrared = _pair()
    raw = np.round(16383 * (infrared - 0.25) / infrared.max()).astype(np.uint16)  # 14 bit of 16
    planes = torch.from_numpy(raw / 65535)[None, None].float()
    seen = torch.from_numpy(visible).permute(2, 0, 1)[:, None].float()
    with torch.inference_mode():
        own = network.model.estimate_code("infrared", planes)
        assert (own[:, -3:] != 1).any()
        own[:, -3:] = 1
        restored = network.model.restore("infrared", planes, own)
        fused = network.model(seen, planes.expand_as(seen), infrared_code=own.expand(3, -1)).fused
    found = Restorer(network, color=color)(infrared=raw)
    np.testing.assert_allclose(found / 65535, restored[0, 0].clamp(0, 1), atol=2e-5)
    shifted = np.eye(3) + np.array([[0, 0, 0.25], [0, 0, 0], [0, 0, 0]])  # of all but a column
    for session in (Fuser(network, color=color), Fuser(network, color=color, homography=shifted)):
        if color == "rgb" and session.homography is None:
            expected = fused[:, 0].permute(1, 2, 0).clamp(0, 1)
            np.testing.assert_allclose(session(visible, raw), expected, atol=2e-5)
        request = session.prepare(visible, raw)
        assert (request.infrared_code[:, -3:] == 1).all()
        # With others that may be dark, in one batch.
        pairs = [(visible, infrared), (visible, raw), (visible, raw)]
        for pair, result in zip(pairs, session.stream(pairs, batch_size=3), strict=True):
            np.testing.assert_allclose(result, session(*pair), atol=2e-5)


def test_each_image_of_a_batch_is_mapped_by_its_own_values(fuser):
    torch.manual_seed(0)
    visible, infrared = torch.rand(2, 3, 20, 30), torch.rand(2, 1, 20, 30)
    infrared[1] += 7
    session = Fuser(fuser.network, thermal_range="minmax")
    together = session(visible, infrared)
    for sample in range(2):
        alone = session(visible[sample], infrared[sample])
        torch.testing.assert_close(together[sample], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", ["auto", "5", "3,2", "3,3", "-1%,50%", "1%,101%", "a,b", "0,inf", (1,), 7])
def test_ranges_that_are_none_are_named(value):
    with pytest.raises(ValueError, match="thermal_range must"):
        ThermalRange.parse(value)


# --- sizes and alignment -----------------------------------------------------------------------------------


def test_sizes_differ_only_where_that_is_allowed(fuser):
    visible, infrared = (_as(image, np.uint8) for image in _pair())
    small = cv2.resize(infrared, (31, 23), interpolation=cv2.INTER_AREA)
    with pytest.raises(ValueError, match=r"visible is 62x45 and infrared is 31x23 .*resize='visible'"):
        fuser(visible, small)
    fused = Fuser(fuser.network, resize="visible")(visible, small)
    assert fused.shape == visible.shape
    enlarged = cv2.resize(small, (62, 45), interpolation=cv2.INTER_LINEAR)
    assert np.abs(fused.astype(int) - fuser(visible, enlarged)).max() <= 2
    rgba = np.dstack((visible, visible[..., 0]))
    fused = Fuser(fuser.network, resize="infrared")(rgba, small)
    assert fused.shape == (23, 31, 4)
    reduced = cv2.resize(rgba, (31, 23), interpolation=cv2.INTER_AREA)
    assert np.abs(fused[..., 3].astype(int) - reduced[..., 3]).max() <= 2
    assert np.abs(fused.astype(int) - fuser(reduced, small))[3:-3, 3:-3].max() <= 3


def test_a_homography_takes_infrared_pixels_to_visible_ones(fuser, tmp_path):
    visible, infrared = _pair()
    angle = np.deg2rad(7)
    homography = np.array(
        [[0.9 * np.cos(angle), -np.sin(angle), 5], [np.sin(angle), np.cos(angle), -3], [1e-4, -2e-4, 1]]
    )
    planes = [torch.from_numpy(image)[None, None] for image in (infrared, _luma(visible).astype(np.float64))]
    warped, reach = warp(planes[0], homography, onto=planes[1])
    warped, reach = warped[0, 0].numpy(), reach[0, 0].numpy()
    expected = cv2.warpPerspective(infrared, homography, SIZE[::-1], flags=cv2.INTER_LINEAR)
    inside = cv2.warpPerspective(np.ones(SIZE), homography, SIZE[::-1], flags=cv2.INTER_LINEAR) == 1
    assert 0.3 < inside.mean() < 0.95
    assert np.abs(warped - expected)[inside].max() < 0.01  # OpenCV rounds places to 1/32 pixel
    outside = cv2.warpPerspective(np.ones(SIZE), homography, SIZE[::-1], flags=cv2.INTER_LINEAR) == 0
    outside = cv2.erode(outside.astype(np.uint8), np.ones((3, 3))) == 1
    np.testing.assert_array_equal(warped[outside], _luma(visible)[outside])
    assert reach[inside].all() and not reach[outside].any()

    luma, thermal, stand_in = (
        torch.from_numpy(image)[None, None].float() for image in (_luma(visible), infrared, warped)
    )
    with torch.inference_mode():
        own = fuser.model.estimate_code("infrared", thermal)
        output = fuser.model(luma, stand_in, None, own)
    change = torch.where(torch.from_numpy(reach), output.fused, output.visible) - luma
    expected = (visible + change[0, 0, ..., None].numpy()).clip(0, 1)
    assert (output.fused - output.visible).abs().mean() > 0.01
    assert (own - fuser.model.estimate_code("infrared", stand_in)).abs().max() > 1e-3
    np.savetxt(tmp_path / "h.txt", homography, delimiter=", ")
    np.save(tmp_path / "h.npy", homography)
    (tmp_path / "h.json").write_text(str(homography.tolist()))
    for given in (homography, tmp_path / "h.txt", str(tmp_path / "h.npy"), tmp_path / "h.json"):
        fused = Fuser(fuser.network, homography=given)(visible, infrared)
        np.testing.assert_allclose(fused, expected, atol=1e-5)
    everywhere = Fuser(fuser.network, homography=2 * np.eye(3))
    np.testing.assert_allclose(everywhere(visible, infrared), fuser(visible, infrared), atol=1e-6)
    assert everywhere.prepare(visible, infrared).reach is None


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_an_infrared_image_of_more_pixels_is_averaged(factor):
    rng = np.random.default_rng(0)
    fine = torch.from_numpy(rng.random((1, 1, 20 * factor, 30 * factor)))
    coarse = torch.nn.functional.avg_pool2d(fine, factor)
    middle = (factor - 1) / 2  # of the pixels that lie on pixel 0
    homography = np.array([[1, 0, -middle], [0, 1, -middle], [0, 0, factor]]) / factor
    warped, reach = warp(fine, homography, onto=torch.zeros_like(coarse))
    assert reach.all()
    torch.testing.assert_close(warped, coarse)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("color", ["ycbcr", "rgb", "gray"])
def test_where_no_infrared_image_reaches_the_visible_one_is_restored_alone(weights, color, tile, clean):
    network = Network(weights, "cpu", "float32", tile)
    with torch.no_grad():
        network.model.visible_tone.head.bias[0] = 3.0  # takes every image for dark
    size = (46, 62)
    pairs = [_pair(seed, size) for seed in range(2)]
    pairs[1] = pairs[1][0], pairs[1][1][:30]  # two thermal images that need not have one size
    homography = np.array([[1, 0, 20], [0, 1, 10], [0, 0, 1]])
    session = Fuser(network, color=color, homography=homography, clean=clean)
    restorer = Restorer(network, color=color, **({"noise_std": 0.0} if clean else {}))
    for (visible, infrared), fused in zip(pairs, session.stream(pairs, batch_size=2), strict=True):
        restored, outside = restorer(visible), np.ones(size, bool)
        outside[10 : 10 + len(infrared), 20:] = False
        np.testing.assert_allclose(fused[outside], restored[outside], atol=2e-5)
        assert np.abs(fused - restored)[~outside].mean() > 0.01
        np.testing.assert_allclose(fused, session(visible, infrared), atol=2e-5)
        changed = session(visible, 1 - infrared)
        np.testing.assert_allclose(changed[outside], restored[outside], atol=2e-5)


def test_the_noise_of_the_visible_image_is_not_taken_for_that_of_the_infrared_one():
    visible, infrared = (read_image(path) for path in (SAMPLE_VISIBLE, SAMPLE_INFRARED))
    noise = np.random.default_rng(0).normal(0, 25, visible.shape)
    noisy = (visible + noise).round().clip(0, 255).astype(np.uint8)
    part = np.s_[90:270, 120:360]
    homography = np.array([[1, 0, 120], [0, 1, 90], [0, 0, 1]])
    fuser = Fuser(device="cpu", dtype="float32", homography=homography)
    request = fuser.prepare(noisy, infrared[part])
    composite = fuser.network.estimate("infrared", request.infrared)
    assert composite[0, 15] > request.infrared_code[0, 15] + 4 / 255


def test_homographies_that_are_none_are_named(tmp_path):
    (tmp_path / "two.txt").write_text("1 0 0\n0 1 0\n")
    (tmp_path / "words.txt").write_text("one two three\n")
    (tmp_path / "flat.json").write_text("[1, 2, 3]")
    (tmp_path / "empty.txt").write_text("\n")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    for given, message in (
        (tmp_path / "two.txt", r"two\.txt must be a matrix of 3x3, got \[2, 3\]"),
        (tmp_path / "words.txt", r"words\.txt: no matrix could be read"),
        (tmp_path / "flat.json", r"flat\.json: expected a matrix"),
        (tmp_path / "objects.npy", r"objects\.npy: no matrix could be read"),
        (tmp_path / "no.txt", r"no\.txt: no such file"),
        (tmp_path / "empty.txt", r"empty\.txt: expected a matrix"),
        (np.ones((3, 3)), "homography must be invertible"),
        ([[1, 2, 3], [2, 4, 6], [1, 1, 1]], "homography must be invertible"),
        (np.zeros((3, 3)), "homography must be invertible"),
        ([[1, 2], [3]], "homography must be a matrix of numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            as_homography(given)
    with pytest.raises(ValueError, match="give resize or homography"):
        Fuser(homography=np.eye(3), resize="visible")


def test_a_homography_that_leaves_nothing_of_the_infrared_image_is_refused():
    away = np.array([[1, 0, 10_000], [0, 1, 0], [0, 0, 1.0]])
    with pytest.raises(ValueError, match=r"leaves nothing of infrared \(.*\) on visible .* the inverse\?"):
        Fuser(device="cpu", homography=away)(GREY, GREY)


def test_grey_of_three_channels_is_grey_in_any_batch_and_shape():
    image = torch.full((1, 3, 480, 640), 0.5)
    image[:, 0, 100:140, 100:140] = 1.0  # a mark in colour
    tall = torch.rand(1, 1, 8000, 100).expand(-1, 3, -1, -1).clone()
    tall[:, 0, :40] = 1 - tall[:, 0, :40]
    for given in (image, image.expand(16, -1, -1, -1), tall):
        assert not Picture.take(given, "infrared").colour
    coloured = image * torch.tensor([1, 0.5, 1])[:, None, None]
    assert Picture.take(torch.cat([image, coloured]), "infrared").colour


def test_an_image_smaller_than_a_kernel_is_named(tmp_path):
    write_image(tmp_path / "dot.png", np.zeros((1, 50), np.uint8))
    with pytest.raises(ValueError, match=r"dot\.png\) is 50x1, but kernels of 25 pixels need at least 13x13"):
        Degrader(DynamicDegradation("paper"))(tmp_path / "dot.png", "dot")


def test_a_homography_means_the_same_at_any_scale():
    shift = np.array([[1, 0, 3], [0, 1, 2], [0, 0, 1.0]])
    expected = Fuser(device="cpu", dtype="float32", homography=shift)(GREY, GREY)
    for scale in (1e-6, -3, 1e6):
        fused = Fuser(device="cpu", dtype="float32", homography=scale * shift)(GREY, GREY)
        assert np.abs(fused.astype(int) - expected).max() <= 1


def test_settings_that_are_none_are_named(weights):
    with pytest.raises(ValueError, match="color must be one of ycbcr, rgb, gray, got 'blue'"):
        Fuser(weights, "cpu", color="blue")
    with pytest.raises(ValueError, match="resize must be 'visible', 'infrared' or None, got 'both'"):
        Fuser(weights, "cpu", resize="both")
    with pytest.raises(TypeError, match="colour"):
        ddrf_fast.fuse(GREY, GREY, weights=weights, device="cpu", colour="rgb")


# --- swapped modalities ------------------------------------------------------------------------------------


def test_swapped_modalities_are_named(fuser):
    colour = COLOUR + np.uint8((0, 120, 240))
    with pytest.raises(ValueError, match=r"infrared is in colour and visible is grey: .* seem to be"):
        fuser(GREY, colour)
    with pytest.raises(ValueError, match=r"infrared is in colour.*false-colour image to grey"):
        fuser(colour, colour)
    with pytest.raises(ValueError, match="infrared is in colour"):
        Restorer(fuser.network)(infrared=colour)
    planes = [torch.from_numpy(image).permute(2, 0, 1) for image in (colour, np.stack(3 * [GREY], axis=2))]
    with pytest.raises(ValueError, match="infrared is in colour"):
        Restorer(fuser.network)(infrared=torch.stack(planes[:1] + 9 * planes[1:]))


# --- clean images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [0, 16])
def test_of_clean_images_the_network_is_told_so(weights, fuser, tile):
    clean = Fuser(weights, "cpu", dtype="float32", tile=tile, clean=True)
    pairs = [_pair(seed) for seed in range(3)]
    lumas = [torch.from_numpy(_luma(visible))[None, None] for visible, _ in pairs]
    thermal = [torch.from_numpy(infrared)[None, None].float() for _, infrared in pairs]
    sharp = torch.zeros(3, 25, 25)
    sharp[:, 12, 12] = 1
    with torch.inference_mode():
        codes = fuser.model.encode(sharp, torch.zeros(3))
        expected = fuser.model(torch.cat(lumas), torch.cat(thermal), codes, codes).fused[:, 0]
    given = [visible[..., None] for visible in (luma[0, 0].numpy() for luma in lumas)]
    for fused in (
        clean(given, [infrared for _, infrared in pairs]),
        list(clean.stream(((g, p[1]) for g, p in zip(given, pairs, strict=True)), batch_size=3)),
        clean(torch.cat(lumas), torch.cat(thermal)),
    ):
        for image, reference in zip(fused, expected, strict=True):
            found = torch.as_tensor(image).reshape(SIZE)
            torch.testing.assert_close(found, reference.clamp(0, 1), atol=2e-5, rtol=0)
    blind = fuser(given[0], pairs[0][1])
    assert np.abs(blind[..., 0] - expected[0].clamp(0, 1).numpy()).max() > 1e-4


# --- restoration -------------------------------------------------------------------------------------------


def test_each_kind_is_restored_by_its_branch_alone(fuser):
    visible, infrared = _pair()
    restorer = Restorer(fuser.network)
    with torch.inference_mode():
        planes = [torch.from_numpy(image)[None, None].float() for image in (_luma(visible), infrared)]
        both = fuser.model(*planes)
        expected = both.visible[0, 0].numpy(), both.infrared[0, 0].numpy()
    restored = restorer(visible, infrared)
    np.testing.assert_allclose(restored[1], expected[1].clip(0, 1), atol=1e-5)
    change = expected[0] - planes[0][0, 0].numpy()
    assert np.abs(change).max() > 1e-4  # the network did change it
    exact = visible + change[..., None]
    inside = ((exact >= 0) & (exact <= 1)).all(axis=2)  # what is clipped changes its luma
    assert inside.mean() > 0.9
    np.testing.assert_allclose(_luma(restored[0])[inside], expected[0][inside], atol=1e-4)
    np.testing.assert_array_equal(restorer(visible), restored[0])
    np.testing.assert_array_equal(restorer(infrared=infrared), restored[1])
    one_line = ddrf_fast.restore(infrared=_as(infrared, np.uint8), device="cpu")
    assert (one_line.dtype, one_line.shape) == (np.uint8, SIZE)


def test_a_known_degradation_is_told_to_the_network(fuser):
    visible = _luma(_pair()[0])
    kernel = np.ones((5, 3))
    with pytest.raises(ValueError, match=r"kernel must be \[k, k\] with k odd and at most 25, got \[5, 3\]"):
        Restorer(fuser.network, kernel=kernel)
    for wrong, message in ((np.zeros((3, 3)), "positive sum"), (np.full((3, 3), np.nan), "finite")):
        with pytest.raises(ValueError, match=message):
            Restorer(fuser.network, kernel=wrong)
    for wrong in (-1, 5, float("nan")):
        with pytest.raises(ValueError, match=rf"noise_std must be a number from 0 to 1, .* got {wrong}"):
            Restorer(fuser.network, noise_std=wrong)
    for name in ("kernel", "noise_std", "tone"):
        with pytest.raises(TypeError, match=f"{name} must hold numbers, got 'bad'"):
            Restorer(fuser.network, **{name: "bad"})
    with pytest.raises(ValueError, match=r"kernel must be \[k, k\]"):
        Restorer(fuser.network, kernel=3)
    for wrong in ((2.0, 0.5), (2.0, -0.5, 1.0), (np.inf, 1.0, 1.0), 1.0):
        with pytest.raises(ValueError, match="tone must be three positive numbers, gamma, gain and contrast"):
            Restorer(fuser.network, tone=wrong)
    full = torch.zeros(1, 25, 25)
    full[:, 10:15, 10:15] = 1 / 25
    planes = torch.from_numpy(visible)[None, None].float()
    with torch.inference_mode():
        code = fuser.model.encode(full, torch.tensor([0.1]))
        dark = fuser.model.encode(full, torch.tensor([0.1]), torch.tensor([[2.0, 0.9, 0.8]]))
        expected, lit = (
            fuser.model(planes, planes, told, told).visible[0, 0].clamp(0, 1).numpy() for told in (code, dark)
        )
    known = {"kernel": np.ones((5, 5)), "noise_std": 0.1}
    np.testing.assert_allclose(Restorer(fuser.network, **known)(visible), expected, atol=1e-5)
    brighter = Restorer(fuser.network, **known, tone=(2.0, 0.9, 0.8))(visible)
    np.testing.assert_allclose(brighter, lit, atol=1e-4)
    assert brighter.mean() > expected.mean() + 0.1


@pytest.mark.parametrize("settings", [{}, {"kernel": np.ones((5, 5))}, {"kernel": np.eye(3), "refine": True}])
def test_luma_has_less_noise_than_the_channels(fuser, settings):
    network = fuser.network
    visible = _pair()[0].astype(np.float32)
    luma, noise_std = _luma(visible), 0.1 * np.sqrt(0.299**2 + 0.587**2 + 0.114**2)
    expected = Restorer(network, noise_std=noise_std, **settings)(luma)
    told_more = Restorer(network, noise_std=0.1, **settings)(luma)
    assert np.abs(told_more - expected).max() > 2e-3
    gray, ycbcr, rgb = (
        Restorer(network, noise_std=0.1, color=color, **settings) for color in ("gray", "ycbcr", "rgb")
    )
    np.testing.assert_allclose(gray(visible), expected, atol=2e-4)
    np.testing.assert_allclose(_luma(ycbcr(visible)), expected, atol=2e-4)
    # Channels by themselves, grey images and those of three equal channels have all of it.
    grey = np.repeat(luma[..., None], 3, axis=2)
    np.testing.assert_allclose(rgb(visible)[..., 1], gray(visible[..., 1]), atol=2e-4)
    for image in (luma, grey):
        np.testing.assert_allclose(gray(image), told_more, atol=2e-4)
    streamed = gray.stream(((image, None) for image in (visible, visible, grey)), batch_size=3)
    for found, reference in zip(streamed, (expected, expected, told_more), strict=True):
        np.testing.assert_allclose(found, reference, atol=2e-4)


def test_the_blur_of_luma_is_found_at_its_noise(fuser, monkeypatch):
    told = []

    def find_blur(modality, image, noise_std, tone):
        told.append(noise_std)
        return torch.empty(0, dtype=torch.int64), None

    monkeypatch.setattr(fuser.network, "find_blur", find_blur)
    visible = _pair(size=(64, 64))[0]
    for color, image in (("ycbcr", visible), ("gray", visible), ("rgb", visible), ("ycbcr", visible[..., 0])):
        Restorer(fuser.network, color=color, noise_std=0.1, refine=True)(image)
    share = np.sqrt(0.299**2 + 0.587**2 + 0.114**2)
    assert told == pytest.approx([0.1 * share, 0.1 * share, 0.1, 0.1])


def test_the_noise_is_told_where_no_blur_is_found(fuser, monkeypatch):
    images = [_pair(seed, (70, 80))[0].astype(np.float32) for seed in range(2)]
    images.append(_pair(size=(40, 50))[0].astype(np.float32))  # too small to look for one
    dark = []

    def find_blur(modality, planes, noise_std, tone):
        dark.append((tone != 1).any())
        return torch.empty(0, dtype=torch.int64), None

    monkeypatch.setattr(fuser.network, "find_blur", find_blur)
    for color in ("ycbcr", "rgb"):
        told, refined = (
            Restorer(fuser.network, color=color, noise_std=0.1, refine=refine) for refine in (False, True)
        )
        for image in images:
            np.testing.assert_array_equal(refined(image), told(image))
            assert np.abs(told(image) - Restorer(fuser.network, color=color)(image)).max() > 1e-3
    assert dark == 4 * [False]


def test_the_channels_of_an_image_are_brightened_alike(weights, monkeypatch):
    network = Network(weights, "cpu", "float32")
    with torch.no_grad():
        network.model.visible_tone.head.bias[0] = 3.0  # takes every image for dark
        network.model.infrared_tone.head.bias[0] = -3.0
    visible, infrared = (image.astype(np.float32) for image in _pair(size=(46, 62)))
    visible[..., 0] /= 3
    planes = torch.from_numpy(visible).permute(2, 0, 1)[:, None]
    infrared_planes = torch.from_numpy(infrared)[None, None].expand_as(planes)
    with torch.inference_mode():
        tone = network.model.visible_tone(pad_to_even(torch.from_numpy(_luma(visible))[None, None]))
        apart = network.model.visible_tone(pad_to_even(planes))
        each = network.model.restore("visible", planes, tone.expand(3, -1))
        # Contrast comes back about the mean of all channels, as it was reduced.
        monkeypatch.setattr(
            ddrfnet,
            "undo_darkness",
            lambda image, tone: undo_darkness(image.transpose(0, 1), tone[:1]).transpose(0, 1),
        )
        expected = network.model.restore("visible", planes, tone.expand(3, -1))
        fused = network.model(planes, infrared_planes, tone.expand(3, -1)).fused.clamp(0, 1)
    assert (apart - tone).abs().max() > 0.01
    assert (each - expected).abs().max() > 0.03
    expected = expected.clamp(0, 1)
    restored = Restorer(network, color="rgb")(visible)
    np.testing.assert_allclose(restored, expected[:, 0].permute(1, 2, 0).numpy(), atol=1e-4)
    pairs = Fuser(network, color="rgb").stream([(visible, infrared)] * 2, batch_size=2)
    for result in pairs:
        np.testing.assert_allclose(result, fused[:, 0].permute(1, 2, 0).numpy(), atol=1e-4)
    thermal = np.repeat(infrared[..., None], 3, axis=2) if infrared.ndim == 2 else infrared
    assert Restorer(network, color="rgb")(infrared=thermal).shape == thermal.shape


@pytest.mark.parametrize("tone", [(1.0, 1.0, 0.5), (2.0, 0.8, 0.6)])
def test_a_darkened_image_gets_its_colours_back(weights, tone):
    network = Network(weights, "cpu", "float32")
    for parameter in network.model.visible_branch.tail.parameters():
        parameter.data.zero_()  # leaves what is not dark as it is
    image = torch.from_numpy(_pair()[0]).permute(2, 0, 1)[None].float()
    image[:, 0] += 0.2
    image[:, 2] *= 0.4
    gamma, gain, contrast = (torch.tensor([number]) for number in tone)
    dark = low_light(reduce_contrast(image, contrast), gamma, gain)
    restored = Restorer(network, color="rgb", tone=tone)(torch.cat((dark, dark.flip(1))))
    torch.testing.assert_close(restored, torch.cat((image, image.flip(1))), atol=1e-3, rtol=0)


def test_of_a_dark_image_no_channel_is_refined(weights, monkeypatch):
    network = Network(weights, "cpu", "float32")
    image = _pair(size=(70, 80))[0].astype(np.float32)
    sessions = [Restorer(network, color="rgb", refine=refine) for refine in (False, True)]
    usual, refined = (session(image) for session in sessions)
    assert np.abs(refined - usual).max() > 1e-3
    monkeypatch.setattr(network, "tone", lambda luma: torch.tensor([[2.0, 0.8, 0.6]]).expand(len(luma), 3))
    bright, refined = (session(image) for session in sessions)
    np.testing.assert_allclose(refined, bright, atol=1e-5)
    assert bright.mean() > usual.mean() + 0.1


def test_a_restored_thermal_image_keeps_its_values(fuser):
    raw = np.round(7000 + 1000 * _pair()[1]).astype(np.uint16)
    restored = Restorer(fuser.network, thermal_range=(7000, 8000))(infrared=raw)
    expected = Restorer(fuser.network)(infrared=((raw - 7000) / 1000).astype(np.float32))
    assert restored.dtype == np.uint16
    np.testing.assert_allclose(restored, 7000 + 1000 * expected, atol=0.51)


def test_nothing_to_restore_is_an_error(fuser):
    with pytest.raises(TypeError, match="give a visible or an infrared image"):
        Restorer(fuser.network)()
    with pytest.raises(ValueError, match="modality must be 'visible' or 'infrared', got 'x-ray'"):
        fuser.model.restore("x-ray", torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"image must be \[B, 1, H, W\] and not empty, got \[1, 3, 4, 4\]"):
        fuser.model.restore("visible", torch.zeros(1, 3, 4, 4))


# --- lists and streams -------------------------------------------------------------------------------------


def test_lists_give_lists(fuser):
    pairs = [_pair(seed, size) for seed, size in enumerate([(20, 30), (20, 30), (31, 17)])]
    visible, infrared = (list(images) for images in zip(*pairs, strict=True))
    for fused, pair in zip(fuser(visible, infrared), pairs, strict=True):
        np.testing.assert_array_equal(fused, fuser(*pair))
    restorer = Restorer(fuser.network)
    for restored, image in zip(restorer(infrared=infrared), infrared, strict=True):
        np.testing.assert_array_equal(restored, restorer(infrared=image))
    with pytest.raises(ValueError, match="visible has 3 and infrared 2"):
        fuser(visible, infrared[:2])


def test_a_stream_keeps_the_order_and_reads_only_so_far_ahead(fuser):
    drawn = []

    def endless():
        for seed in itertools.count():
            drawn.append(seed)
            yield _pair(seed, (16, 20) if seed % 5 else (10, 14))

    stream = fuser.stream(endless(), batch_size=3, workers=2)
    for seed, fused in zip(range(12), stream, strict=False):
        time.sleep(0.01)  # a slow consumer does not make it run away
        assert len(drawn) <= seed + 1 + 3 + 2 + 3
        expected = fuser(*_pair(seed, (16, 20) if seed % 5 else (10, 14)))
        np.testing.assert_allclose(fused, expected, atol=1e-6)
    stream.close()
    so_far = len(drawn)
    time.sleep(0.05)
    assert len(drawn) == so_far


def test_a_stream_keeps_frames_whose_memory_is_used_again(fuser):
    frames = [_pair(seed) for seed in range(5)]

    def camera():
        visible, infrared = (np.empty_like(image) for image in frames[0])
        for frame in frames:
            visible[...], infrared[...] = frame
            yield visible, torch.from_numpy(infrared).numpy()

    for fused, frame in zip(fuser.stream(camera()), frames, strict=True):
        np.testing.assert_array_equal(fused, fuser(*frame))


@pytest.mark.parametrize("name", ["batch_size", "workers"])
def test_a_stream_needs_one_of_each(fuser, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        next(fuser.stream([_pair()], **{name: 0}))


def test_what_goes_wrong_in_a_stream_is_raised_in_its_place(fuser):
    def frames():
        yield _pair(0)
        yield _pair(1)[0], NAN

    for batch_size in (1, 4):
        stream = fuser.stream(frames(), batch_size=batch_size)
        next(stream)
        with pytest.raises(ValueError, match="infrared holds NaN"):
            next(stream)

    def broken():
        yield 1
        raise OSError("the camera is gone")

    results = ahead(broken(), lambda number: number, workers=1, limit=4)
    assert next(results) == 1
    with pytest.raises(OSError, match="the camera is gone"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ddrf_fast_")]


def test_nothing_is_drawn_after_an_interrupt_that_came_before_the_thread_began(monkeypatch):
    begin, drawn = threading.Thread.start, []

    def interrupted(thread):
        timers.append(threading.Timer(0.05, begin, [thread]))
        begin(timers[0])
        raise KeyboardInterrupt

    timers: list[threading.Timer] = []
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    results = ahead((drawn.append(number) for number in range(3)), str, workers=1, limit=4)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    timers[0].join()
    for thread in threading.enumerate():
        if thread.name.startswith("ddrf_fast"):
            thread.join(60)
            assert not thread.is_alive()
    assert not drawn


def test_sessions_share_a_network(weights):
    network = Network(weights, "cpu")
    assert Fuser(network).model is Restorer(network).model is network.model


# --- degradation by name -----------------------------------------------------------------------------------


def test_degradation_depends_on_seed_and_name_alone():
    visible = _as(_pair()[0], np.uint8)
    rgba = np.dstack((visible, visible[..., 0]))
    degrader = Degrader(DynamicDegradation("paper", scale=2), seed=5, spatial=True)
    first = degrader(rgba, "a")
    assert first.shape == (23, 31, 4)
    np.testing.assert_array_equal(first[..., 3], rgba[::2, ::2, 3])
    requests = [degrader.prepare(rgba, name) for name in ("c", "a", "b")]
    outputs = degrader.compute(requests)
    np.testing.assert_allclose(degrader.finish(requests[1], outputs[1]).astype(int), first, atol=1)
    assert np.abs(degrader(rgba, "b").astype(int) - first).max() > 5
    other_seed = Degrader(DynamicDegradation("paper", scale=2), seed=6, spatial=True)
    assert np.abs(other_seed(rgba, "a").astype(int) - first).max() > 5


@pytest.mark.parametrize("tile", [16, 50])
def test_strips_give_what_whole_images_give(tile):
    visible, infrared = torch.rand(2, 3, 61, 45), torch.rand(2, 1, 61, 45)
    whole, strips = (Fuser(tile=rows, dtype="float32") for rows in (0, tile))
    torch.testing.assert_close(strips(visible, infrared), whole(visible, infrared), atol=2e-5, rtol=0)
    kernel = np.full((3, 3), 1 / 9)
    for given in ({}, {"kernel": kernel, "noise_std": 0.05}):
        whole, strips = (Restorer(tile=rows, dtype="float32", **given) for rows in (0, tile))
        torch.testing.assert_close(strips(visible), whole(visible), atol=2e-5, rtol=0)
        restored = strips(infrared=infrared)
        torch.testing.assert_close(restored, whole(infrared=infrared), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_low_precision_is_near(dtype, tolerance):
    visible, infrared = torch.rand(1, 1, 40, 50), torch.rand(1, 1, 40, 50)
    for session, images in ((Fuser, (visible, infrared)), (Restorer, (visible,))):
        exact, found = session(dtype="float32")(*images), session(dtype=dtype)(*images)
        assert found.dtype == torch.float32
        assert 0 < (found - exact).abs().max() < tolerance


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ("default", "float32"),
        ("avx2", "float32"),
        ("avx512", "bfloat16"),
        ("avx512_bf16", "bfloat16"),
        ("amx_bf16", "bfloat16"),
    ],
)
def test_the_precision_is_chosen_for_the_processor(capability, dtype):
    program = "import ddrf_fast; print(ddrf_fast.Fuser(device='cpu').network.engine.dtype)"
    assert run_capability(program, capability).strip() == f"torch.{dtype}"


def test_what_is_chosen_differs_from_float32_by_a_grey_level_here_and_there():
    images = [read_image(path) for path in (SAMPLE_VISIBLE, SAMPLE_INFRARED)]
    chosen, exact = (Fuser(device="cpu", dtype=dtype)(*images) for dtype in ("auto", "float32"))
    difference = np.abs(chosen.astype(int) - exact)
    assert difference.max() <= 3 and (difference > 1).mean() < 1e-3


def test_an_unknown_precision_is_named():
    for dtype in ("int8", torch.int8, 32):
        with pytest.raises(ValueError, match=f"dtype must be one of auto, float32, .*, got {dtype!r}"):
            Fuser(dtype=dtype)
