"""The layers of DDRF-Net as the engine runs them: one form for dynamic, static and estimators' ones."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ddrf_fast.models import DDRFNet
from ddrf_fast.models.ddrfnet import Conv, FusionHead, ResidualBlock, RestorationBranch
from ddrf_fast.models.estimator import CodeEstimator
from ddrf_fast.models.tone import ToneEstimator
from ddrf_fast.nn import DynamicConv2d
from ddrf_fast.ops import route
from ddrf_fast.ops.dynamic_conv import Activation, dynamic_conv_into


class Layer:
    """A 3x3 convolution with padding 1; a static one is a bank of one kernel.

    Args:
        layer: whose parameters it takes.
        dtype: what they are converted to.
        activation: where ``layer`` is a plain ``nn.Conv2d``, which has none.

    Attributes:
        channels: of the output.
        stride: the same for rows and columns.
    """

    def __init__(self, layer: Conv | nn.Conv2d, dtype: torch.dtype, activation: Activation | None = None):
        def packed(tensor: Tensor | None) -> Tensor:
            assert tensor is not None
            return tensor.detach().to(dtype).contiguous()

        dynamic = isinstance(layer, DynamicConv2d)
        weight, bias = packed(layer.weight), packed(layer.bias)
        self.weight, self.bias = (weight, bias) if dynamic else (weight[None], bias[None])
        self.activation: Activation | None = getattr(layer, "activation", activation)
        self.channels = self.weight.shape[1]
        self.stride = layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
        self._router: tuple[Tensor, ...] = ()
        if isinstance(layer, DynamicConv2d):
            squeeze, excite = layer.router.squeeze, layer.router.excite
            router = (squeeze.weight, squeeze.bias, excite.weight, excite.bias)
            self._router = tuple(packed(tensor) for tensor in router)
            self._temperature = layer.router.temperature
            self._scale = 1.0 / layer.num_kernels if layer.average else 1.0

    def attention(self, mean: Tensor, code: Tensor | None = None) -> Tensor:
        """The mixing weights Tensor[B, N] for an input of this mean Tensor[B, C]."""
        if not self._router:
            return self.static_attention(len(mean))
        return route(mean, *self._router, code=code, temperature=self._temperature, scale=self._scale)

    def static_attention(self, batch: int) -> Tensor:
        """The weights Tensor[B, 1] of a static layer, which are the same for every input."""
        return self.weight.new_ones(batch, 1)

    def into(
        self, y: Tensor, x: Tensor, attention: Tensor, code: Tensor | None = None, accumulate: bool = False
    ) -> Tensor:
        """Writes the result to ``y``, or adds it; returns its mean Tensor[B, channels]."""
        stride = (self.stride, self.stride)
        return dynamic_conv_into(
            y, x, self.weight, attention, self.bias, code, stride, (1, 1), self.activation, accumulate
        )


@dataclass
class Estimator:
    """A :class:`~ddrf_fast.models.estimator.CodeEstimator`.

    Attributes:
        layers: which see the details of an image.
        code: turns the energies that they find, into a code.
    """

    layers: list[Layer]
    code: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, estimator: CodeEstimator, dtype: torch.dtype) -> "Estimator":
        *first, last = estimator.layers
        layers = [Layer(layer, dtype, "leaky_relu") for layer in first]  # type: ignore[arg-type]
        layers.append(Layer(last, dtype))  # type: ignore[arg-type]
        return cls(layers, estimator.code)


class Code(NamedTuple):
    """How an image was degraded, for the layers; None: to be estimated.

    Attributes:
        values: Tensor[B, D], in the network's units and its dtype.
        tone: Tensor[B, 3].
        mean: Tensor[B], of :func:`~ddrf_fast.degradation.undo_darkness`.
    """

    values: Tensor | None = None
    tone: Tensor | None = None
    mean: Tensor | None = None

    def of(self, samples: slice) -> "Code":
        """That of some of the images."""
        return Code(*(None if part is None else part[samples] for part in self))


@dataclass
class Branch:
    """The layers of a restoration branch, and its estimators.

    Attributes:
        tone: of an image, Tensor[B, 3], from the means of what :func:`~ddrf_fast.models.tone.light` gives.
    """

    estimator: Estimator
    tone: Callable[[Tensor], Tensor]
    head: Layer
    blocks: list[tuple[Layer, Layer]]
    tail: Layer

    @classmethod
    def of(
        cls, branch: RestorationBranch, estimator: CodeEstimator, tone: ToneEstimator, dtype: torch.dtype
    ) -> "Branch":
        blocks = cast(Iterable[ResidualBlock], branch.blocks)
        return cls(
            Estimator.of(estimator, dtype),
            tone.tone,
            Layer(branch.head, dtype),
            [(Layer(block.expand, dtype), Layer(block.project, dtype)) for block in blocks],
            Layer(branch.tail, dtype),
        )


@dataclass
class Fusion:
    """The layers of the fusion.

    Attributes:
        merge, mix1, mix2, output: in their order.
        selectivity: of its :func:`~ddrf_fast.models.ddrfnet.blend`.
        caution: likewise, Tensor[B] from the codes Tensor[B, 2 D].
    """

    merge: Layer
    mix1: Layer
    mix2: Layer
    output: Layer
    selectivity: float
    caution: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, fusion: FusionHead, dtype: torch.dtype) -> "Fusion":
        return cls(
            merge=Layer(fusion.merge, dtype),
            mix1=Layer(fusion.mix1, dtype),
            mix2=Layer(fusion.mix2, dtype),
            output=Layer(fusion.output, dtype),
            selectivity=100 * fusion.selectivity.item(),
            caution=fusion.caution_of,
        )


@dataclass(eq=False)
class NetworkLayers:
    """All the layers of a DDRFNet in one dtype, or those of one of its branches.

    Attributes:
        branches: infrared and visible, the order in which the fusion takes them; or one of them.
        fusion: of both; None: the branch restores, and that is all.
        width: channels of the features.
        dtype: of the features and the parameters.
        picture_dtype: of images and what is added to them: bfloat16 would show in an 8-bit image.
        device: where the parameters are.
    """

    branches: tuple[Branch, ...]
    fusion: Fusion | None
    width: int
    dtype: torch.dtype
    picture_dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: DDRFNet, dtype: torch.dtype) -> "NetworkLayers":
        branches = (
            Branch.of(model.infrared_branch, model.infrared_estimator, model.infrared_tone, dtype),
            Branch.of(model.visible_branch, model.visible_estimator, model.visible_tone, dtype),
        )
        return cls(
            branches,
            Fusion.of(model.fusion, dtype),
            width=model.config.width,
            dtype=dtype,
            picture_dtype=torch.promote_types(dtype, torch.float32),
            device=model.code_basis.device,
        )

    def alone(self, index: int) -> "NetworkLayers":
        """A branch without the other one and the fusion."""
        return replace(self, branches=(self.branches[index],), fusion=None)
