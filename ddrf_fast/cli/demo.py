"""`ddrf-fast demo`: fuses the sample pair of the package."""

import argparse
from pathlib import Path

from ddrf_fast.cli.options import Commands, common_options, model_options


def add_parser(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        parents=[model_options(), common_options()],
        help="fuse the sample pair that comes with the package",
        description="Fuses the sample pair of the package, writes the result and a side-by-side picture, and "
        "prints the time that it took and measures of quality.",
    )
    demo.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("ddrf_fast_demo"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ddrf_fast.demo import run_demo

    print(run_demo(options.output, weights=options.weights, device=options.device))
    return 0
