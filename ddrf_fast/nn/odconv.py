"""Omni-dimensional dynamic convolution: attention over kernels, taps, input and output channels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast.nn import _checks
from ddrf_fast.nn._bank import BankModule
from ddrf_fast.ops import dynamic_conv
from ddrf_fast.ops._checks import integer
from ddrf_fast.ops.dynamic_conv import convolution_geometry

# Leaves of torch.fx's symbolic traces.
torch.fx.wrap("dynamic_conv")


class ODConvAttention(nn.Module):
    """The four attentions of :class:`ODConv2d`, from relu(bn(fc(GAP(x)))).

    In training, BatchNorm has no variance to divide by where there is one sample with one value for each
    channel, and torch raises an error. A batch of one is therefore normalised by the running statistics, as
    in evaluation, and does not update them. (A ``SyncBatchNorm``, which sees other ranks' samples, is left to
    do its work.)

    Args:
        fc: from the input's channels to the hidden ones, on [B, C, 1, 1].
        bn: BatchNorm of the hidden channels.
        channel_fc: to the input channels.
        filter_fc: to the output channels; None for no such attention.
        spatial_fc: to the k * k taps; None for no such attention.
        kernel_fc: to the kernels; None for no such attention.
        temperature: divides what goes into the sigmoids and the softmax. Not in the state dict, as in the
            original.
    """

    def __init__(
        self,
        fc: nn.Conv2d,
        bn: nn.BatchNorm2d | nn.SyncBatchNorm,
        channel_fc: nn.Conv2d,
        filter_fc: nn.Conv2d | None,
        spatial_fc: nn.Conv2d | None,
        kernel_fc: nn.Conv2d | None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.fc = fc
        self.bn = bn
        self.channel_fc = channel_fc
        self.filter_fc = filter_fc
        self.spatial_fc = spatial_fc
        self.kernel_fc = kernel_fc
        self.temperature = float(temperature)  # a float, which torch.compile makes dynamic when it changes

    def update_temperature(self, temperature: float) -> None:
        """Sets the temperature.

        Raises:
            ValueError: it is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = float(temperature)

    def _normalise(self, hidden: Tensor) -> Tensor:
        bn = self.bn
        if bn.training and hidden.shape[0] == 1 and isinstance(bn, nn.BatchNorm2d) and bn.track_running_stats:
            return F.batch_norm(hidden, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return bn(hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Computes the attentions.

        Args:
            x: Tensor[B, C, H, W].

        Returns:
            Of input channels Tensor[B, I], output channels Tensor[B, O], taps Tensor[B, k * k] (each in 0..1)
            and kernels Tensor[B, K] (summing to 1); None for those that the layer does not have.
        """
        hidden = F.relu(self._normalise(self.fc(x.mean(dim=(2, 3), keepdim=True))))

        def logits(head: nn.Conv2d) -> Tensor:
            return head(hidden).flatten(1) / self.temperature

        return (
            logits(self.channel_fc).sigmoid(),
            None if self.filter_fc is None else logits(self.filter_fc).sigmoid(),
            None if self.spatial_fc is None else logits(self.spatial_fc).sigmoid(),
            None if self.kernel_fc is None else logits(self.kernel_fc).softmax(dim=1),
        )


class ODConv2d(BankModule):
    r"""Omni-dimensional dynamic convolution.

    .. math::
        y_b = \alpha^f_b \odot \Bigl(\sum_{k=1}^K \alpha^w_{bk}\, \alpha^s_b \odot W_k\Bigr) * (\alpha^c_b
        \odot x_b)

    with attentions over output channels (f), kernels (w, softmax), taps (s) and input channels (c, like f and
    s a sigmoid), all from one pooled vector: Li et al., *Omni-Dimensional Dynamic Convolution* (ICLR 2022,
    arXiv:2209.07947). Constructor, attributes, state dict and numbers are those of OSVAI/ODConv; its weights
    load. As there, a depthwise layer has no f, a 1x1 kernel no s, and a single kernel no w. The original's
    [B, K, O, I/g, k, k] intermediate does not exist here, and a batch of one trains
    (:class:`ODConvAttention`), where the original raises an error.

    Each kernel is initialised on its own (He et al., its own fan-out).

    Args:
        in_planes: channels of the input.
        out_planes: channels of the output.
        kernel_size: height and width.
        stride: int or pair.
        padding: zeros at every side, int or pair; "same" or "valid", as in ``torch.nn.Conv2d``.
        dilation: int or pair.
        groups: as in ``torch.nn.Conv2d``.
        reduction: the attention has int(in_planes * reduction) hidden channels, at least 16.
        kernel_num: number of kernels K.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: Parameter[K, O, I/g, k, k]; there is no bias.
        attention: ``fc.weight``, ``bn.*``, and weight and bias of ``channel_fc``, ``filter_fc``,
            ``spatial_fc``, ``kernel_fc``.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is out of range, or channels are not divisible by the groups.

    Example:
        >>> layer = ODConv2d(8, 16, 3, padding=1)
        >>> layer(torch.randn(1, 8, 12, 10)).shape
        torch.Size([1, 16, 12, 10])
        >>> layer.update_temperature(15.5)
    """

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        kernel_size: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        reduction: float = 0.0625,
        kernel_num: int = 4,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.channels("in_planes", in_planes, "out_planes", out_planes, groups)
        integer("kernel_size", kernel_size, 1)
        convolution_geometry((kernel_size, kernel_size), stride, padding, dilation)
        integer("kernel_num", kernel_num, 1)
        self.in_planes = in_planes
        self.out_planes = out_planes
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.kernel_num = kernel_num
        hidden = max(int(in_planes * reduction), 16)
        depthwise = in_planes == groups == out_planes
        self.attention = ODConvAttention(
            nn.Conv2d(in_planes, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, in_planes, 1),
            None if depthwise else nn.Conv2d(hidden, out_planes, 1),
            None if kernel_size == 1 else nn.Conv2d(hidden, kernel_size * kernel_size, 1),
            None if kernel_num == 1 else nn.Conv2d(hidden, kernel_num, 1),
        )
        self.weight = nn.Parameter(
            torch.empty(kernel_num, out_planes, in_planes // groups, kernel_size, kernel_size)
        )
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the kernels, each with its own fan-out, and the attention's layers; biases are zero."""
        for kernel in self.weight.detach():
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
        for layer in self.attention.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.attention.bn.reset_parameters()

    def update_temperature(self, temperature: float) -> None:
        """Sets the attention's temperature (the authors go from 30 to 1 in the first 10 epochs).

        Raises:
            ValueError: it is not positive.
        """
        self.attention.update_temperature(temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, in_planes, H, W] -> Tensor[B, out_planes, H', W'], in the dtype of ``x``.

        Raises:
            TypeError, ValueError: as ``ddrf_fast.dynamic_conv``.
        """
        _checks.image(x, self.in_planes)
        channel, filter_, spatial, kernel = self.attention(x)
        return dynamic_conv(
            x,
            self.weight,
            channel.new_ones(x.shape[0], 1) if kernel is None else kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            in_scale=channel,
            out_scale=filter_,
            tap_scale=None if spatial is None else spatial.unflatten(1, self.weight.shape[3:]),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_planes}, {self.out_planes}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"kernel_num={self.kernel_num}"
        )
