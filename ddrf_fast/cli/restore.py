"""`ddrf-fast restore`: restores blurred, noisy and dark images."""

import argparse
import os

from ddrf_fast.cli.files import EPILOG, execute, file_options, plan_files, shared_settings
from ddrf_fast.cli.options import Commands, common_options, session_options


def add_parser(commands: Commands) -> None:
    restore = commands.add_parser(
        "restore",
        parents=[file_options(), session_options(), common_options()],
        help="restore blurred, noisy and dark images, visible or infrared ones",
        description="Restores images by the branch of the network for their kind. The result has the "
        "colour, the alpha and the bit depth of the image. With both kinds at once, OUT gets two folders, "
        "visible and infrared. How the images are degraded is estimated, unless --kernel, --noise-std or "
        "--tone tells it.",
        epilog=EPILOG.format(command="restore"),
    )
    for kind in ("visible", "infrared"):
        restore.add_argument(
            f"--{kind}", metavar="IMAGES", help=f"{kind} image, a folder of them, or a pattern"
        )
    restore.add_argument(
        "--kernel", metavar="FILE", help="the blur, where it is known: numbers in rows (text, .json, .npy)"
    )
    restore.add_argument(
        "--noise-std",
        type=float,
        metavar="STD",
        help="standard deviation of the noise, where it is known, for images in [0, 1]; of each channel",
    )
    restore.add_argument(
        "--tone",
        type=float,
        nargs=3,
        metavar=("GAMMA", "GAIN", "CONTRAST"),
        help="the darkness, where it is known: the image is GAIN * scene^GAMMA, of a scene of less contrast",
    )
    restore.add_argument(
        "--refine",
        action="store_true",
        help="correct the result until, blurred again, it is the image; without --kernel the blur, which may "
        "vary over the image, is estimated from its spectrum (slower, some seconds; for little noise)",
    )
    restore.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ddrf_fast.batch import Job, Plan, check_outputs
    from ddrf_fast.inference import Restorer
    from ddrf_fast.inference.alignment import read_matrix
    from ddrf_fast.inference.session import Request

    given = {kind: getattr(options, kind) for kind in ("visible", "infrared") if getattr(options, kind)}
    if not given:
        raise ValueError("give --visible IMAGES, --infrared IMAGES, or both")
    if "infrared" not in given and options.thermal_range != "full":
        raise ValueError("--thermal-range is that of infrared images; there is no --infrared IMAGES")
    both = len(given) == 2
    plan, kinds = Plan(), {}
    for kind, source in given.items():
        output = os.path.join(options.output, kind, "") if both else options.output
        part, share = plan_files(options, (source,), output)
        plan.jobs += part.jobs
        plan.images += part.images
        kinds.update(dict.fromkeys(part.jobs, kind))
    check_outputs(plan)  # of both kinds together
    kernel = None if options.kernel is None else read_matrix(options.kernel)
    settings = shared_settings(options, share)
    told = {"kernel": kernel, "noise_std": options.noise_std, "tone": options.tone}
    restorer = Restorer(**settings, **told, refine=options.refine)

    def prepare(job: Job) -> Request:
        visible = kinds[job] == "visible"
        return restorer.prepare(*((job.inputs[0], None) if visible else (None, job.inputs[0])))

    return execute(
        options,
        plan,
        share,
        restorer,
        prepare,
        done="restored",
        noun="image",
        device=str(restorer.device),
        single=len(plan.jobs) == 1 and all(os.path.isfile(source) for source in given.values()),
    )
