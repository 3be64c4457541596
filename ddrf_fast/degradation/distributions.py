"""Random blur kernels as restoration papers draw them: a fresh kernel each time, not one of a bank.

`KernelBank` is a distribution, too.
"""

import math

import torch
from torch import Tensor, nn

from ddrf_fast.degradation.kernels import finish, low_pass, squared_distance, within

_SMALLEST_SIGMA = 0.1  # of a Gaussian that is as good as the identity


def _odd_size(uniform: Tensor, smallest: int, largest: int) -> Tensor:
    """An odd number from `smallest` to `largest`, all equally likely."""
    count = (largest - smallest) // 2 + 1
    return smallest + 2 * (uniform * count).long().clamp(max=count - 1)


class KernelDistribution(nn.Module):
    """A distribution of kernels; derive from it for one of your own.

    `forward` turns uniform random numbers Tensor[B, N, num_draws] in [0, 1] into kernels Tensor[B, N, k, k]
    that sum to 1, without looking at a value, so that a GPU never waits.

    Attributes:
        kernel_size: k, odd.
        num_draws: how many numbers a kernel takes.
    """

    kernel_size: int
    num_draws: int


class SRMDKernels(KernelDistribution):
    """The anisotropic Gaussians of SRMD (Zhang et al., CVPR 2018), 15x15.

    The variance along the major axis is uniform in [0.1, 10], the one across it in [0.1, that], the angle in
    [0, π]: the ranges of its training code.

    Example:
        >>> SRMDKernels()(torch.rand(2, 1, 3)).shape
        torch.Size([2, 1, 15, 15])
    """

    kernel_size = 15
    num_draws = 3

    def forward(self, uniform: Tensor) -> Tensor:
        """Tensor[B, N, 3] in [0, 1] -> Tensor[B, N, 15, 15]"""
        major = 0.1 + 9.9 * uniform[..., 0].float()
        minor = 0.1 + (major - 0.1) * uniform[..., 1].float()
        q = squared_distance(major.sqrt(), minor.sqrt(), math.pi * uniform[..., 2].float(), self.kernel_size)
        return finish(torch.exp(-0.5 * q))


class BSRGANKernels(KernelDistribution):
    """The blur of BSRGAN (Zhang et al., ICCV 2021) for down-sampling by `scale`; sizes 7x7 to 25x25.

    Half are isotropic Gaussians of a standard deviation uniform in [0, 2 + 0.2 scale], half anisotropic with
    two variances uniform in [0, 4 + scale]. (BSRGAN blurs twice, and with both kinds; this is one of them.)

    Example:
        >>> BSRGANKernels(scale=4)(torch.rand(2, 1, 5)).shape
        torch.Size([2, 1, 25, 25])
    """

    kernel_size = 25
    num_draws = 5

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, uniform: Tensor) -> Tensor:
        """Tensor[B, N, 5] in [0, 1] -> Tensor[B, N, 25, 25]"""
        kind, size, first, second, turn = uniform.float().unbind(-1)
        isotropic = kind < 0.5
        sigma = (2 + 0.2 * self.scale) * first
        major = torch.where(isotropic, sigma, ((4 + self.scale) * first).sqrt()).clamp(min=_SMALLEST_SIGMA)
        minor = torch.where(isotropic, sigma, ((4 + self.scale) * second).sqrt()).clamp(min=_SMALLEST_SIGMA)
        kernel = torch.exp(-0.5 * squared_distance(major, minor, math.pi * turn, self.kernel_size))
        inside = within(_odd_size(size, 7, self.kernel_size), self.kernel_size)
        return finish(torch.where(inside, kernel, 0.0))


class RealESRGANKernels(KernelDistribution):
    """The first blur of Real-ESRGAN (Wang et al., ICCVW 2021), x4plus: sizes 7x7 to 21x21.

    A tenth are sinc filters. Of the others 45 % are isotropic and 25 % anisotropic Gaussians, 12 % and 3 %
    generalised Gaussians, 12 % and 3 % plateaus; standard deviations are uniform in [0.2, 3].

    Example:
        >>> RealESRGANKernels()(torch.rand(2, 1, 7)).shape
        torch.Size([2, 1, 21, 21])
    """

    kernel_size = 21
    num_draws = 7

    def forward(self, uniform: Tensor) -> Tensor:
        """Tensor[B, N, 7] in [0, 1] -> Tensor[B, N, 21, 21]"""
        kind, size, first, second, turn, half, shape = uniform.float().unbind(-1)
        sinc = kind < 0.1
        kind = (kind - 0.1) / 0.9
        plateau = kind >= 0.85
        generalized = (kind >= 0.7) & ~plateau
        isotropic = (kind < 0.45) | (generalized & (kind < 0.82)) | (plateau & (kind < 0.97))

        major = 0.2 + 2.8 * first
        minor = torch.where(isotropic, major, 0.2 + 2.8 * second)
        # Half below 1 and half above; a plateau's is not below.
        low = torch.where(plateau, 1.0, 0.5 + 0.5 * shape)
        high = 1 + torch.where(plateau, 1.0, 3.0) * shape
        beta = torch.where(plateau | generalized, torch.where(half < 0.5, low, high), 1.0)
        q = squared_distance(major, minor, math.pi * (2 * turn - 1), self.kernel_size)
        q = q.pow(beta[..., None, None])
        kernel = torch.where(plateau[..., None, None], 1 / (1 + q), torch.exp(-0.5 * q))

        sizes = _odd_size(size, 7, self.kernel_size)
        lowest = torch.where(sizes < 13, math.pi / 3, math.pi / 5)
        cutoff = lowest + (math.pi - lowest) * first
        kernel = torch.where(sinc[..., None, None], low_pass(cutoff, self.kernel_size), kernel)
        return finish(torch.where(within(sizes, self.kernel_size), kernel, 0.0))
