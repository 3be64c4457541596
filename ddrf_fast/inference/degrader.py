"""Degrader: the session that degrades image files, each by its name and the seed alone."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddrf_fast.data import MAX_PIXELS
from ddrf_fast.degradation import Degradation, DynamicDegradation
from ddrf_fast.inference.pictures import Picture


@dataclass(frozen=True)
class DegradeRequest:
    """An image that is ready to be degraded.

    Attributes:
        picture: as it came.
        planes: Tensor[1, C, H, W] in [0, 1].
        sample_id: made of its name.
    """

    picture: Picture
    planes: Tensor
    sample_id: int

    @property
    def key(self) -> object:
        """Requests of one key may be computed together."""
        return self.planes.shape


class Degrader:
    """Degrades images at random and repeatably: what is done to one depends on the seed and its name alone.

    Args:
        degradation: what is drawn.
        seed: from 0 to 2^63 - 1.
        spatial: let the blur vary over the image, or not; None: as configured.
        max_pixels: as for :func:`ddrf_fast.data.read_image`.

    Example:
        >>> import numpy as np
        >>> degrader = Degrader(DynamicDegradation("paper", scale=2), seed=1)
        >>> image = np.zeros((40, 50, 3), np.uint8)
        >>> first, again = degrader(image, "street"), degrader(image, "street")
        >>> first.shape, bool((first == again).all()), bool((first == degrader(image, "park")).all())
        ((20, 25, 3), True, False)
    """

    def __init__(
        self,
        degradation: DynamicDegradation,
        seed: int = 0,
        spatial: bool | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.degradation = degradation
        self.seed = seed
        self.spatial = spatial
        self.max_pixels = max_pixels

    def __call__(self, image: Any, name: str) -> Any:
        """Degrades an image that is called so; see :func:`ddrf_fast.fuse` for what it may be."""
        request = self.prepare(image, name)
        return self.finish(request, self.compute([request])[0])

    def prepare(self, image: Any, name: str) -> DegradeRequest:
        """Reads and checks an image.

        Raises:
            TypeError, ValueError: as :func:`ddrf_fast.fuse` of images, or it is smaller than half a kernel.
        """
        picture = Picture.take(image, "image", max_pixels=self.max_pixels)
        config = self.degradation.config
        least = config.kernels.kernel_size // 2 + 1 if config.padding == "reflect" else 1
        if min(picture.size) < least:
            raise ValueError(
                f"{picture.name} is {picture.describe()}, but kernels of {config.kernels.kernel_size} pixels "
                f"need at least {least}x{least}"
            )
        planes = picture.channels().view(len(picture.planes), -1, *picture.size)
        return DegradeRequest(picture, planes, sample_id(name))

    def recipe(self, requests: Sequence[DegradeRequest]) -> Degradation:
        """What is drawn for some requests."""
        ids = torch.tensor([request.sample_id for request in requests])
        return self.degradation.sample(len(requests), seed=self.seed, sample_ids=ids, spatial=self.spatial)

    def describe(self, request: DegradeRequest) -> dict[str, Any]:
        """What is drawn for a request, as plain numbers for JSON: the fields of its recipe."""
        drawn = vars(self.recipe([request]))
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in drawn.items()}

    def compute(self, requests: Sequence[DegradeRequest]) -> list[Tensor]:
        """The degraded planes of each request; all must have one key."""
        planes = torch.cat([request.planes for request in requests])
        return list(self.recipe(requests).apply(planes).split(1))

    def finish(self, request: DegradeRequest, output: Tensor) -> Any:
        """The degraded image, in the type that came."""
        scale = self.degradation.config.scale
        return request.picture.sampled(scale).with_channels(output.flatten(0, 1)[:, None])


def sample_id(name: str) -> int:
    """A number of 31 bit that stands for a name."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=4).digest(), "big") >> 1
