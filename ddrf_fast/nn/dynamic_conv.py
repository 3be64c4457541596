"""The dynamic convolution as a module: a bank of kernels, and the router that mixes it."""

import math
from typing import Any, Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast.nn import _checks
from ddrf_fast.nn._bank import BankModule
from ddrf_fast.nn.router import Router
from ddrf_fast.ops import dynamic_conv
from ddrf_fast.ops._checks import integer, pair, shape, tensor
from ddrf_fast.ops.dynamic_conv import Activation, convolution_geometry
from ddrf_fast.reference._common import in_layout_of

# Leaves of torch.fx's symbolic traces.
torch.fx.wrap("dynamic_conv")
torch.fx.wrap("shape")
torch.fx.wrap("tensor")


class DynamicConv2d(BankModule):
    r"""2-D convolution whose kernel is mixed for each sample from a bank of N kernels.

    .. math::
        y = \mathrm{act}\Bigl(\bigl(s \sum_{k=1}^N \pi_k(x) W_k\bigr) * C(x, c)
            + s \sum_{k=1}^N \pi_k(x)\, b_k\Bigr),
        \qquad s = 1 \text{, or } 1/N \text{ with ``average=True``}

    With ``average=False`` this is the layer of Chen et al. (CVPR 2020); with ``average=True`` it is eq. 6 of
    the DDRF-Net paper as printed. The attention :math:`\pi` comes from a :class:`~ddrf_fast.nn.Router`, or
    from the caller. The code c (degradation kernel and noise level in DDRF-Net) is stretched over the image
    as further input channels, without being materialised when it is the same everywhere, and it takes part in
    the attention.

    Initialisation: the mixture at uniform attention, where the training starts, has the variance that He et
    al. give a static convolution. The fan-in is that of one kernel, and since averaging N independent kernels
    divides the variance by N, each kernel is drawn :math:`\sqrt N` times larger (:math:`N \sqrt N` with
    ``average=True``).

    Args:
        in_channels: channels of the input, without the code.
        out_channels: channels of the output.
        kernel_size: int or (height, width).
        stride: int or pair.
        padding: zeros added at every side, int or pair; "same" or "valid", as in ``torch.nn.Conv2d``.
        dilation: int or pair.
        groups: as in ``torch.nn.Conv2d``; 1 when there is a code.
        bias: mix a bias, too.
        num_kernels: N.
        reduction: of the router's hidden layer.
        temperature: of the router's softmax; see :func:`~ddrf_fast.nn.anneal_temperature`.
        code_channels: length D of the code; 0 for none.
        activation: None, "relu" or "leaky_relu" (slope 0.01), fused into the convolution.
        average: the factor 1/N of eq. 6.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a size is not an int (or a pair).
        ValueError: a size is out of range, channels are not divisible by the groups, a code comes with
            groups, or the activation is unknown.

    Example:
        >>> layer = DynamicConv2d(8, 16, 3, padding=1, code_channels=5, activation="relu")
        >>> layer(torch.randn(2, 8, 12, 10), code=torch.randn(2, 5)).shape
        torch.Size([2, 16, 12, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        num_kernels: int = 4,
        reduction: int = 4,
        temperature: float = 1.0,
        code_channels: int = 0,
        activation: Activation | None = None,
        average: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.channels("in_channels", in_channels, "out_channels", out_channels, groups)
        if integer("code_channels", code_channels, 0) and groups != 1:
            raise ValueError(f"a code needs groups=1, got code_channels={code_channels}, groups={groups}")
        if activation is not None and activation not in get_args(Activation):
            raise ValueError(f'activation must be None, "relu" or "leaky_relu", got {activation!r}')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        convolution_geometry(self.kernel_size, stride, padding, dilation)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.num_kernels = num_kernels
        self.code_channels = code_channels
        self.activation = activation
        self.average = average
        self.router = Router(in_channels + code_channels, num_kernels, reduction, temperature)
        mixed_channels = in_channels // groups + code_channels
        self.weight = nn.Parameter(torch.zeros(num_kernels, out_channels, mixed_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(num_kernels, out_channels)) if bias else None
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the kernels (class docstring) and sets the biases to zero."""
        fan_in = self.weight[0, 0].numel()
        gain = nn.init.calculate_gain(self.activation) if self.activation else 1.0
        std = gain / math.sqrt(fan_in) * math.sqrt(self.num_kernels)
        if self.average:
            std *= self.num_kernels
        bound = math.sqrt(3.0) * std
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @overload
    def forward(
        self,
        x: Tensor,
        code: Tensor | None = ...,
        attention: Tensor | None = ...,
        pooled: Tensor | None = ...,
        return_mean: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        code: Tensor | None = ...,
        attention: Tensor | None = ...,
        pooled: Tensor | None = ...,
        *,
        return_mean: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        code: Tensor | None = None,
        attention: Tensor | None = None,
        pooled: Tensor | None = None,
        return_mean: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Applies the layer.

        Args:
            x: Tensor[B, in_channels, H, W].
            code: Tensor[B, D] for the whole image, or a map Tensor[B, D, h, w] of any resolution, which is
                interpolated bilinearly over the image (corners on corners).
            attention: Tensor[B, N] (or [B, N, out_channels]) to use in place of the router's.
            pooled: Tensor[B, in_channels], the mean of ``x`` over its pixels where that is known already, as
                from ``return_mean`` of the layer before; the router then need not read ``x``.
            return_mean: return the mean of the output over its pixels, too.

        Returns:
            Tensor[B, out_channels, H', W'] in the dtype of ``x``; with ``return_mean`` a pair: that, and its
            mean Tensor[B, out_channels].

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: the code is missing or not wanted, or an argument has another shape.
        """
        _checks.image(x, self.in_channels)
        if (code is not None) != bool(self.code_channels):
            raise ValueError(
                f"code must {'be given' if self.code_channels else 'not be given'}: "
                f"this layer has code_channels={self.code_channels}"
            )
        if code is not None:
            tensor("code", code, ["[B, D]", "[B, D, h, w]"])
            shape("code", code, (x.shape[0], self.code_channels, *code.shape[2:]), "[B, D] or [B, D, h, w]")
            code = code.to(x.dtype)
        if pooled is not None:
            shape("pooled", tensor("pooled", pooled, ["[B, C]"]), x.shape[:2], "[B, C]")
        if code is not None and code.dim() == 4:
            code_map, code = in_layout_of(x, stretch(code, x.shape[2], x.shape[3])), None
            x = torch.cat((x, code_map), dim=1)
            if pooled is not None:
                pooled = torch.cat((pooled, code_map.mean(dim=(2, 3))), dim=1)
        if attention is None:
            scale = 1.0 / self.num_kernels if self.average else 1.0
            attention = self.router(x if pooled is None else pooled, code, scale)
        elif self.average:
            attention = attention / self.num_kernels
        # mypy cannot choose an overload by a bool.
        return dynamic_conv(  # type: ignore[call-overload, misc]
            x,
            self.weight,
            attention,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            code=code,
            activation=self.activation,
            return_mean=return_mean,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        defaults = {
            "stride": 1,
            "padding": 0,
            "dilation": 1,
            "groups": 1,
            "code_channels": 0,
            "activation": None,
        }
        parts.append(f"num_kernels={self.num_kernels}")
        parts += [
            f"{name}={getattr(self, name)!r}"
            for name, value in defaults.items()
            if getattr(self, name) != value
        ]
        if self.bias is None:
            parts.append("bias=False")
        if self.average:
            parts.append("average=True")
        return ", ".join(parts)


def stretch(code_map: Tensor, height: int, width: int) -> Tensor:
    """Interpolates a map Tensor[B, D, h, w] bilinearly to Tensor[B, D, height, width], corners on corners."""
    if code_map.shape[2] == height and code_map.shape[3] == width:
        return code_map
    return F.interpolate(code_map, size=(height, width), mode="bilinear", align_corners=True)
