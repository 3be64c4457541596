"""Draws results files: ddrf_fast against the best peer of every shape, and its distance from the roof.

    python -m benchmarks.plot benchmarks/results/*--dynamic_conv--*.json -o dynamic_conv.svg

Everything comes from the files, and the same files give the same SVG, byte for byte. Needs matplotlib, of the
`bench` extra.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results_schema
from benchmarks.registry import MODES
from benchmarks.report import OURS

ROW_INCHES, WIDTH_INCHES, MARGIN_INCHES = 0.3, 12.0, 1.1
AHEAD = {"fwd": "#4c9f70", "fwdbwd": "#2b5f8a", "step": "#5b4a91", "arrays": "#3f8f9b"}
LOST = {"fwd": "#e8855b", "fwdbwd": "#b3392f", "step": "#7d2248", "arrays": "#c9812b"}
STYLE = {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "ddrf_fast", "axes.axisbelow": True}


def draw(documents: Sequence[Mapping[str, Any]], target: Path) -> None:
    """One block of bars for each document, one below the other."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [len(_cases(document)) for document in documents]
    heights = [count * ROW_INCHES + MARGIN_INCHES for count in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
        axes = figure.subplots(
            len(documents), 2, squeeze=False, sharey="row", height_ratios=heights, width_ratios=(2, 1)
        )
        for pair, document in zip(axes, documents, strict=True):
            _draw_document(pair, document)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def _cases(document: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The records of ddrf_fast by case and mode."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in document["records"]:
        if record["provider"] == OURS:
            found.setdefault(record["case"], {})[record["mode"]] = record
    return found


def _draw_document(axes: Sequence[Any], document: Mapping[str, Any]) -> None:
    """The ratios on the left, the fractions of the roof on the right; a row a case, a bar a mode."""
    ratios, roofs = axes
    cases, metadata = _cases(document), document["metadata"]
    modes = [mode for mode in MODES if any(mode in by_mode for by_mode in cases.values())]
    thickness = 0.8 / max(len(modes), 1)
    for row, by_mode in enumerate(cases.values()):
        for mode, record in by_mode.items():
            place = row + (modes.index(mode) - (len(modes) - 1) / 2) * thickness
            ratio, roof = record["ratio_to_best_peer"], record["roof_fraction"]
            if ratio is not None:
                # From 1 to the ratio: a lost case points to the left, in another colour and with a cross.
                colour = (AHEAD if ratio >= 1 else LOST)[mode]
                ratios.barh(place, ratio - 1, thickness, left=1, color=colour)
                label = f"{ratio:.2f}" if ratio >= 1 else f"✗ {ratio:.2f}"
                _label(ratios, label, ratio, place, to_the_left=ratio < 1)
            elif record["status"] != "ok":
                _label(ratios, f"refused: {record['status']}", 1, place)
            if roof is not None:
                roofs.barh(place, roof, thickness, color=AHEAD[mode])
                _label(roofs, f"{roof:.2f}", roof, place)

    ratios.set_yticks(range(len(cases)), list(cases))
    ratios.set_ylim(len(cases) - 0.5, -0.5)
    known = [r["ratio_to_best_peer"] or 1 for by_mode in cases.values() for r in by_mode.values()]
    ratios.set_xscale("log", base=2)
    ratios.set_xlim(min([0.8, *known]) / 1.2, max([1.25, *known]) * 1.2)
    roofs.margins(x=0.12)
    ratios.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ratios.set_xlabel("time of the best peer / time of ddrf_fast (✗: slower than the best peer)")
    ratios.axvline(1, color="black", linewidth=1)
    roofs.set_xlabel("fraction of the roof")
    roofs.axvline(1, color="black", linewidth=1)
    for axis in axes:
        axis.grid(axis="x", color="#dddddd")
    for mode in modes:
        roofs.barh([0], [0], color=AHEAD[mode], label=mode)
        roofs.barh([0], [0], color=LOST[mode], label=f"{mode}, slower")
    roofs.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    options = metadata["options"]
    ratios.set_title(
        f"{metadata['op']}, {options['dtype']}\n{metadata['device_name']}, {metadata['threads']} threads",
        loc="left",
    )


def _label(axis: Any, text: str, x: float, y: float, to_the_left: bool = False) -> None:
    """Text beside the end of a bar."""
    axis.annotate(
        text,
        (x, y),
        xytext=(-3 if to_the_left else 3, 0),
        textcoords="offset points",
        ha="right" if to_the_left else "left",
        va="center",
        fontsize=6,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.svg|FILE.png")
    options = parser.parse_args(arguments)
    if options.output.suffix not in (".svg", ".png"):
        parser.error(f"--output must end in .svg or .png, got {options.output.name}")
    documents = [json.loads(path.read_text()) for path in options.results]
    for document in documents:
        results_schema.validate(document)
    draw(documents, options.output)


if __name__ == "__main__":
    main()
