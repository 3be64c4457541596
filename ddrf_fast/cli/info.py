"""`ddrf-fast info`: describes the installation."""

import argparse

from ddrf_fast.cli.options import Commands, common_options


def add_parser(commands: Commands) -> None:
    info = commands.add_parser(
        "info",
        parents=[common_options()],
        help="versions, what is compiled, processor and GPU",
        description="Describes this installation.",
    )
    info.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ddrf_fast import collect_env

    collect_env.main()
    return 0
