"""What the commands share: how they are parsed, options, and how an error is told."""

import argparse
import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

PROGRAM = "ddrf-fast"
CLEANING = 5.0  # seconds


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


def network_options() -> Parser:
    """Options of the commands that may run the network in another precision, as a parent of their parsers."""
    parser = Parser(add_help=False, parents=[model_options()])
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="what the network computes in (default: auto)",
    )
    return parser


def session_options() -> Parser:
    """Options of the commands that run sessions, as a parent of their parsers."""
    parser = Parser(add_help=False, parents=[network_options()])
    parser.add_argument(
        "--tile",
        default="auto",
        type=tile,
        metavar="N",
        help="rows of the strips of large images, with equal results but for rounding; 0: no strips "
        "(default: auto)",
    )
    parser.add_argument(
        "--color",
        default="ycbcr",
        choices=("ycbcr", "rgb", "gray"),
        help="ycbcr: the luminance goes through the network and the colour is kept (default); rgb: each "
        "channel does; gray: the result is grey",
    )
    parser.add_argument(
        "--thermal-range",
        default="full",
        metavar="RANGE",
        help="values of the infrared image that become black and white: full (those of its type, default), "
        "minmax, percentile (1st and 99th of each image), LOW%%,HIGH%% or LOW,HIGH (--thermal-range=-20,40 "
        "where it begins with a minus)",
    )
    return parser


def fuser_options() -> Parser:
    """Options of the commands that fuse, as a parent of their parsers."""
    parser = Parser(add_help=False, parents=[session_options()])
    parser.add_argument(
        "--clean",
        action="store_true",
        help="sharp, well lit images free of noise: fuse them without estimating how they are degraded",
    )
    return parser


def session_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a session, from :func:`session_options`."""
    return {
        "weights": options.weights,
        "device": options.device,
        "dtype": options.dtype,
        "tile": options.tile,
        "color": options.color,
        "thermal_range": options.thermal_range,
    }


def tile(text: str) -> int | str:
    """The value of --tile."""
    return "auto" if text == "auto" else natural(text)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


@contextlib.contextmanager
def ended_cleanly() -> Iterator[None]:
    """SIGTERM ends what runs within as Ctrl-C does, cleaning up. torchrun, systemd and `kill` send it.

    Others that follow at once are ignored: they would break off the cleaning up. SIGINT stays ignored where
    it was, as in the background of a script.
    """
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    until = 0.0

    def end(number: int, frame: object) -> None:
        nonlocal until
        if time.monotonic() >= until:
            until = time.monotonic() + CLEANING
            raise KeyboardInterrupt

    if previous[signal.SIGINT] != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_expected(error: Exception) -> bool:
    """Whether the error is of the input and not of the program."""
    return isinstance(error, (ValueError, TypeError, OSError))


def one_line(error: Exception) -> str:
    """An error for people; the class is named where it was not expected."""
    text = " ".join(str(error).split())
    return text if is_expected(error) else f"{type(error).__name__}: {text}"
