"""`ddrf-fast degrade`: degrades images, to train on or to test with."""

import argparse
import os

from ddrf_fast.cli.files import EPILOG, execute, file_options, max_pixels, plan_files
from ddrf_fast.cli.options import Commands, common_options, natural, positive

# Of ddrf_fast.degradation, which cannot be asked here without importing torch; a test compares them.
PRESETS = ("paper", "low_light", "kair", "srmd", "bsrgan", "real_esrgan")


def add_parser(commands: Commands) -> None:
    degrade = commands.add_parser(
        "degrade",
        parents=[file_options(), common_options()],
        help="blur, down-sample and add noise, at random and repeatably",
        description="Degrades images at random: blur, down-sampling, noise. What is done to an image depends "
        "on --seed and its name (with the folders inside of IMAGES) alone, not on the other images, --batch "
        "or the number of processes.",
        epilog=EPILOG.format(command="degrade"),
    )
    degrade.add_argument("images", metavar="IMAGES", help="image, a folder of them, or a pattern")
    degrade.add_argument(
        "--preset", default="paper", choices=PRESETS, help="what is drawn from (default: paper)"
    )
    degrade.add_argument(
        "--scale", default=1, type=positive, metavar="N", help="keep every N-th row and column (default: 1)"
    )
    degrade.add_argument(
        "--noise-std",
        type=noise_range,
        metavar="STD",
        help="standard deviation of the noise for images in [0, 1], or LOW,HIGH: white, on every image "
        "(default: the preset's noise)",
    )
    degrade.add_argument(
        "--blur",
        default="uniform",
        choices=("uniform", "spatial", "none"),
        help="one kernel for the whole image (default), kernels that vary over it, or no blur",
    )
    degrade.add_argument("--seed", default=0, type=_seed, metavar="N", help="(default: 0)")
    degrade.add_argument(
        "--recipes", action="store_true", help="write what was drawn as JSON beside each result"
    )
    degrade.set_defaults(run=run)


def noise_range(text: str) -> tuple[float, float]:
    """The value of --noise-std."""
    try:
        low, high = (float(part) for part in (text.split(",") if "," in text else (text, text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected STD or LOW,HIGH, got {text!r}") from None
    return low, high


def _seed(text: str) -> int:
    seed = natural(text)
    if seed >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a number below 2^63, got {text}")
    return seed


def run(options: argparse.Namespace) -> int:
    import json

    import numpy as np

    from ddrf_fast._files import replacing
    from ddrf_fast.batch import Job, write_output
    from ddrf_fast.degradation import DynamicDegradation, preset
    from ddrf_fast.inference import Degrader
    from ddrf_fast.inference.degrader import DegradeRequest

    plan, share = plan_files(options, (options.images,))
    config = preset(options.preset, options.scale)
    if options.noise_std is not None:
        config = config.with_noise(options.noise_std)
    degradation = DynamicDegradation(config, **({"sharp_fraction": 1.0} if options.blur == "none" else {}))
    degrader = Degrader(degradation, options.seed, options.blur == "spatial", max_pixels(options))

    def write(job: Job, request: DegradeRequest, image: np.ndarray) -> None:
        if options.recipes:  # first, so that where there is an image there is its recipe
            job.output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(job.output.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(degrader.describe(request)))
        write_output(job, request, image)

    return execute(
        options,
        plan,
        share,
        degrader,
        lambda job: degrader.prepare(job.inputs[0], job.name),
        done="degraded",
        noun="image",
        device="cpu",
        single=os.path.isfile(options.images),
        write=write,
    )
