"""Fusion and restoration in one call; the network is loaded at the first and kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.inference.engine import Dtype, Tile
from ddrf_fast.inference.fuser import Fuser, Resize
from ddrf_fast.inference.network import Network, PathLike, cached_network
from ddrf_fast.inference.restorer import Restorer
from ddrf_fast.inference.session import Color, ImageT

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FuserSettings(TypedDict, total=False):
    """What :func:`fuse` passes on to :class:`Fuser`."""

    color: Color
    thermal_range: str | tuple[float, float]
    resize: Resize | None
    homography: Any
    clean: bool
    max_pixels: int


class RestorerSettings(TypedDict, total=False):
    """What :func:`restore` passes on to :class:`Restorer`."""

    color: Color
    thermal_range: str | tuple[float, float]
    kernel: Any
    noise_std: float | None
    tone: Sequence[float] | None
    refine: bool
    max_pixels: int


@overload
def fuse(
    visible: PathLike,
    infrared: Any,
    *,
    weights: PathLike | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    tile: Tile = "auto",
    **settings: "Unpack[FuserSettings]",
) -> NDArray[Any]: ...
@overload
def fuse(
    visible: ImageT,
    infrared: Any,
    *,
    weights: PathLike | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    tile: Tile = "auto",
    **settings: "Unpack[FuserSettings]",
) -> ImageT: ...
def fuse(
    visible: Any,
    infrared: Any,
    *,
    weights: PathLike | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    tile: Tile = "auto",
    **settings: "Unpack[FuserSettings]",
) -> Any:
    """Fuses a visible and an infrared image into one, in the colours of the visible image.

    Each image may be

    - a NumPy array [H, W] or [H, W, C], uint8, uint16 or floating in [0, 1];
    - a ``Tensor[H, W]``, ``Tensor[C, H, W]`` or ``Tensor[B, C, H, W]``, uint8, uint16 or floating in [0, 1];
    - a PIL image of mode L, LA, RGB, RGBA or I;16, which is turned upright as its EXIF orientation says;
    - the path of an image file, likewise;
    - a list of those: the result is a list.

    C is 1 (grey), 2 (with alpha), 3 (RGB) or 4 (with alpha). The alpha of the visible image is kept.

    The depth is that of the dtype (a uint16 image spans 0..65535, however dark it is), and may differ between
    the two. Raw thermal images use little of it: `thermal_range` says what is black and white. An infrared
    image of three channels must be grey. Any size will do; the model is loaded at the first call and kept.

    Args:
        visible: the visible image, grey or in colour.
        infrared: the infrared image, registered to it and of the same size, or see `resize` and `homography`.
        weights: a file written by ``ddrf_fast.models.save_model``; None: the weights that come with the
            package.
        device: "auto" (that of a CUDA tensor, else CUDA where there is one, else the CPU), or what
            ``torch.device`` takes.
        dtype: what the network computes in: float32, bfloat16, float16 or float64, as a ``torch.dtype`` or
            its name; "auto": bfloat16 on CPUs with AVX-512 and on CUDA devices that have it, else float32.
        tile: rows of the strips that large images are computed in, with the result of the whole but for
            rounding; 0: none; "auto": by the size of the image.
        **settings: color, thermal_range, resize, homography, clean, max_pixels of :class:`Fuser`.

    Returns:
        The fused image: type, dtype, shape and device of ``visible``; an array where that is a path.

    Raises:
        TypeError: an image of another type or dtype, or an unknown setting.
        ValueError: images of another shape, of two sizes, empty, with NaN or out of range; an infrared image
            in colour; a file that cannot be read; weights that are missing or do not fit; another `dtype` or
            `tile`.

    Example:
        >>> import ddrf_fast, torch
        >>> visible = torch.rand(3, 60, 80)
        >>> fused = ddrf_fast.fuse(visible, torch.rand(1, 60, 80))
        >>> fused.shape, fused.dtype
        (torch.Size([3, 60, 80]), torch.float32)
    """
    return Fuser(_shared(weights, device, dtype, tile, visible), **settings)(visible, infrared)


def restore(
    visible: Any = None,
    infrared: Any = None,
    *,
    weights: PathLike | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    tile: Tile = "auto",
    **settings: "Unpack[RestorerSettings]",
) -> Any:
    """Restores a visible or an infrared image that is blurred, noisy or dark, or both images.

    Args:
        visible: what :func:`fuse` takes, or None.
        infrared: likewise; it must be grey.
        weights: as for :func:`fuse`.
        device: likewise.
        dtype: likewise.
        tile: likewise.
        **settings: color, thermal_range, kernel, noise_std, tone, refine, max_pixels of :class:`Restorer`;
            with `kernel`, `noise_std` or `tone` the degradation is told, else it is estimated.

    Returns:
        The restored image, as :func:`fuse` gives it; of both a tuple (visible, infrared).

    Raises:
        TypeError: no image, one of another type or dtype, or an unknown setting.
        ValueError: as for :func:`fuse`.

    Example:
        >>> import ddrf_fast, numpy as np
        >>> ddrf_fast.restore(infrared=np.zeros((60, 80), np.uint16), noise_std=0.05).dtype
        dtype('uint16')
    """
    network = _shared(weights, device, dtype, tile, infrared if visible is None else visible)
    return Restorer(network, **settings)(visible, infrared)


def _shared(
    weights: PathLike | None, device: str | torch.device, dtype: Dtype, tile: Tile, image: Any
) -> Network:
    if device == "auto" and isinstance(image, Tensor) and image.is_cuda:
        device = image.device
    return cached_network(weights, device, dtype, tile)
