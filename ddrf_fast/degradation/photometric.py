"""What darkness does to an image before the optics and the sensor see it: less contrast, less light."""

import torch
from torch import Tensor


def reduce_contrast(image: Tensor, factor: Tensor) -> Tensor:
    """Draws the values of each image towards their mean: mean + factor (image - mean).

    Args:
        image: Tensor[B, C, H, W].
        factor: Tensor[B]; 1 changes nothing, 0 leaves the mean.

    Example:
        >>> reduce_contrast(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([0.5]))
        tensor([[[[0.2500, 0.7500]]]])
    """
    mean = image.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, image, factor.to(image)[:, None, None, None])


def low_light(image: Tensor, gamma: Tensor, gain: Tensor) -> Tensor:
    """A dark scene: gain image^gamma, after Lv, Li and Lu (IJCV 2021).

    They simulate beta (alpha image)^gamma with gamma in [1.5, 5], beta in [0.5, 1] and alpha in [0.9, 1];
    here one gain stands for both factors.

    Args:
        image: Tensor[B, C, H, W] in [0, 1]; what is below 0 counts as 0.
        gamma: Tensor[B]; 1 changes nothing, more darkens.
        gain: Tensor[B]; likewise, less darkens.

    Example:
        >>> low_light(torch.tensor([[[[0.5, 1.0]]]]), torch.tensor([2.0]), torch.tensor([0.8]))
        tensor([[[[0.2000, 0.8000]]]])
    """
    gamma, gain = (value.to(image)[:, None, None, None] for value in (gamma, gain))
    return gain * image.clamp(min=0) ** gamma
