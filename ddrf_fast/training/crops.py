"""The images of a training: pairs, each with its positive sample, read once and cropped at random."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ddrf_fast.data import PairedFolder
from ddrf_fast.losses import positive_sample

Images = tuple[Tensor, Tensor, Tensor]


class Pair(NamedTuple):
    """A pair in memory.

    Attributes:
        name: folder and name, for the record.
        images: uint8 Tensor[3, 1, H, W]: luma of the visible image, the infrared image, and their positive
            sample (eq. 9).
    """

    name: str
    images: Tensor


class RandomCrops(Dataset[Images]):
    """Random square crops of pairs, flipped and transposed at random; item n is the same in every run.

    Args:
        pairs: the pairs.
        crop: side of a crop in pixels.
        length: number of items.
        seed: of the random numbers.
    """

    def __init__(self, pairs: Sequence[Pair], crop: int, length: int, seed: int) -> None:
        self.pairs = pairs
        self.crop = crop
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Images:
        """Crop of the visible, infrared and positive image, each float Tensor[1, crop, crop] in [0, 1]."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)

        def draw(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        images = self.pairs[draw(len(self.pairs))].images
        top, left = (draw(size - self.crop + 1) for size in images.shape[2:])
        images = images[:, :, top : top + self.crop, left : left + self.crop]
        if draw(2):
            images = images.flip(3)
        if draw(2):
            images = images.flip(2)
        if draw(2):
            images = images.transpose(2, 3)
        return _as_floats(images)


class ValidationCrops(Dataset[Images]):
    """The middle of each pair, at most 256x256 pixels."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Images:
        """Middle of the visible, infrared and positive image, each float Tensor[1, h, w] in [0, 1]."""
        images = self.pairs[index].images
        for dim in (2, 3):
            size = min(images.shape[dim], 256)
            images = images.narrow(dim, (images.shape[dim] - size) // 2, size)
        return _as_floats(images)


def load_pairs(
    folders: Sequence[str], crop: int, validation_pairs: int, progress_bar: bool = False
) -> tuple[list[Pair], list[Pair]]:
    """Reads all pairs of some folders and makes their positive samples.

    Args:
        folders: each with ``ir/`` and ``vis/``.
        crop: side of the crops that will be taken.
        validation_pairs: how many pairs to keep for validation, at equal distances in the list of all.
        progress_bar: show one.

    Returns:
        The pairs for training and those for validation.

    Raises:
        ValueError: no folder is given, a pair is smaller than the crop, or no pair is left for training.
    """
    if not folders:
        raise ValueError("data must name at least one folder with ir/ and vis/, got none")
    found = [(f"{folder}/{pair.name}", pair) for folder in folders for pair in PairedFolder(folder)]
    for name, pair in found:
        if min(pair.visible.shape) < crop:
            raise ValueError(f"{name} is {list(pair.visible.shape)}, smaller than the crop of {crop}")
    if len(found) <= validation_pairs:
        raise ValueError(
            f"{len(found)} pairs leave none for training beside {validation_pairs} validation_pairs"
        )
    pairs = [
        Pair(name, _with_positive(pair.visible, pair.infrared))
        for name, pair in tqdm(found, desc="positive samples", unit="pair", disable=not progress_bar)
    ]
    kept = {(2 * i + 1) * len(pairs) // (2 * validation_pairs) for i in range(validation_pairs)}
    training = [pair for i, pair in enumerate(pairs) if i not in kept]
    return training, [pairs[i] for i in sorted(kept)]


def _with_positive(visible: Tensor, infrared: Tensor) -> Tensor:
    """uint8 Tensor[3, 1, H, W] of two uint8 Tensor[H, W] and their positive sample."""
    sources = torch.stack((visible, infrared))[:, None, None]
    positive, _ = positive_sample(*(sources / 255))
    return torch.cat((*sources, positive.mul(255).round().byte()))


def _as_floats(images: Tensor) -> Images:
    visible, infrared, positive = images.float() / 255
    return visible, infrared, positive
