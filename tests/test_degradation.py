"""Blur kernels, their bank, random mixtures of them and their codes."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import multivariate_normal

from ddrf_fast.degradation import (
    Degradation,
    DegradationSampler,
    KernelBank,
    KernelPCA,
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


# --- sampler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [False, True])
def test_mixtures_are_uniform_on_the_simplex(bank, spatial):
    """Eq. 2: one kernel of each family, a + b + c = 1, everywhere and by every weight alike."""
    weights = DegradationSampler(bank, grid_size=(3, 4)).sample(8000, generator=0, spatial=spatial).weights
    weights = weights.reshape(8000, 3, 4, -1)  # sample, family, kernel, node
    assert weights.shape[-1] == (12 if spatial else 1)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(8000, weights.shape[-1]))
    # The same single kernel of a family at every node.
    assert ((weights > 0).any(-1).sum(2) == 1).all()
    frequency = (weights > 0).any(-1).float().mean(0)
    torch.testing.assert_close(frequency, torch.full((3, 4), 0.25), atol=0.02, rtol=0)
    # On the uniform simplex, P(a > t) = (1 - t)^2, and each pair has the covariance -1/36.
    share = weights.sum(2)
    for threshold in (0.1, 0.4, 0.8):
        torch.testing.assert_close(
            (share > threshold).float().mean(0),
            torch.full(share.shape[1:], (1 - threshold) ** 2),
            atol=0.02,
            rtol=0,
        )
    centred = share - 1 / 3
    covariance = (centred[:, 0] * centred[:, 1]).mean(0)
    torch.testing.assert_close(covariance, torch.full_like(covariance, -1 / 36), atol=0.003, rtol=0)


def test_fields_are_smooth(bank):
    rough = DegradationSampler(bank, grid_size=(6, 6), smoothness=0.01).sample(500, generator=0, spatial=True)
    smooth = DegradationSampler(bank, grid_size=(6, 6)).sample(500, generator=0, spatial=True)
    constant = DegradationSampler(bank, grid_size=(6, 6), smoothness=1e6).sample(
        500, generator=0, spatial=True
    )

    def step(degradation):
        return degradation.weights.unflatten(1, (3, 4)).sum(2).diff(dim=-1).square().mean().sqrt()

    assert step(constant) < 1e-5 < 0.05 < step(smooth) < 0.5 * step(rough)
    assert smooth.weights.std((-2, -1)).amax(1).mean() > 0.1  # but they do vary over the image


def test_the_same_seed_gives_the_same_degradation(bank):
    sampler = DegradationSampler(bank)
    for spatial in (False, True):
        first = sampler.sample(3, generator=7, spatial=spatial)
        generator = torch.Generator().manual_seed(7)
        second, third = (sampler.sample(3, generator=generator, spatial=spatial) for _ in range(2))
        torch.manual_seed(7)
        fourth = sampler.sample(3, spatial=spatial)
        for other in (second, fourth):
            assert torch.equal(first.weights, other.weights)
            assert torch.equal(first.noise_std, other.noise_std)
            assert first.seed == other.seed
        assert not torch.equal(first.weights, third.weights)
        assert first.seed != third.seed


def test_noise_is_drawn_from_its_range(bank):
    std = DegradationSampler(bank, noise_std=(0.02, 0.08)).sample(4000, generator=0).noise_std
    assert 0.02 <= std.min() < 0.021
    assert 0.079 < std.max() <= 0.08
    assert abs(std.mean() - 0.05) < 0.001
    fixed = DegradationSampler(bank, noise_std=(0.1, 0.1)).sample(4, generator=0).noise_std
    torch.testing.assert_close(fixed, torch.full((4,), 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": (0.2, 0.1)}, r"noise_std .*got \(0.2, 0.1\)"),
        ({"noise_std": (-0.1, 0.1)}, "noise_std"),
        ({"scale": 0}, "scale must be at least 1, got 0"),
        ({"grid_size": (0, 4)}, r"grid_size .*got \(0, 4\)"),
        ({"smoothness": 0.0}, "smoothness must be positive"),
    ],
)
def test_impossible_samplers_are_refused(bank, options, message):
    with pytest.raises(ValueError, match=message):
        DegradationSampler(bank, **options)


# --- degrading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("scale", [1, 3])
def test_apply_is_eq_3(bank, spatial, scale):
    """Against SciPy: convolve with every kernel, mix by the weights at each pixel, keep every scale-th."""
    image = torch.rand(2, 1, 19, 26, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampler = DegradationSampler(bank, noise_std=(0, 0), scale=scale, grid_size=(3, 4))
    degradation = sampler.sample(2, generator=0, spatial=spatial)
    assert degradation.grid == spatial
    weights = degradation.weights.double().numpy()
    if spatial:
        y, x = np.mgrid[0:2:19j, 0:3:26j]
        weights = np.stack(
            [[ndimage.map_coordinates(m, (y, x), order=1) for m in sample] for sample in weights]
        )
    else:
        weights = weights[:, :, None, None]
    kernels = degradation.kernels.double().numpy()
    for b in range(2):
        blurred = [ndimage.convolve(image[b, 0].numpy(), kernel, mode="mirror") for kernel in kernels]
        expected = (weights[b] * np.stack(blurred)).sum(0)[::scale, ::scale]
        np.testing.assert_allclose(degradation.apply(image)[b, 0].numpy(), expected, atol=1e-12)


def test_a_constant_image_stays_constant_but_for_the_noise(bank):
    """Separates the gather model from its adjoint, which brightens and darkens where the weights vary."""
    degradation = DegradationSampler(bank, noise_std=(0.05, 0.1)).sample(3, generator=0, spatial=True)
    image = torch.full((3, 1, 64, 64), 0.5)
    noise = degradation.apply(image) - 0.5
    torch.testing.assert_close(noise.std((1, 2, 3)), degradation.noise_std, atol=0.003, rtol=0)
    assert noise.mean((1, 2, 3)).abs().max() < 0.005
    degradation.noise_std = torch.zeros(3)
    torch.testing.assert_close(degradation.apply(image), image, atol=1e-6, rtol=0)


def test_noise_depends_on_the_sample_and_not_on_its_batch(bank):
    degradation = DegradationSampler(bank).sample(4, generator=0)
    image = torch.rand(4, 1, 20, 20)
    whole = degradation.apply(image, sample_ids=torch.tensor([5, 6, 7, 8]))
    assert torch.equal(whole, degradation.apply(image, sample_ids=torch.tensor([5, 6, 7, 8])))
    half = Degradation(
        kernels=degradation.kernels,
        weights=degradation.weights[2:],
        noise_std=degradation.noise_std[2:],
        seed=degradation.seed,
    )
    torch.testing.assert_close(half.apply(image[2:], sample_ids=torch.tensor([7, 8])), whole[2:])
    assert not torch.allclose(half.apply(image[2:], sample_ids=torch.tensor([7, 9]))[1], whole[3])


def test_apply_follows_the_image_dtype(bank):
    degradation = DegradationSampler(bank).sample(2, generator=0, spatial=True)
    image = torch.rand(2, 1, 20, 20)
    expected = degradation.apply(image)
    actual = degradation.apply(image.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0)


def test_to_moves_every_tensor(bank):
    moved = DegradationSampler(bank).sample(2, generator=0).to("meta")
    assert {moved.kernels.device.type, moved.weights.device.type, moved.noise_std.device.type} == {"meta"}


def test_real_images_lose_detail_where_the_blur_is_strong(data_dir):
    from ddrf_fast.data import read_image, to_float

    image = torch.from_numpy(to_float(read_image(data_dir / "tno/test/vis/05.png")))[None, None]
    sampler = DegradationSampler(noise_std=(0, 0))
    degraded = sampler.sample(1, generator=0, spatial=True).apply(image)
    assert degraded.shape == image.shape
    assert degraded.diff(dim=-1).square().mean() < 0.8 * image.diff(dim=-1).square().mean()
    assert abs(degraded.mean() - image.mean()) < 0.002


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


def test_codes_of_a_bank_lose_nothing_and_leave_the_rest_empty(bank):
    sampler = DegradationSampler(bank)
    pca = sampler.fit_pca()
    gram = pca.components @ pca.components.mT
    torch.testing.assert_close(gram, torch.diag(torch.tensor([1.0] * 12 + [0.0] * 3)), atol=1e-5, rtol=0)
    assert pca.energy == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(pca.decode(pca.encode(bank.kernels)), bank.kernels, atol=1e-4, rtol=0)


def test_component_signs_do_not_depend_on_the_order_of_the_kernels(bank):
    weights = DegradationSampler(bank).sample(500, generator=0).weights
    kernels = torch.einsum("bm,muv->buv", weights, bank.kernels)
    pca, shuffled = KernelPCA.fit(kernels, 8), KernelPCA.fit(kernels.flip(0), 8)
    torch.testing.assert_close(pca.components, shuffled.components, atol=1e-4, rtol=0)
    assert (pca.components.amax(1) >= 0.99 * pca.components.abs().amax(1)).all()


@pytest.mark.parametrize("spatial", [False, True])
def test_codes_are_those_of_the_mixed_kernels_and_the_noise(bank, spatial):
    sampler = DegradationSampler(bank, grid_size=(2, 3))
    pca = sampler.fit_pca()
    degradation = sampler.sample(4, generator=3, spatial=spatial)
    codes = degradation.codes(pca)
    assert codes.shape == ((4, 16, 2, 3) if spatial else (4, 16))
    grid = degradation.weights.reshape(4, 12, -1)
    for node in range(grid.shape[2]):
        mixed = torch.einsum("bm,muv->buv", grid[:, :, node], bank.kernels)
        expected = torch.cat((pca.encode(mixed), degradation.noise_std[:, None]), dim=1)
        torch.testing.assert_close(codes.reshape(4, 16, -1)[:, :, node], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        pca.encode_weights(degradation.weights, bank), pca.encode_weights(degradation.weights, bank.kernels)
    )


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
