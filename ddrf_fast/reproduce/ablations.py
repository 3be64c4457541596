"""Fig. 7 (static against dynamic) and Fig. 8 (the losses) as tables, from trainings of one's own."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ddrf_fast import _tables
from ddrf_fast.evaluation import MethodScores
from ddrf_fast.metrics import RESTORATION_METRICS, evaluate_restored
from ddrf_fast.models import DDRFNet, DDRFOutput, load_model
from ddrf_fast.reproduce.figures import write_grid
from ddrf_fast.reproduce.pairs import SourcePair, clean_pairs, degraded_pairs
from ddrf_fast.reproduce.scoring import by_network, score, write_values
from ddrf_fast.reproduce.settings import Settings

SETS = ("tno",)
CLEAN_METRICS = ("AG", "SSIM", "VIF", "VIFF", "Qabf")
DEGRADED_METRICS = ("SSIM", "VIF", "VIFF", "PSNR")
WEIGHTS = "ddrfnet.safetensors"

# Experiment -> what it is, and the presets of `ddrf-fast train` that train it.
STATIC_DYNAMIC = {
    "static_restore0": ("static, restoration loss alone", ("paper", "static", "restoration")),
    "dynamic_restore0": ("dynamic, restoration loss alone", ("paper", "restoration")),
    "static_restore1": ("static, restoration and fusion", ("paper", "static")),
    "dynamic_restore1": ("dynamic, restoration and fusion", ("paper",)),
}
LOSSES = {
    "fig8_a": ("static, similarity, no restoration", ("paper", "fig8_a")),
    "fig8_b": ("dynamic, similarity, no restoration", ("paper", "fig8_b")),
    "fig8_c": ("static, similarity, restoration in 10 epochs", ("paper", "fig8_c")),
    "fig8_d": ("static, similarity, joint restoration", ("paper", "fig8_d")),
    "fig8_e": ("static, eq. 10, joint restoration", ("paper", "fig8_e")),
    "fig8_f": ("dynamic, similarity, restoration in 10 epochs", ("paper", "fig8_f")),
    "fig8_g": ("dynamic, similarity, joint restoration", ("paper", "fig8_g")),
    "fig8_h": ("dynamic, eq. 10, joint restoration", ("paper", "fig8_h")),
}
Experiments = Mapping[str, tuple[str, tuple[str, ...]]]


def static_dynamic(settings: Settings) -> str:
    """Fig. 7: restoration alone (restore_0), restoration with fusion (restore_1), and fusion."""
    return _run(settings, "static-dynamic", "Fig. 7: static against dynamic", STATIC_DYNAMIC)


def losses(settings: Settings) -> str:
    """Fig. 8: the eight experiments (a) to (h)."""
    return _run(settings, "losses", "Fig. 8: losses and architecture", LOSSES)


def _run(settings: Settings, name: str, title: str, experiments: Experiments) -> str:
    """The tables in Markdown; writes ``NAME_SET.csv`` and a picture.

    Raises:
        ValueError: no folder of trainings is given, or none of the experiments is in it.
    """
    if settings.runs is None:
        raise ValueError(f"{name} compares trainings: give their folder with --runs")
    models = {
        experiment: load_model(settings.runs / experiment / WEIGHTS, device=settings.torch_device)
        for experiment in experiments
        if (settings.runs / experiment / WEIGHTS).is_file()
    }
    missing = [experiment for experiment in experiments if experiment not in models]
    commands = [
        f"ddrf-fast train {' '.join(f'--config {preset}' for preset in experiments[experiment][1])} "
        f"data=DIR output={settings.runs / experiment}"
        for experiment in missing
    ]
    if not models:
        raise ValueError(
            f"{settings.runs} holds none of {', '.join(experiments)}; train them as: {commands[0]}"
        )
    parts = [f"## {title}"]
    for set_name in settings.chosen(SETS):
        clean = clean_pairs(settings.data, set_name, settings.limit)
        degraded, how = degraded_pairs(settings.data, set_name, settings.limit)
        parts.append(f"### {set_name}, {len(clean)} pairs, degraded {how}")
        parts.append(_table(settings, f"{name}_{set_name}", experiments, models, clean, degraded))
    if missing:
        parts.append("Not trained yet:\n\n```sh\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts)


def _table(
    settings: Settings,
    file_name: str,
    experiments: Experiments,
    models: Mapping[str, DDRFNet],
    clean: Sequence[SourcePair],
    degraded: Sequence[SourcePair],
) -> str:
    device = settings.torch_device
    # Their fusion is not looked at.
    untouched = {pair.name: DDRFOutput(pair.visible, pair.visible, pair.infrared) for pair in degraded}
    header = [
        "experiment",
        *(f"restored {metric}" for metric in RESTORATION_METRICS),
        *(f"clean {metric}" for metric in CLEAN_METRICS),
        *(f"degraded {metric}" for metric in DEGRADED_METRICS),
    ]
    inputs = _restoration(untouched, degraded, settings)
    blanks = [""] * (len(CLEAN_METRICS) + len(DEGRADED_METRICS))
    rows: list[list[object]] = [["the degraded images", *inputs.means().values(), *blanks]]
    values = [MethodScores("degraded images: restored", inputs.images)]
    pictures: list[dict[str, Tensor]] = [
        {"degraded": degraded[0].visible},
        {"degraded": degraded[0].infrared},
    ]
    for experiment, model in models.items():
        of_clean = {pair.name: by_network(model, pair, device).fused for pair in clean}
        of_degraded = {pair.name: by_network(model, pair, device) for pair in degraded}
        fused = {pair: output.fused for pair, output in of_degraded.items()}
        scores = {
            "restored": _restoration(of_degraded, degraded, settings),
            "clean": score(experiment, of_clean, clean, CLEAN_METRICS, device),
            "degraded": score(experiment, fused, degraded, DEGRADED_METRICS, device),
        }
        means = [mean for part in scores.values() for mean in part.means().values()]
        rows.append([f"{experiment}: {experiments[experiment][0]}", *means])
        values += [MethodScores(f"{experiment}: {part}", of.images) for part, of in scores.items()]
        pictures[0][experiment] = of_degraded[degraded[0].name].visible
        pictures[1][experiment] = of_degraded[degraded[0].name].fused
    if settings.output is not None:
        write_values(settings.output / f"{file_name}.csv", values)
        write_grid(settings.output / f"{file_name}.png", pictures)
    return _tables.markdown(header, rows)


def _restoration(
    outputs: Mapping[str, DDRFOutput], pairs: Sequence[SourcePair], settings: Settings
) -> MethodScores:
    """Both restored images of each pair against the clean ones."""
    scores = MethodScores("restored")
    for pair in pairs:
        output = outputs[pair.name]
        for modality, restored, clean in (
            ("visible", output.visible, pair.clean_visible),
            ("infrared", output.infrared, pair.clean_infrared),
        ):
            values = evaluate_restored(restored.to(settings.torch_device), clean.to(settings.torch_device))
            scores.images[f"{pair.name} {modality}"] = {name: v.item() for name, v in values.items()}
    return scores
