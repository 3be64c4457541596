"""Registered infrared and visible images: pairing of folders by name, and pairs in memory."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddrf_fast.data.image_io import IMAGE_SUFFIXES, from_float, read_image
from ddrf_fast.data.layouts import PairPaths, find_pairs
from ddrf_fast.data.thermal import ThermalRange


class ImagePair(NamedTuple):
    """A pair in memory: uint8 Tensor[H, W] each, of one size; the visible image is its luminance."""

    name: str
    visible: Tensor
    infrared: Tensor


def pair_folders(
    visible: str | os.PathLike[str], infrared: str | os.PathLike[str]
) -> tuple[list[PairPaths], list[Path]]:
    """Pairs the images of two folders by stem: `vis/01.jpg` with `ir/01.png`.

    What is no image by its ending (:data:`IMAGE_SUFFIXES`) and hidden files are left out; folders inside are
    not searched.

    Args:
        visible: the folder of the visible images.
        infrared: that of the infrared ones.

    Returns:
        The pairs, ordered by name, and the images that have no partner.

    Raises:
        ValueError: a folder is missing, or holds two images of one stem.
    """
    ours, theirs = _images_by_stem(Path(visible)), _images_by_stem(Path(infrared))
    pairs = [PairPaths(stem, ours[stem], theirs[stem]) for stem in sorted(ours.keys() & theirs.keys())]
    unpaired = [ours[stem] for stem in sorted(ours.keys() - theirs.keys())]
    unpaired += [theirs[stem] for stem in sorted(theirs.keys() - ours.keys())]
    return pairs, unpaired


class PairedFolder(Dataset[ImagePair]):
    """The pairs of a data set, each read when it is asked for.

    Colour is reduced to its luminance, 16 bit to 8. A warning tells of images without a partner.

    Args:
        root: the folder of the data set.
        layout: as for :func:`~ddrf_fast.data.find_pairs`.
        split: likewise.
        thermal_range: which values of an infrared image become black and white, as for
            :func:`ddrf_fast.fuse`: "full", "minmax", "percentile", "LOW%,HIGH%", "LOW,HIGH" or two numbers.
            Raw ones of 16 bit use little of the full range.

    Attributes:
        paths: the files, in the order of the pairs.

    Raises:
        ValueError: as :func:`~ddrf_fast.data.find_pairs`, or that is no thermal range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        layout: str = "auto",
        split: str | os.PathLike[str] | None = None,
        thermal_range: str | tuple[float, float] | ThermalRange = "full",
    ) -> None:
        self.thermal_range = ThermalRange.parse(thermal_range)
        found = find_pairs(root, layout, split)
        if found.unpaired:
            names = ", ".join(os.path.relpath(path, root) for path in found.unpaired[:5])
            more = f" and {len(found.unpaired) - 5} more" if len(found.unpaired) > 5 else ""
            warnings.warn(f"{root}: images without a partner are left out: {names}{more}", stacklevel=2)
        self.paths = found.pairs

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImagePair:
        """Reads the pair at a place in the order of names.

        Raises:
            ValueError: an image cannot be read, or the sizes differ.
        """
        pair = self.paths[index]
        return ImagePair(pair.name, *_read_pair(pair, self.thermal_range))

    def __iter__(self) -> Iterator[ImagePair]:
        return (self[index] for index in range(len(self)))


def _images_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            raise ValueError(
                f"{folder}: {found[path.stem].name} and {path.name} have one name, which is which?"
            )
        found[path.stem] = path
    return found


def _read_pair(pair: PairPaths, thermal_range: ThermalRange) -> tuple[Tensor, Tensor]:
    visible = torch.from_numpy(_grey(read_image(pair.visible), ThermalRange()))
    infrared = torch.from_numpy(
        _grey(read_image(pair.infrared, floating=thermal_range.kind != "full"), thermal_range)
    )
    if visible.shape != infrared.shape:
        raise ValueError(
            f"{pair.visible} is {list(visible.shape)}, but {pair.infrared} is {list(infrared.shape)}: "
            f"the images of a pair must have one size"
        )
    return visible, infrared


def _grey(image: np.ndarray, values: ThermalRange) -> np.ndarray:
    """uint8 [H, W]; cv2's grey is the Y of BT.601."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if image.dtype == np.uint8 and values.kind == "full":
        return image
    return from_float(values.grey(image))
