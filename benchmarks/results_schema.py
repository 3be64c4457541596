"""The format of a results file, and the check that a test makes of every committed one.

{"metadata": {...}, "records": [{...}, ...]}, one record per case, setting and provider
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.registry import DTYPES, LAYOUTS, MODES, OPERATIONS
from ddrf_fast._files import replacing

STATUS = ("ok", "wrong", "failed")
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))

METADATA: dict[str, Any] = {
    "op": str,
    "created": str,  # UTC, ISO 8601
    "device": str,  # "cpu" or "cuda"
    "device_name": str,
    "threads": int,
    "load_average": NUMBER,  # of the minute before the run; near 0 when nothing else ran
    "versions": dict,
    "commit": str,
    "native_libraries": dict,  # name -> loaded
    "options": dict,  # of the command line
    "roof": dict,  # dtype -> {"tflops", "gbytes_per_s"}
    "skipped": dict,  # provider -> {reason: number of cases}
    "cases_not_run": list,  # [name, reason]
    "summary": dict,  # mode, or "all" -> SUMMARY
}
# Files that were written before there were these, lack them.
OPTIONAL_METADATA: dict[str, Any] = {
    "targets": list,  # of TARGET
}
TARGET: dict[str, Any] = {
    "case": str,
    "figure": str,  # what is measured, with its unit
    "value": NUMBER,
    "limit": NUMBER,
    "at_most": bool,  # else the limit is the least
    "met": bool,
}
# How ddrf_fast stands to the best peer. Cases in which it was refused or had no peer are not counted.
FIGURES: dict[str, Any] = {
    "geometric_mean": OPTIONAL_NUMBER,
    "cases": int,
    "slower_than_best_peer": int,  # cases
    "below_0.9": int,  # cases
    "worst": OPTIONAL_NUMBER,
    "worst_case": (str, type(None)),
}
SUMMARY: dict[str, Any] = FIGURES | {
    "refused": int,  # cases in which ddrf_fast did not pass the gate
    "groups": dict,  # family of cases, or "with code" -> FIGURES
    "to_static": dict,  # case and mode -> throughput relative to the static network's (efficientnet only)
}
RECORD: dict[str, Any] = {
    "op": str,
    "case": str,
    "shape": dict,  # "family", where there is one, is a group in the summary
    "provider": str,
    "peer": bool,  # counts when the best peer is looked for
    "mode": str,
    "dtype": str,
    "layout": str,  # of the input as this provider had it
    "device": str,
    "threads": int,
    "status": str,
    "detail": str,
    "error": OPTIONAL_NUMBER,  # the largest relative error against float64
    "median_ms": OPTIONAL_NUMBER,
    "iqr_ms": OPTIONAL_NUMBER,
    "calls": int,
    "samples_per_s": OPTIONAL_NUMBER,
    "ratio_to_best_peer": OPTIONAL_NUMBER,  # above 1: faster than the best peer of the case
    "roof_ms": NUMBER,
    "roof_fraction": OPTIONAL_NUMBER,
    "peak_memory_mib": OPTIONAL_NUMBER,  # that one call adds at its peak; in mode "arrays" the whole process
    "saved_memory_mib": OPTIONAL_NUMBER,  # kept for the backward; fwdbwd only
    "plan": str,  # how ddrf_fast ran it; empty for peers
    "versions": dict,
    "commit": str,
}
OPTIONAL_RECORD: dict[str, Any] = {
    "computes": str,  # another operation than "op", for comparison
}
# What must not appear in a published file: somebody's folders.
_PATH = re.compile(r"(?<![\w.)\]])(/[\w.+-]+){2,}/?")


def without_paths(text: str) -> str:
    """The text with absolute paths replaced.

    >>> without_paths("/home/someone/lib.so: not found (1/2 of 3 tried)")
    '<path>: not found (1/2 of 3 tried)'
    """
    return _PATH.sub("<path>", text)


def validate(document: Mapping[str, Any]) -> None:
    """Checks a results document.

    Raises:
        ValueError: says what is missing, of the wrong type, contradictory, or private.
    """
    if set(document) != {"metadata", "records"}:
        raise ValueError(f"a results file holds metadata and records, got {sorted(document)}")
    _check_fields(document["metadata"], METADATA, "metadata", OPTIONAL_METADATA)
    for number, target in enumerate(document["metadata"].get("targets", ())):
        _check_fields(target, TARGET, f"metadata.targets[{number}]")
    for mode, summary in document["metadata"]["summary"].items():
        _check_fields(summary, SUMMARY, f"summary.{mode}")
        for group, figures in summary["groups"].items():
            _check_fields(figures, FIGURES, f"summary.{mode}.groups.{group}")
    for number, record in enumerate(document["records"]):
        place = f"records[{number}]"
        _check_fields(record, RECORD, place, OPTIONAL_RECORD)
        for key, allowed in (
            ("op", OPERATIONS),
            ("mode", MODES),
            ("dtype", DTYPES),
            ("layout", LAYOUTS),
            ("status", STATUS),
        ):
            if record[key] not in allowed:
                raise ValueError(f"{place}.{key} must be one of {list(allowed)}, got {record[key]!r}")
        for key in ("median_ms", "iqr_ms", "roof_fraction", "ratio_to_best_peer", "error"):
            value = record[key]
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{place}.{key} must be finite and not negative, got {value!r}")
        if (record["status"] == "ok") != (record["median_ms"] is not None):
            raise ValueError(f"{place}: status {record['status']!r} with median_ms {record['median_ms']!r}")
    if found := _PATH.search(json.dumps(document)):
        raise ValueError(f"a results file must not name a machine's folders, found {found.group()!r}")


def _check_fields(
    actual: Mapping[str, Any],
    fields: Mapping[str, Any],
    place: str,
    optional: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    known = {**fields, **optional}
    missing, unknown = sorted(set(fields) - set(actual)), sorted(set(actual) - set(known))
    if missing or unknown:
        raise ValueError(f"{place}: missing {missing}, unknown {unknown}")
    for key, value in actual.items():
        wrong_bool = isinstance(value, bool) and known[key] is not bool
        if wrong_bool or not isinstance(value, known[key]):
            raise ValueError(f"{place}.{key} has type {type(value).__name__}")


def write(document: Mapping[str, Any], path: Path) -> None:
    """Validates and writes, whole or not at all."""
    validate(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(_dump(document))


def _dump(document: Mapping[str, Any]) -> str:
    """JSON with one record a line, so that a difference between two runs can be read."""
    metadata = json.dumps(document["metadata"], indent=1)
    records = ",\n".join(json.dumps(record) for record in document["records"])
    return f'{{"metadata": {metadata},\n"records": [\n{records}\n]}}\n'


def geometric_mean(values: Iterable[float]) -> float | None:
    """exp(mean(log)); None of nothing.

    >>> round(geometric_mean([0.5, 2.0, 8.0]), 6)
    2.0
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
