"""Pictures: a row for each pair, a column for each method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from ddrf_fast.data import write_image
from ddrf_fast.demo import side_by_side

_WIDTH = 320


def write_grid(path: Path, rows: Sequence[Mapping[str, Tensor]]) -> None:
    """Writes a grid of images, uint8 Tensor[1, 1, H, W] each, by row and name, all as wide as another.

    Args:
        path: the picture, PNG.
        rows: of as many images each, which may differ in size.
    """
    lines = []
    for row in rows:
        panels = {}
        for name, image in row.items():
            values = image[0, 0].numpy()
            size = (_WIDTH, round(values.shape[0] * _WIDTH / values.shape[1]))
            panels[name] = np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA), np.uint8)
        lines.append(side_by_side(**panels))
    write_image(path, np.vstack(lines))
