"""Blur kernels, random degradations mixed from them (eq. 2), and codes that describe them to a network."""

from ddrf_fast.degradation.bank import KernelBank
from ddrf_fast.degradation.codes import KernelPCA
from ddrf_fast.degradation.kernels import (
    anisotropic_gaussian_kernel,
    isotropic_gaussian_kernel,
    motion_kernel,
)
from ddrf_fast.degradation.sampler import Degradation, DegradationSampler

__all__ = [
    "Degradation",
    "DegradationSampler",
    "KernelBank",
    "KernelPCA",
    "anisotropic_gaussian_kernel",
    "isotropic_gaussian_kernel",
    "motion_kernel",
]
