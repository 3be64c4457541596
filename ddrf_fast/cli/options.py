"""What the commands share: how they are parsed, options, and how an error is told."""

import argparse
from pathlib import Path
from typing import NoReturn, TypeAlias

PROGRAM = "ddrf-fast"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is in --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def common_options() -> Parser:
    """Options of every command, as a parent of its parser."""
    parser = Parser(add_help=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def model_options() -> Parser:
    """Options of the commands that run the network, as a parent of their parsers."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of DDRF-Net (default: the package's own)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def is_expected(error: Exception) -> bool:
    """Whether the error is of the input and not of the program."""
    return isinstance(error, (ValueError, TypeError, OSError))


def one_line(error: Exception) -> str:
    """An error for people; the class is named where it was not expected."""
    text = " ".join(str(error).split())
    return text if is_expected(error) else f"{type(error).__name__}: {text}"
