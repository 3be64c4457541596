"""Modules built on the operations: dynamic convolutions, the routers that drive them, and drop-ins.

``torch.fx.symbolic_trace`` takes models of them; it cannot know the form of a code, or the batch size that
decides how :class:`ODConv2d` normalises in training.
"""

from ddrf_fast.nn.condconv import CondConv2d
from ddrf_fast.nn.convert import ConversionReport, convert
from ddrf_fast.nn.dyconv import DyConv2d
from ddrf_fast.nn.dynamic_conv import DynamicConv2d
from ddrf_fast.nn.dynet import CoefficientPredictor, DyNetConv2d
from ddrf_fast.nn.modulated_conv import ModulatedConv2d, modulated_conv2d
from ddrf_fast.nn.odconv import ODConv2d
from ddrf_fast.nn.router import Router, anneal_temperature

__all__ = [
    "CoefficientPredictor",
    "CondConv2d",
    "ConversionReport",
    "DyConv2d",
    "DyNetConv2d",
    "DynamicConv2d",
    "ModulatedConv2d",
    "ODConv2d",
    "Router",
    "anneal_temperature",
    "convert",
    "modulated_conv2d",
]
