"""Families of blur kernels, vectorised over their parameters: the paper's three (eq. 2) and Real-ESRGAN's.

Kernels are `[..., k, k]` with k odd, indexed `[row, column]` and centred at `[k // 2, k // 2]`. Lengths and
sigmas are in pixels (a sigma is a standard deviation, not a variance), angles in radians from the +x axis
(columns, to the right) towards the +y axis (rows, downwards). Every kernel sums to 1, and all but the sinc
are non-negative.
"""

import math

import torch
from torch import Tensor


def motion_kernel(
    length: float | Tensor,
    angle: float | Tensor,
    bend: float | Tensor = 0.0,
    *,
    kernel_size: int = 25,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The blur of a camera that moves at constant speed along a straight line or an arc during the exposure.

    The path is drawn with bilinear (tent) splats of many equal steps, and its centroid sits at the kernel's
    centre, so that the blur does not shift the image.

    Args:
        length: length of the path in pixels, non-negative; 0 gives the identity.
        angle: direction of the path at its middle, radians.
        bend: how far the direction turns from one end to the other, radians; 0 is a straight line.
        kernel_size: k, odd.
        dtype: of the result; computed in float64.

    The three parameters are numbers or tensors that broadcast to a shape `[...]`.

    Returns:
        Tensor[..., k, k]

    Raises:
        ValueError: `kernel_size` is not odd, a length is negative, or a path leaves the kernel.

    Example:
        >>> motion_kernel(2.0, torch.tensor([0.0, torch.pi / 2]), kernel_size=3)[:, 1]
        tensor([[0.2500, 0.5000, 0.2500],
                [0.0000, 0.5000, 0.0000]])
    """
    length, angle, bend = _parameters(length, angle, bend)
    axis = _axis(kernel_size, length.device)
    if bool((length < 0).any()):
        raise ValueError(f"length must not be negative, got {float(length.min()):g}")
    steps = 8 * kernel_size
    # Where along the path each step lies, in (-1/2, 1/2).
    time = (torch.arange(steps, dtype=torch.float64, device=axis.device) + 0.5) / steps - 0.5
    turn = bend[..., None] * time / 2
    # The chord from the middle of the path to `time`; sinc makes the straight line the limit of the arc.
    chord = length[..., None] * time * torch.sinc(turn / math.pi)
    x = chord * torch.cos(angle[..., None] + turn)
    y = chord * torch.sin(angle[..., None] + turn)
    x = x - x.mean(-1, keepdim=True)
    y = y - y.mean(-1, keepdim=True)
    reach = float(torch.maximum(x.abs(), y.abs()).max()) if x.numel() else 0.0
    if reach > kernel_size // 2:
        raise ValueError(
            f"a motion path reaches {reach:.1f} px from its centre and leaves the kernel of "
            f"{kernel_size}x{kernel_size}; "
            f"use a kernel_size of at least {2 * math.ceil(reach) + 1} or a shorter length"
        )
    tent_x = (1 - (axis - x[..., None]).abs()).clamp(min=0)
    tent_y = (1 - (axis - y[..., None]).abs()).clamp(min=0)
    return finish(torch.einsum("...su,...sv->...uv", tent_y, tent_x), dtype)


def isotropic_gaussian_kernel(
    sigma: float | Tensor, *, kernel_size: int = 25, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The Gaussian of one standard deviation in every direction: defocus.

    Args:
        sigma: standard deviation in pixels, positive; a number or Tensor[...].
        kernel_size: k, odd.
        dtype: of the result; computed in float64.

    Returns:
        Tensor[..., k, k]

    Raises:
        ValueError: `kernel_size` is not odd or a sigma is not positive.

    Example:
        >>> isotropic_gaussian_kernel(torch.tensor([0.7, 1.2, 1.6, 2.0])).shape
        torch.Size([4, 25, 25])
    """
    return anisotropic_gaussian_kernel(sigma, sigma, 0.0, kernel_size=kernel_size, dtype=dtype)


def anisotropic_gaussian_kernel(
    sigma_major: float | Tensor,
    sigma_minor: float | Tensor,
    angle: float | Tensor,
    *,
    kernel_size: int = 25,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The Gaussian with a standard deviation of its own along each of two perpendicular axes.

    Args:
        sigma_major: standard deviation along `angle` in pixels, positive.
        sigma_minor: standard deviation across it in pixels, positive.
        angle: direction of the first axis, radians.
        kernel_size: k, odd.
        dtype: of the result; computed in float64.

    The three parameters are numbers or tensors that broadcast to a shape `[...]`.

    Returns:
        Tensor[..., k, k]

    Raises:
        ValueError: `kernel_size` is not odd or a sigma is not positive.

    Example:
        >>> kernel = anisotropic_gaussian_kernel(3.0, 1.0, 0.0)
        >>> bool(kernel[12, 15] > kernel[15, 12])  # wider along x
        True
    """
    sigma_major, sigma_minor, angle = _parameters(sigma_major, sigma_minor, angle)
    for name, sigma in (("sigma_major", sigma_major), ("sigma_minor", sigma_minor)):
        if not bool((sigma > 0).all()):
            raise ValueError(f"{name} must be positive, got {float(sigma.min()):g}")
    return finish(torch.exp(-0.5 * squared_distance(sigma_major, sigma_minor, angle, kernel_size)), dtype)


# ---- The parts, for distributions that choose between families for each kernel without looking at a value


def squared_distance(sigma_major: Tensor, sigma_minor: Tensor, angle: Tensor, kernel_size: int) -> Tensor:
    """q = xᵀ Σ⁻¹ x, the squared distance from the centre in standard deviations: Tensor[...] -> [..., k, k].

    The Gaussian is exp(-q / 2); Real-ESRGAN's generalised one exp(-q^β / 2), its plateau 1 / (1 + q^β).
    """
    axis = _axis(kernel_size, angle.device).to(angle.dtype)
    x, y = axis, axis[:, None]
    cos, sin = torch.cos(angle)[..., None, None], torch.sin(angle)[..., None, None]
    along = (cos * x + sin * y) / sigma_major[..., None, None]
    across = (cos * y - sin * x) / sigma_minor[..., None, None]
    return along.square() + across.square()


def low_pass(cutoff: Tensor, kernel_size: int) -> Tensor:
    """The ideal circular low-pass filter (sinc), not normalised: Tensor[...] -> [..., k, k].

    ω J₁(ω r) / 2πr for the cut-off frequency ω in radians a pixel.
    """
    axis = _axis(kernel_size, cutoff.device).to(cutoff.dtype)
    radius = torch.hypot(axis, axis[:, None])
    cutoff = cutoff[..., None, None]
    # J₁(t) / t is 1/2 in the limit.
    ratio = torch.where(radius > 0, torch.special.bessel_j1(cutoff * radius) / (cutoff * radius), 0.5)
    return cutoff.square() / (2 * math.pi) * ratio


def within(size: Tensor, kernel_size: int) -> Tensor:
    """Which taps lie within a smaller kernel of an odd size: Tensor[...] -> bool Tensor[..., k, k]."""
    inside = _axis(kernel_size, size.device).abs() <= size[..., None] // 2
    return inside[..., None, :] & inside[..., :, None]


def _parameters(*values: float | Tensor) -> tuple[Tensor, ...]:
    """The parameters in float64 on the first tensor's device, broadcast to one shape."""
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    tensors = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    return tuple(torch.broadcast_tensors(*tensors))


def _axis(kernel_size: int, device: torch.device) -> Tensor:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    radius = kernel_size // 2
    return torch.arange(-radius, radius + 1, dtype=torch.float64, device=device)


def finish(kernel: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeroes what `dtype` would not notice beside the peak, and makes the sum 1.

    Such taps change no result, but where they are denormal they slow a convolution on a CPU several times
    down.
    """
    magnitude = kernel.abs()
    peak = magnitude.amax((-2, -1), keepdim=True)
    kernel = torch.where(magnitude < torch.finfo(dtype).eps * peak, 0.0, kernel)
    return (kernel / kernel.sum((-2, -1), keepdim=True)).to(dtype)
