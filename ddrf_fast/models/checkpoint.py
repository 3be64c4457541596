"""Files of DDRF-Net: safetensors, with the configuration and the training record in the metadata.

A folder in the layout of Hugging Face (``save_pretrained``) is such a file, ``model.safetensors``, and the
configuration once more in ``config.json``, which is what counts there.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddrf_fast._files import replacing
from ddrf_fast.models.ddrfnet import DDRFNet, DDRFNetConfig

FORMAT = "ddrf_fast.ddrfnet"
FORMAT_VERSION = 1
DEFAULT_WEIGHTS = Path(__file__).parent.parent / "assets" / "ddrfnet.safetensors"
PRETRAINED_WEIGHTS, PRETRAINED_CONFIG = "model.safetensors", "config.json"  # as the hub knows them
MODEL_TYPE = "ddrfnet"


def save_model(model: DDRFNet, path: str | os.PathLike[str], record: dict[str, Any] | None = None) -> Path:
    """Writes the model to a safetensors file; an existing file is replaced at once or not at all.

    Args:
        model: the network, on any device.
        path: the file; its folder is created.
        record: how the weights came about (JSON-able): configuration, seed, data, loss curve.

    Returns:
        The path.

    Raises:
        ValueError: the model holds NaN or infinite weights.
        TypeError: the record cannot be written as JSON.

    Example:
        >>> path = save_model(DDRFNet(), getfixture("tmp_path") / "weights.safetensors", {"seed": 0})
        >>> load_model(path).training
        False
    """
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _check_finite(state, "the model")
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(dataclasses.asdict(model.config)),
        "record": json.dumps(record or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(state, temporary, metadata=metadata)
    return path


def load_model(path: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu") -> DDRFNet:
    """Reads a network written by :func:`save_model` or ``DDRFNet.save_pretrained``.

    Args:
        path: the file, or the folder; None: the weights that come with the package.
        device: where the model shall be.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: the file is missing, is no safetensors file or not one of DDRF-Net, was written by a newer
            format, holds NaN or infinite weights, or does not fit its configuration (the names are listed).

    Example:
        >>> model = load_model()
        >>> model.training
        False
    """
    file = _existing(path)
    config, _ = read_metadata(path)
    model = DDRFNet(config).float()  # whatever torch's default is
    with safe_open(file, framework="pt") as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
    expected = model.state_dict()
    problems = [
        *(f"missing {name} {list(expected[name].shape)}" for name in expected.keys() - state.keys()),
        *(f"unexpected {name} {list(state[name].shape)}" for name in state.keys() - expected.keys()),
        *(
            f"{name} is {list(state[name].shape)}, expected {list(expected[name].shape)}"
            for name in expected.keys() & state.keys()
            if state[name].shape != expected[name].shape
        ),
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (
            f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise ValueError(f"{file} does not fit DDRF-Net with {config}: {shown}")
    _check_finite(state, str(file))
    model.load_state_dict(state)
    return model.to(device).eval()


def read_metadata(path: str | os.PathLike[str] | None = None) -> tuple[DDRFNetConfig, dict[str, Any]]:
    """Reads the configuration and the training record of a weights file, without its weights.

    Args:
        path: the file, or a folder of ``DDRFNet.save_pretrained``; None: the weights that come with the
            package.

    Returns:
        The configuration and the record.

    Raises:
        ValueError: as :func:`load_model`, as far as the metadata goes.

    Example:
        >>> config, record = read_metadata()
        >>> config == load_model().config
        True
    """
    file = _existing(path)
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        pickled = file.read_bytes()[:2] in (b"PK", b"\x80\x02")  # as torch.save begins
        reason = "torch.save wrote it, whose files can run code and are never unpickled" if pickled else error
        raise ValueError(f"{file} cannot be read as a safetensors file: {reason}") from error
    if path is not None and Path(path).is_dir():
        return _read_config(file.with_name(PRETRAINED_CONFIG)), json.loads(metadata.get("record", "{}"))
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{file} holds no DDRF-Net: its format is {metadata.get('format')!r}, expected {FORMAT!r}"
        )
    try:
        if int(metadata["format_version"]) > FORMAT_VERSION:
            raise ValueError(f"format version {metadata['format_version']} is newer than {FORMAT_VERSION}")
        return DDRFNetConfig(**json.loads(metadata["config"])), json.loads(metadata["record"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has metadata that cannot be read: {error}") from error


def write_config(config: DDRFNetConfig, path: Path) -> None:
    """Writes ``config.json``."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps({"model_type": MODEL_TYPE, **dataclasses.asdict(config)}, indent=2) + "\n"
        )


def _read_config(path: Path) -> DDRFNetConfig:
    try:
        settings = json.loads(path.read_text())
        if (found := settings.pop("model_type")) != MODEL_TYPE:
            raise ValueError(f"model_type is {found!r}, expected {MODEL_TYPE!r}")
        return DDRFNetConfig(**settings)
    except KeyError as error:
        raise ValueError(f"{path} describes no DDRF-Net: {error} is missing") from error
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _existing(path: str | os.PathLike[str] | None) -> Path:
    """The weights file; that of a folder is found by its name."""
    file = DEFAULT_WEIGHTS if path is None else Path(path)
    if file.is_dir():
        file = file / PRETRAINED_WEIGHTS
    if not file.is_file():
        raise ValueError(f"weights file {file} does not exist")
    return file


def _check_finite(state: dict[str, Tensor], where: str) -> None:
    bad = sorted(name for name, tensor in state.items() if not torch.isfinite(tensor).all())
    if bad:
        raise ValueError(f"{where} holds NaN or infinite values in {', '.join(bad[:8])}")
