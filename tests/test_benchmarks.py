"""The frame for measuring: arithmetic, the gate, the runner end to end, every committed result."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch

from benchmarks import (
    arrays,
    efficientnet,
    memory,
    plot,
    registry,
    report,
    results_schema,
    roof,
    run,
    timing,
    verify,
)
from benchmarks.models.efficientnet import EfficientNetB0
from benchmarks.models.ifcnn import IFCNN
from benchmarks.peers import dynamic_conv as dynamic_conv_peers
from benchmarks.registry import Case, Provider, Setting, Work
from ddrf_fast._measuring import CPU_PEAKS
from ddrf_fast.inference import engine

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("**/*.json"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny shapes: on a busy machine threads that wait for each other take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_threads_are_as_before_when_a_benchmark_has_run():
    before = cv2.getNumThreads()
    with run.torch_as_asked(run.parse(["dynamic_conv", "--threads", "3"])):
        assert torch.get_num_threads() == cv2.getNumThreads() == 3
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (1, before)


def test_geometric_mean_of_ratios():
    assert results_schema.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert results_schema.geometric_mean([3.0]) == pytest.approx(3.0)
    assert results_schema.geometric_mean([]) is None


def test_roof_takes_the_larger_of_arithmetic_and_traffic():
    machine = roof.Roof(flops_per_s=1e12, bytes_per_s=1e11)
    assert machine.milliseconds(Work(flops=2e9, bytes=1e8)) == pytest.approx(2.0)
    assert machine.bound(Work(flops=2e9, bytes=1e8)) == "arithmetic"
    assert machine.milliseconds(Work(flops=2e9, bytes=3e8)) == pytest.approx(3.0)
    assert machine.bound(Work(flops=2e9, bytes=3e8)) == "traffic"


def _record(
    provider: str, mode: str, ratio: float | None, case: str = "c", status: str = "ok", **more: object
) -> dict:
    return {
        "provider": provider,
        "mode": mode,
        "ratio_to_best_peer": ratio,
        "case": case,
        "status": status,
        "shape": {},
        "median_ms": 1.0,
    } | more


def test_summary_counts_losses_and_refusals_and_ignores_peers():
    summary = report.summarise(
        [
            _record("ddrf_fast", "fwd", 4.0, "a"),
            _record("ddrf_fast", "fwd", 0.25, "b"),
            _record("ddrf_fast", "fwdbwd", 8.0, "a"),
            _record("ddrf_fast", "fwdbwd", None, "b", status="wrong"),
            _record("grouped_nchw", "fwd", 1.0, "a"),
        ]
    )
    assert summary["fwd"]["geometric_mean"] == pytest.approx(1.0)
    assert (summary["fwd"]["worst"], summary["fwd"]["worst_case"]) == (0.25, "b fwd")
    assert summary["fwd"]["slower_than_best_peer"] == 1
    assert summary["fwdbwd"]["geometric_mean"] == pytest.approx(8.0)
    assert summary["fwdbwd"]["refused"] == 1
    assert summary["all"]["geometric_mean"] == pytest.approx(2.0)
    assert summary["fwd"]["groups"] == summary["fwd"]["to_static"] == {}
    line = report.summary_line(summary)
    assert line.startswith("geometric mean of ddrf_fast to the best peer: fwd 1.00")
    assert "1 REFUSED" in line


def test_summary_tells_groups_and_large_losses():
    family, other = {"family": "ddrfnet"}, {"family": "resnet18"}
    summary = report.summarise(
        [
            _record("ddrf_fast", "fwd", 4.0, "a", shape=family | {"code": 16}),
            _record("ddrf_fast", "fwd", 1.0, "b", shape=family | {"code": 0}),
            _record("ddrf_fast", "fwd", 0.89, "c", shape=other),
            _record("ddrf_fast", "fwd", 0.9, "d", shape=other),
            _record("ddrf_fast", "fwdbwd", 0.5, "d", shape=other),
        ]
    )
    groups = summary["fwd"]["groups"]
    assert {name: g["geometric_mean"] for name, g in groups.items()} == pytest.approx(
        {"ddrfnet": 2.0, "with code": 4.0, "resnet18": math.sqrt(0.89 * 0.9)}, rel=1e-4
    )
    assert (groups["resnet18"]["below_0.9"], groups["resnet18"]["worst_case"]) == (1, "c fwd")
    assert (summary["fwd"]["below_0.9"], summary["all"]["below_0.9"]) == (1, 2)
    table = report.summary_table(summary).splitlines()
    assert any(line.split()[:4] == ["with", "code", "4.00", "1"] for line in table)


def test_summary_compares_with_the_fastest_static_network():
    summary = report.summarise(
        [
            _record("ddrf_fast", "fwd", 1.2, "a", median_ms=5.0),
            _record("static_nchw", "fwd", None, "a", median_ms=8.0),
            _record("static_channels_last", "fwd", None, "a", median_ms=4.0),
            _record("grouped_nchw", "fwd", 1.0, "a", median_ms=6.0),
            _record("ddrf_fast", "fwd", 1.2, "b", median_ms=5.0),
        ]
    )
    assert summary["all"]["to_static"] == {"a fwd": pytest.approx(0.8)}
    assert "relative to the static network: 0.800  a fwd" in report.summary_table(summary)


def _small(op: str) -> tuple[registry.Operation, Case]:
    """An operation and a case of its own kind, made tiny."""
    operation = registry.load(op)
    shape = {
        "dynamic_conv": {
            "B": 3,
            "N": 2,
            "I": 4,
            "O": 6,
            "H": 6,
            "W": 5,
            "k": 3,
            "code": 2,
            "bias": True,
            "groups": 1,
        }
        | {"stride": 1, "padding": 1, "activation": "leaky_relu"},
        "degrade": {"B": 3, "C": 2, "H": 9, "W": 8, "M": 3, "k": 5, "s": 2, "weights": "grid", "noise": True},
        "model": {"B": 3, "H": 16, "W": 14},
        "efficientnet": {"B": 3, "H": 64, "W": 64},
    }[op]
    return operation, Case("tiny", shape, quick=True)


@pytest.mark.parametrize(
    ("op", "mode"),
    [*((op, mode) for op in registry.OPERATIONS for mode in registry.PASSES), ("model", "step")],
)
def test_every_provider_computes_the_operation(op: str, mode: str):
    """Each against the float64 reference, gradients too: a peer that is wrong would flatter us."""
    operation, case = _small(op)
    setting = Setting(mode=mode)
    gate = verify.Gate(operation, case, setting)
    judged = 0
    for provider in operation.providers:
        if provider.warm_up or provider.skip(case, setting):
            continue
        verdict = gate.judge(provider, provider.build(case, setting))
        assert verdict.status == "ok", f"{provider.name}: {verdict.detail}"
        judged += 1
    assert judged >= 4


def _pair(**more: bool) -> Case:
    return Case("tiny", {"B": 1, "H": 34, "W": 47, **more}, modes=("arrays",))


def test_every_provider_fuses_arrays():
    """Each against the float64 reference of its own method, IFCNN too."""
    operation, setting = registry.load("model"), Setting(mode="arrays")
    gate, judged = verify.Gate(operation, _pair(), setting), []
    for provider in operation.providers:
        if not provider.warm_up and not provider.skip(_pair(), setting):
            run = provider.build(_pair(), setting)
            verdict = gate.judge(provider, run)
            assert verdict.status == "ok", f"{provider.name}: {verdict.detail}"
            images = (provider.of or operation).inputs(_pair(), setting, 0)
            assert all(image.dtype == torch.uint8 for image in (*images.values(), run(images)))
            judged.append(provider.name)
    assert judged == [
        "ddrf_fast",
        "grouped_nchw",
        "grouped_channels_last",
        "ddrf_fast_bfloat16",
        "ifcnn_nchw",
        "ifcnn_channels_last",
    ]


def test_a_large_pair_is_for_ddrf_fast_alone(monkeypatch: pytest.MonkeyPatch):
    """It is fused in strips, and compared with the whole."""
    operation, setting, case = registry.load("model"), Setting(mode="arrays"), _pair(large=True)
    taking_part = [p for p in operation.providers if p.skip(case, setting) is None]
    assert [p.name for p in taking_part] == ["ddrf_fast"]
    assert operation.providers[0].skip(case, Setting("cuda", mode="arrays"))
    monkeypatch.setattr(engine, "MEMORY", 0)
    gate = verify.Gate(operation, case, setting)
    verdict = gate.judge(taking_part[0], taking_part[0].build(case, setting))
    assert verdict.status == "ok", verdict.detail
    assert operation.plan(case, gate.truth(operation).inputs) == "strip by strip"


@pytest.mark.parametrize("weights", ["sample", "image", "output"])
def test_degrade_peers_take_every_form_of_weights(weights: str):
    operation, case = _small("degrade")
    case = Case("tiny", {**case.shape, "weights": weights})
    for mode in registry.PASSES:
        setting = Setting(mode=mode)
        gate = verify.Gate(operation, case, setting)
        for provider in operation.providers:
            if not provider.warm_up and not provider.skip(case, setting):
                verdict = gate.judge(provider, provider.build(case, setting))
                assert verdict.status == "ok", f"{provider.name}: {verdict.detail}"


@pytest.mark.parametrize("weights", ["sample", "grid"])
def test_loaders_compute_the_operation_on_one_thread(weights: str, monkeypatch):
    operation, case = _small("degrade")
    case = Case("tiny", {**case.shape, "weights": weights, "noise": False, "family": "loader"})
    gate = verify.Gate(operation, case, Setting())
    judged = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for provider in operation.providers:
        if provider.skip(case, Setting()) is None:
            verdict = gate.judge(provider, provider.build(case, Setting()))
            assert verdict.status == "ok", f"{provider.name}: {verdict.detail}"
            judged.append(provider.name)
    assert judged == ["ddrf_fast", "opencv_loop", "scipy_loop"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert all(provider.skip(case, Setting()) for provider in operation.providers)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 2, "code": 0, "stride": 2},
        {"groups": 4, "O": 4, "code": 0, "N": 1},
        {"k": 1, "padding": 0},
        {"k": 1, "padding": 0, "stride": 2, "code": 0, "bias": False, "activation": "none"},
        {"B": 1},
    ],
)
def test_dynamic_conv_peers_take_every_shape(change: dict):
    operation, case = _small("dynamic_conv")
    case = Case("tiny", {**case.shape, **change})
    setting = Setting(mode="fwdbwd", layout="channels_last")
    gate = verify.Gate(operation, case, setting)
    for provider in operation.providers:
        if not provider.warm_up and not provider.skip(case, setting):
            verdict = gate.judge(provider, provider.build(case, setting))
            assert verdict.status == "ok", f"{provider.name}: {verdict.detail}"


def test_dynamic_conv_peers_get_their_bank_in_their_layout():
    operation, case = _small("dynamic_conv")
    for provider in operation.providers:
        inputs = operation.draw(case, Setting(mode="fwdbwd", layout="channels_last"), provider, seed=3)
        last = provider.layout == "channels_last"
        for tensor in (inputs["weight"], dynamic_conv_peers.mixed_kernels(inputs)[0]):
            assert tensor.movedim(2, -1).is_contiguous() == last
        assert inputs["weight"].is_leaf and inputs["weight"].requires_grad


def _spoilt(spoil) -> Provider:
    """ddrf_fast's provider with its output changed."""
    operation, _ = _small("dynamic_conv")
    honest = operation.providers[0]

    def build(case: Case, setting: Setting):
        function = honest.build(case, setting)
        return lambda inputs: spoil(function(inputs), inputs)

    return Provider("spoilt", build)


@pytest.mark.parametrize(
    ("spoil", "mode", "status", "detail"),
    [
        (lambda y, t: y * 1.001, "fwd", "wrong", "error 1.0e-03 in output"),
        (lambda y, t: y.index_fill(0, torch.tensor([2]), 0.0), "fwd", "wrong", "in output"),
        (lambda y, t: y + float("nan"), "fwd", "wrong", "error inf in output"),
        (lambda y, t: y[..., :-1], "fwdbwd", "wrong", "output has shape"),
        (
            lambda y, t: y.detach() + 0 * (t["x"].sum() + t["weight"].sum()),
            "fwdbwd",
            "failed",
            "RuntimeError",
        ),
        (
            lambda y, t: y + 0.1 * (t["bias"].sum() - t["bias"].sum().detach()),
            "fwdbwd",
            "wrong",
            "gradient of bias",
        ),
    ],
    ids=["a thousandth", "last sample missing", "nan", "shape", "no gradient", "one gradient"],
)
def test_gate_refuses(spoil, mode: str, status: str, detail: str):
    operation, case = _small("dynamic_conv")
    setting = Setting(mode=mode)
    provider = _spoilt(spoil)
    verdict = verify.Gate(operation, case, setting).judge(provider, provider.build(case, setting))
    assert verdict.status == status
    assert detail in verdict.detail


def test_a_wrong_provider_is_recorded_and_not_ranked(monkeypatch: pytest.MonkeyPatch):
    """One that is wrong, one that raises: both are recorded, neither is timed or the best peer."""
    operation, case = _small("dynamic_conv")

    def raises(case: Case, setting: Setting):
        def run_it(inputs):
            raise RuntimeError("out of luck\nsecond line")

        return run_it

    spoilt = _spoilt(lambda y, t: y * 0)
    providers = (*operation.providers[:2], spoilt, Provider("unlucky", raises))
    operation = registry.Operation(**{**vars(operation), "providers": providers, "cases": [case]})
    monkeypatch.setattr(roof, "measure", lambda device, dtype: roof.Roof(1e11, 1e10))
    benchmark = run.Benchmark(operation, run.parse(["dynamic_conv", "--min-time", "0.001", "--mode", "fwd"]))
    benchmark.run()
    results_schema.validate(benchmark.document())
    records = {record["provider"]: record for record in benchmark.records}
    assert records["spoilt"]["status"] == "wrong"
    assert records["unlucky"]["detail"] == "RuntimeError: out of luck"
    for name in ("spoilt", "unlucky"):
        assert records[name]["median_ms"] is None
        assert records[name]["ratio_to_best_peer"] is None
    assert records["grouped_nchw"]["ratio_to_best_peer"] == 1.0


def test_runner_end_to_end(tmp_path: Path):
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.run", "dynamic_conv", "--quick", "--json", str(file)]
    command += ["--filter", "80->480", "--min-time", "0.001", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    results_schema.validate(document)
    ours = [r for r in document["records"] if r["provider"] == "ddrf_fast"]
    assert sorted(r["mode"] for r in ours) == ["fwd", "fwdbwd"]
    assert all(r["threads"] == 1 for r in document["records"])
    expected = math.sqrt(ours[0]["ratio_to_best_peer"] * ours[1]["ratio_to_best_peer"])
    assert document["metadata"]["summary"]["all"]["geometric_mean"] == pytest.approx(expected, rel=1e-3)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("geometric mean of ddrf_fast to the best peer")
    if CPU_PEAKS:
        assert all(r["peak_memory_mib"] > 0.1 for r in ours)
    for record in ours:
        peers = [
            r["median_ms"]
            for r in document["records"]
            if r["mode"] == record["mode"] and r["peer"] and r["median_ms"]
        ]
        assert record["ratio_to_best_peer"] == pytest.approx(min(peers) / record["median_ms"], rel=1e-3)


def test_runner_from_arrays_to_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """IFCNN is timed and not ranked; memory is that of whole processes; targets are told."""
    operation, file = registry.load("model"), tmp_path / "r.json"
    names = ("ddrf_fast", "grouped_nchw", "ifcnn_nchw")
    providers = [provider for provider in operation.providers if provider.name in names]
    operation = dataclasses.replace(operation, providers=providers, cases=[*operation.cases, _pair()])
    monkeypatch.setattr(run, "load", lambda name: operation)
    monkeypatch.setattr(roof, "measure", lambda device, dtype: roof.Roof(1e11, 1e10))
    options = ["--mode", "arrays", "--filter", "tiny", "--min-time", "0.001", "--json", str(file)]
    precision = torch.backends.cudnn.conv.fp32_precision
    assert run.main(["model", *options]) == 0
    assert torch.backends.cudnn.conv.fp32_precision == precision  # left as it was found
    document = json.loads(file.read_text())
    results_schema.validate(document)
    records = {record["provider"]: record for record in document["records"]}
    assert set(records) == set(names)
    assert all(record["median_ms"] > 0 for record in records.values())
    assert (records["ifcnn_nchw"]["computes"], records["ifcnn_nchw"]["peer"]) == ("ifcnn", False)
    assert records["grouped_nchw"]["ratio_to_best_peer"] == 1.0
    figures = [target["figure"] for target in document["metadata"]["targets"]]
    assert figures == ["times as fast as IFCNN", "times as fast as plain torch"]
    printed = capsys.readouterr().out
    assert "(not ranked: another method, ifcnn)" in printed
    assert "times as fast as IFCNN: tiny" in printed
    if CPU_PEAKS:
        assert all(record["peak_memory_mib"] > 50 for record in records.values())


def test_targets_are_told_of_what_was_measured():
    def record(case: str, provider: str, median_ms: float | None, **more: object) -> dict:
        shape = {"B": 1, "H": 400, "W": 400}
        return _record(provider, "arrays", 1.0, case, shape=shape, device="cpu", median_ms=median_ms) | more

    large = {"shape": {"B": 1, "H": 3000, "W": 4000, "large": True}, "peak_memory_mib": 2000.0}
    found = arrays.targets(
        [
            record("a", "ddrf_fast", 50.0),
            record("a", "ifcnn_nchw", 200.0),
            record("a", "ifcnn_channels_last", 100.0),
            record("a", "grouped_nchw", 140.0),
            record("a", "compiled_grouped_nchw", None),
            record("b", "grouped_nchw", 1.0),
            record("c", "ddrf_fast", 9000.0, **large),
            record("d", "ddrf_fast", 1.0, device="cuda"),
        ]
    )
    assert [(t.case, t.figure, round(t.value, 3), t.met) for t in found] == [
        ("a", "milliseconds", 50.0, True),
        ("a", "times as fast as IFCNN", 2.0, True),
        ("a", "times as fast as plain torch", 2.8, False),
        ("c", "GB of memory", 2.097, False),
    ]


def test_runner_refuses_a_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run.main(["degrade", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_runner_refuses_a_filter_that_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    operation, _ = _small("degrade")
    monkeypatch.setattr(roof, "measure", lambda device, dtype: roof.Roof(1e11, 1e10))
    with pytest.raises(SystemExit, match="no case of degrade has 'unheard of'"):
        run.Benchmark(operation, run.parse(["degrade", "--filter", "unheard of"])).run()


@pytest.mark.parametrize("op", registry.OPERATIONS)
def test_cases_are_named_once_and_quick_and_compiled_ones_exist(op: str):
    operation = registry.load(op)
    module = sys.modules[f"benchmarks.{op}"]
    names = [case.name for case in operation.cases]
    assert len(names) == len(set(names))
    assert any(case.quick for case in operation.cases)
    for named in ("QUICK", "COMPILED"):
        chosen = getattr(module, named, set())
        assert all(name in names for name in chosen if isinstance(name, str)), f"{named} names no case"


@pytest.mark.parametrize(
    ("num_kernels", "parameters", "gmacs"), [(0, 5_288_548, 0.39), (4, 13_314_116, 0.40)]
)
def test_efficientnet_is_the_published_one(num_kernels: int, parameters: int, gmacs: float):
    """5.29 M parameters and 0.39 G multiply-adds; 13.31 M with CondConv, whose mixing adds 0.01 G."""
    assert sum(p.numel() for p in EfficientNetB0(num_kernels).parameters()) == parameters
    assert efficientnet.macs(num_kernels, 224, 224) / 1e9 == pytest.approx(gmacs, abs=0.005)


def test_ifcnn_is_the_published_one():
    """83.6 thousand parameters, all at full resolution; the fusion does not know which image is which."""
    torch.manual_seed(0)
    network = IFCNN().eval()
    assert sum(p.numel() for p in network.parameters()) == 9408 + 2 * (36864 + 128) + 195
    first, second = torch.rand(2, 2, 3, 21, 34)
    with torch.no_grad():
        fused = network(first, second)
        torch.testing.assert_close(network(second, first), fused)
    assert fused.shape == (2, 3, 21, 34)
    assert ((fused > 0) & (fused < 1)).float().mean() > 0.9


def test_efficientnet_with_uniform_kernels_is_the_static_one():
    """Every kernel of a bank alike and routings that sum to 1: the static network with these kernels."""
    torch.manual_seed(0)
    static, dynamic = EfficientNetB0(0).eval(), EfficientNetB0(4).eval()
    state = static.state_dict()
    for name, value in dynamic.state_dict().items():
        if ".routing.weight" in name:
            value.zero_()
        elif ".routing.bias" in name:
            value.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).logit())
        else:
            value.copy_(state[name])  # a bank's kernels are each a copy
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(dynamic(image, efficientnet.grouped), static(image), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not CPU_PEAKS, reason="the system does not tell")
@pytest.mark.parametrize(
    ("code", "mib"),
    [
        ("a = torch.ones(16 << 20)", 64),
        ("a = torch.ones(10 << 18); del a; a = torch.ones(12 << 18); b = a[: 3 << 18] + 1; del a, b", 15),
        ("a = [numpy.ones(1 << 14) for _ in range(200)]; del a", 25),
        ("torch.empty(64 << 20)", 0),
        ("pass", 0),
    ],
    ids=["one", "freed and reused", "outside torch", "never touched", "nothing"],
)
def test_peak_memory_on_cpu_is_what_is_alive(code: str, mib: float):
    step = functools.partial(exec, f"import numpy, torch; {code}; a = None", {})
    assert memory.worker(1).submit(memory.growth, step).result() == pytest.approx(mib, abs=1.0)


def test_saved_memory_counts_what_autograd_keeps():
    from benchmarks.memory import saved_mib

    x = torch.rand(1 << 18, requires_grad=True)  # 1 MiB
    assert saved_mib(lambda t: (t["x"] * 2.0).exp(), {"x": x}) == pytest.approx(1.0)
    assert saved_mib(lambda t: t["x"] * t["x"], {"x": x}) == 0.0


def test_plot_is_drawn_from_files_alone_and_the_same_each_time(tmp_path: Path):
    pytest.importorskip("matplotlib")
    files = [str(path) for path in COMMITTED]
    for name in ("a.svg", "b.svg"):
        plot.main([*files, "-o", str(tmp_path / name)])
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    records = [record for path in COMMITTED for record in json.loads(path.read_text())["records"]]
    ratios = [record["ratio_to_best_peer"] for record in records if record["provider"] == "ddrf_fast"]
    assert drawn.count("✗ ") == sum(ratio is not None and ratio < 1 for ratio in ratios)
    for record in records:
        assert record["case"].replace(">", "&gt;") in drawn
    with pytest.raises(SystemExit):
        plot.main([*files, "-o", "plot.txt"])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_fit_the_schema(path: Path):
    results_schema.validate(json.loads(path.read_text()))


def _document() -> dict:
    """The smallest valid document: empty or zero wherever that is allowed."""

    def empty(fields: dict) -> dict:
        return {key: kind() if isinstance(kind, type) else 0.0 for key, kind in fields.items()}

    known = {"op": "degrade", "mode": "fwd", "dtype": "float32", "layout": "nchw", "status": "ok"}
    return {"metadata": empty(results_schema.METADATA), "records": [empty(results_schema.RECORD) | known]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_ms": None}, "status 'ok' with median_ms None"),
        ({"mode": "backwards"}, "mode must be one of"),
        ({"threads": "2"}, "threads has type str"),
        ({"peer": 1}, "peer has type int"),
        ({"iqr_ms": float("nan")}, "must be finite"),
        ({"plan": "read from /home/somebody/x"}, "must not name a machine's folders"),
        ({"extra": 1}, "unknown \\['extra'\\]"),
    ],
)
def test_schema_refuses(change: dict, message: str):
    document = _document()
    results_schema.validate(document)
    document["records"][0] |= change
    with pytest.raises(ValueError, match=message):
        results_schema.validate(document)


def test_schema_refuses_a_target():
    document = _document()
    target = vars(registry.Target("tiny", "milliseconds", 3.0, 2.0, at_most=True)) | {"met": False}
    document["metadata"]["targets"] = [target]
    results_schema.validate(document)
    target["met"] = 0
    with pytest.raises(ValueError, match=r"targets\[0\]\.met has type int"):
        results_schema.validate(document)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path):
    document = _document()
    document["records"][0]["detail"] = SimpleNamespace()
    with pytest.raises(ValueError, match="detail has type"):
        results_schema.write(document, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "summary.fwd: missing \\[\\], unknown \\['extra'\\]"),
        ({"cases": 1.5}, "summary.fwd.cases has type"),
    ],
)
def test_schema_refuses_a_summary(change: dict, message: str):
    document = _document()
    summary = report.summarise([_record("ddrf_fast", "fwd", 2.0)])
    document["metadata"]["summary"] = summary
    results_schema.validate(document)
    summary["fwd"] |= change
    with pytest.raises(ValueError, match=message):
        results_schema.validate(document)


def test_a_training_step_lowers_the_loss():
    operation, case = _small("model")
    setting = Setting(mode="step")
    provider = operation.providers[0]
    inputs = operation.exact(operation.draw(case, setting, provider, seed=3))
    run = provider.build(case, setting)
    step = timing.measured_step(operation, run, [inputs], setting)
    before = operation.loss(inputs, run(inputs)).item()
    for i in range(20):
        step(i)
    assert operation.loss(inputs, run(inputs)).item() < before


@pytest.mark.parametrize(
    ("wrong_draws", "kinked", "status"),
    [(1, True, "ok"), (3, True, "ok"), (4, True, "wrong"), (1, False, "wrong")],
)
def test_gradients_on_the_other_side_of_a_kink_are_judged_again(wrong_draws: int, kinked: bool, status: str):
    operation, case = _small("dynamic_conv")
    operation = dataclasses.replace(operation, kinked=kinked)
    calls = []

    def spoil(y, t):
        calls.append(y)
        return y + (0.1 if len(calls) <= wrong_draws else 0.0) * (t["bias"].sum() - t["bias"].sum().detach())

    setting = Setting(mode="fwdbwd")
    provider = _spoilt(spoil)
    verdict = verify.Gate(operation, case, setting).judge(provider, provider.build(case, setting))
    assert verdict.status == status
