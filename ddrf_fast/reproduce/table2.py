"""Table 2: time of a 400x400 pair and size of the model, of what is in the package."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ddrf_fast import _tables
from ddrf_fast.models.classical import CLASSICAL_FUSIONS
from ddrf_fast.reproduce import paper
from ddrf_fast.reproduce.settings import Settings

_REPETITIONS = 10


def run(settings: Settings) -> str:
    """Measures, and writes ``table2.csv``.

    Returns:
        Markdown: ours, the classical fusions, and what the paper prints.
    """
    device = settings.torch_device
    pair = torch.rand(2, 1, 1, 400, 400, generator=torch.Generator().manual_seed(0)).to(device)
    model = settings.fuser.model
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    rows: list[list[object]] = [["DDRF-Net", _seconds(lambda *pair: model(*pair).fused, pair), size]]
    rows += [[name, _seconds(fusion, pair), 0.0] for name, fusion in CLASSICAL_FUSIONS.items()]
    header = ["method", "seconds", "megabytes"]
    if settings.output is not None:
        _tables.write_csv(settings.output / "table2.csv", header, rows)
    printed = [
        [name, *("" if value is None else f"{value:g}" for value in values)]
        for name, values in paper.TABLE_2.items()
    ]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return "\n\n".join(
        (
            "## Table 2: time and size",
            f"Median of {_REPETITIONS} runs on a pair of 400x400 on {device}{threads}:",
            _tables.markdown(header, rows),
            "The paper's, on an RTX 2070:",
            _tables.markdown(header, printed),
        )
    )


def _seconds(fusion: Callable[[Tensor, Tensor], Tensor], pair: Tensor) -> float:
    def once() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            fusion(pair[0], pair[1])
        if pair.is_cuda:
            torch.cuda.synchronize(pair.device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(_REPETITIONS))
