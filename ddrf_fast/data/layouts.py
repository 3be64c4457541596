"""Where the data sets that people have on disk keep their visible and infrared images, and how these pair.

A layout is one or more rules. A rule is two patterns, of the visible and of the infrared image, matched
against paths inside the data set's folder without their extension. What the placeholders ``{name}``,
``{split}``, ``{sequence}`` and ``{scene}`` stand for makes the name of a pair: two images whose names agree
are one.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ddrf_fast.data.image_io import IMAGE_SUFFIXES

Rule = tuple[str, str]
File = tuple[str, Path]  # path in the data set without the extension, and the path itself

LAYOUTS: dict[str, tuple[Rule, ...]] = {
    # The 21 usual pairs in one folder, as DenseFuse brought them into use; then the whole archive on
    # figshare. Of its scenes with near infrared alone the visible image has no partner.
    "tno": (
        ("VIS{name}", "IR{name}"),
        ("Athena_images/{scene}/VIS_{name}_r", "Athena_images/{scene}/IR_{name}_g"),
        ("Athena_images/{scene}/VIS_{name}", "Athena_images/{scene}/IR_{name}"),
        ("Athena_images/{scene}/{name}_r", "Athena_images/{scene}/IR_{name}_g"),
        ("Athena_images/{scene}/1_{name}", "Athena_images/{scene}/2_{name}"),
        ("Athena_images/{scene}/vis", "Athena_images/{scene}/ir"),
        ("DHV_images/{scene}/VIS_{name}dhvR", "DHV_images/{scene}/IR_{name}rad"),
        ("DHV_images/{scene}/dhv/DHV{name}", "DHV_images/{scene}/thermal/RAD{name}"),
        ("DHV_images/{scene}/dhv/DHV{name}", "DHV_images/{scene}/rad/RAD{name}"),
        ("FEL_images/{scene}/visual/{name}v", "FEL_images/{scene}/thermal/{name}i"),
        ("Triclobs_images/{scene}/{name}_Vis", "Triclobs_images/{scene}/{name}_IR"),
        ("Triclobs_images/{scene}/Vis{name}", "Triclobs_images/{scene}/IR{name}"),
        ("Triclobs_images/{scene}/VIS", "Triclobs_images/{scene}/LWIR"),
        ("Triclobs_images/{scene}/VIS_R", "Triclobs_images/{scene}/LWIR_B"),
        ("Triclobs_images/{scene}/R_Vis", "Triclobs_images/{scene}/B_LWIR"),
        ("Triclobs_images/{scene}/VIS-{name}", "Triclobs_images/{scene}/LWIR-{name}"),
        ("Triclobs_images/{scene}/a_VIS-{name}", "Triclobs_images/{scene}/c_LWIR-{name}"),
        ("{scene}/Vis", "{scene}/LWIR"),
    ),
    # The infrared and visible images that come with IFCNN.
    "gun": (("{name}_Vis", "{name}_IR"),),
    # crop_HR_visible is larger than the infrared images.
    "roadscene": (("crop_LR_visible/{name}", "cropinfrared/{name}"),),
    "msrs": (("{split}/vi/{name}", "{split}/ir/{name}"),),
    "llvip": (("visible/{split}/{name}", "infrared/{split}/{name}"),),
    "m3fd": (("Vis/{name}", "Ir/{name}"), ("{split}/Vis/{name}", "{split}/Ir/{name}")),
    # Version 1 is not registered, its sizes differ; the second is its registered part. Version 2 does not
    # name its pairs.
    "flir": (
        ("{split}/RGB/{name}", "{split}/thermal_8_bit/{name}"),
        ("JPEGImages/{name}_RGB", "JPEGImages/{name}_PreviewData"),
    ),
    "rgbt234": (("{sequence}/visible/{name}v", "{sequence}/infrared/{name}i"),),
    # VT821 and VT1000; VT5000.
    "vt821": (("RGB/{name}", "T/{name}"), ("{split}/RGB/{name}", "{split}/T/{name}")),
    "folders": (
        ("{visible}/{name}", "{infrared}/{name}"),
        ("{split}/{visible}/{name}", "{split}/{infrared}/{name}"),
        ("{visible}/{split}/{name}", "{infrared}/{split}/{name}"),
    ),
}
"""The known layouts by name; ``folders`` is any folder with the usual words for both kinds of image."""

_NAMING = ("split", "sequence", "scene", "name")  # what a pair is called by, in this order
_PLACEHOLDERS = {
    "name": r"(?P<name>[^/]+)",
    "split": r"(?P<split>[^/]+)",
    "sequence": r"(?P<sequence>[^/]+)",
    "scene": r"(?P<scene>.+)",
    "visible": r"(?i:vis|vi|visible|visual|rgb)",
    "infrared": r"(?i:ir|inf|infrared|thermal|lwir)",
}


class PairPaths(NamedTuple):
    """The files of a pair; `name` is what they have in common, unique in its data set."""

    name: str
    visible: Path
    infrared: Path


class Pairing(NamedTuple):
    """What was found in a folder.

    Attributes:
        layout: its name, or the patterns that were given.
        pairs: ordered by name.
        unpaired: images that fit the layout and have no partner.
    """

    layout: str
    pairs: list[PairPaths]
    unpaired: list[Path]


def find_pairs(
    root: str | os.PathLike[str], layout: str = "auto", split: str | os.PathLike[str] | None = None
) -> Pairing:
    """Finds the infrared and visible pairs of a data set.

    Args:
        root: its folder.
        layout: a name in :data:`LAYOUTS`, your own as two patterns ``"visible/{name}|infrared/{name}"``, or
            "auto": the known one with the most pairs.
        split: a part of the pairs: a text file with one name a line (the last part of a pair's name or all of
            it, with or without an extension), or what stands for ``{split}``, such as "train".

    Returns:
        The pairs and what has no partner.

    Raises:
        ValueError: the folder is missing, the layout is unknown or gives no pair, two images have one name,
            or the split names what is not there.

    Example:
        >>> import cv2, numpy as np
        >>> root = getfixture("tmp_path")
        >>> for path in ("visible/train/1.png", "infrared/train/1.jpg", "visible/test/2.png"):
        ...     (root / path).parent.mkdir(parents=True)
        ...     _ = cv2.imwrite(str(root / path), np.zeros((8, 8), np.uint8))
        >>> found = find_pairs(root)
        >>> found.layout, [pair.name for pair in found.pairs], [path.name for path in found.unpaired]
        ('llvip', ['train/1'], ['2.png'])
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    files = list(_images(root))
    if layout == "auto":
        found = _recognise(files)
    elif "{name}" in layout:
        patterns = layout.split("|")
        if len(patterns) != 2:
            raise ValueError(f'a layout of your own is "visible/{{name}}|infrared/{{name}}", got {layout!r}')
        found = _match(layout, ((patterns[0], patterns[1]),), files)
    elif layout in LAYOUTS:
        found = _match(layout, LAYOUTS[layout], files)
    else:
        raise ValueError(f"layout must be auto, {', '.join(LAYOUTS)} or two patterns, got {layout!r}")
    if not found.pairs:
        raise ValueError(
            f"{root}: no pair of images by {'any known' if layout == 'auto' else 'this'} layout, got {layout}"
            f'; known are {", ".join(LAYOUTS)}, or give two patterns, "visible/{{name}}|infrared/{{name}}"'
        )
    return found if split is None else _select(root, found, split)


def _images(root: Path) -> Iterator[File]:
    """The images below a folder, in order, hidden ones left out."""
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(Path(folder).relative_to(root).parts) >= 5:  # deeper than any layout; ends cycles of links
            folders.clear()
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield path.relative_to(root).with_suffix("").as_posix(), path


def _recognise(files: list[File]) -> Pairing:
    """By the known layout with the most pairs, of several the first."""
    best, problem = Pairing("auto", [], []), None
    for name, rules in LAYOUTS.items():
        try:
            found = _match(name, rules, files)
        except ValueError as error:
            problem = problem or error
        else:
            best = max(best, found, key=lambda pairing: len(pairing.pairs))
    if problem and not best.pairs:
        raise problem
    return best


def _match(layout: str, rules: tuple[Rule, ...], files: list[File]) -> Pairing:
    pairs: dict[str, PairPaths] = {}
    fitting: set[Path] = set()
    paired: set[Path] = set()
    for rule in rules:
        visible, infrared = (_matches(pattern, files, paired) for pattern in rule)
        fitting.update(visible.values(), infrared.values())
        for name in visible.keys() & infrared.keys():
            if name in pairs:
                raise ValueError(f"{visible[name]} and {pairs[name].visible} are both the pair {name}")
            pairs[name] = PairPaths(name, visible[name], infrared[name])
            paired.update(pairs[name][1:])
    return Pairing(layout, [pairs[name] for name in sorted(pairs)], sorted(fitting - paired))


def _matches(pattern: str, files: list[File], taken: set[Path]) -> dict[str, Path]:
    """The files that fit a pattern by their pair's name."""
    parts = re.split(r"\{(\w+)\}", pattern)
    unknown = [part for part in parts[1::2] if part not in _PLACEHOLDERS]
    if unknown:
        raise ValueError(f"{pattern}: placeholders are {', '.join(_PLACEHOLDERS)}, got {unknown[0]}")
    expression = re.compile(
        "".join(
            re.escape(part)
            if i % 2 == 0
            # What came before is to come again.
            else f"(?P={part})"
            if part in _NAMING and part in parts[1:i:2]
            else _PLACEHOLDERS[part]
            for i, part in enumerate(parts)
        )
    )
    found: dict[str, Path] = {}
    for relative, path in files:
        match = expression.fullmatch(relative)
        if match and path not in taken:
            name = "/".join(match[group] for group in _NAMING if group in match.groupdict())
            if name in found:
                raise ValueError(f"{found[name]} and {path} are both the pair {name}, which is which?")
            found[name] = path
    return found


def _select(root: Path, found: Pairing, split: str | os.PathLike[str]) -> Pairing:
    """The pairs of a split; nothing is said of images outside it."""
    split = os.fspath(split)
    file = next((path for path in (Path(split), root / split) if path.is_file()), None)
    if file is None:
        chosen = [pair for pair in found.pairs if split in pair.name.split("/")[:-1]]
        if not chosen:
            raise ValueError(
                f"{root}: {split} is neither a file of names nor a split of layout {found.layout}"
            )
        unpaired = [path for path in found.unpaired if split in path.relative_to(root).parts[:-1]]
        return Pairing(found.layout, chosen, unpaired)
    by_name: dict[str, list[PairPaths]] = {}
    for pair in found.pairs:
        for name in {pair.name, pair.name.rpartition("/")[2]}:
            by_name.setdefault(name, []).append(pair)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: {error}") from None
    wanted = [line for line in lines if line and not line.startswith("#")]
    if not wanted:
        raise ValueError(f"{file}: expected the name of a pair in each line, got none")
    names = list(dict.fromkeys(n if n in by_name else os.path.splitext(n)[0] for n in wanted))
    missing = [name for name in names if name not in by_name]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{file}: names of no pair in {root}: {shown}")
    for name in names:
        if len(by_name[name]) > 1:
            which = ", ".join(pair.name for pair in by_name[name])
            raise ValueError(f"{file}: {name} is the name of several pairs in {root}: {which}")
    return Pairing(found.layout, list(dict.fromkeys(by_name[name][0] for name in names)), [])
