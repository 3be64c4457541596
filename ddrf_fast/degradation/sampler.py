"""Random degradations by the paper's eq. 2: which kernels are mixed, how much of each, how much noise.

For each sample and each family one of the family's kernels is drawn, k_d = a k_m(j) + b k_i(j') + c k_a(j''),
with (a, b, c) uniform on the simplex. (The paper writes one j; drawn for each, the families combine freely.)
Where the blur varies over the image, (a, b, c) is a smooth random field on a coarse grid.

The field is uniform on the simplex at every node, and so is the single draw: both are

    e_f = -log Φ(z_f),   (a, b, c) = e / Σ_f e_f

with standard normal z_f, since -log Φ(z) is exponentially distributed and normalised exponentials are uniform
on the simplex. The field has a smooth Gaussian field for each z_f; interpolation between nodes stays on the
simplex.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddrf_fast.degradation.bank import KernelBank
from ddrf_fast.degradation.codes import KernelPCA


@dataclass(eq=False)
class Degradation:
    """How each image of a batch is degraded: blur, down-sampling and noise (eq. 3).

    Attributes:
        kernels: Tensor[M, k, k], the basis.
        weights: Tensor[B, M], or on a coarse grid over the image Tensor[B, M, gh, gw]; they sum to 1 over M.
        noise_std: Tensor[B], standard deviation of the white noise for images in [0, 1].
        seed: of the noise.
        grid: `weights` is a grid, which is interpolated bilinearly over the image.
        scale: every scale-th row and column is kept.
    """

    kernels: Tensor
    weights: Tensor
    noise_std: Tensor
    seed: int
    grid: bool = False
    scale: int = 1

    def apply(self, image: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Degrades a batch with :func:`ddrf_fast.degrade`.

        Args:
            image: Tensor[B, C, H, W] in [0, 1], floating. The degradation follows it to its device and dtype.
            sample_ids: int64 Tensor[B] that numbers the samples for the noise; by default their place in the
                batch.

        Returns:
            Tensor[B, C, ceil(H / scale), ceil(W / scale)], not clipped: the noise leaves [0, 1].

        Example:
            >>> degradation = DegradationSampler(KernelBank.default(9)).sample(2, generator=0, spatial=True)
            >>> degradation.apply(torch.rand(2, 1, 16, 20)).shape
            torch.Size([2, 1, 16, 20])
        """
        from ddrf_fast.ops.degrade import degrade

        return degrade(
            image,
            self.kernels.to(image),
            self.weights.to(image),
            scale=self.scale,
            noise_std=self.noise_std.to(image),
            seed=self.seed,
            sample_ids=sample_ids,
            grid=self.grid,
        )

    def codes(self, pca: KernelPCA) -> Tensor:
        """The degradation codes that the network is given: the kernel's, then the noise's standard deviation.

        Args:
            pca: the code of kernels, with D components.

        Returns:
            Tensor[B, D + 1], or for a grid a coarse map Tensor[B, D + 1, gh, gw].

        Example:
            >>> sampler = DegradationSampler()
            >>> sampler.sample(2, generator=0, spatial=True).codes(sampler.fit_pca()).shape
            torch.Size([2, 16, 8, 8])
        """
        kernel = pca.encode_weights(self.weights, self.kernels)
        noise = self.noise_std.reshape(-1, *[1] * (kernel.ndim - 1)).expand_as(kernel[:, :1])
        return torch.cat((kernel, noise), dim=1)

    def to(self, device: torch.device | str) -> "Degradation":
        """The same degradation with its tensors on `device`."""
        return replace(
            self,
            kernels=self.kernels.to(device),
            weights=self.weights.to(device),
            noise_std=self.noise_std.to(device),
        )


class DegradationSampler:
    """Draws degradations for batches of images; a few small tensor operations for a whole batch.

    Args:
        bank: the basis kernels; by default :meth:`KernelBank.default`.
        noise_std: (lowest, highest) standard deviation of the noise, for images in [0, 1]; uniform between
            them.
        scale: of the down-sampling, the same for all samples.
        grid_size: (rows, columns) of the grid of a spatially varying degradation.
        smoothness: correlation length of its weights, as a part of the image's side: the larger, the more
            alike they are over the image.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> sampler = DegradationSampler(noise_std=(0.0, 0.1))
        >>> degradation = sampler.sample(3, generator=0)
        >>> degradation.weights.shape, (degradation.weights > 0).sum(1).tolist()
        (torch.Size([3, 12]), [3, 3, 3])
        >>> sampler.sample(3, generator=0, spatial=True).weights.shape
        torch.Size([3, 12, 8, 8])
    """

    def __init__(
        self,
        bank: KernelBank | None = None,
        *,
        noise_std: Sequence[float] = (0.0, 25 / 255),
        scale: int = 1,
        grid_size: Sequence[int] = (8, 8),
        smoothness: float = 0.35,
    ) -> None:
        if len(noise_std) != 2 or not 0 <= noise_std[0] <= noise_std[1]:
            raise ValueError(
                f"noise_std must be (lowest, highest) with 0 <= lowest <= highest, got {noise_std}"
            )
        if scale < 1:
            raise ValueError(f"scale must be at least 1, got {scale}")
        if len(grid_size) != 2 or min(grid_size) < 1:
            raise ValueError(f"grid_size must be two positive numbers, got {grid_size}")
        if not smoothness > 0:
            raise ValueError(f"smoothness must be positive, got {smoothness}")
        self.bank = KernelBank.default() if bank is None else bank
        self.noise_std = (float(noise_std[0]), float(noise_std[1]))
        self.scale = scale
        self.smoothness = smoothness
        self._rows, self._columns = (_smoothing(nodes, smoothness) for nodes in grid_size)

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | int | None = None,
        spatial: bool = False,
    ) -> Degradation:
        """Draws one degradation for each sample of a batch.

        Args:
            batch_size: B.
            generator: where the random numbers come from, or the seed of a new generator; by default torch's.
                The same state gives the same degradation, noise included. A CUDA generator draws on its
                device.
            spatial: let the weights vary over the image; the kernels of a sample are the same everywhere.

        Returns:
            The degradation, on the generator's device (the CPU by default).
        """
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        device = torch.device("cpu") if generator is None else generator.device
        families, per_family = len(self.bank.families), self.bank.per_family
        kernels = self.bank.kernels.to(device)
        first = torch.arange(families, device=device) * per_family
        chosen = first + torch.randint(per_family, (batch_size, families), generator=generator, device=device)
        rows, columns = (self._rows, self._columns) if spatial else (torch.ones(1, 1), torch.ones(1, 1))
        shape = (batch_size, families, len(rows), len(columns))
        white = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
        normal = rows.to(white) @ white @ columns.to(white)
        exponential = -torch.special.log_ndtr(normal)
        mixture = (exponential / exponential.sum(1, keepdim=True)).to(kernels.dtype)
        weights = mixture.new_zeros(batch_size, families * per_family, len(rows), len(columns))
        weights.scatter_(1, chosen[:, :, None, None].expand_as(mixture), mixture)
        low, high = self.noise_std
        noise_std = low + (high - low) * torch.rand(batch_size, generator=generator, device=device)
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        return Degradation(
            kernels=kernels,
            weights=weights if spatial else weights.flatten(1),
            noise_std=noise_std,
            seed=seed,
            grid=spatial,
            scale=self.scale,
        )

    def fit_pca(self, num_components: int = 15, *, samples: int = 4096, seed: int = 0) -> KernelPCA:
        """The code (:class:`KernelPCA`) of the kernels that this sampler draws.

        Args:
            num_components: D.
            samples: how many kernels are drawn to find it.
            seed: of these.
        """
        weights = self.sample(samples, generator=seed).weights.double()
        kernels = torch.einsum("bm,muv->buv", weights, self.bank.kernels.cpu().double())
        return KernelPCA.fit(kernels, num_components)


def _smoothing(nodes: int, smoothness: float) -> Tensor:
    """The symmetric matrix that turns white noise on a line of nodes into a smooth field of unit variance.

    The square root of the covariance exp(-d² / 2ℓ²), d the distance of two nodes where the line's length is
    1.
    """
    position = torch.linspace(0, 1, nodes, dtype=torch.float64)
    covariance = torch.exp(-0.5 * ((position[:, None] - position) / smoothness).square())
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT
