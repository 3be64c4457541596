"""OpenCV's non-local means, the denoiser to compare with, told nothing but the image."""

import math

import cv2
import numpy as np
import torch
from torch import Tensor

# The best of 0.6, 0.8, 1, 1.2 and 1.5 by the PSNR of seven pairs of tno_degraded.
_STRENGTH = 0.8


def non_local_means(image: Tensor) -> Tensor:
    """Denoises uint8 Tensor[1, 1, H, W], windows of 7 and 21, as strongly as it finds the image noisy."""
    values = image[0, 0].numpy()
    cleaned = cv2.fastNlMeansDenoising(values, None, _STRENGTH * noise_level(values), 7, 21)
    return torch.from_numpy(cleaned)[None, None]


def noise_level(image: np.ndarray) -> float:
    r"""Standard deviation of white noise in grey values, :math:`\sqrt{\pi/2}\,\langle|I * L|\rangle / 6`.

    Immerkær, "Fast Noise Variance Estimation" (Computer Vision and Image Understanding, 1996).

    Example:
        >>> noise = np.random.default_rng(0).normal(100, 10, (200, 200)).astype(np.float32)
        >>> round(noise_level(noise))
        10
    """
    laplacians = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = cv2.filter2D(image.astype(np.float32), -1, laplacians)[1:-1, 1:-1]
    return math.sqrt(math.pi / 2) / 6 * float(np.abs(response).mean())
