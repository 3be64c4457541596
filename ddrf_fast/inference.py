r"""Fuses infrared and visible images as people have them: arrays, tensors, PIL images, files, grey or colour.

The network fuses one channel. Of a visible image in colour that is its luma Y (BT.601, full range), and the
colour of the result is the visible image's. Cb and Cr are proportional to B - Y and R - Y, so that keeping
them while Y becomes the fused P means adding the same number to the three channels of every pixel:

.. math:: (R', G', B') = (R, G, B) + (P - Y)

which needs no conversion back and loses nothing but what is clipped to [0, 1].
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.data import read_image, rgb_to_ycbcr
from ddrf_fast.models.checkpoint import DEFAULT_WEIGHTS, load_model

ImageT = TypeVar("ImageT")
PathLike = str | os.PathLike[str]

RANGE_TOLERANCE = 1e-3  # how far floats may leave [0, 1], as interpolation and float16 make them
GREY_TOLERANCE = 0.02  # mean difference between its channels up to which an infrared image is taken for grey


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
        >>> fuser = Fuser()
        >>> fuser(np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8)).shape
        (48, 64, 3)
    """

    def __init__(self, weights: PathLike | None = None, device: str | torch.device = "auto") -> None:
        self.device = resolve_device(device)
        self.model = load_model(weights, device=self.device)

    @overload
    def __call__(self, visible: PathLike, infrared: Any) -> NDArray[Any]: ...
    @overload
    def __call__(self, visible: ImageT, infrared: Any) -> ImageT: ...
    def __call__(self, visible: Any, infrared: Any) -> Any:
        """Fuses a pair (or a batch, of tensors); see :func:`fuse`."""
        visible = _Picture.take(visible, "visible")
        infrared = _Picture.take(infrared, "infrared")
        if visible.size != infrared.size or len(visible.values) != len(infrared.values):
            raise ValueError(
                f"a pair needs one size, but {visible.name} is {visible.describe()} and "
                f"{infrared.name} is {infrared.describe()} (width x height): "
                "register and resize one to the other first"
            )
        infrared.check_grey()
        luma = visible.luma()
        with torch.inference_mode():
            fused = self.model(luma.to(self.device), infrared.luma().to(self.device)).fused.clamp(0, 1)
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


@dataclass
class _Picture:
    """An image on its way through the network.

    Attributes:
        values: Tensor[B, C, H, W], float32 in [0, 1], C = 1 or 3.
        name: how to call it in a message.
        give_back: turns values like these into what the image came as.
    """

    values: Tensor
    name: str
    give_back: Callable[[Tensor], Any]

    @classmethod
    def take(cls, image: Any, name: str) -> "_Picture":
        if isinstance(image, (str, os.PathLike)):
            return cls._from_array(read_image(image), f"{name} ({os.fspath(image)})")
        if isinstance(image, Tensor):
            return cls._from_tensor(image, name)
        if isinstance(image, np.ndarray):
            return cls._from_array(image, name)
        if type(image).__module__.partition(".")[0] == "PIL":
            return cls._from_pil(image, name)
        raise TypeError(
            f"{name} must be a NumPy array, a tensor, a PIL image or a path, got {type(image).__name__}"
        )

    @classmethod
    def _from_tensor(cls, tensor: Tensor, name: str) -> "_Picture":
        shape = tensor.shape
        if tensor.dim() not in (2, 3, 4) or (tensor.dim() > 2 and shape[-3] not in (1, 3)):
            raise ValueError(f"{name} must be [H, W], [1|3, H, W] or [B, 1|3, H, W], got {list(shape)}")
        peak = _peak(
            {torch.uint8: 255, torch.uint16: 65535}.get(tensor.dtype),
            tensor.is_floating_point(),
            tensor,
            name,
        )
        values = tensor.detach().to(torch.float32)
        values = values.reshape((1,) * (4 - tensor.dim()) + shape) / peak
        _check_values(values, name)

        def give_back(values: Tensor) -> Tensor:
            values = values.reshape(shape)
            return values.to(tensor.dtype) if peak == 1 else (values * peak).round().to(tensor.dtype)

        return cls(values, name, give_back)

    @classmethod
    def _from_array(cls, array: NDArray[Any], name: str) -> "_Picture":
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
            raise ValueError(f"{name} must be [H, W], [H, W, 1] or [H, W, 3], got {list(array.shape)}")
        peak = _peak(
            {1: 255, 2: 65535}.get(array.dtype.itemsize) if array.dtype.kind == "u" else None,
            array.dtype.kind == "f",
            array,
            name,
        )
        values = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        values = (
            values[None, None] if array.ndim == 2 else values.permute(2, 0, 1)[None].contiguous()
        ) / peak
        _check_values(values, name)

        def give_back(values: Tensor) -> NDArray[Any]:
            result = values[0].permute(1, 2, 0).reshape(array.shape)
            return (result if peak == 1 else (result * peak).round()).numpy().astype(array.dtype, order="C")

        return cls(values, name, give_back)

    @classmethod
    def _from_pil(cls, image: Any, name: str) -> "_Picture":
        if image.mode not in ("L", "RGB", "I;16"):
            raise ValueError(
                f"{name} must be a PIL image of mode L, RGB or I;16, got {image.mode}: "
                "use .convert('RGB') or .convert('L')"
            )
        from PIL import Image  # optional: who has a PIL image has PIL

        picture = cls._from_array(np.asarray(image), name)
        as_array = picture.give_back
        picture.give_back = lambda values: Image.fromarray(as_array(values))
        return picture

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[3]

    def describe(self) -> str:
        batch = f"{len(self.values)} of " if len(self.values) > 1 else ""
        return f"{batch}{self.size[1]}x{self.size[0]}"

    def luma(self) -> Tensor:
        """Y of BT.601 in full range, Tensor[B, 1, H, W]."""
        if self.values.shape[1] == 1:
            return self.values
        return rgb_to_ycbcr(self.values)[:, :1]

    def check_grey(self) -> None:
        """Refuses three channels that differ: a false-colour rendering, or visible and infrared swapped."""
        difference = (self.values - self.values.mean(dim=1, keepdim=True)).abs().mean().item()
        if difference > GREY_TOLERANCE:
            raise ValueError(
                f"{self.name} is in colour (its channels differ by {difference:.2f} of the range), but "
                "an infrared image must be grey: are visible and infrared swapped? "
                "Convert a false-colour image to grey first"
            )


def _peak(integer_peak: int | None, floating: bool, image: Any, name: str) -> int:
    """The value that means white, for the dtype of the image."""
    if integer_peak is None and not floating:
        raise TypeError(f"{name} must be uint8, uint16 or floating in [0, 1], got {image.dtype}")
    return integer_peak or 1


def _check_values(values: Tensor, name: str) -> None:
    if values.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {list(values.shape)}")
    low, high = (bound.item() for bound in torch.aminmax(values))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinite values")
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{name} must be in [0, 1] where it is floating, got values from {low:g} to {high:g}"
        )
