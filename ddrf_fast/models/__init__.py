"""DDRF-Net and its files."""

from ddrf_fast.models.checkpoint import load_model, read_metadata, save_model
from ddrf_fast.models.ddrfnet import DDRFNet, DDRFNetConfig, DDRFOutput

__all__ = ["DDRFNet", "DDRFNetConfig", "DDRFOutput", "load_model", "read_metadata", "save_model"]
