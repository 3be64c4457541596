"""What `ddrf-fast fuse` does with videos."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from ddrf_fast.cli.files import load_fuser, mapped
from ddrf_fast.cli.options import Parser, ended_cleanly, natural

SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"}
    | {".mpg", ".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv", ".y4m"}
)

OF_VIDEOS = ("sync", "smoothing", "codec", "crf")
OF_FOLDERS = ("recursive", "ignore_unpaired")


def video_options() -> Parser:
    """Options for videos, as a parent of a command's parser."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group(
        "videos (VIS, IR and OUT; needs ddrf-fast[video])",
        "The options above hold for every frame; in a folder, --ext is mp4 by default.",
    )
    group.add_argument(
        "--sync",
        choices=("timestamp", "frame"),
        help="pair frames by time from the start, or by number (default: timestamp)",
    )
    group.add_argument(
        "--smoothing",
        type=int,
        metavar="N",
        help="against flicker: frames over which brightness, and a thermal range of minmax or percentiles, "
        "are averaged; 1: none (default: 4)",
    )
    group.add_argument(
        "--codec", help="FFmpeg's name of a video codec (default: libx264; libvpx-vp9 for .webm)"
    )
    group.add_argument(
        "--crf",
        type=natural,
        help="the codec's constant quality, smaller is better (default: 18; 24 for VP9)",
    )
    return parser


def are_videos(*paths: str | os.PathLike[str]) -> bool:
    """Whether these have the extension of a video and are no folders."""
    return all(Path(path).suffix.lower() in SUFFIXES and not Path(path).is_dir() for path in paths)


def refuse(options: argparse.Namespace, names: Iterable[str], what: str) -> None:
    """Options that mean nothing to what is fused.

    Raises:
        ValueError: one of them was given.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:  # 0 is a value, too
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for {what}")


def run(options: argparse.Namespace) -> int:
    """Fuses two videos; exits with 1 where a part of one could not be read."""
    refuse(options, OF_FOLDERS, "videos")
    from ddrf_fast.batch import Share, is_folder
    from ddrf_fast.video import SMOOTHING, fuse_video

    share = Share.of_environment()
    if share.count > 1:
        raise ValueError(f"two videos are fused by one process, but torchrun started {share.count}")
    visible, output = Path(options.visible), Path(options.output)
    if is_folder(options.output, options.suffix, options.ext):
        extension = visible.suffix if options.ext == "auto" else f".{(options.ext or 'mp4').lstrip('.')}"
        output = output / f"{visible.stem}{options.suffix}{extension}"
    told = {"command": options.command, "inputs": [options.visible, options.infrared], "output": str(output)}
    if options.skip_existing and output.exists():
        print(json.dumps(told | {"skipped": True}) if options.json else f"{output} is there, skipped")
        return 0
    started = time.perf_counter()
    fuser = load_fuser(options, share)
    with ended_cleanly():
        report = fuse_video(
            visible,
            options.infrared,
            output,
            fuser=fuser,
            sync=options.sync or "timestamp",
            smoothing=SMOOTHING if options.smoothing is None else options.smoothing,
            batch_size=options.batch,
            workers=options.jobs,
            codec=options.codec,
            crf=options.crf,
            progress=True,
        )
    if options.json:
        told |= {"skipped": False, **dataclasses.asdict(report), "device": str(fuser.device)}
        told |= {"thermal_range": options.thermal_range, "seconds": round(time.perf_counter() - started, 3)}
        print(json.dumps(told))
    else:
        print(f"fused {report.frames} frames into {output} on {fuser.device}")
        if report.mapped:
            print(mapped(options.thermal_range, *report.mapped))
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in report.problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if report.problems else 0
