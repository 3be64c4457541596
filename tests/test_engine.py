"""The inference engine: whole or in strips, on any backend, the numbers of the network itself."""

import copy
import warnings

import pytest
import torch

from ddrf_fast.inference import strips
from ddrf_fast.inference.engine import Engine
from ddrf_fast.inference.layers import Code
from ddrf_fast.models import DDRFNet, DDRFNetConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = DDRFNet(DDRFNetConfig(width=8, blocks=2, num_kernels=3)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for tone in (network.visible_tone, network.infrared_tone):
            tone.head.bias[0] = 1.0  # takes every image for dark
    return network


def pair(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


@pytest.mark.parametrize("tile", [0, 1, 16, 30])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 41, 30), (1, 1, 64, 33)])
def test_equals_the_network(model, shape, tile, cpu_backend):
    images = pair(*shape)
    with torch.inference_mode():
        expected = model(*images)
    for actual, image in zip(Engine(model, torch.float32, tile=tile)(*images), expected, strict=True):
        torch.testing.assert_close(actual, image, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("told", [0, 16, 19])
@pytest.mark.parametrize("modality", ["visible", "infrared"])
@pytest.mark.parametrize("tile", [0, 1, 16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 41, 30), (1, 1, 64, 33)])
def test_a_branch_alone_equals_the_networks(model, shape, tile, modality, told, cpu_backend):
    image = pair(*shape)[0]
    code = torch.cat((torch.linspace(-0.1, 0.1, 16), torch.tensor([2.0, 0.8, 0.7])))[:told]
    code = code.repeat(shape[0], 1) if told else None
    with torch.inference_mode():
        expected = model.restore(modality, image, code)
    restored = Engine(model, torch.float32, tile=tile).restore(modality, image, code)
    torch.testing.assert_close(restored, expected, atol=2e-5, rtol=1e-5)


def test_what_ran_before_leaves_no_trace(model):
    images, engine = pair(1, 1, 22, 31), Engine(model, torch.float32)
    expected = Engine(model, torch.float32)(*images)
    for _ in range(2):
        assert torch.equal(engine.restore("visible", images[0]), expected.visible)
        assert torch.equal(engine.restore("infrared", images[1]), expected.infrared)
        assert torch.equal(engine.fuse(*images), expected.fused)


@pytest.mark.parametrize("tile", [0, 8])
def test_of_a_fusion_only_the_fused_image_is_held(model, tile):
    engine, images = Engine(model, torch.float32, tile=tile), pair(2, 1, 40, 26)
    fused = engine.fuse(*images)
    assert torch.equal(fused, engine(*images).fused)
    assert fused.untyped_storage().nbytes() == images[0].nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tile", [0, 8])
def test_a_branch_computes_in_the_engines_dtype(model, tile, dtype):
    image = pair(1, 1, 33, 40)[0].double()
    with torch.inference_mode():
        expected = copy.deepcopy(model).double().restore("visible", image)
    restored = Engine(model, dtype, tile).restore("visible", image)
    assert restored.dtype == torch.float64
    error = (restored - expected).abs().max()
    assert error < 1e-6 if dtype == torch.float64 else 1e-5 < error < 0.05  # the model's parameters: float32


def test_a_branch_alone_needs_less_memory_than_a_pair(model, monkeypatch):
    engine, shape = Engine(model, torch.float32), torch.Size((1, 1, 200, 300))
    pixels = 100 * 150 * 4  # bytes of a channel of features
    estimator = 24 + 32 / 4 + 48 / 16 + 72 / 64  # rounded up to whole pixels
    for modality, channels in ((None, 12 + 3 * 8 + 8 + 12), ("visible", 4 + 2 * 8 + 4 + 4)):
        needed = (channels + estimator) * pixels
        monkeypatch.setattr("ddrf_fast.inference.engine.MEMORY", int(0.99 * needed))
        assert engine.in_strips(shape, modality)
        monkeypatch.setattr("ddrf_fast.inference.engine.MEMORY", int(1.01 * needed))
        assert not engine.in_strips(shape, modality)


def test_maps_of_codes_are_left_to_the_network(model):
    visible, infrared = pair(2, 1, 20, 26)
    codes = torch.rand(2, 16, 3, 4) / 10
    with torch.inference_mode():
        expected = model(visible, infrared, codes)
        restored = model.restore("infrared", infrared, codes)
    engine = Engine(model, torch.float32, tile=4)
    for actual, image in zip(engine(visible, infrared, codes), expected, strict=True):
        assert torch.equal(actual, image)
    assert torch.equal(engine.fuse(visible, infrared, codes), expected.fused)
    assert torch.equal(engine.restore("infrared", infrared, codes), restored)


@pytest.mark.parametrize("tile", [0, 1, 16])
def test_contrast_comes_back_about_a_mean_that_is_given(model, tile):
    engine, images = Engine(model, torch.float32, tile=tile), pair(2, 1, 40, 30)
    tone = torch.tensor([[2.0, 0.8, 0.5], [3.0, 0.9, 0.8]])
    usual = engine(*images, tone)
    mean = usual.visible.mean((1, 2, 3))
    torch.testing.assert_close(engine(*images, tone, None, mean).visible, usual.visible, atol=2e-5, rtol=0)
    moved = engine(*images, tone, None, mean + 0.1)
    shift = (0.1 * (1 - 1 / tone[:, 2])).view(-1, 1, 1, 1).expand_as(mean.view(-1, 1, 1, 1))
    torch.testing.assert_close(moved.visible, usual.visible + shift, atol=5e-5, rtol=0)
    torch.testing.assert_close(moved.infrared, usual.infrared)
    assert (moved.fused - usual.fused).abs().mean() > 1e-3
    assert torch.equal(engine.fuse(*images, tone, None, mean + 0.1), moved.fused)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_a_dtype_may_be_named(model, name):
    assert Engine(model, name).dtype == Engine(model, getattr(torch, name)).dtype == getattr(torch, name)


def test_a_device_that_refuses_a_graph_is_asked_once_for_each_size(model, monkeypatch):
    asked = []

    def refusing():
        asked.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refusing)
    engine = Engine(model, torch.float32)
    for count, images in enumerate((pair(1, 1, 8, 8), pair(1, 1, 8, 10)), start=1):
        given = engine._pair, images, 2 * [Code()]
        assert engine._graph(*given) is None
        assert len(asked) == count - 1  # a size may come but once
        with pytest.warns(UserWarning, match=f"images of {images[0].shape[3]}x8, .* not permitted"):
            assert engine._graph(*given) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (pair(1, 1, 8, 8), pair(1, 1, 8, 10)):
            assert engine._graph(engine._pair, images, 2 * [Code()]) is None
    assert len(asked) == 2


@pytest.mark.gpu
def test_recorded_launches_give_what_the_cpu_gives(model):
    engine = Engine(copy.deepcopy(model).cuda(), torch.float32)
    for seed in range(4):  # the second is recorded, those after it are replayed
        generator = torch.Generator().manual_seed(seed)
        visible, infrared = torch.rand(2, 1, 1, 45, 38, generator=generator)
        for given in (None, torch.full((1, 16), seed / 50)):
            with torch.inference_mode():
                expected = model(visible, infrared, given, given)
            found = engine(visible, infrared, given, given), engine.fuse(visible, infrared, given, given)
            alone = engine.restore("visible", visible, given), engine.restore("infrared", infrared, given)
            for actual, image in zip(
                (*found[0], found[1], *alone),
                (*expected, expected.fused, expected.visible, expected.infrared),
                strict=True,
            ):
                torch.testing.assert_close(actual.cpu(), image, atol=1e-4, rtol=1e-4)


def test_strips_in_files_equal_those_in_memory(model, monkeypatch):
    visible, infrared = (torch.rand(1, 1, 45, 38).mul(255).to(torch.uint8) for _ in range(2))
    engine = Engine(model, torch.float32, tile=10)
    expected = [strip.output.fused for strip in engine.strips(visible, infrared)]
    monkeypatch.setattr("ddrf_fast.inference.engine.MEMORY", 0)
    assert all(
        torch.equal(strip.output.fused, rows)
        for strip, rows in zip(engine.strips(visible, infrared), expected, strict=True)
    )
    whole = Engine(model, torch.float32)(visible / 255, infrared / 255)
    torch.testing.assert_close(torch.cat(expected, dim=2), whole.fused, atol=2e-5, rtol=1e-5)
    restored = engine.restore("infrared", infrared / 255)
    torch.testing.assert_close(restored, whole.infrared, atol=2e-5, rtol=1e-5)


def test_full_disk_is_said_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr("ddrf_fast.inference.engine.MEMORY", 0)
    monkeypatch.setattr(strips.shutil, "disk_usage", lambda folder: strips.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="TMPDIR"):
        next(Engine(model, torch.float32, tile=8).strips(*pair(1, 1, 20, 20)))


def test_bad_input_is_named(model):
    for tile in (-1, True, 1.5, "never", None):
        with pytest.raises(
            ValueError, match=f"tile must be 'auto', 0 for no strips or their .* got {tile!r}"
        ):
            Engine(model, torch.float32, tile=tile)
    for dtype in (torch.int8, torch.float8_e5m2, "int8", "half", None):
        with pytest.raises(ValueError, match=f"dtype must be one of auto, float32, .*, got {dtype!r}"):
            Engine(model, dtype)
    with pytest.raises(ValueError, match="visible_code must be"):
        Engine(model, torch.float32)(*pair(1, 1, 8, 8), torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"^code must be \[1, 16 or 19\].*, got \[2, 16\]"):
        Engine(model, torch.float32).restore("visible", pair(1, 1, 8, 8)[0], torch.zeros(2, 16))
    with pytest.raises(ValueError, match="modality must be 'visible' or 'infrared', got 'x-ray'"):
        Engine(model, torch.float32).restore("x-ray", pair(1, 1, 8, 8)[0])
    with pytest.raises(ValueError, match=r"image must be \[B, 1, H, W\] and not empty, got \[1, 3, 8, 8\]"):
        Engine(model, torch.float32).restore("visible", pair(1, 3, 8, 8)[0])


def test_bytes_are_scaled_or_refused(model):
    bytes_, integers = (torch.zeros(1, 1, 20, 22, dtype=dtype) for dtype in (torch.uint8, torch.int32))
    engine = Engine(model, torch.float32)
    floats = bytes_.float()
    for network in (engine, model):
        with pytest.raises(TypeError, match=r"^visible must be floating, in \[0, 1\], got torch\.uint8"):
            network(bytes_, floats)
        with pytest.raises(TypeError, match=r"^infrared must be floating, in \[0, 1\], got torch\.int32"):
            network(floats, integers)
        with pytest.raises(TypeError, match=r"^image must be floating, in \[0, 1\], got torch\.uint8"):
            network.restore("visible", bytes_)
    with pytest.raises(TypeError, match=r"^visible must be"):
        engine.fuse(bytes_, floats)
    with pytest.raises(TypeError, match=r"or torch\.uint8 or torch\.uint16, got torch\.int32"):
        engine.strips(bytes_, integers)
