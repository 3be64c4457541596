"""What the page does with a pair, without the page; and what the command says where there cannot be one."""

import socket
import subprocess
import sys

import pytest
import torch

from ddrf_fast import Fuser
from ddrf_fast.data import read_image, write_image
from ddrf_fast.demo.sample import SAMPLE_INFRARED, SAMPLE_VISIBLE
from ddrf_fast.demo.trial import BLURS, Damage, measure_fused, measure_restored, read, try_pair, unit


@pytest.fixture(scope="module")
def fuser(weights):
    return Fuser(weights, "cpu")


def test_what_is_not_asked_for_is_not_touched():
    image = unit(read(SAMPLE_VISIBLE))
    assert Damage()(image, "visible") is image
    assert Damage(("infrared",), noise=20)(image, "visible") is image
    assert Damage(darkness=1)(image, "infrared") is image  # heat needs no light


def test_an_unknown_blur_is_named():
    with pytest.raises(ValueError, match=r"blur must be one of none, .*, mixed, got 'foo'"):
        Damage(blur="foo")(torch.rand(1, 1, 40, 40), "visible")


@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize("spatial", [False, True])
def test_damage_is_the_seeds(blur, spatial):
    image = unit(read(SAMPLE_VISIBLE))[..., :90, :121]
    damage = Damage(blur=blur, strength=1.4, spatial=spatial, noise=10, scale=2, darkness=0.5, seed=3)
    low = damage(image, "visible")
    assert low.shape == image.shape
    assert 0 <= low.min() <= low.max() <= 1
    assert torch.equal(low, damage(image, "visible"))
    torch.testing.assert_close(low * 255, (low * 255).round())  # as in a file
    assert not torch.equal(low, Damage(**{**vars(damage), "seed": 4})(image, "visible"))
    assert low.mean() < image.mean()


def test_stronger_blur_leaves_less_detail():
    image = unit(read(SAMPLE_VISIBLE))

    def detail(strength):
        return Damage(blur="isotropic", strength=strength)(image, "visible").diff(dim=3).abs().mean()

    assert detail(1.4) < detail(0.7) < image.diff(dim=3).abs().mean()


def test_a_trial_measures_against_what_was_uploaded(fuser):
    trial = try_pair(fuser, SAMPLE_VISIBLE, SAMPLE_INFRARED, Damage(("infrared",), noise=30))
    assert torch.equal(trial.images["visible"], trial.clean["visible"])
    assert list(measure_fused(trial)) == ["fused", "average of both"]
    restored = measure_restored(trial)
    assert list(restored) == ["infrared, degraded", "infrared, restored"]
    assert (
        15 < restored["infrared, degraded"]["PSNR"] < 25
    )  # white noise of 30: 18.6 dB, less what is clipped


def test_images_too_small_to_be_measured_are_fused(fuser, tmp_path):
    for name, sample in (("v.png", SAMPLE_VISIBLE), ("i.png", SAMPLE_INFRARED)):
        write_image(tmp_path / name, read_image(sample)[:40, :60])
    trial = try_pair(fuser, tmp_path / "v.png", tmp_path / "i.png", Damage(noise=5))
    assert trial.images["fused"].shape == (1, 3, 40, 60)
    assert measure_fused(trial) == measure_restored(trial) == {}


def test_without_gradio_the_command_says_how_to_get_it():
    hide = (
        "import sys; sys.modules['gradio'] = None; from ddrf_fast.cli import main; sys.exit(main(['demo']))"
    )
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'ddrf-fast[demo]'" in result.stderr


def test_a_port_that_is_taken_is_told(weights):
    pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "ddrf_fast", "demo", "--port", port, "--no-browser"]
        result = subprocess.run(
            [*command, "--weights", weights], capture_output=True, text=True, check=False, timeout=120
        )
    assert result.returncode == 2
    assert f"127.0.0.1:{port}" in result.stderr
    assert "Traceback" not in result.stderr
