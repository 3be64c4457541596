"""Training on real pairs: it learns, repeats itself, goes on where it stopped, and leaves a model."""

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")

import ddrf_fast
from ddrf_fast.data import read_image, write_image
from ddrf_fast.degradation import (
    enlarge,
    isotropic_gaussian_kernel,
    low_light,
    reduce_contrast,
    undo_darkness,
)
from ddrf_fast.losses import fidelity_loss, positive_sample, similarity
from ddrf_fast.models import DDRFOutput, load_model, read_metadata, save_model
from ddrf_fast.models.classical import CLASSICAL_FUSIONS
from ddrf_fast.models.tone import ToneEstimator, light_means
from ddrf_fast.training import PairSource, TrainingConfig, load_config, train
from ddrf_fast.training.callbacks import BestCheckpoint
from ddrf_fast.training.config import PRESETS
from ddrf_fast.training.crops import Crops, RandomCrops, StepBatches, ValidationCrops, load_pairs
from ddrf_fast.training.module import TrainingModule, darkness_loss
from ddrf_fast.training.resizing import LARGEST_SCALE, Resizing

TINY = ["crop=32", "batch_size=2", "model.width=8", "model.blocks=1", "model.num_kernels=2", "device=cpu"]
TINY += ["progress_bar=false", "threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pairs of 96x112, cut from the sample that comes with the package."""
    target = tmp_path_factory.mktemp("pairs")
    assets = Path(ddrf_fast.__file__).parent / "assets"
    for kind, name in (("ir", "sample_infrared.png"), ("vis", "sample_visible.png")):
        (target / kind).mkdir()
        image = read_image(assets / name)
        for number, left in enumerate((40, 180, 320)):
            write_image(target / kind / f"{number}.png", image[150:246, left : left + 112])
    return str(target)


@pytest.fixture
def real_folder(data_dir, tmp_path):
    """Three real pairs, cut likewise."""
    for kind in ("ir", "vis"):
        (tmp_path / "real" / kind).mkdir(parents=True)
        for path in sorted((data_dir / "roadscene" / "train" / kind).iterdir())[:3]:
            write_image(tmp_path / "real" / kind / f"{path.stem}.png", read_image(path)[60:156, 100:212])
    return str(tmp_path / "real")


def settings(folder, output, *overrides, files=()):
    given = [f"data={folder}", f"output={output}", "epochs=2", "crops_per_pair=4", "validation_pairs=1"]
    return load_config(files, [*TINY, *given, *overrides])


def checkpoint(output):
    return torch.load(output / "last.ckpt", weights_only=True)


def assert_same_training(first, second):
    """Two outputs hold the same state, to the bit: weights, average, optimiser, early stop and curve."""
    ours, theirs = checkpoint(first), checkpoint(second)
    for name in ("curve", "global_step", "epoch"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(ours["optimizer_states"], theirs["optimizer_states"], rtol=0, atol=0)
    stops = [
        [state for name, state in each["callbacks"].items() if name.startswith("EarlyStopping")]
        for each in (ours, theirs)
    ]
    assert stops[0] == stops[1]
    (_, ours), (_, theirs) = (read_metadata(path / "ddrfnet.safetensors") for path in (first, second))
    for name in ("validation", "loss_curve", "steps", "training_pairs", "validation_pairs"):
        assert ours[name] == theirs[name]


# --- settings ----------------------------------------------------------------------------------------------


def test_settings_come_from_files_then_from_overrides(tmp_path):
    assert load_config() == TrainingConfig()
    (tmp_path / "own.yaml").write_text(
        "crop: 64\nmodel:\n  width: 16\ndata:\n  - one\n  - {path: two, split: train}\n"
    )
    config = load_config(
        ["paper", tmp_path / "own.yaml"], ["model.blocks=2", "learning_rate=1e-4", "noise_std=[0,1]"]
    )
    assert (config.epochs, config.crop, config.similarity_weight) == (89, 64, 1.0)
    assert (config.model.width, config.model.blocks, config.learning_rate) == (16, 2, 1e-4)
    assert config.noise_std == (0.0, 1.0)
    assert config.data == (PairSource("one"), PairSource("two", split="train"))
    (tmp_path / "written.yaml").write_text(config.to_yaml())
    assert load_config([tmp_path / "written.yaml"]) == config


def test_the_papers_settings():
    config = load_config(["paper"])
    assert (config.epochs, config.learning_rate, config.batch_size) == (89, 0.001, 16)
    weights = (
        config.restoration_weight,
        config.similarity_weight,
        config.negative_weight,
        config.positive_weight,
    )
    assert weights == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("crop=33", "crop must be even and at least 32, got 33"),
        ("wdth=8", "wdth=8: Key 'wdth' not in the settings"),
        ("model.wdth=8", "model.wdth=8: Key 'wdth' not in .* Did you mean: 'width'"),
        ("learning_rate=x", "learning_rate=x: Value 'x' of type 'str' could not be converted to Float"),
        ("epochs=2.5", "epochs=2.5: Value '2.5' of type 'float' could not be converted to Integer"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("noise_std=[0]", r"noise_std=\[0\]: .*length 1"),
        ("precision=8-true", "precision=8-true: Invalid value '8-true', expected one of"),
        ("device=tpu", "device=tpu: Invalid value 'tpu'"),
        ("seed=3000000000000000000", r"seed must be below 2\^60, got 3000000000000000000"),
        ("ema_decay=2", r"ema_decay must be in \[0, 1\], got 2"),
        ("scales=[1,5]", r"scales must be divisors of the crop of 96, got \[1, 5\]"),
        ("degraded_positive_fusion=mean", "degraded_positive_fusion must be one of average, .*got 'mean'"),
        ("degradation=fog", "degradation must be one of paper, .*got 'fog'"),
        ("data=[{path: a, spilt: b}]", "expected a folder or {path, layout, split, thermal_range}, got {'pa"),
        ("data=[{path: a, thermal_range: 9%}]", "thermal_range must be full, minmax, .*got '9%'"),
        ("epochs", "expected a setting as key=value, got 'epochs'"),
        ("crop=[", r"crop=\[: not YAML"),
        ("data={path: a, split: 1}", "data: split must be a text, got 1"),
        ("data={path: null}", "data: path must be a text, got None"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config([], [override])


def test_an_early_stop_needs_a_validation():
    with pytest.raises(ValueError, match="early_stop_patience needs validation_pairs, got 0"):
        load_config([], ["early_stop_patience=2", "validation_pairs=0"])


def test_crops_are_large_enough_for_the_fidelity_loss():
    assert load_config([], ["crop=42", "fidelity_weight=1"]).fidelity_weight == 1
    with pytest.raises(ValueError, match="crop must be at least 41 where fidelity_weight is not 0, got 32"):
        load_config([], ["crop=32", "fidelity_weight=1"])


def test_crops_are_large_enough_to_be_blurred_when_made_smaller():
    assert load_config([], ["crop=38", "resized_fraction=1"]).crop == 38
    for crop in (32, 34, 36):
        with pytest.raises(
            ValueError, match=f"crop must be at least 38 where resized_fraction .* got {crop}"
        ):
            load_config([], [f"crop={crop}", "resized_fraction=0.1"])
    smaller = Resizing(LARGEST_SCALE, "area", "bilinear").smaller(torch.zeros(1, 1, 38, 38))
    assert min(smaller.shape[2:]) == 13


@pytest.mark.parametrize("text", ["20261130_0758", "010", "12:30", "1.10", "on", "2026-11-30"])
def test_texts_are_taken_as_they_are_written(text):
    assert load_config([], [f"output={text}"]).output == text
    assert load_config([], [f"initial_weights={text}"]).initial_weights == text
    assert load_config([], [f"data={text}"]).data == (PairSource(text),)
    assert load_config([], ["initial_weights=null"]).initial_weights is None


def test_one_data_set_needs_no_list():
    for one in ("pairs", Path("pairs"), {"path": "pairs"}, PairSource("pairs")):
        assert TrainingConfig(data=one).data == TrainingConfig(data=[one]).data == (PairSource("pairs"),)


def test_a_folder_of_its_name_does_not_hide_a_preset(tmp_path, monkeypatch):
    (tmp_path / "static").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not load_config(["static"]).model.dynamic_fusion


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: cannot be read .*presets are .*paper"):
        load_config(["nowhere"])
    for text, message in (
        ("epochs: many", "own.yaml: epochs: Value 'many'"),
        ("[1, 2]", "own.yaml: expected settings"),
    ):
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config([tmp_path / "own.yaml"])


@pytest.mark.parametrize("experiment", "abcdefgh")
def test_the_experiments_of_figure_8(experiment):
    config = load_config(["paper", f"fig8_{experiment}"])
    model = config.model
    assert {model.dynamic_visible, model.dynamic_infrared, model.dynamic_fusion} == {experiment in "bfgh"}
    with_negatives = experiment in "eh"
    assert (config.negative_weight, config.positive_weight) == ((1, 1) if with_negatives else (0, 0))
    assert config.similarity_weight == 1
    module = TrainingModule(
        dataclasses.replace(config, model=dataclasses.replace(model, width=8, blocks=1)), 1
    )
    weights = [module.restoration_weight(epoch) for epoch in (0, 9, 10, 88)]
    assert weights == (
        [0, 0, 0, 0] if experiment in "ab" else [1, 1, 0, 0] if experiment in "cf" else [1, 1, 1, 1]
    )


def test_every_preset_loads():
    for path in PRESETS.glob("*.yaml"):
        assert load_config([path.stem]) == load_config([path])
        assert yaml.safe_load(path.read_text())


# --- data --------------------------------------------------------------------------------------------------


def test_crops_repeat_and_stay_registered(folder):
    sources = (PairSource(folder),)
    pairs, kept = load_pairs(sources, 32, 1)
    assert len(pairs) == 2 and len(kept) == 1 and kept.names[0] not in pairs.names
    crops = RandomCrops(pairs, 32, seed=1)
    assert all(image.shape == (1, 32, 32) for image in crops[3][1:])
    again = RandomCrops(load_pairs(sources, 32, 1, cache=False)[0], 32, seed=1)
    for first, second in zip(crops[3], again[3], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(crops[3].visible, crops[4].visible)
    assert not torch.equal(crops[3].visible, RandomCrops(pairs, 32, seed=2)[3].visible)
    # The same image as both, of which every fusion makes the same again: cut and turned, it stays so.
    for index, pair in pairs.cache.items():
        pairs.cache[index] = pair._replace(images=pair.images[:1].expand(2, -1, -1, -1))
    for number in range(20):
        item = crops[number]
        assert torch.equal(item.visible, item.infrared)
        torch.testing.assert_close(item.visible, item.positive)
    assert max(ValidationCrops(kept)[0].visible.shape) <= 256
    assert ValidationCrops(kept, 7)[0].visible.shape[1] % 7 == 0


def test_the_best_of_the_chosen_fusions_makes_the_positive_sample(folder):
    every, _ = load_pairs((PairSource(folder),), 32, 0)
    for number in range(len(every)):
        _, images, fusion = every[number]
        visible, infrared = images[:, None] / 255
        best = positive_sample(visible, infrared)[1].item()
        assert fusion is list(CLASSICAL_FUSIONS.values())[best]
    chosen, _ = load_pairs((PairSource(folder),), 32, 0, fusions=["laplacian_salient"])
    crop = RandomCrops(chosen, 32, seed=0)[5]
    expected = CLASSICAL_FUSIONS["laplacian_salient"](crop.visible[None], crop.infrared[None])[0]
    torch.testing.assert_close(crop.positive, expected.clamp(0, 1))


def test_the_positive_sample_gives_way_as_pairs_lose_detail():
    torch.manual_seed(0)
    visible, infrared = torch.rand(2, 3, 1, 32, 32).unbind(0)
    crops = Crops(torch.arange(3), visible, infrared, torch.rand(3, 1, 32, 32))
    nothing, half = torch.zeros(1, 32, 32), 0.5 * visible[1] + 0.25
    degraded = [torch.stack((visible[0], half, nothing)), torch.stack((infrared[0], infrared[1], nothing))]
    average = (visible + infrared) / 2
    module = TrainingModule(TrainingConfig(degraded_positive_fusion="average"), 1)
    light = [torch.ones(3, 3)] * 2
    share = module.kept(crops, degraded, light)
    clean, partly, lost = module.positive(crops, share)
    torch.testing.assert_close(clean, crops.positive[0])
    left = similarity(half[None], visible[1:2])
    kept = 3 * left**2 - 2 * left**3
    torch.testing.assert_close(partly, kept * crops.positive[1] + (1 - kept) * average[1])
    torch.testing.assert_close(lost, average[2], atol=0.01, rtol=0)
    assert TrainingModule(TrainingConfig(), 1).positive(crops, share) is crops.positive
    # Darkness alone leaves all there is to see.
    gamma, gain = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0.5, 1.0, 1.0])
    dark = [low_light(visible, gamma, gain), infrared]
    tones = [torch.stack((gamma, gain, torch.ones(3)), dim=1), light[1]]
    assert module.kept(crops, dark, tones)[0] > 0.99 > 0.9 > module.kept(crops, dark, light)[0]


def test_lost_pairs_are_to_be_faithful_to_the_sources():
    """A step of two samples: what is left of the first is clean, of the second nothing."""
    torch.manual_seed(0)
    visible, infrared, positive = torch.rand(3, 2, 1, 48, 48).unbind(0)
    crops = Crops(torch.arange(2), visible, infrared, positive)
    degraded = [image * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1) for image in (visible, infrared, positive)]
    output = DDRFOutput((visible + infrared) / 2, visible, infrared)
    zero = torch.zeros(2, 16)
    config = TrainingConfig(
        fidelity_weight=7.0, similarity_weight=0.0, negative_weight=0.0, estimator_weight=3.0
    )
    light = [torch.ones(2, 3)] * 2
    terms = TrainingModule(config, 1).losses(output, crops, degraded, (zero, zero), [zero, zero], light, 0.0)
    expected = fidelity_loss(output.fused, visible, infrared)[1] / 2
    torch.testing.assert_close(terms["fidelity"], expected)
    # Of these codes the untrained network thinks the log odds of a lost pair to be -2.
    odds = torch.tensor([-2.0, 2.0])
    torch.testing.assert_close(terms["caution"], F.softplus(odds).mean())
    estimators = terms["estimator"] + terms["caution"] + terms["darkness"]
    torch.testing.assert_close(terms["loss"], terms["positive"] + 7 * expected + 3 * estimators)


def test_dark_images_are_to_be_recognised_and_brightened():
    """Of two images the second is dark; the estimator is sure of both, of the log odds 3."""
    clean = 0.3 + 0.5 * torch.rand(2, 1, 33, 32, dtype=torch.float64)
    tone = torch.tensor([[1.0, 1.0, 1.0], [2.5, 0.7, 0.8]], dtype=torch.float64)
    gamma, gain, contrast = tone.unbind(1)
    degraded = low_light(reduce_contrast(clean, contrast), gamma, gain)
    estimator = ToneEstimator().double()
    with torch.no_grad():
        estimator.head.weight.zero_()
        estimator.head.bias[0] = 3.0
    _, guess = estimator.guess(light_means(degraded[:, :, :32]))
    recognition = (16 * F.softplus(torch.tensor(3.0)) + F.softplus(torch.tensor(-3.0))) / 2
    error = (undo_darkness(degraded, guess).clamp(-0.2, 1.2) - clean)[1].square().mean()
    expected = recognition + 10 * (error + 1e-4).sqrt()
    torch.testing.assert_close(darkness_loss(estimator, degraded, clean, tone), expected.double())
    nothing_dark = darkness_loss(estimator, clean, clean, torch.ones(2, 3))
    torch.testing.assert_close(nothing_dark, 16 * F.softplus(torch.tensor(3.0, dtype=torch.float64)))


def test_every_pair_has_its_turn(folder):
    pairs, _ = load_pairs((PairSource(folder),), 32, 0)
    for index in range(3):
        images = pairs[index].images
        pairs.cache[index] = pairs[index]._replace(images=torch.full_like(images, index))
    crops = RandomCrops(pairs, 32, seed=0)
    seen = [round(crops[number].visible.mean().item() * 255) for number in range(30)]
    assert all(sorted(seen[turn : turn + 3]) == [0, 1, 2] for turn in range(0, 30, 3))
    assert len({tuple(seen[turn : turn + 3]) for turn in range(0, 30, 3)}) > 1


def test_steps_are_the_same_for_any_number_of_processes_and_after_any_interruption():
    whole = [list(StepBatches(lambda step=step: step, 3, 4)) for step in (0, 3)]
    assert [sample for epoch in whole for step in epoch for sample in step] == list(range(24))
    assert list(StepBatches(lambda: 4, 3, 4)) == whole[1][1:]
    halves = [list(StepBatches(lambda: 3, 3, 4, rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == whole[1]


def test_raw_thermal_values_are_spread(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    for kind, image in (("vis", grey), ("ir", 7000 + 10 * grey.astype(np.uint16))):
        (tmp_path / kind).mkdir()
        write_image(tmp_path / kind / "a.png", image)
    source = PairSource.of({"path": str(tmp_path), "thermal_range": "7000,9550"})
    pair = load_pairs((source,), 32, 0)[0][0]
    assert torch.equal(pair.images[0], torch.from_numpy(grey)[None])
    assert torch.equal(pair.images[1], pair.images[0])


def test_unfit_data_is_told(folder):
    sources = (PairSource(folder),)
    with pytest.raises(ValueError, match="at least one folder"):
        load_pairs((), 32, 1)
    with pytest.raises(ValueError, match="smaller than the crop of 1024"):
        load_pairs(sources, 1024, 1)
    with pytest.raises(ValueError, match="leave none"):
        load_pairs(sources, 32, 3)


# --- a step ------------------------------------------------------------------------------------------------


def module_and_batch(folder, *overrides, size=2):
    torch.manual_seed(0)
    config = settings(folder, "unused", *overrides)
    module = TrainingModule(config, 4)
    crops = RandomCrops(load_pairs((PairSource(folder),), config.crop, 0)[0], config.crop, seed=0)
    return module, Crops(
        *(torch.stack(items) for items in zip(*(crops[i] for i in range(size)), strict=True))
    )


def test_known_parts_of_the_degradations(folder):
    module, crops = module_and_batch(folder, "sharp_fraction=1", "noiseless_fraction=1")
    for spatial in (False, True):
        degraded, codes, _ = module.degrade(module.degradation, crops, 0, spatial)
        for image, clean in zip(degraded, crops[1:], strict=True):
            torch.testing.assert_close(image, (clean * 255).round() / 255)
    # The network knows the basis in which its codes are given.
    recipe = module.degradation.sample(2, seed=0, spatial=False)
    codes = module.degradation.replay(crops.visible, recipe).codes
    torch.testing.assert_close(
        module.model.encode(recipe.kernels[:, 0], torch.zeros(2)), codes, atol=1e-6, rtol=1e-5
    )


def test_codes_are_in_the_basis_of_the_network(folder):
    """Also in a validation, which blurs all, and after a training with other degradations."""
    module, crops = module_and_batch(folder)
    assert not torch.allclose(module.degradation.components, module.validation_degradation.components)
    module.model.code_basis.copy_(module.model.code_basis.roll(1, 0))
    for degradation in (module.degradation, module.validation_degradation):
        recipe = degradation.sample(2, seed=0, sample_ids=crops.sample_ids, spatial=False)
        kernels = torch.einsum("bn,bnuv->buv", recipe.weights, recipe.kernels)
        _, codes, _ = module.degrade(degradation, crops, 0, False)
        torch.testing.assert_close(codes[0], module.model.encode(kernels, recipe.noise_std))


def test_down_sampled_images_come_back_to_their_size(folder):
    module, crops = module_and_batch(folder, "scales=[1,2,4]", "sharp_fraction=1", "noiseless_fraction=1")
    degraded, _, _ = module.degrade(module.degradation, crops, 0, False, 4)
    assert degraded[0].shape == crops.visible.shape
    large = enlarge(crops.visible[:, :, ::4, ::4], (32, 32), 4).clamp(0, 1)
    torch.testing.assert_close(degraded[0], (large * 255).round() / 255)
    assert all(torch.isfinite(module.step_losses(crops, step)["loss"]) for step in range(4))


def test_resized_images_keep_their_place_and_are_told_as_blurred(folder):
    module, crops = module_and_batch(
        folder, "resized_fraction=0.5", "sharp_fraction=1", "noiseless_fraction=1", "crop=40"
    )
    for down, up in itertools.product(("area", "bilinear", "bicubic"), ("bilinear", "bicubic")):
        resizing = Resizing(2.0, down, up)
        degraded, codes, _ = module.degrade(
            module.degradation, crops, 0, False, 2, resizings=(resizing, None, None)
        )
        # A ramp shows a shift.
        ramp = torch.linspace(0, 1, 40).expand(1, 1, 40, 40)
        moved = (resizing.larger(resizing.smaller(ramp), (40, 40)) - ramp)[..., 4:-4]
        assert abs(moved.mean()) < 1e-5 and moved.abs().max() < 0.11 / 39  # bicubic ripples about the ramp
        assert degraded[0].shape == crops.visible.shape
        torch.testing.assert_close(degraded[0] * 255, (degraded[0] * 255).round())
        kernel = isotropic_gaussian_kernel(torch.tensor([0.7, 0.7]))
        torch.testing.assert_close(
            codes[0], module.model.encode(kernel, torch.zeros(2)), atol=1e-6, rtol=1e-5
        )
        # The others are down-sampled all the same.
        large = enlarge(crops.infrared[:, :, ::2, ::2], (40, 40), 2).clamp(0, 1)
        torch.testing.assert_close(degraded[1], (large * 255).round() / 255)
    assert all(torch.isfinite(module.step_losses(crops, step)["loss"]) for step in range(4))


def test_resizings_reach_from_a_little_to_a_third():
    drawn = [Resizing.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert 1.25 <= min(drawn).scale < 1.4 and 2.85 < max(drawn).scale <= 3
    assert {(down, up) for _, down, up in drawn} == set(
        itertools.product(("area", "bilinear", "bicubic"), ("bilinear", "bicubic"))
    )


@pytest.mark.parametrize(
    ("preset", "size", "lowest", "highest"),
    [("paper", 25, 0, 25), ("srmd", 15, 0, 75), ("bsrgan", 25, 2, 25), ("real_esrgan", 21, 0.5, 34)],
)
def test_noise_is_that_of_the_preset_and_of_a_part_of_the_images(folder, preset, size, lowest, highest):
    module, _ = module_and_batch(
        folder, f"degradation={preset}", "noiseless_fraction=0.4", f"model.kernel_size={size}"
    )
    recipe = module.degradation.sample(4000, seed=0, spatial=False)
    noisy = recipe.noise_level > 0
    assert (~noisy).float().mean().item() == pytest.approx(0.4, abs=0.03)
    levels = 255 * recipe.noise_level[noisy]
    assert lowest <= levels.min() < lowest + 1 and highest - 4 < levels.max() <= highest
    if recipe.shot_noise is not None:
        assert not ((recipe.shot_noise > 0) & (recipe.noise_std > 0)).any()


@pytest.mark.parametrize(("preset", "size"), [("kair", 25), ("real_esrgan", 21)])
def test_noise_that_is_asked_for_is_white(folder, preset, size):
    settings = (f"degradation={preset}", f"model.kernel_size={size}", "noise_std=[0.1,0.2]")
    module, _ = module_and_batch(folder, *settings, "noiseless_fraction=0.25")
    for degradation, part in ((module.degradation, 0.75), (module.validation_degradation, 1.0)):
        recipe = degradation.sample(2000, seed=0, spatial=False)
        noisy = recipe.noise_std > 0
        assert noisy.float().mean().item() == pytest.approx(part, abs=0.03)
        assert torch.equal(recipe.noise_level, recipe.noise_std)
        assert recipe.noise_std[noisy].min() >= 0.1


@pytest.mark.parametrize(("preset", "dark"), [("paper", 0.0), ("paper", 0.3), ("low_light", 0.0)])
def test_validations_are_as_dark_as_trainings(folder, preset, dark):
    module, _ = module_and_batch(folder, f"degradation={preset}", f"dark_fraction={dark}")
    for degradation in (module.degradation, module.validation_degradation):
        tone = degradation.sample(2000, seed=0, spatial=False).tone
        part = 0.0 if tone is None else (tone != 1).any(dim=1).float().mean().item()
        assert part == pytest.approx(dark, abs=0.04)


def test_clean_pairs_stay_as_they_are(folder):
    module, crops = module_and_batch(folder, "degradation=low_light", "dark_fraction=1", size=3)
    clean = torch.tensor([True, False, True])
    for spatial in (False, True):
        degraded, codes, _ = module.degrade(module.degradation, crops, 0, spatial, clean=clean)
        for image, expected in zip(degraded, crops[1:], strict=True):
            torch.testing.assert_close(image[clean], (expected[clean] * 255).round() / 255)
            assert (image[1] - expected[1]).abs().mean() > 1e-3
        assert (codes[0][clean][:, -1] == 0).all()


def test_a_training_starts_from_given_weights(folder, tmp_path):
    module, _ = module_and_batch(folder)
    first = save_model(module.model, tmp_path / "first.safetensors")
    fresh = TrainingModule(settings(folder, "unused", "seed=1"), 4)
    assert not torch.equal(fresh.model.fusion.merge.weight, module.model.fusion.merge.weight)
    fresh.start_from(load_model(first))
    for network in (fresh.model, fresh.average):
        for name, value in module.model.state_dict().items():
            assert torch.equal(network.state_dict()[name], value), name
    with pytest.raises(ValueError, match="initial_weights are of a network with"):
        TrainingModule(settings(folder, "unused", "model.width=4"), 4).start_from(load_model(first))


def test_fine_tuning_starts_from_the_package(folder, tmp_path):
    weights = ["model.width=32", "model.blocks=3", "model.num_kernels=8", "initial_weights=package"]
    # A step so small that what was trained is what it started from.
    path = train(
        settings(
            folder, tmp_path, *weights, "learning_rate=1e-12", "crops_per_pair=1", "epochs=1", "ema_decay=0"
        )
    )
    expected, found = load_model().state_dict(), load_model(path).state_dict()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)
    assert read_metadata(path)[1]["config"]["initial_weights"] == "package"


def test_a_sample_is_degraded_alike_in_any_batch(folder):
    module, crops = module_and_batch(folder, size=4)
    whole, _, _ = module.degrade(module.degradation, crops, 7, True)
    part, _, _ = module.degrade(module.degradation, Crops(*(x[2:] for x in crops)), 7, True)
    for image, expected in zip(part, whole, strict=True):
        torch.testing.assert_close(image, expected[2:], atol=1e-6, rtol=0)
    assert not torch.allclose(whole[0] - crops.visible, whole[1] - crops.infrared, atol=1e-2)


def test_the_loss_is_the_weighted_sum_of_its_terms(folder):
    weights = {"restoration": 0.3, "similarity": 0.5, "negative": 0.7, "positive": 0.2, "estimator": 0.9}
    module, crops = module_and_batch(folder, *(f"{name}_weight={value}" for name, value in weights.items()))
    losses = module.step_losses(crops, 0)
    total = sum(weight * losses[name] for name, weight in weights.items())
    others = losses["caution"] + losses["darkness"]
    torch.testing.assert_close(losses["loss"], total + weights["estimator"] * others)


@pytest.mark.parametrize("spatial_fraction", [0.0, 1.0])
def test_every_weight_learns(folder, spatial_fraction):
    module, crops = module_and_batch(folder, f"spatial_fraction={spatial_fraction}")
    module.step_losses(crops, 0)["loss"].backward()
    for name, parameter in module.model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(parameter.grad is None for parameter in module.average.parameters())


def test_the_average_follows_the_weights(folder):
    module, _ = module_and_batch(folder, "ema_decay=0.9")
    before, weights = module.average.fusion.mix1.weight.clone(), module.model.fusion.mix1.weight
    with torch.no_grad():
        weights.add_(1)
    module.model.fusion.mix1.router.set_temperature(7)
    module.update_average(0)  # decays by 0.1 at first
    torch.testing.assert_close(module.average.fusion.mix1.weight, 0.1 * before + 0.9 * weights)
    assert module.average.fusion.mix1.router.temperature == 7
    before = module.average.fusion.mix1.weight.clone()
    module.update_average(10_000)
    torch.testing.assert_close(module.average.fusion.mix1.weight, 0.9 * before + 0.1 * weights)
    module, _ = module_and_batch(folder, "ema_decay=0")
    with torch.no_grad():
        module.model.fusion.mix1.weight.add_(1)
    module.update_average(10_000)
    assert torch.equal(module.average.fusion.mix1.weight, module.model.fusion.mix1.weight)


def test_losses_are_in_float32_under_autocast(folder):
    module, crops = module_and_batch(folder)
    full = module.step_losses(crops, 0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module.step_losses(crops, 0)
        torch.testing.assert_close(similarity(*crops[1:3]), similarity(*crops[1:3]), rtol=0, atol=0)
    for name, value in mixed.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[name], rtol=0.05, atol=0.01)
    mixed["loss"].backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.model.parameters())


def test_validation_takes_whatever_the_network_gives(folder, monkeypatch):
    module, crops = module_and_batch(folder)
    with torch.no_grad():
        module.average.visible_branch.tail.weight.mul_(1e6)
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    with torch.inference_mode():
        module.validation_step(crops, 0)
    assert all(torch.isfinite(value) for value in logged.values())


def test_compiled_is_the_same_network(folder):
    with torch.compiler.set_stance("force_eager"):  # what is compiled is tested with the model
        module, crops = module_and_batch(folder, "compile=true")
        assert module.model._compiled_call_impl is not None
        assert module.average._compiled_call_impl is None
        compiled = module.step_losses(crops, 0)["loss"]
    module, crops = module_and_batch(folder)
    assert torch.equal(module.step_losses(crops, 0)["loss"], compiled)


# --- trainings ---------------------------------------------------------------------------------------------


def test_two_real_pairs_are_learned_by_heart(real_folder, tmp_path):
    overrides = [
        "epochs=1",
        "crops_per_pair=60",
        "sharp_fraction=1",
        "noiseless_fraction=1",
        "learning_rate=0.003",
    ]
    path = train(settings(real_folder, tmp_path / "run", *overrides))
    _, record = read_metadata(path)
    assert record["steps"] == len(record["loss_curve"]) == 60 and len(record["training_pairs"]) == 2
    assert sum(record["loss_curve"][-10:]) < 0.5 * sum(record["loss_curve"][:10])


def test_a_training_repeats_itself_and_leaves_a_record(folder, tmp_path):
    outputs = (tmp_path / "first", tmp_path / "second")
    for output in outputs:
        train(settings(folder, output))
    assert_same_training(*outputs)
    for name, tensor in load_model(outputs[0] / "ddrfnet.safetensors").state_dict().items():
        assert torch.equal(tensor, checkpoint(outputs[0])["state_dict"][f"average.{name}"]), name
    config, record = read_metadata(outputs[0] / "ddrfnet.safetensors")
    names, kept = (
        sorted(os.path.splitext(name)[0] for name in os.listdir(f"{folder}/ir")),
        record["validation_pairs"],
    )
    assert config.width == 8 and record["steps"] == 8 and len(record["loss_curve"]) == 8
    assert record["config"]["seed"] == 0 and record["config"]["model"]["width"] == 8
    assert record["training_pairs"] == [
        f"{folder}/{name}" for name in names if f"{folder}/{name}" not in kept
    ]
    assert record["validation"]["restored_visible_psnr"] > 5
    assert load_config([outputs[0] / "config.yaml"]) == settings(folder, outputs[0])
    with pytest.raises(ValueError, match="first holds a training already: resume it"):
        train(settings(folder, outputs[0]))
    with pytest.raises(ValueError, match=r"other settings: learning_rate was 0\.001, got 0\.01"):
        train(settings(folder, outputs[0], "learning_rate=0.01"), resume=True)


def test_tensorboard_shows_losses_speed_and_images(folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(settings(folder, tmp_path, "log_every=2"))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {"loss", "restoration", "similarity", "negative", "positive", "estimator"}
    scalars |= {"images_per_second", "learning_rate", "validation/loss", "validation/restored_visible_psnr"}
    assert scalars <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 3, 5, 7]
    assert events.Tags()["images"] == ["validation/0"]
    picture = events.Images("validation/0")[0]
    assert (picture.width, picture.height) == (4 * 112, 2 * 96)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (signal.SIGINT, 1),
        (signal.SIGTERM, 2),
        (signal.SIGINT, 3),  # the last of the first epoch
        (signal.SIGINT, 4),
    ],
)
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(
    folder, tmp_path, monkeypatch, step, number
):
    overrides = ["early_stop_patience=5"]
    train(settings(folder, tmp_path / "whole", *overrides))
    original, handlers = (
        RandomCrops.__getitem__,
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    )

    def interrupting(self, sample_id):
        if sample_id == 2 * step:
            signal.raise_signal(number)
        return original(self, sample_id)

    with monkeypatch.context() as patch:
        patch.setattr(RandomCrops, "__getitem__", interrupting)
        with pytest.raises(KeyboardInterrupt, match=f"after {step + 1} steps"):
            train(settings(folder, tmp_path / "parts", *overrides))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoint(tmp_path / "parts")["global_step"] == step + 1
    assert not (tmp_path / "parts" / "ddrfnet.safetensors").exists()
    torch.rand(7)  # nothing depends on torch's own random numbers
    train(settings(folder, tmp_path / "parts", *overrides, "num_workers=1", "cache=false"), resume=True)
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_training_goes_on_from_the_last_epoch(folder, tmp_path, monkeypatch):
    overrides = ["early_stop_patience=5"]
    train(settings(folder, tmp_path / "whole", *overrides))
    original = TrainingModule.training_step

    def failing(self, batch, batch_index):
        if self.global_step == 6:
            raise RuntimeError("as if the machine had failed")
        return original(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", failing)
        with pytest.raises(RuntimeError, match="the machine had failed"):
            train(settings(folder, tmp_path / "parts", *overrides))
    assert checkpoint(tmp_path / "parts")["global_step"] == 4
    train(settings(folder, tmp_path / "parts", *overrides), resume=True)
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_early_stop_exports_the_best_weights(folder, tmp_path):
    # A static network that does not learn: no validation is better than the first.
    overrides = ["epochs=9", "early_stop_patience=2", "learning_rate=1e-30", "crops_per_pair=1"]
    path = train(settings(folder, tmp_path, *overrides, files=["static"]))
    _, record = read_metadata(path)
    assert record["steps"] == 3
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert best["global_step"] == 1
    for name, tensor in load_model(path).state_dict().items():
        assert torch.equal(tensor, best["state_dict"][f"average.{name}"]), name
    # Resumed, here or where it was moved to, it has nothing to do.
    moved = tmp_path.with_name("moved")
    shutil.copytree(tmp_path, moved)
    for output in (tmp_path, moved):
        again = train(settings(folder, output, *overrides, files=["static"]), resume=True)
        assert checkpoint(output)["global_step"] == 3
        assert torch.load(output / "best.ckpt", weights_only=True)["global_step"] == 1
        for name, tensor in load_model(again).state_dict().items():
            assert torch.equal(tensor, best["state_dict"][f"average.{name}"]), name


def test_the_best_is_known_in_a_folder_that_was_moved(tmp_path):
    best = BestCheckpoint(tmp_path / "there", "best", monitor="loss")
    state = best.state_dict() | {
        "dirpath": str(tmp_path / "here"),
        "best_model_score": torch.tensor(0.5),
        "best_model_path": str(tmp_path / "here" / "best.ckpt"),
        "best_k_models": {str(tmp_path / "here" / "best.ckpt"): torch.tensor(0.5)},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best.load_state_dict(state)
    assert best.best_model_score == 0.5
    assert best.best_model_path == str(tmp_path / "there" / "best.ckpt")
    assert list(best.best_k_models) == [best.best_model_path]


def test_a_training_is_resumed_with_its_own_pairs_alone(folder, tmp_path, monkeypatch):
    config = settings(folder, tmp_path / "run")
    train(config)
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    saved["pairs"]["training"].append("another")
    torch.save(saved, tmp_path / "run" / "last.ckpt")
    with pytest.raises(ValueError, match="was written with other pairs of images"):
        train(config, resume=True)


def test_a_training_is_resumed_where_its_data_has_moved(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "scratch")
    shutil.copytree(folder, tmp_path / "scratch" / "more")  # a folder inside of another
    here, there = tmp_path / "scratch", tmp_path / "other"
    overrides = "epochs=2", "crops_per_pair=1"

    def config(root, output):
        return settings(root, output, f"data=[{root}, {root}/more]", *overrides)

    train(config(here, tmp_path / "whole"))
    original = TrainingModule.training_step

    def failing(self, batch, batch_index):
        if self.global_step == checkpoint(tmp_path / "whole")["global_step"] // 2:
            raise RuntimeError("as if the machine had failed")
        return original(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", failing)
        with pytest.raises(RuntimeError, match="the machine had failed"):
            train(config(here, tmp_path / "parts"))
    here.rename(there)
    with pytest.raises(ValueError, match=r"other settings: data was .* got"):
        train(settings(there, tmp_path / "parts", f"data=[{there}]", *overrides), resume=True)
    train(config(there, tmp_path / "parts"), resume=True)
    whole, parts = (checkpoint(tmp_path / output) for output in ("whole", "parts"))
    for name in ("global_step", "curve", "state_dict", "optimizer_states"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=0)
    for kind in ("ir", "vis"):
        min((there / "more" / kind).iterdir()).rename(there / "more" / kind / "new.png")
    with pytest.raises(ValueError, match="was written with other pairs of images"):
        train(config(there, tmp_path / "parts"), resume=True)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_damaged_checkpoint_is_named(folder, tmp_path, content):
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read as a checkpoint"):
        train(settings(folder, tmp_path), resume=True)
    torch.save({"a": 1}, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"last\.ckpt is no checkpoint of a training: it lacks pairs, settings"
    ):
        train(settings(folder, tmp_path), resume=True)


@pytest.mark.parametrize("validation", [1, 0])
def test_a_training_that_diverges_says_so(folder, tmp_path, validation):
    overrides = ["learning_rate=1e30", "gradient_clip=0", f"validation_pairs={validation}"]
    with pytest.raises(ValueError, match=r"the loss of step \d+ is no number: try a lower learning_rate"):
        train(settings(folder, tmp_path / "run", *overrides))
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_a_second_interrupt_ends_at_once(folder, tmp_path, monkeypatch):
    def interrupting(self, sample_id):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RandomCrops, "__getitem__", interrupting)
    with pytest.raises(KeyboardInterrupt, match=r"after 0 steps$"):
        train(settings(folder, tmp_path / "run"))


def test_an_interrupted_closing_validation_is_done_again(folder, tmp_path, monkeypatch):
    original, handler = TrainingModule.validation_step, signal.getsignal(signal.SIGINT)

    def interrupting(self, batch, batch_index):
        if self.trainer.state.fn == "validate":
            signal.raise_signal(signal.SIGINT)
        return original(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "validation_step", interrupting)
        with pytest.raises(KeyboardInterrupt, match=r"after \d+ steps; resumed, it goes on .*last\.ckpt"):
            train(settings(folder, tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) == handler
    assert not (tmp_path / "run" / "ddrfnet.safetensors").exists()
    train(settings(folder, tmp_path / "run"), resume=True)
    train(settings(folder, tmp_path / "whole"))
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_what_a_loading_process_says_is_told_in_its_words(folder, tmp_path, monkeypatch):
    def failing(self, sample_id):
        raise ValueError("pair.png: it is cut off")

    monkeypatch.setattr(RandomCrops, "__getitem__", failing)
    with pytest.raises(ValueError, match=r"^pair\.png: it is cut off$"):
        train(settings(folder, tmp_path / "run", "num_workers=1"))


def test_a_time_limit_runs_the_learning_rate_down(folder, tmp_path):
    config = settings(folder, tmp_path, "epochs=10000", "max_minutes=0.03", "validation_pairs=0")
    steps = set()
    for resume in (False, True):  # a training that is over stays as it is
        _, record = read_metadata(train(config, resume))
        steps.add(record["steps"])
        assert record["validation"] == {}
        last = checkpoint(tmp_path)
        assert 1 <= record["steps"] == last["global_step"] < 10_000
        assert all(group["lr"] < 0.1 * group["peak"] for group in last["optimizer_states"][0]["param_groups"])
    assert len(steps) == 1


def test_mixed_precision_trains(folder, tmp_path):
    path = train(
        settings(
            folder, tmp_path, "precision=bf16-mixed", "epochs=1", "gradient_clip=0", "deterministic=true"
        )
    )
    assert all(tensor.dtype == torch.float32 for tensor in load_model(path).state_dict().values())


@pytest.mark.parametrize("darkness", [(), ("degradation=low_light", "dark_fraction=0.4")])
def test_two_processes_are_one_with_the_double_batch(folder, tmp_path, darkness):
    overrides = ["batch_size=4", "crops_per_pair=8", "epochs=1", *darkness]
    train(settings(folder, tmp_path / "one", *overrides))
    two = settings(folder, tmp_path / "two", *overrides)
    (tmp_path / "two.yaml").write_text(two.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "ddrf_fast", "train", "--config", str(tmp_path / "two.yaml")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1 and "Warning" not in result.stderr, result.stderr
    records = [read_metadata(tmp_path / name / "ddrfnet.safetensors")[1] for name in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["steps"] == records[1]["steps"] == 4
    ours, theirs = (checkpoint(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(theirs["curve"], ours["curve"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs["state_dict"], ours["state_dict"], rtol=1e-3, atol=1e-4)
