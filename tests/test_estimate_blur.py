"""Estimating a blur from the spectrum of an image."""

from pathlib import Path

import cv2
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddrf_fast
from ddrf_fast.cli import main
from ddrf_fast.data import read_image, write_image
from ddrf_fast.degradation import DynamicDegradation, KernelBank, enlarge, estimate_blur, refine
from ddrf_fast.degradation.estimate import is_enlarged
from ddrf_fast.inference import Restorer
from ddrf_fast.metrics import psnr
from ddrf_fast.reproduce.pairs import clean_pairs, to_bytes


def scene(seed: int, height: int = 256, width: int = 320) -> Tensor:
    """A random image with the spectrum of natural ones and a little grain, Tensor[1, 1, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    spectrum = torch.fft.rfft2(torch.randn(height, width, generator=generator))
    image = torch.fft.irfft2(spectrum / torch.hypot(x, y).clamp(min=1 / width) ** 1.1, s=(height, width))
    image = 0.5 + 0.15 * (image - image.mean()) / image.std()
    grain = torch.randn(height, width, generator=generator) / 255
    return (image + grain).clamp(0, 1)[None, None]


def kernels(degradation) -> Tensor:
    """The blur at some places of the first image: Tensor[places, k, k]."""
    weights = degradation.weights[:1]
    grid = weights if weights.dim() == 4 else weights[:, :, None, None]
    field = F.interpolate(grid, (7, 9), mode="bilinear", align_corners=True)[0].flatten(1)
    return torch.einsum("mp,muv->puv", field, degradation.kernels[0])


def error(found, true) -> float:
    """How far kernels are off, in parts of the true ones."""
    difference, expected = kernels(found) - kernels(true), kernels(true)
    return float((difference.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).mean())


@pytest.fixture(scope="module")
def clean(data_dir: Path) -> Tensor:
    """A real visible image of strong grain, Tensor[1, 1, H, W] in [0, 1]."""
    return clean_pairs(data_dir, "tno")[19].visible.float() / 255


@pytest.mark.parametrize("noise_std", [0.0, 1 / 255])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kernels_and_noise_are_found(seed: int, noise_std: float):
    degradation = DynamicDegradation("paper", noise_std=(noise_std, noise_std))
    degraded = degradation(scene(seed), seed=seed)
    found = estimate_blur(to_bytes(degraded.image).float() / 255, grid_size=(1, 1))
    assert found.weights.shape == (1, 12)
    assert error(found, degraded.recipe) < (0.35 if noise_std else 0.25)
    assert float(found.noise_std) == pytest.approx(noise_std, abs=0.2 / 255)


@pytest.mark.parametrize("seed", [3, 4])
def test_a_blur_that_varies_is_followed_over_the_image(seed: int):
    degraded = DynamicDegradation("paper", spatial=True, noise_std=(0.0, 0.0))(
        scene(seed, 400, 500), seed=seed
    )
    image = to_bytes(degraded.image).float() / 255
    followed, everywhere = estimate_blur(image), estimate_blur(image, grid_size=(1, 1))
    assert followed.weights.shape == (1, 12, 6, 6)
    assert error(followed, degraded.recipe) < 0.8 * error(everywhere, degraded.recipe)


def test_the_kernel_of_another_bank_is_found():
    bank = KernelBank.kair()
    weights = torch.eye(12)[[1, 5, 10]]
    images = scene(5).expand(3, -1, -1, -1)
    blurred = ddrf_fast.degrade(images, bank.kernels, weights)
    found = estimate_blur(blurred, bank, grid_size=(1, 1))
    torch.testing.assert_close(found.weights, weights, rtol=0, atol=0.05)


def test_weights_are_shares():
    found = estimate_blur(torch.rand(2, 1, 70, 90, generator=torch.Generator().manual_seed(0)))
    assert bool((found.weights >= 0).all())
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2, 6, 6))


def test_each_image_is_by_itself_whoever_calls():
    degraded = DynamicDegradation("paper", spatial=True)(torch.cat([scene(6), scene(7)]), seed=0).image
    together = estimate_blur(degraded.double().requires_grad_())
    with torch.inference_mode():
        alone = estimate_blur(degraded[1:])
    torch.testing.assert_close(together.weights[1:], alone.weights)
    torch.testing.assert_close(together.noise_std[1:], alone.noise_std)
    assert not together.weights.requires_grad
    assert together.weights.dtype == torch.float32


def test_known_noise_is_not_estimated():
    degraded = DynamicDegradation("paper", noise_std=(0.01, 0.01))(scene(8), seed=0)
    found = estimate_blur(degraded.image, noise_std=0.01)
    torch.testing.assert_close(found.noise_std, torch.tensor([0.01]))


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_nothing_to_be_seen_gives_numbers(value: float):
    found = estimate_blur(torch.full((1, 1, 64, 100), value))
    assert bool(found.weights.isfinite().all())
    assert float(found.noise_std) == 0


def test_what_is_clipped_is_not_looked_at():
    degraded = DynamicDegradation("paper", noise_std=(0.0, 0.0))(scene(9), seed=0)
    half = degraded.image.clone()
    half[..., :128] = (half[..., :128] > 0.5).float()
    assert error(estimate_blur(half, grid_size=(1, 1)), degraded.recipe) < 0.3


@pytest.mark.parametrize("interpolation", [cv2.INTER_CUBIC, cv2.INTER_LANCZOS4])
def test_enlarged_images_are_told_from_blurred_ones(interpolation: int):
    noisy = scene(10) + 0.01 * torch.randn(1, 1, 256, 320, generator=torch.Generator().manual_seed(1))
    large = cv2.resize(noisy[0, 0].numpy(), None, fx=2, fy=2, interpolation=interpolation)
    blurred = DynamicDegradation("paper", spatial=True)(scene(10).expand(5, -1, -1, -1), seed=0).image
    assert is_enlarged(torch.from_numpy(large)[None, None]).tolist() == [True]
    assert is_enlarged(torch.cat([noisy, blurred])).tolist() == [False] * 6


def test_what_is_found_explains_a_real_image(clean: Tensor):
    degraded = DynamicDegradation("paper", spatial=True, noise_std=(0.0, 0.0))(clean, seed=0)
    image = to_bytes(degraded.image).float() / 255
    found = estimate_blur(image)
    assert psnr(refine(image, image, found), clean) > psnr(image, clean) + 2


def test_restore_finds_the_blur_where_there_is_one(clean: Tensor):
    """A blurred, a sharp, an enlarged and a dark image, one after the other and as a batch."""
    blurred = DynamicDegradation("paper", spatial=True, noise_std=(0.0, 0.0))(clean, seed=0).image
    noisy = DynamicDegradation("paper", sharp_fraction=1.0, noise_std=(0.02, 0.02))(clean, seed=0).image
    enlarged = enlarge(noisy[..., ::2, ::2], clean.shape[2:], 2)
    images = to_bytes(torch.cat([blurred, clean, enlarged, clean**3]))
    plain, refining = Restorer(dtype="float32"), Restorer(dtype="float32", refine=True)
    refined = torch.stack([refining(image) for image in images])
    usual = torch.stack([plain(image) for image in images])
    assert psnr(refined[:1], to_bytes(clean)) > psnr(usual[:1], to_bytes(clean)) + 1
    assert torch.equal(refined[1:], usual[1:])
    assert (refining(images).int() - refined.int()).abs().max() <= 1
    small = images[0, :, :40]
    assert torch.equal(refining(small), plain(small))


def test_the_command_finds_the_blur(clean: Tensor, tmp_path: Path):
    blurred = DynamicDegradation("paper", spatial=True, noise_std=(0.0, 0.0))(clean, seed=0).image
    write_image(tmp_path / "in.png", to_bytes(blurred)[0, 0].numpy())
    arguments = ["restore", "--visible", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]
    assert main([*arguments, "--refine"]) == 0
    result = torch.from_numpy(read_image(tmp_path / "out.png"))[None, None]
    assert psnr(result, to_bytes(clean)) > psnr(to_bytes(blurred), to_bytes(clean)) + 2


def test_what_does_not_fit_is_refused():
    image = torch.rand(1, 1, 64, 64)
    for wrong in (image[0], image[..., :63], image[:0]):
        with pytest.raises(ValueError, match=r"image must be \[B, C, H, W\], H and W at least 64"):
            estimate_blur(wrong)
    with pytest.raises(ValueError, match="at most 64x64, got 65"):
        estimate_blur(image, KernelBank(torch.full((1, 65, 65), 1 / 65**2), ("flat",)))
    with pytest.raises(ValueError, match=r"grid_size must be two positive numbers, got \(0, 3\)"):
        estimate_blur(image, grid_size=(0, 3))
    with pytest.raises(ValueError, match="noise_std must not be negative, got -1"):
        estimate_blur(image, noise_std=-1)
