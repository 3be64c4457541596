"""Image files, colour, pairing by name, and the data sets of pairs."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps

from ddrf_fast.data import (
    IMAGE_SUFFIXES,
    PairedFolder,
    count_pixels,
    from_float,
    pair_folders,
    read_image,
    read_profile,
    rgb_to_ycbcr,
    to_float,
    write_image,
    ycbcr_to_rgb,
)


def ramp(shape, dtype):
    """An image in which every value differs from its neighbours', over the type's whole range."""
    values = np.linspace(0, np.iinfo(dtype).max, int(np.prod(shape)))
    return values.reshape(shape).round().astype(dtype)


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint8), (".tiff", np.uint16), (".bmp", np.uint8)],
)
def test_lossless_formats_give_back_what_was_written(tmp_path, suffix, dtype, channels):
    image = ramp((5, 7, *channels), dtype)
    path = (
        tmp_path / f"ümlaut image{suffix.upper()}"
    )  # OpenCV's own imread has trouble with such names somewhere
    write_image(path, image)
    actual = read_image(path)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, image)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_keep_the_colours(tmp_path, suffix):
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :24] = (250, 100, 20)
    image[:, 24:] = (10, 60, 200)
    write_image(tmp_path / f"image{suffix}", image)
    actual = read_image(tmp_path / f"image{suffix}").astype(int)
    assert abs(actual - image)[:, [4, 40]].max() < 8


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_channels_are_rgb_and_alpha_is_dropped_unless_asked_for(tmp_path, dtype):
    bgra = np.zeros((2, 3, 4), dtype)
    bgra[..., 0], bgra[..., 1], bgra[..., 2], bgra[..., 3] = 10, 20, 30, 40
    cv2.imwrite(str(tmp_path / "image.png"), bgra)
    rgba = np.broadcast_to(np.array([30, 20, 10, 40], dtype), (2, 3, 4))
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), rgba[..., :3])
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", alpha=True), rgba)
    for suffix in (".png", ".tif"):
        write_image(tmp_path / f"again{suffix}", rgba)
        np.testing.assert_array_equal(read_image(tmp_path / f"again{suffix}", alpha=True), rgba)
        write_image(tmp_path / f"grey{suffix}", rgba[..., 2:])
        grey = read_image(tmp_path / f"grey{suffix}", alpha=True)
        np.testing.assert_array_equal(grey, rgba[..., [2, 2, 2, 3]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_colours_of_a_tiff_are_not_multiplied_by_its_alpha(tmp_path, mode, compression):
    values = np.random.default_rng(0).integers(0, 256, (4, 6, len(mode)), np.uint8)
    Image.fromarray(values, mode).save(tmp_path / "image.tif", compression=compression)
    expected = values if mode == "RGBA" else values[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif", alpha=True), expected)
    np.testing.assert_array_equal(read_image(tmp_path / "image.tif"), expected[..., :3])


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_read_as_it_looks(tmp_path, dtype, byteorder):
    image, path = ramp((5, 7), dtype), tmp_path / "negative.tif"
    tifffile.imwrite(path, np.iinfo(dtype).max - image, photometric="miniswhite", byteorder=byteorder)
    np.testing.assert_array_equal(read_image(path), image)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_tiff_in_planes_is_the_same_image(tmp_path, dtype, channels, byteorder):
    image, path = ramp((5, 7, channels), dtype), tmp_path / "planes.tif"
    alpha = ["unassalpha"] if channels == 4 else []
    for tile in (None, (16, 16)):
        tifffile.imwrite(
            path, np.moveaxis(image, 2, 0), photometric="rgb", planarconfig="separate", extrasamples=alpha,
            byteorder=byteorder, tile=tile, compression="zlib",
        )  # fmt: skip
        np.testing.assert_array_equal(read_image(path, alpha=True), image)
        np.testing.assert_array_equal(read_image(path), image[..., :3])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("extra", ["assocalpha", "unassalpha", "unspecified"])
def test_a_tiff_of_two_samples_keeps_its_bits(tmp_path, dtype, extra):
    image, path = ramp((5, 7, 2), dtype), tmp_path / "two.tif"
    tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig", extrasamples=[extra])
    grey, rgba = image[..., 0], image[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(read_image(path, alpha=True), grey if extra == "unspecified" else rgba)
    seen = read_image(path)
    assert seen.dtype == dtype
    np.testing.assert_array_equal(seen if seen.ndim == 2 else seen[..., 1], grey)


def test_a_tiff_that_tifffile_decodes_is_turned_upright(tmp_path):
    image, path = ramp((4, 6, 3), np.uint16), tmp_path / "planes.tif"
    orientation = (0x0112, "H", 1, 6, True)
    tifffile.imwrite(
        path, np.moveaxis(image, 2, 0), photometric="rgb", planarconfig="separate", extratags=[orientation]
    )
    np.testing.assert_array_equal(read_image(path), np.rot90(image, -1))


@pytest.mark.parametrize("kind", ["float", "two samples", "big"])
def test_no_tiff_escapes_the_limit_of_pixels(tmp_path, kind):
    path = tmp_path / "large.tif"
    values = np.zeros((30, 40, 2), np.uint16) if kind == "two samples" else np.zeros((30, 40), np.float32)
    options = {"planarconfig": "contig", "extrasamples": ["unassalpha"]} if kind == "two samples" else {}
    tifffile.imwrite(path, values, byteorder=">", bigtiff=kind == "big", photometric="minisblack", **options)
    assert count_pixels(path) == 1200
    with pytest.raises(ValueError, match=r"large\.tif: the image says it has 40x30 pixels"):
        read_image(path, floating=True, max_pixels=1199)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, kind, orientation):
    stored = Image.fromarray(cv2.resize(ramp((4, 6, 3), np.uint8), (48, 32)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image", kind, exif=exif)
    with Image.open(tmp_path / "image") as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    actual = read_image(tmp_path / "image")
    assert actual.shape == expected.shape == ((48, 32, 3) if orientation >= 5 else (32, 48, 3))
    assert abs(actual - expected).max() <= 3  # two decoders
    write_image(tmp_path / "again.png", actual)
    np.testing.assert_array_equal(read_image(tmp_path / "again.png"), actual)  # not turned a second time


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_metadata_is_no_damaged_image(tmp_path):
    exif = b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(20)
    Image.fromarray(ramp((8, 9), np.uint8)).save(tmp_path / "image.jpg", exif=exif)
    assert read_image(tmp_path / "image.jpg").shape == (8, 9)


@pytest.mark.parametrize(
    "suffix", [".png", ".jpg", ".tif", ".bmp", ".webp", "progressive", "directory first"]
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_what_is_cut_off_is_an_error_and_not_half_an_image(tmp_path, suffix, part):
    image = cv2.resize(ramp((20, 30, 3), np.uint8), (240, 160))
    if suffix == "progressive":
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", progressive=True)
        content = buffer.getvalue()
    elif suffix == "directory first":
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, image.astype(np.uint16), photometric="rgb", compression="deflate")
        content = buffer.getvalue()
    else:
        content = cv2.imencode(suffix, image)[1].tobytes()
    path = tmp_path / "image"
    path.write_bytes(content)
    assert read_image(path).shape == image.shape
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match="image: not an image, damaged or cut off"):
        read_image(path)


def bomb(width, height):
    """A PNG file that announces a black image of that size and holds one row of it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(3 * width))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_images_that_say_they_are_gigantic_are_not_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(400_000, 300_000))
    with pytest.raises(ValueError, match=r"bomb\.png: the image says it has 400000x300000 pixels, more than"):
        read_image(path)
    for suffix in (".png", ".jpg", ".tif", ".bmp", ".webp"):
        write_image(tmp_path / f"image{suffix}", ramp((10, 20), np.uint8))
        assert read_image(tmp_path / f"image{suffix}", max_pixels=200).shape[:2] == (10, 20)
        with pytest.raises(ValueError, match="20x10 pixels, more than the 199 allowed"):
            read_image(tmp_path / f"image{suffix}", max_pixels=199)


def test_the_content_counts_and_not_the_ending(tmp_path):
    (tmp_path / "image.png").write_bytes(cv2.imencode(".jpg", ramp((8, 9), np.uint8))[1].tobytes())
    assert read_image(tmp_path / "image.png").shape == (8, 9)


def test_floats_are_read_where_they_are_asked_for(tmp_path):
    kelvin = np.linspace(280, 320, 20, dtype=np.float32).reshape(4, 5)
    tifffile.imwrite(tmp_path / "kelvin.tif", kelvin)
    np.testing.assert_array_equal(read_image(tmp_path / "kelvin.tif", floating=True), kelvin)
    write_image(tmp_path / "again.tif", kelvin)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "again.tif"), kelvin)


def _profile(space):
    """An ICC profile of colours or greys, nearly empty."""
    if space == b"RGB ":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds = (132, b"test", 0x02100000, b"mntr", space, b"XYZ ", bytes(12), b"acsp")
    header = struct.pack(">I4sI4s4s4s12s4s", *kinds)
    illuminant = struct.pack(">iii", 63190, 65536, 54061)
    return (header + bytes(28) + illuminant).ljust(128, b"\0") + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "TIFF"])
def test_colours_keep_their_profile(tmp_path, kind, capfd):
    image, profile = ramp((9, 8, 3), np.uint8), _profile(b"RGB ")
    Image.fromarray(image).save(tmp_path / "image", kind, icc_profile=profile)
    assert read_profile(tmp_path / "image") == profile
    for suffix in (".png", ".jpg", ".jpeg", ".webp", ".tif"):
        write_image(tmp_path / f"again{suffix}", image, profile)
        assert read_profile(tmp_path / f"again{suffix}") == profile
        write_image(tmp_path / f"without{suffix}", image)
        assert read_profile(tmp_path / f"without{suffix}") is None
        assert (read_image(tmp_path / f"again{suffix}") == read_image(tmp_path / f"without{suffix}")).all()
    assert capfd.readouterr().err == ""


def test_a_profile_that_does_not_fit_is_left_out(tmp_path, capfd):
    grey, colour = _profile(b"GRAY"), _profile(b"RGB ")
    image = ramp((9, 8, 3), np.uint8)
    for suffix in (".png", ".jpg", ".tif", ".bmp"):
        for values, profile in ((image, grey), (image[..., 0], colour), (image, b"no"), (image, bytes(200))):
            write_image(tmp_path / f"image{suffix}", values, profile)
            assert read_profile(tmp_path / f"image{suffix}") is None
    write_image(tmp_path / "grey.png", image[..., 0].astype(np.uint16), grey)
    assert read_profile(tmp_path / "grey.png") == grey
    write_image(tmp_path / "image.bmp", image, colour)
    (tmp_path / "words.png").write_text("no image")
    for name in ("image.bmp", "words.png", "missing.png"):
        assert read_profile(tmp_path / name) is None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("dtype", "suffix"), [(">u2", ".png"), (">u2", ".tif"), (">f4", ".tif")])
def test_any_byte_order_is_written(tmp_path, dtype, suffix):
    for shape in ((3, 4), (3, 4, 3)):
        image = ramp(shape, np.uint16).astype(dtype)
        write_image(tmp_path / f"image{suffix}", image)
        np.testing.assert_array_equal(read_image(tmp_path / f"image{suffix}", floating=True), image)


def test_cmyk_is_not_taken_for_alpha(tmp_path):
    Image.new("CMYK", (9, 8)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match=r"image\.tif: CMYK is not supported"):
        read_image(tmp_path / "image.tif", alpha=True)


def test_real_images_are_read_as_opencv_reads_them(data_dir):
    visible = next((data_dir / "roadscene/test/vis").glob("*.jpg"))
    np.testing.assert_array_equal(read_image(visible)[..., ::-1], cv2.imread(str(visible)))
    infrared = next((data_dir / "msrs/test/ir").glob("*.png"))
    assert read_image(infrared).ndim == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"GIF? no, plain text", "not an image, damaged"),
        ("truncated", "not an image, damaged"),
        ("floats", "values of type float32 are not supported"),
        ("folder", "cannot be read"),
    ],
)
def test_files_that_are_no_images_are_named_with_the_reason(tmp_path, content, message):
    path = tmp_path / "image.tif"
    if content == "truncated":
        encoded = cv2.imencode(".png", ramp((40, 40), np.uint8))[1].tobytes()
        path.write_bytes(encoded[: len(encoded) // 2])
    elif content == "floats":
        cv2.imwrite(str(path), np.ones((4, 4), np.float32))
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"image\.tif: {message}"):
        read_image(path)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "occupied.png").mkdir()
    with pytest.raises(OSError, match=r"occupied\.png: cannot be written"):
        write_image(tmp_path / "occupied.png", ramp((4, 4), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"nowhere/image\.png: cannot be written"):
        write_image(tmp_path / "nowhere" / "image.png", ramp((4, 4), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["occupied.png"]


def test_a_written_file_replaces_another_and_has_its_usual_mode(tmp_path):
    path = tmp_path / "image.png"
    write_image(path, ramp((4, 4), np.uint8))
    write_image(path, ramp((5, 6), np.uint8))
    (tmp_path / "plain").write_bytes(b"")
    assert read_image(path).shape == (5, 6)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "image", "error", "message"),
    [
        (
            "a.png",
            ramp((4, 4), np.uint8).astype(np.float64),
            TypeError,
            "uint8, uint16, float32, got an array of float64",
        ),
        (
            "a.png",
            np.zeros((4, 4), np.float32),
            ValueError,
            r"a\.png: \.png has no float32, use one of \.tif",
        ),
        ("a.png", [[1, 2]], TypeError, "got list"),
        ("a.png", np.zeros((4, 4, 5), np.uint8), ValueError, r"got \[4, 4, 5\]"),
        ("a.jpg", np.zeros((4, 4, 4), np.uint8), ValueError, r"a\.jpg: \.jpg has no alpha"),
        ("a.png", np.zeros((0, 4), np.uint8), ValueError, "not empty"),
        ("a.xyz", ramp((4, 4), np.uint8), ValueError, r"a\.xyz: unknown image format"),
        ("a.jpg", ramp((4, 4), np.uint16), ValueError, r"a\.jpg: \.jpg has no 16 bit"),
    ],
)
def test_images_that_cannot_be_written_are_refused(tmp_path, name, image, error, message):
    with pytest.raises(error, match=message):
        write_image(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("floating", [np.float32, np.float64])
def test_whole_numbers_survive_being_floats(dtype, floating):
    values = np.arange(np.iinfo(dtype).max + 1).astype(dtype)
    floats = to_float(values)
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (0, 1)
    np.testing.assert_array_equal(from_float(floats.astype(floating), dtype), values)


def test_from_float_clips_rounds_and_refuses_nan():
    values = np.array([-1e9, -0.4 / 255, 0.6 / 255, 254.6 / 255, 7.0, np.inf])
    np.testing.assert_array_equal(from_float(values), [0, 0, 1, 255, 255, 255])
    np.testing.assert_array_equal(from_float(np.ones(1, np.float16), np.uint16), [65535])
    with pytest.raises(ValueError, match="1 values that are not a number"):
        from_float(np.array([0.5, np.nan]))
    with pytest.raises(TypeError, match="image must be floating, got uint8"):
        from_float(np.zeros(3, np.uint8))
    with pytest.raises(TypeError, match="dtype must be uint8 or uint16, got int8"):
        from_float(np.zeros(3), np.int8)
    with pytest.raises(TypeError, match="image must be uint8 or uint16, got int64"):
        to_float(np.zeros(3, np.int64))


# --- colour ------------------------------------------------------------------------------------------------


def test_colours_come_back_exactly():
    levels = np.append(np.arange(0, 255, 7), 255).astype(np.uint8)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, len(levels), 3)
    ycbcr = rgb_to_ycbcr(to_float(rgb))
    assert ycbcr.dtype == np.float32
    assert ycbcr.min() > -1e-6
    assert ycbcr.max() < 1 + 1e-6
    np.testing.assert_array_equal(from_float(ycbcr_to_rgb(ycbcr)), rgb)


def test_luminance_is_that_of_opencv():
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    luminance = rgb_to_ycbcr(to_float(rgb))[..., 0] * 255
    assert abs(luminance - cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)).max() < 0.51
    ycrcb = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb).astype(int)
    ours = from_float(rgb_to_ycbcr(to_float(rgb))).astype(int)
    assert abs(ours - ycrcb[..., [0, 2, 1]]).max() <= 1


def test_tensors_have_channels_first():
    array = np.random.default_rng(0).random((6, 5, 3))
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None]
    actual = rgb_to_ycbcr(tensor)
    np.testing.assert_allclose(actual[0].permute(1, 2, 0).numpy(), rgb_to_ycbcr(array), atol=1e-15)
    torch.testing.assert_close(ycbcr_to_rgb(actual), tensor)


def test_colour_needs_floats_of_three_channels():
    with pytest.raises(TypeError, match=r"image must be floating.*got uint8"):
        rgb_to_ycbcr(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\[..., 3\], got \[4, 4\]"):
        rgb_to_ycbcr(np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"\[..., 3, H, W\], got \[4, 4, 3\]"):
        ycbcr_to_rgb(torch.zeros(4, 4, 3))


# --- pairs -------------------------------------------------------------------------------------------------


def make_folder(root, names, size=(16, 16)):
    """Pairs in which each pixel of the visible image is unique and the infrared image is its negative."""
    for folder in ("vis", "ir"):
        (root / folder).mkdir(parents=True)
    for name in names:
        visible = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
        write_image(root / "vis" / f"{name}.png", visible)
        write_image(root / "ir" / f"{name}.png", 255 - visible)
    return root


def test_folders_are_paired_by_stem(tmp_path):
    make_folder(tmp_path, ["b", "a"])
    (tmp_path / "vis/a.png").rename(tmp_path / "vis/a.PNG")
    write_image(tmp_path / "ir/lonely.png", ramp((4, 4), np.uint8))
    write_image(tmp_path / "vis/single.jpg", ramp((4, 4), np.uint8))
    for folder in ("vis", "ir"):
        (tmp_path / folder / "recipe.json").write_text("{}")
        (tmp_path / folder / "._a.png").write_bytes(b"left by an operating system")
        (tmp_path / folder / "deeper.png").mkdir()
    pairs, unpaired = pair_folders(tmp_path / "vis", str(tmp_path / "ir"))
    assert [(pair.name, pair.visible.name, pair.infrared.name) for pair in pairs] == [
        ("a", "a.PNG", "a.png"),
        ("b", "b.png", "b.png"),
    ]
    assert unpaired == [tmp_path / "vis/single.jpg", tmp_path / "ir/lonely.png"]


def test_ambiguous_and_missing_folders_are_named(tmp_path):
    make_folder(tmp_path, ["a"])
    write_image(tmp_path / "vis/a.bmp", ramp((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"vis: a\.bmp and a\.png"):
        pair_folders(tmp_path / "vis", tmp_path / "ir")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        pair_folders(tmp_path / "nowhere", tmp_path / "ir")


def test_every_real_pair_is_found(data_dir):
    for folder, count in (
        ("tno/test", 21),
        ("tno_degraded/test", 21),
        ("roadscene/train", 177),
        ("gun/test", 1),
    ):
        pairs, unpaired = pair_folders(data_dir / folder / "vis", data_dir / folder / "ir")
        assert len(pairs) == count
        assert not unpaired


def test_a_folder_is_read_as_grey_bytes(tmp_path):
    make_folder(tmp_path, ["grey"])
    colour = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    write_image(tmp_path / "vis/colour.png", colour)
    write_image(tmp_path / "ir/colour.tif", np.full((6, 7), 257 * 200, np.uint16))
    write_image(tmp_path / "ir/lonely.png", ramp((4, 4), np.uint8))
    with pytest.warns(UserWarning, match=r"without a partner are left out: ir/lonely\.png"):
        folder = PairedFolder(tmp_path)
    assert [pair.name for pair in folder] == ["colour", "grey"]
    pair = folder[0]
    assert pair.visible.dtype == pair.infrared.dtype == torch.uint8
    luminance = rgb_to_ycbcr(to_float(colour))[..., 0] * 255
    assert abs(pair.visible.numpy() - luminance).max() < 0.51
    assert (pair.infrared == 200).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("full", [27, 29, 37]),
        ("minmax", [0, 51, 255]),
        ("0%,50%", [0, 255, 255]),
        ((7000, 7500), [0, 255, 255]),
    ],
)
def test_raw_thermal_values_are_spread_as_asked(tmp_path, values, expected):
    make_folder(tmp_path, [])
    write_image(tmp_path / "vis/a.png", np.full((3, 1), 7000, np.uint16))
    write_image(tmp_path / "ir/a.png", np.array([[7000], [7500], [9500]], np.uint16))
    pair = PairedFolder(tmp_path, thermal_range=values)[0]
    assert pair.infrared.flatten().tolist() == expected
    assert (pair.visible == 27).all()


def test_a_thermal_image_of_one_value_is_black(tmp_path):
    make_folder(tmp_path, [])
    write_image(tmp_path / "vis/a.png", ramp((4, 4), np.uint8))
    write_image(tmp_path / "ir/a.png", np.full((4, 4), 7000, np.uint16))
    assert (PairedFolder(tmp_path, thermal_range="percentile")[0].infrared == 0).all()


def test_folders_that_cannot_be_used_are_named(tmp_path):
    make_folder(tmp_path, [])
    with pytest.raises(ValueError, match="no pair of images by any known layout"):
        PairedFolder(tmp_path)
    write_image(tmp_path / "vis/a.png", ramp((4, 5), np.uint8))
    write_image(tmp_path / "ir/a.png", ramp((4, 6), np.uint8))
    with pytest.raises(ValueError, match=r"vis/a\.png is \[4, 5\], but .*ir/a\.png is \[4, 6\]"):
        PairedFolder(tmp_path)[0]


def test_known_suffixes_are_those_that_can_be_read_and_written(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        write_image(tmp_path / f"image{suffix}", ramp((16, 16), np.uint8))
        assert read_image(tmp_path / f"image{suffix}").shape[:2] == (16, 16)
