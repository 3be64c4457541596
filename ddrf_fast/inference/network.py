"""DDRF-Net loaded to be run: the one place where sessions call it, planes in and planes out."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ddrf_fast.inference.engine import Engine
from ddrf_fast.models.checkpoint import DEFAULT_WEIGHTS, load_model
from ddrf_fast.models.ddrfnet import Modality

PathLike = str | os.PathLike[str]

DTYPES: dict[str, torch.dtype | Literal["auto"]] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What the network can compute in, by name."""


class Network:
    """DDRF-Net on a device; sessions may share one.

    Args:
        weights: a weights file; None: the one that comes with the package.
        device: as for :func:`resolve_device`.
        dtype: what it computes in: "float32", "bfloat16", "float16", or "auto", as for :class:`Engine`; a
            restoration of one image in float32.
        tile: rows of the strips that large images are computed in, with the result of the whole; 0: none;
            "auto": by the size of the image.

    Attributes:
        model: the network, in evaluation mode.
        device: where it runs.

    Raises:
        ValueError: the weights are missing or do not fit, or the device is unknown or not there.
    """

    def __init__(
        self,
        weights: PathLike | None = None,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        tile: int | str = "auto",
    ) -> None:
        self.device = resolve_device(device)
        self.model = load_model(weights, device=self.device)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.engine = Engine(self.model, DTYPES[dtype], "never" if tile == 0 else tile)

    def fuse(self, visible: Tensor, infrared: Tensor) -> Tensor:
        """Fuses float32 Tensor[B, 1, H, W] on any device, not clipped; the result may be on another one."""
        if self.engine.in_strips(visible.shape):
            return self._in_strips("fused", visible, infrared)
        return self.engine(visible, infrared).fused

    def restore(self, modality: Modality, image: Tensor, code: Tensor | None = None) -> Tensor:
        """Restores float32 Tensor[B, 1, H, W]; `code` Tensor[1 or B, 16] is that of a known degradation."""
        code = None if code is None else code.to(self.device).expand(len(image), -1)
        if self.engine.in_strips(image.shape):  # they are of pairs, so the image is its own partner
            return self._in_strips(modality, image, image, code)
        with torch.inference_mode():
            return self.model.restore(modality, image.to(self.device), code)

    def _in_strips(self, name: str, visible: Tensor, infrared: Tensor, code: Tensor | None = None) -> Tensor:
        """One of the images of :class:`DDRFOutput`; no other one is held as a whole."""
        result = torch.empty_like(visible)
        for i in range(len(visible)):
            one = slice(i, i + 1)
            codes = [None if code is None else code[one]] * 2
            for strip in self.engine.strips(visible[one], infrared[one], *codes):
                rows = getattr(strip.output, name)
                result[one, :, strip.row : strip.row + rows.shape[2]] = rows
        return result


def cached_network(weights: PathLike | None, device: str | torch.device) -> Network:
    """The network of these weights, loaded at the first call, and again where the file has changed."""
    path = Path(DEFAULT_WEIGHTS if weights is None else weights).absolute()
    state = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    return _load(path, state, resolve_device(device))


@lru_cache(maxsize=4)
def _load(path: Path, state: tuple[int, int] | None, device: torch.device) -> Network:
    return Network(path, device)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by ``device``: "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: a device that is unknown or not there.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(resolved)!r} was asked for, but {torch.cuda.device_count()} CUDA devices are there"
        )
    return resolved
