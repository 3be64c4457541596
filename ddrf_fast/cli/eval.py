"""`ddrf-fast eval`: measures fused or restored images."""

import argparse
import math
import sys
from pathlib import Path

from ddrf_fast.cli.options import PROGRAM, Commands, common_options, one_line

# Of ddrf_fast.metrics, which cannot be asked here without importing torch; a test compares them.
METRICS = "EN, AG, SSIM, VIF, VIFF, PSNR, Qabf, MI, SF, SD, NIQE, Mean"
CONVENTIONS = ("standard", "vifb", "tang", "cddfuse")


def add_parser(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        parents=[common_options()],
        help="measure fused or restored images, anybody's",
        usage=f"{PROGRAM} eval [options] FUSED [FUSED ...] VIS IR\n"
        f"       {PROGRAM} eval [options] RESTORED [RESTORED ...] --reference CLEAN",
        description="Measures fused images against their visible and infrared sources, or restored images "
        "against the clean ones: files, or folders in which what has the same name but for the extension "
        "belongs together. Several folders of results are compared and ranked. Of degraded inputs, give the "
        "clean images as VIS and IR.",
        epilog=f"Metrics: {METRICS}. Colour images are measured on their luminance, in the convention vifb "
        "channel by channel. An image that fails, or has no partner, does not stop the others: it is listed "
        "at the end, and the exit code is 1.",
    )
    evaluate.add_argument("images", nargs="+", type=Path, metavar="PATH", help="as shown above")
    evaluate.add_argument("--reference", type=Path, metavar="CLEAN", help="clean images: measure restoration")
    evaluate.add_argument(
        "--metrics",
        default="",
        metavar="A,B,...",
        help="what to measure (default: all for fused images but NIQE and Mean; PSNR,SSIM,VIF for restored)",
    )
    evaluate.add_argument(
        "--convention", default="standard", choices=CONVENTIONS, help="whose definitions (default: standard)"
    )
    evaluate.add_argument("--per-image", action="store_true", help="print the values of each image, too")
    evaluate.add_argument("--csv", type=Path, metavar="FILE", help="write the values of each image")
    evaluate.add_argument(
        "--thermal-range",
        default="full",
        metavar="RANGE",
        help="of the infrared images, as they were fused: full, minmax, percentile, LOW%%,HIGH%% or LOW,HIGH "
        "(default: full)",
    )
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    evaluate.add_argument(
        "--ignore-unpaired", action="store_true", help="images without a partner are no failure"
    )
    evaluate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ddrf_fast import _tables, evaluation

    if options.reference is None:
        if len(options.images) < 3:
            raise ValueError(
                f"give FUSED VIS IR, or RESTORED with --reference CLEAN, got {len(options.images)} paths"
            )
        methods, references = options.images[:-2], options.images[-2:]
    else:
        methods, references = options.images, [options.reference]
    by_lower_case = {name.lower(): name for name in METRICS.split(", ")}
    given = [name.strip() for name in options.metrics.split(",") if name.strip()]
    names = [by_lower_case.get(name.lower(), name) for name in given]
    if options.csv and not options.csv.absolute().parent.is_dir():
        raise ValueError(f"--csv {options.csv}: its folder does not exist")
    if options.csv and options.csv.is_dir():
        raise ValueError(f"--csv {options.csv} is a folder; give a file in it")

    results = evaluation.measure(
        methods, references, names, options.convention, options.device, options.thermal_range
    )
    if options.per_image:
        print(_tables.markdown(*evaluation.per_image(results)), end="\n\n")
    print(evaluation.summary(results))
    if options.csv:
        _tables.write_csv(options.csv, *evaluation.per_image(results))
    failed = False
    for result in results:
        for image, error in result.failures:
            print(f"failed: {result.name}, {image}: {one_line(error)}", file=sys.stderr)
        for image, scores in result.images.items():
            undefined = [name for name, value in scores.items() if math.isnan(value)]
            if undefined:
                print(f"note: {result.name}, {image}: {', '.join(undefined)} is no number", file=sys.stderr)
        for line in result.unpaired:
            print(f"{'ignored' if options.ignore_unpaired else 'failed'}: {line}", file=sys.stderr)
        failed |= bool(result.failures) or (bool(result.unpaired) and not options.ignore_unpaired)
    return int(failed)
