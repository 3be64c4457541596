"""Modules built on the operations: dynamic convolutions and the routers that drive them."""

from ddrf_fast.nn.dynamic_conv import DynamicConv2d
from ddrf_fast.nn.router import Router, anneal_temperature

__all__ = ["DynamicConv2d", "Router", "anneal_temperature"]
