"""Fuses the sample pair of the package, and shows result, time and quality."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast import metrics
from ddrf_fast.data import read_image, write_image
from ddrf_fast.inference import Fuser
from ddrf_fast.inference.pictures import Picture

_ASSETS = Path(__file__).parent.parent / "assets"
SAMPLE_VISIBLE, SAMPLE_INFRARED = _ASSETS / "sample_visible.png", _ASSETS / "sample_infrared.png"
MEASURES = ("EN", "AG", "SSIM", "VIF", "PSNR", "Qabf")
REPETITIONS = 5

T = TypeVar("T")


def run_demo(output: str | os.PathLike[str], **settings: Any) -> str:
    """Fuses the sample pair and writes `fused.png` and `side_by_side.png` (visible, infrared, fused).

    Args:
        output: folder for the two pictures; made if missing.
        settings: arguments of :class:`ddrf_fast.Fuser`.

    Returns:
        A few lines for people: where the pictures are, how long it took, and the measures of the fused image.

    Raises:
        ValueError: as :class:`ddrf_fast.Fuser`.
        OSError: the folder cannot be written.
    """
    output = Path(output)
    visible, infrared = read_image(SAMPLE_VISIBLE), read_image(SAMPLE_INFRARED)
    fuser, load = timed(lambda: Fuser(**settings))
    fused, first = timed(lambda: fuser(visible, infrared))
    typical = statistics.median(timed(lambda: fuser(visible, infrared))[1] for _ in range(REPETITIONS))

    output.mkdir(parents=True, exist_ok=True)
    write_image(output / "fused.png", fused)
    write_image(output / "side_by_side.png", side_by_side(visible=visible, infrared=infrared, fused=fused))
    scores = metrics.evaluate(_luma(fused), _luma(visible), _luma(infrared), MEASURES)
    height, width = infrared.shape
    return "\n".join(
        (
            f"Fused the sample pair ({width}x{height}) on {fuser.device}:",
            f"  {output / 'fused.png'}",
            f"  {output / 'side_by_side.png'}   visible, infrared, fused",
            "",
            f"  load the model   {1e3 * load:8.1f} ms",
            f"  fuse, first      {1e3 * first:8.1f} ms",
            f"  fuse, median     {1e3 * typical:8.1f} ms   of {REPETITIONS}, from array to array",
            "",
            "  " + "".join(f"{name:>8}" for name in MEASURES),
            "  " + "".join(f"{scores[name].item():8.3f}" for name in MEASURES),
        )
    )


def side_by_side(**images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The images beside one another, [H + 28, ..., 3], each with its name above it."""
    panels = []
    for name, image in images.items():
        colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        panel = cv2.copyMakeBorder(colour, 28, 0, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        cv2.putText(panel, name, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1, cv2.LINE_AA)
        panels.append(panel)
    return np.hstack(panels)


def _luma(image: NDArray[np.uint8]) -> Tensor:
    return Picture.take(image, "image").luma()


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and the seconds that it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started
