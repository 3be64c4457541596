"""degrade and its gradients in plain torch: the specification.

    out[b, c, y, x] = S + sqrt(shot_noise max(S, 0) + noise_std^2) n
    S = sum_m w[b, m, y, x] Z[b, c, m, y, x]
    Z[b, c, m] = the image, padded, convolved with kernel m, at the strided sites (s y + offset, s x + offset)

This is the gather model: the mixed kernel belongs to the output pixel (mask after the convolution). The
operation is linear in the image, in the kernels and in the weights, so each gradient is one convolution as
well:

    dimage = pad^T sum_m conv^T(w_m dout, k_m)     dk_m = <w_m dout, patches>     dw_m = sum_c dout Z_m

Padding, and reading the weights at the sites, are index maps; their adjoints add back to the same indices.
Arithmetic is float32 (float64 for float64), rounded once. An image of integers stands for [0, 1] and has no
gradient; what comes out then has the dtype of the kernels, which otherwise is the image's. Arguments are
those of the raw operator `ddrf_fast::degrade` (ops/degrade.py); "valid" padding does not exist here: it is a
larger offset and a smaller output.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ddrf_fast.reference import philox
from ddrf_fast.reference._common import accumulation_dtype, in_layout_of, unit_range


def _padded_index(
    size: int, sites: int, scale: int, offset: int, radius: int, padding: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Along one axis: which pixel each padded position reads, and whether it lies inside the image."""
    position = torch.arange(offset - radius, offset + scale * (sites - 1) + radius + 1, device=device)
    inside = (position >= 0) & (position < size)
    if padding == "circular":
        return position % size, torch.ones_like(inside)
    if padding == "reflect":
        position = position.abs()
        position = (size - 1) - (size - 1 - position).abs()
        inside = torch.ones_like(inside)
    elif padding == "replicate":
        inside = torch.ones_like(inside)
    return position.clamp(0, size - 1), inside


class _Sites:
    """The index maps of one call: of the image to its padded form, of weights to the strided sites."""

    def __init__(
        self,
        image: Tensor,
        weights: Tensor,
        radius: int,
        scale: int,
        offset: int,
        size: Sequence[int],
        padding: str,
        weights_at: str,
    ):
        self.image_size, self.size, self.weights_at = image.shape[2:], size, weights_at
        maps = [
            _padded_index(image.shape[2 + i], size[i], scale, offset, radius, padding, image.device)
            for i in range(2)
        ]
        self.rows, self.columns = maps[0][0], maps[1][0]
        self.inside = maps[0][1][:, None] & maps[1][1] if padding == "zeros" else None
        self.positions = [offset + scale * torch.arange(size[i], device=image.device) for i in range(2)]
        if weights_at == "grid":
            dtype = accumulation_dtype(weights.dtype)
            self.interpolation = [
                _bilinear(self.positions[i], image.shape[2 + i], weights.shape[2 + i], dtype)
                for i in range(2)
            ]

    def pad(self, image: Tensor) -> Tensor:
        padded = image.index_select(2, self.rows).index_select(3, self.columns)
        return padded if self.inside is None else padded * self.inside

    def pad_adjoint(self, grad: Tensor) -> Tensor:
        if self.inside is not None:
            grad = grad * self.inside
        return _add_at(grad, self.rows, self.columns, self.image_size)

    def weights(self, weights: Tensor) -> Tensor:
        """[B, M, H', W'] whatever the form."""
        if self.weights_at == "sample":
            return weights[:, :, None, None].expand(-1, -1, *self.size)
        if self.weights_at == "image":
            return weights.index_select(2, self.positions[0]).index_select(3, self.positions[1])
        if self.weights_at == "grid":
            return self.interpolation[0] @ weights @ self.interpolation[1].T
        return weights

    def weights_adjoint(self, grad: Tensor) -> Tensor:
        if self.weights_at == "sample":
            return grad.sum(dim=(2, 3))
        if self.weights_at == "image":
            return _add_at(grad, self.positions[0], self.positions[1], self.image_size)
        if self.weights_at == "grid":
            return self.interpolation[0].T @ grad @ self.interpolation[1]
        return grad


def _add_at(values: Tensor, rows: Tensor, columns: Tensor, size: torch.Size) -> Tensor:
    """The adjoint of reading at (rows, columns) from a map of `size`."""
    values = values.new_zeros((*values.shape[:3], size[1])).index_add(3, columns, values)
    return values.new_zeros((*values.shape[:2], *size)).index_add(2, rows, values)


def _bilinear(positions: Tensor, size: int, cells: int, dtype: torch.dtype) -> Tensor:
    """The matrix [sites, cells] of linear interpolation; the grid's ends lie on the image's."""
    place = positions.to(dtype) * ((cells - 1) / (size - 1) if size > 1 else 0.0)
    return (1 - (place[:, None] - torch.arange(cells, device=positions.device)).abs()).clamp(min=0)


def _blur(padded: Tensor, kernels: Tensor, scale: int) -> Tensor:
    """Every kernel [M, k, k] over every channel, at the strided sites: [B, C, M, H', W']."""
    out = F.conv2d(padded.flatten(0, 1)[:, None], kernels[:, None], stride=scale)
    return out.unflatten(0, padded.shape[:2])


def _linear(image: Tensor, kernels: Tensor, weights: Tensor, sites: _Sites, scale: int) -> Tensor:
    """The part without noise, for kernels [M, k, k] in correlation order that all samples share."""
    blurred = _blur(sites.pad(image), kernels, scale)
    return (blurred * sites.weights(weights)[:, None]).sum(dim=2)


def _linear_backward(
    grad: Tensor,
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    sites: _Sites,
    scale: int,
    wanted: list[bool],
) -> list[Tensor]:
    padded = sites.pad(image)
    grads = [image.new_empty((0,)) for _ in range(3)]
    if wanted[0] or wanted[1]:
        weighted = (grad[:, :, None] * sites.weights(weights)[:, None]).flatten(0, 1)
        if wanted[0]:
            size = (padded.shape[0] * padded.shape[1], 1, *padded.shape[2:])
            grad_padded = conv2d_input(size, kernels[:, None], weighted, stride=scale)
            grads[0] = sites.pad_adjoint(grad_padded.reshape(padded.shape))
        if wanted[1]:
            shape = (kernels.shape[0], 1, *kernels.shape[1:])
            grads[1] = conv2d_weight(padded.flatten(0, 1)[:, None], shape, weighted, stride=scale)[:, 0]
    if wanted[2]:
        grads[2] = sites.weights_adjoint((grad[:, :, None] * _blur(padded, kernels, scale)).sum(dim=1))
    return grads


def _parts(kernels: Tensor, correlation: bool, batch: int) -> list[tuple[slice, Tensor]]:
    """The batch in slices that share their kernels [M, k, k], which are brought into correlation order."""
    if not correlation:
        kernels = kernels.flip(-2, -1)
    if kernels.dim() == 3:
        return [(slice(None), kernels)]
    return [(slice(b, b + 1), kernels[b]) for b in range(batch)]


def add_noise(signal: Tensor, noise: Tensor, noise_std: Tensor, shot_noise: Tensor | None) -> Tensor:
    """signal + sqrt(shot_noise max(signal, 0) + noise_std^2) noise."""
    if shot_noise is None:
        return signal + noise_std * noise
    shot = shot_noise.to(signal.dtype)[:, None, None, None]
    variance = shot * signal.clamp(min=0) + noise_std.square()
    noisy = variance > 0  # elsewhere the root has no slope
    return signal + torch.where(noisy, torch.where(noisy, variance, 1.0).sqrt(), 0.0) * noise


def degrade(
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    noise_std: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    gray_noise: Tensor | None,
    shot_noise: Tensor | None,
    scale: int,
    offset: int,
    out_size: Sequence[int],
    padding: str,
    correlation: bool,
    weights_at: str,
) -> Tensor:
    """out [B, C, H', W'] of the equation above, in the kernels' dtype and the image's memory format."""
    if image.shape[0] == 0:
        return in_layout_of(image, kernels.new_zeros((0, image.shape[1], *out_size)))
    dtype = accumulation_dtype(kernels.dtype)
    sites = _Sites(image, weights, kernels.shape[-1] // 2, scale, offset, out_size, padding, weights_at)
    wide_image, wide_kernels, wide_weights = unit_range(image, dtype), kernels.to(dtype), weights.to(dtype)
    out = torch.cat(
        [
            _linear(wide_image[part], shared, wide_weights[part], sites, scale)
            for part, shared in _parts(wide_kernels, correlation, image.shape[0])
        ]
    )
    if noise_std is not None:
        assert seed is not None
        assert sample_ids is not None
        noise = philox.standard_normal(
            seed, sample_ids, image.shape[1], out_size[0], out_size[1], dtype, gray_noise
        )
        out = add_noise(out, noise, noise_std.to(dtype), shot_noise)
    return in_layout_of(image, out.to(kernels.dtype))


def _not_asked_for(image: Tensor, argument: Tensor | None) -> Tensor:
    """The empty tensor in place of the gradient of `argument`."""
    return (image if argument is None else argument).new_empty((0,))


def degrade_backward(
    grad: Tensor,
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    noise_std: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    gray_noise: Tensor | None,
    scale: int,
    offset: int,
    padding: str,
    correlation: bool,
    weights_at: str,
    output_mask: int,
) -> tuple[Tensor, ...]:
    """Gradients of image, kernels, weights and noise_std, without shot noise; (0,) where not asked for."""
    inputs = (image, kernels, weights, noise_std)
    wanted = [bool(output_mask >> i & 1) for i in range(4)]
    if image.shape[0] == 0:
        return tuple(
            torch.zeros_like(t) if want and t is not None else _not_asked_for(image, t)
            for t, want in zip(inputs, wanted, strict=True)
        )
    dtype = accumulation_dtype(kernels.dtype)
    wide_grad = grad.to(dtype)
    grads = [_not_asked_for(image, t) for t in inputs]

    if any(wanted[:3]):
        sites = _Sites(
            image, weights, kernels.shape[-1] // 2, scale, offset, grad.shape[2:], padding, weights_at
        )
        wide_image, wide_kernels, wide_weights = (
            unit_range(image, dtype),
            kernels.to(dtype),
            weights.to(dtype),
        )
        parts = [
            _linear_backward(
                wide_grad[part], wide_image[part], shared, wide_weights[part], sites, scale, wanted
            )
            for part, shared in _parts(wide_kernels, correlation, image.shape[0])
        ]
        grad_image, grad_kernels, grad_weights = zip(*parts, strict=True)
        if wanted[0]:
            grads[0] = in_layout_of(image, torch.cat(grad_image).to(image.dtype))
        if wanted[1]:
            stacked = torch.stack(grad_kernels).reshape(kernels.shape)
            grads[1] = (stacked if correlation else stacked.flip(-2, -1)).to(kernels.dtype)
        if wanted[2]:
            grads[2] = torch.cat(grad_weights).to(kernels.dtype)

    if wanted[3]:
        assert noise_std is not None
        assert seed is not None
        assert sample_ids is not None
        noise = philox.standard_normal(
            seed, sample_ids, image.shape[1], grad.shape[2], grad.shape[3], dtype, gray_noise
        )
        product = (wide_grad * noise).sum(dim=1, keepdim=True)
        grads[3] = product.sum_to_size(noise_std.shape).to(kernels.dtype)
    return grads[0], *(g.contiguous() for g in grads[1:])


def plan(op: str, *args: object) -> str:
    """How it runs, for `explain`."""
    if op.endswith("_backward"):
        return "a transposed convolution for each basis kernel, then what fell outside added to the image"
    return "a convolution for each basis kernel at the output's sites, then the weighted sum"
