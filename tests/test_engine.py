"""The inference engine: whole or in strips, on any backend, the numbers of the network itself."""

import pytest
import torch

from ddrf_fast.inference import strips
from ddrf_fast.inference.engine import Engine
from ddrf_fast.models import DDRFNet, DDRFNetConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = DDRFNet(DDRFNetConfig(width=8, blocks=2, num_kernels=3)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def pair(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


@pytest.mark.parametrize("tile", ["never", 1, 16, 30])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 41, 30), (1, 1, 64, 33)])
def test_equals_the_network(model, shape, tile, cpu_backend):
    images = pair(*shape)
    with torch.inference_mode():
        expected = model(*images)
    for actual, image in zip(Engine(model, tile=tile)(*images), expected, strict=True):
        torch.testing.assert_close(actual, image, atol=2e-5, rtol=1e-5)


def test_strips_in_files_equal_those_in_memory(model, monkeypatch):
    visible, infrared = (torch.rand(1, 1, 45, 38).mul(255).to(torch.uint8) for _ in range(2))
    engine = Engine(model, tile=10)
    expected = [strip.output.fused for strip in engine.strips(visible, infrared)]
    monkeypatch.setattr("ddrf_fast.inference.engine.MEMORY", 0)
    assert all(
        torch.equal(strip.output.fused, rows)
        for strip, rows in zip(engine.strips(visible, infrared), expected, strict=True)
    )
    whole = Engine(model)(visible / 255, infrared / 255).fused
    torch.testing.assert_close(torch.cat(expected, dim=2), whole, atol=2e-5, rtol=1e-5)


def test_full_disk_is_said_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr("ddrf_fast.inference.engine.MEMORY", 0)
    monkeypatch.setattr(strips.shutil, "disk_usage", lambda folder: strips.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="TMPDIR"):
        next(Engine(model, tile=8).strips(*pair(1, 1, 20, 20)))


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="tile must be"):
        Engine(model, tile=0)
    with pytest.raises(TypeError, match="dtype must be"):
        Engine(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="visible_code must be"):
        Engine(model)(*pair(1, 1, 8, 8), torch.zeros(1, 3))
