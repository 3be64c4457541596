"""The bank of basis blur kernels of the paper's eq. 2: four of each of three families."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddrf_fast.degradation._storage import load_tensor, save_tensor
from ddrf_fast.degradation.kernels import (
    anisotropic_gaussian_kernel,
    isotropic_gaussian_kernel,
    motion_kernel,
)

FAMILIES = ("motion", "isotropic", "anisotropic")

# The default parameters, in pixels of a 25x25 kernel and radians: the strengths of the kernels that USRNet
# and DPIR test with (four isotropic, four anisotropic, four motion), as parametric shapes.
_MOTION_LENGTH = (5.0, 9.0, 13.0, 17.0)
_MOTION_ANGLE = (0.25 * math.pi, 0.9 * math.pi, 0.1 * math.pi, 0.6 * math.pi)
_MOTION_BEND = (0.0, 0.8, -1.4, 2.0)
_ISOTROPIC_SIGMA = (0.7, 1.2, 1.6, 2.0)
_ANISOTROPIC_MAJOR = (2.0, 2.5, 3.0, 3.0)
_ANISOTROPIC_MINOR = (0.8, 1.2, 1.0, 1.8)
_ANISOTROPIC_ANGLE = (0.0, 0.25 * math.pi, 0.75 * math.pi, 0.5 * math.pi)


@dataclass(frozen=True, eq=False)
class KernelBank:
    """Basis kernels, ordered by family: all of the first, then all of the second, and so on.

    Attributes:
        kernels: Tensor[M, k, k], k odd, each summing to 1.
        families: names of the families; M is a multiple of their number, each has as many kernels.

    Raises:
        ValueError: shapes do not fit, or a kernel is not finite or does not sum to 1.

    Example:
        >>> bank = KernelBank.default()
        >>> bank.kernels.shape, bank.families, bank.per_family
        (torch.Size([12, 25, 25]), ('motion', 'isotropic', 'anisotropic'), 4)
    """

    kernels: Tensor
    families: tuple[str, ...] = FAMILIES

    def __post_init__(self) -> None:
        shape = tuple(self.kernels.shape)
        if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 == 0:
            raise ValueError(f"kernels must be [M, k, k] with k odd, got {list(shape)}")
        if not self.families or shape[0] == 0 or shape[0] % len(self.families):
            raise ValueError(
                f"each of the families {self.families} needs as many kernels, got {shape[0]} in all"
            )
        worst = float((self.kernels.double().sum((1, 2)) - 1).abs().max())
        if not worst < 1e-3:  # NaN fails, too
            raise ValueError(f"each kernel must sum to 1, got one that is off by {worst:g}")

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
        if not strength > 0:
            raise ValueError(f"strength must be positive, got {strength}")
        unit = strength * kernel_size / 25

        def pixels(values: tuple[float, ...]) -> Tensor:
            return unit * torch.tensor(values, dtype=torch.float64)

        motion = motion_kernel(
            pixels(_MOTION_LENGTH),
            torch.tensor(_MOTION_ANGLE),
            torch.tensor(_MOTION_BEND),
            kernel_size=kernel_size,
        )
        isotropic = isotropic_gaussian_kernel(pixels(_ISOTROPIC_SIGMA), kernel_size=kernel_size)
        anisotropic = anisotropic_gaussian_kernel(
            pixels(_ANISOTROPIC_MAJOR),
            pixels(_ANISOTROPIC_MINOR),
            torch.tensor(_ANISOTROPIC_ANGLE),
            kernel_size=kernel_size,
        )
        return cls(torch.cat((motion, isotropic, anisotropic)))

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
