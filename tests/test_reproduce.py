"""`ddrf-fast reproduce`: the tables on a small set, and what they are made of."""

import csv

import cv2
import numpy as np
import pytest
import torch

from ddrf_fast import cli, metrics
from ddrf_fast.degradation import DynamicDegradation
from ddrf_fast.evaluation import MethodScores
from ddrf_fast.models.classical import CLASSICAL_FUSIONS
from ddrf_fast.reproduce import TABLES, paper, scoring
from ddrf_fast.reproduce.ablations import LOSSES, STATIC_DYNAMIC
from ddrf_fast.reproduce.denoise import non_local_means
from ddrf_fast.reproduce.pairs import Degraded, clean_pairs, degraded_pairs, given_methods, given_results


@pytest.fixture
def data(tmp_path):
    """The set `tno` of two pairs, visible in colour and of odd size, and the results of a method on it."""
    rng = np.random.default_rng(0)
    for name, size in (("a", (47, 61)), ("b", (44, 50))):
        visible = cv2.GaussianBlur(rng.integers(0, 256, (*size, 3), np.uint8), (0, 0), 2) * 2
        infrared = cv2.GaussianBlur(rng.integers(0, 256, size, np.uint8), (0, 0), 2)
        grey = cv2.cvtColor(visible, cv2.COLOR_BGR2GRAY)
        _write(tmp_path / f"tno/test/vis/{name}.png", visible)
        _write(tmp_path / f"tno/test/ir/{name}.png", infrared)
        _write(tmp_path / f"baselines/tno/half/{name}.png", grey // 2 + infrared // 2)
    return tmp_path


def _write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def _reproduce(capfd, *arguments):
    try:
        code = cli.main(["reproduce", "--device", "cpu", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


def _values(path):
    with open(path, newline="") as file:
        return {(row["method"], row["image"]): row for row in csv.DictReader(file)}


def test_table_2(data, weights, capfd):
    code, stdout, _ = _reproduce(capfd, "table2", "--data", data, "--weights", weights)
    assert code == 0
    for method in ("DDRF-Net", *CLASSICAL_FUSIONS, *paper.TABLE_2):
        assert f"| {method} " in stdout


def test_table_3(data, weights, tmp_path, capfd):
    output = tmp_path / "out"
    code, stdout, stderr = _reproduce(capfd, "table3", "--data", data, "--weights", weights, "-o", output)
    assert (code, stderr) == (0, "")
    told = "DDRF-Net, told that they are clean"
    clean, degraded = _values(output / "table3_tno.csv"), _values(output / "table3_tno_degraded.csv")
    assert {method for method, _ in clean} == {"half", *CLASSICAL_FUSIONS, "DDRF-Net", told}
    assert clean["DDRF-Net", "a"] != clean[told, "a"]
    denoised = {f"{method} of denoised" for method in CLASSICAL_FUSIONS}
    assert {method for method, _ in degraded} == {*CLASSICAL_FUSIONS, *denoised, "DDRF-Net"}
    # Both sources, the best method given (of clean pairs here), the best classical one, and ours.
    for name, columns in (("table3_tno.png", 5), ("table3_tno_degraded.png", 4)):
        assert cv2.imread(str(output / name)).shape[1] == columns * 328
    # What is given is measured as `eval` does; the mean rank of the table is that of its own columns.
    folders = (data / "baselines/tno/half", data / "tno/test/vis", data / "tno/test/ir")
    assert cli.main(["eval", *map(str, folders), "--metrics", "VIFF", "--csv", str(tmp_path / "e.csv")]) == 0
    for key, row in _values(tmp_path / "e.csv").items():
        assert clean[key]["VIFF"] == row["VIFF"]
    for method in ("DDRF-Net", told):
        assert f"Among the 1 methods given, {method} has the mean rank" in stdout
    assert "No results of other methods are given" in stdout
    assert "| **DDRF-Net** " in stdout


def test_table_4(data, weights, tmp_path, capfd):
    output = tmp_path / "out"
    code, stdout, stderr = _reproduce(
        capfd, "table4", "--data", data, "--weights", weights, "-o", output, "--limit", 1
    )
    assert (code, stderr) == (0, "")
    values = _values(output / "table4_tno.csv")
    kinds = {"noise", "blur", "blur and noise", "down-sampling", "low light"}
    methods = {"degraded", "non-local means", "H1/H2 blind", "H3 blind", "H1/H2 told", "H3 told"}
    methods.add("H1/H2 blind, refined")
    expected = {f"{kind}: {method}" for kind in kinds for method in methods}
    expected |= {f"{kind}: H1/H2 told, refined" for kind in kinds - {"low light"}}
    assert {method for method, _ in values} == expected
    assert {image for _, image in values} == {"a visible", "a infrared"}
    assert len(list(output.glob("table4_tno_*.png"))) == 5
    assert "### tno, 1 pairs, down-sampling" in stdout


def test_the_degradation_is_the_same_in_every_run(data):
    first, how = degraded_pairs(data, "tno")
    again, _ = degraded_pairs(data, "tno", limit=1)
    assert "DynamicDegradation" in how
    assert torch.equal(first[0].visible, again[0].visible)
    assert torch.equal(first[0].infrared, again[0].infrared)
    for pair in first:
        assert not torch.equal(pair.visible, pair.clean_visible)
        assert pair.visible.shape == pair.clean_visible.shape
    assert torch.equal(first[0].clean_visible, clean_pairs(data, "tno")[0].visible)


def test_what_lies_among_the_results_of_a_method_is_passed_over(data):
    (data / "baselines/tno/.checkpoints").mkdir()
    (data / "baselines/tno/half/a.txt").touch()
    pairs = clean_pairs(data, "tno")
    assert [path.name for path in given_methods(data, "tno")] == ["half"]
    assert given_results(data / "baselines/tno/half", pairs).keys() == {"a", "b"}


def test_degraded_images_of_another_size_are_named(data):
    for pair in clean_pairs(data, "tno"):
        for kind in ("vis", "ir"):
            _write(data / f"tno_degraded/test/{kind}/{pair.name}.png", np.zeros((20, 30), np.uint8))
    with pytest.raises(ValueError, match="tno_degraded has other sizes than tno: a, b"):
        degraded_pairs(data, "tno")


def test_degraded_images_that_are_given_are_used(data):
    for pair in clean_pairs(data, "tno"):
        for kind, image in (("vis", pair.visible), ("ir", pair.infrared)):
            _write(data / f"tno_degraded/test/{kind}/{pair.name}.png", image[0, 0].numpy() // 2)
    pairs, how = degraded_pairs(data, "tno")
    assert "tno_degraded" in how
    for pair in pairs:
        assert torch.equal(pair.visible, pair.clean_visible // 2)


def test_non_local_means_remove_noise():
    clean = torch.full((1, 1, 64, 64), 120, dtype=torch.uint8)
    clean[..., 32:] = 60
    generator = torch.Generator().manual_seed(0)
    noisy = (clean + 10 * torch.randn(clean.shape, generator=generator)).round().clamp(0, 255).byte()
    gain = metrics.psnr(non_local_means(noisy), clean) - metrics.psnr(noisy, clean)
    assert gain.item() > 5
    assert torch.equal(non_local_means(clean), clean)
    recipe = DynamicDegradation("paper", scale=2).sample(1, seed=0)
    enlarged = Degraded(noisy, recipe).enlarged(torch.empty(1, 1, 128, 128))
    large = clean.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert metrics.psnr(non_local_means(enlarged, 2), large) > metrics.psnr(enlarged, large) + 3


def test_the_verdict():
    def method(name, **values):
        return MethodScores(name, {"image": values})

    scores = [
        method("ours", SSIM=0.9, VIF=0.2), method("a", SSIM=0.8, VIF=0.3),
        method("b", SSIM=0.7, VIF=0.4), method("c", SSIM=0.6, VIF=0.1),
    ]  # fmt: skip
    line = scoring.verdict(scores, "ours", ["a", "b", "c"], ("SSIM", "VIF"))
    assert line == (
        "Among the 3 methods given, ours has the mean rank 2.00, place 1 of 4: best in SSIM; "
        "below their median in VIF."
    )
    table, order = scoring.ranked(scores, ("VIF",), ("VIF",), ["ours"])
    assert order == ["b", "a", "ours", "c"]
    assert table.splitlines()[4].replace(" ", "") == "|**ours**|0.2000|3.00|"


def test_the_papers_means_are_those_of_five_figures():
    """So that `Mean` is what Table 4 prints, to its two digits, which are cut off in places."""
    for *five, mean in (*paper.TABLE_4_GUN.values(), *paper.TABLE_4_TNO.values()):
        assert sum(five) / 5 == pytest.approx(mean, abs=0.0101)


def test_bad_usage_is_one_line_and_2(data, weights, capfd, monkeypatch):
    monkeypatch.delenv("DDRF_FAST_DATA", raising=False)
    (data / "baselines/tno/half/b.png").unlink()
    given = ("--weights", weights)
    cases = [
        (("table9", "--data", data), "table9"),
        (("table3", *given), "DDRF_FAST_DATA"),
        (("table3", "--data", data / "nowhere", *given), "nowhere"),
        (("table3", "--data", data, "--sets", "mars", *given), "mars/test/vis"),
        (("table3", "--data", data, "--limit", "0", *given), "limit"),
        (("table2", "--data", data, "--limit", "1", *given), "--limit has no meaning for table2"),
        (("table2", "--data", data, "--sets", "tno", *given), "--sets has no meaning for table2"),
        (("table4", "--data", data, "--runs", data, *given), "--runs has no meaning for table4"),
        (("table3", "--data", data, *given), "has no result for b"),
        (("table4", "--data", data, "--weights", data / "no.safetensors"), "no.safetensors"),
    ]
    for arguments, message in cases:
        code, stdout, stderr = _reproduce(capfd, *arguments)
        assert (code, stdout) == (2, ""), arguments
        assert stderr.startswith("ddrf-fast: error: ") and stderr.count("\n") == 1, stderr
        assert message in stderr, arguments
    assert tuple(TABLES) == tuple(cli.reproduce.NAMES)


@pytest.mark.parametrize(("table", "experiments"), [("static-dynamic", STATIC_DYNAMIC), ("losses", LOSSES)])
def test_trainings_are_compared_and_missing_ones_named(data, weights, tmp_path, capfd, table, experiments):
    runs, output = tmp_path / "runs", tmp_path / "out"
    given = (table, "--data", data, "--runs", runs, "-o", output, "--limit", 1)
    code, stdout, stderr = _reproduce(capfd, *given)
    assert (code, stdout) == (2, "")
    first, *others = experiments
    assert f"output={runs / first}" in stderr
    (runs / first).mkdir(parents=True)
    (runs / first / "ddrfnet.safetensors").write_bytes(weights.read_bytes())
    code, stdout, stderr = _reproduce(capfd, *given)
    assert (code, stderr) == (0, "")
    assert f"| {first}: {experiments[first][0]}" in stdout
    for experiment in others:
        assert f"output={runs / experiment}\n" in stdout
    values = _values(output / f"{table}_tno.csv")
    assert values[f"{first}: restored", "a visible"]["Qabf"] == ""
    assert 0 < float(values[f"{first}: clean", "a"]["Qabf"]) < 1
    assert {method for method, _ in values} == {
        "degraded images: restored", f"{first}: restored", f"{first}: clean", f"{first}: degraded",
    }  # fmt: skip
    assert (output / f"{table}_tno.png").is_file()
