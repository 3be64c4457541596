"""Fuser: the session that fuses infrared and visible images."""

from typing import Any, Literal, get_args, overload

import torch
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.data import MAX_PIXELS
from ddrf_fast.data.thermal import ThermalRange
from ddrf_fast.inference.alignment import as_homography, warp
from ddrf_fast.inference.engine import Dtype, Tile
from ddrf_fast.inference.network import Network, PathLike
from ddrf_fast.inference.pictures import resample
from ddrf_fast.inference.session import Color, ImageT, Request, Session, refuse_colour, together

Resize = Literal["visible", "infrared"]


class Fuser(Session):
    """Fusion by DDRF-Net, loaded once, as a function of a visible and an infrared image.

    Args:
        weights, device, dtype, tile, color, thermal_range, max_pixels: as for every :class:`Session`.
        resize: what to do where the sizes differ: "visible": bring the infrared image to the size of the
            visible one, "infrared": the other way round; None: that is an error.
        homography: of the infrared onto the visible image, 3x3 numbers or a file of them
            (:mod:`ddrf_fast.inference.alignment` says which way round): the infrared image is warped, and
            where it does not reach, the visible one is restored alone. How it is degraded is estimated
            before.
        clean: the images are sharp, well lit and free of noise, and are to be fused only: the network is told
            so, instead of estimating from each image how it is degraded.

    Raises:
        ValueError: as every session, or a setting is none of those above.

    Example:
        >>> import numpy as np
        >>> fuser = Fuser()
        >>> fuser(np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8)).shape
        (48, 64, 3)
    """

    def __init__(
        self,
        weights: PathLike | Network | None = None,
        device: str | torch.device = "auto",
        dtype: Dtype = "auto",
        tile: Tile = "auto",
        *,
        color: Color = "ycbcr",
        thermal_range: str | tuple[float, float] = "full",
        resize: Resize | None = None,
        homography: Any = None,
        clean: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if resize not in (None, *get_args(Resize)):
            raise ValueError(f"resize must be 'visible', 'infrared' or None, got {resize!r}")
        if resize is not None and homography is not None:
            raise ValueError("give resize or homography: a homography brings its own size along")
        self.resize = resize
        self.homography = None if homography is None else as_homography(homography)
        super().__init__(weights, device, dtype, tile, color, thermal_range, max_pixels)
        self._code = self.network.encode(noise_std=0.0) if clean else None

    @overload
    def __call__(self, visible: PathLike, infrared: Any) -> NDArray[Any]: ...
    @overload
    def __call__(self, visible: ImageT, infrared: Any) -> ImageT: ...
    def __call__(self, visible: Any, infrared: Any) -> Any:
        """Fuses a pair, a batch (of tensors), or lists of pairs; see :func:`fuse`."""
        if isinstance(visible, (list, tuple)):
            return list(self.stream(together(visible, infrared)))
        return self._one(visible, infrared)

    def prepare(self, visible: Any, infrared: Any, *, thermal_range: ThermalRange | None = None) -> Request:
        """Reads, checks and aligns a pair.

        Args:
            visible: as for a call.
            infrared: likewise.
            thermal_range: of this pair; None: the session's.

        Raises:
            TypeError, ValueError: as a call does of images.
        """
        seen, thermal = self._take(visible, "visible"), self._take(infrared, "infrared", thermal_range)
        refuse_colour(thermal, seen)
        if len(seen.planes) != len(thermal.planes):
            raise ValueError(
                f"a batch needs as many of both, but {seen.name} is {seen.describe()} and {thermal.name} is "
                f"{thermal.describe()}"
            )
        if self.resize == "infrared":
            seen = seen.resized(thermal.size)
        luma, reach = thermal.luma().to(seen.planes.device), None
        code = self._tone(thermal, luma, "infrared")
        if self.homography is not None:
            if self._code is None:
                # Before the visible image stands in, whose noise would be taken for that of the infrared one.
                code = self.network.estimate("infrared", luma, code)
            luma, reach = warp(luma, self.homography, onto=seen.luma())
            if not bool(reach.any()):
                raise ValueError(
                    f"the homography leaves nothing of {thermal.name} ({thermal.describe()}) on {seen.name} "
                    f"({seen.describe()}); it takes infrared pixels to visible ones: is it the inverse?"
                )
        elif self.resize == "visible":
            luma = resample(luma, seen.size)
        elif thermal.size != seen.size:
            raise ValueError(
                f"a pair needs one size, but {seen.name} is {seen.describe()} and {thermal.name} is "
                f"{thermal.describe()} (width x height): if they show the same, resize='visible' or "
                "'infrared' brings one to the size of the other; a homography aligns them"
            )
        planes = self._planes(seen)
        if (channels := len(planes) // len(luma)) > 1:
            luma = luma.repeat_interleave(channels, dim=0)
            code = None if code is None else code.repeat_interleave(channels, dim=0)
        return Request(
            seen,
            planes,
            infrared=luma,
            infrared_code=code,
            reach=None if reach is None or bool(reach.all()) else reach.expand(len(planes), -1, -1, -1),
            mapped=thermal.bounds,
            narrow=thermal.narrow,
            tone=self._tone(seen, planes, "visible"),
        )

    def _run(self, request: Request) -> Tensor:
        assert request.infrared is not None
        return self.network.fuse(
            request.planes,
            request.infrared,
            self._code,
            request.tone,
            request.infrared_code,
            request.reach,
        )
