"""Checks a data set before it is trained on: what cannot be read, has no partner, or differs in size."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from ddrf_fast.data.image_io import read_image
from ddrf_fast.data.layouts import PairPaths, find_pairs


class CheckReport(NamedTuple):
    """What :func:`check_pairs` found; the last three hold one line for each problem.

    Attributes:
        layout: of the data set.
        pairs: how many there are.
        unreadable: images that cannot be read, and why.
        sizes: pairs whose images differ in size.
        unpaired: images without a partner.
    """

    layout: str
    pairs: int
    unreadable: list[str]
    sizes: list[str]
    unpaired: list[str]

    @property
    def problems(self) -> list[str]:
        """All lines."""
        return [*self.unreadable, *self.sizes, *self.unpaired]


def check_pairs(
    root: str | os.PathLike[str],
    layout: str = "auto",
    split: str | os.PathLike[str] | None = None,
    progress_bar: bool = False,
) -> CheckReport:
    """Reads every pair of a data set.

    Args:
        root: its folder.
        layout: as for :func:`~ddrf_fast.data.find_pairs`.
        split: likewise.
        progress_bar: show one where there is a terminal.

    Returns:
        The problems found.

    Raises:
        ValueError: as :func:`~ddrf_fast.data.find_pairs`.
    """
    found = find_pairs(root, layout, split)
    unreadable: list[str] = []
    sizes: list[str] = []
    # OpenCV decodes without the GIL.
    with ThreadPoolExecutor() as pool:
        checks = pool.map(_check, found.pairs)
        bar = tqdm(checks, "check", len(found.pairs), unit="pair", disable=None if progress_bar else True)
        for broken, size in bar:
            unreadable += broken
            sizes += size
    unpaired = [f"{path}: no partner" for path in found.unpaired]
    return CheckReport(found.layout, len(found.pairs), unreadable, sizes, unpaired)


def _check(pair: PairPaths) -> tuple[list[str], list[str]]:
    broken, shapes = [], []
    for path in (pair.visible, pair.infrared):
        try:
            shapes.append(read_image(path).shape[:2])
        except ValueError as error:
            broken.append(str(error))
    if broken or shapes[0] == shapes[1]:
        return broken, []
    visible, infrared = (f"{width}x{height}" for height, width in shapes)
    return [], [f"{pair.visible} is {visible}, {pair.infrared} is {infrared}"]
