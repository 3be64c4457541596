"""Image files to arrays and back: 8 and 16 bit, grey and colour, without a loss that nobody asked for."""

import io
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import cv2
import numpy as np
import tifffile
from numpy.typing import DTypeLike
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from ddrf_fast._files import replacing

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Endings of the files that are taken for images, in lower case."""

ALPHA_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".webp"})
"""Those of the formats that are written with alpha."""

MAX_PIXELS = 2**29
"""How large an image may say it is before it is decoded, five times 12000x9000."""

_DEPTHS = {
    "uint8": ("8 bit", IMAGE_SUFFIXES),
    "uint16": ("16 bit", frozenset({".png", ".tif", ".tiff"})),
    "float32": ("float32", frozenset({".tif", ".tiff"})),
}

# Pillow reads the headers only. Image.open does so, too, but has one limit for the whole process.
_HEADERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"\xff\xd8": JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # our errors say it
_EXIF_ORIENTATION = 0x0112
_DAMAGED = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, struct.error)
_SEPARATE = tifffile.PLANARCONFIG.SEPARATE
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
# What turns an image stored with that orientation upright: transposed or not, then flipped along axes.
_UPRIGHT: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


def read_image(
    path: str | os.PathLike[str],
    *,
    alpha: bool = False,
    floating: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Reads an image in its bit depth, upright as EXIF says.

    The format is recognised by the content, whatever the ending. Of a file of several pages or frames the
    first is read. TIFF files of 10, 12 or 14 bit become 16 bit: their white is 65535 (less a few steps).

    Args:
        path: a PNG, TIFF, JPEG, BMP or WebP file.
        alpha: keep the alpha channel of an image that has one.
        floating: also read float32, as radiometric TIFF files hold it.
        max_pixels: refuse an image whose header announces more, before it is decoded.

    Returns:
        uint8, uint16 or float32 array [H, W] for a grey image, [H, W, 3] in RGB order for one in colour
        (palettes are resolved), [H, W, 4] with alpha.

    Raises:
        ValueError: the file is missing, unreadable, damaged, cut off or too large, or holds values of
            another type.

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
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not content:
        raise ValueError(f"{path}: the file is empty")
    (width, height), cmyk, decoder, inverted, _ = _announced(io.BytesIO(content))
    if decoder is None:
        raise ValueError(f"{path}: not an image, damaged or cut off")
    if width * height > max_pixels:
        raise ValueError(
            f"{path}: the image says it has {width}x{height} pixels, more than the {max_pixels} allowed "
            "(max_pixels)"
        )
    if decoder != "opencv":
        try:
            image = (_by_pillow if decoder == "pillow" else _by_tifffile)(content)
        except _DAMAGED as error:
            raise ValueError(f"{path}: cannot be decoded ({error})") from error
        _check_type(path, image, floating)
        return np.ascontiguousarray(image if alpha else image[:, :, :3] if image.ndim == 3 else image)
    try:
        image, kinds, metadata = cv2.imdecodeWithMetadata(
            np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED
        )
    except cv2.error as error:
        raise ValueError(f"{path}: cannot be decoded ({error.err})") from error
    if image is None:
        raise ValueError(f"{path}: not an image, damaged or cut off, or of a format that OpenCV cannot read")
    _check_type(path, image, floating)
    if image.ndim == 3 and (image.shape[2] not in (1, 3, 4) or (image.shape[2] == 4 and cmyk)):
        found = "CMYK" if cmyk else f"{image.shape[2]} channels"
        raise ValueError(f"{path}: {found} is not supported, only grey and RGB, with or without alpha")
    if image.ndim == 3:
        channels = image.shape[2]
        opaque = cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGB
        conversion = cv2.COLOR_BGRA2RGBA if channels == 4 and alpha else opaque
        image = image[:, :, 0] if channels == 1 else cv2.cvtColor(image, conversion)
    if inverted:
        image = 65535 - image
    return np.ascontiguousarray(_upright(image, dict(zip(kinds, metadata, strict=True))))


def _check_type(path: Path, image: np.ndarray, floating: bool) -> None:
    types = (np.uint8, np.uint16, np.float32) if floating else (np.uint8, np.uint16)
    if image.dtype not in types:
        only = "unsigned 8 and 16 bit" + (" and float32" if floating else "")
        raise ValueError(f"{path}: values of type {image.dtype} are not supported, only {only}")


def _by_pillow(content: bytes) -> np.ndarray:
    """A TIFF of 8 bit with alpha, [H, W, 4]."""
    with Image.open(io.BytesIO(content), formats=["TIFF"]) as file:
        return np.array(ImageOps.exif_transpose(file).convert("RGBA"))


def _by_tifffile(content: bytes) -> np.ndarray:
    """A TIFF as it is stored, with two samples as grey and alpha, if that is what the second one is."""
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = _first_page(file)
        image = page.asarray()
    if page.planarconfig == _SEPARATE:
        image = np.moveaxis(image, 0, 2)
    if image.shape[2] == 2:
        image = image[:, :, [0, 0, 0, 1]] if page.extrasamples[0] in _ALPHA else image[:, :, 0]
    orientation = page.tags.get(_EXIF_ORIENTATION)
    return _turned(image, 1 if orientation is None else orientation.value)


def count_pixels(path: str | os.PathLike[str]) -> int:
    """How many pixels an image file announces; 0 where it cannot be read.

    Example:
        >>> path = getfixture("tmp_path") / "image.png"
        >>> write_image(path, np.zeros((6, 8), np.uint8))
        >>> count_pixels(path)
        48
    """
    try:
        with open(path, "rb") as file:
            width, height = _announced(file).size
    except OSError:
        return 0
    return width * height


def read_profile(path: str | os.PathLike[str]) -> bytes | None:
    """The ICC profile of an image file, which says what its colours are; None where none can be read.

    Example:
        >>> from PIL import ImageCms
        >>> profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        >>> path = getfixture("tmp_path") / "image.png"
        >>> write_image(path, np.zeros((6, 8, 3), np.uint8), profile)
        >>> read_profile(path) == profile
        True
    """
    try:
        with open(path, "rb") as file:
            return _announced(file).profile
    except OSError:
        return None


_Decoder = Literal["opencv", "pillow", "tifffile"]


class _Header(NamedTuple):
    """What an image file says of itself; of a damaged one nothing: the decoder says how it is damaged.

    Attributes:
        size: (width, height).
        cmyk: whether it holds inks.
        decoder: "opencv", but for some TIFF files. Of those of 8 bit with alpha it multiplies the colours by
            the alpha, and drops that of a grey one: "pillow" decodes these. Of 16 bit in planes it mixes the
            planes up, and of two samples it makes 8 bit: "tifffile". None: a TIFF file that says nothing.
        inverted: whether 0 is white and OpenCV leaves it so, as in a TIFF of 16 bit.
        profile: the ICC profile.
    """

    size: tuple[int, int] = (0, 0)
    cmyk: bool = False
    decoder: _Decoder | None = "opencv"
    inverted: bool = False
    profile: bytes | None = None


def _announced(file: IO[bytes]) -> _Header:
    start = file.read(4)
    file.seek(0)
    for signature, header in _HEADERS.items():
        if start.startswith(signature):
            try:
                found = header(file)
            except _DAMAGED:
                break
            return _Header(found.size, found.mode == "CMYK", profile=found.info.get("icc_profile"))
    return _announced_tiff(file) if start[:2] in (b"II", b"MM") else _Header()


def _announced_tiff(file: IO[bytes]) -> _Header:
    try:
        with tifffile.TiffFile(file) as tiff:
            page = _first_page(tiff)
            bits, samples, extra = page.bitspersample, page.samplesperpixel, page.extrasamples
            decoder: _Decoder = "opencv"
            if bits == 8 and samples in (2, 4) and extra == (tifffile.EXTRASAMPLE.UNASSALPHA,):
                decoder = "pillow"
            elif samples == 2 or (samples > 1 and bits > 8 and page.planarconfig == _SEPARATE):
                decoder = "tifffile"
            return _Header(
                (int(page.imagewidth), int(page.imagelength)),  # several numbers in a damaged one
                page.photometric == tifffile.PHOTOMETRIC.SEPARATED,
                decoder,
                page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and bits == 16,
                page.iccprofile,
            )
    except _DAMAGED:
        return _Header(decoder=None)


def _first_page(file: tifffile.TiffFile) -> tifffile.TiffPage:
    page = file.pages[0]
    assert isinstance(page, tifffile.TiffPage)  # and no frame, as only later ones are
    return page


def _upright(image: np.ndarray, metadata: dict[int, np.ndarray]) -> np.ndarray:
    """As the EXIF orientation wants it; of TIFF files OpenCV has done so, and gives no EXIF."""
    if cv2.IMAGE_METADATA_EXIF not in metadata:
        return image
    exif = Image.Exif()
    try:
        exif.load(metadata[cv2.IMAGE_METADATA_EXIF].tobytes())
        orientation = exif.get(_EXIF_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, struct.error):  # damaged metadata is no damaged image
        return image
    return _turned(image, orientation)


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    transposed, flipped = _UPRIGHT.get(orientation, (False, ()))
    return np.flip(image.swapaxes(0, 1) if transposed else image, flipped)


def write_image(path: str | os.PathLike[str], image: np.ndarray, profile: bytes | None = None) -> None:
    """Writes an image in the format that the ending names; JPEG and WebP with quality 95.

    The file appears complete or not at all, also where another of that name is replaced.

    Args:
        path: where to, in a folder that exists.
        image: uint8, uint16 or float32 array [H, W], [H, W, 3] in RGB order, or with alpha [H, W, 2] or
            [H, W, 4], both written with four channels; uint16 for PNG and TIFF only, float32 for TIFF, alpha
            for :data:`ALPHA_SUFFIXES`.
        profile: the ICC profile of its colours (:func:`read_profile`). It is left out where it does not fit,
            such as that of a colour image for a grey one, and of BMP files.

    Raises:
        TypeError: `image` is no array of such values.
        ValueError: `image` has another shape, or the format is unknown or cannot hold it.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(image, np.ndarray) or image.dtype.name not in _DEPTHS:
        found = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"image must be an array of {', '.join(_DEPTHS)}, got {found} (from_float converts)")
    image = image.astype(image.dtype.newbyteorder("="), copy=False)  # OpenCV asks for no other
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (2, 3, 4))) or image.size == 0:
        raise ValueError(f"image must be [H, W] or [H, W, 2..4] and not empty, got {list(image.shape)}")
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: unknown image format, use one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    depth, suffixes = _DEPTHS[image.dtype.name]
    if suffix not in suffixes:
        raise ValueError(f"{path}: {suffix} has no {depth}, use one of {', '.join(sorted(suffixes))}")
    has_alpha = image.ndim == 3 and image.shape[2] != 3
    if has_alpha and suffix not in ALPHA_SUFFIXES:
        raise ValueError(f"{path}: {suffix} has no alpha, use one of {', '.join(sorted(ALPHA_SUFFIXES))}")
    if image.shape[2:] == (2,):
        image = image[:, :, [0, 0, 0, 1]]
    profile = profile if profile and _is_of(profile, image) else None
    content = _tiff(image, profile) if suffix in (".tif", ".tiff") else _encoded(suffix, image, profile)
    if content is None:
        raise ValueError(f"{path}: cannot be encoded")
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror})") from error


def _tiff(image: np.ndarray, profile: bytes | None) -> bytes:
    """Compressed without loss; OpenCV can embed no profile."""
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        image,
        photometric="minisblack" if image.ndim == 2 else "rgb",
        extrasamples=["unassalpha"] if image.shape[2:] == (4,) else [],
        compression="zlib",
        compressionargs={"level": 1},
        predictor=image.dtype != np.float32,  # that of floats needs another package
        iccprofile=profile,
        metadata=None,
    )
    return file.getvalue()


def _encoded(suffix: str, image: np.ndarray, profile: bytes | None) -> bytes | None:
    parameters = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix in (".jpg", ".jpeg") else []
    parameters += [cv2.IMWRITE_WEBP_QUALITY, 95] if suffix == ".webp" else []
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    metadata = {}
    if profile and suffix != ".bmp":
        metadata = {cv2.IMAGE_METADATA_ICCP: np.frombuffer(profile, np.uint8)}
    done, encoded = cv2.imencodeWithMetadata(suffix, image, [*metadata], [*metadata.values()], parameters)
    return encoded.tobytes() if done else None


def _is_of(profile: bytes, image: np.ndarray) -> bool:
    return profile[36:40] == b"acsp" and profile[16:20] == (b"GRAY" if image.ndim == 2 else b"RGB ")


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

    Args:
        image: floating array of any shape.
        dtype: of the result.

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
