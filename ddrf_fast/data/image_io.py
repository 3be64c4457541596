"""Image files to arrays and back: 8 and 16 bit, grey and colour, without a loss that nobody asked for."""

import os
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import DTypeLike

from ddrf_fast._files import replacing

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Endings of the files that are taken for images, in lower case."""

_SUFFIXES_16_BIT = frozenset({".png", ".tif", ".tiff"})


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image as it is stored: the bit depth is kept, alpha is dropped, EXIF rotation is not applied.

    Args:
        path: a file that OpenCV can decode.

    Returns:
        uint8 or uint16 array [H, W] for a grey image, [H, W, 3] in RGB order for one in colour (palettes are
        resolved).

    Raises:
        ValueError: the file is missing, unreadable, damaged, or holds other values than unsigned 8 or 16 bit.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_image(f"{folder}/dark.png", np.full((2, 3), 300, np.uint16))
        ...     read_image(f"{folder}/dark.png")
        array([[300, 300, 300],
               [300, 300, 300]], dtype=uint16)
    """
    path = Path(path)
    try:
        encoded = np.frombuffer(path.read_bytes(), np.uint8)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if encoded.size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f"{path}: cannot be decoded ({error.err})") from error
    if image is None:
        raise ValueError(f"{path}: not an image, damaged, or of a format that OpenCV cannot read")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{path}: values of type {image.dtype} are not supported, only unsigned 8 and 16 bit"
        )
    if image.ndim == 2:
        return image
    if image.shape[2] == 1:
        return image[:, :, 0]
    if image.shape[2] in (3, 4):
        return np.ascontiguousarray(image[:, :, 2::-1])
    raise ValueError(f"{path}: {image.shape[2]} channels are not supported, only 1, 3 and 4")


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes an image in the format that the ending names; JPEG and WebP with quality 95.

    The file appears complete or not at all, also where another of that name is replaced.

    Args:
        path: where to, in a folder that exists.
        image: uint8 or uint16 array [H, W], or [H, W, 3] in RGB order; uint16 for PNG and TIFF only.

    Raises:
        TypeError: `image` is no array of uint8 or uint16.
        ValueError: `image` has another shape, or the format is unknown or has no 16 bit.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.uint16):
        found = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"image must be an array of uint8 or uint16, got {found} (from_float converts)")
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or image.size == 0:
        raise ValueError(f"image must be [H, W] or [H, W, 3] and not empty, got {list(image.shape)}")
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: unknown image format, use one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    if image.dtype == np.uint16 and suffix not in _SUFFIXES_16_BIT:
        raise ValueError(f"{path}: {suffix} has no 16 bit, use one of {', '.join(sorted(_SUFFIXES_16_BIT))}")
    parameters = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix in (".jpg", ".jpeg") else []
    parameters += [cv2.IMWRITE_WEBP_QUALITY, 95] if suffix == ".webp" else []
    done, encoded = cv2.imencode(suffix, image if image.ndim == 2 else image[:, :, ::-1], parameters)
    if not done:
        raise ValueError(f"{path}: cannot be encoded")
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(encoded.data)
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror})") from error


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 or uint16 values as float32 in [0, 1], by the type's whole range.

    Raises:
        TypeError: `image` is of another type.

    Example:
        >>> to_float(np.array([0, 51, 255], np.uint8))
        array([0. , 0.2, 1. ], dtype=float32)
    """
    if image.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"image must be uint8 or uint16, got {image.dtype}")
    return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)


def from_float(image: np.ndarray, dtype: DTypeLike = np.uint8) -> np.ndarray:
    """Floats in [0, 1] as uint8 or uint16: clipped, scaled by the type's whole range and rounded.

    Raises:
        TypeError: `image` is not floating or `dtype` is another type.
        ValueError: a value is NaN.

    Example:
        >>> from_float(np.array([-0.1, 0.2, 1.0]))
        array([  0,  51, 255], dtype=uint8)
    """
    if not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"image must be floating, got {image.dtype}")
    if np.dtype(dtype) not in (np.uint8, np.uint16):
        raise TypeError(f"dtype must be uint8 or uint16, got {np.dtype(dtype)}")
    if np.isnan(image).any():
        raise ValueError(f"image holds {int(np.isnan(image).sum())} values that are not a number")
    # float16 cannot hold 65535.
    values = image.astype(np.promote_types(image.dtype, np.float32), copy=False)
    return np.rint(values.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)
