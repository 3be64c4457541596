"""Raw thermal values to grey: which values of an infrared image become black and white."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PERCENTILES = (1.0, 99.0)
FEW_VALUES = 1 / 4  # of 16 bit, all of 14: values of no more are raw counts that somebody ought to map

_COUNTED = 2**20  # pixels at a time, which counting makes eight bytes of


@dataclass(frozen=True)
class ThermalRange:
    """The values of an infrared image that become black and white; those between are mapped linearly.

    Attributes:
        kind: "full": the range of the type; "percentile": of the image's own values; "fixed": the values
            themselves.
        low: percentile or value that becomes black.
        high: that becomes white.
    """

    kind: Literal["full", "percentile", "fixed"] = "full"
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, value: "str | tuple[float, float] | ThermalRange") -> "ThermalRange":
        """Reads what users write.

        Args:
            value: "full", "minmax", "percentile" (the 1st and the 99th), "LOW%,HIGH%", "LOW,HIGH" in the
                values of the image, or (low, high) as numbers.

        Raises:
            ValueError: anything else, or low is not below high.

        Example:
            >>> ThermalRange.parse("0.5%,99.5%")
            ThermalRange(kind='percentile', low=0.5, high=99.5)
            >>> ThermalRange.parse((7000, 9500))
            ThermalRange(kind='fixed', low=7000.0, high=9500.0)
        """
        if isinstance(value, ThermalRange):
            return value
        if isinstance(value, str) and value in _WORDS:
            return _WORDS[value]
        try:
            parts = value.split(",") if isinstance(value, str) else [str(float(bound)) for bound in value]
            percent = all(part.strip().endswith("%") for part in parts)
            low, high = (float(part.strip().removesuffix("%") if percent else part) for part in parts)
        except (TypeError, ValueError):
            raise ValueError(
                "thermal_range must be full, minmax, percentile, LOW%,HIGH% or LOW,HIGH in values of the "
                f"image, got {value!r}"
            ) from None
        if not low < high or not np.isfinite((low, high)).all() or (percent and not 0 <= low < high <= 100):
            raise ValueError(f"thermal_range must go from a lower to a higher value, got {value!r}")
        return cls("percentile" if percent else "fixed", low, high)

    def __str__(self) -> str:
        """What :meth:`parse` reads.

        Example:
            >>> [str(ThermalRange.parse(text)) for text in ("0%,100%", "0.5%,99.5%", "7000,9500")]
            ['minmax', '0.5%,99.5%', '7000,9500']
        """
        for word, meaning in _WORDS.items():
            if self == meaning:
                return word
        sign = "%" if self.kind == "percentile" else ""
        return f"{self.low:.12g}{sign},{self.high:.12g}{sign}"

    def of(self, image: NDArray[Any]) -> tuple[float, float]:
        """The values of an image of any shape that become black and white, where the kind is not "full"."""
        if self.kind == "fixed":
            return self.low, self.high
        low, high = percentiles(image, (self.low, self.high)).tolist()
        return low, high

    def grey(self, image: NDArray[Any]) -> NDArray[np.float64]:
        """What becomes of an image of any shape: from 0, black, to 1, white; of one value: 0."""
        full = 0, np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
        low, high = full if self.kind == "full" else self.of(image)
        return np.clip((image - float(low)) / (high - low if high > low else 1), 0, 1)

    def bounds(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """The same of each image of Tensor[B, C, H, W], float32 Tensor[B]."""
        images = planes.float() if planes.is_floating_point() else planes
        bounds = [self.of(image.cpu().numpy()) for image in images]
        low, high = torch.tensor(bounds, dtype=torch.float32, device=planes.device).unbind(1)
        return low, high


_WORDS = {
    "full": ThermalRange(),
    "minmax": ThermalRange("percentile", 0.0, 100.0),
    "percentile": ThermalRange("percentile", *PERCENTILES),
}


class SteadyRange:
    r"""The ranges of one image after the other, as of a video, that follow its values little by little.

    A thermal camera damps its automatic gain alike. What is averaged (exponentially) is the line from values
    to grey, so that no value that stays within the range changes its grey by more than 1/n of the way to that
    of the image's own percentiles, :math:`\hat b, \hat w`:

    .. math:: g_t = g_{t-1} + (\hat g_t - g_{t-1}) / n, \qquad
        \hat g_t(v) = (v - \hat b_t) / (\hat w_t - \hat b_t), \qquad g_0 = \hat g_0

    Black and white, where g is 0 and 1, are then averages weighted by contrast. Plain ones would follow what
    is hot and enters nearly at once: if it makes the range 30 times as wide, to an eighth of the contrast in
    the first image for n = 4.

    Args:
        thermal_range: as asked for; one that is not of the images' own values stays as it is.
        smoothing: n; 1: each image has its own.

    Example:
        >>> steady = SteadyRange(ThermalRange.parse("minmax"), smoothing=2)
        >>> str(steady(np.array([7000, 7400])))
        '7000,7400'
        >>> str(steady(np.array([7000, 8200])))
        '7000,7600'
    """

    def __init__(self, thermal_range: ThermalRange, smoothing: int) -> None:
        self.thermal_range = thermal_range
        self.smoothing = smoothing
        self.line: NDArray[np.float64] | None = None  # g(v) = line[0] v - line[1]

    def __call__(self, image: NDArray[Any]) -> ThermalRange:
        """The range of the next image, of any shape."""
        if self.thermal_range.kind != "percentile" or self.smoothing == 1:
            return self.thermal_range
        low, high = self.thermal_range.of(image)
        if low < high:  # an image of one value says nothing of contrast
            own = np.array((1, low)) / (high - low)
            last = own if self.line is None else self.line
            self.line = own + (last - own) * (1 - 1 / self.smoothing)
        if self.line is not None:
            gain, offset = self.line.tolist()
            low, high = offset / gain, (offset + 1) / gain
        return ThermalRange("fixed", low, high)


def few_values(image: NDArray[Any]) -> tuple[int, int] | None:
    """The lowest and highest value of an image of 16 bit that uses little of them, of others None.

    Example:
        >>> few_values(np.array([[7000, 9500]], np.uint16))
        (7000, 9500)
    """
    if image.dtype != np.uint16:
        return None
    low, high = int(image.min()), int(image.max())
    return (low, high) if 0 < high - low < FEW_VALUES * 65535 else None


def percentiles(values: NDArray[Any], percents: tuple[float, ...]) -> NDArray[np.float64]:
    """``np.percentile(values, percents)``, linear between two values; integers from 0 on are counted for it.

    Where there are many of few values, as in an image, that takes a fraction of the time of partial sorting.

    Example:
        >>> percentiles(np.array([[0, 40], [10, 20]]), (0, 50, 90))
        array([ 0., 15., 34.])
    """
    if values.dtype.kind == "f":
        return np.asarray(np.percentile(values, percents), np.float64)
    flat = values.ravel()
    counts = np.zeros(int(flat.max()) + 1, np.int64)
    for start in range(0, flat.size, _COUNTED):
        counts += np.bincount(flat[start : start + _COUNTED], minlength=counts.size)
    places = np.array(percents) / 100 * (flat.size - 1)  # among the sorted values
    below = np.floor(places)
    lower, upper = np.searchsorted(counts.cumsum(), (below, np.ceil(places)), side="right")
    return np.asarray(lower + (upper - lower) * (places - below), np.float64)
