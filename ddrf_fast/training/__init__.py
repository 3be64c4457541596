"""Trains DDRF-Net: ``train(load_config(["paper"], ["data=pairs/train", "output=runs/one"]))``."""

from ddrf_fast.training.config import PairSource, TrainingConfig, load_config
from ddrf_fast.training.run import train

__all__ = ["PairSource", "TrainingConfig", "load_config", "train"]
