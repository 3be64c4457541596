"""Checks a data set before it is trained on: what cannot be read, has no partner, or differs in size."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from ddrf_fast.data.image_io import read_image
from ddrf_fast.data.layouts import PairPaths, find_pairs
from ddrf_fast.data.thermal import few_values


class CheckReport(NamedTuple):
    """What :func:`check_pairs` found; the lists hold one line for each image or pair.

    Attributes:
        layout: of the data set.
        pairs: how many there are.
        unreadable: images that cannot be read, and why.
        sizes: pairs whose images differ in size.
        unpaired: images without a partner.
        narrow: infrared images of floats, or of 16 bit that use little of their values, which need a thermal
            range; these are no problem.
    """

    layout: str
    pairs: int
    unreadable: list[str]
    sizes: list[str]
    unpaired: list[str]
    narrow: list[str]

    @property
    def problems(self) -> list[str]:
        """All lines that tell of one."""
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

    Example:
        >>> import cv2, numpy as np
        >>> root = getfixture("tmp_path")
        >>> for path, width in (("vis/1.png", 8), ("ir/1.png", 8), ("vis/2.png", 8), ("ir/2.png", 9)):
        ...     (root / path).parent.mkdir(exist_ok=True)
        ...     _ = cv2.imwrite(str(root / path), np.zeros((6, width), np.uint8))
        >>> report = check_pairs(root)
        >>> report.pairs, [problem.replace(str(root), "...") for problem in report.problems]
        (2, ['.../vis/2.png is 8x6, .../ir/2.png is 9x6'])
    """
    found = find_pairs(root, layout, split)
    unreadable: list[str] = []
    sizes: list[str] = []
    narrow: list[str] = []
    # OpenCV decodes without the GIL.
    with ThreadPoolExecutor() as pool:
        checks = pool.map(_check, found.pairs)
        bar = tqdm(checks, "check", len(found.pairs), unit="pair", disable=None if progress_bar else True)
        for broken, size, raw in bar:
            unreadable += broken
            sizes += size
            narrow += raw
    unpaired = [f"{path}: no partner" for path in found.unpaired]
    return CheckReport(found.layout, len(found.pairs), unreadable, sizes, unpaired, narrow)


def _check(pair: PairPaths) -> tuple[list[str], list[str], list[str]]:
    """What is unreadable, of another size, and narrow."""
    broken, images = [], []
    for path in (pair.visible, pair.infrared):
        try:
            images.append(read_image(path, floating=path == pair.infrared))
        except ValueError as error:
            broken.append(str(error))
    if broken:
        return broken, [], []
    thermal = images[1]
    values = (thermal.min(), thermal.max()) if thermal.dtype.kind == "f" else few_values(thermal)
    narrow = [] if values is None else [f"{pair.infrared} has values from {values[0]:g} to {values[1]:g}"]
    visible, infrared = (f"{image.shape[1]}x{image.shape[0]}" for image in images)
    if visible == infrared:
        return [], [], narrow
    return [], [f"{pair.visible} is {visible}, {pair.infrared} is {infrared}"], narrow
