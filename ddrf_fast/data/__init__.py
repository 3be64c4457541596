"""Images from files, their colour, and sets of infrared and visible pairs."""

from ddrf_fast.data.check import CheckReport, check_pairs
from ddrf_fast.data.colour import luminance, rgb_to_ycbcr, ycbcr_to_rgb
from ddrf_fast.data.image_io import (
    ALPHA_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    count_pixels,
    from_float,
    read_image,
    read_profile,
    to_float,
    write_image,
)
from ddrf_fast.data.layouts import LAYOUTS, Pairing, PairPaths, find_pairs
from ddrf_fast.data.pairs import ImagePair, PairedFolder, pair_folders
from ddrf_fast.data.thermal import ThermalRange

__all__ = [
    "ALPHA_SUFFIXES",
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "MAX_PIXELS",
    "CheckReport",
    "ImagePair",
    "PairPaths",
    "PairedFolder",
    "Pairing",
    "ThermalRange",
    "check_pairs",
    "count_pixels",
    "find_pairs",
    "from_float",
    "luminance",
    "pair_folders",
    "read_image",
    "read_profile",
    "rgb_to_ycbcr",
    "to_float",
    "write_image",
    "ycbcr_to_rgb",
]
