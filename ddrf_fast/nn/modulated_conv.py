"""StyleGAN's modulated convolution: a shared kernel, scaled for each sample by a style.

    w_b = w . s_b (per input channel)                     modulation
    d_bo = (sum_{i,u,v} w_b[o,i,u,v]^2 + 1e-8)^(-1/2)     demodulation
    y_b = conv2d(x_b, w_b . d_b)

A bank of one kernel with in_scale = s and out_scale = d. d needs no kernel of a sample either: the sum is the
matrix product of s^2 [B, I] and sum_{u,v} w^2 [I, O]. In half precision the bank has a second kernel, what
rounding the first one lost, so that w . s_b . d_b is rounded once.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast.nn import _checks
from ddrf_fast.nn._bank import BankModule
from ddrf_fast.ops import dynamic_conv
from ddrf_fast.ops._checks import integer, shape, tensor
from ddrf_fast.ops._library import autocast_to_lower, is_autocast_enabled
from ddrf_fast.ops.dynamic_conv import convolution_geometry
from ddrf_fast.reference._common import accumulation_dtype

# Leaves of torch.fx's symbolic traces.
torch.fx.wrap("_checked")
torch.fx.wrap("_convolve")
torch.fx.wrap("_demodulation")
torch.fx.wrap("shape")
torch.fx.wrap("tensor")

EPSILON = 1e-8


def _demodulation(w: Tensor, s: Tensor) -> Tensor:
    """d [B, O], whatever autocast says: squares leave the range of half precision."""
    power = w.square().sum(dim=(2, 3))
    if not is_autocast_enabled(s.device.type):
        return (s.square() @ power.T + EPSILON).rsqrt()
    with torch.autocast(s.device.type, enabled=False):
        return (s.square() @ power.T + EPSILON).rsqrt()


def _convolve(x: Tensor, w: Tensor, s: Tensor, d: Tensor | None, padding: int | tuple[int, int]) -> Tensor:
    """conv2d of x_b with w . s_b . d_b, which is rounded to x's dtype once; d is 1 if it is None."""
    (x,) = autocast_to_lower((x,))
    wide = accumulation_dtype(x.dtype)
    bank = w[None]
    if x.dtype != wide:
        # Into the range of float16, for which d makes up. The product does not depend on these sizes, so no
        # gradient goes through them; zeros stay zeros.
        w_size = w.detach().abs().amax(dim=(1, 2, 3)).clamp(min=1e-30)
        s_size = s.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        w, s = w / w_size[:, None, None, None], s / s_size
        d = w_size * s_size if d is None else w_size * s_size * d
        rounded = w.to(x.dtype)
        bank = torch.stack((rounded, (w - rounded).detach().to(x.dtype)))
    return dynamic_conv(
        x,
        bank.to(x.dtype),
        x.new_ones(x.shape[0], len(bank)),
        in_scale=s.to(wide),
        out_scale=None if d is None else d.to(wide),
        padding=padding,
    )


def _checked(x: Tensor, w: Tensor, s: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """w and s in one dtype, float32 at least; their squares leave the range of half precision."""
    tensor("x", x, ["[B, I, H, W]"])
    tensor("w", w, ["[O, I, kh, kw]"])
    shape("x", x, (x.shape[0], w.shape[1], *x.shape[2:]), "[B, I, H, W]")
    shape(name, tensor(name, s, ["[B, I]"]), x.shape[:2], "[B, I]")
    dtype = torch.promote_types(torch.promote_types(w.dtype, s.dtype), torch.float32)
    return w.to(dtype), s.to(dtype)


def modulated_conv2d(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    demodulate: bool = True,
    padding: int | tuple[int, int] = 0,
    input_gain: Tensor | None = None,
) -> Tensor:
    r"""Scales a kernel by a style, normalises it, and convolves.

    .. math::
        y_b = \mathrm{conv2d}\bigl(x_b,\; g_b \odot d_b \odot s_b \odot w\bigr), \qquad
        d_{bo} = \Bigl(\sum_{i,u,v} (s_{bi}\, w_{oiuv})^2 + 10^{-8}\Bigr)^{-1/2}

    Karras et al., *Alias-Free Generative Adversarial Networks* (2021, arXiv:2106.12423), after *Analyzing and
    Improving the Image Quality of StyleGAN* (2020, arXiv:1912.04958). Arguments and numbers are those of the
    function of this name in StyleGAN3; as there, ``w`` (for each output channel) and ``s`` (over the batch)
    are first divided by their root mean square where they are demodulated, and in half precision the product
    g d s w is rounded once, so that the error is the same. No kernel of a sample is stored, in the backward
    neither, and it is differentiable to any order.

    Args:
        x: Tensor[B, I, H, W].
        w: Tensor[O, I, kh, kw], of any floating dtype.
        s: Tensor[B, I], the styles, of any floating dtype.
        demodulate: normalise the kernels; without, d is 1.
        padding: zeros at every side, int or pair.
        input_gain: g, further factors of the input channels, which demodulation does not undo: Tensor[],
            Tensor[I] or Tensor[B, I].

    Returns:
        Tensor[B, O, H', W'] in the dtype of ``x``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, a device or an option does not fit.

    Example:
        >>> modulated_conv2d(torch.randn(2, 8, 9, 9), torch.randn(4, 8, 3, 3), torch.randn(2, 8)).shape
        torch.Size([2, 4, 7, 7])
    """
    w, s = _checked(x, w, s, "s")
    d = None
    if demodulate:
        w = w * w.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
        s = s * s.square().mean().rsqrt()
        d = _demodulation(w, s)
    return _convolve(x, w, s if input_gain is None else s * input_gain, d, padding)


class ModulatedConv2d(BankModule):
    r"""StyleGAN2's modulated convolution, with the affine layer that makes the style.

    .. math::
        y_b = \mathrm{conv2d}\bigl(x_b,\; d_b \odot s_b \odot \gamma w\bigr), \qquad
        s_b = A(\mathrm{style}_b), \qquad
        d_{bo} = \Bigl(\sum_{i,u,v} (s_{bi}\, \gamma\, w_{oiuv})^2 + 10^{-8}\Bigr)^{-1/2}

    Karras et al., *Analyzing and Improving the Image Quality of StyleGAN* (CVPR 2020, arXiv:1912.04958).
    State dict and numbers are those of ``ModulatedConv2d`` of rosinality/stylegan2-pytorch (there with
    ``upsample`` and ``downsample`` off). Kernels are drawn with unit variance and multiplied by
    :math:`\gamma = 1 / \sqrt{I k^2}` at run time ("equalised learning rate"), as are the weights of A by
    1 / sqrt(style_dim).

    In half precision (autocast's too) the product d s w is rounded once, as it is there, and none of its
    factors, which may be outside of the range of float16.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width.
        style_dim: length of the style; None for a layer without A, which takes s itself.
        demodulate: normalise the kernels; without, d is 1 (StyleGAN's layer to RGB).
        padding: zeros at every side, int or pair; None for ``kernel_size // 2``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: Parameter[1, O, I, k, k].
        modulation: A, with ``weight`` Parameter[I, style_dim] and ``bias`` Parameter[I] (ones at first), or
            None.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.

    Example:
        >>> layer = ModulatedConv2d(8, 16, 3, style_dim=32)
        >>> layer(torch.randn(2, 8, 12, 10), torch.randn(2, 32)).shape
        torch.Size([2, 16, 12, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int | None = None,
        demodulate: bool = True,
        padding: int | tuple[int, int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        integer("in_channels", in_channels, 1)
        integer("out_channels", out_channels, 1)
        integer("kernel_size", kernel_size, 1)
        self.demodulate = demodulate
        self.padding = kernel_size // 2 if padding is None else padding
        convolution_geometry((kernel_size, kernel_size), 1, self.padding, 1)
        self.scale = 1 / math.sqrt(in_channels * kernel_size * kernel_size)
        self.weight = nn.Parameter(torch.empty(1, out_channels, in_channels, kernel_size, kernel_size))
        self.modulation = None if style_dim is None else StyleAffine(style_dim, in_channels)
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the kernel with unit variance (class docstring), and the affine layer."""
        nn.init.normal_(self.weight)
        if self.modulation is not None:
            self.modulation.reset_parameters()

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: Tensor[B, in_channels, H, W].
            style: Tensor[B, style_dim], or Tensor[B, in_channels] without the affine layer.

        Returns:
            Tensor[B, out_channels, H', W'] in the dtype of ``x``.

        Raises:
            TypeError, ValueError: as :func:`modulated_conv2d`.
        """
        _checks.image(x, self.weight.shape[2])
        if self.modulation is None:
            s = style
        else:
            tensor("style", style, ["[B, style_dim]"])
            shape("style", style, (x.shape[0], self.modulation.weight.shape[1]), "[B, style_dim]")
            s = self.modulation(style)
        w, s = _checked(x, self.weight[0], s, "style")
        w = self.scale * w
        d = _demodulation(w, s) if self.demodulate else None
        return _convolve(x, w, s, d, self.padding)

    def extra_repr(self) -> str:
        _, out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, demodulate={self.demodulate}, "
            f"padding={self.padding}"
        )


class StyleAffine(nn.Module):
    """The affine layer A of :class:`ModulatedConv2d`: style @ weight^T / sqrt(style_dim) + bias.

    Args:
        style_dim: length of the style.
        in_channels: channels that it scales.
    """

    def __init__(self, style_dim: int, in_channels: int) -> None:
        super().__init__()
        integer("style_dim", style_dim, 1)
        self.weight = nn.Parameter(torch.empty(in_channels, style_dim))
        self.bias = nn.Parameter(torch.empty(in_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights of unit variance, and biases of 1."""
        nn.init.normal_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, style: Tensor) -> Tensor:
        """Tensor[B, style_dim] -> Tensor[B, in_channels]."""
        return F.linear(style, self.weight / math.sqrt(self.weight.shape[1]), self.bias)
