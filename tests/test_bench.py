"""`ddrf-fast bench`: what it measures and tells; never how long something takes."""

import json

import pytest
import torch

from ddrf_fast import bench, cli
from ddrf_fast._measuring import CPU_PEAKS


@pytest.fixture
def threads():
    """Restores their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_table_and_json_tell_the_same(tmp_path, weights, capsys, threads):
    file = tmp_path / "bench.json"
    options = ["--size", "40x30", "--batch", "2", "--seconds", "0.001", "--threads", "1", "--device", "cpu"]
    options += ["--dtype", "bfloat16"]
    assert cli.main(["bench", *options, "--weights", str(weights), "--json", str(file)]) == 0
    table, results = capsys.readouterr().out, json.loads(file.read_text())
    assert results["machine"]["threads"] == 1
    assert [(r["width"], r["height"], r["batch"]) for r in results["fuse"]] == [(40, 30, 1), (40, 30, 2)]
    for record in results["fuse"]:
        assert record["images_per_s"] == pytest.approx(1e3 * record["batch"] / record["median_ms"])
        assert f"{record['images_per_s']:.1f}" in table
        assert record["dtype"] == "bfloat16"
        if CPU_PEAKS:  # of the process, torch included
            assert record["peak_memory_mib"] > 50
            assert f"{record['peak_memory_mib']:.0f}" in table
    assert [r["operation"] for r in results["operations"]] == ["dynamic_conv", "degrade"]
    for record in results["operations"]:
        assert record["ratio"] == pytest.approx(record["plain_torch_ms"] / record["median_ms"])
        assert f"{record['ratio']:.2f}" in table


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--size", "40"], "must be WIDTHxHEIGHT, got '40'"),
        (["--size", "0x3"], "must be WIDTHxHEIGHT, got '0x3'"),
        (["--batch", "0"], "expected a whole number from 1 on, got '0'"),
        (["--threads", "x"], "expected a whole number from 1 on, got 'x'"),
        (["--seconds", "nan"], "must be a positive number of seconds, got 'nan'"),
    ],
)
def test_wrong_options_are_refused(wrong, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *wrong])
    assert stop.value.code == 2
    assert f"argument {wrong[0]}: {message}" in capsys.readouterr().err


def test_plain_torch_computes_the_same():
    for ours, plain in bench.operations(torch.device("cpu")).values():
        torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-4)


def test_a_missing_folder_is_told_before_anything_is_measured(tmp_path, weights, capsys):
    assert cli.main(["bench", "--weights", str(weights), "--json", str(tmp_path / "no" / "a.json")]) == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
