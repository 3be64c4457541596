"""The pairs that the tables are made on: clean ones, and the same degraded."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddrf_fast.data import IMAGE_SUFFIXES, pair_folders
from ddrf_fast.degradation import Degradation, DynamicDegradation, enlarge
from ddrf_fast.evaluation import read_plane


class SourcePair(NamedTuple):
    """A pair as the methods see it, and as it was before it was degraded: uint8 Tensor[1, 1, H, W] each.

    `scale` is that of the down-sampling from which both images came back.
    """

    name: str
    visible: Tensor
    infrared: Tensor
    clean_visible: Tensor
    clean_infrared: Tensor
    scale: int = 1


def clean_pairs(data: Path, name: str, limit: int | None = None) -> list[SourcePair]:
    """The pairs of a set's ``test`` folder, as luminance of 8 bit.

    Raises:
        ValueError: nothing is paired there, the sizes of a pair differ, or a file cannot be read.
    """
    folder = data / name / "test"
    paths, _ = pair_folders(folder / "vis", folder / "ir")
    if not paths:
        raise ValueError(f"{folder}: no image in vis/ has the name of one in ir/")
    pairs = []
    for path in paths[:limit]:
        visible, infrared = _eight_bit(path.visible), _eight_bit(path.infrared)
        if visible.shape != infrared.shape:
            raise ValueError(f"{path.visible} and {path.infrared} differ in size")
        pairs.append(SourcePair(path.name, visible, infrared, visible, infrared))
    return pairs


def degraded_pairs(data: Path, name: str, limit: int | None = None) -> tuple[list[SourcePair], str]:
    """The pairs of a set, degraded: from the folder ``SET_degraded`` where there is one, else by the package.

    Returns:
        The pairs, and a few words on how they were degraded.

    Raises:
        ValueError: as :func:`clean_pairs`, or a pair has no degraded one, or one of another size.
    """
    clean = clean_pairs(data, name, limit)
    if (data / f"{name}_degraded" / "test").is_dir():
        given = {pair.name: pair for pair in clean_pairs(data, f"{name}_degraded")}
        missing = [pair.name for pair in clean if pair.name not in given]
        if missing:
            raise ValueError(f"{data / f'{name}_degraded'} lacks {', '.join(missing)}")
        others = [pair.name for pair in clean if given[pair.name].visible.shape != pair.visible.shape]
        if others:
            raise ValueError(f"{data / f'{name}_degraded'} has other sizes than {name}: {', '.join(others)}")
        pairs = [
            pair._replace(visible=given[pair.name].visible, infrared=given[pair.name].infrared)
            for pair in clean
        ]
        return pairs, f"as in `{name}_degraded`"
    degradations = [DynamicDegradation("paper", spatial=True, scale=scale) for scale in (1, 2)]
    pairs = []
    for index, pair in enumerate(clean):
        scale = 1 + index % 2
        visible, infrared = (
            degrade(degradations[scale - 1], image, 2 * index + offset).enlarged(image)
            for offset, image in enumerate((pair.visible, pair.infrared))
        )
        pairs.append(pair._replace(visible=visible, infrared=infrared, scale=scale))
    return pairs, "by `DynamicDegradation('paper', spatial=True)`, every second one down-sampled by two"


class Degraded(NamedTuple):
    """A degraded image, uint8 Tensor[1, 1, H', W'], and how it became that."""

    image: Tensor
    recipe: Degradation

    def enlarged(self, like: Tensor) -> Tensor:
        """The image, brought back to the size of another if it was down-sampled, uint8."""
        return to_bytes(enlarge(self.image.float() / 255, like.shape[2:], self.recipe.scale))


def degrade(degradation: DynamicDegradation, image: Tensor, index: int) -> Degraded:
    """Degrades image number `index` of a set; always alike, and rounded as in a file."""
    batch = degradation(image.float() / 255, seed=0, sample_ids=torch.tensor([index]))
    return Degraded(to_bytes(batch.image), batch.recipe)


def to_bytes(image: Tensor) -> Tensor:
    """uint8 of an image in [0, 1], as in a file of 8 bit, on the CPU."""
    return (image.clamp(0, 1) * 255).round().to(device="cpu", dtype=torch.uint8)


def given_methods(data: Path, name: str) -> list[Path]:
    """The folders of other methods' results on a set, ``baselines/SET/METHOD``."""
    folder = data / "baselines" / name
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def given_results(folder: Path, pairs: Sequence[SourcePair]) -> dict[str, Tensor]:
    """A method's results on some pairs by their names.

    Raises:
        ValueError: one is missing, or has another size.
    """
    files = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    results = {}
    for pair in pairs:
        if pair.name not in files:
            raise ValueError(f"{folder} has no result for {pair.name}")
        results[pair.name] = _eight_bit(files[pair.name])
        if results[pair.name].shape != pair.visible.shape:
            raise ValueError(f"{files[pair.name]} is not of the size of its sources")
    return results


def _eight_bit(path: str | os.PathLike[str]) -> Tensor:
    plane = read_plane(path)
    return to_bytes(plane) if plane.is_floating_point() else plane
