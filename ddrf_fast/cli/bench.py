"""`ddrf-fast bench`: how fast this machine is."""

import argparse
import math
import re
from pathlib import Path

from ddrf_fast.cli.options import Commands, common_options, network_options, positive


def add_parser(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        parents=[network_options(), common_options()],
        help="measure how fast this machine fuses",
        description="Measures how long fusing takes here, from 8 bit tensors to 8 bit tensors, and in what "
        "memory; and how much faster the two operations behind it are than plain torch at the sizes of a "
        "pair of 400x400.",
        epilog="Medians, and as spread the distance between the quartiles; leave the machine alone "
        "meanwhile. The peak of the memory is that of the whole process, Python and torch included; on a "
        "GPU, of what torch has allocated there. The complete benchmarks, with every peer, come with the "
        "source: benchmarks/README.md.",
    )
    bench.add_argument(
        "--size",
        type=_size,
        action="append",
        metavar="WxH",
        help="size of the images; may be given several times (default: 400x400 640x480 1280x1024)",
    )
    bench.add_argument("--batch", type=positive, default=1, help="also fuse so many pairs at a time")
    bench.add_argument("--threads", type=positive, help="threads of the CPU (default: torch's choice)")
    bench.add_argument(
        "--seconds", type=_seconds, default=1.0, help="how long each case is timed (default: %(default)g)"
    )
    bench.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there, too; -: only those"
    )
    bench.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import json

    import torch

    from ddrf_fast import bench
    from ddrf_fast._files import replacing
    from ddrf_fast.inference import Fuser

    if options.json is not None and not options.json.parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sizes = options.size or [(400, 400), (640, 480), (1280, 1024)]
    fuser = Fuser(options.weights, options.device, options.dtype)
    results = bench.measure(fuser, sizes, options.batch, options.seconds)
    text = json.dumps(results, indent=2)
    if options.json == Path("-"):
        print(text)
        return 0
    print(bench.table(results))
    if options.json is not None:
        with replacing(options.json) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text!r}")
    return int(match[1]), int(match[2])


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return seconds
