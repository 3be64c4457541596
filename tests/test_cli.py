"""The command `ddrf-fast`: real processes on real files; what it writes, says and returns."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageCms

import ddrf_fast
from ddrf_fast import cli
from ddrf_fast.cli import degrade, export, files, info
from ddrf_fast.data import read_profile
from ddrf_fast.degradation import Degradation
from ddrf_fast.degradation.presets import PRESETS
from ddrf_fast.export import FORMATS, OUTPUTS


@pytest.fixture
def folders(tmp_path):
    """Two folders of three pairs, infrared 8 bit; visible 8 bit colour, 16 bit colour and grey; any sizes."""
    rng = np.random.default_rng(0)
    visible = {
        "street": rng.integers(0, 256, (37, 50, 3), np.uint8),
        "bridge": rng.integers(0, 65536, (40, 31, 3), np.uint16),
        "field": rng.integers(0, 256, (33, 33), np.uint8),
    }
    for name, image in visible.items():
        _write(tmp_path / "vis" / f"{name}.png", image)
        _write(tmp_path / "ir" / f"{name}.tif", rng.integers(0, 256, image.shape[:2], np.uint8))
    return tmp_path / "vis", tmp_path / "ir", tmp_path / "out"


def _write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


def _read(path):
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None, f"{path} is no image"
    return image[..., ::-1] if image.ndim == 3 else image


def _names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def _command(*arguments):
    return [sys.executable, "-m", "ddrf_fast", *map(str, arguments)]


def _process(*arguments, **options):
    return subprocess.run(_command(*arguments), capture_output=True, text=True, check=False, **options)


def _main(capfd, *arguments):
    """The command in this process: exit code, stdout, stderr."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["fuse", "--help"],
        ["restore", "--help"],
        ["degrade", "--help"],
        ["eval", "--help"],
        ["reproduce", "--help"],
        ["train", "--help"],
        ["export", "--help"],
        ["data", "check", "--help"],
        ["bench", "--help"],
        ["demo", "--help"],
    ],
)
def test_help_needs_neither_torch_nor_numpy(arguments):
    program = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        heavy = "torch numpy cv2 lightning triton tqdm safetensors yaml PIL shtab".split()
        if name.partition(".")[0] in heavy:
            raise AssertionError(f"{{name}} was imported for help")

sys.meta_path.insert(0, Blocker())
from ddrf_fast.cli import main
main({arguments!r})
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(
        f"ddrf-fast {ddrf_fast.__version__}" if "--version" in arguments else "usage: ddrf-fast"
    )


def test_folders_are_fused_pair_by_pair(folders, weights):
    visible, infrared, output = folders
    result = _process("fuse", visible, infrared, "-o", output, "--weights", weights, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "fused 3 of 3 pairs" in result.stdout
    assert result.stderr == ""  # no progress bar where there is no terminal
    assert _names(output) == ["bridge.png", "field.png", "street.png"]
    for path in sorted(visible.iterdir()):
        expected = ddrf_fast.fuse(path, infrared / f"{path.stem}.tif", weights=weights, device="cpu")
        fused = _read(output / path.name)
        assert fused.dtype == _read(path).dtype
        np.testing.assert_array_equal(fused, expected)


def test_real_pairs_from_jpeg_and_png(data_dir, tmp_path, weights, capfd):
    expected = []
    for folder, count in (("roadscene/test", 2), ("msrs/test", 1), ("tno/test", 1)):
        for path in sorted((data_dir / folder / "vis").iterdir())[:count]:
            for kind in ("vis", "ir"):
                (tmp_path / kind).mkdir(exist_ok=True)
                os.symlink(data_dir / folder / kind / path.name, tmp_path / kind / path.name)
            expected.append(f"{path.stem}_fused.png")
    arguments = ("-o", tmp_path / "out", "--suffix", "_fused", "--weights", weights, "--device", "cpu")
    code, stdout, stderr = _main(capfd, "fuse", tmp_path / "vis", tmp_path / "ir", *arguments)
    assert (code, stderr) == (0, "")
    assert "fused 4 of 4 pairs" in stdout
    assert _names(tmp_path / "out") == sorted(expected)
    for path in (tmp_path / "vis").iterdir():
        assert _read(tmp_path / "out" / f"{path.stem}_fused.png").shape[:2] == _read(path).shape[:2]


def test_one_pair_into_a_file_a_folder_and_a_new_folder(folders, weights, tmp_path, capfd):
    pair = (folders[0] / "street.png", folders[1] / "street.tif", "--weights", weights, "--device", "cpu")
    for output, written in (
        ("a/fused.tif", "a/fused.tif"),
        ("a", "a/street.png"),
        ("b.c/", "b.c/street.png"),
    ):
        code, stdout, stderr = _main(capfd, "fuse", *pair, "-o", f"{tmp_path}/{output}")
        assert (code, stderr) == (0, "")
        assert str(tmp_path / written) in stdout
        assert _read(tmp_path / written).shape == (37, 50, 3)


def test_a_batch_goes_on_and_names_what_failed(folders, weights, capfd):
    visible, infrared, output = folders
    broken = visible / "aa_broken.png"
    broken.write_bytes((visible / "street.png").read_bytes()[:600])
    _write(infrared / "aa_broken.png", np.zeros((37, 50), np.uint8))
    _write(visible / "bb_other_size.png", np.zeros((20, 30), np.uint8))
    _write(infrared / "bb_other_size.png", np.zeros((30, 20), np.uint8))
    arguments = ("fuse", visible, infrared, "-o", output, "--weights", weights, "--device", "cpu")
    code, stdout, stderr = _main(capfd, *arguments)
    assert code == 1
    assert "fused 3 of 5 pairs" in stdout
    lines = stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("failed: ")
    assert "aa_broken.png" in lines[0]
    assert "bb_other_size.png" in lines[1]
    assert "30x20" in lines[1]
    assert "20x30" in lines[1]
    assert _names(output) == ["bridge.png", "field.png", "street.png"]


def test_images_without_a_partner_count_as_failed_unless_told(folders, weights, capfd):
    visible, infrared, output = folders
    _write(visible / "alone.png", np.zeros((20, 30), np.uint8))
    (visible / "notes.txt").write_text("no image, no complaint")
    arguments = ("fuse", visible, infrared, "-o", output, "--weights", weights, "--device", "cpu")
    code, stdout, stderr = _main(capfd, *arguments)
    assert code == 1
    assert "fused 3 of 3 pairs" in stdout
    assert stderr == f"failed: {visible / 'alone.png'}: no alone.* in {infrared}\n"
    code, _, stderr = _main(capfd, *arguments, "--ignore-unpaired")
    assert code == 0
    assert stderr.startswith("ignored: ")


def test_existing_results_are_replaced_or_skipped(folders, weights, capfd):
    visible, infrared, output = folders
    _write(output / "street.png", np.zeros((5, 5), np.uint8))
    arguments = ("fuse", visible, infrared, "-o", output, "--weights", weights, "--device", "cpu")
    code, stdout, _ = _main(capfd, *arguments, "--skip-existing")
    assert code == 0
    assert "fused 2 of 3 pairs" in stdout
    assert "1 skipped" in stdout
    assert _read(output / "street.png").shape == (5, 5)
    code, stdout, _ = _main(capfd, *arguments)
    assert code == 0
    assert "fused 3 of 3 pairs" in stdout
    assert _read(output / "street.png").shape == (37, 50, 3)


def test_bad_usage_and_bad_input_are_one_line_and_2(folders, weights, tmp_path, capfd):
    visible, infrared, output = folders
    street = visible / "street.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("weights?")
    (tmp_path / "cut.png").write_bytes(street.read_bytes()[:600])
    given = ("--weights", weights, "--device", "cpu")
    cases = [
        ((), "COMMAND"),
        (("fuse", visible), "-o"),
        (("fuse", visible, infrared, "-o", output, "--colour", "blue"), "--colour"),
        (("train", "epochs=many"), "epochs=many: Value 'many'"),
        (("train", "--epochs", "3"), "--epochs"),
        (("info", "epochs=3"), "unrecognized arguments: epochs=3"),
        (("fuse", visible, tmp_path / "missing", "-o", output, *given), "missing does not exist"),
        (("fuse", visible, infrared / "street.tif", "-o", output, *given), "two files or two folders"),
        (("fuse", visible, tmp_path / "empty", "-o", output, *given), "no image in"),
        (("fuse", visible, infrared, "-o", street, *given), "is a file"),
        (("fuse", visible, infrared, "-o", output, "--ext", "xyz", *given), "bridge.xyz"),
        (
            ("degrade", street, "-o", "one.png", "--ext", "tif"),
            "an extension names results in a folder, but one",
        ),
        (("degrade", street, "-o", "one.png", "--suffix", "_low"), "a suffix names results in a folder, but"),
        (("fuse", street, infrared / "street.tif", "-o", tmp_path / "a.xyz", *given), "a.xyz"),
        (("fuse", street, infrared / "field.tif", "-o", output, *given), "50x37"),
        (("fuse", street, tmp_path / "text.safetensors", "-o", output, *given), "text.safetensors"),
        (("fuse", street, tmp_path / "cut.png", "-o", output, *given), "cut.png"),
        (
            ("fuse", visible, infrared, "-o", output, "--weights", tmp_path / "no.safetensors"),
            "no.safetensors",
        ),
        (
            ("fuse", visible, infrared, "-o", output, "--weights", tmp_path / "text.safetensors"),
            "text.safetensors",
        ),
        (("fuse", visible, infrared, "-o", output, "--device", "toaster"), "toaster"),
        (("fuse", street, infrared / "street.tif", "-o", street, *given), "is an input"),
        (("fuse", visible, infrared, "-o", visible, *given), "is an input"),
        (("demo", "-o", output, "--weights", tmp_path / "no.safetensors"), "no.safetensors"),
        (("train", f"data={tmp_path / 'empty'}", f"output={tmp_path / 'run'}"), "no pair of images"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments, message in cases:
        code, stdout, stderr = _main(capfd, *arguments)
        assert (code, stdout) == (2, ""), (arguments, stderr)
        assert stderr.startswith("ddrf-fast: error: "), arguments
        assert stderr.count("\n") == 1, stderr
        assert message in stderr, arguments
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_link_to_an_input_is_not_written_through(folders, weights, tmp_path, capfd):
    street = folders[0] / "street.png"
    before = street.read_bytes()
    (tmp_path / "link.png").symlink_to(street)
    code, _, stderr = _main(
        capfd, "fuse", street, folders[1] / "street.tif", "-o", tmp_path / "link.png", "--weights", weights
    )
    assert code == 2
    assert "is an input" in stderr
    assert street.read_bytes() == before


def test_two_images_of_one_stem_are_ambiguous(folders, weights, capfd):
    visible, infrared, output = folders
    _write(visible / "street.bmp", np.zeros((5, 5), np.uint8))
    code, _, stderr = _main(capfd, "fuse", visible, infrared, "-o", output, "--weights", weights)
    assert code == 2
    assert "street.bmp" in stderr


def test_a_write_that_fails_leaves_nothing_behind(folders, weights):
    """As on a full disk: no file of this process may grow beyond one kilobyte."""
    visible, infrared, output = folders
    result = _process(
        "fuse", visible, infrared, "-o", output, "--weights", weights, "--device", "cpu",
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)),
    )  # fmt: skip
    assert result.returncode == 1
    assert "fused 0 of 3 pairs" in result.stdout
    assert result.stderr.count("failed: ") == 3
    assert _names(output) == []


def _in_the_background() -> None:
    """As a script starts what it does not wait for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("how", "where"), [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGTERM, _in_the_background)]
)
def test_an_interrupt_leaves_whole_results_and_130(tmp_path, weights, how, where):
    rng = np.random.default_rng(0)
    for index in range(1000):
        for folder in ("vis", "ir"):
            _write(tmp_path / folder / f"{index:04}.png", rng.integers(0, 256, (64, 64), np.uint8))
    output = tmp_path / "out"
    folders = (tmp_path / "vis", tmp_path / "ir")
    process = subprocess.Popen(
        _command("fuse", *folders, "-o", output, "--weights", weights, "--device", "cpu"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=where,
    )  # fmt: skip
    while not (output / "0002.png").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    _, stderr = process.communicate()
    assert process.returncode == 130
    said = re.search(r"interrupted after (\d+) of 1000; with --skip-existing it goes on there", stderr)
    assert int(said[1]) == len(list(output.iterdir()))
    assert "Traceback" not in stderr
    written = sorted(output.iterdir())
    assert 3 <= len(written) < 1000
    for path in written:
        assert path.suffix == ".png"
        assert _read(path).shape == (64, 64)


def test_debug_shows_the_traceback(folders, weights):
    with pytest.raises(ValueError, match="does not exist"):
        cli.main(
            ["fuse", str(folders[0]), "nowhere", "-o", str(folders[2]), "--weights", str(weights), "--debug"]
        )


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("bad input"), 2, "bad input"),
        (TypeError("of either"), 2, "of either (ddrf-fast info --debug shows where)"),
        (RuntimeError("a mistake"), 1, "RuntimeError: a mistake (ddrf-fast info --debug shows where)"),
    ],
)
def test_what_may_be_a_mistake_of_the_program_can_be_shown(error, code, message, monkeypatch, capfd):
    def run(options):
        raise error

    monkeypatch.setattr(info, "run", run)
    assert _main(capfd, "info") == (code, "", f"ddrf-fast: error: {message}\n")


def test_demo_writes_and_measures(tmp_path, weights, capfd):
    output = tmp_path / "demo"
    code, stdout, stderr = _main(capfd, "demo", "-o", output, "--weights", weights, "--device", "cpu")
    assert (code, stderr) == (0, "")
    assert _names(output) == ["fused.png", "side_by_side.png"]
    for expected in (str(output / "fused.png"), str(output / "side_by_side.png"), "ms", "EN", "Qabf"):
        assert expected in stdout
    sample = Path(ddrf_fast.__file__).parent / "assets" / "sample_visible.png"
    fused = _read(output / "fused.png")
    assert fused.shape == _read(sample).shape
    np.testing.assert_array_equal(
        fused, ddrf_fast.fuse(sample, sample.with_name("sample_infrared.png"), weights=weights, device="cpu")
    )
    side_by_side = _read(output / "side_by_side.png")
    assert side_by_side.shape[1] >= 3 * fused.shape[1]
    np.testing.assert_array_equal(side_by_side[-360:, -484:-4], fused)


def test_info_describes_the_installation(capfd):
    code, stdout, _ = _main(capfd, "info")
    assert code == 0
    assert torch.__version__ in stdout
    assert ddrf_fast.__version__ in stdout


def test_train_prints_its_settings(tmp_path, capfd):
    pytest.importorskip("omegaconf")
    (tmp_path / "own.yaml").write_text("crop: 64")
    given = ("--config", "paper", "model.width=8", "--config", tmp_path / "own.yaml", "model.blocks=1")
    code, stdout, stderr = _main(capfd, "train", *given, "--print-config")
    assert (code, stderr) == (0, "")
    settings = yaml.safe_load(stdout)
    assert (settings["epochs"], settings["crop"]) == (89, 64)
    assert (settings["model"]["width"], settings["model"]["blocks"]) == (8, 1)


@pytest.mark.slow
def test_train_is_interrupted_and_resumed_and_fuse_reads_what_it_writes(
    data_dir, tmp_path, capfd, monkeypatch
):
    pytest.importorskip("lightning")
    from ddrf_fast.training.module import TrainingModule

    for kind in ("vis", "ir"):
        for path in sorted((data_dir / "roadscene" / "train" / kind).iterdir())[:3]:
            _write(tmp_path / "pairs" / kind / f"{path.stem}.png", _read(path)[:80, :90])
    run = [f"data={tmp_path / 'pairs'}", f"output={tmp_path / 'run'}", "crop=32", "batch_size=1", "epochs=1"]
    run += ["crops_per_pair=2", "validation_pairs=1", "model.width=8", "model.num_kernels=2"]
    run += ["device=cpu", "progress_bar=false"]
    with monkeypatch.context() as patch:
        original = TrainingModule.training_step
        patch.setattr(
            TrainingModule,
            "training_step",
            lambda *arguments: (signal.raise_signal(signal.SIGINT), original(*arguments))[1],
        )
        code, stdout, stderr = _main(capfd, "train", *run)
    assert (code, stdout) == (130, "")
    assert stderr.endswith(
        f"interrupted after 1 steps; resumed, it goes on from {tmp_path / 'run' / 'last.ckpt'}\n"
    )
    code, _, stderr = _main(capfd, "train", *run)
    assert code == 2
    assert "holds a training already" in stderr
    code, stdout, _ = _main(capfd, "train", "--resume", *run)
    weights = tmp_path / "run" / "ddrfnet.safetensors"
    assert code == 0
    assert f"wrote {weights} after 4 steps" in stdout
    assert "restored_visible_psnr" in stdout
    folders = (tmp_path / "pairs" / "vis", tmp_path / "pairs" / "ir")
    code, stdout, _ = _main(capfd, "fuse", *folders, "-o", tmp_path / "out", "--weights", weights)
    assert code == 0
    assert "fused 3 of 3 pairs" in stdout


# --- many images, damaged ones, several processes ----------------------------------------------------------


def test_of_a_hundred_pairs_the_damaged_are_named_and_the_others_done(tmp_path, weights):
    rng = np.random.default_rng(0)
    visible, infrared, output = (tmp_path / name for name in ("vis", "ir", "out"))
    smooth = cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), (40, 30))
    for index in range(88):
        _write(visible / f"ok{index:02}.png", smooth if index else np.full((30, 40, 3), 7, np.uint8))
        _write(infrared / f"ok{index:02}.png", np.full((30, 40), index, np.uint8))
    for name in ("png", "jpg", "tif", "bmp", "webp"):
        encoded = cv2.imencode(f".{name}", smooth)[1].tobytes()
        (visible / f"cut_{name}.{name}").write_bytes(encoded[: 2 * len(encoded) // 3])
    (visible / "empty.png").write_bytes(b"")
    (visible / "text.jpg").write_text("this is no image")
    _write(visible / "gigantic.png", np.zeros((300, 400), np.uint8))
    _write(visible / "other_size.png", np.zeros((20, 20), np.uint8))
    _write(visible / "swapped.png", smooth[..., 0])
    _write(visible / "nan.png", smooth)
    (visible / "really_jpeg.png").write_bytes(cv2.imencode(".jpg", smooth)[1].tobytes())
    for path in visible.glob("*"):
        if not (infrared / path.name).exists():
            _write(infrared / f"{path.stem}.png", smooth[..., 0])
    _write(infrared / "swapped.png", smooth)
    (infrared / "nan.png").unlink()
    assert cv2.imwrite(str(infrared / "nan.tiff"), np.full((30, 40), np.nan, np.float32))
    assert len(list(visible.iterdir())) == 100

    arguments = ("-o", output, "--weights", weights, "--device", "cpu", "--max-pixels", 50_000, "-j", 3)
    result = _process("fuse", visible, infrared, *arguments, "--batch", 8)
    assert result.returncode == 1
    assert "fused 89 of 100 pairs" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 11, result.stderr
    for name, reason in {
        "cut_bmp.bmp": "damaged or cut off",
        "cut_jpg.jpg": "damaged or cut off",
        "cut_png.png": "damaged or cut off",
        "cut_tif.tif": "damaged or cut off",
        "cut_webp.webp": "damaged or cut off",
        "empty.png": "the file is empty",
        "gigantic.png": "says it has 400x300 pixels, more than the 50000 allowed",
        "nan.tiff": "holds NaN",
        "other_size.png": "is 20x20",
        "swapped.png": "seem to be swapped",
        "text.jpg": "not an image",
    }.items():
        (line,) = [line for line in lines if name in line]
        assert line.startswith("failed: ")
        assert reason in line
    assert len(_names(output)) == 89
    for path in output.iterdir():
        assert _read(path).shape == (30, 40, 3)


def test_the_batch_size_and_the_threads_change_nothing(data_dir, tmp_path, weights, capfd):
    for kind in ("vis", "ir"):
        (tmp_path / kind).mkdir()
        for index, path in enumerate(sorted((data_dir / "msrs/test" / kind).iterdir())[:3]):
            _write(tmp_path / kind / f"{index}.png", _read(path)[:120, :160])
    folders = (tmp_path / "vis", tmp_path / "ir")
    given = ("--weights", weights, "--device", "cpu")
    for name, options in {"one": (), "many": ("--batch", 3, "-j", 4)}.items():
        assert _main(capfd, "fuse", *folders, "-o", tmp_path / name, *given, *options)[0] == 0
    for path in (tmp_path / "one").iterdir():
        difference = _read(path).astype(int) - _read(tmp_path / "many" / path.name)
        assert np.abs(difference).max() <= 1


def test_json_tells_scripts_everything(folders, weights, capfd):
    visible, infrared, output = folders
    _write(visible / "alone.png", np.zeros((20, 30), np.uint8))
    (visible / "street.png").write_bytes(b"damaged")
    _write(output / "field.png", np.zeros((5, 5), np.uint8))
    given = ("--weights", weights, "--device", "cpu", "--skip-existing", "--json")
    code, stdout, _ = _main(capfd, "fuse", visible, infrared, "-o", output, *given)
    assert code == 1
    told = json.loads(stdout)
    assert [entry["output"] for entry in told["written"]] == [str(output / "bridge.png")]
    assert told["written"][0]["inputs"] == [str(visible / "bridge.png"), str(infrared / "bridge.tif")]
    assert [entry["output"] for entry in told["skipped"]] == [str(output / "field.png")]
    assert "street.png" in told["failed"][0]["error"]
    assert told["unpaired"] == [f"{visible / 'alone.png'}: no alone.* in {infrared}"]
    assert (told["command"], told["device"], told["processes"], told["stopped"]) == ("fuse", "cpu", 1, [])
    assert told["seconds"] > 0


def test_results_that_would_be_one_file_are_refused(folders, weights, capfd):
    visible, infrared, output = folders
    suffix = "/../../one"  # out of the folder of each, to one place
    code, _, stderr = _main(
        capfd, "fuse", visible, infrared, "-o", output / "in", "--suffix", suffix, "--weights", weights
    )
    assert code == 2
    assert "would both be" in stderr


def test_folders_inside_of_folders_and_patterns(folders, weights, tmp_path, capfd):
    visible, infrared, output = folders
    given = ("--weights", weights, "--device", "cpu")
    for name in ("day", "night"):
        (tmp_path / "v" / name).mkdir(parents=True)
        (tmp_path / "t" / name).mkdir(parents=True)
        os.symlink(visible / "street.png", tmp_path / "v" / name / "1_v.png")
        os.symlink(infrared / "street.tif", tmp_path / "t" / name / "1_t.tif")
    patterns = (f"{tmp_path}/v/**/*_v.*", f"{tmp_path}/t/**/*_t.*")
    code, _, stderr = _main(capfd, "fuse", *patterns, "-o", output, *given, "--ext", "auto")
    assert (code, stderr) == (0, "")
    assert [path.relative_to(output).as_posix() for path in sorted(output.rglob("*.png"))] == [
        "day/1_v.png",
        "night/1_v.png",
    ]


def test_raw_thermal_images_are_spoken_of(folders, weights, capfd):
    visible, infrared, output = folders
    _write(infrared / "street.tif", np.linspace(7000, 8000, 37 * 50).reshape(37, 50).astype(np.uint16))
    given = ("-o", output, "--weights", weights, "--device", "cpu")
    code, _, stderr = _main(capfd, "fuse", visible, infrared, *given)
    assert code == 0
    assert stderr.startswith("note: 1 infrared images of 16 bit use few of their values")
    assert "street.tif those from 7000 to 8000" in stderr
    pair = (visible / "street.png", infrared / "street.tif")
    code, stdout, stderr = _main(capfd, "fuse", *pair, *given, "--thermal-range", "7000,8000")
    assert (code, stderr) == (0, "")
    assert "thermal range 7000,8000: values from 7000 to 8000 became black to white" in stdout
    expected = ddrf_fast.fuse(*pair, weights=weights, device="cpu", thermal_range=(7000, 8000))
    np.testing.assert_array_equal(_read(output / "street.png"), expected)


def test_sizes_are_made_alike_when_asked(folders, weights, tmp_path, capfd):
    visible, infrared, _ = folders
    pair = (visible / "street.png", infrared / "field.tif", "--weights", weights, "--device", "cpu")
    np.savetxt(tmp_path / "h.txt", [[50 / 33, 0, 0], [0, 37 / 33, 0], [0, 0, 1]])
    for name, options, size in (
        ("a.png", ("--resize", "visible"), (37, 50, 3)),
        ("b.png", ("--resize", "infrared"), (33, 33, 3)),
        ("c.png", ("--homography", tmp_path / "h.txt"), (37, 50, 3)),
        ("d.png", ("--resize", "infrared", "--color", "gray"), (33, 33)),
    ):
        code, _, stderr = _main(capfd, "fuse", *pair, "-o", tmp_path / name, *options)
        assert (code, stderr) == (0, "")
        assert _read(tmp_path / name).shape == size


def test_clean_images_are_fused_as_such(folders, weights, tmp_path, capfd):
    visible, infrared, output = folders
    given = ("--weights", weights, "--device", "cpu")
    code, stdout, stderr = _main(capfd, "fuse", visible, infrared, "-o", output, *given, "--clean")
    assert (code, stderr) == (0, "")
    assert "fused 3 of 3 pairs" in stdout
    pair = visible / "street.png", infrared / "street.tif"
    settings = {"weights": weights, "device": "cpu"}
    clean = ddrf_fast.fuse(*pair, **settings, clean=True)
    np.testing.assert_array_equal(_read(output / "street.png"), clean)
    assert (clean != ddrf_fast.fuse(*pair, **settings)).any()


def test_restore_of_both_kinds_neither_replaces_inputs_nor_takes_results(folders, weights, tmp_path, capfd):
    visible, infrared, _ = folders
    given = ("--weights", weights, "--device", "cpu")
    out = tmp_path / "out"
    shutil.copytree(infrared, out / "visible")
    ending = ("--ext", next(infrared.iterdir()).suffix)
    before = {path.name: path.read_bytes() for path in (out / "visible").iterdir()}
    code, _, stderr = _main(
        capfd, "restore", "--visible", visible, "--infrared", out / "visible", "-o", out, *given, *ending
    )
    assert code == 2 and "is an input and would be replaced" in stderr
    assert {path.name: path.read_bytes() for path in (out / "visible").iterdir()} == before

    everything = tmp_path / "all"
    shutil.copytree(visible, everything / "data")
    arguments = ("restore", "-r", "--visible", everything, "--infrared", infrared, "-o", everything / "out")
    told = [_main(capfd, *arguments, *given)[1] for _ in range(2)]
    count = len(list(visible.iterdir())) + len(list(infrared.iterdir()))
    assert all(f"restored {count} of {count} images" in text for text in told)


def test_restore_takes_either_kind_or_both(folders, weights, tmp_path, capfd):
    visible, infrared, output = folders
    given = ("--weights", weights, "--device", "cpu")
    code, stdout, stderr = _main(
        capfd, "restore", "--infrared", infrared, "-o", output, *given, "--ext", "tif"
    )
    assert (code, stderr) == (0, "")
    assert "restored 3 of 3 images" in stdout
    for path in infrared.iterdir():
        expected = ddrf_fast.restore(infrared=path, weights=weights, device="cpu")
        np.testing.assert_array_equal(_read(output / path.name), expected)
    code, stdout, _ = _main(
        capfd, "restore", "--visible", visible, "--infrared", infrared, "-o", tmp_path / "both", *given
    )
    assert code == 0
    assert "restored 6 of 6 images" in stdout
    assert _names(tmp_path / "both" / "visible") == _names(tmp_path / "both" / "infrared")
    np.savetxt(tmp_path / "kernel.txt", np.ones((3, 3)))
    one = ("restore", "--visible", visible / "street.png", "-o", tmp_path / "told.png", *given)
    known = ("--kernel", tmp_path / "kernel.txt", "--noise-std", "0.02", "--tone", "1.5", "0.9", "0.8")
    assert _main(capfd, *one, *known)[0] == 0
    told = ddrf_fast.restore(
        visible / "street.png",
        weights=weights,
        device="cpu",
        kernel=np.ones((3, 3)),
        noise_std=0.02,
        tone=(1.5, 0.9, 0.8),
    )
    np.testing.assert_array_equal(_read(tmp_path / "told.png"), told)
    kelvin = np.linspace(280, 320, 200, dtype=np.float32).reshape(10, 20)
    _write(tmp_path / "kelvin.tif", kelvin)
    arguments = ("restore", "--infrared", tmp_path / "kelvin.tif", "-o", tmp_path / "again.tif", *given)
    code, stdout, stderr = _main(capfd, *arguments, "--thermal-range", "minmax")
    assert (code, stderr) == (0, "")
    assert "thermal range minmax: values from 280 to 320 became black to white" in stdout
    assert _read(tmp_path / "again.tif").dtype == np.float32
    assert np.abs(_read(tmp_path / "again.tif") - kelvin).max() < 20
    code, _, stderr = _main(capfd, "restore", "-o", output, *given)
    assert code == 2
    assert "give --visible IMAGES, --infrared IMAGES, or both" in stderr


def test_degrade_depends_on_seed_and_name_alone(folders, tmp_path, capfd):
    visible, _, output = folders
    options = ("--seed", 7, "--scale", 2, "--noise-std", "0.05,0.1", "--blur", "spatial")
    code, stdout, stderr = _main(capfd, "degrade", visible, "-o", output, *options, "--recipes")
    assert (code, stderr) == (0, "")
    assert "degraded 3 of 3 images" in stdout
    assert _names(output) == sorted(
        f"{n}.{e}" for n in ("bridge", "field", "street") for e in ("json", "png")
    )
    one = tmp_path / "one.png"
    assert _main(capfd, "degrade", visible / "bridge.png", "-o", one, *options)[0] == 0
    np.testing.assert_array_equal(_read(one), _read(output / "bridge.png"))
    assert _read(one).shape == (20, 16, 3)
    assert _read(one).dtype == np.uint16
    recipe = json.loads((output / "bridge.json").read_text())
    assert (recipe["scale"], recipe["seed"]) == (2, 7)
    assert 0.05 <= recipe["noise_std"][0] <= 0.1
    image = torch.from_numpy(ddrf_fast.data.read_image(visible / "bridge.png")).permute(2, 0, 1)[None] / 65535
    tensors = {name: torch.tensor(value) for name, value in recipe.items() if isinstance(value, list)}
    again = Degradation(**(recipe | tensors | {"seed": torch.tensor(7)})).apply(image.float())
    again = (again.clamp(0, 1) * 65535)[0].permute(1, 2, 0)
    assert np.abs(again.numpy() - _read(one)).max() <= 2
    assert _main(capfd, "degrade", visible, "-o", output, "--noise-std", "0.1,x")[0] == 2
    assert _main(capfd, "degrade", visible, "-o", output, "--noise-std", "0.2,0.1")[0] == 2


def test_names_that_are_no_text_are_told_and_written(tmp_path):
    folder = os.fsencode(tmp_path)
    for kind in (b"fused", b"vis", b"ir"):
        os.mkdir(os.path.join(folder, kind))
        with open(os.path.join(folder, kind, b"n\xff.png"), "wb") as file:
            file.write(cv2.imencode(".png", np.full((50, 50), 99, np.uint8))[1].tobytes())
    given = [os.path.join(folder, kind) for kind in (b"fused", b"vis", b"ir")]
    result = subprocess.run(
        [sys.executable, "-m", "ddrf_fast", "eval", *given, "--metrics", "EN", "--csv", folder + b"/t.csv"],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert b"fused,n\xff,0.0" in (tmp_path / "t.csv").read_bytes()
    fused = subprocess.run(
        [sys.executable, "-m", "ddrf_fast", "degrade", given[1], "-o", folder + b"/o\xff", "--json"],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert fused.returncode == 0, fused.stderr
    assert len(json.loads(fused.stdout)["written"]) == 1


def test_options_that_mean_nothing_are_refused(folders, tmp_path, capfd):
    visible, infrared, output = folders
    pair = (visible / "street.png", infrared / "street.tif")
    for arguments, message in (
        (("fuse", *pair, "-r"), "--recursive has no meaning for two files"),
        (("fuse", *pair, "--ignore-unpaired"), "--ignore-unpaired has no meaning for two files"),
        (("restore", "--visible", visible, "--thermal-range", "minmax"), "there is no --infrared IMAGES"),
    ):
        code, _, stderr = _main(capfd, *arguments, "-o", output)
        assert code == 2 and message in stderr


@pytest.mark.parametrize("command", ["fuse", "restore", "degrade"])
def test_results_have_the_colour_profile_of_their_image(tmp_path, capfd, command):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image, output = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8), tmp_path / "out.png"
    Image.fromarray(image).save(tmp_path / "visible.jpg", icc_profile=profile)
    _write(tmp_path / "infrared.png", image[..., 0])
    inputs = {
        "fuse": (tmp_path / "visible.jpg", tmp_path / "infrared.png"),
        "restore": ("--visible", tmp_path / "visible.jpg"),
        "degrade": (tmp_path / "visible.jpg",),
    }
    assert _main(capfd, command, *inputs[command], "-o", output)[0] == 0
    assert read_profile(output) == profile


@pytest.mark.parametrize("preset", ["paper", "kair", "real_esrgan"])
def test_the_noise_that_is_asked_for_is_all_there_is(tmp_path, capfd, preset):
    for number in range(6):
        _write(tmp_path / f"in/{number}.png", np.full((40, 40), 128, np.uint8))
    options = ("--preset", preset, "--noise-std", "0.1", "--recipes")
    assert _main(capfd, "degrade", tmp_path / "in", "-o", tmp_path / "out", *options)[0] == 0
    for number in range(6):
        recipe = json.loads((tmp_path / f"out/{number}.json").read_text())
        assert recipe["noise_std"] == pytest.approx([0.1])
        assert not any(recipe["shot_noise"] or [])
        assert _read(tmp_path / f"out/{number}.png").std() == pytest.approx(25.5, rel=0.15)


def test_what_the_command_line_says_without_torch_is_so():
    assert degrade.PRESETS == PRESETS
    assert tuple(FORMATS) == export.FORMATS
    assert tuple(OUTPUTS) == export.OUTPUTS
    assert f"{ddrf_fast.data.MAX_PIXELS}" in files.file_options().format_help()


def test_weights_are_never_unpickled(folders, tmp_path, capfd):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    visible, infrared, output = folders
    for name, zipped in (("new.pt", True), ("old.pth", False)):
        torch.save({"weights": Evil()}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        code, _, stderr = _main(capfd, "fuse", visible, infrared, "-o", output, "--weights", tmp_path / name)
        assert code == 2
        assert name in stderr
        assert "never unpickled" in stderr
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, capfd):
    code, stdout, stderr = _main(capfd, "--print-completion", shell)
    assert (code, stderr) == (0, "")
    for expected in ("ddrf-fast", "fuse", "skip-existing", "srmd"):
        assert expected in stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_files(tmp_path, capfd):
    script = _main(capfd, "--print-completion", "bash")[1]
    (tmp_path / "street.png").touch()
    ask = "\nCOMP_WORDS=({}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); {}; echo ${{COMPREPLY[@]}}\n"
    function = re.search(r"complete .*-F (\S+)", script)[1]
    for words, expected in (
        ("ddrf-fast fu", "fuse"),
        ("ddrf-fast fuse --skip", "--skip-existing"),
        ("ddrf-fast degrade --preset sr", "srmd"),
        ("ddrf-fast fuse str", "street.png"),
    ):
        result = subprocess.run(
            ["bash", "-c", script + ask.format(words, function)],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert result.stdout.split() == [expected], (words, result.stderr)


def _torchrun(*arguments):
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "ddrf_fast", *map(str, arguments),
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_that_was_killed_is_made_up_for(tmp_path, weights):
    rng, count = np.random.default_rng(0), 300
    for index in range(count):
        for folder in ("vis", "ir"):
            _write(tmp_path / folder / f"{index:03}.png", rng.integers(0, 256, (96, 96), np.uint8))
    (tmp_path / "vis" / "000.png").write_bytes(b"damaged")
    output = tmp_path / "out"
    arguments = ("fuse", tmp_path / "vis", tmp_path / "ir", "-o", output, "--weights", weights)
    arguments += ("--device", "cpu", "--skip-existing", "--json")
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        _torchrun(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet
    )
    while len(list(output.glob("*.png"))) < 20 and first.poll() is None:
        time.sleep(0.005)
    workers = [
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == first.pid
    ]
    os.kill(workers[0], signal.SIGKILL)
    first.communicate()
    assert first.returncode != 0
    done = {path.name: path.read_bytes() for path in output.glob("*.png")}
    assert 20 <= len(done) < count - 1
    for name in done:
        assert _read(output / name).shape == (96, 96)

    second = subprocess.run(_torchrun(*arguments), capture_output=True, text=True, check=False, env=quiet)
    assert second.returncode != 0  # because of the damaged one
    (told,) = [json.loads(line) for line in second.stdout.splitlines() if line.startswith("{")]
    assert told["processes"] == 2
    assert len(told["skipped"]) == len(done)
    assert len(told["written"]) == count - 1 - len(done)
    assert [entry["output"] for entry in told["failed"]] == [str(output / "000.png")]
    assert len({entry["output"] for entry in told["written"] + told["skipped"]}) == count - 1
    assert {path.name for path in output.glob("*.png")} == {f"{index:03}.png" for index in range(1, count)}
    for name, content in done.items():
        assert (output / name).read_bytes() == content
    one = tmp_path / "one.png"
    assert cli.main([*map(str, arguments[:1]), *(f"{tmp_path}/{k}/077.png" for k in ("vis", "ir")),
                     "-o", str(one), "--weights", str(weights), "--device", "cpu"]) == 0  # fmt: skip
    np.testing.assert_array_equal(_read(one), _read(output / "077.png"))


def _parent(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None
