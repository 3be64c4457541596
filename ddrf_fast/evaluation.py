"""`ddrf-fast eval`: measures anybody's fused or restored images, from files or folders."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from ddrf_fast import _tables, metrics
from ddrf_fast.data import ThermalRange, pair_folders, read_image
from ddrf_fast.inference import resolve_device

_WHOLE_RANGE = ThermalRange()


@dataclass
class MethodScores:
    """What was measured of one method.

    Attributes:
        name: of the method: that of its folder or file.
        images: name of the image -> name of the measure -> value.
        failures: name of the image, and why it could not be measured.
        unpaired: a line for each image without a partner.
    """

    name: str
    images: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Of each measure over the images."""
        return _tables.means(self.images.values())


def measure(
    methods: Sequence[Path],
    references: Sequence[Path],
    names: Sequence[str] = (),
    convention: metrics.Convention = "standard",
    device: str | torch.device = "auto",
    thermal_range: str | tuple[float, float] | ThermalRange = "full",
) -> list[MethodScores]:
    """Measures the images of some methods against the same references.

    Args:
        methods: for each a file or a folder of fused (or restored) images.
        references: visible and infrared images, or the clean images alone: files or folders, as the methods.
            In folders, what has the same name but for the extension belongs together.
        names: of measures; none: those that are usual for fusion or for restoration.
        convention: of the measures.
        device: as for :func:`ddrf_fast.fuse`.
        thermal_range: likewise, of the infrared images; give what they were fused with.

    Returns:
        The scores of each method, in the order given. In folders a failure leaves its image out; it is noted.

    Raises:
        ValueError: a path does not exist, files and folders are mixed, folders have no image in common, a
            measure, the convention or the device is unknown, or the thermal range is none or there are no
            infrared images; for files whatever is wrong with one.
    """
    names = names or (metrics.FUSION_METRICS if len(references) == 2 else metrics.RESTORATION_METRICS)
    metrics.check_metrics(names, len(references))
    thermal = ThermalRange.parse(thermal_range)
    if len(references) != 2 and thermal.kind != "full":
        raise ValueError(
            "thermal_range is that of infrared images, but the references are clean images alone"
        )
    paths = [*methods, *references]
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    if len({path.is_dir() for path in paths}) == 2:
        kinds = ", ".join(f"{path} is a {'folder' if path.is_dir() else 'file'}" for path in paths)
        raise ValueError(f"give files only or folders only: {kinds}")
    device = resolve_device(device)
    labels = _labels(methods)
    if methods[0].is_file():
        return [
            MethodScores(label, {path.stem: _scores([path, *references], names, convention, device, thermal)})
            for label, path in zip(labels, methods, strict=True)
        ]
    pairings = [_together([folder, *references]) for folder in methods]
    for folder, (found, _) in zip(methods, pairings, strict=True):
        if not found:
            raise ValueError(f"no image in {folder} has its partners in {' and '.join(map(str, references))}")
    results = []
    for label, (found, alone) in zip(labels, pairings, strict=True):
        result = MethodScores(label, unpaired=alone)
        for name, files in tqdm(found.items(), desc=label, unit="image", file=sys.stderr, disable=None):
            try:
                result.images[name] = _scores(files, names, convention, device, thermal)
            except Exception as error:  # whatever is wrong with one image must not cost the others
                result.failures.append((name, error))
        results.append(result)
    return results


def summary(results: Sequence[MethodScores]) -> str:
    """A table of the means in Markdown; of several methods with their mean ranks, the best first.

    They are ranked by the images that all of them have.
    """
    table = {result.name: result.means() for result in results if result.images}
    if not table:
        return "nothing could be measured"
    columns = list(next(iter(table.values())))
    counts = {result.name: len(result.images) for result in results}
    header = ["method", "images", *map(_titled, columns)]
    rows = {name: [name, counts[name], *scores.values()] for name, scores in table.items()}
    if len(table) == 1:
        return _tables.markdown(header, rows.values())
    measured = [result for result in results if result.images]
    shared = set.intersection(*(set(result.images) for result in measured))
    if not shared:
        return _tables.markdown(header, rows.values()) + "\n\nNot ranked: no image was measured of all."
    alike = {
        result.name: _tables.means([result.images[name] for name in sorted(shared)]) for result in measured
    }
    ranks = _tables.mean_ranks(
        alike, [name for name in columns if not metrics.MEASURES[name].higher_is_better]
    )
    ranked = sorted(ranks, key=ranks.__getitem__)
    text = _tables.markdown([*header, "mean rank"], [[*rows[name], f"{ranks[name]:.2f}"] for name in ranked])
    if max(counts.values()) > len(shared):
        text += f"\n\nRanked by the {len(shared)} images that were measured of all."
    return text


def per_image(results: Sequence[MethodScores]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of a table with a row for each image of each method; what is not measured is empty."""
    columns = list(
        dict.fromkeys(c for result in results for scores in result.images.values() for c in scores)
    )
    rows: list[list[object]] = [
        [result.name, image, *(scores.get(column, "") for column in columns)]
        for result in results
        for image, scores in result.images.items()
    ]
    return ["method", "image", *columns], rows


def read_plane(
    path: str | os.PathLike[str], channels: bool = False, values: ThermalRange = _WHOLE_RANGE
) -> torch.Tensor:
    """An image file as the measures take it.

    Args:
        path: of the file.
        channels: keep colour; otherwise it is reduced to its luminance, rounded as in a grey file.
        values: those that are black and white.

    Returns:
        Tensor[1, C, H, W], C = 1 or 3: uint8, or float64 in [0, 1] from a file of 16 bit or where not all
        values are taken.

    Raises:
        ValueError: the file cannot be read.
    """
    image = read_image(path, floating=values.kind != "full")
    if image.ndim == 3 and not channels:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if image.dtype != np.uint8 or values != _WHOLE_RANGE:
        image = values.grey(image)
    planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes))[None]


def _scores(
    files: Sequence[Path],
    names: Sequence[str],
    convention: metrics.Convention,
    device: torch.device,
    thermal_range: ThermalRange,
) -> dict[str, float]:
    images = [read_plane(files[0], channels=convention == "vifb")]
    # VIFB measures a grey image against the luminance of its sources.
    ranges = (_WHOLE_RANGE, thermal_range)  # of the visible (or clean) image, and the infrared one
    images += [
        read_plane(path, images[0].shape[1] == 3, values)
        for path, values in zip(files[1:], ranges, strict=False)
    ]
    images = [image.to(device) for image in images]
    for path, image in zip(files[1:], images[1:], strict=True):
        if image.shape[2:] != images[0].shape[2:]:
            sizes = [f"{values.shape[3]}x{values.shape[2]}" for values in (images[0], image)]
            raise ValueError(f"{files[0]} is {sizes[0]}, but {path} is {sizes[1]} (width x height)")
    image, *others = images
    if len(others) == 1:
        scores = metrics.evaluate_restored(image, others[0], names, convention)
    else:
        scores = metrics.evaluate(image, others[0], others[1], names, convention)
    return {name: value.item() for name, value in scores.items()}


def _together(folders: Sequence[Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each name that all folders have, and a line for each file without its partners."""
    files: dict[str, list[Path]] = {}
    alone: dict[Path, str] = {}
    for folder in folders[1:]:
        pairs, unpaired = pair_folders(folders[0], folder)
        for pair in pairs:
            files.setdefault(pair.name, [pair.visible]).append(pair.infrared)
        for path in unpaired:
            missing_in = folder if path.parent == folders[0] else folders[0]
            alone.setdefault(path, f"{path}: no {path.stem}.* in {missing_in}")
    return {name: files[name] for name in sorted(files) if len(files[name]) == len(folders)}, list(
        alone.values()
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """Short names, as long as they differ."""
    names = [path.name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _titled(name: str) -> str:
    return name if metrics.MEASURES[name].higher_is_better else f"{name} ↓"
