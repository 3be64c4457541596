"""Registered infrared and visible images: pairing of folders by name, and data sets for training."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ddrf_fast.data.image_io import IMAGE_SUFFIXES, from_float, read_image, to_float


class PairPaths(NamedTuple):
    """The files of a pair; `name` is their common stem."""

    name: str
    visible: Path
    infrared: Path


class ImagePair(NamedTuple):
    """A pair in memory: uint8 Tensor[H, W] each, of one size; the visible image is its luminance."""

    name: str
    visible: Tensor
    infrared: Tensor


class Crop(NamedTuple):
    """A training sample: float32 Tensor[1, h, w] each, in [0, 1]."""

    visible: Tensor
    infrared: Tensor


def pair_folders(
    visible: str | os.PathLike[str], infrared: str | os.PathLike[str]
) -> tuple[list[PairPaths], list[Path]]:
    """Pairs the images of two folders by stem: `vis/01.jpg` with `ir/01.png`.

    What is no image by its ending (:data:`IMAGE_SUFFIXES`) and hidden files are left out; folders inside are
    not searched.

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
    """The pairs of a folder with `vis/` and `ir/`, read once and kept in memory as uint8.

    Colour is reduced to its luminance, 16 bit to 8 by the whole range. A warning tells of images without a
    partner.

    Args:
        root: the folder.

    Raises:
        ValueError: a folder is missing, nothing is paired, an image cannot be read, or the sizes of a pair
            differ.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        root = Path(root)
        pairs, unpaired = pair_folders(root / "vis", root / "ir")
        if not pairs:
            raise ValueError(f"{root}: no image in vis/ has the name of one in ir/")
        if unpaired:
            names = ", ".join(f"{path.parent.name}/{path.name}" for path in unpaired[:5])
            more = f" and {len(unpaired) - 5} more" if len(unpaired) > 5 else ""
            warnings.warn(f"{root}: images without a partner are left out: {names}{more}", stacklevel=2)
        self.pairs = [ImagePair(pair.name, *_read_pair(pair)) for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ImagePair:
        """The pair at a place in the order of names."""
        return self.pairs[index]

    def __iter__(self) -> Iterator[ImagePair]:
        return iter(self.pairs)


class PairedImages(Dataset[Crop]):
    """Random crops of the pairs of some folders, flipped at random; one per pair and epoch.

    A side that is shorter than the crop is continued by reflection.

    Random numbers come from `generator`, by default torch's own; in the worker of a `DataLoader` from the
    worker's, which the loader seeds anew for each epoch from its own `generator`. The same seeds and number
    of workers thus give the same crops.

    Args:
        roots: a folder or several, each as for :class:`PairedFolder`.
        crop_size: side of the square crops in pixels; None gives whole images, which are not flipped.
        generator: see above.

    Raises:
        ValueError: as :class:`PairedFolder`; no folder is given, or the crop size is not positive.
    """

    def __init__(
        self,
        roots: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        crop_size: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        if crop_size is not None and crop_size < 1:
            raise ValueError(f"crop_size must be positive, got {crop_size}")
        folders = [roots] if isinstance(roots, (str, os.PathLike)) else list(roots)
        if not folders:
            raise ValueError("roots must name at least one folder with vis/ and ir/, got none")
        self.pairs = [pair for folder in folders for pair in PairedFolder(folder)]
        self.crop_size = crop_size
        self.generator = generator

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Crop:
        """A crop of the pair at a place, both images at the same position."""
        _, visible, infrared = self.pairs[index]
        images = torch.stack((visible, infrared))
        if self.crop_size is not None:
            # A generator given here would repeat itself in each worker, which has a copy.
            generator = self.generator if get_worker_info() is None else None
            images = _random_crop(images, self.crop_size, generator)
        visible, infrared = (images.float() / 255)[:, None]
        return Crop(visible, infrared)


def _random_crop(images: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """A crop of uint8 Tensor[2, H, W], flipped in neither, one or both directions."""
    height, width = images.shape[1:]
    if height < size or width < size:
        missing = (0, max(size - height, 0)), (0, max(size - width, 0))
        images = torch.from_numpy(np.pad(images.numpy(), ((0, 0), *missing), mode="reflect"))
        height, width = images.shape[1:]
    draws = torch.rand(4, generator=generator).tolist()
    top, left = int(draws[0] * (height - size + 1)), int(draws[1] * (width - size + 1))
    images = images[:, top : top + size, left : left + size]
    return images.flip([dim for dim, draw in zip((1, 2), draws[2:], strict=True) if draw < 0.5])


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


def _read_pair(pair: PairPaths) -> tuple[Tensor, Tensor]:
    visible, infrared = (torch.from_numpy(_grey(read_image(path))) for path in (pair.visible, pair.infrared))
    if visible.shape != infrared.shape:
        raise ValueError(
            f"{pair.visible} is {list(visible.shape)}, but {pair.infrared} is {list(infrared.shape)}: "
            f"the images of a pair must have one size"
        )
    return visible, infrared


def _grey(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W]; cv2's grey is the Y of BT.601."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return image if image.dtype == np.uint8 else from_float(to_float(image))
