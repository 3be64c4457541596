"""`ddrf-fast demo`: a page to try the network, or the sample pair fused into a folder."""

import argparse
from pathlib import Path

from ddrf_fast.cli.options import Commands, common_options, ended_cleanly, fuser_options, session_settings


def add_parser(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        parents=[fuser_options(), common_options()],
        help="open a page to try it, or fuse the sample pair into a folder",
        description="Opens a page in the browser to try the network on your images: fused and restored "
        "pictures, degradations to see what it withstands, time and measures of quality. All is computed on "
        "this machine. The page needs Gradio: pip install 'ddrf-fast[demo]'. With -o there is no page: the "
        "sample pair of the package is fused.",
    )
    demo.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="no page: write the fused sample pair there, and print the time that it took and its measures",
    )
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve the page at; 0.0.0.0 lets the whole network use it (default: %(default)s)",
    )
    demo.add_argument(
        "--port", type=_port, help="port of the page (default: the first free one from 7860 on)"
    )
    demo.add_argument("--no-browser", action="store_true", help="print the page's address, open no browser")
    demo.set_defaults(run=run)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    settings = session_settings(options) | {"clean": options.clean}
    if options.output is not None:
        from ddrf_fast.demo import run_demo

        print(run_demo(options.output, **settings))
        return 0
    try:
        from ddrf_fast.demo.page import serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the page needs {error.name}: pip install 'ddrf-fast[demo]' (without it: ddrf-fast demo -o DIR)"
        ) from error
    from ddrf_fast.inference import Fuser

    with ended_cleanly():
        serve(
            Fuser(**settings),
            host=options.host,
            port=options.port,
            open_browser=not options.no_browser,
        )
    return 0
