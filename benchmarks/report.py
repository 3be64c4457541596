"""What a run says: a table per case, and the summary with the geometric mean."""

import math
import sys
from typing import Any

from benchmarks.registry import MODES, Case, Setting
from benchmarks.results_schema import geometric_mean

OURS = "ddrf_fast"


def short(values: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than any timing has, and JSON has no infinity."""

    def shorten(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.5g}") if math.isfinite(value) else None

    return {key: shorten(value) for key, value in values.items()}


def summarise(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per mode and for all: the geometric mean of ddrf_fast's ratio to the best peer, and the worst case."""
    summary = {}
    for mode in (*MODES, "all"):
        ours = [r for r in records if r["provider"] == OURS and mode in (r["mode"], "all")]
        if not ours:
            continue
        ranked = [r for r in ours if r["ratio_to_best_peer"] is not None]
        worst = min(ranked, key=lambda r: r["ratio_to_best_peer"], default=None)
        summary[mode] = short(
            {
                "geometric_mean": geometric_mean(r["ratio_to_best_peer"] for r in ranked),
                "cases": len(ranked),
                "slower_than_best_peer": sum(r["ratio_to_best_peer"] < 1 for r in ranked),
                "refused": sum(r["status"] != "ok" for r in ours),
                "worst": worst and worst["ratio_to_best_peer"],
                "worst_case": worst and f"{worst['case']} {worst['mode']}",
            }
        )
    return summary


def print_case(case: Case, setting: Setting, records: list[dict[str, Any]], bound: str) -> None:
    """One table, the fastest first."""
    kind = f"{setting.mode} {setting.dtype} {setting.device}"
    print(f"\n{case.name}  [{kind}]  roof {records[0]['roof_ms']:.4g} ms ({bound})")
    kept = "saved MiB" if setting.backward else "peak MiB"
    print(
        f"{'':30} {'median ms':>10} {'IQR':>8} {'samples/s':>9} {'of roof':>8} {'to best peer':>12} {kept:>9}"
    )
    for r in sorted(records, key=lambda r: r["median_ms"] or float("inf")):
        name = f"{'* ' if r['provider'] == OURS else '  '}{r['provider']}"
        if r["median_ms"] is None:
            print(f"{name:30} {r['status'].upper()}: {r['detail']}")
            continue
        memory = r["saved_memory_mib"] if setting.backward else r["peak_memory_mib"]
        note = "" if r["peer"] or r["provider"] == OURS else "  (not ranked)"
        print(
            f"{name:30} {r['median_ms']:10.4g} {r['iqr_ms']:8.2g} {r['samples_per_s']:9.5g} "
            f"{r['roof_fraction']:8.2f} {_or_dash(r['ratio_to_best_peer'], '12.2f')} "
            f"{_or_dash(memory, '9.1f')}{note}"
        )
    sys.stdout.flush()


def _or_dash(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


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
