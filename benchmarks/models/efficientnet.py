"""EfficientNet-B0 (Tan and Le 2019), static or with CondConv in its last three stages (Yang et al. 2019).

A block expands (1x1), convolves depthwise, squeezes and excites, and projects (1x1, without activation). With
CondConv these three convolutions mix their kernels by one routing, a sigmoid of a linear function of the
pooled input of the block. The function that computes them is an argument of the forward pass, with the
signature of `ddrf_fast.dynamic_conv`, so that everybody runs the same network.

Padding is symmetric, and there is neither dropout nor stochastic depth.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolve = Callable[..., Tensor]

# (repeats, kernel size, stride, expansion, output channels); CondConv from DYNAMIC_STAGES on.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
DYNAMIC_STAGES = 4
STEM, HEAD, CLASSES = 32, 1280, 1000


class CondConv2d(nn.Module):
    """A bank of kernels [N, O, I/g, k, k] without a bias."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, groups: int, num_kernels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_kernels, outputs, inputs // groups, size, size))
        self.options = {"stride": stride, "padding": size // 2, "groups": groups}

    def forward(self, x: Tensor, attention: Tensor, convolve: Convolve) -> Tensor:
        return convolve(x, self.weight, attention, **self.options)


class StaticConv2d(nn.Conv2d):
    """A convolution that is called as a CondConv2d."""

    def forward(self, x: Tensor, attention: Tensor | None, convolve: Convolve | None) -> Tensor:
        return super().forward(x)


def _conv(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, num_kernels: int = 0
) -> nn.Module:
    if num_kernels:
        return CondConv2d(inputs, outputs, size, stride, groups, num_kernels)
    return StaticConv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class SqueezeExcite(nn.Module):
    """Channels scaled by a function of their means."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Block(nn.Module):
    """MBConv; without the expansion where that is 1."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int, num_kernels: int):
        super().__init__()
        inner = inputs * expansion
        self.routing = nn.Linear(inputs, num_kernels) if num_kernels else None
        self.conv_pw = _conv(inputs, inner, 1, num_kernels=num_kernels) if expansion > 1 else None
        self.norm_pw = _norm(inner) if expansion > 1 else None
        self.conv_dw = _conv(inner, inner, size, stride, groups=inner, num_kernels=num_kernels)
        self.norm_dw = _norm(inner)
        self.squeeze_excite = SqueezeExcite(inner, inputs // 4)
        self.conv_pwl = _conv(inner, outputs, 1, num_kernels=num_kernels)
        self.norm_pwl = _norm(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor, convolve: Convolve | None) -> Tensor:
        attention = None if self.routing is None else self.routing(x.mean((2, 3))).sigmoid()
        y = x
        if self.conv_pw is not None:
            y = F.silu(self.norm_pw(self.conv_pw(y, attention, convolve)))
        y = F.silu(self.norm_dw(self.conv_dw(y, attention, convolve)))
        y = self.norm_pwl(self.conv_pwl(self.squeeze_excite(y), attention, convolve))
        return x + y if self.residual else y


class EfficientNetB0(nn.Module):
    """[B, 3, H, W] -> [B, 1000].

    Args:
        num_kernels: Of every CondConv; 0 for the static network.
    """

    def __init__(self, num_kernels: int = 0):
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 3, 2, 1, bias=False)
        self.norm_stem = _norm(STEM)
        self.blocks = nn.ModuleList()
        inputs = STEM
        for stage, (repeats, size, stride, expansion, outputs) in enumerate(STAGES):
            for repeat in range(repeats):
                self.blocks.append(
                    Block(
                        inputs,
                        outputs,
                        size,
                        stride if repeat == 0 else 1,
                        expansion,
                        num_kernels if stage >= DYNAMIC_STAGES else 0,
                    )
                )
                inputs = outputs
        self.head = nn.Conv2d(inputs, HEAD, 1, bias=False)
        self.norm_head = _norm(HEAD)
        self.classifier = nn.Linear(HEAD, CLASSES)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernels, each of a bank as if it were alone, by He's rule for the fan-out. The branches of
        residuals start small, so that rounding errors do not grow from block to block."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, CondConv2d)):
                outputs, _, height, width = module.weight.shape[-4:]
                groups = module.groups if isinstance(module, nn.Conv2d) else module.options["groups"]
                nn.init.normal_(module.weight, std=math.sqrt(2 * groups / (outputs * height * width)))
            if isinstance(module, Block) and module.residual:
                nn.init.constant_(module.norm_pwl.weight, 0.2)

    def forward(self, x: Tensor, convolve: Convolve | None = None) -> Tensor:
        x = F.silu(self.norm_stem(self.stem(x)))
        for block in self.blocks:
            x = block(x, convolve)
        x = F.silu(self.norm_head(self.head(x)))
        return self.classifier(x.mean((2, 3)))
