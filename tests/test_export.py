"""Exported networks: the same images wherever they run, for any batch and size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import compile_against_torch
from torch import nn

import ddrf_fast
from ddrf_fast.export import MINIMUM_SIZE, OUTPUTS, check_export, export_model
from ddrf_fast.export.onnx import translations
from ddrf_fast.models import DDRFNet, DDRFNetConfig, load_model
from ddrf_fast.nn import CondConv2d, ModulatedConv2d
from ddrf_fast.ops import _native

FUSE = Path(__file__).parent.parent / "docs" / "cpp" / "fuse.cpp"
SHAPES = [(1, 1, MINIMUM_SIZE, MINIMUM_SIZE), (3, 1, 40, 51), (2, 1, 37, 18), (1, 1, 90, 64)]


@pytest.fixture(scope="module")
def model(weights):
    return load_model(weights)


def pair(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


def images(model, visible, infrared):
    with torch.inference_mode():
        return [image.clamp(0, 1) for image in model(visible, infrared)]


def test_torch_export_is_the_network_itself(model, tmp_path):
    path = export_model(model, tmp_path / "new" / "net.pt2")
    files = {"ddrf_fast.json": ""}
    fuse = torch.export.load(path, extra_files=files).module()
    for shape in SHAPES:
        torch.testing.assert_close(fuse(*pair(*shape)), images(model, *pair(*shape))[0])
    metadata = json.loads(files["ddrf_fast.json"])
    assert json.loads(metadata["config"])["width"] == model.config.width
    assert metadata["ddrf_fast_version"] == ddrf_fast.__version__
    with pytest.raises(AssertionError, match=str(MINIMUM_SIZE)):
        fuse(*pair(1, 1, MINIMUM_SIZE - 1, 40))


def test_onnx_is_standard_and_equal_for_any_batch_and_size(model, tmp_path):
    path = export_model(model, tmp_path / "net.onnx", outputs="all")
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {entry.domain for entry in written.opset_import} <= {""}, "needs more than standard operators"
    assert {entry.key for entry in written.metadata_props} >= {"config", "ddrf_fast_version", "outputs"}

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {i.name: i.shape for i in session.get_inputs()} == {
        name: ["batch", 1, "height", "width"] for name in ("visible", "infrared")
    }
    assert tuple(output.name for output in session.get_outputs()) == OUTPUTS["all"]
    for shape in SHAPES:
        visible, infrared = pair(*shape)
        found = session.run(None, {"visible": visible.numpy(), "infrared": infrared.numpy()})
        for ours, theirs in zip(images(model, visible, infrared), found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-5)


class Convolutions(nn.Module):
    """Every argument of dynamic_conv, sample_conv2d and route, in a few calls."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = {
            "bank": (3, 6, 4, 3, 3),
            "coded": (3, 6, 6, 3, 3),
            "grouped": (3, 6, 2, 3, 3),
            "biases": (3, 6),
            "kernels": (2, 6, 4, 3, 3),
            "squeeze": (5, 6),
            "excite": (3, 5),
            "single": (3, 4),
        }
        for name, size in sizes.items():
            self.register_buffer(name, torch.randn(size, generator=generator))

    def forward(self, x, attention, per_channel, code, in_scale, out_scale, tap_scale):
        conv = ddrf_fast.dynamic_conv
        y, mean = conv(x, self.bank, attention, self.biases, activation="relu", return_mean=True)
        first = ddrf_fast.route(
            x, self.squeeze, None, self.excite, self.biases[:, 0], code=code, temperature=3.0, scale=0.5
        )
        second = ddrf_fast.route(mean[:, :4], None, None, self.single, None, normalization="sigmoid")
        scales = {"in_scale": in_scale, "out_scale": out_scale, "tap_scale": tap_scale}
        return (
            y,
            conv(x, self.bank, per_channel, self.biases, stride=(1, 2), padding=(2, 0), dilation=2),
            conv(x, self.grouped, first, groups=2, padding=1, activation="leaky_relu", **scales),
            conv(x, self.coded, second, self.biases, code=code, padding=1, **scales),
            ddrf_fast.sample_conv2d(x, self.kernels[:1].expand(x.shape[0], -1, -1, -1, -1)),
        )


def convolution_inputs(batch, height, width):
    generator = torch.Generator().manual_seed(2)
    sizes = (4, height, width), (3,), (3, 6), (2,), (4,), (6,), (3, 3)
    return tuple(torch.rand((batch, *size), generator=generator) for size in sizes)


def test_onnx_of_any_model_with_dynamic_convolutions(tmp_path):
    net = Convolutions().eval()
    batch = torch.export.Dim("batch", min=1)
    free = {0: batch, 2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    with torch.no_grad():
        program = torch.onnx.export(
            net,
            convolution_inputs(2, 9, 12),
            dynamic_shapes=(free, *({0: batch},) * 6),
            custom_translation_table=translations(),
            dynamo=True,
            verbose=False,
        )
    program.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for sizes in ((2, 9, 12), (1, 8, 8), (5, 17, 10)):
        inputs = convolution_inputs(*sizes)
        named = {i.name: value.numpy() for i, value in zip(session.get_inputs(), inputs, strict=True)}
        for ours, theirs in zip(net(*inputs), session.run(None, named), strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-4, atol=1e-5)


def test_onnx_of_scales_that_are_wider_than_the_image(tmp_path):
    torch.manual_seed(0)
    layer = ModulatedConv2d(4, 8, 3, padding=1).half().eval()
    inputs = torch.rand(2, 4, 9, 11).half(), torch.rand(2, 4).half()
    with torch.no_grad():
        program = torch.onnx.export(
            layer, inputs, custom_translation_table=translations(), dynamo=True, verbose=False
        )
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    named = {i.name: value.numpy() for i, value in zip(session.get_inputs(), inputs, strict=True)}
    (found,) = session.run(None, named)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, layer(*inputs).detach().numpy(), atol=5e-3)


@pytest.mark.parametrize("stride", [2, 3])
def test_onnx_pads_sizes_that_the_stride_does_not_divide(tmp_path, stride):
    torch.manual_seed(0)
    layer = CondConv2d(4, 8, 3, stride=stride, padding="same").eval()
    free = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    example = torch.rand(2, 4, 16, 17), torch.rand(2, 4)
    with torch.no_grad():
        program = torch.onnx.export(
            layer,
            example,
            dynamic_shapes=(free, None),
            custom_translation_table=translations(),
            dynamo=True,
            verbose=False,
        )
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    for size in ((9, 11), (16, 17), (31, 32)):
        inputs = torch.rand(2, 4, *size), example[1]
        named = {i.name: value.numpy() for i, value in zip(session.get_inputs(), inputs, strict=True)}
        (theirs,) = session.run(None, named)
        np.testing.assert_allclose(theirs, layer(*inputs).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_fuses_in_cpp_without_python(model, tmp_path):
    """AOTInductor's package, in the program of the documentation: the same picture as here."""
    libraries = [_native.find("_schemas"), _native.find("_C")]
    if None in libraries:
        pytest.skip("the compiled libraries are not built")
    package = export_model(model, tmp_path / "net.pt2", format="aoti")
    assert all(comparison.agrees for comparison in check_export(package, model, format="aoti"))
    program = compile_against_torch(FUSE, tmp_path / "fuse")
    rng = np.random.default_rng(0)
    visible, infrared = rng.integers(0, 256, (2, 61, 43), np.uint8)
    names = [tmp_path / name for name in ("visible.pgm", "infrared.pgm", "fused.pgm")]
    cv2.imwrite(str(names[0]), visible)
    cv2.imwrite(str(names[1]), infrared)
    ran = subprocess.run(
        [program, package, *names, *libraries],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHOME": "/nonexistent"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    values = [torch.from_numpy(image / np.float32(255))[None, None] for image in (visible, infrared)]
    expected = images(model, *values)[0][0, 0].numpy() * 255
    assert np.abs(cv2.imread(str(names[2]), cv2.IMREAD_UNCHANGED) - expected).max() <= 0.51

    ran = subprocess.run([program, package, *names], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "ddrf_fast" in ran.stderr, "the operators came from elsewhere"


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_of_clean_images_the_network_is_told_so(model, weights, tmp_path, format):
    told = export_model(model, tmp_path / f"told.{format}", clean=True)
    assert all(comparison.agrees for comparison in check_export(told, model, clean=True))
    assert not any(comparison.agrees for comparison in check_export(told, model))
    if format == "pt2":
        visible, infrared = pair(2, 1, 41, 38)
        fused = torch.export.load(told).module()(visible, infrared)
        expected = ddrf_fast.Fuser(weights, "cpu", dtype="float32", clean=True)(visible, infrared)
        torch.testing.assert_close(fused, expected, atol=2e-5, rtol=0)


def test_a_check_notices_another_network(model, tmp_path):
    path = export_model(model, tmp_path / "net.pt2")
    same = check_export(path, model)
    assert [comparison.shape[0] for comparison in same] == [1, 3]
    assert all(comparison.agrees for comparison in same)
    torch.manual_seed(5)
    other = DDRFNet(DDRFNetConfig(width=8, blocks=1, num_kernels=2)).eval()
    assert not any(comparison.agrees for comparison in check_export(path, other))
    with pytest.raises(ValueError, match="gives 1 images, expected 3"):
        check_export(path, model, outputs="all")


def test_says_what_is_wrong_and_leaves_what_is_there(model, tmp_path):
    for name, options, message in (
        ("net.pth", {}, "must end in .pt2 or .onnx"),
        ("net.onnx", {"format": "aoti"}, "must end in .pt2"),
        ("net.pt2", {"format": "tensorrt"}, "format must be 'pt2', 'aoti', 'onnx', got 'tensorrt'"),
        ("net.pt2", {"outputs": "restored"}, "outputs must be 'fused' or 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(model, tmp_path / name, **options)
    old = tmp_path / "old.onnx"
    old.write_text("old")
    program = (
        "import sys; sys.modules['onnxscript'] = None; from ddrf_fast.cli import main;"
        f"sys.exit(main(['export', '-o', {str(old)!r}]))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "ONNX needs onnxscript: pip install 'ddrf-fast[export]'" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"] and old.read_text() == "old"


def test_command_exports_and_checks(weights, tmp_path):
    command = [sys.executable, "-m", "ddrf_fast", "export", "-o", tmp_path / "net.onnx", "--check"]
    ran = subprocess.run([*command, "--weights", weights], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("differs by at most") == 2 and "1 x 1 x 360 x 480" in ran.stdout
    assert not ran.stderr, "warnings of torch about itself"
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
