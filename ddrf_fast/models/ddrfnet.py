"""DDRF-Net: restores a visible and an infrared image and fuses them, in one pass of dynamic convolutions.

    visible  --> branch --> f_v, H1 --+
                                      +--> four dynamic convolutions --> P
    infrared --> branch --> f_i, H2 --+

Blur and noise came after darkness, so a branch takes them back in the dark, and darkness last of all.
After Fang, Zhao, Yang, Zhang, "Dynamic Degradation for Image Restoration and Fusion" (sections 3.3 and 3.5).
What the paper leaves open was chosen for speed: everything runs at half resolution (``pixel_unshuffle``),
where 32 channels cost what 8 cost at full resolution, and capacity comes from the number of kernels in each
bank, which costs no operations. Where no gradients are recorded, each dynamic layer hands the mean of its
output on to the router of the next one, so that nothing is read again for an attention (the mean of a sum is
the sum of the means).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddrf_fast.degradation.codes import KernelPCA
from ddrf_fast.degradation.photometric import TONE_CHANNELS, undo_darkness
from ddrf_fast.models.estimator import CodeEstimator
from ddrf_fast.models.pretrained import PretrainedMixin
from ddrf_fast.models.static_conv import StaticConv2d
from ddrf_fast.models.tone import ToneEstimator, with_tone
from ddrf_fast.nn import DynamicConv2d
from ddrf_fast.nn.dynamic_conv import Activation, stretch

Conv = DynamicConv2d | StaticConv2d
Modality = Literal["visible", "infrared"]


@dataclass(frozen=True)
class DDRFNetConfig:
    """Sizes of a :class:`DDRFNet`; the defaults are those of the shipped weights.

    Attributes:
        width: channels of the features, at half resolution.
        blocks: residual blocks (two dynamic convolutions each) of a branch.
        num_kernels: kernels in each bank, N of eq. 6.
        reduction: of the routers' hidden layers.
        code_channels: length of a degradation code: PCA of the kernel, then the noise level.
        kernel_size: side of the blur kernels that are encoded.
        kernel_code_scale: factor on the PCA part of a code, which brings it to the order of 1.
        noise_code_scale: factor on the noise level (image units), likewise.
        dynamic_visible: the visible branch has dynamic convolutions; else it is its static twin, the same
            layers with plain ones: the same operations for a pixel, and about 1/N of the parameters.
        dynamic_infrared: likewise the infrared branch.
        dynamic_fusion: likewise the fusion.
    """

    width: int = 32
    blocks: int = 3
    num_kernels: int = 8
    reduction: int = 4
    code_channels: int = 16
    kernel_size: int = 25
    kernel_code_scale: float = 4.0
    noise_code_scale: float = 16.0
    dynamic_visible: bool = True
    dynamic_infrared: bool = True
    dynamic_fusion: bool = True


class DDRFOutput(NamedTuple):
    """What :class:`DDRFNet` returns; each a Tensor[B, 1, H, W], nominally in [0, 1] and not clipped.

    Attributes:
        fused: P, the fused image (H3 of the paper).
        visible: H1, the restored visible image.
        infrared: H2, the restored infrared image.
    """

    fused: Tensor
    visible: Tensor
    infrared: Tensor


class DDRFNet(PretrainedMixin, nn.Module):
    """The network of the paper: two restoration branches that share no weights, and a dynamic fusion.

    All convolutions but those of the blind estimators are dynamic, with the 1/N of eq. 6, unless the
    configuration makes a part static. Without a code, the estimators of that modality predict one from the
    degraded image (blind use); a user who knows the degradation passes it.

    Args:
        config: the sizes.

    Example:
        >>> model = DDRFNet().eval()
        >>> with torch.inference_mode():
        ...     output = model(torch.rand(1, 1, 37, 50), torch.rand(1, 1, 37, 50))
        >>> output.fused.shape
        torch.Size([1, 1, 37, 50])
    """

    def __init__(self, config: DDRFNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DDRFNetConfig()
        self.visible_branch = RestorationBranch(config, config.dynamic_visible)
        self.infrared_branch = RestorationBranch(config, config.dynamic_infrared)
        self.fusion = FusionHead(config)
        self.visible_estimator = CodeEstimator(config.code_channels)
        self.infrared_estimator = CodeEstimator(config.code_channels)
        self.visible_tone, self.infrared_tone = ToneEstimator(), ToneEstimator()
        scale = torch.full((config.code_channels,), config.kernel_code_scale)
        scale[-1] = config.noise_code_scale
        self.register_buffer("code_scale", scale, persistent=False)
        self.register_buffer("code_basis", torch.zeros(config.code_channels - 1, config.kernel_size**2))

    code_basis: Tensor
    code_scale: Tensor

    @property
    def kernel_code(self) -> KernelPCA:
        """The code of blur kernels that the network was trained with."""
        return KernelPCA(self.code_basis, 1.0)

    def forward(
        self,
        visible: Tensor,
        infrared: Tensor,
        visible_code: Tensor | None = None,
        infrared_code: Tensor | None = None,
    ) -> DDRFOutput:
        """Restores and fuses a batch of pairs.

        Args:
            visible: Tensor[B, 1, H, W], luma in [0, 1]; any H, W >= 1.
            infrared: Tensor[B, 1, H, W] in [0, 1].
            visible_code: how ``visible`` was degraded (:meth:`encode`): Tensor[B, 16] for the whole image,
                or a coarse map Tensor[B, 16, h, w]; dark images have 19 numbers, of which the last three are
                the tone, and these alone, Tensor[B, 3], tell nothing but it. What is not told, and with
                None all, is estimated from the image.
            infrared_code: the same for ``infrared``.

        Returns:
            The fused and the two restored images, of the size and dtype of the inputs.

        Raises:
            TypeError: images that are not floating.
            ValueError: images that are not [B, 1, H, W], differ in shape or are empty, or codes of another
                shape.
        """
        check_images(visible, infrared)
        height, width = visible.shape[2:]
        visible, infrared = pad_to_even(visible), pad_to_even(infrared)
        visible_code, visible_tone = self._degradation("visible", "visible_code", visible_code, visible)
        infrared_code, infrared_tone = self._degradation("infrared", "infrared_code", infrared_code, infrared)
        visible_features, visible_restored = self.visible_branch(visible, visible_code)
        infrared_features, infrared_restored = self.infrared_branch(infrared, infrared_code)
        visible_restored = undo_darkness(visible_restored, visible_tone)
        infrared_restored = undo_darkness(infrared_restored, infrared_tone)
        fused = self.fusion(
            infrared_features,
            visible_features,
            infrared_restored,
            visible_restored,
            infrared_code,
            visible_code,
        )
        return DDRFOutput(
            *(_crop(image, height, width) for image in (fused, visible_restored, infrared_restored))
        )

    def restore(self, modality: Modality, image: Tensor, code: Tensor | None = None) -> Tensor:
        """Restores images of one modality by its branch alone: H1 or H2, as ``forward`` gives them.

        Args:
            modality: "visible" or "infrared".
            image: Tensor[B, 1, H, W] in [0, 1]; any H, W >= 1.
            code: as ``visible_code`` of ``forward``.

        Returns:
            Tensor[B, 1, H, W], nominally in [0, 1] and not clipped.

        Raises:
            TypeError: an image that is not floating.
            ValueError: another modality, or an image or a code of another shape.
        """
        check_image(modality, image)
        padded = pad_to_even(image)
        branch = self.visible_branch if modality == "visible" else self.infrared_branch
        code, tone = self._degradation(modality, "code", code, padded)
        _, restored = branch(padded, code)
        return _crop(undo_darkness(restored, tone), *image.shape[2:])

    def estimate_codes(self, visible: Tensor, infrared: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts both degradation codes, as ``forward`` does where none is given.

        Args:
            visible: Tensor[B, 1, H, W] in [0, 1].
            infrared: Tensor[B, 1, H, W] in [0, 1].

        Returns:
            Two Tensor[B, 19], for the visible and the infrared images, in the units in which codes are given.
        """
        return self.estimate_code("visible", visible), self.estimate_code("infrared", infrared)

    def estimate_code(self, modality: Modality, image: Tensor) -> Tensor:
        """Predicts the degradation code of images of one modality: as :meth:`estimate_codes`.

        Args:
            modality: "visible" or "infrared".
            image: Tensor[B, 1, H, W] in [0, 1].

        Returns:
            Tensor[B, 19].

        Raises:
            TypeError: an image that is not floating.
            ValueError: another modality, or an image of another shape.
        """
        check_image(modality, image)
        image = pad_to_even(image)
        estimator, tone = self._estimators(modality)
        return with_tone(estimator(image) / self.code_scale, tone(image))

    def encode(self, kernels: Tensor, noise_std: Tensor, tone: Tensor | None = None) -> Tensor:
        """Codes of known degradations, in the basis that the network was trained with.

        Args:
            kernels: Tensor[B, k, k], blur kernels, each summing to 1, k the configuration's ``kernel_size``.
            noise_std: Tensor[B], standard deviation of the noise for images in [0, 1].
            tone: Tensor[B, 3], gamma, gain and contrast of dark images, all positive
                (:mod:`ddrf_fast.degradation.photometric`); None: they are not dark.

        Returns:
            Tensor[B, 16], or with a tone Tensor[B, 19], to be passed as ``visible_code`` or
            ``infrared_code``.

        Raises:
            ValueError: the kernels have another size, or there is not one noise level and tone for each.
        """
        size = self.config.kernel_size
        if kernels.dim() != 3 or kernels.shape[1:] != (size, size) or noise_std.shape != kernels.shape[:1]:
            raise ValueError(
                f"kernels must be [B, {size}, {size}] and noise_std [B], "
                f"got {list(kernels.shape)} and {list(noise_std.shape)}"
            )
        code = torch.cat((kernels.flatten(1) @ self.code_basis.mT, noise_std[:, None]), dim=1)
        if tone is None:
            return code
        if tone.shape != (len(kernels), TONE_CHANNELS) or not bool((tone > 0).all()):
            raise ValueError(
                f"tone must be [{len(kernels)}, {TONE_CHANNELS}] and positive, got {list(tone.shape)}: {tone}"
            )
        return with_tone(code, tone)

    def caution_logit(self, visible_code: Tensor, infrared_code: Tensor) -> Tensor:
        """The log odds, Tensor[B], that pairs of these codes, Tensor[B, 16], are fused with caution.

        A tone behind them makes no difference.
        """
        codes = (code[:, : self.config.code_channels] for code in (infrared_code, visible_code))
        code = torch.cat([code * self.code_scale for code in codes], dim=1)
        return self.fusion.caution(code)[:, 0]

    def _degradation(
        self, modality: Modality, name: str, code: Tensor | None, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The code in the network's units, Tensor[B, D], or Tensor[B, D, H/2, W/2] for a map; the tone."""
        estimator, tone_estimator = self._estimators(modality)
        tone = None
        if code is not None:
            code, tone = split_code(name, code.to(image.dtype), image.shape[0], self.config.code_channels)
        if tone is None:
            tone = tone_estimator(image)
        elif tone.dim() == 4:
            tone = tone.mean(dim=(2, 3))
        if code is None:
            return estimator(image), tone
        if code.dim() == 2:
            return code * self.code_scale, tone
        size = image.shape[2] // 2, image.shape[3] // 2
        return stretch(code, *size) * self.code_scale.view(-1, 1, 1), tone

    def _estimators(self, modality: Modality) -> tuple[CodeEstimator, ToneEstimator]:
        if modality == "visible":
            return self.visible_estimator, self.visible_tone
        return self.infrared_estimator, self.infrared_tone


class Pooled(NamedTuple):
    """Features with their mean over the pixels, where that is known.

    Attributes:
        values: Tensor[B, C, H, W].
        mean: Tensor[B, C], or None.
    """

    values: Tensor
    mean: Tensor | None = None


class RestorationBranch(nn.Module):
    """Extracts the features of one modality and restores its image.

    A dynamic convolution in, residual blocks, a dynamic convolution out that predicts the difference between
    the restored and the degraded image. The code enters wherever an activation follows, and every attention
    but the linear layers'.
    """

    def __init__(self, config: DDRFNetConfig, dynamic: bool) -> None:
        super().__init__()
        width, code_channels = config.width, config.code_channels
        self.head = _conv(config, dynamic, 4, width, activation="leaky_relu", code_channels=code_channels)
        self.blocks = nn.ModuleList(ResidualBlock(config, dynamic) for _ in range(config.blocks))
        self.tail = _conv(config, dynamic, width, 4)
        _shrink(self.tail)

    def forward(self, image: Tensor, code: Tensor) -> tuple[Pooled, Tensor]:
        """Features Tensor[B, width, H/2, W/2] and restored image of Tensor[B, 1, H, W], H and W even."""
        x = _apply(self.head, Pooled(F.pixel_unshuffle(image, 2)), code)
        for block in self.blocks:
            x = block(x, code)
        return x, image + F.pixel_shuffle(self.tail(x.values, pooled=x.mean), 2)


class ResidualBlock(nn.Module):
    """``x + W2 * act(W1 * C(x, code))``, both convolutions dynamic or both static."""

    def __init__(self, config: DDRFNetConfig, dynamic: bool) -> None:
        super().__init__()
        width, code_channels = config.width, config.code_channels
        self.expand = _conv(
            config, dynamic, width, width, activation="leaky_relu", code_channels=code_channels
        )
        self.project = _conv(config, dynamic, width, width)
        _shrink(self.project)

    def forward(self, x: Pooled, code: Tensor) -> Pooled:
        change = _apply(self.project, _apply(self.expand, x, code))
        mean = None if x.mean is None or change.mean is None else x.mean + change.mean
        return Pooled(x.values + change.values, mean)


class FusionHead(nn.Module):
    r"""Four layers of dynamic convolution over C(f_i, f_v, k_di, k_dv), eq. 6.

    The features of a modality are those of its branch together with its restored image; the last layer sees
    the restored images and the codes again: of degraded pairs other shares are wanted than of clean ones. It
    gives shares and a correction for :func:`blend`, so that taking over either source, or the detail of both,
    need not pass through few channels at half resolution. At the start the base of P is near the mean of the
    restored images, and its detail that of the livelier one.

    Attributes:
        selectivity: s of :func:`blend`, in hundreds, so that it learns as fast as other parameters.
        caution: from the codes of both images, the log odds that the pair is so degraded that
            :func:`blend` had better be cautious. It is trained to tell such pairs, and by nothing else.
    """

    def __init__(self, config: DDRFNetConfig) -> None:
        super().__init__()
        width, dynamic = config.width, config.dynamic_fusion
        code_channels = 2 * config.code_channels
        self.merge = _conv(
            config, dynamic, 2 * (width + 4), width, activation="leaky_relu", code_channels=code_channels
        )
        self.mix1 = _conv(config, dynamic, width, width, activation="leaky_relu")
        self.mix2 = _conv(config, dynamic, width, width, activation="leaky_relu")
        self.output = _conv(config, dynamic, width + 8, 12, code_channels=code_channels)
        _shrink(self.output)
        self.selectivity = nn.Parameter(torch.tensor(0.5))
        self.caution = nn.Linear(code_channels, 1)
        nn.init.zeros_(self.caution.weight)
        nn.init.constant_(self.caution.bias, -2.0)

    def forward(
        self,
        infrared_features: Pooled,
        visible_features: Pooled,
        infrared: Tensor,
        visible: Tensor,
        infrared_code: Tensor,
        visible_code: Tensor,
    ) -> Tensor:
        """Fuses features Tensor[B, width, H/2, W/2] and restored images Tensor[B, 1, H, W]."""
        images = F.pixel_unshuffle(torch.cat((infrared, visible), dim=1), 2)
        if infrared_code.dim() != visible_code.dim():
            size = images.shape[2:]
            infrared_code, visible_code = (_as_map(code, size) for code in (infrared_code, visible_code))
        sources = Pooled(images, None if torch.is_grad_enabled() else images.mean(dim=(2, 3)))
        code = torch.cat((infrared_code, visible_code), dim=1)
        x = _apply(self.merge, _concatenate(infrared_features, visible_features, sources), code)
        x = _concatenate(_apply(self.mix2, _apply(self.mix1, x)), sources)
        output = _apply(self.output, x, code)
        mean = output.values.mean(dim=(2, 3)) if output.mean is None else output.mean
        caution = self.caution_of(code if code.dim() == 2 else code.mean(dim=(2, 3))).detach()
        fused = blend(images, base_images(images), output.values, mean, 100 * self.selectivity, caution)
        return F.pixel_shuffle(fused, 2)

    def caution_of(self, code: Tensor) -> Tensor:
        """c of :func:`blend`, Tensor[B] in [0, 1], for codes Tensor[B, 2 D] in the network's units."""
        return torch.sigmoid(self.caution(code.to(self.caution.weight.dtype)))[:, 0]


def blend(
    images: Tensor,
    bases: Tensor,
    output: Tensor,
    output_mean: Tensor,
    selectivity: Tensor | float,
    caution: Tensor,
) -> Tensor:
    r"""The fused image, from the restored ones and the last layer's shares m, n and correction r.

    .. math::
        P &= E(B) + M(H - E(L_1), n + s d_0) + (1 - c / 2) (r - \bar r) \\
        B &= M(L_4, (1 - c) m_4) + \sum_{k=1}^3 M(L_k - L_{k+1}, m_k + s d_k) \\
        M(D, q) &= D_2 + \sigma(q) (D_1 - D_2)

    with the bases L of each restored image H (:func:`base_images`), E that brings them to the image's pixels
    (:func:`to_pixels`), and of each band the difference of magnitudes d between modality 1, visible, and 2,
    infrared. So the livelier band is taken unless the network knows better, as fusions of Laplacian pyramids
    do: an average would have half of it. What remains, of scales beyond what the layers see, is shared as the
    network says. The correction does not change the brightness of the whole, which is that of the sources.
    With caution, c of 0 to 1, the base goes over into the mean of both and the correction into half of it:
    what the layers make of degraded pairs is less certain than that.

    Args:
        images: Tensor[B, 8, h, w], H2 and H1 (infrared and visible), unshuffled.
        bases: Tensor[B, 4, 2, h, w], their bases.
        output: Tensor[B, 12, h, w], m, n and r.
        output_mean: Tensor[B, 12], its mean over the pixels.
        selectivity: s.
        caution: Tensor[B], c.

    Returns:
        Tensor[B, 4, h, w], P unshuffled.
    """
    details = images - to_pixels(bases[:, 0])
    fused, base = blend_bands(details, bases, output, output_mean, selectivity, caution)
    return fused.add_(to_pixels(base))


def blend_bands(
    details: Tensor,
    bases: Tensor,
    output: Tensor,
    output_mean: Tensor,
    selectivity: Tensor | float,
    caution: Tensor,
) -> tuple[Tensor, Tensor]:
    """The two parts of :func:`blend`, each of which depends on its own pixel alone.

    Args:
        details: Tensor[B, 8, h, w], H - E(L1).
        bases, output, output_mean, selectivity, caution: as for :func:`blend`.

    Returns:
        P - E(B), Tensor[B, 4, h, w] unshuffled, and B, Tensor[B, 1, h, w].
    """
    band_shares, detail_share, correction = output.to(details.dtype).chunk(3, dim=1)
    caution = caution.to(details.dtype).view(-1, 1, 1, 1)
    selectivity = selectivity * torch.ones_like(caution)  # addcmul takes no number
    infrared, visible = details.chunk(2, dim=1)
    share = torch.addcmul(detail_share, selectivity, visible.abs().sub_(infrared.abs()))
    fused = torch.lerp(infrared, visible, share.sigmoid_())
    infrared, visible = (bases[:, :-1] - bases[:, 1:]).unbind(dim=2)
    share = torch.addcmul(band_shares[:, :-1], selectivity, visible.abs().sub_(infrared.abs()))
    base = torch.lerp(infrared, visible, share.sigmoid_()).sum(dim=1, keepdim=True)
    infrared, visible = bases[:, -1].chunk(2, dim=1)
    share = (1 - caution) * band_shares[:, -1:]
    base = base + torch.lerp(infrared, visible, share.sigmoid_())
    correction_mean = output_mean[:, 8:].to(details.dtype).mean(dim=1).view(-1, 1, 1, 1)
    return fused.add_((correction - correction_mean).mul_(1 - caution / 2)), base


def to_pixels(base: Tensor) -> Tensor:
    """What has a value for each 2x2 pixels, at each pixel: linear between their centres.

    Args:
        base: Tensor[B, n, h, w].

    Returns:
        Tensor[B, 4 n, h, w], unshuffled.

    Example:
        >>> F.pixel_shuffle(to_pixels(torch.tensor([[[[0.0, 4.0, 8.0]]]])), 2)[0, 0, 0]
        tensor([0., 1., 3., 5., 7., 8.])
    """
    height, width = base.shape[2:]
    around, pixels = F.pad(base, (1, 1, 1, 1), mode="replicate"), []
    for below in (0, 2):  # a quarter of the way to the row above, or below
        rows = torch.lerp(around[:, :, 1:-1], around.narrow(2, below, height), 0.25)
        pixels += [torch.lerp(rows[..., 1:-1], rows.narrow(3, right, width), 0.25) for right in (0, 2)]
    return torch.stack(pixels, dim=2).flatten(1, 2)


BASE_DISTANCES = (1, 2, 4, 8)
"""Of the taps of the successive blurs of :func:`base_images`, in pixels of half resolution."""


def base_images(images: Tensor) -> Tensor:
    """The bases of unshuffled images, each coarser than the one before: what a pyramid has, at one size.

    They are the means of 2x2 pixels, blurred again and again with binomial taps, (1, 2, 1) / 4 along rows and
    columns, that lie twice as far apart each time (the à trous algorithm).

    Args:
        images: Tensor[B, 4 n, h, w]. Beyond the border they go on as at the border.

    Returns:
        Tensor[B, 4, n, h, w].

    Example:
        >>> base_images(torch.ones(1, 8, 3, 4)).shape
        torch.Size([1, 4, 2, 3, 4])
    """
    bases = [images.unflatten(1, (-1, 4)).mean(dim=2)]
    for distance in BASE_DISTANCES:
        x = F.pad(bases[-1], (distance,) * 4, mode="replicate")
        for dim in (2, 3):
            length = x.shape[dim] - 2 * distance
            first, middle, last = (x.narrow(dim, i * distance, length) for i in range(3))
            x = torch.add(first + last, middle, alpha=2)
        bases.append(x / 16)
    return torch.stack(bases[1:], dim=1)


def check_image(modality: str, image: Tensor) -> None:
    """Refuses what is not a batch of images of one modality.

    Raises:
        TypeError: an image that is not floating.
        ValueError: another modality, or an image that is not [B, 1, H, W] or is empty.
    """
    if modality not in get_args(Modality):
        raise ValueError(f"modality must be 'visible' or 'infrared', got {modality!r}")
    _check_dtype("image", image)
    if image.dim() != 4 or image.shape[1] != 1 or image.numel() == 0:
        raise ValueError(f"image must be [B, 1, H, W] and not empty, got {list(image.shape)}")


def check_images(visible: Tensor, infrared: Tensor, scaled: Collection[torch.dtype] = ()) -> None:
    """Refuses what is not a batch of pairs of one size, floating or of those dtypes.

    Raises:
        TypeError: images of another dtype.
        ValueError: images that are not [B, 1, H, W], differ in shape or are empty.
    """
    if visible.dim() != 4 or visible.shape[1] != 1 or visible.shape != infrared.shape:
        raise ValueError(
            "visible and infrared must both be [B, 1, H, W] and of one size, "
            f"got {list(visible.shape)} and {list(infrared.shape)}"
        )
    if visible.shape[2] < 1 or visible.shape[3] < 1:
        raise ValueError(f"visible and infrared must have at least one pixel, got {list(visible.shape)}")
    _check_dtype("visible", visible, scaled)
    _check_dtype("infrared", infrared, scaled)


def _check_dtype(name: str, image: Tensor, scaled: Collection[torch.dtype] = ()) -> None:
    if not image.is_floating_point() and image.dtype not in scaled:
        others = "".join(f" or {dtype}" for dtype in scaled)
        raise TypeError(f"{name} must be floating, in [0, 1]{others}, got {image.dtype}")


def split_code(name: str, code: Tensor, batch: int, channels: int) -> tuple[Tensor | None, Tensor]:
    """A code without its tone, and the tone: ones where a code has none.

    Args:
        name: of the argument, for the message.
        code: Tensor[B, D] or Tensor[B, D, h, w], the same with the tone's 3 more, or Tensor[B, 3], the tone
            alone.
        batch: B.
        channels: D.

    Raises:
        ValueError: it has another shape.
    """
    if code.shape == (batch, TONE_CHANNELS):
        return None, code
    lengths = channels, channels + TONE_CHANNELS
    if code.dim() not in (2, 4) or code.shape[0] != batch or code.shape[1] not in lengths:
        numbers = f"[{batch}, {' or '.join(map(str, lengths))}"
        raise ValueError(f"{name} must be {numbers}] or {numbers}, h, w], got {list(code.shape)}")
    tone = code[:, channels:] if code.shape[1] > channels else torch.ones_like(code[:, :TONE_CHANNELS])
    return code[:, :channels], tone


def pad_to_even(image: Tensor) -> Tensor:
    """Repeats the last row and column of Tensor[B, C, H, W] where the size is odd."""
    # Not H % 2: from this form torch.export sees that the padded size is even.
    missing = [(size + 1) // 2 * 2 - size for size in image.shape[2:]]
    return F.pad(image, (0, missing[1], 0, missing[0]), mode="replicate")


def _crop(image: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns; not a slice, which torch.export cannot prove to fit every odd size."""
    rows, columns = (torch.arange(size, device=image.device) for size in (height, width))
    return image.index_select(2, rows).index_select(3, columns)


def _conv(
    config: DDRFNetConfig,
    dynamic: bool,
    in_channels: int,
    out_channels: int,
    *,
    activation: Activation | None = None,
    code_channels: int = 0,
) -> Conv:
    """A 3x3 convolution that keeps the size, dynamic with the 1/N of eq. 6 or static."""
    if not dynamic:
        return StaticConv2d(in_channels, out_channels, 3, code_channels=code_channels, activation=activation)
    return DynamicConv2d(
        in_channels,
        out_channels,
        3,
        padding=1,
        num_kernels=config.num_kernels,
        reduction=config.reduction,
        code_channels=code_channels,
        activation=activation,
        average=True,
    )


def _apply(layer: Conv, x: Pooled, code: Tensor | None = None) -> Pooled:
    """A dynamic layer with the mean of its output, unless gradients are recorded: then routers pool."""
    if isinstance(layer, StaticConv2d) or torch.is_grad_enabled():
        return Pooled(layer(x.values, code))
    return Pooled(*layer(x.values, code, pooled=x.mean, return_mean=True))


def _concatenate(*parts: Pooled) -> Pooled:
    """Along the channels."""
    means = [part.mean for part in parts if part.mean is not None]
    known = len(means) == len(parts)
    return Pooled(
        torch.cat([part.values for part in parts], dim=1), torch.cat(means, dim=1) if known else None
    )


def _shrink(layer: Conv) -> None:
    """Starts a residual path near zero, so that the untrained network is near the identity."""
    with torch.no_grad():
        layer.weight.mul_(0.1)


def _as_map(code: Tensor, size: torch.Size) -> Tensor:
    return code[:, :, None, None].expand(-1, -1, *size) if code.dim() == 2 else code
