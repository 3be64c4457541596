"""The blind estimator of darkness: guesses from an image's values alone whether it is dark, and how dark."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast.degradation.photometric import TONE_CHANNELS

MOMENTS = 12
NORMS = (4, 8, 16, 32, 64)
FULL_ODDS = 0.25  # log odds from which on darkness is undone in full
BLACK = 1 / 255  # brightness up to which an image holds nothing to bring back; from twice that on, all
HIDDEN = 48  # units of each of the two hidden layers
LIGHT_CHANNELS = 2 * MOMENTS + 1 + len(NORMS)


class ToneEstimator(nn.Module):
    """Small perceptron that predicts the tone of an image: gamma, gain and contrast of its darkness.

    It sees how the values are distributed (moments that tell shadows apart well), how bright the brightest
    parts are (norms), and how contrast is distributed over dark and bright parts. A night scene has its
    lamps, and contrast in the dark; a scene that was darkened has lost the one and hardly kept the other.

    A scene that is merely dark must not be brightened, so an image counts as dark only where the odds are for
    it by far, and where there is something to be seen: black is black. Else its tone is exactly ones. Between
    the two the tone goes over, in a short range of odds, so that the frames of a video do not flash.

    Example:
        >>> ToneEstimator()(torch.rand(2, 1, 40, 50)).shape
        torch.Size([2, 3])
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LIGHT_CHANNELS, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1 + TONE_CHANNELS)
        with torch.no_grad():  # the untrained one takes nothing for dark
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(torch.tensor([-2.0, 1.0, 0.0, 0.0]))

    def forward(self, image: Tensor) -> Tensor:
        """Predicts the tone.

        Args:
            image: Tensor[B, 1, H, W] in [0, 1], H and W even.

        Returns:
            Tensor[B, 3].
        """
        return self.tone(light_means(image))

    def tone(self, means: Tensor) -> Tensor:
        """The tone for the means Tensor[B, 30] of what :func:`light` gives."""
        odds, tone = self.guess(means)
        surely = (odds / FULL_ODDS).clamp(0, 1)
        brightness = means[:, MOMENTS].sqrt().sqrt().to(tone.dtype)  # the norm of order 4
        something = ((brightness - BLACK) / BLACK).clamp(0, 1)
        return torch.lerp(torch.ones_like(tone), tone, (surely * something)[:, None])

    def guess(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """The log odds Tensor[B] that an image is dark, and its tone Tensor[B, 3] if it is."""
        means = means.to(self.first.weight.dtype)
        moments, norms, contrasts = means.split((MOMENTS, len(NORMS), MOMENTS + 1), dim=1)
        norms = torch.log(norms + 1e-6) / means.new_tensor(NORMS)
        contrast = contrasts[:, :1] + 1e-4
        # All of the order of 1.
        known = (4 * moments, norms + 0.5, 4 * contrasts[:, 1:] / contrast, torch.log(contrast) + 4)
        x = F.leaky_relu(self.first(torch.cat(known, dim=1)))
        odds, gamma, gain, contrast = self.head(F.leaky_relu(self.second(x))).unbind(1)
        tone = (1 + 2 * F.softplus(gamma), torch.exp(-F.softplus(gain - 1)), 0.75 + torch.tanh(contrast) / 2)
        return odds, torch.stack(tone, dim=1)


def light(blocks: Tensor) -> Tensor:
    """What the means are taken of, for an image's blocks of 2x2 pixels.

    Chebyshev polynomials 1 to 12 of the fourth root, which spreads shadows; powers 4 to 64; and polynomials 0
    to 12 times the difference from the next block in the row. Of every second row and column of blocks, which
    is enough. The image is taken for a constant: at 0 roots have no gradient.

    Args:
        blocks: Tensor[B, 4, H/2, W/2].

    Returns:
        Tensor[B, 30, H/4, W/4], sizes rounded up, in float32 at least.
    """
    blocks = blocks.detach().to(torch.promote_types(blocks.dtype, torch.float32))
    value = blocks.mean(dim=1).clamp(0, 1)
    difference = F.pad(value.diff(dim=2).abs(), (0, 1))
    value, difference = value[:, None, ::2, ::2], difference[:, None, ::2, ::2]
    order = torch.arange(MOMENTS + 1, dtype=value.dtype, device=value.device).view(-1, 1, 1)
    polynomials = torch.cos(order * torch.acos(2 * value.sqrt().sqrt() - 1))
    powers = [value.square().square()]
    while len(powers) < len(NORMS):
        powers.append(powers[-1].square())
    return torch.cat((polynomials[:, 1:], *powers, polynomials * difference), dim=1)


def light_means(image: Tensor) -> Tensor:
    """The means Tensor[B, 30] of what :func:`light` gives, of images Tensor[B, 1, H, W], H and W even."""
    return light(F.pixel_unshuffle(image, 2)).mean(dim=(2, 3))


def with_tone(code: Tensor, tone: Tensor) -> Tensor:
    """A code that tells the tone, too: Tensor[B, D + 3], or Tensor[B, D + 3, h, w].

    Args:
        code: Tensor[B, D] or a map Tensor[B, D, h, w].
        tone: Tensor[B, 3], gamma, gain and contrast of :mod:`ddrf_fast.degradation.photometric`.
    """
    tone = tone.to(code).reshape(*tone.shape, *[1] * (code.dim() - 2))
    return torch.cat((code, tone.expand(-1, -1, *code.shape[2:])), dim=1)
