"""DynamicDegradation: random degradations for the training of restoration networks, as a module."""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddrf_fast.degradation import draws
from ddrf_fast.degradation.codes import KernelPCA
from ddrf_fast.degradation.mixtures import correlated, simplex, smoothing
from ddrf_fast.degradation.presets import DegradationConfig, preset
from ddrf_fast.degradation.recipe import Degradation
from ddrf_fast.ops.degrade import ids_tensor, seed_tensor

_FIT_SAMPLES = 2048  # kernels that the code is fitted to
_NUM_CHANCES = 8  # uniform numbers of a sample beside those of its kernels


class DegradedBatch(NamedTuple):
    """What :class:`DynamicDegradation` returns.

    Attributes:
        image: Tensor[B, C, H', W'], degraded.
        codes: Tensor[B, D + 1], or where the blur varies a coarse map Tensor[B, D + 1, gh, gw].
        recipe: all that was drawn; `recipe.apply(image)` does it again.
    """

    image: Tensor
    codes: Tensor
    recipe: Degradation


class DynamicDegradation(nn.Module):
    """Degrades each image of a batch at random: light, spatially varying blur, down-sampling, noise.

    A sample's degradation depends on the seed and its id alone. So it is the same on a GPU inside the
    training step and in the workers of a data loader, in any batch, order, process or rank, up to the
    rounding of float32. Nothing waits for a GPU, and torch.compile takes the whole of it in one graph. The
    basis kernels and the code of kernels are buffers, saved with the model.

    Args:
        config: the name of a preset ("paper", "low_light", "kair", "srmd", "bsrgan", "real_esrgan"; see
            :func:`ddrf_fast.degradation.preset`) or a :class:`DegradationConfig`.
        **changes: settings that replace those of `config`.

    Raises:
        TypeError: there is no such setting.
        ValueError: there is no such preset, or a setting is out of range.

    Example:
        >>> degradation = DynamicDegradation("paper", scale=4, noise_std=(0.0, 0.1), spatial=True)
        >>> image = torch.rand(2, 3, 64, 64)
        >>> low, codes, recipe = degradation(image, seed=1)
        >>> low.shape, codes.shape
        (torch.Size([2, 3, 16, 16]), torch.Size([2, 16, 8, 8]))
        >>> torch.equal(recipe.apply(image), low)
        True
        >>> ids = torch.tensor([1])  # the second image alone
        >>> torch.allclose(degradation(image[1:], seed=1, sample_ids=ids).image, low[1:], atol=1e-6)
        True
    """

    components: Tensor
    _rows: Tensor
    _columns: Tensor
    identity: Tensor

    def __init__(self, config: DegradationConfig | str = "paper", **changes: Any) -> None:
        super().__init__()
        if isinstance(config, str):
            config = preset(config, changes.pop("scale", 1))
        config = replace(config, **changes)
        # The kernels move with this module, so they are its own.
        self.config = replace(config, kernels=copy.deepcopy(config.kernels))
        self.kernels = self.config.kernels
        size = self.config.kernels.kernel_size
        identity = torch.zeros(size, size)
        identity[size // 2, size // 2] = 1
        self.register_buffer("identity", identity, persistent=False)
        for name, nodes in zip(("_rows", "_columns"), config.grid_size, strict=True):
            self.register_buffer(name, smoothing(nodes, config.smoothness), persistent=False)
        drawn = self.sample(_FIT_SAMPLES, seed=0, spatial=False)
        mixed = torch.einsum("bn,bnuv->buv", drawn.weights, drawn.kernels)
        fitted = KernelPCA.fit(mixed, config.num_components)
        self.register_buffer("components", fitted.components)
        self._energy = fitted.energy

    @property
    def pca(self) -> KernelPCA:
        """The code of the kernels that are drawn."""
        return KernelPCA(self.components, self._energy)

    def sample(
        self,
        batch_size: int,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        spatial: bool | None = None,
    ) -> Degradation:
        """Draws a recipe for each sample of a batch, on the module's device.

        Args:
            batch_size: B.
            seed: from 0 to 2^63 - 1, or an int64 scalar tensor; None draws one from torch's default
                generator.
            sample_ids: int64 Tensor[B], by default 0 .. B-1; e.g. the samples' places in the data set.
            spatial: let the blur vary over the image, or not; by default as configured.

        Returns:
            The recipe.
        """
        config, device = self.config, self._rows.device
        seed, sample_ids = seed_tensor(seed, device), ids_tensor(sample_ids, batch_size, device)
        spatial = config.spatial if spatial is None else spatial
        num_mixed = config.num_mixed_spatial if spatial else config.num_mixed
        grid = config.grid_size if spatial else (1, 1)
        counts = (_NUM_CHANCES, num_mixed * config.kernels.num_draws, num_mixed * grid[0] * grid[1], 1)
        numbers = draws.standard_normal(seed, sample_ids, sum(counts))
        chances, for_kernels, normal, for_shots = numbers.split(counts, dim=1)

        kernels = self.kernels(draws.uniform(for_kernels).unflatten(1, (num_mixed, -1)))
        sharp, noisy, level, gray, dark, gamma, gain, contrast = draws.uniform(chances).unbind(1)
        if config.sharp_fraction > 0:
            kernels = torch.where(
                (sharp < config.sharp_fraction)[:, None, None, None], self.identity, kernels
            )
        normal = normal.unflatten(1, (num_mixed, *grid))
        if spatial:
            normal = correlated(normal, self._rows, self._columns)
        weights = simplex(normal).float()

        def between(bounds: tuple[float, float], chance: Tensor) -> Tensor:
            return bounds[0] + (bounds[1] - bounds[0]) * chance

        noise_std = between(config.noise_std, level) * (noisy >= 1 - config.white_fraction)
        shot_noise = tone = None
        if config.shot_fraction > 0:
            shot_std = between(config.shot_std, draws.uniform(for_shots)[:, 0])
            shot_noise = (shot_std * (noisy < config.shot_fraction)).square().float()
        if config.dark_fraction > 0:
            ranges = ((config.gamma, gamma), (config.gain, gain), (config.contrast, contrast))
            tone = torch.stack([between(*pair) for pair in ranges], dim=1)
            tone = torch.where((dark < config.dark_fraction)[:, None], tone, 1.0).float()
        return Degradation(
            kernels=kernels,
            weights=weights if spatial else weights.flatten(1),
            noise_std=noise_std.float(),
            seed=seed,
            sample_ids=sample_ids,
            shot_noise=shot_noise,
            gray_noise=gray < config.gray_fraction if config.gray_fraction > 0 else None,
            tone=tone,
            scale=config.scale,
            padding=config.padding,
        )

    def cleared(self, recipe: Degradation, clean: Tensor) -> Degradation:
        """A recipe without the blur, the noise and the darkness of some samples; down-sampling stays.

        Args:
            recipe: of :meth:`sample`.
            clean: bool Tensor[B], which samples.
        """
        keep = (~clean).float()
        return replace(
            recipe,
            kernels=torch.where(clean[:, None, None, None], self.identity, recipe.kernels),
            noise_std=recipe.noise_std * keep,
            shot_noise=None if recipe.shot_noise is None else recipe.shot_noise * keep,
            tone=None if recipe.tone is None else torch.where(clean[:, None], 1.0, recipe.tone),
        )

    def forward(
        self,
        image: Tensor,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        spatial: bool | None = None,
    ) -> DegradedBatch:
        """Degrades a batch.

        Args:
            image: Tensor[B, C, H, W] in [0, 1], or of uint8 or uint16, which stand for it; on the module's
                device.
            seed: as for :meth:`sample`.
            sample_ids: likewise.
            spatial: likewise.

        Returns:
            (image, codes, recipe). The image is floating and not clipped; the codes have its dtype.
        """
        recipe = self.sample(len(image), seed=seed, sample_ids=sample_ids, spatial=spatial)
        return self.replay(image, recipe)

    def replay(self, image: Tensor, recipe: Degradation) -> DegradedBatch:
        """Degrades a batch as `recipe` says: the same again, or another image alike.

        Args:
            image: Tensor[B, C, H, W], as many samples as the recipe has.
            recipe: of an earlier call.

        Returns:
            As for :meth:`forward`.
        """
        degraded = recipe.apply(image)
        return DegradedBatch(degraded, recipe.codes(self.pca).to(degraded.dtype), recipe)
