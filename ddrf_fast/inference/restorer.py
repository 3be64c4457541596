"""Restorer: the session that restores visible or infrared images."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.data import MAX_PIXELS
from ddrf_fast.degradation import Degradation, refine
from ddrf_fast.degradation.estimate import WINDOW
from ddrf_fast.degradation.photometric import TONE_CHANNELS, with_joint_mean
from ddrf_fast.inference.engine import Dtype, Tile
from ddrf_fast.inference.network import Network, PathLike
from ddrf_fast.inference.session import Color, ImageT, Request, Session, refuse_colour, together
from ddrf_fast.models.ddrfnet import Modality


class Restorer(Session):
    """Restoration by DDRF-Net, loaded once, as a function of a visible or an infrared image.

    Each kind of image has its own branch of the network, which runs alone.

    Args:
        weights, device, dtype, tile, color, thermal_range, max_pixels: as for every :class:`Session`.
        kernel: the blur, where it is known: [k, k] of any scale, k odd and at most that of the network (25).
        noise_std: the standard deviation of the noise, where it is known, for images in [0, 1]; of a colour
            image that of each channel, independent of the others (luminance has two thirds of it).
        tone: the darkness, where it is known: gamma, gain and contrast of
            :class:`~ddrf_fast.degradation.DegradationConfig`. What is left out of kernel, noise_std and tone
            says that there is no blur, no noise or no darkness; without all three, the network estimates what
            it needs from the image.
        refine: whether the result is corrected until, blurred again, it is the image
            (:func:`ddrf_fast.degradation.refine`). It takes several times as long, in memory of six times
            the image in float32, and is worth it where the blur is known well and there is little noise.
            Without a kernel the blur is estimated (:func:`ddrf_fast.degradation.estimate_blur`; some
            seconds), and the network is told it; images in which none is found, or that are smaller than
            64x64, are restored as without this.

    Raises:
        ValueError: as every session, a kernel, a noise level or a tone that cannot be, or `refine` with a
            tone.

    Example:
        >>> restorer = Restorer()
        >>> restorer(visible=torch.rand(3, 40, 50)).shape
        torch.Size([3, 40, 50])
    """

    def __init__(
        self,
        weights: PathLike | Network | None = None,
        device: str | torch.device = "auto",
        dtype: Dtype = "auto",
        tile: Tile = "auto",
        *,
        color: Color = "ycbcr",
        thermal_range: str | tuple[float, float] = "full",
        kernel: Any = None,
        noise_std: float | None = None,
        tone: Sequence[float] | None = None,
        refine: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(weights, device, dtype, tile, color, thermal_range, max_pixels)
        if refine and tone is not None:
            raise ValueError(f"refine undoes a blur, and cannot be with a known darkness, got tone {tone}")
        self.network.known(kernel, noise_std)  # or an error, before any image
        self._refine, self._kernel, self._darkness = refine, kernel, tone
        self._noise_std = None if noise_std is None else float(noise_std)
        self._code = self._encode(self._noise_std)

    @overload
    def __call__(self, visible: PathLike, infrared: None = None) -> NDArray[Any]: ...
    @overload
    def __call__(self, visible: ImageT, infrared: None = None) -> ImageT: ...
    @overload
    def __call__(self, visible: None = None, *, infrared: PathLike) -> NDArray[Any]: ...
    @overload
    def __call__(self, visible: None = None, *, infrared: ImageT) -> ImageT: ...
    @overload
    def __call__(self, visible: Any, infrared: Any) -> tuple[Any, Any]: ...
    def __call__(self, visible: Any = None, infrared: Any = None) -> Any:
        """Restores an image, a batch (of tensors), or a list of images; of both kinds a tuple of two results.

        Raises:
            TypeError, ValueError: as :func:`fuse`; the two images need not be of one size.
        """
        if visible is not None and infrared is not None:
            return self(visible), self(infrared=infrared)
        images = infrared if visible is None else visible
        if isinstance(images, (list, tuple)):
            nothing = [None] * len(images)
            return list(self.stream(together(visible or nothing, infrared or nothing)))
        return self._one(visible, infrared)

    def prepare(self, visible: Any, infrared: Any) -> Request:
        """Reads and checks an image; the other one is None.

        Raises:
            TypeError, ValueError: as a call does of images; there is no image, or there are two.
        """
        if (visible is None) == (infrared is None):
            raise TypeError("give a visible or an infrared image")
        modality: Modality = "infrared" if visible is None else "visible"
        picture = self._take(infrared if visible is None else visible, modality)
        if modality == "infrared":
            refuse_colour(picture)
        planes, noise_std = self._planes(picture), self._noise_std
        if noise_std is not None and self.color != "rgb":
            noise_std *= picture.luma_noise
        return Request(
            picture,
            planes,
            modality=modality,
            mapped=picture.bounds,
            narrow=picture.narrow,
            tone=self._tone(picture, planes, modality),
            noise_std=noise_std,
        )

    def _encode(self, noise_std: float | None) -> Tensor | None:
        """The code of what is known, with this noise."""
        return self.network.encode(self._kernel, noise_std, self._darkness)

    def _run(self, request: Request) -> Tensor:
        restored = self._restored(request)
        if request.tone is None or request.modality == "infrared":
            return restored
        return with_joint_mean(restored, request.tone[:, 2])

    def _restored(self, request: Request) -> Tensor:
        planes, modality, tone = request.planes, request.modality, request.tone
        code = self._encode(request.noise_std)
        if self._refine and self._kernel is None and min(planes.shape[2:]) >= WINDOW:
            if code is not None:
                tone = planes.new_ones(len(planes), TONE_CHANNELS)  # of what is told, and no darkness is
            places, blur = self.network.find_blur(modality, planes, request.noise_std, tone)
            if blur is not None:
                return self._restored_and_refined(request, code, places, blur)
        restored = self.network.restore(modality, planes, code, request.tone)
        if not self._refine or self._kernel is None:
            return restored
        known = self.network.known(self._kernel, request.noise_std)
        return self._refined(restored, planes, known[torch.zeros(len(planes), dtype=torch.int64)])

    def _restored_and_refined(
        self, request: Request, code: Tensor | None, places: Tensor, blur: Degradation
    ) -> Tensor:
        """All images restored, and those at the places, whose blur is given, refined."""
        planes, modality, tone = request.planes.to(self.device), request.modality, request.tone
        result = torch.empty_like(planes)
        told = self.network.restore(modality, planes[places], self.network.codes(blur))
        result[places] = self._refined(told, planes[places], blur)
        usual = torch.ones(len(planes), dtype=torch.bool, device=self.device).index_fill(0, places, False)
        if bool(usual.any()):
            tone = None if tone is None else tone.to(self.device)[usual]
            result[usual] = self.network.restore(modality, planes[usual], code, tone).to(result)
        return result

    def _refined(self, restored: Tensor, planes: Tensor, blur: Degradation) -> Tensor:
        with torch.inference_mode():
            return refine(restored.to(self.device), planes.to(self.device), blur)
