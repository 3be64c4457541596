"""The images of a training: pairs, each with its positive sample, cropped at random.

What a step sees depends on the seed and the step's number alone: sample n, its pair and its crop included, is
the same in every run, in any process, and whether or not the training was interrupted before it.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from ddrf_fast.data import PairedFolder
from ddrf_fast.losses import positive_sample
from ddrf_fast.models.classical import CLASSICAL_FUSIONS, Fusion
from ddrf_fast.training.config import PairSource

_ORDER, _CROP = 0, 1  # streams of random numbers


class Crops(NamedTuple):
    """Registered images in [0, 1], and what the random numbers of their degradation depend on.

    Attributes:
        sample_ids: the number of the sample; in a batch int64 Tensor[B].
        visible: float Tensor[1, H, W], luma of the visible image; in a batch Tensor[B, 1, H, W].
        infrared: likewise the infrared image.
        positive: likewise their positive sample (eq. 9).
    """

    sample_ids: Tensor
    visible: Tensor
    infrared: Tensor
    positive: Tensor


class Pair(NamedTuple):
    """A pair in memory.

    Attributes:
        name: data set and name, for the record.
        images: uint8 Tensor[2, 1, H, W]: luma of the visible image, and the infrared image.
        fusion: the classical fusion that is best for it (eq. 9).
    """

    name: str
    images: Tensor
    fusion: Fusion


class Pairs:
    """The pairs of some data sets, read when they are asked for.

    Args:
        files: data sets, each with a name and the place of a pair in it.
        crop: side of the crops that will be taken.
        cache: keep what was read.
        fusions: the classical fusions that compete for the positive sample, by name.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, PairedFolder, int]],
        crop: int,
        cache: bool = True,
        fusions: Sequence[str] = tuple(CLASSICAL_FUSIONS),
    ) -> None:
        self.names = [f"{name}/{folder.paths[index].name}" for name, folder, index in files]
        self.files = files
        self.crop = crop
        self.fusions = {name: CLASSICAL_FUSIONS[name] for name in fusions}
        self.cache: dict[int, Pair] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        """Reads a pair and finds the fusion that is best for it.

        Raises:
            ValueError: it cannot be read, its sizes differ, or it is smaller than the crop.
        """
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        _, folder, place = self.files[index]
        _, visible, infrared = folder[place]
        if min(visible.shape) < self.crop:
            raise ValueError(
                f"{self.names[index]} is {list(visible.shape)}, smaller than the crop of {self.crop}"
            )
        images = torch.stack((visible, infrared))[:, None]
        pair = Pair(self.names[index], images, self._best_fusion(images))
        if self.cache is not None:
            self.cache[index] = pair
        return pair

    def _best_fusion(self, images: Tensor) -> Fusion:
        methods = list(self.fusions.values())
        if len(methods) == 1:
            return methods[0]
        visible, infrared = images[:, None] / 255
        return methods[int(positive_sample(visible, infrared, self.fusions)[1])]


class RandomCrops(Dataset[Crops]):
    """Random square crops, flipped and transposed at random; item n is the same in every run.

    The items run on for ever. Of every ``len(pairs)`` in a row each pair gives one.

    Args:
        pairs: of :func:`load_pairs`.
        crop: side of a crop in pixels.
        seed: of the random numbers.
    """

    def __init__(self, pairs: Pairs, crop: int, seed: int) -> None:
        self.pairs = pairs
        self.crop = crop
        self.seed = seed

    def __getitem__(self, sample_id: int) -> Crops:
        """Crop of the visible, infrared and positive image, each float Tensor[1, crop, crop] in [0, 1]."""
        turn, place = divmod(sample_id, len(self.pairs))
        _, images, fusion = self.pairs[int(_order(self.seed, turn, len(self.pairs))[place])]
        random = np.random.default_rng((self.seed, _CROP, sample_id))
        top, left = (int(random.integers(size - self.crop + 1)) for size in images.shape[2:])
        images = images[:, :, top : top + self.crop, left : left + self.crop]
        flip_columns, flip_rows, transpose = random.integers(2, size=3)
        if flip_columns:
            images = images.flip(3)
        if flip_rows:
            images = images.flip(2)
        if transpose:
            images = images.transpose(2, 3)
        return _with_positive(sample_id, images, fusion)


class ValidationCrops(Dataset[Crops]):
    """The middle of each pair, at most 256x256 pixels and a multiple of `multiple`."""

    def __init__(self, pairs: Pairs, multiple: int = 1) -> None:
        self.pairs = pairs
        self.multiple = multiple

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Crops:
        _, images, fusion = self.pairs[index]
        for dim in (2, 3):
            size = min(images.shape[dim], 256) // self.multiple * self.multiple
            images = images.narrow(dim, (images.shape[dim] - size) // 2, size)
        return _with_positive(index, images, fusion)


class StepBatches(Sampler[list[int]]):
    """The samples of each step of an epoch; step t has ``range(t * batch_size, (t + 1) * batch_size)``.

    An iteration starts with the step at hand, so it goes on where an interrupted epoch stopped.

    Args:
        step: gives the number of steps done.
        steps: in an epoch.
        batch_size: of all processes together.
        rank: number of this process, which takes every ``world_size``-th sample.
        world_size: number of processes.
    """

    def __init__(
        self, step: Callable[[], int], steps: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.step = step
        self.steps = steps
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        first = self.step()
        for step in range(first, (first // self.steps + 1) * self.steps):
            samples = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield list(samples[self.rank :: self.world_size])


def load_pairs(
    sources: Sequence[PairSource],
    crop: int,
    validation_pairs: int,
    cache: bool = True,
    progress_bar: bool = False,
    fusions: Sequence[str] = tuple(CLASSICAL_FUSIONS),
) -> tuple[Pairs, Pairs]:
    """Finds the pairs of some data sets.

    Args:
        sources: the data sets.
        crop: side of the crops that will be taken.
        validation_pairs: how many pairs to keep for validation, at equal distances in the list of all.
        cache: read all of them now, and keep them in memory.
        progress_bar: show one.
        fusions: the classical fusions that compete for the positive sample, by name.

    Returns:
        The pairs for training and those for validation.

    Raises:
        ValueError: no data set is given, none of its pairs is left for training, or, if they are read now,
            one cannot be used.
    """
    if not sources:
        raise ValueError("data must name at least one folder of pairs, got none")
    found = [(source.path, source.folder()) for source in sources]
    files = [(name, folder, place) for name, folder in found for place in range(len(folder))]
    if len(files) <= validation_pairs:
        raise ValueError(
            f"{len(files)} pairs leave none for training beside {validation_pairs} validation_pairs"
        )
    kept = {(2 * i + 1) * len(files) // (2 * validation_pairs) for i in range(validation_pairs)}
    training = Pairs([file for i, file in enumerate(files) if i not in kept], crop, cache, fusions)
    validation = Pairs([files[i] for i in sorted(kept)], crop, cache, fusions)
    if cache:
        _read_all((training, validation), progress_bar)
    return training, validation


def _read_all(parts: Sequence[Pairs], progress_bar: bool) -> None:
    """Fills the caches, by as many threads as there are processors, each of which computes alone."""
    total = sum(len(pairs) for pairs in parts)
    with (
        ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=total, desc="reading", unit="pair", disable=not progress_bar) as bar,
    ):
        try:
            for pairs in parts:
                for _ in pool.map(pairs.__getitem__, range(len(pairs))):
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@functools.lru_cache(maxsize=2)  # a batch can lie in two turns
def _order(seed: int, turn: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, turn)).permutation(length)


def _with_positive(sample_id: int, images: Tensor, fusion: Fusion) -> Crops:
    """Crops of uint8 Tensor[2, 1, H, W].

    The positive sample is made of the crop, not cut from that of the whole pair: the network can learn how a
    method makes use of what is in front of it, but not of what was cut off.
    """
    visible, infrared = images.float() / 255
    positive = fusion(visible[None], infrared[None])[0].clamp(0, 1)
    return Crops(torch.tensor(sample_id), visible, infrared, positive)
