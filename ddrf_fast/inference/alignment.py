r"""Infrared images of another size or another view, brought onto the visible image.

A homography H takes a pixel of the infrared image to its place in the visible one,

.. math:: (x_v, y_v, 1) \sim H (x_i, y_i, 1)

with x to the right, y down, and whole numbers at the centres of pixels: what
``cv2.findHomography(infrared_points, visible_points)`` gives.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_STRIP = 2**20  # pixels at a time: their coordinates take more memory than the image
_MOST_PLACES = 8  # along the side of a pixel


def read_matrix(path: str | os.PathLike[str]) -> NDArray[Any]:
    """A matrix from a file: rows of numbers as text, JSON, or NumPy's .npy.

    Args:
        path: text with blanks or commas between the numbers of a row; .json with a list of rows; .npy.

    Raises:
        ValueError: the file is missing or holds no matrix.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            matrix = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".json":
            matrix = np.array(json.loads(path.read_text()), np.float64)
        else:
            text = path.read_text().replace(",", " ")
            matrix = np.loadtxt(text.splitlines(), ndmin=2) if text.strip() else np.empty((0, 0))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: no matrix could be read ({error})") from error
    if not isinstance(matrix, np.ndarray):
        raise ValueError(f"{path}: holds several arrays, expected one matrix")
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "uif" or not np.isfinite(matrix).all():
        raise ValueError(f"{path}: expected a matrix of finite numbers, got {matrix.dtype} {matrix.shape}")
    return matrix.astype(np.float64)


def as_homography(value: Any) -> NDArray[Any]:
    """A path or nine numbers as a float64 array [3, 3].

    Raises:
        ValueError: it is no invertible 3x3 matrix.
    """
    is_path = isinstance(value, (str, os.PathLike))
    name = os.fspath(value) if is_path else "homography"
    try:
        matrix = np.asarray(read_matrix(value) if is_path else value, np.float64)
    except (TypeError, ValueError) as error:
        if is_path:
            raise
        raise ValueError(f"{name} must be a matrix of numbers ({error})") from error
    if matrix.shape != (3, 3):
        raise ValueError(f"{name} must be a matrix of 3x3, got {list(matrix.shape)}")
    # A homography means the same at any scale: the determinant is that of its rows brought to length 1.
    lengths = np.linalg.norm(matrix, axis=1)
    if not np.isfinite(matrix).all() or not abs(np.linalg.det(matrix)) > 1e-12 * lengths.prod():
        raise ValueError(f"{name} must be invertible, got {matrix.tolist()}")
    return matrix


def warp(image: Tensor, homography: NDArray[Any], onto: Tensor) -> tuple[Tensor, Tensor]:
    """An image as seen from another view; where it does not reach, the other one stands in.

    Args:
        image: Tensor[B, 1, h, w].
        homography: [3, 3], from its pixels to those of `onto`.
        onto: Tensor[B, 1, H, W].

    Returns:
        Tensor[B, 1, H, W], interpolated bilinearly, averaged over pixels that cover several of the image's,
        and where it reaches, bool Tensor[1, 1, H, W].
    """
    inverse = np.linalg.inv(homography)
    places = _places(inverse, onto.shape[2], onto.shape[3])
    result, reach = onto.clone(), torch.empty_like(onto[:1], dtype=torch.bool)
    columns = torch.arange(onto.shape[3], dtype=torch.float64, device=image.device)
    step = max(1, _STRIP // (onto.shape[3] * len(places) ** 2))
    for top in range(0, onto.shape[2], step):
        rows = torch.arange(top, min(top + step, onto.shape[2]), dtype=torch.float64, device=image.device)
        samples = [_sampled(image, inverse, rows + y, columns + x) for y in places for x in places]
        seen, inside = (sum(parts[1:], parts[0]) / len(samples) for parts in zip(*samples, strict=True))
        strip = result[:, :, top : top + step]
        strip.copy_(torch.where(inside >= 0.5, seen, strip))
        reach[:, :, top : top + step] = inside >= 0.5
    return result, reach


def _places(inverse: NDArray[Any], height: int, width: int) -> list[float]:
    """Where along its side a pixel of the visible image is sampled: in as many places as it covers pixels."""
    area = abs(np.linalg.det(inverse) / (inverse[2] @ (width / 2, height / 2, 1)) ** 3)  # in the middle
    count = round(min(max(1.0, float(np.sqrt(area))), _MOST_PLACES))
    return [(place + 0.5) / count - 0.5 for place in range(count)]


def _sampled(image: Tensor, inverse: NDArray[Any], rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The image at places of the other one, and 1 where it reaches them, else 0."""
    height, width = image.shape[2:]
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    u, v, w = (float(row[0]) * x + float(row[1]) * y + float(row[2]) for row in inverse)
    u, v = u / w, v / w
    inside = (u >= -0.5) & (u <= width - 0.5) & (v >= -0.5) & (v <= height - 0.5)  # whole pixels
    grid = torch.stack((2 * u / max(width - 1, 1) - 1, 2 * v / max(height - 1, 1) - 1), dim=-1)
    grid = grid.nan_to_num(2.0).clamp(-2, 2).to(image.dtype).expand(len(image), -1, -1, -1)
    seen = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return seen, inside.to(image)
