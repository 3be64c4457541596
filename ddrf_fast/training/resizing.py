"""Images that a program enlarged, as many are: soft, though no lens blurred them, and with coarse noise."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.degradation import isotropic_gaussian_kernel

LARGEST_SCALE = 3  # that is drawn


class Resizing(NamedTuple):
    """How an image was made smaller, and later as large as it had been, with centres of areas on one another.

    Unlike :func:`ddrf_fast.degradation.enlarge` and the down-sampling before it, where samples of single
    pixels stay in their place.

    Attributes:
        scale: by how much the sides were shorter.
        down: how, of the modes of ``F.interpolate``: "area" as cameras bin pixels, others without aliases.
        up: how it was enlarged.
    """

    scale: float
    down: str
    up: str

    @classmethod
    def draw(cls, random: np.random.Generator) -> "Resizing":
        """One at random."""
        scale = random.uniform(1.25, LARGEST_SCALE)
        return cls(scale, *map(random.choice, (("area", "bilinear", "bicubic"), ("bilinear", "bicubic"))))

    def smaller(self, image: Tensor) -> Tensor:
        """The image Tensor[B, C, H, W] in fewer pixels."""
        size = [round(side / self.scale) for side in image.shape[2:]]
        return F.interpolate(image, size, mode=self.down, antialias=self.down != "area")

    def larger(self, image: Tensor, size: Sequence[int]) -> Tensor:
        """The image in `size`, (H, W), again."""
        return F.interpolate(image, tuple(size), mode=self.up)

    def kernel(self, kernel_size: int) -> Tensor:
        """The blur that is left, Tensor[kernel_size, kernel_size]: about a Gaussian."""
        return isotropic_gaussian_kernel(0.35 * self.scale, kernel_size=kernel_size)
