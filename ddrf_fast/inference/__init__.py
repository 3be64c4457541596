"""Inference for people: pairs of images in, fused images out."""

from ddrf_fast.inference.session import Fuser, fuse, resolve_device

__all__ = ["Fuser", "fuse", "resolve_device"]
