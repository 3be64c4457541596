"""Routers: how a dynamic convolution decides, for each sample, how much of each kernel it takes."""

from typing import Any

import torch
from torch import Tensor, nn

from ddrf_fast.ops import route
from ddrf_fast.ops._checks import integer

# Leaves of torch.fx's symbolic traces.
torch.fx.wrap("route")


class Router(nn.Module):
    r"""Attention over the kernels of a bank, computed from a pooled input.

    .. math::
        \pi(x) = \operatorname{softmax}\bigl(\mathrm{FC}_2(\mathrm{ReLU}(\mathrm{FC}_1(\mathrm{GAP}(x)))) /
        \tau\bigr)

    This is the attention of Chen et al., *Dynamic Convolution: Attention over Convolution Kernels* (CVPR
    2020), which DDRF-Net uses for :math:`\pi_k` in its eq. 6. A high temperature keeps the attention near
    uniform, so that every kernel is trained; it is lowered to 1 early in the training
    (:func:`anneal_temperature`).

    Args:
        in_channels: channels that are pooled, those of a degradation code included.
        num_kernels: number of attention weights N.
        reduction: the hidden layer has ``in_channels // reduction`` units, at least 8, so that hardly ever
            all are dead.
        temperature: the :math:`\tau` of the softmax, positive. A buffer: saved with the weights, and changing
            it does not recompile a compiled model.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size or the temperature is not positive.

    Example:
        >>> router = Router(in_channels=8, num_kernels=4)
        >>> router(torch.randn(2, 8, 5, 7)).shape
        torch.Size([2, 4])
    """

    temperature: Tensor

    def __init__(
        self,
        in_channels: int,
        num_kernels: int,
        reduction: int = 4,
        temperature: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.num_kernels = integer("num_kernels", num_kernels, 1)
        integer("reduction", reduction, 1)
        hidden = max(in_channels // reduction, 8)
        self.squeeze = nn.Linear(in_channels, hidden)
        self.excite = nn.Linear(hidden, num_kernels)
        self.register_buffer("temperature", torch.ones(()))
        self._first_temperature = temperature
        self.set_temperature(temperature)
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the linear layers as torch does, and sets the temperature that it was made with."""
        self.squeeze.reset_parameters()
        self.excite.reset_parameters()
        self.set_temperature(self._first_temperature)

    def set_temperature(self, temperature: float) -> None:
        """Sets the temperature of the softmax.

        Raises:
            ValueError: the temperature is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature.fill_(temperature)

    def forward(self, x: Tensor, code: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Computes the attention.

        Args:
            x: Tensor[B, C, H, W], or its mean Tensor[B, C] over the pixels where that is known already.
            code: Tensor[B, D], further channels that are constant over the image (their mean is their value),
                with C + D = ``in_channels``.
            scale: multiplies the result.

        Returns:
            Tensor[B, N], positive, each row summing to ``scale``, in the dtype of ``x``.
        """
        squeeze, excite = self.squeeze, self.excite
        return route(
            x,
            squeeze.weight,
            squeeze.bias,
            excite.weight,
            excite.bias,
            code=None if code is None else code.to(x.dtype),
            temperature=self.temperature,
            scale=scale,
        )

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, num_kernels={self.num_kernels}"


def anneal_temperature(module: nn.Module, progress: float, start: float = 30.0, end: float = 1.0) -> None:
    """Lowers the temperature of every :class:`Router` in ``module`` linearly from ``start`` to ``end``.

    Chen et al. go from 30 to 1 in the first 10 epochs.

    Args:
        module: any module that contains routers.
        progress: how much of the annealing is over: 0 gives ``start``, 1 and above give ``end``.
        start: first temperature.
        end: last temperature.

    Example:
        >>> router = Router(8, 4)
        >>> anneal_temperature(router, 0.5, start=31.0)
        >>> router.temperature.item()
        16.0
    """
    temperature = start + (end - start) * min(max(progress, 0.0), 1.0)
    for router in module.modules():
        if isinstance(router, Router):
            router.set_temperature(temperature)
