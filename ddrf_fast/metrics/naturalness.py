"""How natural an image looks, without any reference: NIQE."""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ddrf_fast.metrics._images import filter_valid, gaussian_window, prepare

_BLOCK = 96
# Its metadata says where the numbers come from, and on which terms.
_MODEL = Path(__file__).parent.parent / "assets" / "niqe_pristine.safetensors"


def niqe(image: Tensor) -> Tensor:
    r"""NIQE, the distance of an image's statistics from those of natural images. Lower is better.

    .. math:: D = \sqrt{(\mu - \mu_0)^T \Bigl(\frac{\Sigma + \Sigma_0}{2}\Bigr)^{-1} (\mu - \mu_0)}

    with the mean and covariance of 36 features of blocks of 96x96 pixels: how locally normalised values, and
    products of neighbouring ones, are distributed, at full and at half the size. :math:`\mu_0, \Sigma_0` are
    those of 125 pristine images, as LIVE published them. Mittal, Soundararajan and Bovik, *Making a
    "completely blind" image quality analyzer* (IEEE Signal Processing Letters, 2013).

    What does not fill a block is cut off at the right and at the bottom. Few blocks make a noisy figure: the
    covariance of fewer than 37 is singular, so that images under about 0.4 megapixels are better compared in
    the mean over many. Infrared images and fused ones are unlike the natural images of the model. Published
    code differs in the luminance that it takes; the BT.601 luma in full range is meant here (MATLAB's is in
    16..235, and gives slightly other figures).

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].

    Returns:
        Tensor[B], at least 0, 2 to 6 for photographs; NaN where the image has no structure. Computed in
        float64. Not differentiable.

    Raises:
        ValueError: also where the image has not two whole blocks (at least 96x192 pixels).

    Example:
        >>> noise = torch.rand(192, 192, generator=torch.Generator().manual_seed(0))
        >>> bool(niqe(noise) > 10)
        True
    """
    (image,) = prepare(image, names=("image",))
    rows, columns = (size // _BLOCK for size in image.shape[-2:])
    if rows * columns < 2:
        raise ValueError(
            f"image must hold two blocks of {_BLOCK}x{_BLOCK} pixels, got {list(image.shape)} for NIQE"
        )
    values = image.detach().double().round()[..., : rows * _BLOCK, : columns * _BLOCK]
    full = _features(_normalised(values), _BLOCK)
    half = _features(_normalised(_halved(values)), _BLOCK // 2)
    features = torch.cat((full, half), dim=-1)
    scores = [_distance(blocks) for blocks in features]
    return torch.stack(scores).to(image.dtype) if scores else image.new_zeros(0)


def _distance(features: Tensor) -> Tensor:
    """From the pristine model, of the features Tensor[blocks, 36] of an image."""
    pristine_mean, pristine_covariance = (values.to(features.device) for values in _pristine())
    complete = features[~features.isnan().any(dim=1)]
    if len(complete) < 2:
        return features.new_tensor(torch.nan)
    difference = pristine_mean - features.nanmean(dim=0)
    inverse = torch.linalg.pinv((pristine_covariance + complete.mT.cov()) / 2)
    return (difference @ inverse @ difference).sqrt()


@lru_cache(maxsize=1)
def _pristine() -> tuple[Tensor, Tensor]:
    model = load_file(_MODEL)
    return model["mean"], model["covariance"]


def _normalised(image: Tensor) -> Tensor:
    """(image - local mean) / (local deviation + 1), Gaussian windows of 7x7 with sigma 7/6."""
    window = gaussian_window(7, 7 / 6, image)
    padded = F.pad(image, (3, 3, 3, 3), mode="replicate")
    mean = filter_valid(padded, window, window)
    variance = filter_valid(padded.square(), window, window) - mean.square()
    difference = image - mean
    # Where the image is flat that is rounding alone, whose sign would be counted below.
    difference = torch.where(difference.abs() < 1e-6, 0.0, difference)
    return difference / (variance.abs().sqrt() + 1)


def _halved(image: Tensor) -> Tensor:
    """Half the size as MATLAB's ``imresize`` makes it: the cubic of Keys stretched to eight taps."""
    distance = torch.tensor([0.25, 0.75, 1.25, 1.75], dtype=image.dtype, device=image.device)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    taps = torch.where(distance <= 1, near, far)
    taps = torch.cat((taps.flip(0), taps)) / (2 * taps.sum())
    for dim in (-2, -1):  # mirrored with the border itself, which F.pad does not do
        first, last = image.narrow(dim, 0, 3).flip(dim), image.narrow(dim, -3, 3).flip(dim)
        image = torch.cat((first, image, last), dim=dim)
    return filter_valid(image, taps, taps, stride=2)


def _features(normalised: Tensor, block: int) -> Tensor:
    """Tensor[B, blocks, 18] of Tensor[B, 1, H, W], H and W multiples of the block."""
    blocks = normalised.unfold(2, block, block).unfold(3, block, block).flatten(1, 3)
    shape, left, right = _generalised_gaussian(blocks)
    features = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, left, right = _generalised_gaussian(blocks * blocks.roll(shift, dims=(-2, -1)))
        mean = (right - left) * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()
        features += [shape, mean, left, right]
    return torch.stack(features, dim=-1)


def _generalised_gaussian(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape and the two scales of asymmetric generalised Gaussians fitted by moments to Tensor[..., h, w]."""
    values = blocks.flatten(-2)
    squares = values.square()

    def deviation(side: Tensor) -> Tensor:  # NaN where no value lies on that side
        return (torch.where(side, squares, 0.0).sum(-1) / side.sum(-1)).sqrt()

    left, right = deviation(values < 0), deviation(values > 0)
    ratio = left / right
    moment = values.abs().mean(-1).square() / squares.mean(-1)
    wanted = moment * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    shapes = torch.arange(200, 10001, dtype=values.dtype, device=values.device) / 1000
    logarithms = [torch.lgamma(k / shapes) for k in (1, 2, 3)]
    moments = (2 * logarithms[1] - logarithms[0] - logarithms[2]).exp()
    nearest = (moments - wanted[..., None]).abs().argmin(-1)
    shape = torch.where(wanted.isnan(), torch.nan, shapes[nearest])
    scale = ((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2).exp()
    return shape, left * scale, right * scale
