"""Refining a restoration whose degradation is known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ddrf_fast
from ddrf_fast.degradation import (
    DynamicDegradation,
    enlarge,
    estimate_blur,
    isotropic_gaussian_kernel,
    refine,
)
from ddrf_fast.degradation.estimate import is_enlarged
from ddrf_fast.degradation.refine import ROUNDING_STD
from ddrf_fast.inference import Restorer
from ddrf_fast.metrics import psnr
from ddrf_fast.models import load_model
from ddrf_fast.reproduce.pairs import clean_pairs


@pytest.fixture(scope="module")
def clean(data_dir: Path) -> Tensor:
    """A real visible image, Tensor[1, 1, H, W] in [0, 1]."""
    return clean_pairs(data_dir, "tno", 1)[0].visible.float() / 255


def matrix(recipe, height: int, width: int) -> Tensor:
    """A of one image: its columns are the degraded unit images."""
    units = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    count = len(units)
    kernels, weights = (
        t.double().expand(count, *[-1] * (t.dim() - 1)) for t in (recipe.kernels, recipe.weights)
    )
    return (
        ddrf_fast.degrade(
            units, kernels, weights, scale=recipe.scale, padding=recipe.padding, grid=weights.dim() == 4
        )
        .flatten(1)
        .mT
    )


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("spatial", [False, True])
def test_it_solves_the_normal_equations(scale: int, spatial: bool):
    height, width, error_std = 26, 31, 0.05
    degradation = DynamicDegradation("paper", spatial=spatial, scale=scale, noise_std=(0.01, 0.03))
    images = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    degraded = degradation(images, seed=3)
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine = refine(start, degraded.image, degraded.recipe, error_std=error_std, steps=200)
    for i in range(2):
        recipe = degraded.recipe[i : i + 1]
        a, x, y = matrix(recipe, height, width), start[i].flatten(), degraded.image[i].flatten()
        share = (recipe.noise_std.double().square() + ROUNDING_STD**2) / error_std**2
        exact = x + torch.linalg.solve(a.mT @ a + share * torch.eye(len(x)), a.mT @ (y - a @ x))
        torch.testing.assert_close(mine[i].flatten(), exact, rtol=0, atol=1e-7)


def test_each_image_is_by_itself_and_keeps_its_dtype():
    degraded = DynamicDegradation("paper", spatial=True)(torch.rand(3, 1, 30, 41), seed=5)
    start = torch.rand(3, 1, 30, 41)
    together = refine(start, degraded.image, degraded.recipe)
    for i in range(3):
        alone = refine(start[i : i + 1], degraded.image[i : i + 1], degraded.recipe[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    half = refine(start.bfloat16(), degraded.image.bfloat16(), degraded.recipe)
    assert half.dtype == torch.bfloat16


def test_what_explains_the_image_already_stays():
    image = torch.zeros(1, 1, 30, 30)
    recipe = DynamicDegradation("paper", noise_std=(0.0, 0.0)).sample(1, seed=0)
    assert torch.equal(refine(image, recipe.apply(image), recipe, steps=20), image)


def test_noise_leaves_the_restoration_alone():
    start, noisy = torch.rand(1, 1, 40, 40), torch.rand(1, 1, 40, 40)
    recipe = DynamicDegradation("paper", noise_std=(1.0, 1.0)).sample(1, seed=0)
    assert (refine(start, noisy, recipe) - start).abs().max() < 1e-3


@pytest.mark.parametrize(("scale", "gain"), [(1, 1.0), (2, 0.2)])
def test_a_real_image_gains(clean: Tensor, scale: int, gain: float):
    degradation = DynamicDegradation("paper", spatial=True, scale=scale, noise_std=(0.0, 0.0))
    degraded = degradation(clean, seed=0)
    start = enlarge(degraded.image, clean.shape[2:], scale)
    model = load_model()
    code = degraded.recipe.codes(model.kernel_code)
    with torch.inference_mode():
        told = model.restore("visible", start, code)
    refined = refine(told, degraded.image, degraded.recipe)
    assert psnr(refined, clean) > psnr(told, clean) + gain


def test_integers_stand_for_0_to_1():
    image = torch.randint(256, (1, 1, 70, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe = DynamicDegradation("paper", noise_std=(0.0, 0.0))(image, seed=0).recipe
    refined = refine(image, image, recipe)
    torch.testing.assert_close(refined, refine(image.float() / 255, image.float() / 255, recipe))
    found, expected = estimate_blur(image), estimate_blur(image.float() / 255)
    torch.testing.assert_close(found.weights, expected.weights)
    assert is_enlarged(image).tolist() == is_enlarged(image.float() / 255).tolist()


def test_an_image_need_only_be_as_large_as_its_own_kernel():
    image = torch.rand(1, 12, 40, generator=torch.Generator().manual_seed(0))
    refined = ddrf_fast.restore(image, kernel=torch.full((3, 3), 1.0), refine=True)
    assert refined.shape == image.shape and bool(refined.isfinite().all())


def test_restore_refines_where_it_is_asked_to(clean: Tensor):
    kernel = isotropic_gaussian_kernel(1.5, kernel_size=15)
    blurred = ddrf_fast.degrade(clean, kernel[None], torch.ones(1, 1))
    image = (blurred[0].clamp(0, 1) * 255).round().byte()
    told = ddrf_fast.restore(image, kernel=kernel)
    refined = ddrf_fast.restore(image, kernel=kernel, refine=True)
    assert refined.dtype == torch.uint8
    assert psnr(refined[None] / 255, clean) > psnr(told[None] / 255, clean) + 0.5


@pytest.mark.parametrize("settings", [{}, {"kernel": [[1.0]]}])
def test_restore_refines_no_known_darkness(settings):
    with pytest.raises(ValueError, match="refine undoes a blur, and cannot be with a known darkness"):
        ddrf_fast.restore(torch.rand(1, 70, 70), refine=True, tone=(2, 1, 1), **settings)


def test_a_noise_level_that_cannot_be_is_refused_before_any_image():
    with pytest.raises(ValueError, match=r"noise_std must be a number from 0 to 1, .* got -1"):
        Restorer(noise_std=-1, refine=True)


def test_what_does_not_fit_is_refused():
    recipe = DynamicDegradation("paper", scale=2).sample(2, seed=0)
    image, small = torch.rand(2, 1, 21, 30), torch.rand(2, 1, 11, 15)
    with pytest.raises(ValueError, match=r"degraded must be \[2, 1, 11, 15\]"):
        refine(image, image, recipe)
    with pytest.raises(ValueError, match="degradation must be that of 2 images, got one of 1"):
        refine(image, small, recipe[:1])
    with pytest.raises(ValueError, match="error_std must be positive"):
        refine(image, small, recipe, error_std=0)
    with pytest.raises(ValueError, match="steps at least 1"):
        refine(image, small, recipe, steps=0)
    dark = DynamicDegradation("low_light", dark_fraction=1.0).sample(2, seed=0)
    with pytest.raises(ValueError, match="darkens"):
        refine(image, image, dark)
