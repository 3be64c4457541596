"""DDRF-Net loaded to be run: the one place where sessions call it, planes in and planes out."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ddrf_fast.degradation import Degradation, estimate_blur
from ddrf_fast.degradation.estimate import is_enlarged
from ddrf_fast.degradation.photometric import TONE_CHANNELS, is_dark, joint_mean
from ddrf_fast.inference.engine import Dtype, Engine, Tile, resolve_dtype
from ddrf_fast.models.checkpoint import DEFAULT_WEIGHTS, load_model
from ddrf_fast.models.ddrfnet import Modality, pad_to_even

PathLike = str | os.PathLike[str]

QUIET = 0.08 / 255
"""Less noise than this an image has only if something took its grain away."""

SHARP = 0.6
"""A kernel with a larger middle is nearly none; the sharpest of the bank has a third."""


class Network:
    """DDRF-Net on a device; sessions may share one.

    Args:
        weights: a weights file; None: the one that comes with the package.
        device: as for :func:`resolve_device`.
        dtype: what it computes in, as for :class:`Engine`.
        tile: rows of the strips that large images are computed in, likewise.

    Attributes:
        model: the network, in evaluation mode.
        device: where it runs.

    Raises:
        ValueError: the weights are missing or do not fit, the device is unknown or not there, or `dtype` or
            `tile` is none of those.
    """

    def __init__(
        self,
        weights: PathLike | None = None,
        device: str | torch.device = "auto",
        dtype: Dtype = "auto",
        tile: Tile = "auto",
    ) -> None:
        self.device = resolve_device(device)
        self.model = load_model(weights, device=self.device)
        self.engine = Engine(self.model, dtype, tile)

    def fuse(
        self,
        visible: Tensor,
        infrared: Tensor,
        code: Tensor | None = None,
        tone: Tensor | None = None,
        infrared_code: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> Tensor:
        """Fuses float32 Tensor[B, 1, H, W] on any device, not clipped; the result may be on another one.

        Args:
            visible: images in [0, 1].
            infrared: likewise.
            code: of a known degradation of all the images, Tensor[1 or B, 16 or 19].
            tone: where there is no code and the visible images are three channels of each of some pictures,
                the tones of these, Tensor[B, 3].
            infrared_code: where there is no code, what is known of the infrared ones, Tensor[B, D], D = 3
                (their tone alone), 16 (all but their tone) or 19.
            reach: where there are infrared images, bool Tensor[B, 1, H, W]; elsewhere the visible ones are
                restored alone. None: everywhere.
        """
        codes = (tone, infrared_code) if code is None else 2 * (self._expanded(code, visible),)
        mean = None
        if code is None and tone is not None and bool(is_dark(tone).any()):
            mean = joint_mean(self.engine.restore("visible", visible, tone))  # known when all are restored
        if reach is None:
            return self.engine.fuse(visible, infrared, *codes, mean)
        output = self.engine(visible, infrared, *codes, mean)
        return torch.where(reach.to(output.fused.device), output.fused, output.visible)

    def restore(
        self, modality: Modality, image: Tensor, code: Tensor | None = None, tone: Tensor | None = None
    ) -> Tensor:
        """Restores float32 Tensor[B, 1, H, W] on any device, not clipped; the result may be on another one.

        Args:
            modality: "visible" or "infrared".
            image: images in [0, 1].
            code: of a known degradation of all the images, Tensor[1 or B, 16 or 19].
            tone: where there is no code and the images are channels of some pictures, as for :meth:`fuse`.
        """
        return self.engine.restore(modality, image, tone if code is None else self._expanded(code, image))

    def tone(self, visible: Tensor) -> Tensor:
        """The estimated tone Tensor[B, 3] of visible images, float32 Tensor[B, 1, H, W]."""
        with torch.inference_mode():
            return self.model.visible_tone(pad_to_even(visible.to(self.device)))

    def estimate(self, modality: Modality, image: Tensor, tone: Tensor | None = None) -> Tensor:
        """The estimated code Tensor[B, 19] of images Tensor[B, 1, H, W], with a tone that is known."""
        with torch.inference_mode():
            code = self.model.estimate_code(modality, image.to(self.device))
            if tone is not None:
                code[:, -TONE_CHANNELS:] = tone
            return code

    def encode(
        self, kernel: Any = None, noise_std: float | None = None, tone: Sequence[float] | None = None
    ) -> Tensor | None:
        """The code of a known degradation, Tensor[1, 16 or 19]; None where nothing is known.

        Args:
            kernel: the blur: [k, k] of any scale, k odd and at most that of the network (25).
            noise_std: the standard deviation of the noise, for images in [0, 1].
            tone: gamma, gain and contrast of a dark image, which is ``gain image^gamma`` of one with less
                contrast. What is left out of the three says that there is no blur, no noise or no darkness.

        Raises:
            ValueError: a kernel, a noise level or a tone that cannot be.

        Example:
            >>> Network().encode(noise_std=0.02).shape
            torch.Size([1, 16])
        """
        if kernel is None and noise_std is None and tone is None:
            return None
        known, darkness = self.known(kernel, noise_std), None
        if tone is not None:
            numbers = _numbers("tone", tone)
            if numbers.shape != (3,) or not (np.isfinite(numbers).all() and (numbers > 0).all()):
                raise ValueError(f"tone must be three positive numbers, gamma, gain and contrast, got {tone}")
            darkness = torch.from_numpy(numbers)[None].float().to(self.device)
        margin = (self.model.config.kernel_size - known.kernels.shape[-1]) // 2
        with torch.no_grad():
            return self.model.encode(F.pad(known.kernels[:, 0], (margin,) * 4), known.noise_std, darkness)

    def find_blur(
        self,
        modality: Modality,
        image: Tensor,
        noise_std: float | None = None,
        tone: Tensor | None = None,
    ) -> tuple[Tensor, Degradation | None]:
        """Which images are blurred, and how (:func:`ddrf_fast.degradation.estimate_blur`).

        An image counts as blurred where its spectrum ends in nothing but rounding, or where the network's own
        estimate, which sees edges, does not call it sharp; a dark or an enlarged one does not.

        Args:
            modality: "visible" or "infrared".
            image: float32 Tensor[B, 1, H, W] in [0, 1] on any device.
            noise_std: the standard deviation of their noise, where it is known.
            tone: of them, Tensor[B, 3]; None: to be estimated.

        Returns:
            The numbers of those that are blurred, int64 Tensor[b] on the network's device, and their
            degradation; None where there are none.

        Raises:
            ValueError: an image is smaller than 64x64.
        """
        image = image.to(self.device)
        code = self.estimate(modality, image, tone)
        with torch.inference_mode():
            kernels, _, tone = code.tensor_split((-1 - TONE_CHANNELS, -TONE_CHANNELS), dim=1)
            middles = kernels @ self.model.code_basis[:, self.model.config.kernel_size**2 // 2]
            places = (~is_dark(tone) & ~is_enlarged(image)).nonzero().flatten()
        if len(places) == 0:
            return places, None
        found = estimate_blur(image[places], noise_std=noise_std)
        blurred = ((found.noise_std < QUIET) | (middles[places] < SHARP)).nonzero().flatten()
        return places[blurred], found[blurred] if len(blurred) > 0 else None

    def codes(self, degradation: Degradation) -> Tensor:
        """The codes of degradations without darkness, Tensor[B, 16] or a map Tensor[B, 16, h, w]."""
        return degradation.codes(self.model.kernel_code)

    def known(self, kernel: Any = None, noise_std: float | None = None) -> Degradation:
        """What is known of the blur and the noise of an image, on the network's device; as for `encode`.

        Raises:
            ValueError: a kernel or a noise level that cannot be.
        """
        size = self.model.config.kernel_size
        known = np.ones((1, 1)) if kernel is None else _numbers("kernel", kernel)
        if known.ndim != 2 or known.shape[0] != known.shape[1] or known.shape[0] not in range(1, size + 1, 2):
            raise ValueError(f"kernel must be [k, k] with k odd and at most {size}, got {list(known.shape)}")
        if not np.isfinite(known).all() or known.sum() <= 0:
            raise ValueError("kernel must hold finite numbers with a positive sum")
        noise = np.zeros(()) if noise_std is None else _numbers("noise_std", noise_std)
        if noise.shape != () or not 0 <= noise <= 1:
            raise ValueError(
                "noise_std must be a number from 0 to 1, for images in [0, 1] (one grey level of 8 bit is "
                f"1/255), got {noise_std}"
            )
        taps = torch.from_numpy(known / known.sum()).float()
        return Degradation(
            kernels=taps[None, None],
            weights=torch.ones(1, 1, dtype=torch.float32),
            noise_std=torch.tensor([float(noise)], dtype=torch.float32),
            seed=torch.tensor(0),
            sample_ids=torch.tensor([0]),
        ).to(self.device)

    def _expanded(self, code: Tensor, images: Tensor) -> Tensor:
        return code.to(self.device).expand(len(images), *code.shape[1:])


def _numbers(name: str, value: Any) -> NDArray[np.float64]:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold numbers, got {value!r}") from None


def cached_network(
    weights: PathLike | None, device: str | torch.device, dtype: Dtype = "auto", tile: Tile = "auto"
) -> Network:
    """The network of these settings, loaded at the first call, and again where the file has changed."""
    path = Path(DEFAULT_WEIGHTS if weights is None else weights).absolute()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    state = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
    device = resolve_device(device)
    return _load(path, state, device, resolve_dtype(dtype, device), tile)


@lru_cache(maxsize=4)
def _load(
    path: Path, state: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype, tile: Tile
) -> Network:
    return Network(path, device, dtype, tile)


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
    try:
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(resolved)!r} was asked for, but is not there") from error
    return resolved
