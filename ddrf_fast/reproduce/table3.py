"""Table 3: fusion of clean pairs, and of the same pairs degraded."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from torch import Tensor

from ddrf_fast.models.classical import CLASSICAL_FUSIONS, Fusion
from ddrf_fast.reproduce import paper
from ddrf_fast.reproduce.denoise import non_local_means
from ddrf_fast.reproduce.figures import write_grid
from ddrf_fast.reproduce.pairs import (
    SourcePair,
    clean_pairs,
    degraded_pairs,
    given_methods,
    given_results,
    to_bytes,
)
from ddrf_fast.reproduce.scoring import by_network, ranked, results_of, score, verdict, write_values
from ddrf_fast.reproduce.settings import Settings

SETS = ("tno", "roadscene", "msrs")
OURS = "DDRF-Net"
TOLD = "DDRF-Net, told that they are clean"  # blind otherwise
COLUMNS = ("EN", "AG", "SSIM", "VIF", "PSNR", "Mean", "VIFF", "Qabf")
CLEAN_RANKED_BY = ("EN", "AG", "SSIM", "VIF", "VIFF", "Qabf")
# Noise raises EN and AG, so that they say nothing of degraded pairs.
DEGRADED_RANKED_BY = ("SSIM", "VIF", "VIFF", "PSNR")
SHOWN_PAIRS = 3
NONE_GIVEN = "No results of other methods are given for this set."


def run(settings: Settings) -> str:
    """Fuses and measures, and writes ``table3_SET.csv``, ``table3_SET_degraded.csv`` and pictures.

    Returns:
        Markdown: a table for each set, clean and degraded, and what the paper prints.
    """
    parts = ["## Table 3: fusion"]
    for name in settings.chosen(SETS):
        pairs = clean_pairs(settings.data, name, settings.limit)
        parts.append(f"### {name}, {len(pairs)} clean pairs")
        parts += _table(settings, name, pairs, CLEAN_RANKED_BY, clean=True)
        pairs, how = degraded_pairs(settings.data, name, settings.limit)
        parts.append(
            f"### {name}, the same {len(pairs)} pairs degraded ({how}), measured against the clean ones"
        )
        parts += _table(settings, f"{name}_degraded", pairs, DEGRADED_RANKED_BY, clean=False)
    for title, rows in (("FLIR", paper.TABLE_3_FLIR), ("RGBT", paper.TABLE_3_RGBT)):
        parts += paper.printed(title, rows)
    return "\n\n".join(parts)


def _table(
    settings: Settings,
    name: str,
    pairs: Sequence[SourcePair],
    ranked_by: Sequence[str],
    *,
    clean: bool,
) -> list[str]:
    """The table of one set in Markdown and the verdicts; degraded pairs are also fused after denoising."""
    given = [path.name for path in given_methods(settings.data, name)]
    results = {method: given_results(settings.data / "baselines" / name / method, pairs) for method in given}
    for method, fusion in CLASSICAL_FUSIONS.items():
        results[method] = results_of(_classical(fusion), pairs)
    if not clean:
        cleaned = [
            pair._replace(
                visible=non_local_means(pair.visible, pair.scale),
                infrared=non_local_means(pair.infrared, pair.scale),
            )
            for pair in pairs
        ]
        for method, fusion in CLASSICAL_FUSIONS.items():
            results[f"{method} of denoised"] = results_of(_classical(fusion), cleaned)
    device = settings.torch_device
    model = settings.fuser.model
    ours = {OURS: None, TOLD: settings.fuser.network.encode(noise_std=0.0)} if clean else {OURS: None}
    for method, code in ours.items():
        results[method] = {pair.name: by_network(model, pair, device, code).fused for pair in pairs}
    scores = [score(method, images, pairs, COLUMNS, device) for method, images in results.items()]
    table, order = ranked(scores, COLUMNS, ranked_by, ours)
    if settings.output is not None:
        write_values(settings.output / f"table3_{name}.csv", scores)
        shown = [*_first(order, given), *_first(order, set(results) - {*ours, *given}), OURS]
        _picture(settings.output / f"table3_{name}.png", pairs, {method: results[method] for method in shown})
    verdicts = [verdict(scores, method, given, ranked_by) for method in ours] if given else [NONE_GIVEN]
    return [table, " ".join([f"Ranked by {', '.join(ranked_by)}.", *verdicts])]


def _classical(fusion: Fusion) -> Callable[[SourcePair], Tensor]:
    return lambda pair: to_bytes(fusion(pair.visible.float() / 255, pair.infrared.float() / 255))


def _first(order: Sequence[str], wanted: Collection[str]) -> list[str]:
    """The best of some methods, if there are any."""
    return [method for method in order if method in wanted][:1]


def _picture(path: Path, pairs: Sequence[SourcePair], results: dict[str, dict[str, Tensor]]) -> None:
    step = max(len(pairs) // SHOWN_PAIRS, 1)
    write_grid(
        path,
        [
            {"visible": pair.visible, "infrared": pair.infrared}
            | {method: images[pair.name] for method, images in results.items()}
            for pair in pairs[::step][:SHOWN_PAIRS]
        ],
    )
