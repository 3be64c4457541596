"""Runs an exported network, and compares it with the one that it was made from."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddrf_fast.demo.sample import SAMPLE_INFRARED, SAMPLE_VISIBLE
from ddrf_fast.export.network import Images, require, resolve_format
from ddrf_fast.inference.pictures import Picture
from ddrf_fast.models import DDRFNet

TOLERANCE = 1e-4

Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Comparison(NamedTuple):
    """An exported network against the one that it was made from, on one batch.

    Attributes:
        shape: of each image, [B, 1, H, W].
        difference: the largest between their results, which are in [0, 1].
    """

    shape: tuple[int, ...]
    difference: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is at most 1e-4."""
        return self.difference <= TOLERANCE


def check_export(
    path: str | os.PathLike[str],
    model: DDRFNet,
    *,
    format: str | None = None,
    outputs: str = "fused",
    clean: bool = False,
) -> list[Comparison]:
    """Runs a file of :func:`export_model` on real images, of sizes that it was not made with.

    Those are the package's sample pair, and a batch of three parts of it with odd sides.

    Args:
        path: the file.
        model: the network that it was made from, on the CPU.
        format: as the file was made.
        outputs: as the file was made.
        clean: as the file was made.

    Returns:
        What came of each batch.

    Raises:
        ValueError: the format does not fit the file, the file gives other outputs, or onnxruntime is needed
            and not installed.
    """
    path = Path(path)
    run = _LOADERS[resolve_format(path, format)](path)
    network = Images(model, outputs, clean).eval()
    visible, infrared = (Picture.take(path, "image").luma() for path in (SAMPLE_VISIBLE, SAMPLE_INFRARED))
    height, width = visible.shape[2] // 2 | 1, visible.shape[3] // 3 | 1
    corners = [(0, 0), (5, 9), (visible.shape[2] - height, visible.shape[3] - width)]

    def parts(image: Tensor) -> Tensor:
        return torch.cat([image[:, :, y : y + height, x : x + width] for y, x in corners])

    result = []
    for batch in ((visible, infrared), (parts(visible), parts(infrared))):
        with torch.inference_mode():
            exported, expected = run(*batch), _as_tuple(network(*batch))
        if len(exported) != len(expected):
            raise ValueError(f"{path} gives {len(exported)} images, expected {len(expected)}: {outputs=}")
        difference = max(float((a - b).abs().max()) for a, b in zip(exported, expected, strict=True))
        result.append(Comparison(tuple(batch[0].shape), difference))
    return result


def _as_tuple(images: Tensor | tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    return (images,) if isinstance(images, Tensor) else tuple(images)


def _load_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda *batch: _as_tuple(module(*batch))


def _load_aoti(path: Path) -> Run:
    package = torch._inductor.aoti_load_package(str(path))
    return lambda *batch: _as_tuple(package(*batch))


def _load_onnx(path: Path) -> Run:
    require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
        images = session.run(None, {"visible": visible.numpy(), "infrared": infrared.numpy()})
        return tuple(map(torch.from_numpy, images))

    return run


_LOADERS: dict[str, Callable[[Path], Run]] = {"pt2": _load_pt2, "aoti": _load_aoti, "onnx": _load_onnx}
