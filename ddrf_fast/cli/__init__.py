"""The command `ddrf-fast`, one file a command.

Only the standard library is imported before the command line has been read: torch takes seconds, help must
not.

Exit codes: 0 all was done; 1 something failed (a pair of a batch, or unexpectedly); 2 bad usage or bad input,
with one line on stderr; 130 interrupted.
"""

import io
import sys
from collections.abc import Sequence

from ddrf_fast._version import __version__
from ddrf_fast.cli import bench, data, degrade, demo, eval, export, fuse, info, reproduce, restore, train
from ddrf_fast.cli.completion import PrintCompletion
from ddrf_fast.cli.options import PROGRAM, Parser, is_expected, one_line

COMMANDS = (fuse, restore, degrade, eval, reproduce, train, export, data, bench, demo, info)


def build_parser() -> Parser:
    """The command line, without importing torch."""
    parser = Parser(
        prog=PROGRAM,
        description="Fuses infrared and visible images with DDRF-Net.",
        epilog="Exit codes: 0 done, 1 something failed, 2 bad usage or input, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print what makes that shell complete this command, and stop",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes KEY=VALUE from one place of the line; they may stand between options, too.
    if any(text.startswith("-") or "settings" not in options for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.settings += rest
    try:
        return options.run(options)
    except KeyboardInterrupt as interruption:
        print(f"\n{PROGRAM}: interrupted {interruption}".rstrip(), file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        where = f" ({PROGRAM} {options.command} --debug shows where)"
        # A TypeError may be of the input, or a mistake of the program.
        hint = where if isinstance(error, TypeError) or not is_expected(error) else ""
        print(f"{PROGRAM}: error: {one_line(error)}{hint}", file=sys.stderr)
        return 2 if is_expected(error) else 1
