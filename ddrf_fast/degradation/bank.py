"""Banks of basis blur kernels, of which degradations are mixed: the paper's eq. 2 and KAIR's twelve."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ddrf_fast.degradation._storage import load_tensor, save_tensor
from ddrf_fast.degradation.distributions import KernelDistribution
from ddrf_fast.degradation.kernels import (
    anisotropic_gaussian_kernel,
    isotropic_gaussian_kernel,
    motion_kernel,
)
from ddrf_fast.ops._checks import integer

FAMILIES = ("motion", "isotropic", "anisotropic")

# The parameters of the default bank, in pixels of a 25x25 kernel and radians: about the strengths of KAIR's.
_MOTION = ((5.0, 9.0, 13.0, 17.0), (0.25, 0.9, 0.1, 0.6), (0.0, 0.8, -1.4, 2.0))  # length, angle / π, bend
_ISOTROPIC = (0.7, 1.2, 1.6, 2.0)  # sigma
_ANISOTROPIC = ((2.0, 2.5, 3.0, 3.0), (0.8, 1.2, 1.0, 1.8), (0.0, 0.25, 0.75, 0.5))  # sigmas, angle / π
# What was measured on the kernels that come with KAIR (kernels_12.mat).
_KAIR_ANISOTROPIC = ((2.65, 3.0, 2.83, 2.65), (1.41, 1.22, 1.22, 2.24), (0.0, 0.25, 0.75, 0.4))


class KernelBank(KernelDistribution):
    """Basis kernels, ordered by family: all of the first, then all of the second, and so on.

    A module, so that the kernels move with a model and are saved with it. Called, it is a distribution of
    kernels: each is one of its family's, all equally likely.

    Args:
        kernels: Tensor[M, k, k], k odd, each summing to 1.
        families: names of the families; M is a multiple of their number, each has as many kernels.

    Raises:
        ValueError: shapes do not fit, or a kernel is not finite or does not sum to 1.

    Example:
        >>> bank = KernelBank.default()
        >>> bank.kernels.shape, bank.families, bank.per_family
        (torch.Size([12, 25, 25]), ('motion', 'isotropic', 'anisotropic'), 4)
        >>> bank(torch.rand(2, 3, 1)).shape  # for each of two samples one of each family
        torch.Size([2, 3, 25, 25])
    """

    kernels: Tensor
    num_draws = 1

    def __init__(self, kernels: Tensor, families: tuple[str, ...] = FAMILIES) -> None:
        super().__init__()
        shape = tuple(kernels.shape)
        if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 == 0:
            raise ValueError(f"kernels must be [M, k, k] with k odd, got {list(shape)}")
        if not families or shape[0] == 0 or shape[0] % len(families):
            raise ValueError(f"each of the families {families} needs as many kernels, got {shape[0]} in all")
        worst = float((kernels.double().sum((1, 2)) - 1).abs().max())
        if not worst < 1e-3:  # NaN fails, too
            raise ValueError(f"each kernel must sum to 1, got one that is off by {worst:g}")
        self.register_buffer("kernels", kernels)
        self.families = families
        self.kernel_size = shape[-1]

    @property
    def per_family(self) -> int:
        """Number of kernels in each family."""
        return self.kernels.shape[0] // len(self.families)

    @classmethod
    def default(cls, kernel_size: int = 25, *, strength: float = 1.0) -> "KernelBank":
        """The bank of 4 motion, 4 isotropic and 4 anisotropic Gaussian kernels, in this order.

        Args:
            kernel_size: k, odd. The shapes grow with it: at strength 1 the longest motion path is 17 of 25
                pixels.
            strength: factor on every length and sigma. To widen the kernels without changing the blur, divide
                it by as much: `default(41, strength=25 / 41)` is the blur of `default()` in a 41x41 kernel.

        Raises:
            ValueError: `kernel_size` is not odd, `strength` is not positive, or a motion path leaves the
                kernel.
        """
        return cls._parametric(kernel_size, strength, _ANISOTROPIC, FAMILIES)

    @classmethod
    def kair(cls, kernel_size: int = 25) -> "KernelBank":
        """The twelve kernels that DPIR, USRNet and KAIR test with, as parametric shapes of one family.

        Four isotropic and four anisotropic Gaussians have the standard deviations that were measured on the
        originals. The four motion kernels are arcs of like extent; the originals are random walks, and up to
        2 pixels off the centre.

        Args:
            kernel_size: k, odd; the originals have 25.
        """
        integer("kernel_size", kernel_size, 1)
        return cls._parametric(kernel_size, 25 / kernel_size, _KAIR_ANISOTROPIC, ("any",))

    @classmethod
    def _parametric(
        cls,
        kernel_size: int,
        strength: float,
        anisotropic: tuple[tuple[float, ...], ...],
        families: tuple[str, ...],
    ) -> "KernelBank":
        if not strength > 0:
            raise ValueError(f"strength must be positive, got {strength}")
        unit = strength * kernel_size / 25

        def row(values: tuple[float, ...], factor: float) -> Tensor:
            return factor * torch.tensor(values, dtype=torch.float64)

        length, turn, bend = _MOTION
        major, minor, angle = anisotropic
        kernels = (
            motion_kernel(row(length, unit), row(turn, math.pi), row(bend, 1), kernel_size=kernel_size),
            isotropic_gaussian_kernel(row(_ISOTROPIC, unit), kernel_size=kernel_size),
            anisotropic_gaussian_kernel(
                row(major, unit), row(minor, unit), row(angle, math.pi), kernel_size=kernel_size
            ),
        )
        return cls(torch.cat(kernels), families)

    def forward(self, uniform: Tensor) -> Tensor:
        """One kernel for each random number; the nth of a sample is of the family n modulo their number.

        Args:
            uniform: Tensor[B, N, 1] in [0, 1], which decide.

        Returns:
            Tensor[B, N, k, k]
        """
        family = torch.arange(uniform.shape[1], device=uniform.device) % len(self.families)
        place = (uniform[..., 0] * self.per_family).long().clamp(max=self.per_family - 1)
        return self.kernels[family * self.per_family + place]

    def save(self, path: str | Path) -> None:
        """Writes the bank as a safetensors file."""
        save_tensor(path, "kernels", self.kernels, families=",".join(self.families))

    @classmethod
    def load(cls, path: str | Path) -> "KernelBank":
        """Reads a bank that :meth:`save` wrote.

        Raises:
            ValueError: the file is missing, unreadable or holds no bank.
        """
        kernels, metadata = load_tensor(path, "kernels")
        try:
            return cls(kernels, tuple(metadata.get("families", ",".join(FAMILIES)).split(",")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
