"""Trains DDRF-Net: ``train(TrainingConfig(data=("pairs/train",), output="weights.safetensors"))``."""

from ddrf_fast.training.config import TrainingConfig
from ddrf_fast.training.run import train

__all__ = ["TrainingConfig", "train"]
