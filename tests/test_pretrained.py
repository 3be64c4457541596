"""Folders and hub repositories in the layout of Hugging Face."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddrf_fast import Fuser
from ddrf_fast.models import DDRFNet, DDRFNetConfig, load_model, read_metadata

SMALL = DDRFNetConfig(width=8, blocks=1, num_kernels=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DDRFNet(SMALL).eval()


def assert_same(one, other):
    assert one.config == other.config
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_folder_holds_the_configuration_and_the_weights(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "a" / "mine", record={"seed": 3})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["width"] == 8
    loaded = DDRFNet.from_pretrained(folder)
    assert not loaded.training
    assert_same(loaded, model)
    assert read_metadata(folder) == (SMALL, {"seed": 3})
    assert_same(load_model(folder / "model.safetensors"), model)
    assert_same(Fuser(folder, "cpu").model, model)


def test_weights_without_metadata_need_no_more_than_the_configuration(model, tmp_path):
    folder = model.save_pretrained(tmp_path)
    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors"
    )  # as other tools write it
    assert_same(DDRFNet.from_pretrained(folder), model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "config.json cannot be read"),
        ('{"width": 8}', "describes no DDRF-Net: 'model_type' is missing"),
        ('{"model_type": "bert"}', "model_type is 'bert', expected 'ddrfnet'"),
        ('{"model_type": "ddrfnet", "depth": 3}', "depth"),
        ('{"model_type": "ddrfnet", "width": 16, "blocks": 1, "num_kernels": 2}', "does not fit DDRF-Net"),
    ],
)
def test_says_what_is_wrong_with_a_folder(model, tmp_path, config, message):
    folder = model.save_pretrained(tmp_path)
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        DDRFNet.from_pretrained(folder)


def test_incomplete_folders_are_refused(model, tmp_path):
    folder = model.save_pretrained(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json cannot be read: .*No such file"):
        DDRFNet.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors does not exist"):
        DDRFNet.from_pretrained(folder)


def test_a_repository_that_was_fetched_needs_no_network(model, tmp_path):
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--ddrfnet"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = DDRFNet.from_pretrained("someone/ddrfnet", cache_dir=tmp_path, local_files_only=True)
    assert_same(loaded, model)
    shutil.rmtree(repository)
    with pytest.raises(ValueError, match="someone/ddrfnet is no folder, and the hub does not give it"):
        DDRFNet.from_pretrained("someone/ddrfnet", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(ValueError, match="some/where/else is no folder"):
        DDRFNet.from_pretrained("some/where/else", cache_dir=tmp_path)


def test_folders_need_no_huggingface_hub(model, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    program = """
import sys
sys.modules["huggingface_hub"] = None  # cannot be imported
from ddrf_fast import DDRFNet
DDRFNet.from_pretrained("mine").save_pretrained("again")
try:
    DDRFNet.from_pretrained("someone/ddrfnet")
except ValueError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert ran.returncode == 0, ran.stderr
    assert "pip install 'ddrf-fast[hub]'" in ran.stdout
    assert (tmp_path / "again" / "model.safetensors").is_file()
