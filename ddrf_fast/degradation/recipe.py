"""The recipe of a batch's degradation: everything that was drawn, from which it can be done again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddrf_fast.degradation.codes import KernelPCA
from ddrf_fast.degradation.photometric import low_light, reduce_contrast
from ddrf_fast.ops.degrade import Padding, degrade, moved
from ddrf_fast.reference._common import unit_range

_PER_SAMPLE = ("kernels", "weights", "noise_std", "sample_ids", "shot_noise", "gray_noise", "tone")


@dataclass(eq=False)
class Degradation:
    """How each image of a batch is degraded: light, blur, down-sampling and noise (eq. 3).

    A plain record. `torch.save(vars(recipe), file)` writes it, `Degradation(**torch.load(file))` reads it.

    Attributes:
        kernels: Tensor[B, N, k, k], those that are mixed for each sample.
        weights: Tensor[B, N], or on a coarse grid over the image Tensor[B, N, gh, gw]; they sum to 1 over N.
        noise_std: Tensor[B], standard deviation of the white noise for images in [0, 1].
        seed: of the noise, an int64 scalar tensor.
        sample_ids: int64 Tensor[B], which number the samples for the noise.
        shot_noise: Tensor[B], the variance of the shot noise where the image is 1; None: none.
        gray_noise: bool Tensor[B], whose noise is the same in all channels; None: none.
        tone: Tensor[B, 3], the gamma, gain and contrast of :mod:`ddrf_fast.degradation.photometric`; None:
            the light is left alone.
        scale: every scale-th row and column is kept.
        padding: as for :func:`ddrf_fast.degrade`.
    """

    kernels: Tensor
    weights: Tensor
    noise_std: Tensor
    seed: Tensor
    sample_ids: Tensor
    shot_noise: Tensor | None = None
    gray_noise: Tensor | None = None
    tone: Tensor | None = None
    scale: int = 1
    padding: Padding = "reflect"

    def __len__(self) -> int:
        return len(self.kernels)

    @property
    def noise_level(self) -> Tensor:
        """Standard deviation of the noise, Tensor[B], with shot noise where the image is 1/2."""
        if self.shot_noise is None:
            return self.noise_std
        return (self.noise_std.square() + self.shot_noise / 2).sqrt()

    def __getitem__(self, samples: slice | Tensor) -> "Degradation":
        """Some of the samples, in this order; each keeps its degradation, noise included."""
        return self._map(lambda value: value[samples], _PER_SAMPLE)

    def apply(self, image: Tensor) -> Tensor:
        """Degrades a batch, always alike.

        Args:
            image: Tensor[B, C, H, W] in [0, 1], or of uint8 or uint16, which stand for it. The degradation
                follows it to its device, and to its dtype if that is floating.

        Returns:
            Tensor[B, C, ceil(H / scale), ceil(W / scale)], not clipped: the noise leaves [0, 1]. Of integers,
            in the dtype of the kernels.

        Example:
            >>> from ddrf_fast.degradation import DynamicDegradation
            >>> recipe = DynamicDegradation("srmd", scale=2).sample(2, seed=0)
            >>> image = torch.rand(2, 3, 16, 20)
            >>> recipe.apply(image).shape
            torch.Size([2, 3, 8, 10])
            >>> torch.allclose(recipe[1:].apply(image[1:]), recipe.apply(image)[1:])
            True
        """
        dtype = image.dtype if image.is_floating_point() else self.kernels.dtype
        if self.tone is not None:
            gamma, gain, contrast = self.tone.unbind(1)
            image = low_light(reduce_contrast(unit_range(image, dtype), contrast), gamma, gain)

        def alike(value: Tensor) -> Tensor:
            return value.to(image.device, dtype)

        return degrade(
            image,
            alike(self.kernels),
            alike(self.weights),
            scale=self.scale,
            noise_std=alike(self.noise_std),
            seed=self.seed,
            sample_ids=self.sample_ids,
            gray_noise=False if self.gray_noise is None else self.gray_noise,
            shot_noise=0 if self.shot_noise is None else alike(self.shot_noise),
            padding=self.padding,
            grid=self.weights.dim() == 4,
        )

    def codes(self, pca: KernelPCA) -> Tensor:
        """The degradation codes that a network is given: the kernel's, then the noise level.

        Args:
            pca: the code of kernels, with D components.

        Returns:
            Tensor[B, D + 1], or for a grid a coarse map Tensor[B, D + 1, gh, gw]. The last is the standard
            deviation of the noise, with shot noise where the image is 1/2.
        """
        kernel = pca.encode_weights(self.weights, self.kernels)
        level = self.noise_level.reshape(-1, *[1] * (kernel.ndim - 1)).expand_as(kernel[:, :1])
        return torch.cat((kernel, level), dim=1)

    def to(self, device: torch.device | str) -> "Degradation":
        """The same degradation with its tensors on `device`."""
        return self._map(lambda value: moved(value, torch.device(device)), (*_PER_SAMPLE, "seed"))

    def pin_memory(self) -> "Degradation":
        """The same in pinned memory; `DataLoader(pin_memory=True)` calls it."""
        return self._map(Tensor.pin_memory, (*_PER_SAMPLE, "seed"))

    def _map(self, function: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> "Degradation":
        values = {name: getattr(self, name) for name in names}
        changes: dict[str, Any] = {n: function(v) for n, v in values.items() if v is not None}
        return replace(self, **changes)
