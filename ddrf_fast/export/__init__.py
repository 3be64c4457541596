"""DDRF-Net as a file that runs elsewhere: torch.export, AOTInductor and ONNX.

    format   file     runs in                                        with
    pt2      .pt2     Python, torch.export.load                      the operators of ddrf_fast
    aoti     .pt2     Python or C++, on processors like this one     the compiled operators: `_schemas`, `_C`
    onnx     .onnx    ONNX Runtime and the like                      standard ONNX operators alone

All take `visible` and `infrared`, float32 [batch, 1, height, width] in [0, 1], of any batch and any size from
17x17 on, and give images of that shape, clipped to [0, 1]. Models other than DDRF-Net are exported with
torch's own functions; for ONNX, :func:`ddrf_fast.export.onnx.translations` gives those what they need.
"""

from ddrf_fast.export.check import Comparison, check_export
from ddrf_fast.export.network import FORMATS, MINIMUM_SIZE, OUTPUTS, export_model, resolve_format

__all__ = [
    "FORMATS",
    "MINIMUM_SIZE",
    "OUTPUTS",
    "Comparison",
    "check_export",
    "export_model",
    "resolve_format",
]
