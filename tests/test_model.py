"""DDRFNet: its budgets, sizes, codes, gradients, and its files."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ddrf_fast.data import read_image
from ddrf_fast.degradation import low_light, reduce_contrast, undo_darkness
from ddrf_fast.inference.engine import Engine
from ddrf_fast.metrics import psnr
from ddrf_fast.models import DDRFNet, DDRFNetConfig, load_model, read_metadata, save_model
from ddrf_fast.models.classical import CLASSICAL_FUSIONS, guided_filter, laplacian_pyramid
from ddrf_fast.models.ddrfnet import BASE_DISTANCES, base_images, blend, to_pixels
from ddrf_fast.models.tone import ToneEstimator, light_means, with_tone
from ddrf_fast.nn import DynamicConv2d
from ddrf_fast.reproduce.pairs import clean_pairs

SMALL = DDRFNetConfig(width=8, blocks=1, num_kernels=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DDRFNet(SMALL).eval()


def pair(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


def count_operations(model, *inputs):
    """Floating point operations of a pass, two for each multiply-add."""
    total = 0

    def count(module, arguments, output):
        nonlocal total
        if isinstance(module, DynamicConv2d):
            x, code = (*arguments, None)[:2]
            output = output[0] if isinstance(output, tuple) else output  # without its mean
            channels = module.in_channels + (
                module.code_channels if code is not None and code.dim() == 4 else 0
            )
            positions = output.shape[0] * output.shape[2] * output.shape[3]
            total += 2 * positions * module.out_channels * channels * 9 + 2 * len(x) * module.weight.numel()
        elif isinstance(module, nn.Conv2d):
            total += 2 * output.shape[0] * output.shape[2] * output.shape[3] * module.weight.numel()
        elif isinstance(module, nn.Linear):
            total += 2 * output.shape[0] * module.weight.numel()

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.inference_mode():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def sum_of_all(network, *images):
    """Of squares of the images that a network makes, all taken for dark, and of its estimators' log odds."""
    odds = [network.caution_logit(*network.estimate_codes(*images))]
    for tone, image in zip((network.visible_tone, network.infrared_tone), images, strict=True):
        with torch.no_grad():
            tone.head.bias[0] = 1.0
        odds.append(tone.guess(light_means(image))[0])
    return sum(image.square().sum() for image in network(*images)) + torch.cat(odds).sum()


def test_parameters_stay_below_the_papers_model_size():
    assert sum(parameter.numel() for parameter in DDRFNet().parameters()) * 4 <= 7.58e6


def test_operations_stay_below_20_gflop_for_a_400x400_pair():
    network = DDRFNet()
    images = [torch.rand(1, 1, 40, 40)] * 2
    # Counted at 40x40 and scaled by the area; what does not grow with it is counted a hundredfold.
    assert count_operations(network, *images) * 100 < 20e9
    assert count_operations(network, *images, *[torch.rand(1, 16, 3, 3)] * 2) * 100 < 20e9


def test_fusion_is_four_dynamic_layers_and_branches_share_nothing():
    network = DDRFNet()
    assert sum(isinstance(module, DynamicConv2d) for module in network.fusion.modules()) == 4
    visible, infrared = (
        {id(p) for p in m.parameters()} for m in (network.visible_branch, network.infrared_branch)
    )
    assert not visible & infrared
    assert all(module.average for module in network.modules() if isinstance(module, DynamicConv2d))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 2), (13, 10)])
def test_any_size(model, size):
    visible, infrared = pair(2, 1, *size)
    for image in model(visible, infrared):
        assert image.shape == visible.shape and torch.isfinite(image).all()


def test_odd_size_is_that_of_the_replicated_image(model):
    visible, infrared = pair(1, 1, 9, 11)
    padded = [torch.cat((x, x[..., -1:]), 3) for x in (visible, infrared)]
    padded = [torch.cat((x, x[:, :, -1:]), 2) for x in padded]
    for actual, expected in zip(model(visible, infrared), model(*padded), strict=True):
        torch.testing.assert_close(actual, expected[..., :9, :11])


def test_code_forms_agree(model):
    visible, infrared = pair(2, 1, 10, 12)
    code = torch.randn(2, 16) / 4
    code_map = code[:, :, None, None].expand(-1, -1, 3, 4)
    expected = model(visible, infrared, code, code)
    for codes in ((code_map, code_map), (code_map, code), (code, code_map)):
        for actual, image in zip(model(visible, infrared, *codes), expected, strict=True):
            torch.testing.assert_close(actual, image, atol=1e-5, rtol=1e-5)


def test_blind_use_is_use_with_the_estimated_codes(model):
    visible, infrared = pair(2, 1, 9, 12)
    codes = model.estimate_codes(visible, infrared)
    for actual, expected in zip(model(visible, infrared, *codes), model(visible, infrared), strict=True):
        torch.testing.assert_close(actual, expected)
    other = model(visible, infrared, codes[0] + 0.1, codes[1])
    assert not torch.equal(other.visible, model(visible, infrared).visible)


def test_the_last_three_numbers_of_a_code_undo_darkness(model):
    images, code = pair(2, 1, 10, 12), torch.randn(2, 16) / 4
    tone = torch.tensor([[2.0, 0.7, 0.8], [1.0, 1.0, 1.0]])
    both = with_tone(code, tone)
    assert both.shape == (2, 19)
    for form in (both, both[:, :, None, None].expand(-1, -1, 3, 4)):
        dark, light = model(*images, form, code), model(*images, code, code)
        torch.testing.assert_close(dark.visible[:1], undo_darkness(light.visible, tone)[:1])
        torch.testing.assert_close(dark.visible[1], light.visible[1])
        torch.testing.assert_close(dark.infrared, light.infrared)
        assert not torch.allclose(dark.fused[0], light.fused[0], atol=1e-2)
        torch.testing.assert_close(model.restore("visible", images[0], form), dark.visible)
    blind = model.restore("visible", images[0])  # an untrained network takes nothing for dark
    expected = undo_darkness(blind, tone)
    torch.testing.assert_close(model.restore("visible", images[0], tone), expected)
    for tile in (0, 4):
        engine = Engine(model, torch.float32, tile)
        torch.testing.assert_close(engine.restore("visible", images[0], tone), expected, atol=1e-5, rtol=1e-5)


def test_the_shipped_network_brightens_what_is_dark_and_nothing_else(data_dir):
    """Real images, as they are, and as dark as the paper's dark scenes."""
    network, gains = load_model(), []
    gamma, gain, contrast = tone = torch.tensor([[3.5], [0.8], [0.8]])
    code = network.encode(F.pad(torch.ones(1, 1, 1), (12,) * 4), torch.zeros(1), tone.mT)
    for source in clean_pairs(data_dir, "roadscene", 8):
        clean = [image / 255 for image in (source.visible, source.infrared)]
        for modality, image, found in zip(
            ("visible", "infrared"), clean, network.estimate_codes(*clean), strict=True
        ):
            assert (found[:, 16:] == 1).all(), source.name
            dark = (255 * low_light(reduce_contrast(image, contrast), gamma, gain)).round() / 255
            with torch.inference_mode():
                blind, told = network.restore(modality, dark), network.restore(modality, dark, code)
            gains.append([psnr(x.clamp(0, 1), image) - psnr(dark, image) for x in (blind, told)])
    blind, told = torch.tensor(gains).unbind(1)
    recognised = blind > 1
    assert recognised.float().mean() >= 1 / 3
    assert blind[recognised].min() > 5
    assert (blind[~recognised] > -0.5).all()
    assert (told > blind).all() and told.mean() > 20


def test_codes_of_known_degradations(model):
    model.code_basis.normal_()
    kernels, noise_std = torch.rand(2, 25, 25), torch.tensor([0.1, 0.2])
    code = model.encode(kernels, noise_std)
    torch.testing.assert_close(code[1, 3], (kernels[1].flatten() * model.code_basis[3]).sum())
    torch.testing.assert_close(code[:, 15], noise_std)
    with pytest.raises(ValueError, match=r"\[B, 25, 25\]"):
        model.encode(kernels[:, 1:], noise_std)
    tone = torch.rand(2, 3) + 0.5
    torch.testing.assert_close(model.encode(kernels, noise_std, tone), torch.cat((code, tone), dim=1))
    for wrong in (tone[:1], tone - 2):
        with pytest.raises(ValueError, match=r"tone must be \[2, 3\] and positive"):
            model.encode(kernels, noise_std, wrong)


def test_untrained_network_is_near_the_mean_of_its_inputs():
    torch.manual_seed(0)
    visible, infrared = pair(2, 1, 16, 16)
    output = DDRFNet()(visible, infrared)
    for image, expected in ((output.visible, visible), (output.infrared, infrared)):
        assert (image - expected).abs().mean() < 0.1
    base_error = base_images(F.pixel_unshuffle(output.fused - (visible + infrared) / 2, 2))[:, -1]
    assert base_error.abs().mean() < 0.1


def test_blend_takes_bands_where_the_shares_say():
    torch.manual_seed(0)
    images = torch.rand(2, 8, 4, 5, dtype=torch.float64)
    infrared, visible = images.chunk(2, dim=1)
    bases = base_images(images)
    none, all_, correction = (
        torch.zeros_like(visible),
        torch.full_like(visible, 50),
        0.1 * torch.randn_like(visible),
    )

    def blended(*output, caution=0.0):
        output = torch.cat(output, dim=1)
        return blend(images, bases, output, output.mean(dim=(2, 3)), 0.0, torch.tensor([caution, caution]))

    torch.testing.assert_close(blended(all_, all_, none), visible)
    expected = infrared + correction - correction.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(blended(-all_, -all_, correction), expected)
    torch.testing.assert_close(blended(none, none, none), (infrared + visible) / 2)
    # With caution the base is shared equally and the correction is half as large.
    base = bases[:, -1]
    change = to_pixels(base.mean(dim=1, keepdim=True) - base[:, 1:])
    torch.testing.assert_close(
        blended(all_, all_, correction, caution=1.0), visible + change + (expected - infrared) / 2
    )
    low_infrared, low_visible = bases[:, 0].split(1, dim=1)
    torch.testing.assert_close(blended(all_, -all_, none), infrared + to_pixels(low_visible - low_infrared))
    # Each band has its share, the last one what remains.
    shares = torch.tensor([50.0, -50.0, 50.0, 0.0], dtype=torch.float64).view(1, 4, 1, 1).expand(2, 4, 4, 5)
    levels = [base.split(1, dim=1) for base in bases.unbind(dim=1)]  # (infrared, visible) of each
    of_bands = levels[0][1] - levels[1][1] + levels[1][0] - levels[2][0] + levels[2][1] - levels[3][1]
    expected = infrared + to_pixels(of_bands + (levels[3][0] + levels[3][1]) / 2 - low_infrared)
    torch.testing.assert_close(blended(shares, -all_, none), expected)


def test_blend_prefers_the_livelier_of_every_band_but_the_last():
    torch.manual_seed(1)
    images = torch.rand(1, 8, 6, 5, dtype=torch.float64)
    bases = base_images(images)
    output = torch.zeros(1, 12, 6, 5, dtype=torch.float64)

    def livelier(band):
        infrared, visible = band.chunk(2, dim=1)
        return torch.where(visible.abs() > infrared.abs(), visible, infrared)

    base = bases[:, 3].mean(dim=1, keepdim=True)
    base = base + sum(livelier(bases[:, k] - bases[:, k + 1]) for k in range(3))
    expected = to_pixels(base) + livelier(images - to_pixels(bases[:, 0]))
    torch.testing.assert_close(
        blend(images, bases, output, output.mean(dim=(2, 3)), 1e9, torch.rand(1)), expected
    )


def test_a_slope_and_a_flat_image_are_blended_without_steps():
    """Detail of the slope over the base of the flat one: bases lie at pixels, not on squares of them."""
    slope = (torch.arange(40.0) / 100).expand(1, 1, 20, 40)
    images = F.pixel_unshuffle(torch.cat((torch.full_like(slope, 0.3), slope), dim=1), 2)
    output = torch.zeros(1, 12, 10, 20)
    output[:, :4], output[:, 4:8] = -50.0, 50.0
    fused = F.pixel_shuffle(
        blend(images, base_images(images), output, output.mean(dim=(2, 3)), 0.0, torch.zeros(1)), 2
    )
    torch.testing.assert_close(fused[..., 6:-6], torch.full((1, 1, 20, 28), 0.3))


def test_pairs_of_degraded_codes_are_fused_with_caution():
    torch.manual_seed(0)
    model = DDRFNet(DDRFNetConfig(width=8, blocks=1, num_kernels=2)).eval()
    visible, infrared = pair(2, 1, 20, 22)
    codes = torch.zeros(2, 16)
    codes[1, 15] = 0.1  # the noise level of the second pair
    with torch.no_grad():
        model.fusion.output.weight.mul_(20)
        model.fusion.caution.weight[0, [15, 31]] = 50.0
        model.fusion.caution.bias.fill_(-50.0)
        assert model.caution_logit(codes, codes).tolist() == pytest.approx([-50, -50 + 2 * 50 * 1.6])
        bold = model(visible, infrared, codes, codes).fused
        model.fusion.caution.weight.zero_()
        expected = model(visible, infrared, codes, codes).fused
        torch.testing.assert_close(bold[0], expected[0])
        model.fusion.caution.bias.fill_(50.0)
        torch.testing.assert_close(bold[1], model(visible, infrared, codes, codes).fused[1])
    assert (bold[1] - expected[1]).abs().max() > 0.01
    with torch.enable_grad():
        model(visible, infrared, codes, codes).fused.sum().backward()
    assert model.fusion.caution.weight.grad is None, "it is trained to tell degraded pairs alone"


def test_base_images_are_binomial_means_that_go_on_at_the_border():
    image = torch.rand(1, 4, 6, 7)
    expected = image[0].mean(dim=0).numpy()
    bases = base_images(image)
    assert bases.shape == (1, len(BASE_DISTANCES), 1, 6, 7)
    for base, distance in zip(bases[0, :, 0], (1, 2, 4, 8), strict=True):
        padded = np.pad(expected, distance, mode="edge")
        expected = np.zeros((6, 7))
        for row, column in np.ndindex(3, 3):
            part = padded[row * distance :, column * distance :][:6, :7]
            expected += (1, 2, 1)[row] * (1, 2, 1)[column] / 16 * part
        np.testing.assert_allclose(base, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 30), (37, 50)])
def test_the_tone_is_seen_in_the_distribution_of_values(size):
    """Moments and norms as numpy has them, of the means of blocks; differences along rows."""
    image = torch.rand(1, 1, 2 * size[0], 2 * size[1], dtype=torch.float64)
    value = image[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).mean(dim=(2, 3)).numpy()
    step = np.abs(np.diff(value, axis=1, append=value[:, -1:]))
    value, step = value[::2, ::2], step[::2, ::2]
    found = light_means(image)[0].numpy()
    polynomials = [np.polynomial.chebyshev.Chebyshev.basis(n)(2 * value**0.25 - 1) for n in range(13)]
    np.testing.assert_allclose(found[:12], [p.mean() for p in polynomials[1:]], atol=1e-9)
    np.testing.assert_allclose(found[12:17], [(value**n).mean() for n in (4, 8, 16, 32, 64)], atol=1e-12)
    np.testing.assert_allclose(found[17:], [(step * p).mean() for p in polynomials], atol=1e-9)


def test_black_pixels_have_a_gradient(model):
    images = [torch.zeros(1, 1, 8, 8, requires_grad=True) for _ in range(2)]
    sum_of_all(model, *images).backward()
    assert all(torch.isfinite(image.grad).all() for image in images)


def test_the_untrained_network_takes_nothing_for_dark():
    torch.manual_seed(0)
    assert (ToneEstimator()(torch.rand(8, 1, 16, 16) ** 4) == 1).all()


def test_darkness_is_undone_by_and_by_as_the_odds_rise():
    torch.manual_seed(0)
    estimator, image = ToneEstimator(), torch.rand(1, 1, 16, 16)
    torch.nn.init.zeros_(estimator.head.weight)
    _, full = estimator.guess(light_means(image))
    for odds, share in ((-1, 0), (0, 0), (0.125, 0.5), (0.25, 1), (3, 1)):
        torch.nn.init.constant_(estimator.head.bias[:1], odds)
        torch.testing.assert_close(estimator(image), 1 + share * (full - 1))
        assert share > 0 or (estimator(image) == 1).all()


def test_black_is_not_taken_for_dark():
    """A closed lens: what the branch leaves of it would become a grey."""
    network = load_model()
    for value, dark in ((0, False), (1, False), (2, True)):
        image = torch.full((1, 1, 32, 48), value / 255)
        for estimator in (network.visible_tone, network.infrared_tone):
            assert bool((estimator(image) != 1).any()) == dark


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    network = DDRFNet(SMALL)
    images = pair(2, 1, 8, 10)
    sum_of_all(network, *images).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(model, dtype):
    visible, infrared = pair(1, 1, 12, 16)
    expected = model(visible, infrared).fused
    actual = model.to(dtype)(visible.to(dtype), infrared.to(dtype)).fused
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.05


@pytest.mark.slow
def test_compiles_for_any_size_and_batch(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        compiled(*pair(2, 1, 36, 42))
        with torch.compiler.set_stance("fail_on_recompile"):
            for shape in ((3, 1, 50, 40), (2, 1, 37, 61)):
                torch.testing.assert_close(compiled(*pair(*shape)).fused, model(*pair(*shape)).fused)


@pytest.mark.slow
def test_exports_for_any_size_and_batch(model):
    side = {"min": 32, "max": 4096}
    sizes = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", **side),
        3: torch.export.Dim("width", **side),
    }
    exported = torch.export.export(
        model, pair(2, 1, 50, 64), dynamic_shapes={"visible": sizes, "infrared": sizes}
    )
    visible, infrared = pair(1, 1, 41, 70)
    torch.testing.assert_close(
        exported.module()(visible, infrared).fused, model(visible, infrared).fused, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3, 8, 8), (1, 1, 8, 8)), r"\[B, 1, H, W\]"),
        (((1, 1, 8, 8), (1, 1, 8, 9)), "one size"),
        (((1, 1, 0, 8), (1, 1, 0, 8)), "at least one pixel"),
        (((1, 1, 8, 8), (1, 1, 8, 8), (2, 16)), r"visible_code must be \[1, 16 or 19\]"),
        (((1, 1, 8, 8), (1, 1, 8, 8), (1, 16), (1, 15, 2, 2)), "infrared_code"),
    ],
)
def test_bad_input(model, shapes, message):
    with pytest.raises(ValueError, match=message):
        model(*(torch.rand(shape) for shape in shapes))


def test_file_round_trip(model, tmp_path):
    record = {"seed": 3, "loss_curve": [1.0, 0.5]}
    path = save_model(model, tmp_path / "deep" / "weights.safetensors", record)
    loaded = load_model(path)
    assert not loaded.training
    for actual, expected in zip(loaded(*pair(1, 1, 9, 9)), model(*pair(1, 1, 9, 9)), strict=True):
        assert torch.equal(actual, expected)
    assert read_metadata(path) == (SMALL, record)
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


def test_unfit_files_are_told(model, tmp_path):
    path = save_model(model, tmp_path / "weights.safetensors")
    config, state = read_metadata(path)[0], load_file(path)
    metadata = {
        "format": "ddrf_fast.ddrfnet",
        "format_version": "1",
        "config": json.dumps(vars(config)),
        "record": "{}",
    }

    def message(state=state, **changes):
        save_file(state, path, metadata={**metadata, **changes})
        with pytest.raises(ValueError, match=r"weights\.safetensors") as error:
            load_model(path)
        return str(error.value)

    without = {name: tensor for name, tensor in state.items() if name != "fusion.output.bias"}
    assert "missing fusion.output.bias [2, 12]" in message(without)
    assert "unexpected extra [3]" in message({**state, "extra": torch.zeros(3)})
    assert "fusion.output.bias is [5], expected [2, 12]" in message(
        {**state, "fusion.output.bias": torch.zeros(5)}
    )
    bad = state["fusion.output.bias"].clone()
    bad[0, 0] = float("nan")
    assert "NaN or infinite values in fusion.output.bias" in message({**state, "fusion.output.bias": bad})
    assert "no DDRF-Net" in message(format="other")
    assert "newer" in message(format_version="2")
    assert "metadata" in message(config='{"depth": 3}')
    path.write_bytes(b"not a weights file")
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        load_model(path)
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "missing.safetensors")
    save_model(model, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(path)


def test_weights_that_are_not_finite_are_not_saved(model, tmp_path):
    path = save_model(model, tmp_path / "weights.safetensors")
    before = path.read_bytes()
    with torch.no_grad():
        model.fusion.output.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"fusion\.output\.weight"):
        save_model(model, path)
    assert path.read_bytes() == before


def test_without_gradients_means_are_handed_on(model):
    """Pooled once: the same images as where every router pools itself, and no mean of features is taken."""
    visible, infrared = pair(2, 1, 18, 22)
    for codes in (
        (),
        (torch.randn(2, 16), torch.randn(2, 16)),
        (torch.randn(2, 16, 3, 4), torch.randn(2, 16)),
    ):
        expected = model(visible, infrared, *codes)
        with torch.no_grad():
            found = model(visible, infrared, *codes)
        for actual, image in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, image, atol=1e-5, rtol=1e-5)


PARTS = ("visible", "infrared", "fusion")
STATIC = {f"dynamic_{part}": False for part in PARTS}


@pytest.mark.parametrize("static", [*((part,) for part in PARTS), PARTS])
def test_the_static_twin_has_the_same_layers(static):
    """A bank of one kernel is a plain convolution: with its kernels the twin gives the same images."""
    torch.manual_seed(0)
    sizes = {"width": 8, "blocks": 1, "num_kernels": 1}
    network = DDRFNet(DDRFNetConfig(**sizes))
    twin = DDRFNet(DDRFNetConfig(**sizes, **{f"dynamic_{part}": False for part in static})).eval()
    ours = twin.state_dict()
    ours.update(
        {n: t[0] if n in ours and t.dim() > ours[n].dim() else t for n, t in network.state_dict().items()}
    )
    twin.load_state_dict({name: tensor for name, tensor in ours.items() if name in twin.state_dict()})
    prefixes = {"visible": "visible_branch", "infrared": "infrared_branch", "fusion": "fusion"}
    for part, prefix in prefixes.items():
        kinds = {type(module) for name, module in twin.named_modules() if name.startswith(prefix + ".")}
        assert (DynamicConv2d not in kinds) == (part in static)
    images = pair(2, 1, 9, 12)
    for codes in ((None, None), (torch.rand(2, 16), torch.rand(2, 16, 3, 2))):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for actual, expected in zip(twin(*images, *codes), network(*images, *codes), strict=True):
                    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_static_twin_is_smaller_and_trains():
    twin = DDRFNet(DDRFNetConfig(**STATIC))
    assert sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in DDRFNet().parameters()) / 5
    images = pair(2, 1, 16, 16)
    sum_of_all(twin, *images).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in twin.parameters())


def test_the_static_twin_is_saved_and_loaded(tmp_path):
    twin = DDRFNet(DDRFNetConfig(width=8, blocks=1, **STATIC)).eval()
    loaded = load_model(save_model(twin, tmp_path / "twin.safetensors"))
    assert loaded.config == twin.config
    images = pair(1, 1, 8, 8)
    assert torch.equal(loaded(*images).fused, twin(*images).fused)


def test_classical_fusions():
    visible, infrared = pair(2, 1, 37, 50)
    for name, fusion in CLASSICAL_FUSIONS.items():
        torch.testing.assert_close(fusion(visible, visible), visible, atol=1e-6, rtol=0, msg=name)
        assert fusion(visible, infrared).shape == visible.shape
    # A detail in one image only is taken over whole, where the average halves it.
    flat, detail = torch.full((1, 1, 32, 32), 0.5), torch.full((1, 1, 32, 32), 0.5)
    detail[..., 16, 16] = 1.0
    assert laplacian_pyramid(flat, detail)[0, 0, 16, 16] > 0.95


@pytest.mark.parametrize("size", [(38, 50), (37, 49)])
def test_laplacian_pyramid_gives_what_opencv_makes_of_it(size):
    visible, infrared = (np.random.default_rng(seed).random(size, np.float32) for seed in (0, 1))
    levels = [(visible, infrared)]
    for _ in range(2):
        levels.append(tuple(cv2.pyrDown(image) for image in levels[-1]))
    expected = sum(levels[-1]) / 2
    for finer, coarser in zip(levels[-2::-1], levels[:0:-1], strict=True):
        shape = finer[0].shape[::-1]
        details = [image - cv2.pyrUp(low, dstsize=shape) for image, low in zip(finer, coarser, strict=True)]
        larger = np.where(np.abs(details[0]) >= np.abs(details[1]), *details)
        expected = larger + cv2.pyrUp(expected, dstsize=shape)
    fused = laplacian_pyramid(
        *(torch.from_numpy(image)[None, None] for image in (visible, infrared)), levels=2
    )
    # At its right and lower border pyrUp repeats pixels instead of reflecting them.
    inside = (slice(-10), slice(-10))
    torch.testing.assert_close(fused[0, 0][inside], torch.from_numpy(expected[inside]), atol=1e-5, rtol=0)


def test_guided_filter_gives_what_its_authors_code_gives(data_dir):
    paths = ("tno/test/vis", "tno/test/ir", "baselines/tno/gff")
    visible, infrared, published = (
        torch.from_numpy(read_image(data_dir / path / "05.png"))[None, None] / 255 for path in paths
    )
    assert psnr(guided_filter(visible, infrared).clamp(0, 1), published).item() > 55


def test_a_weights_file_can_be_read_by_others(tmp_path):
    """Its mode is that of any new file, not the private one that safetensors gives."""
    (tmp_path / "plain").touch()
    path = save_model(DDRFNet(), tmp_path / "weights.safetensors")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {file.name for file in tmp_path.iterdir()} == {"plain", "weights.safetensors"}
