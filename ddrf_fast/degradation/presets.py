"""What a degradation is drawn from: the settings, and those of the papers that restoration is trained by."""

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

from ddrf_fast.degradation.bank import KernelBank
from ddrf_fast.degradation.distributions import (
    BSRGANKernels,
    KernelDistribution,
    RealESRGANKernels,
    SRMDKernels,
)
from ddrf_fast.ops._checks import integer
from ddrf_fast.ops.degrade import Padding

Range = tuple[float, float]


@dataclass(frozen=True, eq=False)
class DegradationConfig:
    """Settings of :class:`~ddrf_fast.degradation.DynamicDegradation`; images are in [0, 1].

    Attributes:
        kernels: where kernels come from: a :class:`KernelBank` or another :class:`KernelDistribution`.
        num_mixed: how many kernels are mixed into a sample's one, uniformly on the simplex; for a bank, of
            its families in turn.
        num_mixed_spatial: the same where the blur varies: a smooth field says how much of each is where.
        spatial: whether the blur varies over the image, where a call does not say.
        grid_size: (rows, columns) of that field's grid.
        smoothness: its correlation length as a part of the image's side.
        sharp_fraction: part of the samples that are not blurred.
        noise_std: (lowest, highest) standard deviation of white noise, uniform between.
        shot_std: (lowest, highest) standard deviation of shot noise where the image is 1, likewise; it falls
            with the root of the signal.
        white_fraction: part of the samples with white noise.
        shot_fraction: part with shot noise. One draw decides on both: they exclude each other as long as the
            fractions sum to at most 1, and come together where both are 1.
        gray_fraction: part of the samples whose noise is the same in all channels.
        dark_fraction: part of the samples that are taken in the dark; `low_light` and `reduce_contrast` with:
        gamma: (lowest, highest),
        gain: (lowest, highest) and
        contrast: (lowest, highest), uniform between.
        scale: of the down-sampling, the same for all samples.
        padding: as for :func:`ddrf_fast.degrade`.
        num_components: length of a kernel's code.

    Raises:
        TypeError: `kernels` is no distribution.
        ValueError: a setting is out of range.
    """

    kernels: KernelDistribution
    num_mixed: int = 1
    num_mixed_spatial: int = 3
    spatial: bool = False
    grid_size: tuple[int, int] = (8, 8)
    smoothness: float = 0.35
    sharp_fraction: float = 0.0
    noise_std: Range = (0.0, 25 / 255)
    shot_std: Range = (0.0, 0.0)
    white_fraction: float = 1.0
    shot_fraction: float = 0.0
    gray_fraction: float = 0.0
    dark_fraction: float = 0.0
    gamma: Range = (1.5, 5.0)
    gain: Range = (0.5, 1.0)
    contrast: Range = (0.5, 1.0)
    scale: int = 1
    padding: Padding = "reflect"
    num_components: int = 15

    def __post_init__(self) -> None:
        if not isinstance(self.kernels, KernelDistribution):
            raise TypeError(f"kernels must be a KernelDistribution, got {type(self.kernels).__name__}")
        for name in ("noise_std", "shot_std", "gamma", "gain", "contrast"):
            value = getattr(self, name)
            if not _are_two(value) or not 0 <= value[0] <= value[1] < math.inf:
                raise ValueError(
                    f"{name} must be (lowest, highest) with 0 <= lowest <= highest, both finite, got {value}"
                )
        for name in ("sharp_fraction", "white_fraction", "shot_fraction", "gray_fraction", "dark_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("num_mixed", "num_mixed_spatial", "scale"):
            integer(name, getattr(self, name), 1)
        if self.padding not in get_args(Padding):
            raise ValueError(f"padding must be one of {', '.join(get_args(Padding))}, got {self.padding!r}")
        if not _are_two(self.grid_size) or not all(integer("grid_size", n, 0) for n in self.grid_size):
            raise ValueError(f"grid_size must be two positive numbers, got {self.grid_size}")
        if not 0 < self.smoothness < math.inf:
            raise ValueError(f"smoothness must be positive and finite, got {self.smoothness}")

    def with_noise(self, noise_std: Range) -> "DegradationConfig":
        """The same with white noise on every sample, (lowest, highest), and no other.

        Example:
            >>> noisy = preset("real_esrgan").with_noise((0.1, 0.1))
            >>> noisy.noise_std, noisy.white_fraction, noisy.shot_fraction
            ((0.1, 0.1), 1.0, 0.0)
        """
        return replace(self, noise_std=noise_std, white_fraction=1.0, shot_fraction=0.0)


def _are_two(value: Any) -> bool:
    return hasattr(value, "__len__") and len(value) == 2


PRESETS = ("paper", "low_light", "kair", "srmd", "bsrgan", "real_esrgan")


def preset(name: str, scale: int = 1) -> DegradationConfig:
    """The settings of a paper.

    What is drawn is the paper's; where the blur varies over the image (`spatial`), kernels drawn like that
    are mixed, which none but the first did. Resizing and JPEG are not part of it.

    ============= ============================================================================================
    "paper"       DDRF-Net, eq. 1-3: of motion, isotropic and anisotropic Gaussian blur one kernel each, mixed
                  with random weights; white noise up to 25/255 (its strength is not in the paper).
    "low_light"   The same, and half of the images dark, as by Lv, Li and Lu (IJCV 2021), with less contrast:
                  the paper's dark scenes.
    "kair"        KAIR and USRNet (Zhang et al., CVPR 2020): one of twelve kernels, circular padding; white
                  noise up to 25/255 on eight of nine.
    "srmd"        SRMD (Zhang et al., CVPR 2018): anisotropic Gaussians, replicate padding, white noise up to
                  75/255.
    "bsrgan"      BSRGAN (Zhang et al., ICCV 2021): one blur; white noise of 2/255 to 25/255, 40 % of it gray.
                  (Its 20 % of noise with correlated channels are independent here.)
    "real_esrgan" Real-ESRGAN (Wang et al., ICCVW 2021), the first of two stages: blur, sinc filters; either
                  white noise of 1/255 to 30/255 or shot noise, 40 % of both gray. (Its gray shot noise is
                  that of the gray image; here each channel scales it by its own signal.)
    ============= ============================================================================================

    Args:
        name: one of these.
        scale: of the down-sampling; BSRGAN blurs more for more.

    Raises:
        ValueError: there is no such preset.

    Example:
        >>> preset("srmd", scale=2).kernels
        SRMDKernels()
    """
    if name == "paper":
        return DegradationConfig(KernelBank.default(), num_mixed=3, scale=scale)
    if name == "low_light":
        return replace(preset("paper", scale), dark_fraction=0.5)
    if name == "kair":
        return DegradationConfig(KernelBank.kair(), white_fraction=8 / 9, padding="circular", scale=scale)
    if name == "srmd":
        return DegradationConfig(SRMDKernels(), noise_std=(0.0, 75 / 255), padding="replicate", scale=scale)
    if name == "bsrgan":
        return DegradationConfig(
            BSRGANKernels(scale), noise_std=(2 / 255, 25 / 255), gray_fraction=0.4, scale=scale
        )
    if name == "real_esrgan":
        # Its Poisson noise counts 256 photons in white and is scaled by 0.05 to 3: a deviation of scale / 16.
        return DegradationConfig(
            RealESRGANKernels(),
            noise_std=(1 / 255, 30 / 255),
            shot_std=(0.05 / 16, 3 / 16),
            white_fraction=0.5,
            shot_fraction=0.5,
            gray_fraction=0.4,
            scale=scale,
        )
    raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
