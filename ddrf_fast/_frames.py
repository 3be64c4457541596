"""Frames of videos as numbers: upright, with all their bits; and back.

A frame is a PyAV ``VideoFrame``, wherever it is typed ``Any``.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.inference.pictures import GREY_TOLERANCE

try:
    import av
except ImportError:  # who has no video needs none
    av = None

Plane = NDArray[np.uint8] | NDArray[np.uint16]

# Formats whose first plane is the luma and nothing else, in the machine's byte order.
_LUMA_FIRST = re.compile(r"(gray|yuvj?4\d\dp)(9le|1\dle)?")
_NEUTRAL = 128
# Whole numbers lose a level of luma on FFmpeg's way to RGB and back, floats none.
_RGB = "gbrpf32le"


class Orientation(NamedTuple):
    """How a player is to turn the frames of a file: phones store them as the sensor lies.

    Attributes:
        transposed: rows become columns.
        rows: the step through the rows, 1 or -1, after that.
        columns: likewise.
    """

    transposed: bool = False
    rows: Literal[1, -1] = 1
    columns: Literal[1, -1] = 1

    @classmethod
    def of(cls, frame: Any) -> "Orientation":
        """As the display matrix of the frame says.

        Raises:
            ValueError: by another angle than quarter turns.
        """
        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls()
        # (x, y) goes to (a x + c y, b x + d y), y down.
        a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
        if (a or d) and (b or c):
            angle = round(math.degrees(math.atan2(-b, a)))
            raise ValueError(
                f"it is to be shown turned by {angle} degrees, but only quarter turns are possible"
            )
        transposed = bool(b or c)
        rows, columns = (b, c) if transposed else (d, a)
        return cls(transposed, -1 if rows < 0 else 1, -1 if columns < 0 else 1)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height, turned; or turned back."""
        return (height, width) if self.transposed else (width, height)

    def __call__(self, plane: NDArray[Any]) -> NDArray[Any]:
        """Array [H, W, ...] turned, as a view."""
        turned = plane.swapaxes(0, 1) if self.transposed else plane
        return turned[:: self.rows, :: self.columns]


@dataclass(frozen=True)
class Luma:
    """The luma of a frame.

    Attributes:
        values: [H, W], as they are stored.
        black: the value that means 0.
        white: that means 1.
    """

    values: Plane
    black: int
    white: int

    @classmethod
    def of(cls, frame: Any) -> "Luma":
        """With all its bits; of a frame in RGB, what a conversion gives."""
        bits = _bits(frame)
        if not _LUMA_FIRST.fullmatch(frame.format.name):
            grey = len(frame.format.components) == 1 and not _is_rgb(frame)
            name = "gray" if grey else "yuv444p"
            frame = _converted(frame, name if bits == 8 else f"{name}16le", None if grey else "MPEG")
            bits = 8 if bits == 8 else 16
        black, white = _levels(frame, bits)
        return cls(_plane(frame, 0, np.uint8 if bits == 8 else np.uint16), black, white)

    def unit(self) -> NDArray[np.float32]:
        """In [0, 1]."""
        unit = (self.values.astype(np.float32) - self.black) / (self.white - self.black)
        return unit.clip(0, 1)

    @property
    def whole(self) -> bool:
        """Whether black and white are the ends of the type."""
        return self.black == 0 and self.white == np.iinfo(self.values.dtype).max


def rgb(frame: Any) -> NDArray[np.float32]:
    """Array [H, W, 3] in [0, 1]."""
    array: NDArray[np.float32] = frame.reformat(format=_RGB, interpolation="BICUBIC").to_ndarray()
    return array.clip(0, 1)


def planar(frame: Any, width: int, height: int) -> Any:
    """The frame in yuv420p and that size."""
    if (frame.format.name, frame.width, frame.height) == ("yuv420p", width, height):
        return frame
    return _converted(frame, "yuv420p", "MPEG", width=width, height=height, interpolation="BICUBIC")


def is_colour(frame: Any) -> bool:
    """Whether it is more than noise that its chroma shows."""
    frame = planar(frame, frame.width, frame.height)
    return any(
        np.abs(_plane(frame, index, np.uint8).astype(np.float32) - _NEUTRAL).mean() > GREY_TOLERANCE * 255
        for index in (1, 2)
    )


@dataclass(frozen=True)
class Template:
    """What a fused frame takes from the visible one.

    Attributes:
        seen: the visible frame in yuv420p and the fused one's size, not turned.
        turn: how to turn it.
        grey: whether the fused frame is to have no colours.
    """

    seen: Any
    turn: Orientation
    grey: bool

    @classmethod
    def of(cls, frame: Any, width: int, height: int, turn: Orientation, grey: bool) -> "Template":
        """Of a visible frame, for a fused one of that size."""
        return cls(planar(frame, *turn.size(width, height)), turn, grey)

    def fused(self, planes: Tensor) -> Any:
        """The fused frame in yuv420p, where a last column or row is repeated if a side is odd.

        Args:
            planes: Tensor[1 or 3, 1, H, W] in [0, 1]: luma, or R, G and B.
        """
        height, width = planes.shape[2:]
        if len(planes) == 3:
            parts = self._changed(planes[:, 0].permute(1, 2, 0).numpy())
        else:
            black, white = _levels(self.seen, 8)
            luma = planes[0, 0] * (white - black) + black
            _, *chroma = _planes(self.seen)
            if self.grey:
                chroma = [np.full_like(part, _NEUTRAL) for part in chroma]
            parts = [luma.round().to(torch.uint8).numpy(), *(self.turn(part) for part in chroma)]
        parts[0] = np.pad(parts[0], ((0, height % 2), (0, width % 2)), mode="edge")
        together = np.concatenate([part.ravel() for part in parts]).reshape(-1, parts[0].shape[1])
        frame = av.VideoFrame.from_ndarray(together, format="yuv420p")
        frame.pts, frame.time_base = self.seen.pts, self.seen.time_base
        frame.color_range, frame.colorspace = self.seen.color_range, self.seen.colorspace
        return frame

    def _changed(self, values: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """Luma and chroma for other R, G and B, [H, W, 3]: what does not change stays to the bit.

        Whatever becomes of colours on the way to RGB and back, it does so before the change as well as after.
        """
        before, after = (self._planar(image) for image in (self.turn(rgb(self.seen)), values))
        return [
            (self.turn(part) + (new - old.astype(np.int16))).clip(0, 255).astype(np.uint8)
            for part, old, new in zip(_planes(self.seen), before, after, strict=True)
        ]

    def _planar(self, values: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format=_RGB)
        return _planes(
            frame.reformat(
                format="yuv420p",
                dst_colorspace=self.seen.colorspace,
                dst_color_range="MPEG" if _levels(self.seen, 8)[0] else "JPEG",
                interpolation="AREA",
            )
        )


def check_depth(frame: Any) -> None:
    """Refuses frames that have more than 16 bits.

    Raises:
        ValueError: it has.
    """
    if _bits(frame) > 16:
        raise ValueError(f"frames of {_bits(frame)} bits ({frame.format.name}) cannot be read, only up to 16")


def _is_rgb(frame: Any) -> bool:
    return bool(frame.format.is_rgb or frame.format.has_palette)


def _converted(frame: Any, name: str, color_range: str | None, **settings: Any) -> Any:
    """The frame in a format of luma and chroma, and tagged with the matrix that leads back."""
    matrix = None
    if _is_rgb(frame):
        # RGB has none. Any would do, as it is told; players that pass over the tag go by the size.
        matrix = "ITU709" if frame.width >= 1280 or frame.height > 576 else "ITU601"
    return frame.reformat(format=name, dst_colorspace=matrix, dst_color_range=color_range, **settings)


def _bits(frame: Any) -> int:
    """Of a component, at least 8."""
    return max(8, *(int(component.bits) for component in frame.format.components))


def _levels(frame: Any, bits: int) -> tuple[int, int]:
    """Black and white of the luma."""
    ColorRange = av.video.reformatter.ColorRange
    grey = frame.format.name.startswith("gray") and frame.color_range != ColorRange.MPEG
    if grey or frame.color_range == ColorRange.JPEG:
        return 0, 2**bits - 1
    return 16 << (bits - 8), 235 << (bits - 8)


def _planes(frame: Any) -> list[NDArray[np.uint8]]:
    """Those of a frame in yuv420p."""
    return [_plane(frame, index, np.uint8) for index in range(3)]


def _plane(frame: Any, index: int, dtype: type[np.generic]) -> NDArray[Any]:
    plane = frame.planes[index]
    rows = np.frombuffer(plane, dtype).reshape(-1, plane.line_size // np.dtype(dtype).itemsize)
    return rows[: plane.height, : plane.width]
