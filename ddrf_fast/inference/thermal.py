"""Raw thermal values to grey: which values of an infrared image become black and white."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

PERCENTILES = (1.0, 99.0)


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
        words = {
            "full": cls(),
            "minmax": cls("percentile", 0.0, 100.0),
            "percentile": cls("percentile", *PERCENTILES),
        }
        if isinstance(value, str) and value in words:
            return words[value]
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

    def bounds(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """The values of each image of Tensor[B, C, H, W] that become black and white, float32 Tensor[B]."""
        if self.kind == "fixed":
            bounds = np.array([(self.low, self.high)] * len(planes))
        else:
            bounds = np.array(
                [np.percentile(image.float().cpu().numpy(), (self.low, self.high)) for image in planes]
            )
        low, high = torch.tensor(bounds, dtype=torch.float32, device=planes.device).unbind(1)
        return low, high
