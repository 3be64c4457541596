"""Blur kernels, their banks and distributions, and their codes."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from scipy.stats import multivariate_normal

from ddrf_fast.degradation import (
    BSRGANKernels,
    KernelBank,
    KernelPCA,
    RealESRGANKernels,
    SRMDKernels,
    anisotropic_gaussian_kernel,
    isotropic_gaussian_kernel,
    motion_kernel,
)


@pytest.fixture(scope="module")
def bank():
    return KernelBank.default(9)


# --- kernels -----------------------------------------------------------------------------------------------


def test_kernels_are_normalised_centred_and_free_of_denormals():
    generator = torch.Generator().manual_seed(0)
    length, angle, bend, sigma = torch.rand(4, 60, generator=generator)
    kernels = torch.cat(
        (
            motion_kernel(20 * length, 2 * math.pi * angle, 6 * bend - 3),
            isotropic_gaussian_kernel(0.2 + 2 * sigma),
            anisotropic_gaussian_kernel(0.3 + 2 * length, 0.2 + 2 * sigma, 2 * math.pi * angle),
        )
    )
    assert kernels.dtype == torch.float32
    assert (kernels >= 0).all()
    assert (kernels[kernels > 0] > 1e-10).all()  # those that a convolution would be slow with are far below
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(180), atol=1e-6, rtol=0)
    position = torch.arange(-12.0, 13.0)
    centroid = torch.stack(((kernels.sum(1) * position).sum(1), (kernels.sum(2) * position).sum(1)))
    torch.testing.assert_close(centroid, torch.zeros_like(centroid), atol=2e-3, rtol=0)


def test_straight_motion_is_a_box_seen_through_the_pixel():
    # A step of length 5 drawn with tents: its integral over the pixels is known.
    row = motion_kernel(5.0, 0.0, kernel_size=9, dtype=torch.float64)[4]
    torch.testing.assert_close(
        row,
        torch.tensor([0, 0.025, 0.175, 0.2, 0.2, 0.2, 0.175, 0.025, 0], dtype=row.dtype),
        atol=1e-3,
        rtol=0,
    )


def test_angles_turn_from_x_to_y_downwards():
    diagonal = motion_kernel(8.0, math.pi / 4, kernel_size=9)
    assert diagonal.diagonal().sum() > 0.5 > diagonal.flip(1).diagonal().sum() * 4
    torch.testing.assert_close(
        motion_kernel(7.0, math.pi / 2, 1.0), motion_kernel(7.0, 0.0, -1.0).mT, atol=1e-6, rtol=0
    )
    wide = anisotropic_gaussian_kernel(3.0, 1.0, math.pi / 4, kernel_size=9)
    assert wide.diagonal().sum() > 2 * wide.flip(1).diagonal().sum()


def test_bent_motion_lies_on_its_circle():
    radius = 5.0
    kernel = motion_kernel(math.pi * radius, 0.0, math.pi, dtype=torch.float64)  # a half circle
    position = torch.arange(-12.0, 13.0, dtype=torch.float64)
    y, x = torch.meshgrid(position, position, indexing="ij")
    # The centroid of a half circle is 2r/π from its centre. The path turns downwards: the centre lies below.
    distance = torch.hypot(x, y - 2 * radius / math.pi)
    assert kernel[(distance - radius).abs() > math.sqrt(2)].sum() < 1e-9
    assert kernel[y < 0].sum() > 0.3  # the top of the arch
    assert kernel[y > 2 * radius / math.pi + 1].sum() < 1e-9


def test_gaussians_are_those_of_scipy():
    sigma_major, sigma_minor, angle = 2.5, 0.9, 0.7
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    covariance = turn @ np.diag([sigma_major**2, sigma_minor**2]) @ turn.T
    y, x = np.mgrid[-7:8, -7:8]
    expected = multivariate_normal([0, 0], covariance).pdf(np.stack((x, y), -1))
    actual = anisotropic_gaussian_kernel(sigma_major, sigma_minor, angle, kernel_size=15, dtype=torch.float64)
    np.testing.assert_allclose(actual.numpy(), expected / expected.sum(), atol=1e-12)


def test_parameters_broadcast():
    sigma, angle = torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.5, 1.0])
    kernels = anisotropic_gaussian_kernel(sigma, 0.8, angle, kernel_size=7)
    assert kernels.shape == (2, 3, 7, 7)
    torch.testing.assert_close(kernels[1, 2], anisotropic_gaussian_kernel(2.0, 0.8, 1.0, kernel_size=7))
    assert motion_kernel(torch.zeros(0), 0.0, kernel_size=5).shape == (0, 5, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: isotropic_gaussian_kernel(1.0, kernel_size=8),
            "kernel_size must be odd and positive, got 8",
        ),
        (lambda: isotropic_gaussian_kernel(0.0), "must be positive, got 0"),
        (
            lambda: anisotropic_gaussian_kernel(1.0, float("nan"), 0.0),
            "sigma_minor must be positive, got nan",
        ),
        (lambda: motion_kernel(-1.0, 0.0), "length must not be negative, got -1"),
        (lambda: motion_kernel(12.0, 0.0, kernel_size=9), "at least 13"),
    ],
)
def test_impossible_kernels_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- bank --------------------------------------------------------------------------------------------------


def test_default_bank_has_four_different_kernels_of_each_family():
    bank = KernelBank.default()
    assert bank.kernels.shape == (12, 25, 25)
    assert bank.families == ("motion", "isotropic", "anisotropic")
    assert (torch.cdist(bank.kernels.flatten(1), bank.kernels.flatten(1)) + torch.eye(12)).min() > 0.02
    torch.testing.assert_close(bank.kernels[4:8], bank.kernels[4:8].mT)  # isotropic
    wider = KernelBank.default(41, strength=25 / 41)
    torch.testing.assert_close(wider.kernels[:, 8:-8, 8:-8], bank.kernels, atol=3e-4, rtol=0)


def test_bank_survives_a_file(tmp_path, bank):
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    loaded = KernelBank.load(path)
    assert loaded.families == bank.families
    assert torch.equal(loaded.kernels, bank.kernels)


def test_files_that_hold_no_bank_are_named(tmp_path, bank):
    path = tmp_path / "bank.safetensors"
    with pytest.raises(ValueError, match=r"bank\.safetensors: no such file"):
        KernelBank.load(path)
    path.write_bytes(b"not a bank at all")
    with pytest.raises(ValueError, match=r"bank\.safetensors: not a readable safetensors file"):
        KernelBank.load(path)
    KernelPCA.fit(bank.kernels, 2).save(path)
    with pytest.raises(ValueError, match=r"bank\.safetensors: expected .*'kernels'.*'components'"):
        KernelBank.load(path)
    bank.save(path)
    with pytest.raises(ValueError, match=r"bank\.safetensors: expected .*'components'.*'kernels'"):
        KernelPCA.load(path)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (torch.full((3, 4, 4), 1 / 16), r"\[M, k, k\] with k odd, got \[3, 4, 4\]"),
        (torch.full((4, 3, 3), 1 / 9), "as many kernels, got 4 in all"),
        (torch.ones(3, 3, 3), "sum to 1"),
        (torch.full((3, 3, 3), float("nan")), "sum to 1"),
    ],
)
def test_impossible_banks_are_refused(kernels, message):
    with pytest.raises(ValueError, match=message):
        KernelBank(kernels)


# --- distributions -----------------------------------------------------------------------------------------

DISTRIBUTIONS = (SRMDKernels(), BSRGANKernels(), BSRGANKernels(4), RealESRGANKernels(), KernelBank.kair())


def moments(kernels):
    """The second moments of kernels [..., k, k] about their centre: x x, y y, x y."""
    place = torch.arange(kernels.shape[-1], dtype=kernels.dtype) - kernels.shape[-1] // 2
    return [torch.einsum("...uv,u,v->...", kernels, place**i, place**j) for i, j in ((0, 2), (2, 0), (1, 1))]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_distributions_draw_kernels(distribution):
    """At the ends of the unit interval, too."""
    chance = torch.rand(300, 2, distribution.num_draws, generator=torch.Generator().manual_seed(0))
    chance[0], chance[1] = 0, 1
    kernels = distribution(chance)
    size = distribution.kernel_size
    assert kernels.shape == (300, 2, size, size)
    assert kernels.dtype == torch.float32
    assert kernels.isfinite().all()
    torch.testing.assert_close(kernels.sum((-2, -1)), torch.ones(300, 2), atol=1e-5, rtol=0)
    assert (kernels[kernels != 0].abs() > 1e-10).all()  # no denormals


def test_srmd_draws_variances():
    chance = torch.rand(500, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    xx, yy, _ = moments(SRMDKernels()(chance).double())
    major = 0.1 + 9.9 * chance[..., 0]
    minor = 0.1 + (major - 0.1) * chance[..., 1]
    total, small = (
        major + minor,
        (major < 4) & (minor > 0.4),
    )  # a wide Gaussian is cut off by 15 taps, a narrow one falls between
    torch.testing.assert_close((xx + yy)[small], total[small], rtol=0.05, atol=0.02)


def test_real_esrgan_draws_its_kinds():
    """Each kind by its formula, at the middle of the draw that stands for it."""
    distribution, place = RealESRGANKernels(), torch.arange(-10.0, 11.0, dtype=torch.float64)
    radius = torch.hypot(place, place[:, None])
    sigma = 0.2 + 2.8 * 0.5
    q = (radius / sigma) ** 2
    cases = {
        0.1 + 0.9 * 0.2: torch.exp(-q / 2),  # isotropic
        0.1 + 0.9 * 0.75: torch.exp(-(q**0.75) / 2),  # generalised
        0.1 + 0.9 * 0.9: 1 / (1 + q),  # plateau
    }
    for kind, expected in cases.items():
        draw = torch.tensor([[[kind, 0.99, 0.5, 0.0, 0.3, 0.2, 0.5]]])
        actual = distribution(draw)[0, 0].double()
        torch.testing.assert_close(actual, expected / expected.sum(), atol=1e-6, rtol=0)
    radius = radius.numpy()
    sinc = distribution(torch.tensor([[[0.05, 0.99, 0.5, 0.0, 0.0, 0.0, 0.0]]]))[0, 0].double()
    cutoff = math.pi / 5 + (math.pi - math.pi / 5) / 2
    expected = np.full_like(radius, cutoff**2 / (4 * np.pi))  # in the centre
    away = radius > 0
    expected[away] = cutoff * scipy.special.j1(cutoff * radius[away]) / (2 * np.pi * radius[away])
    np.testing.assert_allclose(sinc.numpy(), expected / expected.sum(), atol=1e-6)
    small = distribution(torch.tensor([[[0.5, 0.0, 0.9, 0.9, 0.3, 0.2, 0.5]]]))[0, 0]  # 7x7
    assert not small[:7].any() and not small[:, :7].any() and small[7].any()


def test_bsrgan_blurs_more_for_more_scale():
    chance = torch.rand(400, 1, 5, generator=torch.Generator().manual_seed(0))
    chance[..., 1] = 0.999  # the largest size
    for scale in (1, 4):
        xx, yy, xy = moments(BSRGANKernels(scale)(chance).double())
        isotropic = chance[..., 0] < 0.5
        assert xy[isotropic].abs().max() < 1e-4 < xy[~isotropic].abs().max()
        expected = ((2 + 0.2 * scale) * chance[..., 2]) ** 2
        fair = isotropic & (expected > 1)
        torch.testing.assert_close(xx[fair], expected[fair].double(), rtol=0.05, atol=0)
        assert xx[~isotropic].max() <= 4 + scale
        assert yy[~isotropic].max() > 0.8 * (4 + scale) * 0.9


def test_kair_has_the_measured_strengths():
    bank = KernelBank.kair()
    assert bank.kernels.shape == (12, 25, 25)
    xx, yy, xy = (m[4:] for m in moments(bank.kernels.double()))
    spread = torch.stack((xx + yy, (xx - yy).square() + 4 * xy.square()))
    sigma = ((spread[0] + spread[1].sqrt()) / 2).sqrt()
    torch.testing.assert_close(
        sigma,
        torch.tensor([0.7, 1.2, 1.6, 2.0, 2.65, 3.0, 2.83, 2.65], dtype=sigma.dtype),
        atol=0.02,
        rtol=0,
    )
    chosen = bank(torch.linspace(0.001, 0.999, 120)[:, None, None])
    assert torch.equal(chosen[::10, 0], bank.kernels)


def test_a_bank_moves_and_is_saved_like_any_module(bank):
    assert list(bank.state_dict()) == ["kernels"]
    other = KernelBank.default(9, strength=0.9)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.kernels, bank.kernels)
    assert KernelBank.default(9).to("meta").kernels.device.type == "meta"


# --- codes -------------------------------------------------------------------------------------------------


def test_fifteen_numbers_keep_what_srmd_says():
    """SRMD's own recipe of 15x15 kernels: its 15 components keep 99.8 % of the energy, uncentred."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(3, 2000, generator=generator, dtype=torch.float64)
    major = 0.1 + 9.9 * draws[0]
    minor = 0.1 + (major - 0.1) * draws[1]
    kernels = anisotropic_gaussian_kernel(major.sqrt(), minor.sqrt(), math.pi * draws[2], kernel_size=15)
    pca = KernelPCA.fit(kernels)
    assert abs(pca.energy - 0.998) < 0.0005
    codes = pca.encode(kernels)
    assert codes[:, :14].square().sum() < 0.998 * kernels.square().sum()
    decoded = pca.decode(codes)
    kept = 1 - (decoded - kernels).square().sum() / kernels.square().sum()
    assert abs(kept - pca.energy) < 1e-5


def mixtures(bank, count):
    weights = torch.rand(count, 12, generator=torch.Generator().manual_seed(0))
    weights /= weights.sum(1, keepdim=True)
    return torch.einsum("bm,muv->buv", weights, bank.kernels)


def test_codes_of_a_bank_lose_nothing_and_leave_the_rest_empty(bank):
    pca = KernelPCA.fit(mixtures(bank, 4096))
    gram = pca.components @ pca.components.mT
    torch.testing.assert_close(gram, torch.diag(torch.tensor([1.0] * 12 + [0.0] * 3)), atol=1e-5, rtol=0)
    assert pca.energy == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(pca.decode(pca.encode(bank.kernels)), bank.kernels, atol=1e-4, rtol=0)


def test_component_signs_do_not_depend_on_the_order_of_the_kernels(bank):
    kernels = mixtures(bank, 500)
    pca, shuffled = KernelPCA.fit(kernels, 8), KernelPCA.fit(kernels.flip(0), 8)
    torch.testing.assert_close(pca.components, shuffled.components, atol=1e-4, rtol=0)
    assert (pca.components.amax(1) >= 0.99 * pca.components.abs().amax(1)).all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_codes_of_mixtures_are_mixtures_of_codes(bank, per_sample):
    pca = KernelPCA.fit(bank.kernels)
    weights = torch.rand(4, 12, 2, 3, generator=torch.Generator().manual_seed(0))
    kernels = bank.kernels
    if per_sample:
        kernels = torch.stack([kernels.roll(b, 0) for b in range(4)])
    codes = pca.encode_weights(weights, kernels)
    assert codes.shape == (4, 15, 2, 3)
    mixed = torch.einsum("bmyx,bmuv->byxuv", weights, kernels.expand(4, -1, -1, -1))
    torch.testing.assert_close(codes, pca.encode(mixed).movedim(-1, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pca.encode_weights(weights[..., 0, 0], kernels), codes[..., 0, 0])


def test_codes_survive_a_file(tmp_path, bank):
    pca = KernelPCA.fit(bank.kernels, 5)
    pca.save(tmp_path / "codes.safetensors")
    loaded = KernelPCA.load(tmp_path / "codes.safetensors")
    assert torch.equal(loaded.components, pca.components)
    assert loaded.energy == pca.energy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pca: KernelPCA.fit(torch.ones(5, 3)), r"\[N, k, k\].*got \[5, 3\]"),
        (lambda pca: KernelPCA.fit(torch.ones(5, 3, 3), 10), r"num_components must be in \[1, 9\], got 10"),
        (lambda pca: KernelPCA.fit(torch.full((5, 5, 5), float("inf"))), "not finite"),
        (lambda pca: pca.encode(torch.ones(2, 7, 7)), r"9x9, got \[2, 7, 7\]"),
        (lambda pca: pca.decode(torch.ones(2, 7)), r"\[..., 3\], got \[2, 7\]"),
        (lambda pca: pca.encode_weights(torch.ones(2, 7), torch.ones(12, 9, 9)), r"\[B, 12\].*got \[2, 7\]"),
    ],
)
def test_impossible_codes_are_refused(bank, call, message):
    with pytest.raises(ValueError, match=message):
        call(KernelPCA.fit(bank.kernels, 3))
