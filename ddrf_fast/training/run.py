"""Runs a training from its configuration to the weights file."""

import dataclasses
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from ddrf_fast.models import save_model
from ddrf_fast.training.config import TrainingConfig
from ddrf_fast.training.crops import RandomCrops, ValidationCrops, load_pairs
from ddrf_fast.training.module import TrainingModule


def train(config: TrainingConfig) -> Path:
    """Trains DDRF-Net and writes its weights, with the record of the training in the file's metadata.

    Args:
        config: the settings.

    Returns:
        The path of the weights file.

    Raises:
        ValueError: there is no data, or a pair is smaller than the crop.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    training_pairs, validation_pairs = load_pairs(
        config.data, config.crop, config.validation_pairs, config.progress_bar
    )
    lightning.seed_everything(config.seed, verbose=False)
    module = TrainingModule(config)
    trainer = lightning.Trainer(
        accelerator=config.device,
        devices=1,
        max_steps=config.steps,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=config.progress_bar,
    )
    crops = RandomCrops(training_pairs, config.crop, config.steps * config.batch_size, config.seed)
    started = time.monotonic()
    validation: Mapping[str, float] = {}
    with warnings.catch_warnings():
        # Pairs are cached and cropped in microseconds, so workers would only cost; validation comes at the
        # end.
        for expected in ("does not have many workers", "have no `val_dataloader`", "treespec, LeafSpec"):
            warnings.filterwarnings("ignore", message=f".*{expected}.*")
        trainer.fit(module, DataLoader(crops, config.batch_size))
        minutes = (time.monotonic() - started) / 60
        if validation_pairs:
            [validation] = trainer.validate(
                module, DataLoader(ValidationCrops(validation_pairs)), verbose=False
            )
    settings = dataclasses.asdict(config)
    del settings["output"]  # where the file is now, it knows best itself
    record: dict[str, Any] = {
        "config": settings,
        "training_pairs": [pair.name for pair in training_pairs],
        "validation_pairs": [pair.name for pair in validation_pairs],
        "steps": trainer.global_step,
        "minutes": round(minutes, 2),
        "device": torch.cuda.get_device_name() if module.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "validation": {name: round(value, 4) for name, value in validation.items()},
        "loss_curve": _downsample(module.curve),
    }
    return save_model(module.model, config.output, record)


def _downsample(curve: list[float], points: int = 200) -> list[float]:
    """Means of consecutive stretches of a curve, at most ``points`` of them."""
    length = max(1, -(-len(curve) // points))
    return [
        round(sum(curve[i : i + length]) / len(curve[i : i + length]), 5)
        for i in range(0, len(curve), length)
    ]
