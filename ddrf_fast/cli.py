"""The command `ddrf-fast`: fuse, eval, reproduce, train, data, demo, info.

Only the standard library is imported before the command line has been read: torch takes seconds, help must
not.

Exit codes: 0 all was done; 1 something failed (a pair of a batch, or unexpectedly); 2 bad usage or bad input,
with one line on stderr; 130 interrupted.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ddrf_fast._version import __version__

PROGRAM = "ddrf-fast"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is in --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


# Of ddrf_fast.metrics, which cannot be asked here without importing torch; a test compares them.
METRICS = "EN, AG, SSIM, VIF, VIFF, PSNR, Qabf, MI, SF, SD, NIQE, Mean"
CONVENTIONS = ("standard", "vifb", "tang", "cddfuse")
TABLES = ("table2", "table3", "table4", "static-dynamic", "losses")  # of ddrf_fast.reproduce


def build_parser() -> argparse.ArgumentParser:
    """The command line, without importing torch."""
    parser = _Parser(
        prog=PROGRAM,
        description="Fuses infrared and visible images with DDRF-Net.",
        epilog="Exit codes: 0 done, 1 something failed, 2 bad usage or input, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    model = _Parser(add_help=False)
    model.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of DDRF-Net (default: the package's own)"
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    fuse = commands.add_parser(
        "fuse",
        parents=[model, common],
        help="fuse a pair of images, or two folders paired by name",
        description="Fuses a visible and an infrared image, or those images of two folders that have the "
        "same name but for the extension. The result has the colour and the bit depth of the visible image.",
        epilog="A pair that fails, or an image without a partner, does not stop the others: it is listed "
        "at the end, and the exit code is 1. Existing results are replaced unless --skip-existing is given; "
        "inputs never are.",
    )
    fuse.add_argument("visible", type=Path, metavar="VIS", help="visible image, or a folder of them")
    fuse.add_argument("infrared", type=Path, metavar="IR", help="infrared image, or a folder of them")
    fuse.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="image or folder; a folder is made if missing"
    )
    fuse.add_argument(
        "--suffix", default="", help="added to the name of each result in a folder (default: none)"
    )
    fuse.add_argument(
        "--ext",
        default="png",
        metavar="EXT",
        help="format of the results in a folder: png, tif, jpg, ... (default: png)",
    )
    fuse.add_argument("--skip-existing", action="store_true", help="leave results that are there as they are")
    fuse.add_argument(
        "--ignore-unpaired", action="store_true", help="images without a partner are no failure"
    )
    fuse.set_defaults(run=run_fuse)

    evaluate = commands.add_parser(
        "eval",
        parents=[common],
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
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    evaluate.add_argument(
        "--ignore-unpaired", action="store_true", help="images without a partner are no failure"
    )
    evaluate.set_defaults(run=run_eval)

    reproduce = commands.add_parser(
        "reproduce",
        parents=[model, common],
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
    reproduce.add_argument("table", choices=TABLES, metavar="TABLE", help="one of " + ", ".join(TABLES))
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
    reproduce.set_defaults(run=run_reproduce)

    train = commands.add_parser(
        "train",
        parents=[common],
        help="train DDRF-Net on data sets of pairs",
        description="Trains DDRF-Net on registered pairs, degraded at random. Settings come from the "
        "defaults, then from each FILE, then from each KEY=VALUE. Needs the extra 'train': "
        "pip install 'ddrf-fast[train]'.",
        epilog="Example: ddrf-fast train --config paper data=pairs/train output=runs/one. With several GPUs: "
        "torchrun --nproc-per-node 2 -m ddrf_fast.cli train ... Ctrl-C writes a checkpoint and ends it.",
    )
    train.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="settings in YAML, or a preset: paper, static, restoration, fig8_a to fig8_h; may be repeated",
    )
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output")
    train.add_argument("--print-config", action="store_true", help="print all settings and stop")
    train.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="such as model.width=16")
    train.set_defaults(run=run_train)

    data = commands.add_parser(
        "data", help="look after data sets of pairs", description="Looks after data sets of pairs."
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        parents=[common],
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
    check.set_defaults(run=run_data_check)

    demo = commands.add_parser(
        "demo",
        parents=[model, common],
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
    demo.set_defaults(run=run_demo)

    info = commands.add_parser(
        "info",
        parents=[common],
        help="versions, what is compiled, processor and GPU",
        description="Describes this installation.",
    )
    info.set_defaults(run=run_info)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
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
        expected = isinstance(error, (ValueError, TypeError, OSError))
        hint = "" if expected else f" ({PROGRAM} {options.command} --debug shows where)"
        print(f"{PROGRAM}: error: {_one_line(error)}{hint}", file=sys.stderr)
        return 2 if expected else 1


def run_fuse(options: argparse.Namespace) -> int:
    import cv2

    from ddrf_fast import batch
    from ddrf_fast.inference import Fuser

    # Its warnings about a damaged file say what the one line of ours says.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)

    plan = batch.plan(
        options.visible, options.infrared, options.output, options.suffix, options.ext.lstrip(".")
    )
    single = options.visible.is_file()
    fuser = Fuser(options.weights, options.device)
    started = time.perf_counter()
    report = batch.run(
        plan.jobs, fuser, skip_existing=options.skip_existing, stop_at_failure=single or options.debug
    )
    seconds = time.perf_counter() - started
    where = plan.jobs[0].output if single else options.output
    skipped = f", {report.skipped} skipped because it is there" if report.skipped else ""
    pairs = "pair" if len(plan.jobs) == 1 else "pairs"
    print(
        f"fused {report.written} of {len(plan.jobs)} {pairs} into {where} "
        f"in {seconds:.1f} s on {fuser.device}{skipped}"
    )
    for job, error in report.failures:
        print(f"failed: {job.visible.name}: {_one_line(error)}", file=sys.stderr)
    for line in plan.unpaired:
        print(f"{'ignored' if options.ignore_unpaired else 'failed'}: {line}", file=sys.stderr)
    return 1 if report.failures or (plan.unpaired and not options.ignore_unpaired) else 0


def run_eval(options: argparse.Namespace) -> int:
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

    results = evaluation.measure(methods, references, names, options.convention, options.device)
    if options.per_image:
        print(_tables.markdown(*evaluation.per_image(results)), end="\n\n")
    print(evaluation.summary(results))
    if options.csv:
        _tables.write_csv(options.csv, *evaluation.per_image(results))
    failed = False
    for result in results:
        for image, error in result.failures:
            print(f"failed: {result.name}, {image}: {_one_line(error)}", file=sys.stderr)
        for line in result.unpaired:
            print(f"{'ignored' if options.ignore_unpaired else 'failed'}: {line}", file=sys.stderr)
        failed |= bool(result.failures) or (bool(result.unpaired) and not options.ignore_unpaired)
    return int(failed)


def run_reproduce(options: argparse.Namespace) -> int:
    from ddrf_fast.reproduce import TABLES, Settings

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


def run_train(options: argparse.Namespace) -> int:
    try:
        from ddrf_fast.training import load_config, train
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}: pip install 'ddrf-fast[train]'") from error
    import logging

    from ddrf_fast.models import read_metadata

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # not its advertisements
    config = load_config(options.config, options.settings)
    if options.print_config:
        print(config.to_yaml(), end="")
        return 0
    path = train(config, options.resume)
    _, record = read_metadata(path)
    print(f"wrote {path} after {record['steps']} steps in {record['minutes']} minutes on {record['device']}")
    for name, value in record["validation"].items():
        print(f"  {name:28} {value:8.4f}")
    return 0


def run_data_check(options: argparse.Namespace) -> int:
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
    return 1 if report.problems else 0


def run_demo(options: argparse.Namespace) -> int:
    from ddrf_fast.demo import run_demo

    print(run_demo(options.output, weights=options.weights, device=options.device))
    return 0


def run_info(options: argparse.Namespace) -> int:
    from ddrf_fast import collect_env

    collect_env.main()
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, TypeError, OSError)) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main())
