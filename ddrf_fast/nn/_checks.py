"""Checks that the dynamic convolutions share."""

import torch
from torch import Tensor

from ddrf_fast.ops._checks import integer, tensor

# Leaves of torch.fx's symbolic traces.
torch.fx.wrap("image")


def channels(in_name: str, in_channels: int, out_name: str, out_channels: int, groups: int) -> None:
    """Both are positive multiples of `groups`.

    Raises:
        TypeError: One of the three is not an int.
        ValueError: One is below 1, or not a multiple of `groups`.
    """
    integer("groups", groups, 1)
    for name, value in ((in_name, in_channels), (out_name, out_channels)):
        if integer(name, value, 1) % groups:
            raise ValueError(f"{name} must be a multiple of groups={groups}, got {value}")


def image(x: Tensor, in_channels: int) -> None:
    """x is what a layer takes.

    Raises:
        TypeError: It is no tensor of floats.
        ValueError: It is not [B, in_channels, H, W].
    """
    if tensor("x", x, ["[B, C, H, W]"]).shape[1] != in_channels:
        raise ValueError(f"x must have {in_channels} channels, got shape {tuple(x.shape)}")
