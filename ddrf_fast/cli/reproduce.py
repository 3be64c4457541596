"""`ddrf-fast reproduce`: makes the paper's tables."""

import argparse
import os
from pathlib import Path

from ddrf_fast.cli.options import Commands, common_options, model_options

# Of ddrf_fast.reproduce.TABLES, and which of the options that choose images and trainings each uses.
NAMES = {
    "table2": (),
    "table3": ("sets", "limit"),
    "table4": ("sets", "limit"),
    "static-dynamic": ("sets", "limit", "runs"),
    "losses": ("sets", "limit", "runs"),
}


def add_parser(commands: Commands) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        parents=[model_options(), common_options()],
        help="make the paper's tables on your data",
        description="Makes a table of the paper and prints it as Markdown: of DDRF-Net, the classical "
        "fusions, and what other methods made of the same images. table2: time and size; table3: fusion of "
        "clean and of degraded pairs; table4: restoration. static-dynamic and losses compare trainings (Fig. "
        "7 and 8) that are in a folder, and say how to train what is not there.",
        epilog="DATA/SET/test/vis and .../ir hold the pairs of a set (tno, roadscene, msrs, gun), "
        "DATA/SET_degraded/test the same degraded (where it is missing the package degrades them, with fixed "
        "seeds), DATA/baselines/SET/METHOD the results of other methods. All metrics are in the standard "
        "conventions; colour is measured on its luminance.",
    )
    reproduce.add_argument("table", choices=tuple(NAMES), metavar="TABLE", help="one of " + ", ".join(NAMES))
    reproduce.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the sets (default: $DDRF_FAST_DATA)"
    )
    reproduce.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="write the values of each image and pictures there"
    )
    reproduce.add_argument(
        "--sets", nargs="+", default=(), metavar="SET", help="sets to use (default: those of the table)"
    )
    reproduce.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="folder of the trainings to compare, EXPERIMENT/ddrfnet.safetensors",
    )
    reproduce.add_argument("--limit", type=int, metavar="N", help="use only the first N pairs of each set")
    reproduce.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ddrf_fast.reproduce import TABLES, Settings

    for name in ("sets", "limit", "runs"):
        if name not in NAMES[options.table] and getattr(options, name) not in ((), None):
            raise ValueError(f"--{name} has no meaning for {options.table}")
    data = options.data or os.environ.get("DDRF_FAST_DATA")
    if not data:
        raise ValueError("where are the images? Give --data, or set DDRF_FAST_DATA")
    settings = Settings(
        Path(data),
        options.output,
        options.weights,
        options.device,
        tuple(options.sets),
        options.limit,
        options.runs,
    )
    print(TABLES[options.table](settings))
    return 0
