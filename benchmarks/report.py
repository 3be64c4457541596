"""What a run says: a table per case, and the summary with the geometric mean."""

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.registry import MODES, Case, Setting
from benchmarks.results_schema import geometric_mean

OURS = "ddrf_fast"
# What the names of providers begin with that run a network without dynamic convolutions.
STATIC = "static_"


def short(values: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than any timing has, and JSON has no infinity."""

    def shorten(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.5g}") if math.isfinite(value) else None

    return {key: shorten(value) for key, value in values.items()}


def summarise(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per mode and for all: how ddrf_fast stands to the best peer, over all cases and over groups of them;
    and its throughput relative to the static network's, where there is one."""
    summary = {}
    for mode in (*MODES, "all"):
        in_mode = [r for r in records if mode in (r["mode"], "all")]
        ours = [r for r in in_mode if r["provider"] == OURS]
        if not ours:
            continue
        ranked = [r for r in ours if r["ratio_to_best_peer"] is not None]
        groups = defaultdict(list)
        for record in ranked:
            for name in _groups(record["shape"]):
                groups[name].append(record)
        summary[mode] = _figures(ranked) | {
            "refused": sum(r["status"] != "ok" for r in ours),
            "groups": {name: _figures(members) for name, members in groups.items()},
            "to_static": short(_to_static(in_mode)),
        }
    return summary


def _groups(shape: Mapping[str, Any]) -> list[str]:
    groups = [shape["family"]] if "family" in shape else []
    return [*groups, "with code"] if shape.get("code") else groups


def _figures(ranked: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [r["ratio_to_best_peer"] for r in ranked]
    worst = min(ranked, key=lambda r: r["ratio_to_best_peer"], default=None)
    return short(
        {
            "geometric_mean": geometric_mean(ratios),
            "cases": len(ratios),
            "slower_than_best_peer": sum(ratio < 1 for ratio in ratios),
            "below_0.9": sum(ratio < 0.9 for ratio in ratios),
            "worst": worst and worst["ratio_to_best_peer"],
            "worst_case": worst and f"{worst['case']} {worst['mode']}",
        }
    )


def _to_static(records: list[dict[str, Any]]) -> dict[str, float]:
    """By case: the best time of the static network over that of ddrf_fast."""
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for r in records:
        if r["median_ms"] is not None:
            times[f"{r['case']} {r['mode']}"][r["provider"]] = r["median_ms"]
    found = {}
    for case, by_provider in times.items():
        static = [time for name, time in by_provider.items() if name.startswith(STATIC)]
        if static and OURS in by_provider:
            found[case] = min(static) / by_provider[OURS]
    return found


def print_case(case: Case, setting: Setting, records: list[dict[str, Any]], bound: str) -> None:
    """One table, the fastest first."""
    kind = f"{setting.mode} {setting.dtype} {setting.device}"
    memory = "proc. MiB" if setting.whole_process else "peak MiB"
    print(f"\n{case.name}  [{kind}]  roof {records[0]['roof_ms']:.4g} ms ({bound})")
    print(
        f"{'':32} {'median ms':>10} {'IQR':>8} {'samples/s':>9} {'of roof':>8} {'to best peer':>12} "
        f"{memory:>9}{' saved MiB' if setting.backward else ''}"
    )
    for r in sorted(records, key=lambda r: r["median_ms"] or float("inf")):
        name = f"{'* ' if r['provider'] == OURS else '  '}{r['provider']}"
        if r["median_ms"] is None:
            print(f"{name:32} {r['status'].upper()}: {r['detail']}")
            continue
        saved = f" {_or_dash(r['saved_memory_mib'], '9.1f')}" if setting.backward else ""
        note = "" if r["peer"] or r["provider"] == OURS else "  (not ranked)"
        if note and r["computes"] != r["op"]:
            note = f"  (not ranked: another method, {r['computes']})"
        print(
            f"{name:32} {r['median_ms']:10.4g} {r['iqr_ms']:8.2g} {r['samples_per_s']:9.5g} "
            f"{r['roof_fraction']:8.2f} {_or_dash(r['ratio_to_best_peer'], '12.2f')} "
            f"{_or_dash(r['peak_memory_mib'], '9.1f')}{saved}{note}"
        )
    sys.stdout.flush()


def _or_dash(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def summary_table(summary: dict[str, dict[str, Any]]) -> str:
    """A block per mode: all cases, the groups, the static network."""
    lines = [
        f"\n{'ddrf_fast to the best peer':26} {'gmean':>6} {'cases':>5} {'slower':>6} {'< 0.9':>5}  worst"
    ]
    for mode, s in summary.items():
        for name, figures in ({mode: s} | {f"  {group}": f for group, f in s["groups"].items()}).items():
            if figures["geometric_mean"] is not None:
                lines.append(
                    f"{name:26} {figures['geometric_mean']:6.2f} {figures['cases']:5} "
                    f"{figures['slower_than_best_peer']:6} {figures['below_0.9']:5}  "
                    f"{figures['worst']:.2f}: {figures['worst_case']}"
                )
    for case, ratio in summary.get("all", {}).get("to_static", {}).items():
        lines.append(f"throughput relative to the static network: {ratio:.3f}  {case}")
    return "\n".join(lines)


def target_table(targets: Sequence[Mapping[str, Any]]) -> str:
    """A line for each target."""
    lines = [f"\n{'target':7} {'reached':>8}    {'limit':<6}"]
    for t in targets:
        lines.append(
            f"{'met' if t['met'] else 'MISSED':7} {t['value']:8.4g} {'<=' if t['at_most'] else '>='} "
            f"{t['limit']:<6g} {t['figure']}: {t['case']}"
        )
    return "\n".join(lines)


def summary_line(summary: dict[str, dict[str, Any]]) -> str:
    """The last line of the output."""
    parts = []
    for mode, s in summary.items():
        if s["geometric_mean"] is None:
            parts.append(f"{mode} - (no case ranked)")
            continue
        parts.append(
            f"{mode} {s['geometric_mean']:.2f} ({s['cases']} cases, {s['slower_than_best_peer']} slower, "
            f"worst {s['worst']:.2f}: {s['worst_case']})"
        )
    refused = summary.get("all", {}).get("refused", 0)
    warning = f"; {refused} REFUSED BY THE GATE" if refused else ""
    return f"geometric mean of ddrf_fast to the best peer: {'; '.join(parts)}{warning}"
