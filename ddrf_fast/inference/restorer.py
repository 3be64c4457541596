"""Restorer: the session that restores visible or infrared images."""

from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.data import MAX_PIXELS
from ddrf_fast.inference.network import Network, PathLike
from ddrf_fast.inference.session import Color, ImageT, Request, Session, refuse_colour, together
from ddrf_fast.models.ddrfnet import Modality


class Restorer(Session):
    """Restoration by DDRF-Net, loaded once, as a function of a visible or an infrared image.

    Each kind of image has its own branch of the network, which runs alone.

    Args:
        weights: as for :class:`Fuser`.
        device: likewise.
        dtype: likewise.
        tile: likewise.
        color: "ycbcr": the luminance is restored and the colour kept; "rgb": each channel is restored;
            "gray": the result is the restored luminance.
        thermal_range: as for :class:`Fuser`; what lies outside is cut off, and the result is again in the
            values of the image.
        kernel: the blur, where it is known: [k, k] of any scale, k odd and at most that of the network (25).
        noise_std: the standard deviation of the noise, where it is known, for images in [0, 1]. Of kernel and
            noise_std one may be left out, which says that there is no blur, or no noise; without both, the
            network estimates what it needs from the image.
        max_pixels: as for :func:`ddrf_fast.data.read_image`.

    Attributes:
        model: the network, in evaluation mode and float32.
        device: where it runs.

    Raises:
        ValueError: as :class:`Fuser`, or a kernel or a noise level that cannot be.

    Example:
        >>> restorer = Restorer()
        >>> restorer(visible=torch.rand(3, 40, 50)).shape
        torch.Size([3, 40, 50])
    """

    def __init__(
        self,
        weights: PathLike | Network | None = None,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        tile: int | str = "auto",
        *,
        color: Color = "ycbcr",
        thermal_range: str | tuple[float, float] = "full",
        kernel: Any = None,
        noise_std: float | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(weights, device, dtype, tile, color, thermal_range, max_pixels)
        self._code = self._encode(kernel, noise_std)

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
        """Reads and checks an image; the other one is None."""
        if (visible is None) == (infrared is None):
            raise TypeError("give a visible or an infrared image")
        modality: Modality = "infrared" if visible is None else "visible"
        picture = self._take(infrared if visible is None else visible, modality)
        if modality == "infrared":
            refuse_colour(picture)
        planes = self._planes(picture)
        return Request(picture, planes, None, modality, picture.bounds, picture.narrow)

    def _run(self, planes: Tensor, infrared: Tensor | None, modality: Modality) -> Tensor:
        return self.network.restore(modality, planes, self._code)

    def _encode(self, kernel: Any, noise_std: float | None) -> Tensor | None:
        """The code of a known degradation, Tensor[1, D]."""
        if kernel is None and noise_std is None:
            return None
        size = self.model.config.kernel_size
        known = np.ones((1, 1)) if kernel is None else np.asarray(kernel, np.float64)
        side = known.shape[0]
        if known.shape != (side, side) or side % 2 == 0 or side > size:
            raise ValueError(f"kernel must be [k, k] with k odd and at most {size}, got {list(known.shape)}")
        if not np.isfinite(known).all() or known.sum() <= 0:
            raise ValueError("kernel must hold finite numbers with a positive sum")
        level = 0.0 if noise_std is None else float(noise_std)
        if not 0 <= level < np.inf:
            raise ValueError(f"noise_std must be a number from 0 on, got {noise_std}")
        kernels = torch.from_numpy(np.pad(known / known.sum(), (size - side) // 2)).float()[None]
        with torch.no_grad():
            return self.model.encode(kernels.to(self.device), torch.tensor([level], device=self.device))
