"""Runs the benchmark of one operation: verifies, times and ranks every provider of every case.

    python -m benchmarks.run dynamic_conv --quick --json result.json

Per case and setting: inputs, the float64 reference, the gate (verify.py), then all that passed are timed in
turn (ddrf_fast/_measuring.py). The ratio of a provider is the median of the best peer of that case over its
own: above 1 it is faster than everything that there was. README.md tells more.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results_schema, roof
from benchmarks.memory import peak_on_gpu, peaks_of_processes, peaks_on_cpu, saved_mib
from benchmarks.registry import (
    DTYPES,
    LAYOUTS,
    MODES,
    OPERATIONS,
    Case,
    Inputs,
    Operation,
    Provider,
    Run,
    Setting,
    input_bytes,
    load,
)
from benchmarks.report import OURS, print_case, short, summarise, summary_line, summary_table, target_table
from benchmarks.timing import measured_step
from benchmarks.verify import Gate
from ddrf_fast._measuring import FEW_ROUNDS, time_in_turn

# Input sets are rotated until they exceed this: beyond a CPU's second-level cache (a layer's input was just
# written by the layer before, so it may be in the third), beyond all of a GPU's.
ROTATED_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
MOST_SETS = {"cpu": 8, "cuda": 48}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPERATIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mode", choices=MODES, action="append", help="default: all that a case has")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="tf32: float32 tensors, TF32 allowed"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw", help="of what ddrf_fast is given")
    parser.add_argument(
        "--quick", action="store_true", help="a handful of small cases, under a minute on two cores"
    )
    parser.add_argument(
        "--compile", action="store_true", help="let torch.compile compete in its representative cases"
    )
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as many as torch takes")
    parser.add_argument(
        "--min-time", type=float, metavar="S", help="seconds of timing per provider, case and mode"
    )
    parser.add_argument("--budget", type=float, metavar="S", help="start no case after this many seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the records go")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.device == "cpu" and options.dtype == "tf32":
        parser.error("--dtype tf32 is for CUDA devices")
    return options


@contextlib.contextmanager
def torch_as_asked(options: argparse.Namespace) -> Iterator[None]:
    """Threads, and the same precision rules and algorithm search for everybody, while it runs."""
    tf32, matmul = options.dtype == "tf32", torch.backends.cuda.matmul
    threads, matmul_tf32 = torch.get_num_threads(), matmul.allow_tf32
    try:
        import cv2
    except ImportError:  # where a GPU is, there may be little else
        cv2 = None
    cv2_threads = cv2.getNumThreads() if cv2 else None
    if options.threads:
        torch.set_num_threads(options.threads)
    if cv2:
        cv2.setNumThreads(torch.get_num_threads())
    matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            yield
    finally:
        matmul.allow_tf32 = matmul_tf32
        if cv2:
            cv2.setNumThreads(cv2_threads)
        torch.set_num_threads(threads)


class Benchmark:
    """One run of the command."""

    def __init__(self, operation: Operation, options: argparse.Namespace):
        self.operation, self.options = operation, options
        brief = options.quick or options.device == "cuda"
        self.min_time = options.min_time or (0.05 if brief else 0.3)
        self.load = os.getloadavg()[0]
        self.versions, self.commit = environment.versions(), environment.commit()
        self.roof = roof.measure(options.device, options.dtype)
        self.skipped: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.not_run: list[list[str]] = []
        self.records: list[dict[str, Any]] = []

    def run(self) -> None:
        """All the cases that were asked for, each in all the modes."""
        started = time.monotonic()
        cases = [
            case
            for case in self.operation.cases
            if self.options.filter in case.name and (case.quick or not self.options.quick)
        ]
        if not cases:
            raise SystemExit(f"no case of {self.operation.name} has {self.options.filter!r} in its name")
        for case, mode in itertools.product(cases, self.options.mode or MODES):
            if mode not in case.modes:
                continue
            setting = Setting(self.options.device, self.options.dtype, self.options.layout, mode)
            if self.options.budget and time.monotonic() - started > self.options.budget:
                self.not_run.append([f"{case.name} {mode}", "the time budget was used up"])
                continue
            records = self.run_case(case, setting)
            if not records:
                self.not_run.append([f"{case.name} {mode}", "nobody takes part"])
                continue
            self.records += records
            if self.options.json:  # what was measured stays when a run is stopped
                results_schema.write(self.document(), self.options.json)
            print_case(case, setting, records, self.roof.bound(self.operation.work(case, setting)))

    def competing(self, case: Case, setting: Setting) -> list[Provider]:
        found = []
        for provider in self.operation.providers:
            reason = provider.skip(case, setting)
            if reason is None and provider.warm_up and not self.options.compile:
                reason = "only with --compile"
            if reason is None:
                found.append(provider)
            else:
                self.skipped[provider.name][reason] += 1
        return found

    def run_case(self, case: Case, setting: Setting) -> list[dict[str, Any]]:
        """The records of one case in one setting."""
        providers = self.competing(case, setting)
        if not providers:
            return []
        runs = {provider.name: provider.build(case, setting) for provider in providers}
        gate = Gate(self.operation, case, setting)
        verdicts = {provider.name: gate.judge(provider, runs[provider.name]) for provider in providers}
        plan = self.operation.plan(case, gate.truth(self.operation).inputs)
        del gate
        passed = [provider for provider in providers if verdicts[provider.name].status == "ok"]
        figures = self.measure(case, setting, passed, runs)
        medians = [figures[provider.name]["median_ms"] for provider in passed if provider.peer]

        shared = {
            "op": self.operation.name,
            "case": case.name,
            "shape": dict(case.shape),
            "mode": setting.mode,
            "dtype": setting.dtype,
            "device": setting.device,
            "threads": torch.get_num_threads(),
            "roof_ms": self.roof.milliseconds(self.operation.work(case, setting)),
            "versions": self.versions,
            "commit": self.commit,
        }
        records = []
        for provider in providers:
            verdict = verdicts[provider.name]
            own = {
                "provider": provider.name,
                "peer": provider.peer,
                "computes": (provider.of or self.operation).name,
                "layout": provider.layout or setting.layout,
                "plan": results_schema.without_paths(plan) if provider.name == OURS else "",
                "status": verdict.status,
                "detail": results_schema.without_paths(verdict.detail),
                "error": verdict.error,
            }
            timed = figures.get(provider.name, UNTIMED)
            derived = _derived(timed["median_ms"], min(medians, default=None), shared["roof_ms"], case.B)
            records.append(short(shared | own | timed | derived))
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        return records

    def input_sets(self, case: Case, setting: Setting, provider: Provider) -> list[Inputs]:
        """As many as are too large for the cache, in the provider's layout."""
        operation = provider.of or self.operation
        first = operation.draw(case, setting, provider, seed=2)
        count = math.ceil(ROTATED_BYTES[setting.device] / max(input_bytes(first), 1))
        count = min(count, MOST_SETS[setting.device])
        return [first] + [operation.draw(case, setting, provider, seed=2 + i) for i in range(1, count)]

    def measure(
        self, case: Case, setting: Setting, providers: list[Provider], runs: dict[str, Run]
    ) -> dict[str, dict[str, Any]]:
        """Times and memory by provider. Those that want the same inputs in the same layout share them."""
        shared: dict[tuple[str, str], list[Inputs]] = {}
        sets, steps = {}, {}
        for provider in providers:
            key = ((provider.of or self.operation).name, provider.layout or setting.layout)
            if key not in shared:
                shared[key] = self.input_sets(case, setting, provider)
            sets[provider.name] = shared[key]
            steps[provider.name] = measured_step(
                provider.of or self.operation, runs[provider.name], shared[key], setting
            )
        peers = [provider.name for provider in providers if provider.peer]
        timings = time_in_turn(steps, setting.device, self.min_time, peers)
        # Not those that were called once or twice only, nor those that would be compiled again.
        in_rounds = [p.name for p in providers if timings[p.name].calls >= FEW_ROUNDS]
        if setting.device == "cuda":
            peaks = {name: peak_on_gpu(functools.partial(steps[name], 0)) for name in in_rounds}
        else:
            wanted = [p.name for p in providers if p.name in in_rounds and not p.warm_up]
            measure_peaks = peaks_of_processes if setting.whole_process else peaks_on_cpu
            peaks = measure_peaks(self.operation.name, case, setting, wanted)
        saved = {name: saved_mib(runs[name], sets[name][0]) for name in in_rounds} if setting.backward else {}
        return {
            name: vars(timing) | {"peak_memory_mib": peaks.get(name), "saved_memory_mib": saved.get(name)}
            for name, timing in timings.items()
        }

    def document(self) -> dict[str, Any]:
        """The results file."""
        from ddrf_fast.ops import _native

        options = vars(self.options) | {"min_time": self.min_time, "mode": list(self.options.mode or MODES)}
        metadata = {
            "op": self.operation.name,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": self.options.device,
            "device_name": environment.device_name(self.options.device),
            "threads": torch.get_num_threads(),
            "load_average": round(self.load, 2),
            "versions": self.versions | environment.peer_versions(),
            "commit": self.commit,
            "native_libraries": {name: loaded for name, (loaded, _) in _native.status().items()},
            "options": {key: value for key, value in options.items() if key not in ("json", "op")},
            "roof": {
                self.options.dtype: short(
                    {"tflops": self.roof.flops_per_s / 1e12, "gbytes_per_s": self.roof.bytes_per_s / 1e9}
                )
            },
            "skipped": {provider: dict(reasons) for provider, reasons in self.skipped.items()},
            "cases_not_run": self.not_run,
            "summary": summarise(self.records),
            "targets": [short(vars(t) | {"met": t.met}) for t in self.operation.targets(self.records)],
        }
        return {"metadata": metadata, "records": self.records}


UNTIMED = {"median_ms": None, "iqr_ms": None, "calls": 0, "peak_memory_mib": None, "saved_memory_mib": None}


def _derived(
    median: float | None, best_peer: float | None, roof_ms: float, batch: int
) -> dict[str, float | None]:
    """What follows from a provider's median and its surroundings."""
    return {
        "samples_per_s": 1e3 * batch / median if median else None,
        "ratio_to_best_peer": best_peer / median if median and best_peer else None,
        "roof_fraction": roof_ms / median if median else None,
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 when ddrf_fast itself failed the gate somewhere."""
    options = parse(arguments)
    with torch_as_asked(options):
        return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Runs, prints and writes what was asked for; returns the exit status."""
    benchmark = Benchmark(load(options.op), options)
    device = environment.device_name(options.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"roof ({options.dtype}): {benchmark.roof.flops_per_s / 1e12:.3g} TFLOP/s, "
        f"{benchmark.roof.bytes_per_s / 1e9:.4g} GB/s"
    )
    if benchmark.load > 0.5:
        print(f"WARNING: the machine was busy (load {benchmark.load:.1f}); do not trust these timings")
    benchmark.run()
    document = benchmark.document()
    for provider, reasons in document["metadata"]["skipped"].items():
        print(
            f"\nskipped {provider}: " + ", ".join(f"{reason} ({count})" for reason, count in reasons.items()),
            end="",
        )
    for name, reason in document["metadata"]["cases_not_run"]:
        print(f"\nnot run: {name}: {reason}", end="")
    print()
    if options.json:
        results_schema.write(document, options.json)
    print(summary_table(document["metadata"]["summary"]))
    if document["metadata"]["targets"]:
        print(target_table(document["metadata"]["targets"]))
    print(summary_line(document["metadata"]["summary"]))
    return 1 if document["metadata"]["summary"].get("all", {}).get("refused") else 0


if __name__ == "__main__":
    sys.exit(main())
