"""Images as people have them, on their way to the network and back: arrays, tensors, PIL images, paths."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.data import MAX_PIXELS, luminance, read_image
from ddrf_fast.data.thermal import ThermalRange, few_values
from ddrf_fast.ops._checks import INTEGER

RANGE_TOLERANCE = 1e-3  # how far floats may leave [0, 1], as interpolation and float16 make them
GREY_TOLERANCE = 0.02  # mean distance of its channels from grey of an infrared image that passes for grey
LUMA_NOISE = float(np.linalg.norm(luminance(np.eye(3))))  # of independent noise of 1 in each channel

# Pixels that are floating at a time: on CPUs what stays in the cache, elsewhere what fills the device.
_STRIP = {"cpu": 2**17}
_LARGE_STRIP = 2**24


Level = float | Tensor


@dataclass(frozen=True)
class Picture:
    """An image, or a batch of them, as it came, and how its values are to be understood.

    Attributes:
        planes: Tensor[B, C, H, W] of the dtype that came, C = 1 or 3.
        alpha: Tensor[B, 1, H, W] of the same dtype, or None.
        name: how to call it in a message.
        black: the value that means 0; where thermal values were mapped, that of each image, float32
            Tensor[B, 1, 1, 1].
        white: the value that means 1, likewise.
        wrap: turns Tensor[B, C, H, W] of that dtype, alpha included, into the type that came.
        narrow: the lowest and highest value of a thermal image of 16 bit that uses little of them, and is
            taken as it is.
    """

    planes: Tensor
    alpha: Tensor | None
    name: str
    black: Level
    white: Level
    wrap: Callable[[Tensor], Any]
    narrow: tuple[int, int] | None = None

    @classmethod
    def take(
        cls,
        image: Any,
        name: str,
        thermal_range: ThermalRange | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> "Picture":
        """Takes an image as it comes.

        Args:
            image: what :func:`ddrf_fast.fuse` takes.
            name: of the argument.
            thermal_range: of an infrared image: which values become black and white; None: of no such.
            max_pixels: as for :func:`ddrf_fast.data.read_image`.

        Raises:
            TypeError: it is of another type or dtype.
            ValueError: it is of another shape, empty, holds NaN or values out of range, or cannot be read.
        """
        if isinstance(image, (str, os.PathLike)):
            array = read_image(image, alpha=True, floating=thermal_range is not None, max_pixels=max_pixels)
            picture = cls._from_array(array, f"{name} ({os.fspath(image)})")
        elif isinstance(image, Tensor):
            picture = cls._from_tensor(image, name)
        elif isinstance(image, np.ndarray):
            picture = cls._from_array(image, name)
        elif type(image).__module__.partition(".")[0] == "PIL":
            picture = cls._from_pil(image, name)
        else:
            raise TypeError(
                f"{name} must be a NumPy array, a tensor, a PIL image or a path, got {type(image).__name__}"
            )
        return picture._understood(thermal_range)

    @classmethod
    def _from_tensor(cls, tensor: Tensor, name: str) -> "Picture":
        shape = tensor.shape
        if tensor.dim() not in (2, 3, 4) or (tensor.dim() > 2 and shape[-3] not in (1, 2, 3, 4)):
            raise ValueError(f"{name} must be [H, W], [C, H, W] or [B, C, H, W], C = 1..4, got {list(shape)}")

        def wrap(planes: Tensor) -> Tensor:
            return planes if tensor.dim() == 4 else planes[0] if tensor.dim() == 3 else planes[0, 0]

        return cls._of(tensor.detach().reshape((1,) * (4 - tensor.dim()) + shape), name, wrap)

    @classmethod
    def _from_array(cls, array: NDArray[Any], name: str) -> "Picture":
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
            raise ValueError(f"{name} must be [H, W] or [H, W, C], C = 1..4, got {list(array.shape)}")
        if array.dtype.kind not in "uf" or array.dtype.itemsize > 8:
            raise _wrong_dtype(name, array.dtype)
        # In the machine's byte order, and writable, as torch wants it.
        native = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        planes = torch.from_numpy(native[..., None] if array.ndim == 2 else native).permute(2, 0, 1)[None]

        def wrap(planes: Tensor) -> NDArray[Any]:
            result = planes[0].permute(1, 2, 0).cpu().numpy()
            if result.shape[2] == 1 and array.shape[2:] != (1,):  # grey, from a grey or a colour image
                result = result[..., 0]
            return np.ascontiguousarray(result, dtype=array.dtype)

        return cls._of(planes, name, wrap)

    @classmethod
    def _from_pil(cls, image: Any, name: str) -> "Picture":
        from PIL import Image, ImageOps

        if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16", "I;16B"):
            wide = image.mode[0] in "IF"  # which a conversion cuts off at 255
            raise ValueError(
                f"{name} must be a PIL image of mode L, LA, RGB, RGBA or I;16, got {image.mode}: "
                + (
                    "give it as an array of uint16 or floats"
                    if wide
                    else "use .convert('RGB') or .convert('L')"
                )
            )
        picture = cls._from_array(np.asarray(ImageOps.exif_transpose(image)), name)
        profile = image.info.get("icc_profile")

        def wrap(planes: Tensor) -> Any:
            result = Image.fromarray(picture.wrap(planes))
            if profile and result.mode == image.mode:  # that of a colour image does not fit a grey one
                result.info["icc_profile"] = profile
            return result

        return replace(picture, wrap=wrap)

    @classmethod
    def _of(cls, values: Tensor, name: str, wrap: Callable[[Tensor], Any]) -> "Picture":
        """Splits off alpha; black and white are those of the dtype."""
        if not values.is_floating_point() and values.dtype not in INTEGER:
            raise _wrong_dtype(name, values.dtype)
        white = 1.0 if values.is_floating_point() else float(torch.iinfo(values.dtype).max)
        if values.numel() == 0:
            raise ValueError(f"{name} is empty: it is {values.shape[3]}x{values.shape[2]}")
        channels = values.shape[1]
        colours = channels if channels % 2 else channels - 1
        alpha = values[:, colours:] if colours < channels else None
        return cls(values[:, :colours], alpha, name, 0.0, white, wrap)

    def _understood(self, thermal_range: ThermalRange | None) -> "Picture":
        """Checks floats, and maps thermal values."""
        thermal = thermal_range or ThermalRange()
        if self.planes.is_floating_point():
            low, high = (bound.item() for bound in torch.aminmax(self.planes))
            if not (np.isfinite(low) and np.isfinite(high)):
                raise ValueError(f"{self.name} holds NaN or infinite values")
            if thermal.kind == "full" and (low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE):
                hint = "" if thermal_range is None else " (thermal_range maps other values)"
                raise ValueError(
                    f"{self.name} must be in [0, 1] where it is floating, got values from {low:g} to "
                    f"{high:g}{hint}"
                )
        if thermal.kind != "full":
            black, white = (level.view(-1, 1, 1, 1) for level in thermal.bounds(self.planes))
            return replace(self, black=black, white=white)
        if thermal_range is not None and self.planes.dtype == torch.uint16:
            return replace(self, narrow=few_values(self.planes.cpu().numpy()))
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The values that became black and white, where these are not those of the dtype."""
        if not isinstance(self.black, Tensor) or not isinstance(self.white, Tensor):
            return None
        return self.black.min().item(), self.white.max().item()

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.planes.shape[2], self.planes.shape[3]

    @property
    def colour(self) -> bool:
        """Whether there are three channels that differ, but for what JPEG does to a grey image, in any."""
        if self.planes.shape[1] != 3:
            return False
        parts = [(unit - unit.mean(1, keepdim=True)).abs().sum((1, 2, 3)) for _, unit in self._strips()]
        return torch.stack(parts).sum(0).max().item() > GREY_TOLERANCE * self.planes[0].numel()

    @property
    def luma_noise(self) -> float:
        """The part of its channels' noise that the luma has: all of it where they are the same."""
        first, *others = self.planes.unbind(1)
        return 1.0 if all(torch.equal(first, other) for other in others) else LUMA_NOISE

    def describe(self) -> str:
        """Its size, width first."""
        batch = f"{len(self.planes)} of " if len(self.planes) > 1 else ""
        return f"{batch}{self.size[1]}x{self.size[0]}"

    def to(self, device: torch.device) -> "Picture":
        """The same on a device; what is given back later is again where the image was."""
        home = self.planes.device
        if home == device:
            return self
        return replace(
            self,
            planes=self.planes.to(device),
            alpha=None if self.alpha is None else self.alpha.to(device),
            black=self.black.to(device) if isinstance(self.black, Tensor) else self.black,
            white=self.white.to(device) if isinstance(self.white, Tensor) else self.white,
            wrap=lambda planes: self.wrap(planes.to(home)),
        )

    def luma(self) -> Tensor:
        """Y of BT.601 in full range, float32 Tensor[B, 1, H, W] in [0, 1]."""
        size = len(self.planes), 1, *self.size
        luma = torch.empty(size, dtype=torch.float32, device=self.planes.device)
        for rows, unit in self._strips():
            luma[:, :, rows] = unit if unit.shape[1] == 1 else luminance(unit)[:, None]
        return luma

    def channels(self) -> Tensor:
        """The channels one by one, float32 Tensor[B * C, 1, H, W] in [0, 1]."""
        return torch.cat([unit for _, unit in self._strips()], dim=2).flatten(0, 1)[:, None]

    def with_luma(self, new: Tensor, old: Tensor) -> Any:
        r"""The image as it came, with another Y.

        Cb and Cr are proportional to B - Y and R - Y, so that keeping them while Y becomes P means adding the
        same number to the three channels of every pixel:

        .. math:: (R', G', B') = (R, G, B) + (P - Y)

        which needs no conversion back and loses nothing but what is clipped to [0, 1].

        Args:
            new: P, Tensor[B, 1, H, W].
            old: Y, as :meth:`luma` gave it.
        """
        if self.planes.shape[1] == 1:
            return self.with_channels(new)
        span = self.white - self.black
        strips = (values + (new[:, :, rows] - old[:, :, rows]) * span for rows, values in self._values())
        return self._give_back(strips, 3)

    def with_channels(self, new: Tensor) -> Any:
        """The image as it came, with other values: Tensor[B * C, 1, H, W], C = 1 (grey) or its own."""
        planes, span = new.reshape(len(self.planes), -1, *self.size), self.white - self.black
        return self._give_back(
            (planes[:, :, rows] * span + self.black for rows in self._rows()), planes.shape[1]
        )

    def resized(self, size: tuple[int, int]) -> "Picture":
        """The same in another size (H, W)."""
        if size == self.size:
            return self

        def resize(planes: Tensor) -> Tensor:
            values = resample(planes.float(), size)
            if planes.is_floating_point():
                return values.to(planes.dtype)
            return values.round().clamp(0, torch.iinfo(planes.dtype).max).to(planes.dtype)

        alpha = None if self.alpha is None else resize(self.alpha)
        return replace(self, planes=resize(self.planes), alpha=alpha)

    def sampled(self, step: int) -> "Picture":
        """Every so many-th row and column."""
        alpha = None if self.alpha is None else self.alpha[:, :, ::step, ::step]
        return replace(self, planes=self.planes[:, :, ::step, ::step], alpha=alpha)

    def _rows(self) -> Iterator[slice]:
        height, width = self.size
        pixels = _STRIP.get(self.planes.device.type, _LARGE_STRIP)
        step = max(1, pixels // (width * len(self.planes)))
        return (slice(top, min(top + step, height)) for top in range(0, height, step))

    def _values(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time, float32 Tensor[B, C, h, W] from black to white."""
        for rows in self._rows():
            values = self.planes[:, :, rows].to(torch.float32)
            if isinstance(self.black, Tensor):
                values = self._clipped(values)
            yield rows, values

    def _clipped(self, values: Tensor) -> Tensor:
        return values.clamp(self.black, self.white)  # type: ignore[arg-type]  # two numbers or two tensors

    def _strips(self) -> Iterator[tuple[slice, Tensor]]:
        """The same in [0, 1]."""
        for rows, values in self._values():
            if isinstance(self.black, Tensor):
                span = self.white - self.black
                yield (
                    rows,
                    (values - self.black) / torch.where(span > 0, span, 1),
                )  # a constant image has none
            else:
                yield rows, values if self.white == 1 else values / self.white

    def _give_back(self, strips: Iterator[Tensor], channels: int) -> Any:
        """The image as it came with other values: Tensor[B, C, h, W] at a time, not yet clipped."""
        shape = (len(self.planes), channels + (self.alpha is not None), *self.size)
        # As it came: an array's channels lie side by side.
        interleaved = self.planes.shape[1] > 1 and self.planes.stride(1) == 1
        layout = torch.channels_last if interleaved else torch.contiguous_format
        planes = torch.empty(shape, dtype=self.planes.dtype, device=self.planes.device, memory_format=layout)
        for rows, strip in zip(self._rows(), strips, strict=True):
            values = self._clipped(strip)
            planes[:, :channels, rows] = values if planes.is_floating_point() else values.round_()
        if self.alpha is not None:
            planes[:, channels:] = self.alpha
        return self.wrap(planes)


def resample(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Floating Tensor[B, C, H, W] in another size: bilinear, averaged where it becomes smaller."""
    return F.interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=True)


def _wrong_dtype(name: str, dtype: object) -> TypeError:
    return TypeError(f"{name} must be uint8, uint16 or floating in [0, 1], got {dtype}")
