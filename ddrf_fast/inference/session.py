"""What sessions share: images are prepared, go through the network, and come back as they came."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from ddrf_fast.data.thermal import ThermalRange
from ddrf_fast.degradation.photometric import TONE_CHANNELS
from ddrf_fast.inference.engine import Dtype, Tile
from ddrf_fast.inference.network import Network, PathLike
from ddrf_fast.inference.pictures import Picture
from ddrf_fast.inference.streaming import ahead, grouped
from ddrf_fast.models.ddrfnet import Modality, split_code
from ddrf_fast.ops._checks import integer

ImageT = TypeVar("ImageT")
Color = Literal["ycbcr", "rgb", "gray"]


@dataclass(frozen=True)
class Request:
    """Images that are ready for the network.

    Attributes:
        picture: what the result is to be like.
        planes: its planes as the network takes them, float32 Tensor[N, 1, H, W]; where the channels of a
            colour image go through it apart, N is 3 for each.
        infrared: the planes of the infrared image, where a pair is fused.
        infrared_code: what is known of these planes, Tensor[N, 3] (their tone alone) or Tensor[N, 19]; None:
            all is to be estimated from them.
        reach: where the infrared image reaches, bool Tensor[N, 1, H, W]; None: everywhere.
        modality: of the picture.
        mapped: the values of the infrared image that became black and white, where a thermal range other than
            "full" was asked for.
        narrow: the lowest and highest value of an infrared image of 16 bit that uses little of its range,
            where none was asked for.
        tone: of the picture's planes, Tensor[N, 3], where it is no matter of each of them alone: channels
            of an image are brightened alike, and raw thermal values not at all. None: each has its own.
        noise_std: of the planes, where it is known.
    """

    picture: Picture
    planes: Tensor
    infrared: Tensor | None = None
    infrared_code: Tensor | None = None
    reach: Tensor | None = None
    modality: Modality = "visible"
    mapped: tuple[float, float] | None = None
    narrow: tuple[int, int] | None = None
    tone: Tensor | None = None
    noise_std: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Requests of one key may be computed together."""
        given = self.reach is None, self.tone is None, self.infrared_code is None
        return self.planes.shape[1:], self.planes.device, self.modality, self.noise_std, given


class Session(ABC):
    """What sessions share: images are prepared, go through the network, and come back as they came.

    :meth:`prepare` and :meth:`finish` may run in any thread, :meth:`compute` in one at a time.

    Args:
        weights: a file written by ``ddrf_fast.models.save_model``, or a :class:`Network` that is loaded
            already; None: the weights that come with the package.
        device: "auto" (CUDA where there is one, else the CPU), or what ``torch.device`` takes.
        dtype: what the network computes in; see :class:`Network`.
        tile: rows of the strips of large images; see :class:`Network`.
        color: "ycbcr": the luminance goes through the network, and the colour (of a pair, the visible
            image's) is kept; "rgb": each channel does, of a pair with the infrared image; "gray": the result
            is the luminance.
        thermal_range: which values of an infrared image become black and white: "full" (0 and the largest
            of the dtype), "minmax" or "percentile" (the 1st and the 99th) of each image, "LOW%,HIGH%", or
            fixed ones, "LOW,HIGH" or (low, high). What lies outside is cut off; an infrared image that is
            restored is again in its own values.
        max_pixels: as for :func:`ddrf_fast.data.read_image`.

    Attributes:
        network: what computes.
        model: its network, in evaluation mode and float32.
        device: where it runs.

    Raises:
        ValueError: the weights are missing or do not fit, the device is unknown or not there, or a setting is
            none of those above.
    """

    _code: Tensor | None = None  # of a known degradation

    def __init__(
        self,
        weights: PathLike | Network | None,
        device: str | torch.device,
        dtype: Dtype,
        tile: Tile,
        color: Color,
        thermal_range: str | tuple[float, float],
        max_pixels: int,
    ) -> None:
        if color not in get_args(Color):
            raise ValueError(f"color must be one of {', '.join(get_args(Color))}, got {color!r}")
        self.color = color
        self.thermal_range = ThermalRange.parse(thermal_range)
        self.max_pixels = max_pixels
        self.network = weights if isinstance(weights, Network) else Network(weights, device, dtype, tile)
        self.model, self.device = self.network.model, self.network.device

    @abstractmethod
    def prepare(self, visible: Any, infrared: Any) -> Request:
        """Reads and checks images, and makes the network's inputs of them."""

    @abstractmethod
    def _run(self, request: Request) -> Tensor:
        """The network on the planes of a request, Tensor[N, 1, H, W]."""

    def compute(self, requests: Sequence[Request]) -> list[Tensor]:
        """The network's output, Tensor[N, 1, H, W], for each of some requests of one :attr:`Request.key`."""
        output = self._run(requests[0] if len(requests) == 1 else _joined(requests))
        return list(output.split([len(request.planes) for request in requests]))

    def finish(self, request: Request, output: Tensor) -> Any:
        """The result of a request, in the type of its picture."""
        output = output.to(request.planes.device)
        if self.color == "ycbcr":
            return request.picture.with_luma(output, request.planes)
        return request.picture.with_channels(output)

    def stream(
        self, images: Iterable[tuple[Any, Any]], *, batch_size: int = 1, workers: int = 2
    ) -> Iterator[Any]:
        """Does one after the other, such as the frames of two cameras, while the next are being read.

        At most ``workers + 2 * batch_size`` images are held. Each is by itself: a thermal range of "minmax"
        or percentiles is that of each image, and changes with what enters the scene; a fixed one does not.
        (:func:`ddrf_fast.video.fuse_video` averages it over the frames of a file.)

        Args:
            images: (visible, infrared) of each; what a call takes. An iterator is drawn in another thread.
            batch_size: how many neighbours of one size go through the network together.
            workers: threads that read and prepare.

        Yields:
            The results, in order.

        Raises:
            TypeError, ValueError: as a call, when the result would be due; batch_size or workers below 1.
        """
        integer("batch_size", batch_size, 1)
        integer("workers", workers, 1)
        # Copies, as a source may put the next frame where this one is.
        pairs = (tuple(map(_copied, pair)) for pair in images)
        requests = ahead(pairs, lambda pair: self.prepare(*pair), workers, workers + batch_size)
        told = False
        for group in grouped(requests, batch_size, key=lambda request: request.key):
            for request, output in zip(group, self.compute(group), strict=True):
                told = told or _warn(request)  # once, not of each frame
                yield self.finish(request, output)

    def _one(self, visible: Any, infrared: Any) -> Any:
        request = self.prepare(visible, infrared)
        _warn(request)
        return self.finish(request, self.compute([request])[0])

    def _take(self, image: Any, modality: Modality, thermal_range: ThermalRange | None = None) -> Picture:
        """An image on the device; an infrared one is mapped by that range, or else by the session's."""
        thermal = thermal_range or self.thermal_range if modality == "infrared" else None
        picture = Picture.take(image, modality, thermal, self.max_pixels)
        return picture if self.device.type == "cpu" else picture.to(self.device)

    def _planes(self, picture: Picture) -> Tensor:
        return picture.channels() if self.color == "rgb" else picture.luma()

    def _tone(self, picture: Picture, planes: Tensor, modality: Modality) -> Tensor | None:
        """The tone of planes that do not have each their own, see :attr:`Request.tone`."""
        if picture.narrow is not None:
            return planes.new_ones(len(planes), TONE_CHANNELS)  # low values are not darkness there
        channels = len(planes) // len(picture.planes)
        if modality == "infrared" or channels == 1:
            return None
        if self._code is not None:
            _, tone = split_code("code", self._code, 1, self.model.config.code_channels)
            return tone.expand(len(planes), -1)
        return self.network.tone(picture.luma()).repeat_interleave(channels, 0)


def _joined(requests: Sequence[Request]) -> Request:
    """Requests of one key as one; its picture is the first."""
    joined: dict[str, Any] = {}
    for name in ("planes", "infrared", "infrared_code", "reach", "tone"):
        parts = [getattr(request, name) for request in requests]
        joined[name] = None if parts[0] is None else torch.cat(parts)
    return replace(requests[0], **joined)


def _copied(image: Any) -> Any:
    if isinstance(image, np.ndarray):
        return image.copy()
    return image.clone() if isinstance(image, Tensor) else image


def refuse_colour(thermal: Picture, seen: Picture | None = None) -> None:
    """Three channels that differ: a false-colour rendering, or visible and infrared swapped."""
    if not thermal.colour:
        return
    if seen is not None and not seen.colour:
        raise ValueError(
            f"{thermal.name} is in colour and {seen.name} is grey: visible and infrared seem to be swapped"
        )
    raise ValueError(
        f"{thermal.name} is in colour, but an infrared image must be grey: are visible and infrared swapped? "
        "Convert a false-colour image to grey first"
    )


def together(visible: Sequence[Any], infrared: Any) -> Iterator[tuple[Any, Any]]:
    """The pairs of two lists."""
    if not isinstance(infrared, (list, tuple)) or len(visible) != len(infrared):
        count = len(infrared) if isinstance(infrared, (list, tuple)) else type(infrared).__name__
        raise ValueError(f"lists must have one length, but visible has {len(visible)} and infrared {count}")
    return zip(visible, infrared, strict=True)


def _warn(request: Request) -> bool:
    """Whether there was something to warn of."""
    if request.narrow is None:
        return False
    low, high = request.narrow
    warnings.warn(
        f"the infrared image has 16 bit, but values from {low} to {high} only; it is taken as it is, of low "
        "contrast (thermal_range='percentile', 'minmax' or (LOW, HIGH) spreads them)",
        stacklevel=4,
    )
    return True
