"""Quality measures of fused and restored images by the most usual definitions, as batched torch functions.

Fusion papers print "SSIM" or "PSNR" by definitions that differ several times on the same image; here each
function says which one it is. They agree in what they take and give:

- An image is Tensor[B, 1, H, W], or Tensor[H, W] for a batch of one; all images of a call have one shape.
  Floating values are in [0, 1], integer values in [0, 255]. Colour images are measured on their luminance
  (:func:`ddrf_fast.data.rgb_to_ycbcr`).
- The result is Tensor[B], one value for each image; a data set's figure is the mean over its images.
- Inside, values are in [0, 255]. float32, float16 and bfloat16 images are computed in float32, uint8 and
  float64 images in float64; autocast changes nothing.
- ValueError or TypeError names an image of another shape, dtype or range.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy(image: Tensor) -> Tensor:
    """EN, the entropy of the grey values in bits: -Σ p log2 p over 256 bins, values rounded to whole ones.

    Example:
        >>> entropy(torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8))
        tensor([1.], dtype=torch.float64)
    """
    (image,) = _prepare(image)
    return _entropy_of(_grey_levels(image), 256, image.dtype)


def average_gradient(image: Tensor) -> Tensor:
    """AG, the mean of sqrt((Gx² + Gy²) / 2), by central differences (at the border one-sided).

    Forward differences, which many papers print, give about 30 % more.

    Raises:
        ValueError: also where the image has fewer than 2 rows or columns.

    Example:
        >>> average_gradient(torch.tensor([[0, 30, 60, 90]] * 3, dtype=torch.uint8))
        tensor([21.2132], dtype=torch.float64)
    """
    (image,) = _prepare(image, smallest=2)
    vertical, horizontal = torch.gradient(image, dim=(-2, -1))
    return ((vertical.square() + horizontal.square()) / 2).sqrt().mean((1, 2, 3))


def spatial_frequency(image: Tensor) -> Tensor:
    """SF, sqrt(RF² + CF²): squared differences of neighbours in rows and columns, their sum over H·W.

    Eskicioglu and Fisher, *Image quality measures and their performance* (IEEE Trans. Communications, 1995).
    """
    (image,) = _prepare(image)
    rows = image.diff(dim=-1).square().sum((1, 2, 3))
    columns = image.diff(dim=-2).square().sum((1, 2, 3))
    return ((rows + columns) / image.shape[-2:].numel()).sqrt()


def standard_deviation(image: Tensor) -> Tensor:
    """SD of the values, divided by H·W rather than by one less."""
    (image,) = _prepare(image)
    deviation = image - image.mean((1, 2, 3), keepdim=True)
    return deviation.square().mean((1, 2, 3)).sqrt()


def mutual_information(image: Tensor, reference: Tensor, *references: Tensor) -> Tensor:
    """MI in bits, summed over the references: H(image) + H(reference) - H(both), of 256 bins each.

    Qu, Zhang and Yan, *Information measure for performance of image fusion* (Electronics Letters, 2002).
    """
    image, *others = _prepare(image, reference, *references)
    levels = _grey_levels(image)
    total = image.new_zeros(len(image))
    for reference in others:
        reference_levels = _grey_levels(reference)
        joint = _entropy_of(levels * 256 + reference_levels, 256 * 256, image.dtype)
        total = total + _entropy_of(reference_levels, 256, image.dtype) - joint
    return total + len(others) * _entropy_of(levels, 256, image.dtype)


def psnr(image: Tensor, reference: Tensor, *references: Tensor) -> Tensor:
    """PSNR in decibels over the mean of the references' mean squared errors: 10 log10(255² / MSE).

    With one reference, the usual PSNR of a restored image. Infinite where image and references are equal.

    Example:
        >>> image, reference = torch.zeros(4, 4), torch.full((4, 4), 0.1)
        >>> psnr(image, reference)
        tensor([20.])
    """
    image, *others = _prepare(image, reference, *references)
    errors = [(image - other).square().mean((1, 2, 3)) for other in others]
    return 10 * torch.log10(255**2 / torch.stack(errors).mean(0))


def ssim(image: Tensor, reference: Tensor, *references: Tensor) -> Tensor:
    """Structural similarity, averaged over the references.

    As in Wang, Bovik, Sheikh and Simoncelli, *Image quality assessment: from error visibility to structural
    similarity* (IEEE Trans. Image Processing, 2004): Gaussian window of 11x11 with sigma 1.5, windows that
    lie wholly in the image, L = 255, K = (0.01, 0.03), biased variances.

    Raises:
        ValueError: also where the image is smaller than 11x11.

    Example:
        >>> image = torch.rand(2, 1, 16, 16)
        >>> ssim(image, image)
        tensor([1., 1.])
    """
    image, *others = _prepare(image, reference, *references, smallest=11)
    window = _gaussian_window(11, 1.5, image)
    return torch.stack([_ssim(image, other, window) for other in others]).mean(0)


def vif(image: Tensor, reference: Tensor, *references: Tensor) -> Tensor:
    """Visual information fidelity in the pixel domain (VIFp), summed over the references.

    Sheikh and Bovik, *Image information and visual quality* (IEEE Trans. Image Processing, 2006), in the
    multi-scale pixel-domain version of its authors: four scales with Gaussian windows of 17, 9, 5 and 3
    pixels and a fifth of it as sigma, noise variance 2. This is what fusion papers call VIF; it is not Han's
    VIFF. A reference without any structure gives 1.

    Raises:
        ValueError: also where the image is smaller than 41x41.
    """
    image, *others = _prepare(image, reference, *references, smallest=41)
    return torch.stack([_vif(image, other) for other in others]).sum(0)


def qabf(fused: Tensor, visible: Tensor, infrared: Tensor) -> Tensor:
    """Q^{AB/F}, how much of the sources' edges the fused image keeps, in [0, 1].

    Xydeas and Petrovic, *Objective image fusion performance measure* (Electronics Letters, 2000): Sobel
    edges, of which strength and orientation are compared and weighted by the source's strength. The constants
    are the usual ones; the border is replicated and orientations are compared without wrapping round, as most
    published code does. Sources without any edge give 1.
    """
    fused, *sources = _prepare(fused, visible, infrared, names=_FUSION)
    strength_fused, orientation_fused = _edges(fused)
    kept = fused.new_zeros(len(fused))
    total = fused.new_zeros(len(fused))
    for source in sources:
        strength, orientation = _edges(source)
        larger = torch.maximum(strength, strength_fused)
        ratio = torch.where(larger > 0, torch.minimum(strength, strength_fused) / larger, 1.0)
        alignment = 1 - (orientation - orientation_fused).abs() / (math.pi / 2)
        quality = 0.9994 * torch.sigmoid(15 * (ratio - 0.5)) * 0.9879 * torch.sigmoid(22 * (alignment - 0.8))
        kept = kept + (quality * strength).sum((1, 2, 3))
        total = total + strength.sum((1, 2, 3))
    return torch.where(total > 0, kept / total, 1.0)


_FUSION = ("fused", "visible", "infrared")

STANDARD: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "EN": lambda fused, visible, infrared: entropy(fused),
    "AG": lambda fused, visible, infrared: average_gradient(fused),
    "SSIM": ssim,
    "VIF": vif,
    "PSNR": psnr,
    "Qabf": qabf,
    "MI": mutual_information,
    "SF": lambda fused, visible, infrared: spatial_frequency(fused),
    "SD": lambda fused, visible, infrared: standard_deviation(fused),
}
"""The measures of a fused image by their usual names, in the conventions documented at each function."""


def evaluate(fused: Tensor, visible: Tensor, infrared: Tensor) -> dict[str, Tensor]:
    """Every measure in :data:`STANDARD` of fused images against their sources.

    Args:
        fused: Tensor[B, 1, H, W] or Tensor[H, W], in [0, 1] or uint8.
        visible: the same shape.
        infrared: the same shape.

    Returns:
        Name of the measure -> Tensor[B].

    Raises:
        ValueError: the shapes differ, an image is smaller than 41x41, or values are out of range.
        TypeError: an image is no tensor of numbers.

    Example:
        >>> scores = evaluate(*torch.rand(3, 2, 1, 48, 48))
        >>> list(scores), scores["SSIM"].shape
        (['EN', 'AG', 'SSIM', 'VIF', 'PSNR', 'Qabf', 'MI', 'SF', 'SD'], torch.Size([2]))
    """
    _prepare(fused, visible, infrared, smallest=41, names=_FUSION)
    return {name: measure(fused, visible, infrared) for name, measure in STANDARD.items()}


def _prepare(image: Tensor, *others: Tensor, smallest: int = 1, names: Sequence[str] = ()) -> list[Tensor]:
    """Checks the images and gives them as floating Tensor[B, 1, H, W] in [0, 255], all of one dtype."""
    names = names or ("image", *(f"reference {i + 1}" for i in range(len(others))))
    prepared = []
    for name, tensor in zip(names, (image, *others), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be floating or uint8, got {tensor.dtype}")
        shape = list(tensor.shape)
        if not (len(shape) == 2 or (len(shape) == 4 and shape[1] == 1)):
            raise ValueError(f"{name} must be [B, 1, H, W] or [H, W] (colour: its luminance), got {shape}")
        if min(shape[-2:]) < smallest:
            raise ValueError(f"{name} must be at least {smallest}x{smallest} pixels, got {shape}")
        if tensor.shape != image.shape:
            raise ValueError(f"{name} must have the shape of {names[0]}, {list(image.shape)}, got {shape}")
        floating = tensor.is_floating_point()
        values = tensor.to(torch.float32 if floating and tensor.dtype != torch.float64 else torch.float64)
        # Networks overshoot [0, 1] a little; values on another scale are off by a factor of 255 at least.
        lowest, highest = (-1.0, 2.0) if floating else (0.0, 255.0)
        checked = values.numel() > 0 and not torch.compiler.is_compiling()
        if checked and not bool((values.amin() >= lowest) & (values.amax() <= highest)):
            scale = "[0, 1]" if floating else "[0, 255]"
            found = f"{values.min().item():g} to {values.max().item():g}"
            raise ValueError(f"{name} must be in {scale} for {tensor.dtype}, got values from {found}")
        values = values * 255 if floating else values
        prepared.append(values if tensor.ndim == 4 else values[None, None])
    common = torch.float64 if any(values.dtype == torch.float64 for values in prepared) else torch.float32
    return [values.to(common) for values in prepared]


def _grey_levels(image: Tensor) -> Tensor:
    """Whole grey values in [0, 255], int64."""
    return image.round().clamp(0, 255).long()


def _entropy_of(symbols: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The entropy in bits of each sample's symbols, which are in [0, count)."""
    batch = len(symbols)
    first = torch.arange(batch, device=symbols.device) * count
    histogram = torch.bincount((symbols.flatten(1) + first[:, None]).flatten(), minlength=batch * count)
    probability = histogram.view(batch, count).to(dtype) / symbols.shape[-2:].numel()
    return torch.special.entr(probability).sum(1) / math.log(2)


def _gaussian_window(size: int, sigma: float, like: Tensor) -> Tensor:
    """A Gaussian of `size` taps that sum to 1."""
    position = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    window = torch.exp(-0.5 * (position / sigma).square())
    return window / window.sum()


def _filter(image: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Correlation of Tensor[B, 1, H, W] with a separable window, where this lies wholly in the image."""
    with torch.autocast(image.device.type, enabled=False):
        return F.conv2d(F.conv2d(image, vertical.view(1, 1, -1, 1)), horizontal.view(1, 1, 1, -1))


def _moments(first: Tensor, second: Tensor, window: Tensor) -> tuple[Tensor, ...]:
    """Local means, variances and covariance of two images."""
    # In one filter call: the five images go through as samples of a batch.
    stack = torch.cat((first, second, first * first, second * second, first * second))
    mean1, mean2, square1, square2, product = _filter(stack, window, window).chunk(5)
    return mean1, mean2, square1 - mean1 * mean1, square2 - mean2 * mean2, product - mean1 * mean2


def _ssim(image: Tensor, reference: Tensor, window: Tensor) -> Tensor:
    mean1, mean2, variance1, variance2, covariance = _moments(image, reference, window)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean1 * mean2 + c1) / (mean1.square() + mean2.square() + c1)
    structure = (2 * covariance + c2) / (variance1 + variance2 + c2)
    return (luminance * structure).mean((1, 2, 3))


def _vif(image: Tensor, reference: Tensor) -> Tensor:
    noise, tiny = 2.0, 1e-10
    kept = reference.new_zeros(len(reference))
    total = reference.new_zeros(len(reference))
    for size in (17, 9, 5, 3):
        window = _gaussian_window(size, size / 5, image)
        if size != 17:
            image = _filter(image, window, window)[..., ::2, ::2]
            reference = _filter(reference, window, window)[..., ::2, ::2]
        _, _, variance, variance_image, covariance = _moments(reference, image, window)
        variance, variance_image = variance.clamp(min=0), variance_image.clamp(min=0)
        # The image as gain * reference + distortion, with the authors' rules where that has no meaning.
        gain = covariance / (variance + tiny)
        distortion = variance_image - gain * covariance
        flat_reference, flat_image = variance < tiny, variance_image < tiny
        distortion = torch.where(flat_reference, variance_image, distortion)
        distortion = torch.where(flat_image, 0.0, distortion)
        gain = torch.where(flat_reference | flat_image, 0.0, gain)
        variance = torch.where(flat_reference, 0.0, variance)
        distortion = torch.where(gain < 0, variance_image, distortion).clamp(min=tiny)
        gain = gain.clamp(min=0)
        kept = kept + torch.log1p(gain.square() * variance / (distortion + noise)).sum((1, 2, 3))
        total = total + torch.log1p(variance / noise).sum((1, 2, 3))
    return torch.where(total > 0, kept / total, 1.0)


def _edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Strength and orientation (in [-π/2, π/2], y upwards) of the Sobel edges."""
    smooth = torch.tensor([1.0, 2.0, 1.0], dtype=image.dtype, device=image.device)
    slope = torch.tensor([-1.0, 0.0, 1.0], dtype=image.dtype, device=image.device)
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    x, y = _filter(padded, smooth, slope), _filter(padded, -slope, smooth)
    strength = (x.square() + y.square()).sqrt()
    orientation = torch.where(x == 0, math.pi / 2, torch.atan(y / x))
    return strength, orientation
