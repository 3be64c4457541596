"""Counter-based Gaussian noise in plain torch: Philox 4x32-10 and Box-Muller.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). A pixel's noise depends on
the seed, its sample id, its channel and its place in the output only, so it is the same on every backend, for
every split of the batch and for any number of threads or ranks.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32-bit product; in halves, because int64 is signed."""
    low_half = (a & 0xFFFF) * constant
    high = ((a >> 16) * constant + (low_half >> 16)) >> 16
    return high & _MASK, (a * constant) & _MASK


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Ten rounds of Philox 4x32.

    Args:
        counter: Four int64 tensors of 32-bit values, which broadcast.
        key: Two int64 tensors of 32-bit values.

    Returns:
        Four int64 tensors of 32-bit random values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def standard_normal(
    seed: Tensor,
    sample_ids: Tensor,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    gray: Tensor | None = None,
) -> Tensor:
    """Standard normal noise [B, C, H, W].

    counter = (x // 4, y, c, sample id), key = the seed's two halves. The four outputs serve the pixels x % 4
    = 0..3: two Box-Muller pairs, the cosine for the even pixel and the sine for the odd one.

    Args:
        seed: int64 scalar.
        sample_ids: int64 [B].
        channels: C.
        height: H.
        width: W.
        dtype: float32 or float64, in which the transform is computed; its 24-bit arguments are the same in
            both.
        gray: bool [B], the samples of which every channel has the noise of the first; None: none.
    """
    device = sample_ids.device
    quads = (width + 3) // 4
    channel = torch.arange(channels, device=device)[:, None, None]
    if gray is not None:
        channel = channel * ~gray[:, None, None, None]
    counter = (
        torch.arange(quads, device=device),
        torch.arange(height, device=device)[:, None],
        channel,
        (sample_ids & _MASK)[:, None, None, None],
    )
    bits = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    lanes = []
    for first, second in (bits[:2], bits[2:]):
        radius = torch.sqrt(-2.0 * torch.log(((first >> 8) + 1).to(dtype) * 2.0**-24))
        angle = (2.0 * math.pi) * ((second >> 8).to(dtype) * 2.0**-24)
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :width]
