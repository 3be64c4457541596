"""The command `ddrf-fast`: real processes on real files; what it writes, says and returns."""

import os
import resource
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

import ddrf_fast
from ddrf_fast import cli


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
        ["eval", "--help"],
        ["reproduce", "--help"],
        ["train", "--help"],
        ["export", "--help"],
        ["data", "check", "--help"],
        ["demo", "--help"],
    ],
)
def test_help_needs_neither_torch_nor_numpy(arguments):
    program = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in ("torch", "numpy", "cv2", "lightning", "triton", "tqdm", "safetensors", "yaml"):
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


def test_an_interrupt_leaves_whole_results_and_130(tmp_path, weights):
    rng = np.random.default_rng(0)
    for index in range(300):
        for folder in ("vis", "ir"):
            _write(tmp_path / folder / f"{index:03}.png", rng.integers(0, 256, (64, 64), np.uint8))
    output = tmp_path / "out"
    folders = (tmp_path / "vis", tmp_path / "ir")
    process = subprocess.Popen(
        _command("fuse", *folders, "-o", output, "--weights", weights, "--device", "cpu"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (output / "002.png").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    written = sorted(output.iterdir())
    assert 3 <= len(written) < 300
    for path in written:
        assert path.suffix == ".png"
        assert _read(path).shape == (64, 64)


def test_debug_shows_the_traceback(folders, weights):
    with pytest.raises(ValueError, match="does not exist"):
        cli.main(
            ["fuse", str(folders[0]), "nowhere", "-o", str(folders[2]), "--weights", str(weights), "--debug"]
        )


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
