"""Degradation codes: what the network is told about a blur kernel, 15 numbers instead of k x k.

The projection follows SRMD (Zhang et al., CVPR 2018): the leading eigenvectors of the second moment E[k kᵀ]
of vectorised kernels, without centring, so that encoding is linear and a mixture of kernels has the mixture
of their codes: P(Σ_m w_m k_m) = Σ_m w_m (P k_m). With a spatially varying blur, the map of codes is thus the
map of weights times the M codes of the basis, and no kernel is ever materialised.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddrf_fast.degradation._storage import load_tensor, save_tensor


@dataclass(frozen=True, eq=False)
class KernelPCA:
    """Linear code of blur kernels.

    Attributes:
        components: Tensor[D, k*k], kernels flattened row by row; orthonormal rows, strongest first. Where the
            kernels span fewer than D dimensions (those mixed from a bank of 12 do), the remaining rows are
            zero.
        energy: the part of the kernels' energy Σ ‖k‖² that the code keeps, in [0, 1].

    Example:
        >>> from ddrf_fast.degradation import KernelBank
        >>> kernels = KernelBank.default().kernels
        >>> pca = KernelPCA.fit(kernels)
        >>> pca.encode_weights(torch.full((2, 12), 1 / 12), kernels).shape
        torch.Size([2, 15])
    """

    components: Tensor
    energy: float

    @property
    def kernel_size(self) -> int:
        """k of the kernels that are encoded."""
        return round(self.components.shape[1] ** 0.5)

    @classmethod
    def fit(cls, kernels: Tensor, num_components: int = 15) -> "KernelPCA":
        """Finds the code that keeps most of the energy of `kernels`.

        The result is the same on every run and device: computed in float64 on the CPU, with the sign of each
        component chosen so that its largest entry is positive.

        Args:
            kernels: Tensor[N, k, k], a sample of those to be encoded.
            num_components: D, at most k*k.

        Returns:
            The code, with components in float32 on the CPU.

        Raises:
            ValueError: the shape is not [N, k, k], a value is not finite, or D is out of range.
        """
        if kernels.ndim != 3 or kernels.shape[0] == 0 or kernels.shape[1] != kernels.shape[2]:
            raise ValueError(f"kernels must be [N, k, k] with N > 0, got {list(kernels.shape)}")
        vectors = kernels.detach().cpu().double().flatten(1)
        if not 1 <= num_components <= vectors.shape[1]:
            raise ValueError(f"num_components must be in [1, {vectors.shape[1]}], got {num_components}")
        if not bool(vectors.isfinite().all()):
            raise ValueError("kernels hold values that are not finite")
        eigenvalues, eigenvectors = torch.linalg.eigh(vectors.mT @ vectors / len(vectors))
        eigenvalues = eigenvalues.flip(0).clamp(min=0)
        components = eigenvectors.mT.flip(0)[:num_components]
        # Directions that no kernel has, up to the rounding of kernels in float32: eigh gives them arbitrary
        # vectors.
        empty = eigenvalues[:num_components] <= torch.finfo(torch.float32).eps ** 2 * eigenvalues[0]
        components = torch.where(empty[:, None], 0.0, components)
        # Mirrored taps of a symmetric component are equal up to rounding: the first of them decides.
        magnitude = components.abs()
        largest = (magnitude >= 0.999 * magnitude.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
        components = components * torch.where(components.gather(1, largest) < 0, -1.0, 1.0)
        kept = eigenvalues[:num_components].sum() / eigenvalues.sum()
        return cls(components.float(), float(kept))

    def encode(self, kernels: Tensor) -> Tensor:
        """Encodes kernels: Tensor[..., k, k] -> Tensor[..., D], in the dtype and on the device of `kernels`.

        Raises:
            ValueError: the kernels have another size than those the code was made for.
        """
        size = self.kernel_size
        if kernels.shape[-2:] != (size, size):
            raise ValueError(f"this code is for kernels of {size}x{size}, got {list(kernels.shape)}")
        return kernels.flatten(-2) @ self.components.to(kernels).mT

    def decode(self, codes: Tensor) -> Tensor:
        """The nearest kernels with these codes: Tensor[..., D] -> Tensor[..., k, k].

        Raises:
            ValueError: the last dimension is not D.
        """
        if codes.shape[-1] != self.components.shape[0]:
            raise ValueError(f"codes must be [..., {self.components.shape[0]}], got {list(codes.shape)}")
        return (codes @ self.components.to(codes)).unflatten(-1, (self.kernel_size, self.kernel_size))

    def encode_weights(self, weights: Tensor, kernels: Tensor) -> Tensor:
        """Encodes mixtures of kernels by their weights, without mixing kernels.

        Args:
            weights: Tensor[B, M], or a map Tensor[B, M, h, w].
            kernels: those that are mixed, Tensor[M, k, k] or for each sample Tensor[B, M, k, k].

        Returns:
            Tensor[B, D] or Tensor[B, D, h, w], in the dtype and on the device of `weights`.

        Raises:
            ValueError: the weights are not for as many kernels as there are, or these have another size.
        """
        m = kernels.shape[-3]
        if weights.ndim not in (2, 4) or weights.shape[1] != m:
            raise ValueError(f"weights must be [B, {m}] or [B, {m}, h, w], got {list(weights.shape)}")
        # Products and sums rather than a matrix product: MKL's may hang in a forked worker of a data loader.
        taps = kernels.to(weights).flatten(-2).unsqueeze(-2)
        codes = (taps * self.components.to(weights)).sum(-1)
        codes = codes.reshape(*codes.shape, *[1] * (weights.ndim - 2))
        return (weights.unsqueeze(2) * codes).sum(1)

    def save(self, path: str | Path) -> None:
        """Writes the code as a safetensors file."""
        save_tensor(path, "components", self.components, energy=repr(self.energy))

    @classmethod
    def load(cls, path: str | Path) -> "KernelPCA":
        """Reads a code that :meth:`save` wrote.

        Raises:
            ValueError: the file is missing, unreadable or holds no kernel code.
        """
        components, metadata = load_tensor(path, "components")
        size = round(components.shape[-1] ** 0.5)
        if components.ndim != 2 or size * size != components.shape[1] or "energy" not in metadata:
            raise ValueError(f"{path}: holds no kernel code: components {list(components.shape)}, {metadata}")
        return cls(components, float(metadata["energy"]))
