"""How much information an image holds, and shares with others: EN and MI. Neither is differentiable."""

import math

import torch
from torch import Tensor

from ddrf_fast.metrics._images import Convention, check_convention, grey_levels, prepare


def entropy(image: Tensor) -> Tensor:
    r"""EN, the entropy of the grey values.

    .. math:: EN = -\sum_{i=0}^{255} p_i \log_2 p_i

    with :math:`p_i` the share of pixels of grey value i, values rounded to whole ones. The same in every
    convention for images of 8 bit. Shannon, *A mathematical theory of communication* (1948).

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].

    Returns:
        Tensor[B], bits in [0, 8]; higher is usually read as better, though noise raises it, too. Not
        differentiable.

    Example:
        >>> entropy(torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8))
        tensor([1.], dtype=torch.float64)
    """
    (image,) = prepare(image)
    return _entropy_of(grey_levels(image), 256, image.dtype)


def mutual_information(
    image: Tensor, reference: Tensor, *references: Tensor, convention: Convention = "standard"
) -> Tensor:
    r"""MI, what the image tells of its references, summed over them.

    .. math:: MI = \sum_k H(F) + H(X_k) - H(F, X_k)

    of 256 grey values each. Qu, Zhang and Yan, *Information measure for performance of image fusion*
    (Electronics Letters, 2002).

    ============== ==============================================================
    convention
    ============== ==============================================================
    standard, tang bits
    cddfuse        nats (ln instead of log2)
    vifb           nats, each image first stretched to the whole range 0..255
    ============== ==============================================================

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].
        reference: the same shape.
        references: more of them.
        convention: see above.

    Returns:
        Tensor[B], at least 0, higher is better. Not differentiable.

    Raises:
        ValueError: also where the convention is unknown.

    Example:
        >>> image = torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8)
        >>> mutual_information(image, image)
        tensor([1.], dtype=torch.float64)
    """
    check_convention(convention)
    image, *others = prepare(image, reference, *references)
    if convention == "vifb":
        image, *others = (_stretch(values) for values in (image, *others))
    levels = grey_levels(image)
    total = image.new_zeros(len(image))
    for reference in others:
        reference_levels = grey_levels(reference)
        joint = _entropy_of(levels * 256 + reference_levels, 256 * 256, image.dtype)
        total = total + _entropy_of(reference_levels, 256, image.dtype) - joint
    total = total + len(others) * _entropy_of(levels, 256, image.dtype)
    return total * math.log(2) if convention in ("vifb", "cddfuse") else total


def _entropy_of(symbols: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The entropy in bits of each sample's symbols, which are in [0, count)."""
    batch = len(symbols)
    first = torch.arange(batch, device=symbols.device) * count
    histogram = torch.bincount((symbols.flatten(1) + first[:, None]).flatten(), minlength=batch * count)
    probability = histogram.view(batch, count).to(dtype) / symbols.shape[-2:].numel()
    return torch.special.entr(probability).sum(1) / math.log(2)


def _stretch(image: Tensor) -> Tensor:
    """Each sample to [0, 255] by its own least and largest value; 0 where they are equal."""
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return torch.where(high > low, (image - low) * 255 / (high - low), 0.0)
