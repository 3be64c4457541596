"""DynamicDegradation: what it draws, that a recipe repeats it, and that nothing else matters."""

import copy
import io
import math
import multiprocessing

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

import ddrf_fast
from ddrf_fast.degradation import (
    PRESETS,
    Degradation,
    DegradationConfig,
    DynamicDegradation,
    KernelBank,
    brighten,
    low_light,
    preset,
    reduce_contrast,
    undo_darkness,
)


@pytest.fixture(scope="module")
def bank():
    return KernelBank.default(9)


def module(bank, **changes) -> DynamicDegradation:
    return DynamicDegradation(DegradationConfig(bank, num_mixed=3), **changes)


def images(batch=4, size=(20, 24), channels=3) -> torch.Tensor:
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1))


# ---- What is drawn


@pytest.mark.parametrize("spatial", [False, True])
def test_mixtures_are_uniform_on_the_simplex(bank, spatial):
    """Eq. 2: one kernel of each family, a + b + c = 1, everywhere and by every weight alike."""
    recipe = module(bank, grid_size=(3, 4)).sample(8000, seed=0, spatial=spatial)
    weights = recipe.weights.reshape(8000, 3, -1)  # sample, family, node
    assert weights.shape[-1] == (12 if spatial else 1)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(8000, weights.shape[-1]))
    # The kernels of a sample are one of each family, all equally likely and independent.
    same = (recipe.kernels[:, :, None] == bank.kernels).all(-1).all(-1)  # sample, drawn, kernel of the bank
    assert (same.sum(2) == 1).all()
    chosen = same.int().argmax(2)
    assert torch.equal(chosen // 4, torch.arange(3).expand(8000, 3))
    frequency = same.float().mean(0).unflatten(1, (3, 4))
    torch.testing.assert_close(frequency, torch.eye(3)[:, :, None].expand(3, 3, 4) * 0.25, atol=0.02, rtol=0)
    both = ((chosen[:, 0] == 1) & (chosen[:, 1] == 5)).float().mean()
    assert abs(both - 1 / 16) < 0.01
    # On the uniform simplex, P(a > t) = (1 - t)^2, and each pair has the covariance -1/36.
    for threshold in (0.1, 0.4, 0.8):
        torch.testing.assert_close(
            (weights > threshold).float().mean(0),
            torch.full(weights.shape[1:], (1 - threshold) ** 2),
            atol=0.02,
            rtol=0,
        )
    centred = weights - 1 / 3
    covariance = (centred[:, 0] * centred[:, 1]).mean(0)
    torch.testing.assert_close(covariance, torch.full_like(covariance, -1 / 36), atol=0.003, rtol=0)


def test_fields_are_smooth(bank):
    def drawn(**changes):
        return module(bank, grid_size=(6, 6), **changes).sample(500, seed=0, spatial=True)

    rough, smooth, constant = drawn(smoothness=0.01), drawn(), drawn(smoothness=1e6)

    def step(recipe):
        return recipe.weights.diff(dim=-1).square().mean().sqrt()

    assert step(constant) < 1e-5 < 0.05 < step(smooth) < 0.5 * step(rough)
    assert smooth.weights.std((-2, -1)).amax(1).mean() > 0.1  # but they do vary over the image


def test_noise_is_drawn_from_its_range(bank):
    std = module(bank, noise_std=(0.02, 0.08)).sample(4000, seed=0).noise_std
    assert 0.02 <= std.min() < 0.021
    assert 0.079 < std.max() <= 0.08
    assert abs(std.mean() - 0.05) < 0.001
    fixed = module(bank, noise_std=(0.1, 0.1)).sample(4, seed=0).noise_std
    torch.testing.assert_close(fixed, torch.full((4,), 0.1))


def test_fractions_are_those_of_the_samples(bank):
    degradation = module(
        bank,
        sharp_fraction=0.3,
        white_fraction=0.5,
        shot_fraction=0.2,
        shot_std=(0.1, 0.2),
        noise_std=(0.01, 0.02),
        gray_fraction=0.4,
        dark_fraction=0.6,
    )
    recipe = degradation.sample(4000, seed=2)
    sharp = recipe.kernels[:, 0, 4, 4] == 1
    assert not recipe.kernels[sharp].flatten(2).sort().values[..., :-1].any()
    parts = {
        "sharp": (sharp, 0.3),
        "white": (recipe.noise_std > 0, 0.5),
        "shot": (recipe.shot_noise > 0, 0.2),
        "gray": (recipe.gray_noise, 0.4),
        "dark": ((recipe.tone != 1).any(1), 0.6),
    }
    for name, (chosen, fraction) in parts.items():
        assert abs(chosen.float().mean() - fraction) < 0.03, name
    assert not ((recipe.noise_std > 0) & (recipe.shot_noise > 0)).any()
    shot_std = recipe.shot_noise[recipe.shot_noise > 0].sqrt()
    assert 0.1 <= shot_std.min() < 0.11 and 0.19 < shot_std.max() <= 0.2001
    dark = recipe.tone[(recipe.tone != 1).any(1)]
    for values, (low, high) in zip(dark.unbind(1), ((1.5, 5), (0.5, 1), (0.5, 1)), strict=True):
        assert low <= values.min() < low + 0.02 * high and 0.98 * high < values.max() <= high
    both = module(bank, white_fraction=1.0, shot_fraction=1.0, shot_std=(0.1, 0.1)).sample(50, seed=0)
    assert (both.noise_std > 0).all() and (both.shot_noise > 0).all()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spatial", [False, True])
def test_presets_degrade(name, spatial):
    degradation = DynamicDegradation(name, scale=2)
    low, codes, recipe = degradation(images(size=(40, 44)), seed=3, spatial=spatial)
    assert low.shape == (4, 3, 20, 22)
    assert codes.shape == ((4, 16, 8, 8) if spatial else (4, 16))
    assert low.isfinite().all() and codes.isfinite().all()
    assert recipe.scale == 2 and recipe.padding == degradation.config.padding
    total = recipe.kernels.sum((-2, -1))
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


def test_the_kernel_code_keeps_what_srmd_says():
    degradation = DynamicDegradation("srmd")
    assert abs(degradation.pca.energy - 0.998) < 0.0005
    recipe = degradation.sample(500, seed=11)
    mixed = recipe.kernels[:, 0]
    kept = degradation.pca.decode(degradation.pca.encode(mixed))
    assert 1 - (kept - mixed).square().sum() / mixed.square().sum() > 0.997


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"noise_std": (0.2, 0.1)}, ValueError, r"noise_std .*got \(0.2, 0.1\)"),
        ({"noise_std": (-0.1, 0.1)}, ValueError, "noise_std"),
        ({"shot_std": (0.1,)}, ValueError, "shot_std"),
        ({"scale": 0}, ValueError, "scale must be at least 1, got 0"),
        ({"num_mixed": 0}, ValueError, "num_mixed must be at least 1"),
        ({"gray_fraction": 1.5}, ValueError, r"gray_fraction must be in \[0, 1\], got 1.5"),
        ({"gain": (1.0, math.inf)}, ValueError, r"gain .* both finite, got \(1.0, inf\)"),
        ({"noise_std": (math.nan, 0.1)}, ValueError, "noise_std"),
        ({"grid_size": (0, 4)}, ValueError, r"grid_size .*got \(0, 4\)"),
        ({"grid_size": (2.5, 3)}, TypeError, "grid_size .*got 2.5"),
        ({"smoothness": 0.0}, ValueError, "smoothness must be positive"),
        ({"kernels": torch.nn.Identity()}, TypeError, "kernels must be a KernelDistribution, got Identity"),
        ({"noise": 1}, TypeError, "noise"),
    ],
)
def test_impossible_settings_are_refused(bank, changes, error, message):
    with pytest.raises(error, match=message):
        module(bank, **changes)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match=r"preset must be one of paper, .*, got 'blur'"):
        DynamicDegradation("blur")
    assert preset("bsrgan", 4).kernels.scale == 4


# ---- What comes out


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("scale", [1, 3])
def test_it_is_eq_3(bank, spatial, scale):
    """Against SciPy: convolve with every kernel, mix by the weights at each pixel, keep every scale-th."""
    image = images(2, (19, 26), 1).double()
    degradation = module(bank, noise_std=(0, 0), scale=scale, grid_size=(3, 4))
    low, _, recipe = degradation(image, seed=0, spatial=spatial)
    weights = recipe.weights.double().numpy()
    if spatial:
        y, x = np.mgrid[0:2:19j, 0:3:26j]
        weights = np.stack(
            [[ndimage.map_coordinates(m, (y, x), order=1) for m in sample] for sample in weights]
        )
    else:
        weights = weights[:, :, None, None]
    for b in range(2):
        kernels = recipe.kernels[b].double().numpy()
        blurred = [ndimage.convolve(image[b, 0].numpy(), kernel, mode="mirror") for kernel in kernels]
        expected = (weights[b] * np.stack(blurred)).sum(0)[::scale, ::scale]
        np.testing.assert_allclose(low[b, 0].numpy(), expected, atol=1e-12)


def test_a_constant_image_stays_constant_but_for_the_noise(bank):
    """Separates the gather model from its adjoint, which brightens and darkens where the weights vary."""
    image = torch.full((3, 1, 64, 64), 0.5)
    low, _, recipe = module(bank, noise_std=(0.05, 0.1), spatial=True)(image, seed=0)
    noise = low - 0.5
    torch.testing.assert_close(noise.std((1, 2, 3)), recipe.noise_std, atol=0.003, rtol=0)
    assert noise.mean((1, 2, 3)).abs().max() < 0.005
    recipe.noise_std = torch.zeros(3)
    torch.testing.assert_close(recipe.apply(image), image, atol=1e-6, rtol=0)


def test_darkness_comes_before_the_blur(bank):
    degradation = module(bank, noise_std=(0, 0), dark_fraction=1.0)
    low, _, recipe = degradation(images(), seed=0)
    gamma, gain, contrast = recipe.tone.unbind(1)
    darker = low_light(reduce_contrast(images(), contrast), gamma, gain)
    recipe.tone = None
    torch.testing.assert_close(low, recipe.apply(darker))
    assert (low.mean((1, 2, 3)) < images().mean((1, 2, 3))).all()


def test_light_is_left_alone_where_it_is_not_changed():
    one = torch.ones(4)
    assert torch.equal(low_light(images(), one, one), images())
    assert torch.equal(reduce_contrast(images(), one), images())
    flat = reduce_contrast(images(), 0 * one)
    torch.testing.assert_close(flat, images().mean((1, 2, 3), keepdim=True).expand_as(flat))


def test_darkness_is_undone(bank):
    degradation = module(bank, noise_std=(0, 0), dark_fraction=0.6, sharp_fraction=1.0)
    image = 0.4 + 0.6 * images().double()  # no pixel so dark that its value is not kept
    low, _, recipe = degradation(image, seed=0)
    dark = (recipe.tone != 1).any(dim=1)
    assert dark.any() and not dark.all() and (low[dark] - image[dark]).abs().mean() > 0.1
    assert bool((low > recipe.tone[:, 1].view(-1, 1, 1, 1) / 128).all())
    back = undo_darkness(low, recipe.tone.double())
    torch.testing.assert_close(back, image, atol=1e-6, rtol=0)
    assert torch.equal(back[~dark], low[~dark])


def test_darkness_is_undone_in_a_straight_line_where_nothing_is_known():
    gamma, gain = torch.tensor([4.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    least = 0.5 / 128
    dark = torch.tensor([-least, 0.0, least / 2, least, least + 1e-9], dtype=torch.float64).view(1, 1, 1, -1)
    low, zero, half, whole, beyond = brighten(dark.requires_grad_(), gamma, gain).flatten()
    torch.testing.assert_close(whole, torch.tensor(1 / 128, dtype=torch.float64) ** 0.25)
    torch.testing.assert_close(torch.stack((low, half)), torch.stack((-whole, whole / 2)))
    torch.testing.assert_close(beyond, whole, atol=1e-6, rtol=0)
    assert zero == 0
    (slope,) = torch.autograd.grad(zero, dark)
    torch.testing.assert_close(slope[0, 0, 0, 1], whole.detach() / least)


@pytest.mark.parametrize("spatial", [False, True])
def test_codes_are_those_of_the_mixed_kernels_and_the_noise(bank, spatial):
    degradation = module(bank, grid_size=(2, 3), shot_fraction=0.5, white_fraction=0.5, shot_std=(0.1, 0.3))
    _, codes, recipe = degradation(images(), seed=3, spatial=spatial)
    assert codes.shape == ((4, 16, 2, 3) if spatial else (4, 16))
    level = (recipe.noise_std.square() + 0.5 * recipe.shot_noise).sqrt()[:, None]
    grid = recipe.weights.reshape(4, 3, -1)
    for node in range(grid.shape[2]):
        mixed = torch.einsum("bn,bnuv->buv", grid[:, :, node], recipe.kernels)
        expected = torch.cat((degradation.pca.encode(mixed), level), dim=1)
        torch.testing.assert_close(codes.reshape(4, 16, -1)[:, :, node], expected, atol=1e-6, rtol=0)


def test_it_follows_the_dtype_of_the_image(bank):
    degradation = module(bank, spatial=True)
    wide, low = degradation(images(), seed=1), degradation(images().bfloat16(), seed=1)
    assert low.image.dtype == low.codes.dtype == torch.bfloat16
    torch.testing.assert_close(low.image.float(), wide.image, atol=0.02, rtol=0)
    assert torch.equal(low.recipe.weights, wide.recipe.weights)
    assert degradation(images().double(), seed=1).codes.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        cast = degradation(images(), seed=1)
    assert torch.equal(cast.image, wide.image) and torch.equal(cast.codes, wide.codes)


@pytest.mark.parametrize("dark_fraction", [0.0, 1.0])
def test_integers_stand_for_the_unit_range(bank, dark_fraction):
    degradation = DynamicDegradation("paper", kernels=bank, dark_fraction=dark_fraction)
    image = (images() * 255).to(torch.uint8)
    of_integers, of_floats = (degradation(x, seed=1) for x in (image, image / 255))
    assert torch.equal(of_integers.image, of_floats.image)
    assert torch.equal(of_integers.codes, of_floats.codes)


def test_gradients_reach_the_image(bank):
    image = images(1, (12, 12), 1).double().requires_grad_()
    degradation = module(
        bank, spatial=True, grid_size=(2, 2), dark_fraction=1.0, shot_fraction=1.0, shot_std=(0.1, 0.1)
    )
    assert torch.autograd.gradcheck(lambda x: degradation(x, seed=5).image, image, fast_mode=True)


def test_real_images_lose_detail_where_the_blur_is_strong(data_dir):
    from ddrf_fast.data import read_image, to_float

    image = torch.from_numpy(to_float(read_image(data_dir / "tno/test/vis/05.png")))[None, None]
    degraded = DynamicDegradation(noise_std=(0, 0), spatial=True)(image, seed=0).image
    assert degraded.shape == image.shape
    assert degraded.diff(dim=-1).square().mean() < 0.8 * image.diff(dim=-1).square().mean()
    assert abs(degraded.mean() - image.mean()) < 0.002


# ---- What it depends on


def everything(bank, **changes) -> DynamicDegradation:
    """With every term there is."""
    return module(
        bank,
        spatial=True,
        scale=2,
        white_fraction=1.0,
        shot_fraction=1.0,
        shot_std=(0.05, 0.1),
        gray_fraction=0.5,
        dark_fraction=0.5,
        sharp_fraction=0.2,
        **changes,
    )


def test_the_seed_decides(bank):
    degradation = everything(bank)
    first, second = degradation(images(), seed=7), degradation(images(), seed=torch.tensor(7))
    assert torch.equal(first.image, second.image) and torch.equal(first.codes, second.codes)
    assert not torch.allclose(first.codes, degradation(images(), seed=8).codes)
    assert not torch.allclose(first.codes[0], first.codes[1])
    torch.manual_seed(5)
    third, fourth = degradation(images()), degradation(images())
    torch.manual_seed(5)
    assert torch.equal(degradation(images()).image, third.image)
    assert not torch.equal(third.image, fourth.image)


def test_neither_the_batch_nor_its_order_matters(bank):
    degradation, image = everything(bank), images(6)
    ids = torch.tensor([40, 7, 3, 2**40, 0, 9])
    whole = degradation(image, seed=3, sample_ids=ids)
    order = torch.tensor([3, 1, 5])
    part = degradation(image[order], seed=3, sample_ids=ids[order])
    torch.testing.assert_close(part.image, whole.image[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(part.codes, whole.codes[order], atol=1e-6, rtol=0)
    assert torch.equal(part.recipe.noise_std, whole.recipe.noise_std[order])
    # A part of the recipe is the recipe of a part, to the last bit.
    assert torch.equal(whole.recipe[order].apply(image[order]), whole.image[order])
    assert torch.equal(whole.recipe[2:].apply(image[2:]), whole.image[2:])
    assert len(whole.recipe[2:]) == 4


def test_threads_do_not_matter(bank):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(everything(bank)(images(), seed=3))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.image, results[0].image) and torch.equal(other.codes, results[0].codes)


def test_a_recipe_repeats_the_degradation(bank):
    degradation = everything(bank)
    first = degradation(images())
    for again in (
        degradation.replay(images(), first.recipe),
        everything(bank).replay(images(), first.recipe),
    ):
        assert torch.equal(again.image, first.image) and torch.equal(again.codes, first.codes)
    file = io.BytesIO()
    torch.save(vars(first.recipe), file)
    file.seek(0)
    read = Degradation(**torch.load(file))
    assert torch.equal(read.apply(images()), first.image)
    mask = torch.zeros(4, 1, 20, 24)  # another image of the same scene: the same blur and noise
    assert degradation.replay(mask, first.recipe).image.shape == (4, 1, 10, 12)


def test_it_is_saved_with_a_model(bank):
    degradation = module(bank)
    assert sorted(degradation.state_dict()) == ["components", "kernels.kernels"]
    other = module(KernelBank.default(9, strength=0.7))
    assert not torch.equal(other(images(), seed=1).image, degradation(images(), seed=1).image)
    other.load_state_dict(degradation.state_dict())
    expected = degradation(images(), seed=1)
    for same in (other, copy.deepcopy(degradation)):
        found = same(images(), seed=1)
        assert torch.equal(found.image, expected.image) and torch.equal(found.codes, expected.codes)
    assert not list(degradation.parameters())


def test_settings_of_the_wrong_kind_are_named():
    for wrong in ({"noise_std": 0.1}, {"noise_std": None}, {"grid_size": 8}, {"padding": "foo"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            DynamicDegradation("paper", **wrong)
    DynamicDegradation(
        "paper", noise_std=np.float32([0.1, 0.2]), grid_size=np.array([4, 4]), scale=np.int64(2)
    )
    with pytest.raises(TypeError, match="scale must be an int, got '4'"):
        DynamicDegradation("paper", scale="4")


def test_modules_of_one_configuration_are_apart(bank):
    config = DegradationConfig(bank, num_mixed=3)
    DynamicDegradation(config).to("meta")
    assert bank.kernels.device.type == "cpu"


def test_every_tensor_moves(bank):
    moved = everything(bank).to("meta").sample(2, seed=0)
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8 and {t.device.type for t in tensors} == {"meta"}
    recipe = everything(bank).sample(2, seed=0).to("meta")
    assert all(t.device.type == "meta" for t in vars(recipe).values() if isinstance(t, torch.Tensor))


# ---- In data loaders, in compiled code, on a GPU


class Degraded(Dataset):
    """Each image by its place in the data set."""

    def __init__(self, bank):
        self.images, self.degradation = images(6), everything(bank)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        found = self.degradation(self.images[index][None], seed=3, sample_ids=torch.tensor([index]))
        return found.image[0], found.codes[0]


class Collate:
    """Whole batches, recipe included."""

    def __init__(self, degradation):
        self.degradation = degradation

    def __call__(self, samples):
        image, index = zip(*samples, strict=True)
        return self.degradation(torch.stack(image), seed=3, sample_ids=torch.tensor(index))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_give_the_same(bank, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this platform")
    dataset = Degraded(bank)
    ids = torch.arange(6)
    whole = dataset.degradation(dataset.images, seed=3, sample_ids=ids)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the parent has used its threads before it forks
    dataset.degradation(dataset.images)
    torch.set_num_threads(threads)
    loader = DataLoader(dataset, 2, num_workers=2, multiprocessing_context=method)
    image, codes = (torch.cat(parts) for parts in zip(*loader, strict=True))
    torch.testing.assert_close(image, whole.image, atol=1e-6, rtol=0)
    torch.testing.assert_close(codes, whole.codes, atol=1e-6, rtol=0)

    pairs = [(image, i) for i, image in enumerate(dataset.images)]
    loader = DataLoader(
        pairs,
        3,
        num_workers=1,
        multiprocessing_context=method,
        collate_fn=Collate(dataset.degradation),
    )
    for start, batch in zip((0, 3), loader, strict=True):
        torch.testing.assert_close(batch.image, whole.image[start : start + 3], atol=1e-6, rtol=0)
        assert torch.equal(batch.recipe.apply(dataset.images[start : start + 3]), batch.image)


@pytest.mark.parametrize("name", PRESETS)
def test_compiles_whole(name):
    torch._dynamo.reset()
    degradation = DynamicDegradation(name, scale=2, spatial=name != "srmd")
    compiled = torch.compile(degradation, fullgraph=True, backend="aot_eager")
    for seed in (torch.tensor(3), torch.tensor(4)):
        expected, found = degradation(images(), seed=seed), compiled(images(), seed=seed)
        torch.testing.assert_close(found.image, expected.image)
        torch.testing.assert_close(found.codes, expected.codes)
        assert torch.equal(found.recipe.sample_ids, expected.recipe.sample_ids)
    torch.manual_seed(1)
    first = compiled(images())
    assert not torch.equal(first.image, compiled(images()).image)  # a seed for each call


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS)
def test_a_gpu_draws_the_same(name):
    degradation = DynamicDegradation(name, scale=2, spatial=True)
    expected = degradation(images(), seed=3)
    found = degradation.to("cuda")(images().cuda(), seed=3)
    torch.testing.assert_close(found.image.cpu(), expected.image, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.codes.cpu(), expected.codes, atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_a_gpu_never_waits(bank):
    degradation, image = everything(bank).cuda(), images().cuda()
    degradation(image)  # what is compiled at first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        degradation(image)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_numpy_side_has_the_same_numbers(bank):
    """A recipe drawn here, applied to an array in a worker."""
    numpy_side = pytest.importorskip("ddrf_fast.numpy", exc_type=ImportError)
    degradation = everything(bank, noise_std=(0.02, 0.03))
    recipe = degradation.sample(4, seed=3)
    recipe.tone = None
    expected = recipe.apply(images())
    for b in range(4):
        found = numpy_side.degrade(
            images()[b].permute(1, 2, 0).numpy(),
            recipe.kernels[b].numpy(),
            recipe.weights[b].numpy(),
            grid=True,
            scale=recipe.scale,
            noise_std=float(recipe.noise_std[b]),
            shot_noise=float(recipe.shot_noise[b]),
            gray_noise=bool(recipe.gray_noise[b]),
            seed=int(recipe.seed),
            sample_id=int(recipe.sample_ids[b]),
        )
        np.testing.assert_allclose(found, expected[b].permute(1, 2, 0).numpy(), atol=1e-6)


def test_backends_agree_on_the_recipe(bank):
    with ddrf_fast.use_backend("reference"):
        expected = everything(bank)(images(), seed=3)
    found = everything(bank)(images(), seed=3)
    torch.testing.assert_close(found.image, expected.image, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.codes, expected.codes, atol=1e-5, rtol=0)


def test_levels_of_both_noises_are_drawn_apart():
    degradation = DynamicDegradation("paper", shot_std=(0.0, 0.1), white_fraction=1.0, shot_fraction=1.0)
    recipe = degradation.sample(4000, seed=0)
    levels = torch.stack((recipe.noise_std, recipe.shot_noise.sqrt()))
    assert torch.corrcoef(levels)[0, 1].abs() < 0.06
