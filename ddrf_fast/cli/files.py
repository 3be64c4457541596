"""What the commands share that make image files of image files: options, summary, exit code."""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ddrf_fast.cli.options import Parser, ended_cleanly, one_line, positive, session_settings

if TYPE_CHECKING:
    from ddrf_fast import batch
    from ddrf_fast.inference import Fuser

EPILOG = (
    "Patterns with *, ?, [...] or ** are quoted; what their wildcards stand for pairs them. An image that "
    "fails, or has no partner, does not stop the others: it is listed at the end, and the exit code is 1. "
    "Existing results are replaced unless --skip-existing is given; inputs never are. Several processes "
    "share the work: torchrun --nproc-per-node 2 -m ddrf_fast {command} ..."
)


def file_options() -> Parser:
    """Options of the commands that work on files and folders, as a parent of their parsers."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="image or folder; a folder is made if missing"
    )
    parser.add_argument(
        "--suffix", default="", help="added to the name of each result in a folder (default: none)"
    )
    parser.add_argument(
        "--ext",
        metavar="EXT",
        help="format of the results in a folder: png (default), tif, jpg, ..., or auto: that of the image",
    )
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="search folders inside of folders; structure is kept"
    )
    parser.add_argument(
        "--skip-existing", action="store_true", help="leave results that are there as they are"
    )
    parser.add_argument(
        "--batch", default=1, type=positive, metavar="N", help="images of one size at a time (default: 1)"
    )
    parser.add_argument(
        "-j", "--jobs", default=2, type=positive, metavar="N", help="threads that read, and that write (2)"
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse images whose files announce more (default: 536870912)",
    )
    parser.add_argument("--json", action="store_true", help="print what was done as JSON, for scripts")
    return parser


def plan_files(
    options: argparse.Namespace, sources: Sequence[str], output: str | None = None
) -> "tuple[batch.Plan, batch.Share]":
    """What there is to do, for all processes, and which of them this one is."""
    import cv2

    from ddrf_fast import batch

    # What OpenCV and Pillow would say about a damaged file, the one line of ours says.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    warnings.filterwarnings("ignore", module="PIL")
    plan = batch.plan(
        sources,
        output or options.output,
        suffix=options.suffix,
        extension=options.ext,
        recursive=options.recursive,
        results=options.output,
        skip_existing=options.skip_existing,
    )
    return plan, batch.Share.of_environment()


def shared_settings(options: argparse.Namespace, share: "batch.Share") -> dict[str, Any]:
    """Arguments of the session of a process, from :func:`file_options` and those of a session."""
    settings = session_settings(options) | {"max_pixels": max_pixels(options)}
    if options.device == "auto":
        settings["device"] = share.device
    return settings


def load_fuser(options: argparse.Namespace, share: "batch.Share") -> "Fuser":
    """The session that fuses, from the options of `ddrf-fast fuse`."""
    from ddrf_fast.inference import Fuser

    return Fuser(
        **shared_settings(options, share),
        resize=options.resize,
        homography=options.homography,
        clean=options.clean,
    )


def max_pixels(options: argparse.Namespace) -> int:
    """The limit that was asked for, or the usual one."""
    from ddrf_fast.data import MAX_PIXELS

    return options.max_pixels or MAX_PIXELS


def execute(
    options: argparse.Namespace,
    plan: "batch.Plan",
    share: "batch.Share",
    work: "batch.Work",
    prepare: "Callable[[batch.Job], Any]",
    *,
    done: str,
    noun: str,
    device: str,
    single: bool,
    **how: Any,
) -> int:
    """Does this process's share of a plan and tells what came of it.

    Args:
        options: of :func:`file_options`.
        plan: for all processes.
        share: this process's.
        work: as for :func:`ddrf_fast.batch.run`.
        prepare: likewise.
        done: what was done, "fused".
        noun: with what, "pair".
        device: where.
        single: whether it is about files, not folders: what fails is an error then.
        **how: further arguments of :func:`ddrf_fast.batch.run`.

    Returns:
        The exit code.
    """
    from ddrf_fast import batch

    started = time.perf_counter()
    try:
        with ended_cleanly():
            report = batch.run(
                share.of(plan.jobs),
                work,
                prepare,
                verb=options.command,
                skip_existing=options.skip_existing,
                stop_at_failure=single or options.debug,
                batch_size=options.batch,
                workers=options.jobs,
                progress=share.rank == 0,
                **how,
            )
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(f"{interruption}; with --skip-existing it goes on there") from None
    mine: dict[str, Any] = {
        "written": [_told(job) for job in report.written],
        "skipped": [_told(job) for job in report.skipped],
        "failed": [_told(job) | {"error": one_line(error)} for job, error in report.failures],
        "narrow": [_told(job) | {"values": list(values)} for job, values in report.narrow],
        "mapped": [list(report.mapped)] if report.mapped else [],
        "stopped": [report.stopped] if report.stopped else [],
    }
    parts = share.gather(mine)
    if share.rank > 0:
        return 0  # the first process tells, and returns what it tells
    result: dict[str, Any] = {key: [entry for part in parts for entry in part[key]] for key in mine}
    for key in ("written", "skipped", "failed", "narrow"):
        result[key].sort(key=lambda told: told["output"])
    result["unpaired"] = plan.unpaired
    result |= {"command": options.command, "device": device, "processes": share.count}
    result["thermal_range"] = getattr(options, "thermal_range", None)
    result["seconds"] = round(time.perf_counter() - started, 3)
    if options.json:
        print(json.dumps(result))
    else:
        total = f"{len(plan.jobs)} {noun}{'' if len(plan.jobs) == 1 else 's'}"
        where = plan.jobs[0].output if single else options.output
        print(_summary(result, f"{done} {len(result['written'])} of {total} into {where}"))
    ignored = getattr(options, "ignore_unpaired", False)
    for line in _complaints(result, len(plan.jobs), "ignored" if ignored else "failed"):
        print(line, file=sys.stderr)
    return int(bool(result["failed"] or result["stopped"] or (plan.unpaired and not ignored)))


def _summary(result: dict[str, Any], done: str) -> str:
    written, skipped, seconds = len(result["written"]), len(result["skipped"]), result["seconds"]
    text = f"{done} in {seconds:.1f} s on {result['device']}"
    if result["processes"] > 1:
        text += f" in {result['processes']} processes"
    if written > 1 and seconds:
        text += f" ({written / seconds:.1f} a second)"
    if skipped:
        text += f", {skipped} skipped because {'it is' if skipped == 1 else 'they are'} there"
    if result["mapped"]:
        low, high = min(low for low, _ in result["mapped"]), max(high for _, high in result["mapped"])
        text += "\n" + mapped(result["thermal_range"], low, high)
    return text


def mapped(asked: str, low: float, high: float) -> str:
    """What became of thermal values."""
    return f"thermal range {asked}: values from {low:g} to {high:g} became black to white"


def _complaints(result: dict[str, Any], total: int, unpaired: str) -> Iterator[str]:
    """What belongs on stderr."""
    if result["narrow"]:
        first = result["narrow"][0]
        low, high = first["values"]
        yield (
            f"note: {len(result['narrow'])} infrared images of 16 bit use few of their values, such as "
            f"{first['inputs'][-1]} those from {low} to {high}, and were taken as they are; "
            "--thermal-range percentile spreads them"
        )
    for told in result["failed"]:
        named = any(path in told["error"] for path in told["inputs"])
        yield f"failed: {told['error']}" if named else f"failed: {told['inputs'][0]}: {told['error']}"
    for line in result["unpaired"]:
        yield f"{unpaired}: {line}"
    if result["stopped"]:
        left = total - len(result["written"]) - len(result["skipped"])
        yield f"stopped: {result['stopped'][0]}; {left} not done, with --skip-existing it goes on there"


def _told(job: "batch.Job") -> dict[str, Any]:
    return {"inputs": [str(path) for path in job.inputs], "output": str(job.output)}
