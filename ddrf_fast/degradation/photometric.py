"""What darkness does to an image before optics and sensor see it: less contrast, less light; and its undoing.

A tone is the gamma, gain and contrast of an image, Tensor[B, 3]: it became
``low_light(reduce_contrast(image, contrast), gamma, gain)``. Ones stand for no darkness.
"""

import torch
from torch import Tensor

TONE_CHANNELS = 3

DARKEST = 1 / 128
"""In parts of the gain. Below, :func:`brighten` goes straight down to 0: the slope of a root has no bound."""


def reduce_contrast(image: Tensor, factor: Tensor, mean: Tensor | None = None) -> Tensor:
    """Draws the values of each image towards their mean: mean + factor (image - mean).

    Args:
        image: Tensor[B, C, H, W].
        factor: Tensor[B]; 1 changes nothing, 0 leaves the mean.
        mean: Tensor[B], to be taken instead.

    Example:
        >>> reduce_contrast(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([0.5]))
        tensor([[[[0.2500, 0.7500]]]])
    """
    mean = image.mean((1, 2, 3)) if mean is None else mean
    mean, factor = (value.to(image)[:, None, None, None] for value in (mean, factor))
    return torch.lerp(mean, image, factor)


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


def brighten(image: Tensor, gamma: Tensor, gain: Tensor) -> Tensor:
    """The scene of which :func:`low_light` makes an image: u max(u, 1/128)^(1 / gamma - 1), u = image / gain.

    Args:
        image: Tensor[B, C, H, W]; it may lie outside of [0, 1].
        gamma: Tensor[B], positive.
        gain: Tensor[B], positive.

    Example:
        >>> brighten(torch.tensor([[[[0.2, 0.8]]]]), torch.tensor([2.0]), torch.tensor([0.8]))
        tensor([[[[0.5000, 1.0000]]]])
    """
    gamma, gain = (value.to(image)[:, None, None, None] for value in (gamma, gain))
    light = image / gain
    return light * light.clamp(min=DARKEST) ** (1 / gamma - 1)


def undo_darkness(image: Tensor, tone: Tensor, mean: Tensor | None = None) -> Tensor:
    """The image before its darkness.

    Args:
        image: Tensor[B, C, H, W].
        tone: Tensor[B, 3], of each image. One whose tone is ones is left as it is.
        mean: Tensor[B], about which contrast comes back; None: that of each image.

    Example:
        >>> bright = torch.tensor([[[[0.2, 0.6]]]])
        >>> gamma, gain, contrast = tone = torch.tensor([[3.0], [0.8], [0.5]])
        >>> undo_darkness(low_light(reduce_contrast(bright, contrast), gamma, gain), tone.mT)
        tensor([[[[0.2000, 0.6000]]]])
    """
    gamma, gain, contrast = tone.unbind(1)
    bright = reduce_contrast(brighten(image, gamma, gain), 1 / contrast, mean)
    return torch.where(is_dark(tone)[:, None, None, None], bright, image)


def joint_mean(channels: Tensor) -> Tensor:
    """The mean of each colour image, Tensor[3 B], for all of its channels, which are Tensor[3 B, 1, H, W].

    Example:
        >>> joint_mean(torch.tensor([0.0, 0.5, 1.0])[:, None, None, None])
        tensor([0.5000, 0.5000, 0.5000])
    """
    return channels.mean((1, 2, 3)).view(-1, 3).mean(1).repeat_interleave(3)


def with_joint_mean(channels: Tensor, contrast: Tensor) -> Tensor:
    """Colour images whose channels :func:`undo_darkness` took one by one, as if it had taken them together.

    The contrast was reduced towards the mean of all channels, and came back about that of each.

    Args:
        channels: Tensor[3 B, 1, H, W].
        contrast: Tensor[3 B], of the tone.
    """
    change = (1 / contrast.to(channels) - 1) * (channels.mean((1, 2, 3)) - joint_mean(channels))
    return channels + change[:, None, None, None]


def is_dark(tone: Tensor) -> Tensor:
    """Which of some tones Tensor[B, 3] are of dark images: bool Tensor[B]."""
    return (tone != 1).any(dim=1)


def as_in_a_file(image: Tensor) -> Tensor:
    """An image in [0, 1] as a file of 8 bit holds it: clipped and rounded."""
    return (image.clamp(0, 1) * 255).round() / 255
