"""Images as people have them, on their way to the network and back: arrays, tensors, PIL images, paths."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.data import read_image, rgb_to_ycbcr

RANGE_TOLERANCE = 1e-3  # how far floats may leave [0, 1], as interpolation and float16 make them
GREY_TOLERANCE = 0.02  # mean difference between its channels up to which an infrared image is taken for grey


@dataclass
class Picture:
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
    def take(cls, image: Any, name: str) -> "Picture":
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
    def _from_tensor(cls, tensor: Tensor, name: str) -> "Picture":
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
    def _from_array(cls, array: NDArray[Any], name: str) -> "Picture":
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
    def _from_pil(cls, image: Any, name: str) -> "Picture":
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
