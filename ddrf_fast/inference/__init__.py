"""Inference for people: images in, fused or restored images out."""

from ddrf_fast.inference.degrader import Degrader
from ddrf_fast.inference.engine import Engine
from ddrf_fast.inference.functions import fuse, restore
from ddrf_fast.inference.fuser import Fuser
from ddrf_fast.inference.network import Network, resolve_device
from ddrf_fast.inference.restorer import Restorer
from ddrf_fast.inference.session import Session

__all__ = [
    "Degrader",
    "Engine",
    "Fuser",
    "Network",
    "Restorer",
    "Session",
    "fuse",
    "resolve_device",
    "restore",
]
