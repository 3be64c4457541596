"""`ddrf-fast fuse`: fuses pairs of images."""

import argparse
import os

from ddrf_fast.cli import video
from ddrf_fast.cli.files import EPILOG, execute, file_options, load_fuser, plan_files
from ddrf_fast.cli.options import Commands, common_options, fuser_options


def add_parser(commands: Commands) -> None:
    fuse = commands.add_parser(
        "fuse",
        parents=[file_options(), fuser_options(), video.video_options(), common_options()],
        help="fuse a pair of images, two folders paired by name, or two videos",
        description="Fuses a visible and an infrared image, or those images of two folders (or patterns) "
        "that have the same name but for the extension, or two videos. The result has the colour, the alpha "
        "and the bit depth of the visible image.",
        epilog=EPILOG.format(command="fuse"),
    )
    fuse.add_argument("visible", metavar="VIS", help="visible image, a folder of them, or a pattern")
    fuse.add_argument("infrared", metavar="IR", help="infrared image, a folder of them, or a pattern")
    fuse.add_argument(
        "--resize",
        choices=("visible", "infrared"),
        help="where sizes differ, bring the other image to the size of this one (default: that is an error)",
    )
    fuse.add_argument(
        "--homography",
        metavar="FILE",
        help="3x3 numbers (text, .json, .npy) that take infrared pixels (x, y, 1) to the visible ones",
    )
    fuse.add_argument(
        "--ignore-unpaired", action="store_true", help="images without a partner are no failure"
    )
    fuse.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if video.are_videos(options.visible, options.infrared):
        return video.run(options)
    video.refuse(options, video.OF_VIDEOS, "images")
    if single := os.path.isfile(options.visible):
        video.refuse(options, video.OF_FOLDERS, "two files")
    plan, share = plan_files(options, (options.visible, options.infrared))
    fuser = load_fuser(options, share)
    return execute(
        options,
        plan,
        share,
        fuser,
        lambda job: fuser.prepare(*job.inputs),
        done="fused",
        noun="pair",
        device=str(fuser.device),
        single=single,
    )
