"""`ddrf-fast fuse`: fuses pairs of images."""

import argparse
import sys
import time
from pathlib import Path

from ddrf_fast.cli import video
from ddrf_fast.cli.options import Commands, common_options, model_options, one_line


def add_parser(commands: Commands) -> None:
    fuse = commands.add_parser(
        "fuse",
        parents=[model_options(), video.video_options(), common_options()],
        help="fuse a pair of images, two folders paired by name, or two videos",
        description="Fuses a visible and an infrared image, or those images of two folders that have the "
        "same name but for the extension. The result has the colour and the bit depth of the visible image.",
        epilog="A pair that fails, or an image without a partner, does not stop the others: it is listed "
        "at the end, and the exit code is 1. Existing results are replaced unless --skip-existing is given; "
        "inputs never are.",
    )
    fuse.add_argument("visible", type=Path, metavar="VIS", help="visible image, or a folder of them")
    fuse.add_argument("infrared", type=Path, metavar="IR", help="infrared image, or a folder of them")
    fuse.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="image or folder; a folder is made if missing"
    )
    fuse.add_argument(
        "--suffix", default="", help="added to the name of each result in a folder (default: none)"
    )
    fuse.add_argument(
        "--ext",
        default="png",
        metavar="EXT",
        help="format of the results in a folder: png, tif, jpg, ... (default: png)",
    )
    fuse.add_argument("--skip-existing", action="store_true", help="leave results that are there as they are")
    fuse.add_argument(
        "--ignore-unpaired", action="store_true", help="images without a partner are no failure"
    )
    fuse.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if video.are_videos(options.visible, options.infrared):
        return video.run(options)
    import cv2

    from ddrf_fast import batch
    from ddrf_fast.inference import Fuser

    # Its warnings about a damaged file say what the one line of ours says.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)

    plan = batch.plan(
        options.visible, options.infrared, options.output, options.suffix, options.ext.lstrip(".")
    )
    single = options.visible.is_file()
    fuser = Fuser(options.weights, options.device)
    started = time.perf_counter()
    report = batch.run(
        plan.jobs, fuser, skip_existing=options.skip_existing, stop_at_failure=single or options.debug
    )
    seconds = time.perf_counter() - started
    where = plan.jobs[0].output if single else options.output
    skipped = f", {report.skipped} skipped because it is there" if report.skipped else ""
    pairs = "pair" if len(plan.jobs) == 1 else "pairs"
    print(
        f"fused {report.written} of {len(plan.jobs)} {pairs} into {where} "
        f"in {seconds:.1f} s on {fuser.device}{skipped}"
    )
    for job, error in report.failures:
        print(f"failed: {job.visible.name}: {one_line(error)}", file=sys.stderr)
    for line in plan.unpaired:
        print(f"{'ignored' if options.ignore_unpaired else 'failed'}: {line}", file=sys.stderr)
    return 1 if report.failures or (plan.unpaired and not options.ignore_unpaired) else 0
