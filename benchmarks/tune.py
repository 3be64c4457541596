"""Measures the tile tables of the Triton kernels on this GPU, and prints them to be pasted.

    python -m benchmarks.tune dynamic_conv                                # all tables, all kinds: long
    python -m benchmarks.tune dynamic_conv --table FUSED_TILES --kind half
    python -m benchmarks.tune dynamic_conv --paths --filter "B8 N4"       # mixed once against in registers

Nothing is tuned when ddrf_fast is imported or runs: its tables (kernels/_conv_plan.py) are constants by
architecture, and this is what they come from. For each table and kind, every candidate runs the benchmark's
shapes, in turn, as CUDA graphs and on inputs that stay in the cache; the one with the least geometric mean of
its times, relative to the tile that the table has now, is printed. A candidate that does not compile or does
not fit is left out, and so are shapes that do not take the table's kernel.

`--paths` times every shape with its kernels mixed once and in registers, forward and backward, and prints
both beside what the byte count chose: with it, LAUNCH_BYTES, MIX_BYTES and GATHER_BYTES can be judged.
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.registry import LAYOUTS, Case, Setting, load
from ddrf_fast._measuring import time_in_turn

# What has to be set for a kind of product.
SETTINGS = {
    "half": Setting("cuda", "bfloat16", "channels_last"),
    "scattered": Setting("cuda", "bfloat16", "nchw"),
    "tf32": Setting("cuda", "tf32", "nchw"),
    "ieee": Setting("cuda", "float32", "nchw"),
}
# The kernel that each table is for, what makes the byte count choose it, and in which pass it is measured.
IN_REGISTERS, ONCE = 1 << 60, -1 << 60
TABLES = {
    "FORWARD_TILES": ("_conv_dot_kernel", ONCE, "forward"),
    "FUSED_TILES": ("_conv_fused_kernel", IN_REGISTERS, "forward"),
    "WEIGHT_TILES": ("_weight_dot_kernel", ONCE, "backward"),
    "BANK_TILES": ("_bank_dot_kernel", IN_REGISTERS, "backward"),
}
BLOCKS = {
    "FORWARD_TILES": ((64, 64), (128, 64), (64, 128), (128, 128), (256, 64), (64, 32)),
    "FUSED_TILES": ((64, 64), (64, 32), (128, 32), (128, 64), (32, 64)),
    "WEIGHT_TILES": ((64, 64), (64, 128), (128, 64), (128, 128), (32, 64)),
    "BANK_TILES": ((64, 32), (32, 32), (64, 16), (64, 64), (32, 64)),
}
WARPS_AND_STAGES = ((4, 2), (4, 3), (8, 2), (8, 3))
DEPTHS = {"half": (32, 64), "scattered": (32, 64), "tf32": (16, 32), "ieee": (16, 32)}


@dataclass(frozen=True)
class Call:
    """One shape of the benchmark, as arguments of the raw operators."""

    name: str
    arguments: tuple[Any, ...]
    gradient: torch.Tensor

    def run(self, which: str) -> Any:
        from ddrf_fast.kernels import dynamic_conv

        if which == "forward":
            return dynamic_conv.dynamic_conv(*self.arguments)
        # Not x's gradient, which is the forward's kernel.
        mask = sum(1 << i for i, t in enumerate(self.arguments[:8]) if t is not None and i)
        return dynamic_conv.dynamic_conv_backward(self.gradient, *self.arguments[:-1], mask)

    def kernels(self, which: str) -> set[str]:
        """The names of the kernels that it launches."""
        from ddrf_fast.kernels import _common

        with _common.record(_common.architecture(self.gradient.device)) as launches:
            self.run(which)
        return {launch.kernel.__name__ for launch in launches}


def candidates(table: str, kind: str, current: Any) -> list[Any]:
    """The tiles to try: the one that the table has, first, and its neighbours."""
    tiles = [current]
    for block_m, block_n in BLOCKS[table]:
        for block_k in DEPTHS[kind]:
            for warps, stages in WARPS_AND_STAGES:
                tile = type(current)(block_m, block_n, block_k, warps, stages)
                if tile not in tiles:
                    tiles.append(tile)
    return tiles


def calls(setting: Setting, text: str) -> Iterator[Call]:
    """The benchmark's shapes whose name contains `text`."""
    from ddrf_fast.ops.dynamic_conv import arguments

    operation = load("dynamic_conv")
    for case in operation.cases:
        if text in case.name:
            yield _call(case, setting, operation.inputs(case, setting, 0), arguments)


def _call(case: Case, setting: Setting, t: dict[str, Any], arguments: Callable[..., tuple[Any, ...]]) -> Call:
    raw = arguments(
        t["x"].contiguous(memory_format=LAYOUTS[setting.layout]), t["weight"], t["attention"], t.get("bias"),
        stride=case.stride, padding=case.padding, groups=case.groups, code=t.get("code"),
        activation=None if case.activation == "none" else case.activation,
    )  # fmt: skip
    size = [(s + 2 * case.padding - case.k) // case.stride + 1 for s in (case.H, case.W)]
    gradient = torch.randn((case.B, case.O, *size), dtype=setting.torch_dtype, device=setting.device)
    return Call(case.name, raw, gradient.contiguous(memory_format=LAYOUTS[setting.layout]))


@contextlib.contextmanager
def mixing(launch_bytes: int) -> Iterator[None]:
    """Within it, the byte count always comes out the same way."""
    from ddrf_fast.kernels import _conv_plan

    _conv_plan.forget_choices()
    try:
        with mock.patch.object(_conv_plan, "LAUNCH_BYTES", launch_bytes):
            yield
    finally:
        _conv_plan.forget_choices()


def _step(call: Call, which: str, context: Callable[[], Any], device: str) -> Callable[[int], object]:
    """The call within this context, compiled; on a GPU as a graph, so that choosing costs no time."""
    with context():
        call.run(which)
        if device != "cuda":
            return lambda _: call.run(which)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call.run(which)
    return lambda _: graph.replay()


def _timed(
    call: Call, which: str, contexts: Mapping[str, Callable[[], Any]], device: str, seconds: float
) -> dict[str, float]:
    """Milliseconds of the call within each of these contexts; those in which it cannot run are left out."""
    steps = {}
    for name, context in contexts.items():
        try:
            steps[name] = _step(call, which, context, device)
        except Exception as error:  # whatever the compiler or the driver refuses a tile with
            print(f"    {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return {name: t.median_ms for name, t in time_in_turn(steps, device, seconds).items()}


def best_tile(table: str, kind: str, shapes: list[Call], arch: str, device: str, seconds: float) -> Any:
    """The candidate with the least geometric mean over the shapes that take the table's kernel."""
    from ddrf_fast.kernels import _conv_plan

    kernel, launch_bytes, which = TABLES[table]
    row = getattr(_conv_plan, table)[arch]
    current = row[kind]

    def using(tile: Any) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(mixing(launch_bytes))
        stack.enter_context(mock.patch.dict(row, {kind: tile}))
        return stack

    with mixing(launch_bytes):
        shapes = [call for call in shapes if kernel in call.kernels(which)]
    tiles = {str(tuple(tile)): tile for tile in candidates(table, kind, current)}
    logs: dict[str, list[float]] = {name: [] for name in tiles}
    for call in shapes:
        times = _timed(call, which, {n: partial(using, tile) for n, tile in tiles.items()}, device, seconds)
        first = times.get(str(tuple(current)))
        for name, value in times.items():
            logs[name].append(math.log(value / first) if first else math.inf)
        fastest = min(times, key=times.__getitem__, default="none runs")
        print(f"  {table} {kind} {call.name}: {fastest}", flush=True)
    everywhere = {name: sum(v) / len(v) for name, v in logs.items() if v and len(v) == len(shapes)}
    best = min(everywhere, key=everywhere.__getitem__, default=str(tuple(current)))
    print(
        f"{table} {kind}: {best}, {math.exp(everywhere.get(best, 0.0)):.3f} of the time of {tuple(current)}"
    )
    return tiles[best]


def render(table: str, arch: str, row: dict[str, Any]) -> str:
    """A row of a table as it is written in the source."""
    lines = [f'        "{kind}": Tile{tuple(tile)},' for kind, tile in row.items()]
    return "\n".join([f"# {table}", f'    "{arch}": {{', *lines, "    },"])


def compare_paths(shapes: list[Call], device: str, seconds: float) -> None:
    """Every shape with its kernels mixed once and in registers, beside what the byte count chose."""
    for call in shapes:
        for which, in_registers in (
            ("forward", {"_conv_fused_kernel"}),
            ("backward", {"_bank_dot_kernel"}),
        ):
            chosen = call.kernels(which) & in_registers
            with mixing(IN_REGISTERS):
                if not call.kernels(which) & in_registers:
                    continue
            ways = {"once": partial(mixing, ONCE), "in registers": partial(mixing, IN_REGISTERS)}
            times = _timed(call, which, ways, device, seconds)
            told = ", ".join(f"{name} {1e3 * value:.1f} us" for name, value in times.items())
            print(f"{call.name} {which}: {told}; chosen: {'in registers' if chosen else 'once'}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=("dynamic_conv",))
    parser.add_argument("--table", choices=TABLES, action="append", help="default: all")
    parser.add_argument("--kind", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--paths", action="store_true", help="mixed once against in registers, no tiles")
    parser.add_argument("--filter", default="B8 N4", metavar="TEXT", help="shapes; default: %(default)s")
    parser.add_argument("--min-time", type=float, default=0.02, metavar="S", help="seconds a measurement")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the tables go, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")

    from ddrf_fast.kernels import _common, _conv_plan

    arch = _common.architecture(torch.device("cuda"))
    text = []
    for kind in options.kind or SETTINGS:
        setting = SETTINGS[kind]
        torch.backends.cudnn.allow_tf32 = setting.dtype == "tf32"
        shapes = list(calls(setting, options.filter))
        if options.paths:
            print(f"== {kind}")
            compare_paths(shapes, "cuda", options.min_time)
            continue
        for table in options.table or TABLES:
            row = getattr(_conv_plan, table)[arch]
            row[kind] = best_tile(table, kind, shapes, arch, "cuda", options.min_time)
    if not options.paths:
        text = [render(table, arch, getattr(_conv_plan, table)[arch]) for table in options.table or TABLES]
        print(f"# {torch.cuda.get_device_name()}", *text, sep="\n")
    if options.write and text:
        options.write.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
