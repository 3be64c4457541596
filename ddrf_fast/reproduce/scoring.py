"""Measures the results of a method on some pairs, and lays out the tables."""

import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddrf_fast import _tables
from ddrf_fast.evaluation import MethodScores, per_image
from ddrf_fast.metrics import MEASURES, evaluate
from ddrf_fast.models import DDRFNet, DDRFOutput
from ddrf_fast.reproduce.pairs import SourcePair, to_bytes

Results = Mapping[str, Tensor]


def results_of(fusion: Callable[[SourcePair], Tensor], pairs: Sequence[SourcePair]) -> dict[str, Tensor]:
    """What a method makes of some pairs, by their names."""
    return {pair.name: fusion(pair) for pair in pairs}


def by_network(
    model: DDRFNet, pair: SourcePair, device: torch.device, code: Tensor | None = None
) -> DDRFOutput:
    """The fused and the restored images that a network makes of a pair; uint8.

    Args:
        model: the network, on ``device``.
        pair: the images.
        device: where it runs.
        code: Tensor[1, D], how both images were degraded; None: blind.
    """
    images = (image.to(device).float() / 255 for image in (pair.visible, pair.infrared))
    with torch.inference_mode():
        output = model(*images, code, code)
    return DDRFOutput(*map(to_bytes, output))


def score(
    label: str, results: Results, pairs: Sequence[SourcePair], metrics: Sequence[str], device: torch.device
) -> MethodScores:
    """Measures fused images against the clean sources of their pairs."""
    scores = MethodScores(label)
    for pair in tqdm(pairs, desc=label, unit="image", file=sys.stderr, disable=None, leave=False):
        fused, visible, infrared = (
            image.to(device) for image in (results[pair.name], pair.clean_visible, pair.clean_infrared)
        )
        values = evaluate(fused, visible, infrared, metrics)
        scores.images[pair.name] = {name: value.item() for name, value in values.items()}
    return scores


def ranked(
    scores: Sequence[MethodScores], columns: Sequence[str], ranked_by: Sequence[str], ours: Collection[str]
) -> tuple[str, list[str]]:
    """A table of the means, best mean rank first and ours in bold, and the methods in that order."""
    means = {method.name: method.means() for method in scores}
    lower = [name for name in ranked_by if not MEASURES[name].higher_is_better]
    ranks = _tables.mean_ranks(
        {m: {name: row[name] for name in ranked_by} for m, row in means.items()}, lower
    )
    order = sorted(ranks, key=ranks.__getitem__)
    rows = [
        [f"**{m}**" if m in ours else m, *(means[m][name] for name in columns), f"{ranks[m]:.2f}"]
        for m in order
    ]
    return _tables.markdown(["method", *columns, "mean rank"], rows), order


def verdict(scores: Sequence[MethodScores], ours: str, others: Sequence[str], columns: Sequence[str]) -> str:
    """In a line, where our method stands among some others, by the mean rank of the columns and in each."""
    means = {method.name: method.means() for method in scores}
    ranks = _tables.mean_ranks({m: {c: means[m][c] for c in columns} for m in (ours, *others)})
    place = 1 + sum(rank < ranks[ours] for rank in ranks.values())
    below = [c for c in columns if means[ours][c] < statistics.median(means[m][c] for m in others)]
    best = [c for c in columns if means[ours][c] > max(means[m][c] for m in others)]
    return (
        f"Among the {len(others)} methods given, {ours} has the mean rank {ranks[ours]:.2f}, "
        f"place {place} of {len(ranks)}: best in {', '.join(best) or 'nothing'}; "
        f"below their median in {', '.join(below) or 'nothing'}."
    )


def write_values(path: Path, scores: Sequence[MethodScores]) -> None:
    """The values of each image as CSV."""
    _tables.write_csv(path, *per_image(scores))
