"""Fuses files and folders: finds the pairs, says where results go, and carries on where a pair fails."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ddrf_fast.data import IMAGE_SUFFIXES, pair_folders, write_image
from ddrf_fast.inference import Fuser


@dataclass(frozen=True)
class Job:
    """One pair of files and the file that its fusion is written to."""

    visible: Path
    infrared: Path
    output: Path


@dataclass
class Plan:
    """What there is to do: the jobs, and a line for each image that has no partner."""

    jobs: list[Job] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What came of a plan: written and skipped outputs, and the reason for each job that failed."""

    written: int = 0
    skipped: int = 0
    failures: list[tuple[Job, Exception]] = field(default_factory=list)


def plan(
    visible: Path, infrared: Path, output: str | os.PathLike[str], suffix: str = "", extension: str = "png"
) -> Plan:
    """Pairs two files, or the images of two folders by stem.

    Args:
        visible: a file or a folder.
        infrared: the same.
        output: a folder, or for two files also a file; what has no extension, or ends in a slash, is a
            folder.
        suffix: what is added to the stem of a result in a folder.
        extension: of a result in a folder, without the dot.

    Returns:
        The plan, jobs in the order of their names.

    Raises:
        ValueError: an input that does not exist, a file with a folder, folders without a single pair, two
            images of one stem in a folder, an output of unknown format, or one that would replace an input.
    """
    for path in (visible, infrared):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    if visible.is_dir() != infrared.is_dir():
        raise ValueError(f"give two files or two folders, got {_kind(visible)} and {_kind(infrared)}")

    names_folder = os.fspath(output).endswith(os.sep)
    output = Path(output)

    def in_folder(stem: str) -> Path:
        return output / f"{stem}{suffix}.{extension}"

    if visible.is_file():
        into_folder = names_folder or output.is_dir() or not output.suffix
        result = Plan([Job(visible, infrared, in_folder(visible.stem) if into_folder else output)])
    else:
        if output.exists() and not output.is_dir():
            raise ValueError(f"the output of two folders must be a folder, but {output} is a file")
        pairs, alone = pair_folders(visible, infrared)
        if not pairs:
            raise ValueError(
                f"no image in {visible} has the name (but for the extension) of one in {infrared}"
            )
        result = Plan([Job(pair.visible, pair.infrared, in_folder(pair.name)) for pair in pairs])
        for path in alone:
            result.unpaired.append(
                f"{path}: no {path.stem}.* in {infrared if path.parent == visible else visible}"
            )
    inputs = {os.path.realpath(path) for job in result.jobs for path in (job.visible, job.infrared)}
    for job in result.jobs:
        if job.output.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(
                f"{job.output} has no known image format; use one of {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        if os.path.realpath(job.output) in inputs:
            raise ValueError(
                f"{job.output} is an input and would be replaced; choose another output or a suffix"
            )
    return result


def run(
    jobs: list[Job], fuser: Fuser, *, skip_existing: bool = False, stop_at_failure: bool = False
) -> Report:
    """Does the jobs one after the other, with a progress bar on stderr where that is a terminal.

    Args:
        jobs: of :func:`plan`.
        fuser: the network.
        skip_existing: leave outputs that are there as they are; otherwise they are replaced.
        stop_at_failure: raise what one job raises, instead of noting it and going on.

    Returns:
        What was written, skipped, and failed.
    """
    report = Report()
    for job in tqdm(jobs, desc="fuse", unit="pair", file=sys.stderr, disable=None if len(jobs) > 1 else True):
        if skip_existing and job.output.exists():
            report.skipped += 1
            continue
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            write_image(job.output, fuser(job.visible, job.infrared))
            report.written += 1
        except Exception as error:  # whatever is wrong with one pair must not cost the others
            if stop_at_failure:
                raise
            report.failures.append((job, error))
    return report


def _kind(path: Path) -> str:
    return f"the {'folder' if path.is_dir() else 'file'} {path}"
