"""`ddrf-fast eval`: tables of anybody's results, and the tables' arithmetic."""

import csv
import math
import shutil

import cv2
import numpy as np
import pytest
import torch

from ddrf_fast import _tables, cli, evaluation, metrics

# As in the README of the data: measured with NumPy, SciPy and scikit-image, not with this package.
README_TNO = {
    "ultralight": {"EN": 6.842, "AG": 4.229, "SSIM": 0.655, "VIF": 1.032, "PSNR": 13.78, "Qabf": 0.504},
}
README_TNO_DEGRADED = {"densefuse": {"SSIM": 0.368, "VIF": 0.143, "PSNR": 16.30}}


@pytest.fixture
def folders(tmp_path):
    """Two methods' results, and visible and infrared images: three of 60x50, the visible ones in colour."""
    rng = np.random.default_rng(0)
    for name in ("bridge", "field", "street"):
        visible = cv2.GaussianBlur(rng.integers(0, 256, (50, 60, 3), np.uint8), (0, 0), 1)
        infrared = cv2.GaussianBlur(rng.integers(0, 256, (50, 60), np.uint8), (0, 0), 1)
        grey = cv2.cvtColor(visible, cv2.COLOR_BGR2GRAY)
        _write(tmp_path / "vis" / f"{name}.png", visible)
        _write(tmp_path / "ir" / f"{name}.tif", infrared)
        _write(tmp_path / "mean" / f"{name}.png", grey // 2 + infrared // 2)
        _write(tmp_path / "dark" / f"{name}.png", grey // 8)
    return tmp_path


def _write(path, image):
    path.parent.mkdir(exist_ok=True)
    assert cv2.imwrite(str(path), image)


def _eval(capfd, *arguments):
    try:
        code = cli.main(["eval", "--device", "cpu", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


def _table(text):
    """The last Markdown table of a text, row name -> column -> text."""
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]
    header, _, *rows = lines[max(i for i, line in enumerate(lines) if set(line[0]) == {"-"}) - 1 :]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_one_method(folders, capfd):
    code, stdout, stderr = _eval(capfd, folders / "mean", folders / "vis", folders / "ir")
    assert (code, stderr) == (0, "")
    row = _table(stdout)["mean"]
    assert list(row) == ["method", "images", *metrics.FUSION_METRICS]
    assert row["images"] == "3"
    values = []
    for name in ("bridge", "field", "street"):
        files = (
            folders / "mean" / f"{name}.png",
            folders / "vis" / f"{name}.png",
            folders / "ir" / f"{name}.tif",
        )
        images = [torch.from_numpy(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) for path in files]
        values.append(metrics.ssim(*images).item())
    assert float(row["SSIM"]) == pytest.approx(np.mean(values), abs=1e-3)


def test_several_methods_are_ranked_and_written(folders, capfd):
    code, stdout, _ = _eval(
        capfd, folders / "dark", folders / "mean", folders / "vis", folders / "ir",
        "--metrics", "ssim, psnr,Qabf", "--csv", folders / "scores.csv", "--per-image",
    )  # fmt: skip
    assert code == 0
    table = _table(stdout)
    assert list(table) == ["mean", "dark"]  # the best first
    assert table["mean"]["mean rank"] == "1.00"
    assert list(table["dark"]) == ["method", "images", "SSIM", "PSNR", "Qabf", "mean rank"]
    assert stdout.count("street") == 2
    with open(folders / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["image"]) for row in rows[:3]] == [
        ("dark", "bridge"), ("dark", "field"), ("dark", "street"),
    ]  # fmt: skip
    mean = np.mean([float(row["PSNR"]) for row in rows if row["method"] == "mean"])
    assert table["mean"]["PSNR"] == f"{mean:.4f}"


def test_methods_are_ranked_by_the_images_that_all_have(folders, capfd):
    shutil.copytree(folders / "dark", folders / "easy")
    (folders / "easy" / "street.png").unlink()
    arguments = (folders / "dark", folders / "easy", folders / "vis", folders / "ir", "--ignore-unpaired")
    code, stdout, _ = _eval(capfd, *arguments, "--metrics", "EN,SSIM")
    assert code == 0
    assert {row["mean rank"] for row in _table(stdout[: stdout.rindex("|")]).values()} == {"1.50"}
    assert "Ranked by the 2 images that were measured of all." in stdout
    for name in ("bridge", "field"):
        (folders / "dark" / f"{name}.png").unlink()
    code, stdout, _ = _eval(capfd, *arguments, "--metrics", "EN,SSIM")
    assert "Not ranked: no image was measured of all." in stdout and "mean rank" not in stdout


def test_restored_images_against_clean_ones(folders, capfd):
    code, stdout, _ = _eval(capfd, folders / "mean", "--reference", folders / "ir")
    assert code == 0
    assert list(_table(stdout)["mean"]) == ["method", "images", "PSNR", "SSIM", "VIF"]
    code, stdout, _ = _eval(capfd, folders / "vis", "--reference", folders / "vis", "--metrics", "psnr,ssim")
    assert _table(stdout)["vis"] == {"method": "vis", "images": "3", "PSNR": "inf", "SSIM": "1.0000"}


def test_files(folders, capfd):
    files = (folders / "mean/field.png", folders / "vis/field.png", folders / "ir/field.tif")
    code, stdout, _ = _eval(capfd, *files, "--convention", "vifb", "--metrics", "PSNR")
    assert code == 0
    # The visible image is in colour, the fused one is not: by its luminance.
    grey = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2GRAY) for path in files]
    grey = [torch.from_numpy(image)[None, None] for image in grey]
    expected = metrics.evaluate(*grey, ["PSNR"], "vifb")["PSNR"].item()
    assert float(_table(stdout)["field.png"]["PSNR"]) == pytest.approx(expected, abs=1e-4)


def test_16_bit_is_measured_by_its_whole_range(folders, capfd):
    image = cv2.imread(str(folders / "mean/field.png"), 0)
    _write(folders / "deep.png", image.astype(np.uint16) * 257)
    _write(folders / "flat.png", image)
    references = (folders / "vis/field.png", folders / "ir/field.tif")
    _, deep, _ = _eval(capfd, folders / "deep.png", *references)
    _, flat, _ = _eval(capfd, folders / "flat.png", *references)
    assert deep.replace("deep", "flat") == flat


def test_thermal_values_are_spread_as_they_were_fused(folders, capfd):
    plain = _eval(capfd, folders / "mean", folders / "vis", folders / "ir")
    for path in (folders / "ir").iterdir():
        raw = 7000 + 10 * cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.uint16)
        assert cv2.imwrite(str(path), raw)
    asked = ("--thermal-range", "7000,9550")
    assert _eval(capfd, folders / "mean", folders / "vis", folders / "ir", *asked) == plain
    assert _eval(capfd, folders / "mean", folders / "vis", folders / "ir")[1] != plain[1]
    code, _, stderr = _eval(capfd, folders / "mean", "--reference", folders / "vis", *asked)
    assert code == 2 and "thermal_range is that of infrared images" in stderr


def test_a_batch_goes_on_and_names_what_failed(folders, capfd):
    (folders / "mean/aa_broken.png").write_bytes(b"no image")
    for folder in ("vis", "ir"):
        _write(folders / folder / "aa_broken.png", np.zeros((50, 60), np.uint8))
    _write(folders / "mean/field.png", np.zeros((41, 60), np.uint8))
    _write(folders / "mean/alone.png", np.zeros((50, 60), np.uint8))
    arguments = (folders / "mean", folders / "vis", folders / "ir", "--metrics", "SSIM")
    code, stdout, stderr = _eval(capfd, *arguments)
    assert code == 1
    assert _table(stdout)["mean"]["images"] == "2"
    lines = [line for line in stderr.splitlines() if line]
    assert [line.split()[0] for line in lines] == ["failed:"] * 3
    assert "mean, aa_broken: " in lines[0]
    assert "60x41" in lines[1] and "60x50" in lines[1]
    assert lines[2] == f"failed: {folders / 'mean/alone.png'}: no alone.* in {folders / 'vis'}"
    (folders / "mean/aa_broken.png").unlink()
    (folders / "mean/field.png").unlink()
    code, _, stderr = _eval(capfd, *arguments, "--ignore-unpaired")
    assert code == 0
    assert "ignored: " in stderr


def test_an_image_without_a_value_is_named(folders, capfd):
    for folder in ("mean", "vis", "ir"):
        rng = np.random.default_rng(0)
        for name in ("flat", "noise"):
            image = rng.integers(0, 256, (200, 200), np.uint8)
            _write(folders / folder / f"{name}.png", image * (name != "flat"))
    code, stdout, stderr = _eval(
        capfd, folders / "mean", folders / "vis", folders / "ir", "--metrics", "NIQE,EN", "--ignore-unpaired"
    )
    assert code == 1  # the small images of the fixture
    assert "note: mean, flat: NIQE is no number" in stderr.splitlines()
    assert "noise" not in stderr
    assert _table(stdout)["mean"]["NIQE ↓"] == "nan"


def test_float_thermal_images_are_measured_with_a_range(folders, capfd):
    kelvin = np.random.default_rng(0).uniform(280, 310, (50, 60)).astype(np.float32)
    for name in ("bridge", "field", "street"):
        _write(folders / "kelvin" / f"{name}.tif", kelvin)
    given = (folders / "mean", folders / "vis", folders / "kelvin")
    code, stdout, _ = _eval(capfd, *given, "--metrics", "SSIM", "--thermal-range", "minmax")
    assert (code, _table(stdout)["mean"]["images"]) == (0, "3")
    code, _, stderr = _eval(capfd, *given, "--metrics", "SSIM")
    assert code == 1 and "values of type float32 are not supported" in stderr


def test_methods_that_cannot_be_paired_are_told_before_anything_is_measured(folders, monkeypatch):
    monkeypatch.setattr(evaluation, "_scores", lambda *_: pytest.fail("measured in vain"))
    (folders / "empty").mkdir()
    given = [folders / name for name in ("vis", "empty")], [folders / name for name in ("vis", "ir")]
    with pytest.raises(ValueError, match=r"no image in .*empty has its partners"):
        evaluation.measure(*given)


def test_bad_usage_is_one_line_and_2(folders, capfd):
    (folders / "empty").mkdir()
    triple = (folders / "mean", folders / "vis", folders / "ir")
    cases = [
        (triple[:2], "give FUSED VIS IR, or RESTORED with --reference CLEAN"),
        ((*triple, "--metrics", "LPIPS"), "'LPIPS'"),
        ((folders / "mean", "--reference", folders / "ir", "--metrics", "viff"), "VIFF"),
        ((*triple, "--convention", "matlab"), "matlab"),
        ((*triple[:2], folders / "ir/field.tif"), "files only or folders only"),
        ((*triple[:2], folders / "nowhere"), "nowhere does not exist"),
        ((folders / "empty", *triple[1:]), "no image in"),
        ((*triple, "--csv", folders / "no/where.csv"), "where.csv"),
        ((folders / "mean/field.png", folders / "vis/field.png", folders / "scores.csv"), "scores.csv"),
    ]
    for arguments, message in cases:
        code, stdout, stderr = _eval(capfd, *arguments)
        assert (code, stdout) == (2, ""), arguments
        assert stderr.startswith("ddrf-fast: error: "), arguments
        assert stderr.count("\n") == 1, stderr
        assert message in stderr, arguments


def test_the_command_line_offers_what_there_is():
    assert tuple(cli.eval.METRICS.split(", ")) == tuple(metrics.MEASURES)
    assert cli.eval.CONVENTIONS == metrics.CONVENTIONS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("set_name", "expected"), [("tno", README_TNO), ("tno_degraded", README_TNO_DEGRADED)]
)
def test_the_table_of_the_data(data_dir, capfd, set_name, expected):
    """To the printed digits, of all 21 images of a few methods."""
    methods = [data_dir / "baselines" / set_name / name for name in expected]
    sources = [data_dir / "tno/test" / kind for kind in ("vis", "ir")]
    columns = next(iter(expected.values()))
    code, stdout, _ = _eval(capfd, *methods, *sources, "--metrics", ",".join(columns))
    assert code == 0
    table = _table(stdout)
    for method, row in expected.items():
        for name, value in row.items():
            assert float(table[method][name]) == pytest.approx(
                value, abs=0.0051 if name == "PSNR" else 5.1e-4
            )


def test_ranks_share_where_values_are_equal():
    table = {"a": {"x": 1.0, "y": 3.0}, "b": {"x": 2.0, "y": 3.0}, "c": {"x": 0.0, "y": 1.0}}
    assert _tables.mean_ranks(table) == {"a": (2 + 1.5) / 2, "b": (1 + 1.5) / 2, "c": 3.0}
    assert _tables.mean_ranks(table, ["x"])["c"] == (1 + 3) / 2
    table["c"]["x"] = math.nan
    for columns in ([], ["x"]):
        assert _tables.mean_ranks(table, columns)["c"] == 3
    table["c"]["x"] = 0.0
    assert _tables.markdown(["name"], [["a|b\nc"]]).splitlines()[-1] == r"| a\|b c |"
    assert _tables.means(table.values()) == {"x": 1.0, "y": pytest.approx(7 / 3)}
