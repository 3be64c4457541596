"""What `ddrf-fast fuse` does with videos."""

import argparse
import os
import sys
from pathlib import Path

from ddrf_fast.cli.options import Parser

SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
    | {".webm", ".wmv"}
)


def video_options() -> Parser:
    """Options for videos, as a parent of a command's parser."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("videos (VIS, IR and OUT; needs ddrf-fast[video])")
    group.add_argument(
        "--sync",
        choices=("timestamp", "frame"),
        default="timestamp",
        help="pair frames by time from the start, or by number (default: timestamp)",
    )
    group.add_argument(
        "--smoothing",
        type=int,
        default=4,
        metavar="N",
        help="against flicker: frames over which brightness is averaged; 1: none (default: 4)",
    )
    group.add_argument(
        "--codec", help="FFmpeg's name of a video codec (default: libx264; libvpx-vp9 for .webm)"
    )
    group.add_argument(
        "--crf", type=int, help="the codec's constant quality, smaller is better (default: 18; 24 for VP9)"
    )
    return parser


def are_videos(*paths: str | os.PathLike[str]) -> bool:
    """Whether these are files with the extension of a video."""
    return all(Path(path).suffix.lower() in SUFFIXES and Path(path).is_file() for path in paths)


def run(options: argparse.Namespace) -> int:
    """Fuses two videos; exits with 1 where a part of one could not be read."""
    from ddrf_fast.inference import Fuser
    from ddrf_fast.video import fuse_video

    output = Path(options.output)
    if output.is_dir() or not output.suffix:
        output = output / f"{Path(options.visible).stem}{options.suffix}.mp4"
    if options.skip_existing and output.exists():
        print(f"{output} is there, skipped")
        return 0
    fuser = Fuser(options.weights, options.device, options.dtype, options.tile)
    report = fuse_video(
        options.visible,
        options.infrared,
        output,
        fuser=fuser,
        sync=options.sync,
        smoothing=options.smoothing,
        codec=options.codec,
        crf=options.crf,
        progress=True,
    )
    print(f"fused {report.frames} frames into {output} on {fuser.device}")
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for problem in report.problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if report.problems else 0
