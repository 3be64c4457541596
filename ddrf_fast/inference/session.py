r"""Fuses infrared and visible images as people have them: arrays, tensors, PIL images, files, grey or colour.

The network fuses one channel. Of a visible image in colour that is its luma Y (BT.601, full range), and the
colour of the result is the visible image's. Cb and Cr are proportional to B - Y and R - Y, so that keeping
them while Y becomes the fused P means adding the same number to the three channels of every pixel:

.. math:: (R', G', B') = (R, G, B) + (P - Y)

which needs no conversion back and loses nothing but what is clipped to [0, 1].
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.inference.engine import Engine
from ddrf_fast.inference.pictures import Picture
from ddrf_fast.models.checkpoint import DEFAULT_WEIGHTS, load_model

ImageT = TypeVar("ImageT")
PathLike = str | os.PathLike[str]


class Fuser:
    """DDRF-Net, loaded once, as a function of a visible and an infrared image.

    Args:
        weights: a file written by ``ddrf_fast.models.save_model``; None: the weights that come with the
            package.
        device: "auto" (CUDA where there is one, else the CPU), or what ``torch.device`` takes.

    Attributes:
        model: the network, in evaluation mode and float32.
        device: where it runs.

    Raises:
        ValueError: the weights are missing or do not fit, or the device is unknown or not there.

    Example:
        >>> import numpy as np
        >>> fuser = Fuser()
        >>> fuser(np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8)).shape
        (48, 64, 3)
    """

    def __init__(self, weights: PathLike | None = None, device: str | torch.device = "auto") -> None:
        self.device = resolve_device(device)
        self.model = load_model(weights, device=self.device)
        self.engine = Engine(self.model)

    @overload
    def __call__(self, visible: PathLike, infrared: Any) -> NDArray[Any]: ...
    @overload
    def __call__(self, visible: ImageT, infrared: Any) -> ImageT: ...
    def __call__(self, visible: Any, infrared: Any) -> Any:
        """Fuses a pair (or a batch, of tensors); see :func:`fuse`."""
        visible = Picture.take(visible, "visible")
        infrared = Picture.take(infrared, "infrared")
        if visible.size != infrared.size or len(visible.values) != len(infrared.values):
            raise ValueError(
                f"a pair needs one size, but {visible.name} is {visible.describe()} and "
                f"{infrared.name} is {infrared.describe()} (width x height): "
                "register and resize one to the other first"
            )
        infrared.check_grey()
        luma = visible.luma()
        with torch.inference_mode():
            fused = self.engine(luma, infrared.luma()).fused.clamp(0, 1)
        # Outside of inference mode, so that a later computation with gradients may use the result.
        return visible.give_back((visible.values + (fused.to(luma.device) - luma)).clamp(0, 1))


@overload
def fuse(
    visible: PathLike,
    infrared: Any,
    *,
    weights: PathLike | None = None,
    device: str | torch.device = "auto",
) -> NDArray[Any]: ...
@overload
def fuse(
    visible: ImageT,
    infrared: Any,
    *,
    weights: PathLike | None = None,
    device: str | torch.device = "auto",
) -> ImageT: ...
def fuse(
    visible: Any,
    infrared: Any,
    *,
    weights: PathLike | None = None,
    device: str | torch.device = "auto",
) -> Any:
    """Fuses a visible and an infrared image into one, in the colours of the visible image.

    Each image may be

    - a NumPy array [H, W], [H, W, 1] or [H, W, 3] (RGB), uint8, uint16 or floating in [0, 1];
    - a ``Tensor[H, W]``, ``Tensor[1|3, H, W]`` or ``Tensor[B, 1|3, H, W]``, uint8, uint16 or floating
      in [0, 1];
    - a PIL image of mode L, RGB or I;16;
    - the path of an image file.

    The depth is that of the dtype (a uint16 image spans 0..65535, however dark it is), and may differ between
    the two. An infrared image of three channels must be grey. The network runs in float32, on images of any
    size; the model is loaded at the first call and kept.

    Args:
        visible: the visible image, grey or in colour.
        infrared: the infrared image, registered to it and of the same size.
        weights: a file written by ``ddrf_fast.models.save_model``; None: the weights that come with the
            package.
        device: "auto" (that of a CUDA tensor, else CUDA where there is one, else the CPU), or what
            ``torch.device`` takes.

    Returns:
        The fused image: type, dtype, shape and device of ``visible``; an array where that is a path.

    Raises:
        TypeError: an image of another type or dtype.
        ValueError: images of another shape, of two sizes, empty, with NaN or out of range; an infrared image
            in colour; a file that cannot be read; weights that are missing or do not fit.

    Example:
        >>> import ddrf_fast
        >>> visible = torch.rand(3, 60, 80)
        >>> fused = ddrf_fast.fuse(visible, torch.rand(1, 60, 80))
        >>> fused.shape, fused.dtype
        (torch.Size([3, 60, 80]), torch.float32)
    """
    if device == "auto" and isinstance(visible, Tensor) and visible.is_cuda:
        device = visible.device
    path = Path(DEFAULT_WEIGHTS if weights is None else weights).absolute()
    # The file's state is part of the key: weights that were trained anew are loaded anew.
    state = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    return _cached_fuser(path, state, resolve_device(device))(visible, infrared)


@lru_cache(maxsize=4)
def _cached_fuser(path: Path, state: tuple[int, int] | None, device: torch.device) -> Fuser:
    return Fuser(path, device)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by ``device``: "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: a device that is unknown or not there.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(resolved)!r} was asked for, but {torch.cuda.device_count()} CUDA devices are there"
        )
    return resolved
