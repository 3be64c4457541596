"""Random degradations: kernels, mixtures of them (eq. 2), noise, and codes that tell a network."""

from ddrf_fast.degradation.bank import KernelBank
from ddrf_fast.degradation.codes import KernelPCA
from ddrf_fast.degradation.distributions import (
    BSRGANKernels,
    KernelDistribution,
    RealESRGANKernels,
    SRMDKernels,
)
from ddrf_fast.degradation.enlarge import enlarge
from ddrf_fast.degradation.estimate import estimate_blur
from ddrf_fast.degradation.kernels import (
    anisotropic_gaussian_kernel,
    isotropic_gaussian_kernel,
    motion_kernel,
)
from ddrf_fast.degradation.module import DegradedBatch, DynamicDegradation
from ddrf_fast.degradation.photometric import brighten, low_light, reduce_contrast, undo_darkness
from ddrf_fast.degradation.presets import PRESETS, DegradationConfig, preset
from ddrf_fast.degradation.recipe import Degradation
from ddrf_fast.degradation.refine import refine

__all__ = [
    "PRESETS",
    "BSRGANKernels",
    "Degradation",
    "DegradationConfig",
    "DegradedBatch",
    "DynamicDegradation",
    "KernelBank",
    "KernelDistribution",
    "KernelPCA",
    "RealESRGANKernels",
    "SRMDKernels",
    "anisotropic_gaussian_kernel",
    "brighten",
    "enlarge",
    "estimate_blur",
    "isotropic_gaussian_kernel",
    "low_light",
    "motion_kernel",
    "preset",
    "reduce_contrast",
    "refine",
    "undo_darkness",
]
