"""Finds the images of files, folders and patterns, pairs them, and says where results go."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ddrf_fast.data import IMAGE_SUFFIXES

_WILDCARDS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^]]+\]")


@dataclass(frozen=True)
class Job:
    """The images of one name, and the file that their result is written to.

    Attributes:
        name: what their results are called, without the extension; with the folders inside the source.
        inputs: one file of each source.
        output: where the result goes.
    """

    name: str
    inputs: tuple[Path, ...]
    output: Path


@dataclass
class Plan:
    """What there is to do: the jobs, a line for each image that has no partner, and all images found."""

    jobs: list[Job] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)


class _Image(NamedTuple):
    name: str  # path inside its source, without the extension
    path: Path


def plan(
    sources: Sequence[str],
    output: str,
    *,
    suffix: str = "",
    extension: str | None = None,
    recursive: bool = False,
    results: str | None = None,
    skip_existing: bool = False,
) -> Plan:
    """Pairs files, or the images of folders and patterns.

    In folders, images belong together that have one path but for the extension. In patterns, those do for
    which the wildcards stand for the same: ``"*_vis.png"`` and ``"*_ir.png"``.

    Args:
        sources: of each kind of image a file, a folder, or a pattern with ``*``, ``?``, ``[...]`` or ``**``.
        output: a folder, or for files also a file; what has no extension, or ends in a slash, is a folder.
            The results of folders and patterns have the names of the first source's images.
        suffix: added to the stem of a result in a folder.
        extension: of a result in a folder, or "auto": that of the first source's image; None: png.
        recursive: search the folders inside of folders, but for hidden ones and that of the results; results
            keep their structure.
        results: the folder of all results, where the output is one in it.
        skip_existing: whether results that are there will be left: then those in the folder of a source are
            told by the suffix, and are no inputs. Otherwise they might as well be images of somebody.

    Returns:
        The plan, jobs in the order of their names.

    Raises:
        ValueError: an input that does not exist, a file with a folder, folders without a single pair, two
            images of one name, an output of unknown format, or one that would replace an input; a suffix or
            an extension for an output that is a file.
    """
    into = Path(output)
    files = [os.path.isfile(source) for source in sources]
    for source in sources:
        if not os.path.exists(source) and not glob.has_magic(source):
            raise ValueError(f"{source} does not exist")
    if len(set(files)) > 1:
        kinds = ", ".join(f"{'file' if one else 'folder'} {s}" for s, one in zip(sources, files, strict=True))
        raise ValueError(f"give two files or two folders (or patterns), got {kinds}")

    def in_folder(image: _Image) -> Path:
        ending = image.path.suffix if extension == "auto" else f".{(extension or 'png').lstrip('.')}"
        return into / f"{image.name}{suffix}{ending}"

    if all(files):
        images = [_Image(Path(source).stem, Path(source)) for source in sources]
        target = in_folder(images[0]) if is_folder(output, suffix, extension) else into
        result = Plan([Job(images[0].name, tuple(image.path for image in images), target)])
        found = [{image.name: image} for image in images]
    else:
        if into.exists() and not into.is_dir():
            raise ValueError(f"the output must be a folder, but {output} is a file")
        found = [_search(source, recursive, Path(results or output)) for source in sources]
        if skip_existing and suffix:
            found = [
                _without_results(images, suffix)
                if os.path.realpath(source) == os.path.realpath(into)
                else images
                for images, source in zip(found, sources, strict=True)
            ]
        result = _paired(found, sources, in_folder)
    result.images = [image.path for of_source in found for image in of_source.values()]
    check_outputs(result)
    return result


def is_folder(output: str, suffix: str, extension: str | None) -> bool:
    """Whether the output is a folder, in which results are named by a suffix and an extension, or a file.

    Raises:
        ValueError: it is a file, and there is a suffix or an extension.
    """
    if output.endswith(os.sep) or os.path.isdir(output) or not Path(output).suffix:
        return True
    if suffix or extension:
        name = "a suffix" if suffix else "an extension"
        raise ValueError(f"{name} names results in a folder, but {output} is the name of a file")
    return False


def _paired(
    found: Sequence[dict[str, _Image]], sources: Sequence[str], in_folder: Callable[[_Image], Path]
) -> Plan:
    """The jobs of what all sources have, and what some lack."""
    keys = sorted(set.intersection(*map(set, found)))
    if not keys:
        where = " and ".join(sources)
        raise ValueError(
            f"no image in {where} has the name (but for the extension) of one in the other"
            if len(sources) > 1
            else f"no image in {where}"
        )
    result = Plan()
    for key in keys:
        images = [of_source[key] for of_source in found]
        result.jobs.append(Job(images[0].name, tuple(image.path for image in images), in_folder(images[0])))
    for of_source in found:
        for key in sorted(of_source.keys() - set(keys)):
            missing = next(s for s, other in zip(sources, found, strict=True) if key not in other)
            result.unpaired.append(f"{of_source[key].path}: no {key}.* in {missing}")
    return result


def _search(source: str, recursive: bool, output: Path) -> dict[str, _Image]:
    """The images of a folder or a pattern, by what they are paired by.

    Raises:
        ValueError: two of them have the same.
    """
    found: dict[str, _Image] = {}
    is_folder = os.path.isdir(source)
    for path in _walk(Path(source), recursive, output) if is_folder else _expand(source):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        root = Path(source) if is_folder else _root(source)
        image = _Image(path.relative_to(root).with_suffix("").as_posix(), path)
        key = image.name if is_folder else _matched(source, path) or image.name
        if key in found:
            raise ValueError(f"{found[key].path} and {path} have one name, which is which?")
        found[key] = image
    return found


def _without_results(found: dict[str, _Image], suffix: str) -> dict[str, _Image]:
    """Without images that are called as another one with the suffix."""
    names = {image.name for image in found.values()}
    return {
        key: image
        for key, image in found.items()
        if not (image.name.endswith(suffix) and image.name.removesuffix(suffix) in names)
    }


def _walk(folder: Path, recursive: bool, output: Path) -> Iterator[Path]:
    own = os.path.realpath(output)
    for place, folders, names in os.walk(folder, followlinks=True):
        # Not the results' folder, and no link that leads back to where it is.
        here = os.path.realpath(place)
        kept = {name: os.path.realpath(Path(place, name)) for name in sorted(folders) if name[0] != "."}
        folders[:] = [
            name
            for name, path in kept.items()
            if recursive and path != own and os.path.commonpath((path, here)) != path
        ]
        yield from (Path(place, name) for name in sorted(names))


def _expand(pattern: str) -> Iterator[Path]:
    return (Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path))


def _root(pattern: str) -> Path:
    """The folder before the first wildcard."""
    parts = Path(pattern).parts
    return Path(*parts[: next(place for place, part in enumerate(parts) if glob.has_magic(part))])


def _matched(pattern: str, path: Path) -> str | None:
    """What the wildcards of a pattern stand for in a path, the extension left out."""
    whole = path.as_posix()
    for of_pattern, of_path in ((os.path.splitext(pattern)[0], os.path.splitext(whole)[0]), (pattern, whole)):
        expression, end = "", 0
        normal = Path(of_pattern).as_posix()
        for wildcard in _WILDCARDS.finditer(normal):
            text = wildcard.group()
            group = {"**/": "((?:.*/)?)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}.get(text)
            expression += re.escape(normal[end : wildcard.start()])
            expression += group or f"({_set(text)})"
            end = wildcard.end()
        match = re.fullmatch(expression + re.escape(normal[end:]), of_path)
        if match:
            return "/".join(match.groups())
    return None


def _set(wildcard: str) -> str:
    """[...] or [!...] of a pattern as a regular expression, in which [ means nothing else either."""
    inside = wildcard[1:-1].replace("\\", r"\\").replace("[", r"\[")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"


def check_outputs(plan: Plan) -> None:
    """Refuses results that would replace an input, with a partner or without, or each other, or have no known
    format.

    Raises:
        ValueError: one would.
    """
    inputs = {os.path.realpath(path) for path in plan.images}
    outputs: dict[str, Job] = {}
    for job in plan.jobs:
        if job.output.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(
                f"{job.output} has no known image format; use one of {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        output = os.path.realpath(job.output)
        if output in inputs:
            raise ValueError(
                f"{job.output} is an input and would be replaced; choose another folder for the output"
            )
        if output in outputs:
            raise ValueError(f"{job.inputs[0]} and {outputs[output].inputs[0]} would both be {job.output}")
        outputs[output] = job
