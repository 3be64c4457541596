"""Weights of mixtures that are uniform on the simplex, at one point or as a smooth field over the image.

The field is uniform on the simplex at every node of a coarse grid, and so is the single mixture: both are

    e_f = -log Φ(z_f),   w = e / Σ_f e_f

with standard normal z_f, since -log Φ(z) is exponentially distributed and normalised exponentials are uniform
on the simplex. The field has a smooth Gaussian field for each z_f; interpolation between nodes stays on the
simplex.
"""

import torch
from torch import Tensor


def simplex(normal: Tensor) -> Tensor:
    """Tensor[B, N, ...] of standard normal numbers -> weights over N, uniform on the simplex."""
    exponential = -torch.special.log_ndtr(normal)
    return exponential / exponential.sum(1, keepdim=True)


def correlated(white: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """White noise Tensor[..., gh, gw] as a smooth field; `rows` and `columns` are those of `smoothing`.

    R W C, by products and sums: MKL's matrix products may hang in a forked worker of a data loader.
    """
    across = (white.unsqueeze(-1) * columns).sum(-2)
    return (rows.unsqueeze(-1) * across.unsqueeze(-3)).sum(-2)


def smoothing(nodes: int, smoothness: float) -> Tensor:
    """The symmetric matrix that turns white noise on a line of nodes into a smooth field of unit variance.

    The square root of the covariance exp(-d² / 2ℓ²), d the distance of two nodes where the line's length is
    1; float64 Tensor[nodes, nodes].

    Args:
        nodes: of the grid along one axis.
        smoothness: ℓ, the correlation length as a part of the image's side.
    """
    position = torch.linspace(0, 1, nodes, dtype=torch.float64)
    covariance = torch.exp(-0.5 * ((position[:, None] - position) / smoothness).square())
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT
