"""degrade: spatially-varying blur, down-sampling and noise in one pass.

    out[b, c, y, x] = S + sqrt(shot_noise max(S, 0) + noise_std^2) n
    S = sum_{u,v} (sum_m weights[b, m, y', x'] kernels[m, u, v]) image[b, c, y' - u, x' - v]
    (y', x') = (scale y + offset, scale x + offset)

Eq. 1-3 of the DDRF-Net paper in the gather model: the mixed kernel belongs to the output pixel, as in Nagy
and O'Leary (1998) and DMBSR (Laroche et al. 2023). The blur is computed at the strided sites only. The noise
is counter-based (reference/philox.py), so it does not depend on how a batch is split, on threads or on the
backend.

Saved for the backward: the tensors as they came. Shot noise alone is not linear: where something needs a
gradient, it is put on in plain torch.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddrf_fast.ops import _checks, _library
from ddrf_fast.reference import degrade as reference
from ddrf_fast.reference._common import accumulation_dtype

SCHEMAS = (
    "degrade(Tensor image, Tensor kernels, Tensor weights, Tensor? noise_std, Tensor? seed, "
    "Tensor? sample_ids, Tensor? gray_noise, Tensor? shot_noise, int scale, SymInt offset, "
    "SymInt[2] out_size, str padding, bool correlation, str weights_at) -> Tensor",
    "degrade_backward(Tensor grad, Tensor image, Tensor kernels, Tensor weights, Tensor? noise_std, "
    "Tensor? seed, Tensor? sample_ids, Tensor? gray_noise, int scale, SymInt offset, str padding, "
    "bool correlation, str weights_at, int output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
)

# How the compiled CPU kernels run a shape, in words; for `explain`.
_PLAN_SCHEMAS = [f"{s.replace('(', '_plan(', 1).rpartition(' -> ')[0]} -> str" for s in SCHEMAS]

Padding = Literal["reflect", "replicate", "circular", "zeros", "valid"]
_PADDINGS: tuple[Padding, ...] = get_args(Padding)
_NOISE = ("noise_std", "seed", "sample_ids", "gray_noise", "shot_noise")
NO_NOISE = (None,) * len(_NOISE)
_TENSORS = ("image", "kernels", "weights", *_NOISE)
_BACKWARD_TENSORS = _TENSORS[:-1]  # there is no shot noise in it
_DIFFERENTIABLE = _TENSORS[:4]


def _fake(*args: Any) -> Tensor:
    image, kernels = args[:2]
    _scale, _offset, out_size, *_ = args[len(_TENSORS) :]
    return _library.layout_of(image, (*image.shape[:2], *out_size), kernels.dtype)


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _library.fake_gradients(args[: len(_DIFFERENTIABLE)], args[-1])


def _per_sample(dims: Sequence[int | None]) -> set[int]:
    shared = {"seed"} if dims[_TENSORS.index("kernels")] == 4 else {"seed", "kernels"}
    return {i for i, name in enumerate(_TENSORS[: len(dims)]) if name not in shared}


def _backward_arguments(rest: Sequence[Any]) -> tuple[Any, ...]:
    _, scale, offset, _, padding, correlation, weights_at = rest
    return scale, offset, padding, correlation, weights_at


for _schema, _reference, _fake_of, _num_tensors in (
    (SCHEMAS[0], reference.degrade, _fake, len(_TENSORS)),
    (SCHEMAS[1], reference.degrade_backward, _fake_backward, len(_BACKWARD_TENSORS)),
):
    _library.define(
        _schema,
        _reference,
        _fake_of,
        autocast=_library.autocast_to_float32,
        num_tensors=_num_tensors,
        per_sample=_per_sample,
        native_cuda=True,
    )

for _schema in _PLAN_SCHEMAS:
    _library.define_native(_schema)

call, call_backward = _library.differentiable(
    "degrade", len(_BACKWARD_TENSORS), reference.degrade, reference.degrade_backward, _backward_arguments
)


def _weights_at(
    weights: Tensor,
    batch: int,
    num_kernels: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    grid: bool,
) -> str:
    """Which of the four forms `weights` has, for an image of `size`."""
    sizes, (height, width) = tuple(weights.shape[2:]), size
    if weights.shape[0] != batch or weights.shape[1] != num_kernels:
        raise ValueError(
            f"weights must start with [B, M] = ({batch}, {num_kernels}), got shape {tuple(weights.shape)}"
        )
    if grid:
        if weights.dim() != 4 or min(sizes) < 1:
            raise ValueError(
                f"weights must be [B, M, gh, gw] with grid=True, got shape {tuple(weights.shape)}"
            )
        return "grid"
    if weights.dim() == 2:
        return "sample"
    # The output's size first: it is the cheaper one to read where both are the same.
    if sizes == out_size:
        return "output"
    if sizes == (height, width):
        return "image"
    raise ValueError(
        f"weights must be [B, M], [B, M, {height}, {width}] (the image's size), "
        f"[B, M, {out_size[0]}, {out_size[1]}] (the output's), or a coarse grid with "
        f"grid=True, got shape {tuple(weights.shape)}"
    )


def _noise(
    kernels: Tensor,
    batch: int,
    noise_std: float | Tensor,
    seed: int | Tensor | None,
    sample_ids: Tensor | None,
    gray_noise: bool | Tensor,
    shot_noise: float | Tensor,
    out_size: tuple[int, int],
) -> tuple[Tensor | None, ...]:
    """noise_std as [B, 1, 1, 1] or [B, 1, H', W'], seed, ids, gray_noise and shot_noise [B] as tensors."""
    std = _not_negative("noise_std", noise_std, kernels, batch)
    if std is not None and std.dim() == 1:
        _checks.shape("noise_std", std, (batch,), "[B]")
        std = std.view(batch, 1, 1, 1)
    elif std is not None:
        _checks.shape("noise_std", std, (batch, 1, *out_size), "[B] or [B, 1, H', W']")
    shot = _not_negative("shot_noise", shot_noise, kernels, batch)
    if shot is not None:
        _checks.shape("shot_noise", shot, (batch,), "[B]")

    # Without noise, what was given is checked all the same; but no seed is drawn then.
    device, noisy = kernels.device, std is not None or shot is not None
    if noisy and std is None:
        std = kernels.new_zeros((batch, 1, 1, 1))
    noise = (
        std,
        seed_tensor(seed, device) if noisy or seed is not None else None,
        ids_tensor(sample_ids, batch, device) if noisy or sample_ids is not None else None,
        _gray_noise(gray_noise, batch, device),
        shot,
    )
    return noise if noisy else NO_NOISE


def _not_negative(name: str, value: float | Tensor, kernels: Tensor, batch: int) -> Tensor | None:
    """In the dtype of the kernels, [B] where one is for all samples; None for the number 0."""
    if not isinstance(value, Tensor):
        number = _checks.number(name, value, "a number or a Tensor")
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
        return kernels.new_full((batch,), number) if number else None
    _checks.like(name, value, "kernels", kernels)
    if _is_readable(value) and bool(((value < 0) | ~torch.isfinite(value)).any()):
        raise ValueError(
            f"{name} must be finite and not negative, got {value.min().item():g} to {value.max().item():g}"
        )
    return value.expand(batch) if value.dim() == 0 else value


def _gray_noise(gray_noise: bool | Tensor, batch: int, device: torch.device) -> Tensor | None:
    """bool [B], or None."""
    if isinstance(gray_noise, bool):
        return torch.ones(batch, dtype=torch.bool, device=device) if gray_noise else None
    if not isinstance(gray_noise, Tensor) or gray_noise.dtype != torch.bool:
        got = gray_noise.dtype if isinstance(gray_noise, Tensor) else type(gray_noise).__name__
        raise TypeError(f"gray_noise must be a bool or a bool Tensor[B], got {got}")
    _checks.shape("gray_noise", gray_noise, (batch,), "[B]")
    return moved(gray_noise, device)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`; a GPU that is to get it need not be waited for, one that has it must."""
    return value.to(device, non_blocking=device.type == "cuda")


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as an int64 scalar on `device`; None draws one from torch's default generator."""
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(
                f"seed must be an int or an int64 scalar tensor, got {seed.dtype} of {tuple(seed.shape)}"
            )
        return moved(seed, device)
    if _checks.integer("seed", seed, 0) >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def ids_tensor(sample_ids: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The samples' identities as int64 [B] on `device`, by default 0 .. B-1."""
    if sample_ids is None:
        return torch.arange(batch, device=device)
    if not isinstance(sample_ids, Tensor) or sample_ids.dtype != torch.int64:
        got = sample_ids.dtype if isinstance(sample_ids, Tensor) else type(sample_ids).__name__
        raise TypeError(f"sample_ids must be an int64 Tensor[B], got {got}")
    _checks.shape("sample_ids", sample_ids, (batch,), "[B]")
    return moved(sample_ids, device)


def _refuse_not_finite(name: str, value: Tensor) -> None:
    """NaN kernels are a common fault of generators: looks for them where looking is cheap."""
    if not _is_readable(value):
        return
    total = value.detach().sum(dtype=accumulation_dtype(value.dtype)).item()
    if not math.isfinite(total) and (count := int((~torch.isfinite(value)).sum())):
        raise ValueError(f"{name} must be finite, got {count} values that are not")


def _is_readable(t: Tensor) -> bool:
    """Whether values can be looked at for a check: on the CPU, not while tracing or under a transform."""
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return t.device.type == "cpu" and not tracing and type(t) in (Tensor, torch.nn.Parameter)


def blur_arguments(
    name: str,
    like: Tensor,
    kernels: Tensor,
    weights: Tensor,
    size_name: str,
    size: tuple[int, int],
    *,
    scale: int,
    offset: int,
    padding: Padding,
    correlation: bool,
    grid: bool,
) -> tuple[int, int, tuple[int, int], str, bool, str]:
    """Checks what `degrade` and its adjoint have in common, for an image of `size`, (H, W).

    The batch, the dtype and the device must be those of the tensor `like`. The messages call it `name`, and
    the size `size_name`.

    Returns:
        scale, offset, out_size, padding, correlation and weights_at of the raw operators, where "valid" is no
        padding but a larger offset and a smaller output.
    """
    scale, offset = _checks.integer("scale", scale, 1), _checks.integer("offset", offset, 0)
    if padding not in _PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(_PADDINGS)}, got {padding!r}")

    batch = like.shape[0]
    num_kernels, *kernel_size = kernels.shape[-3:]
    if kernel_size[0] != kernel_size[1] or kernel_size[0] % 2 == 0 or num_kernels < 1:
        raise ValueError(
            f"kernels must be square, of an odd size, and at least one, got shape {tuple(kernels.shape)}"
        )
    if kernels.dim() == 4 and kernels.shape[0] != batch:
        raise ValueError(
            f"kernels [B, M, k, k] must hold a bank for each of the {batch} samples, got {kernels.shape[0]}"
        )
    check = _checks.like if like.is_floating_point() else _checks.device
    check("kernels", kernels, name, like)
    _checks.like("weights", weights, "kernels", kernels)

    radius = kernel_size[0] // 2
    limit = {"reflect": radius + 1, "circular": max(radius, 1), "valid": kernel_size[0]}.get(padding, 1)
    if min(size) < limit:
        raise ValueError(
            f"{size_name} of {size[0]}x{size[1]} is too small for padding={padding!r} with a kernel of "
            f"{kernel_size[0]}x{kernel_size[0]}: each side must be at least {limit}"
        )
    # With "valid" the kernel fits at the sites r .. H-1-r only, and reads nothing outside.
    margin = radius if padding == "valid" else 0
    height, width = size[0] - 2 * margin, size[1] - 2 * margin
    if min(height, width) <= offset:
        raise ValueError(f"offset must be below {min(height, width)}, got {offset}")
    out_size = ((height - offset + scale - 1) // scale, (width - offset + scale - 1) // scale)
    first = offset + margin

    at = _weights_at(weights, batch, num_kernels, size, out_size, grid)
    _refuse_not_finite("kernels", kernels)
    # Per pixel of the image, the rows that are read: whole rows are summed faster than single sites.
    _refuse_not_finite("weights", weights[:, :, first::scale] if at == "image" else weights)
    return scale, first, out_size, "zeros" if padding == "valid" else padding, bool(correlation), at


def arguments(
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    *,
    scale: int = 1,
    offset: int = 0,
    noise_std: float | Tensor = 0,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    gray_noise: bool | Tensor = False,
    shot_noise: float | Tensor = 0,
    padding: Padding = "reflect",
    correlation: bool = False,
    grid: bool = False,
) -> tuple[Any, ...]:
    """Checks the arguments of `degrade` and returns those of the raw operator."""
    _checks.tensor("image", image, ["[B, C, H, W]"], (*_checks.FLOATING, *_checks.INTEGER))
    _checks.tensor("kernels", kernels, ["[M, k, k]", "[B, M, k, k]"])
    _checks.tensor("weights", weights, ["[B, M]", "[B, M, H, W]"])
    image, kernels, weights, noise_std, shot_noise = _library.autocast_to_float32(
        (image, kernels, weights, noise_std, shot_noise)
    )
    size = (image.shape[2], image.shape[3])
    scale, offset, out_size, *options = blur_arguments(
        "image",
        image,
        kernels,
        weights,
        "image",
        size,
        scale=scale,
        offset=offset,
        padding=padding,
        correlation=correlation,
        grid=grid,
    )
    noise = _noise(kernels, image.shape[0], noise_std, seed, sample_ids, gray_noise, shot_noise, out_size)
    return image, kernels, weights, *noise, scale, offset, out_size, *options


def degrade(
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    *,
    scale: int = 1,
    offset: int = 0,
    noise_std: float | Tensor = 0,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    gray_noise: bool | Tensor = False,
    shot_noise: float | Tensor = 0,
    padding: Padding = "reflect",
    correlation: bool = False,
    grid: bool = False,
) -> Tensor:
    r"""Blurs each pixel with its own mix of kernels, down-samples and adds noise, in one pass.

    .. math::
        out_{bc}(y, x) = S + \sqrt{\mathrm{shot\_noise} \max(S, 0) + \mathrm{noise\_std}^2}\; n_{bc}(y, x),
        \quad S = \sum_{u,v} \Big(\sum_m w_{bm}(y', x')\, k_m(u, v)\Big)\, image_{bc}(y' - u, x' - v),
        \quad (y', x') = (s y + o, s x + o)

    Eq. 1-3 of the DDRF-Net paper in the gather model (Nagy and O'Leary 1998; DMBSR, Laroche et al. 2023). A
    true convolution. Differentiable in image, kernels, weights, noise_std and shot_noise, in reverse and
    forward mode, to any order.

    Args:
        image (Tensor[B, C, H, W]): NCHW or channels_last; the output keeps that layout. Any range, if
            floating. uint8 and uint16 stand for [0, 1], in steps of 1 / 255 and 1 / 65535, as torchvision's
            ToTensor takes them, and have no gradient.
        kernels (Tensor[M, k, k] or Tensor[B, M, k, k]): Basis kernels, k odd. They are not normalised.
        weights (Tensor): How much of each kernel: [B, M] for the whole image, [B, M, H, W] per pixel of the
            image (read at the strided sites), [B, M, H', W'] per pixel of the output, or with `grid=True` a
            coarse [B, M, gh, gw], interpolated bilinearly over the image, corner on corner. They are not
            normalised.
        scale: Down-sampling factor s, at least 1.
        offset: First site o, from 0; 0 samples the upper left pixel of each block, (s - 1) // 2 its centre.
        noise_std (float, Tensor[B] or Tensor[B, 1, H', W']): Standard deviation of white Gaussian noise in
            image units, so 5 / 255 for images in [0, 1]. 0 is no noise.
        seed: From 0 to 2^63 - 1, or an int64 scalar tensor. The noise depends on the seed, the sample id, the
            channel and the pixel only. None draws one from torch's default generator.
        sample_ids (Tensor[B], optional): int64 identity of each sample, by default 0 .. B-1; give the
            sample's place in the data set and its noise stays its own in any batch and on any rank.
        gray_noise (bool or bool Tensor[B]): Whether all channels of a sample have the same noise (of shot
            noise the same draw, which each channel scales by its own signal).
        shot_noise (float or Tensor[B]): Variance of the photons' noise where the image is 1: together with
            the white noise the variance is shot_noise S + noise_std^2 for the blurred image S, 0 where S is
            negative (Foi et al., Practical Poissonian-Gaussian noise modeling and fitting, 2008).
        padding: "reflect" (without repeating the edge), "replicate", "circular", "zeros", or "valid" (sites
            where the kernel fits only; the first one is `offset` + k // 2).
        correlation: Flips the kernels: cross-correlation, as in OpenCV and kornia.
        grid: Whether `weights` is a coarse grid.

    Returns:
        Tensor[B, C, H', W'] with the dtype of the kernels and the image's layout; H' = ceil((H - offset) /
        scale). It is not clipped.

    All floating tensors are float32, float64, bfloat16 or float16 of one dtype; sums run in float32 (float64
    for float64). Under torch.autocast the operation runs in float32. An image of integers is read as it is,
    and converted in registers; in plain torch it is converted before.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, a device or a value does not fit; the message names it. NaN kernels and weights
            (of weights per pixel, those in the rows that are read) are refused where they can be seen without
            waiting for a device: on the CPU, outside of compiled code.

    Example:
        >>> import torch, ddrf_fast
        >>> image, kernels = torch.rand(2, 3, 64, 64), torch.full((4, 5, 5), 1 / 25)
        >>> weights = torch.softmax(torch.rand(2, 4, 3, 3), dim=1)
        >>> ddrf_fast.degrade(image, kernels, weights, grid=True, scale=2, noise_std=5 / 255, seed=1).shape
        torch.Size([2, 3, 32, 32])
    """
    raw = arguments(
        image,
        kernels,
        weights,
        scale=scale,
        offset=offset,
        noise_std=noise_std,
        seed=seed,
        sample_ids=sample_ids,
        gray_noise=gray_noise,
        shot_noise=shot_noise,
        padding=padding,
        correlation=correlation,
        grid=grid,
    )
    if raw[_TENSORS.index("shot_noise")] is not None and _library.needs_gradient(raw[: len(_TENSORS)]):
        return _with_shot_noise(*raw)
    return call(*raw)


def _with_shot_noise(
    image: Tensor, kernels: Tensor, weights: Tensor, std: Tensor, seed: Tensor, sample_ids: Tensor,
    gray_noise: Tensor | None, shot_noise: Tensor, scale: int, offset: int, out_size: Any, *options: Any,
) -> Tensor:  # fmt: skip
    """For gradients, which go through the noise as well: the image without noise, and the noise put on it."""
    signal = call(image, kernels, weights, *NO_NOISE, scale, offset, out_size, *options)
    one = kernels.new_ones((image.shape[0], 1, 1, 1))
    unit = (one, seed, sample_ids, gray_noise, None, 1, 0, out_size, "zeros", False, "sample")
    noise = call(torch.zeros_like(signal), kernels.new_ones((1, 1, 1)), one[:, :, 0, 0], *unit)
    dtype = accumulation_dtype(kernels.dtype)
    noisy = reference.add_noise(signal.to(dtype), noise.to(dtype), std.to(dtype), shot_noise)
    return noisy.to(kernels.dtype)
