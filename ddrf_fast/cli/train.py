"""`ddrf-fast train`: trains DDRF-Net."""

import argparse
import os

from ddrf_fast.cli.options import Commands, common_options


def add_parser(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        parents=[common_options()],
        help="train DDRF-Net on data sets of pairs",
        description="Trains DDRF-Net on registered pairs, degraded at random. Settings come from the "
        "defaults, then from each FILE, then from each KEY=VALUE. Needs the extra 'train': "
        "pip install 'ddrf-fast[train]'.",
        epilog="Example: ddrf-fast train --config paper data=pairs/train output=runs/one. With several GPUs: "
        "torchrun --nproc-per-node 2 -m ddrf_fast train ... Ctrl-C writes a checkpoint and ends it.",
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
    train.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
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
    if int(os.environ.get("RANK", "0")) > 0:
        return 0  # the first process tells
    _, record = read_metadata(path)
    print(f"wrote {path} after {record['steps']} steps in {record['minutes']} minutes on {record['device']}")
    for name, value in record["validation"].items():
        print(f"  {name:28} {value:8.4f}")
    return 0
