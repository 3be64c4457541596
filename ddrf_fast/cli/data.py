"""`ddrf-fast data`: looks after data sets of pairs."""

import argparse
from pathlib import Path

from ddrf_fast.cli.options import Commands, common_options


def add_parser(commands: Commands) -> None:
    data = commands.add_parser(
        "data", help="look after data sets of pairs", description="Looks after data sets of pairs."
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        parents=[common_options()],
        help="list files that cannot be read, have no partner, or differ in size",
        description="Reads every pair of a data set and lists files that cannot be read or have no partner, "
        "and pairs whose images differ in size. The exit code is 1 if there are some.",
    )
    check.add_argument("root", type=Path, metavar="DIR", help="folder of the data set")
    check.add_argument(
        "--layout",
        default="auto",
        help="tno, gun, roadscene, msrs, llvip, m3fd, flir, rgbt234, vt821, folders, or two patterns, "
        "'visible/{name}|infrared/{name}' (default: recognised by what is there)",
    )
    check.add_argument("--split", help="a part of it: a file of names, or a split such as train")
    check.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import cv2

    from ddrf_fast.data import check_pairs

    # Its warnings about a damaged file say what the one line of ours says.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    report = check_pairs(options.root, options.layout, options.split, progress_bar=True)
    for line in report.problems:
        print(line)
    print(
        f"{options.root}: layout {report.layout}, {report.pairs} pairs; {len(report.unreadable)} unreadable, "
        f"{len(report.unpaired)} unpaired, {len(report.sizes)} differently sized"
    )
    if report.narrow:
        print(
            f"note: {len(report.narrow)} infrared images hold raw thermal values "
            f"({report.narrow[0]}): train with data=[{{path: ..., thermal_range: percentile}}], fuse with "
            "--thermal-range percentile"
        )
    return 1 if report.problems else 0
