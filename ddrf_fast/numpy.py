"""degrade for NumPy arrays: the same kernels without torch, for data-loader workers.

An image is read where it lies (any strides, no copy), the work runs on the calling thread without the GIL,
and the result has the image's dtype. uint8 and uint16 stand for [0, 1] in steps of 1/255 and 1/65535.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from ddrf_fast import _numpy
except ImportError as error:
    raise ImportError(
        f"ddrf_fast.numpy needs the compiled module ddrf_fast._numpy, which could not be imported ({error}); "
        "reinstall ddrf_fast with a C++ compiler"
    ) from error

__all__ = ["degrade"]

Padding = Literal["reflect", "replicate", "circular", "zeros", "valid"]
_PADDINGS: tuple[Padding, ...] = get_args(Padding)
_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))


def _image(image: Any) -> NDArray[Any]:
    """[H, W, C] of a dtype and with strides that the kernels read."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a NumPy array, got {type(image).__name__}")
    if image.dtype.newbyteorder("=") not in _DTYPES:
        raise TypeError(f"image must be uint8, uint16 or float32, got {image.dtype}")
    if image.ndim not in (2, 3):
        raise ValueError(f"image must be [H, W] or [H, W, C], got shape {image.shape}")
    if not image.dtype.isnative or not image.flags.aligned or any(s % image.itemsize for s in image.strides):
        image = image.astype(image.dtype.newbyteorder("="))
    return image if image.ndim == 3 else image[:, :, None]


def _floats(name: str, value: ArrayLike) -> NDArray[np.float32]:
    """float32, finite and dense."""
    try:
        array = np.asarray(value, dtype=np.float32, order="C")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of numbers: {error}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} values that are not")
    return array


def _integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not minimum <= value < 2**63:
        raise ValueError(f"{name} must be at least {minimum} and below 2^63, got {value}")
    return int(value)


def _weights_at(
    shape: tuple[int, ...], num_kernels: int, size: tuple[int, ...], out_size: tuple[int, ...], grid: bool
) -> str:
    """Which of the four forms the weights have."""
    if shape[:1] == (num_kernels,):
        if grid and len(shape) == 3 and min(shape) > 0:
            return "grid"
        if not grid and len(shape) == 1:
            return "sample"
        if not grid and shape[1:] == out_size:
            return "output"
        if not grid and shape[1:] == size:
            return "image"
    m = num_kernels
    forms = [f"[{m}]", *(f"[{m}, {h}, {w}]" for h, w in dict.fromkeys((size, out_size)))]
    expected = f"[{m}, gh, gw]" if grid else " or ".join(forms)
    raise ValueError(f"weights must be {expected} with grid={grid}, got shape {shape}")


def degrade(
    image: NDArray[Any],
    kernels: ArrayLike,
    weights: ArrayLike,
    *,
    scale: int = 1,
    offset: int = 0,
    noise_std: float | ArrayLike = 0.0,
    seed: int | None = None,
    sample_id: int = 0,
    gray_noise: bool = False,
    shot_noise: float = 0.0,
    padding: Padding = "reflect",
    correlation: bool = False,
    grid: bool = False,
) -> NDArray[Any]:
    """Blurs each pixel with its own mix of kernels, down-samples and adds noise: one image.

        out[y, x, c] = sum_{u,v} (sum_m weights[m, Y, X] kernels[m, u, v]) image[Y - u, X - v, c]
                       + sqrt(shot_noise max(S, 0) + noise_std^2) n,
        (Y, X) = (scale y + offset, scale x + offset), S the sum

    Eq. 1-3 of the DDRF-Net paper, in the gather model. The numbers are those of `ddrf_fast.degrade` on the
    CPU for the float32 image [C, H, W] (integers divided by their maximum), bit by bit before rounding.

    Args:
        image: Array[H, W] or Array[H, W, C] of uint8, uint16 or float32 (any range). Strides are free.
        kernels: Array[M, k, k], k odd, computed with in float32. They are not normalised.
        weights: How much of each kernel: [M] for the whole image, [M, H, W] per pixel of the image,
            [M, H', W'] per pixel of the output, or with `grid=True` a coarse [M, gh, gw], interpolated
            bilinearly over the image, corner on corner. Kernels come first, as in torch.
        scale: Down-sampling factor s, at least 1.
        offset: First site, from 0.
        noise_std: Standard deviation of white Gaussian noise, a number or Array[H', W'], in units of the full
            range: 5 / 255 is five grey levels of a uint8 image. 0 is no noise.
        seed: From 0 to 2^63 - 1. None takes a fresh one from the operating system, so that the workers of a
            data loader never share one.
        sample_id: The image's identity, e.g. its place in the data set; the noise depends on it and the seed.
        gray_noise: Whether all channels have the same noise.
        shot_noise: Variance of the photons' noise where the image is at full range; the variance of all noise
            is shot_noise S + noise_std^2 for the blurred image S, 0 where S is negative.
        padding: "reflect" (without repeating the edge), "replicate", "circular", "zeros", or "valid" (sites
            where the kernel fits only; the first one is `offset` + k // 2).
        correlation: Flips the kernels: cross-correlation, as in OpenCV and kornia.
        grid: Whether `weights` is a coarse grid.

    Returns:
        Array[H', W'] or Array[H', W', C] of the image's dtype, H' = ceil((H - offset) / scale). Integers are
        clipped and rounded to the nearest, ties to even.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape or a value does not fit; the message names it.

    Example:
        >>> import numpy as np
        >>> import ddrf_fast.numpy
        >>> image = np.full((64, 48, 3), 128, dtype=np.uint8)
        >>> kernels = np.full((2, 5, 5), 1 / 25)
        >>> ddrf_fast.numpy.degrade(image, kernels, [0.5, 0.5], scale=4)[0, 0]
        array([128, 128, 128], dtype=uint8)
    """
    pixels = _image(image)
    kernels, weights = _floats("kernels", kernels), _floats("weights", weights)
    if (
        kernels.ndim != 3
        or kernels.shape[1] != kernels.shape[2]
        or kernels.shape[2] % 2 == 0
        or not len(kernels)
    ):
        raise ValueError(
            f"kernels must be [M, k, k] with an odd k and M at least 1, got shape {kernels.shape}"
        )
    scale, offset = _integer("scale", scale, 1), _integer("offset", offset, 0)
    if padding not in _PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(_PADDINGS)}, got {padding!r}")

    size = pixels.shape[:2]
    radius = kernels.shape[2] // 2
    limit = {"reflect": radius + 1, "circular": radius, "valid": 2 * radius + 1}.get(padding, 1)
    if min(size) < max(limit, 1):
        raise ValueError(
            f"image of {size[0]}x{size[1]} is too small for padding={padding!r} with kernels of "
            f"{kernels.shape[2]}x{kernels.shape[2]}: each side must be at least {max(limit, 1)}"
        )
    scale = min(scale, max(size))  # a larger one keeps the same site
    sites, first, kernel_padding = size, offset, padding
    if padding == "valid":  # the kernel fits at the sites r .. H-1-r only, and reads nothing outside
        sites, first, kernel_padding = (size[0] - radius, size[1] - radius), offset + radius, "zeros"
    if first >= min(sites):
        raise ValueError(f"offset must be below {min(sites) - first + offset}, got {offset}")
    out_size = ((sites[0] - first + scale - 1) // scale, (sites[1] - first + scale - 1) // scale)
    weights_at = _weights_at(weights.shape, len(kernels), size, out_size, grid)

    std = _floats("noise_std", noise_std)
    if std.shape not in ((), out_size):
        raise ValueError(f"noise_std must be a number or [H', W'] = {out_size}, got shape {std.shape}")
    if (std < 0).any():
        raise ValueError(f"noise_std must not be negative, got {std.min():g}")
    shot = _floats("shot_noise", shot_noise)
    if shot.shape != () or shot < 0:
        raise ValueError(f"shot_noise must be a number and not negative, got {shot_noise!r}")
    if not isinstance(gray_noise, (bool, np.bool_)):
        raise TypeError(f"gray_noise must be a bool, got {gray_noise!r}")
    noisy = bool(std.any() or shot > 0)
    if seed is None:
        seed = int(np.random.default_rng().integers(2**63 - 1)) if noisy else 0
    result = _numpy.degrade(
        pixels,
        kernels,
        weights,
        std if noisy else None,
        _integer("seed", seed, 0),
        _integer("sample_id", sample_id, 0),
        bool(gray_noise),
        float(shot),
        scale,
        first,
        *out_size,
        kernel_padding,
        bool(correlation),
        weights_at,
    )
    return result if image.ndim == 3 else result[:, :, 0]
