"""`ddrf-fast export`: writes the network to a file that runs elsewhere."""

import argparse
import sys
from pathlib import Path

from ddrf_fast.cli.options import Commands, common_options

# Of ddrf_fast.export.
FORMATS = ("pt2", "aoti", "onnx")
OUTPUTS = ("fused", "all")


def add_parser(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        parents=[common_options()],
        help="write the network for torch.export, AOTInductor (C++ without Python) or ONNX",
        description="Writes DDRF-Net to a file that takes a batch of any number and size of visible and "
        "infrared images, and gives the fused ones. pt2: torch.export, runs in Python with ddrf_fast. aoti: "
        "AOTInductor, runs in C++ without Python, on processors like this one; needs a C++ compiler. onnx: "
        "standard operators, runs in ONNX Runtime; needs ddrf-fast[export].",
        epilog="Inputs `visible` and `infrared`: float32 [batch, 1, height, width] in [0, 1], 17x17 or more; "
        "outputs likewise.",
    )
    export.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="file, ending in .pt2 or .onnx"
    )
    export.add_argument("--format", choices=FORMATS, help="(default: by the extension, pt2 for .pt2)")
    export.add_argument(
        "--outputs",
        choices=OUTPUTS,
        default="fused",
        help="the fused image, or all: the restored ones, too (default: fused)",
    )
    export.add_argument(
        "--clean",
        action="store_true",
        help="for sharp, well lit images free of noise: fused only, without estimating their degradation",
    )
    export.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of DDRF-Net (default: the package's own)"
    )
    export.add_argument(
        "--check",
        action="store_true",
        help="run the file on real images of other sizes, and compare with the network",
    )
    export.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ddrf_fast.export import check_export, export_model, resolve_format
    from ddrf_fast.models import load_model
    from ddrf_fast.ops import _native

    format = resolve_format(options.output, options.format)
    model = load_model(options.weights)
    made = {"format": format, "outputs": options.outputs, "clean": options.clean}
    path = export_model(model, options.output, **made)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    libraries = [library for name in ("_schemas", "_C") if (library := _native.find(name))]
    if format == "aoti" and libraries:
        print(f"without Python, load these first: {' '.join(map(str, libraries))}")
    if not options.check:
        return 0
    comparisons = check_export(path, model, **made)
    for shape, difference in comparisons:
        print(f"{' x '.join(map(str, shape))}: differs by at most {difference:.1e}")
    if all(comparison.agrees for comparison in comparisons):
        return 0
    print(f"failed: {path} does not agree with the network", file=sys.stderr)
    return 1
