"""The random numbers of a degradation: by seed and sample, on any device, in one launch.

They are the noise of `ddrf_fast.degrade` on a black image, so they depend on the seed and the sample's id
alone: not on the batch, its order, the worker or the device, and a GPU computes them without waiting. A
degradation's recipe and its noise have the same seed; the recipe's numbers are drawn with another key.
"""

import torch
from torch import Tensor

from ddrf_fast.ops.degrade import call

_RECIPE = 0x5851F42D4C957F2D  # xor of the noise's seed: Knuth's multiplier, a number without structure


def standard_normal(seed: Tensor, sample_ids: Tensor, count: int) -> Tensor:
    """Independent normal numbers for each sample.

    Args:
        seed: int64 scalar, not negative.
        sample_ids: int64 Tensor[B].
        count: how many for each.

    Returns:
        float64 Tensor[B, count], with the resolution of float32.
    """
    batch = len(sample_ids)
    black = torch.zeros(batch, 1, 1, count, dtype=torch.float32, device=seed.device)
    one = torch.ones(batch, 1, 1, 1, dtype=torch.float32, device=seed.device)
    kernel, weights = one.new_ones(1, 1, 1), one[:, :, 0, 0]
    noise = (one, seed ^ _RECIPE, sample_ids, None, None)
    numbers = call(black, kernel, weights, *noise, 1, 0, (1, count), "zeros", False, "sample")
    return numbers.flatten(1).double()


def uniform(normal: Tensor) -> Tensor:
    """Normal numbers as uniform ones in [0, 1]."""
    return torch.special.ndtr(normal)
