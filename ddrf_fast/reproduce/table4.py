"""Table 4: restoration of degraded images, by H1 (visible), H2 (infrared) and H3 (the fusion).

The visible branch restores the visible image, the infrared branch the infrared one; for H3 both inputs are
the same image, as in the paper, and the fused one is its restoration. "Told" networks are given the code of
the degradation, "blind" ones have to estimate it. What is "refined" is corrected until the degradation, the
known one or what was found of its blur, makes the degraded image of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddrf_fast import _tables
from ddrf_fast.degradation import DynamicDegradation, refine
from ddrf_fast.evaluation import MethodScores
from ddrf_fast.inference import Restorer
from ddrf_fast.metrics import RESTORATION_METRICS, evaluate_restored
from ddrf_fast.models import DDRFNet
from ddrf_fast.models.tone import with_tone
from ddrf_fast.reproduce import paper
from ddrf_fast.reproduce.denoise import non_local_means
from ddrf_fast.reproduce.figures import write_grid
from ddrf_fast.reproduce.pairs import (
    Degraded,
    SourcePair,
    clean_pairs,
    degrade,
    degraded_pairs,
    to_bytes,
)
from ddrf_fast.reproduce.scoring import write_values
from ddrf_fast.reproduce.settings import Settings

SETS = ("gun", "tno")
DEGRADATIONS: dict[str, Callable[[], DynamicDegradation]] = {
    "noise": lambda: DynamicDegradation("paper", sharp_fraction=1.0, noise_std=(5 / 255, 25 / 255)),
    "blur": lambda: DynamicDegradation("paper", spatial=True, noise_std=(0.0, 0.0)),
    "blur and noise": lambda: DynamicDegradation("paper", spatial=True, noise_std=(5 / 255, 25 / 255)),
    "down-sampling": lambda: DynamicDegradation("paper", spatial=True, scale=2, noise_std=(0.0, 5 / 255)),
    "low light": lambda: DynamicDegradation("low_light", dark_fraction=1.0, noise_std=(0.0, 5 / 255)),
}
"""How the images are degraded; down-sampled ones are brought back to their size by cubic interpolation."""


class Sample(NamedTuple):
    """An image to restore: uint8 Tensor[1, 1, H, W] each, and how it was degraded, where that is known."""

    name: str
    modality: str
    clean: Tensor
    degraded: Tensor
    known: Degraded | None


def run(settings: Settings) -> str:
    """Restores and measures, and writes ``table4_SET.csv`` and a picture for each degradation.

    Returns:
        Markdown: a table for each set and degradation, and what the paper prints.
    """
    parts = ["## Table 4: restoration"]
    restorer = Restorer(settings.fuser.network, color="gray", refine=True)
    for name in settings.chosen(SETS):
        pairs = clean_pairs(settings.data, name, settings.limit)
        written = []
        for kind, samples in _degradations(settings, name, pairs):
            restored = {sample: _restored(sample, settings, restorer) for sample in samples}
            scores = _scores(restored, settings.torch_device)
            parts += [f"### {name}, {len(pairs)} pairs, {kind}", _table(scores)]
            written += [MethodScores(f"{kind}: {method}", images.images) for method, images in scores.items()]
            if settings.output is not None:
                shown = [sample for sample in samples if sample.name == pairs[len(pairs) // 2].name]
                path = settings.output / f"table4_{name}_{kind.replace(' ', '_')}.png"
                write_grid(path, [{"clean": sample.clean} | dict(restored[sample]) for sample in shown])
        if settings.output is not None:
            write_values(settings.output / f"table4_{name}.csv", written)
    for title, rows in (("Gun", paper.TABLE_4_GUN), ("TNO", paper.TABLE_4_TNO)):
        parts += paper.printed(title, rows)
    return "\n\n".join(parts)


def _degradations(
    settings: Settings, name: str, pairs: Sequence[SourcePair]
) -> Iterator[tuple[str, list[Sample]]]:
    """Some pairs degraded in each way, also as in the folder ``SET_degraded`` where there is one."""
    for kind, make in DEGRADATIONS.items():
        degradation = make()
        samples = []
        for index, pair in enumerate(pairs):
            for offset, modality in enumerate(("visible", "infrared")):
                clean = getattr(pair, f"clean_{modality}")
                degraded = degrade(degradation, clean, 2 * index + offset)
                samples.append(Sample(pair.name, modality, clean, degraded.enlarged(clean), degraded))
        yield kind, samples
    if (settings.data / f"{name}_degraded" / "test").is_dir():
        given, how = degraded_pairs(settings.data, name, settings.limit)
        yield (
            how.replace("`", ""),
            [
                Sample(pair.name, modality, getattr(pair, f"clean_{modality}"), getattr(pair, modality), None)
                for pair in given
                for modality in ("visible", "infrared")
            ],
        )


def _restored(sample: Sample, settings: Settings, restorer: Restorer) -> dict[str, Tensor]:
    """The degraded image, and what each method makes of it: name -> uint8 Tensor[1, 1, H, W]."""
    scale = 1 if sample.known is None else sample.known.recipe.scale
    results = {"degraded": sample.degraded, "non-local means": non_local_means(sample.degraded, scale)}
    image = sample.degraded.to(settings.torch_device).float() / 255
    model = settings.fuser.model
    results |= _by_network(model, image, sample.modality, None, "blind")
    visible = sample.modality == "visible"
    refined = restorer(sample.degraded) if visible else restorer(infrared=sample.degraded)
    results["H1/H2 blind, refined"] = refined.cpu()
    if sample.known is None:
        return results
    observed, recipe = sample.known
    code = settings.fuser.network.codes(recipe)
    if recipe.tone is not None:
        code = with_tone(code, recipe.tone)
    results |= _by_network(model, image, sample.modality, code.to(image.device), "told")
    if recipe.tone is None:
        told = results["H1/H2 told"].to(image.device).float() / 255
        corrected = refine(told, observed.to(image.device).float() / 255, recipe)
        results["H1/H2 told, refined"] = to_bytes(corrected)
    return results


def _by_network(
    model: DDRFNet, image: Tensor, modality: str, code: Tensor | None, how: str
) -> Mapping[str, Tensor]:
    with torch.inference_mode():
        output = model(image, image, code, code)
    return {f"H1/H2 {how}": to_bytes(getattr(output, modality)), f"H3 {how}": to_bytes(output.fused)}


def _scores(restored: Mapping[Sample, Mapping[str, Tensor]], device: torch.device) -> dict[str, MethodScores]:
    """Of each method, the measures of each image; images are named by pair and modality."""
    scores: dict[str, MethodScores] = {}
    for sample, results in restored.items():
        for method, image in results.items():
            values = evaluate_restored(image.to(device), sample.clean.to(device))
            of_method = scores.setdefault(method, MethodScores(method))
            of_method.images[f"{sample.name} {sample.modality}"] = {n: v.item() for n, v in values.items()}
    return scores


def _table(scores: Mapping[str, MethodScores]) -> str:
    header = ["method", *(f"{m} {name}" for m in ("visible", "infrared") for name in RESTORATION_METRICS)]
    rows = []
    for method, of_method in scores.items():
        row: list[object] = [method]
        for modality in ("visible", "infrared"):
            images = [values for name, values in of_method.images.items() if name.endswith(f" {modality}")]
            row += _tables.means(images).values()
        rows.append(row)
    return _tables.markdown(header, rows)
