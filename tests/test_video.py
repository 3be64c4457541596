"""Fused videos: real encoded clips in, and what a decoder finds in the result."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from ddrf_fast import Fuser
from ddrf_fast.cli import main
from ddrf_fast.data import write_image
from ddrf_fast.video import LIMIT, fuse_video

HEIGHT, WIDTH = 48, 64
GREY16 = {"codec": "ffv1", "pix_fmt": "gray16le"}


@pytest.fixture(scope="module")
def fuser(weights):
    return Fuser(weights, "cpu")


def scene(count, colour=True, height=HEIGHT, width=WIDTH, seed=0):
    """A texture that moves; in colour [H, W, 3], else [H, W]."""
    texture = np.random.default_rng(seed).integers(40, 200, (height // 8 + 2, width // 8 + 9, 3), np.uint8)
    large = texture.repeat(8, axis=0).repeat(8, axis=1)
    images = [np.roll(large, -2 * n, axis=1)[:height, :width] for n in range(count)]
    return [image if colour else image[..., 0] for image in images]


def write(
    path,
    images,
    *,
    rate=25,
    codec="libx264",
    pix_fmt="yuv420p",
    crf="4",
    audio=None,
    turned=None,
    stamps=None,
    **attributes,
):
    """Grey images of uint16 are stored as they are; `turned`: how players are to show it; `stamps`: in ms."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, options={"crf": crf})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in attributes.items():
            setattr(stream.codec_context, name, value)
        if turned is not None:
            stream.set_display_rotation(**turned)
        sound = file.add_stream(audio, rate=8000) if audio else None
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images):
            kind = "rgb24" if image.ndim == 3 else "gray" if image.dtype == np.uint8 else pix_fmt
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=kind)
            # Without a time of their own, frames that an encoder reorders are now and then refused.
            if stamps is None:
                frame.pts, frame.time_base = number, Fraction(1, rate)
            else:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if sound is not None:
            tone = np.sin(np.arange(8000 * len(images) // rate) / 5)[None].astype(np.float32)
            samples = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            samples.sample_rate = 8000
            file.mux(sound.encode(samples))
            file.mux(sound.encode())
    return path


def frames(path):
    with av.open(str(path)) as file:
        return list(file.decode(video=0))


def first(path):
    return frames(path)[0]


def luma(frame):
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]


def planes_of(frame):
    return frame.reformat(format="yuv420p").to_ndarray()


@pytest.fixture
def clips(tmp_path):
    return (
        write(tmp_path / "vis.mp4", scene(8), audio="aac"),
        write(tmp_path / "ir.mp4", scene(8, colour=False, seed=1)),
        tmp_path / "out.mp4",
    )


def test_every_frame_is_the_fused_one(clips, fuser):
    visible, _, output = clips
    report = fuse_video(*clips, fuser=fuser, smoothing=1, crf=4)
    assert (report.frames, report.notes, report.problems) == (8, [], [])
    for seen, thermal, fused in zip(*map(frames, clips), strict=True):
        assert (fused.width, fused.height, fused.format.name) == (WIDTH, HEIGHT, "yuv420p")
        v, i = (
            torch.from_numpy((luma(frame).astype(np.float32) - 16) / 219).clamp(0, 1)[None, None]
            for frame in (seen, thermal)
        )
        with torch.inference_mode():
            expected = fuser.model(v, i).fused.clamp(0, 1)[0, 0].numpy() * 219 + 16
        assert np.abs(luma(fused) - expected).mean() < 2, "luma"
        chroma = [planes_of(frame)[HEIGHT:].astype(float) for frame in (seen, fused)]
        assert np.abs(chroma[0] - chroma[1]).mean() < 2, "chroma"
        assert fused.time == seen.time
    with av.open(str(visible)) as ours, av.open(str(output)) as theirs:
        assert ours.streams.video[0].average_rate == theirs.streams.video[0].average_rate
        packets = [
            [bytes(packet) for packet in file.demux(file.streams.audio[0]) if packet.size]
            for file in (ours, theirs)
        ]
    assert packets[0] and packets[0] == packets[1], "the audio is the visible video's"


@pytest.mark.parametrize(
    ("suffix", "codec", "name"),
    [(".mkv", None, "h264"), (".webm", None, "vp9"), (".mov", None, "h264"), (".mkv", "ffv1", "ffv1")],
)
def test_container_and_codec(clips, fuser, tmp_path, suffix, codec, name):
    output = tmp_path / f"out{suffix}"
    report = fuse_video(*clips[:2], output, fuser=fuser, codec=codec)
    with av.open(str(output)) as file:
        assert file.streams.video[0].codec_context.name.startswith(name)
        assert bool(file.streams.audio) == (suffix != ".webm")
        assert len(list(file.decode(video=0))) == 8
    assert report.notes == (
        [".webm cannot hold the audio (aac), it was left out"] if suffix == ".webm" else []
    )


def test_a_name_with_a_colon_is_a_file(passing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "ir:1.mp4"):
        write(Path("video.mp4"), scene(3, colour=False))
        Path("video.mp4").rename(name)
    assert fuse_video("12:30.mp4", "ir:1.mp4", "out.mp4", fuser=passing).frames == 3


def test_ranges_and_odd_sizes(fuser, tmp_path):
    """Sources in full range, in RGB and in grey give the same picture; odd sides are made even."""
    images, thermal = scene(2, height=45, width=61), scene(2, colour=False, height=45, width=61, seed=1)
    infrared = write(tmp_path / "ir.mkv", thermal, codec="ffv1", pix_fmt="gray")
    results = []
    for name, codec, pix_fmt in (
        ("444", "ffv1", "yuv444p"),
        ("rgb", "ffv1", "bgr0"),
        ("full", "mjpeg", "yuvj444p"),
    ):
        visible = write(tmp_path / f"{name}.mkv", images, codec=codec, pix_fmt=pix_fmt)
        fuse_video(visible, infrared, tmp_path / "out.mkv", fuser=fuser, codec="ffv1")
        results.append(frames(tmp_path / "out.mkv")[0])
    for frame in results:
        assert (frame.width, frame.height) == (62, 46)
        rgb = [f.to_ndarray(format="rgb24").astype(float) for f in (results[0], frame)]
        assert np.abs(rgb[0] - rgb[1])[:45, :61].mean() < 3
    picture = luma(results[0])
    assert np.array_equal(picture[44], picture[45]) and np.array_equal(picture[:, 60], picture[:, 61])


def levels(path):
    """The mean luma of each frame: with flat clips, which frame it was."""
    return [float(luma(frame).mean()) for frame in frames(path)]


class FirstOfInfrared:
    """In place of the network: the infrared image as it is, so that a result tells which frame it was."""

    def estimate(self, modality, image, tone):
        return torch.zeros(len(image), 19)

    def fuse(self, visible, infrared, *settings):
        return infrared


class FirstOfVisible:
    """Likewise, the visible image."""

    def fuse(self, visible, infrared, *settings):
        return visible

    def tone(self, visible):
        return torch.ones(len(visible), 3)  # nothing is dark


def showing_infrared(weights, **settings):
    fuser = Fuser(weights, "cpu", **settings)
    fuser.network = FirstOfInfrared()
    return fuser


@pytest.fixture
def passing(weights):
    return showing_infrared(weights)


def showing_visible(weights, **settings):
    fuser = Fuser(weights, "cpu", **settings)
    fuser.network = FirstOfVisible()
    return fuser


def flat(values):
    return [np.full((HEIGHT, WIDTH), value, np.uint8) for value in values]


def test_frames_of_other_rates_are_paired_by_time_or_by_number(passing, tmp_path):
    visible = write(tmp_path / "vis.mp4", scene(30), rate=30)
    infrared = write(tmp_path / "ir.mp4", flat(range(60, 160, 10)), rate=10)
    output = tmp_path / "out.mp4"

    report = fuse_video(visible, infrared, output, fuser=passing, smoothing=1)
    assert (report.frames, report.notes) == (30, [])
    shown = levels(infrared)
    nearest = [shown[min(9, round(n / 3))] for n in range(30)]
    np.testing.assert_allclose(levels(output), nearest, atol=2)

    report = fuse_video(visible, infrared, output, fuser=passing, smoothing=1, sync="frame")
    assert report.frames == 10
    assert "the frame rates are 30 and 10: the sync 'timestamp' pairs" in report.notes[0]
    assert "ir.mp4 ended first" in report.notes[1]
    np.testing.assert_allclose(levels(output), shown, atol=2)


BURST = [0, 40, 80, 120, 240, 240, 240, *range(280, 480, 40)]  # as of a camera whose link was busy


def times(path):
    return [frame.time for frame in frames(path)]


def test_infrared_frames_of_one_time_stamp_do_not_stop_the_pairing(passing, tmp_path):
    visible = write(tmp_path / "vis.mkv", scene(12), codec="ffv1")
    infrared = write(tmp_path / "ir.mkv", flat(range(60, 180, 10)), codec="ffv1", stamps=BURST)
    assert times(infrared) == [stamp / 1000 for stamp in BURST]
    fuse_video(visible, infrared, tmp_path / "out.mkv", fuser=passing, smoothing=1, codec="ffv1")
    shown = levels(infrared)
    nearest = [shown[n] for n in (0, 1, 2, 3, 3, 4, 4, 7, 8, 9, 10, 11)]
    np.testing.assert_allclose(levels(tmp_path / "out.mkv"), nearest, atol=1)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_visible_frames_of_one_time_stamp_are_written(weights, tmp_path, suffix):
    visible = write(tmp_path / "vis.mkv", flat(range(60, 180, 10)), codec="ffv1", stamps=BURST)
    infrared = write(tmp_path / "ir.mkv", scene(12, colour=False), codec="ffv1", pix_fmt="gray")
    output = tmp_path / f"out{suffix}"
    fuse_video(visible, infrared, output, fuser=showing_visible(weights), smoothing=1)
    np.testing.assert_allclose(levels(output), levels(visible), atol=2)
    np.testing.assert_allclose(times(output), times(visible), atol=0.003)
    assert (np.diff(times(output)) > 0).all()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_frames_of_an_avi_keep_their_order(weights, passing, tmp_path, suffix):
    """Which tells no times to show frames at: with B-frames, those which FFmpeg gives go back and forth."""
    film = write(tmp_path / "film.avi", flat(range(60, 180, 5)))
    assert np.diff([frame.pts for frame in frames(film)]).min() < 0
    visible = write(tmp_path / "vis.mkv", scene(24), codec="ffv1")
    infrared = write(tmp_path / "ir.mkv", scene(24, colour=False), codec="ffv1", pix_fmt="gray")
    output = tmp_path / f"out{suffix}"
    for fuser, pair in ((passing, (visible, film)), (showing_visible(weights), (film, infrared))):
        report = fuse_video(*pair, output, fuser=fuser, smoothing=1)
        assert (report.frames, report.notes, report.problems) == (24, [], [])
        np.testing.assert_allclose(levels(output), levels(film), atol=2)
        np.testing.assert_allclose(np.diff(times(output)), 0.04, atol=0.001)


@pytest.mark.parametrize("rate", [25, 50, Fraction(30000, 1001)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_of_a_raw_stream_follow_at_its_rate(weights, tmp_path, suffix, rate):
    visible = write(tmp_path / "vis.h264", flat(range(60, 180, 5)), rate=rate)
    assert times(visible) == [None] * 24
    infrared = write(tmp_path / "ir.mkv", scene(24, colour=False), rate=rate, codec="ffv1", pix_fmt="gray")
    output = tmp_path / f"out{suffix}"
    report = fuse_video(visible, infrared, output, fuser=showing_visible(weights), smoothing=1)
    assert (report.frames, report.notes, report.problems) == (24, [], [])
    np.testing.assert_allclose(levels(output), levels(visible), atol=2)
    np.testing.assert_allclose(times(output), np.arange(24) / float(rate), atol=0.001)


def test_joined_recordings_whose_time_starts_anew_go_on(weights, passing, tmp_path):
    parts = [write(tmp_path / f"{low}.ts", flat(range(low, low + 60, 5))) for low in (60, 120)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert min(np.diff(times(joined))) < 0
    visible = write(tmp_path / "vis.mkv", scene(24), codec="ffv1")
    infrared = write(tmp_path / "ir.mkv", scene(24, colour=False), codec="ffv1", pix_fmt="gray")
    output = tmp_path / "out.mp4"
    for fuser, pair in ((passing, (visible, joined)), (showing_visible(weights), (joined, infrared))):
        assert fuse_video(*pair, output, fuser=fuser, smoothing=1).frames == 24
        np.testing.assert_allclose(levels(output), levels(joined), atol=2)
        np.testing.assert_allclose(np.diff(times(output)), 0.04, atol=0.001)


def test_ends_where_the_first_of_both_ends(passing, tmp_path):
    visible = write(tmp_path / "vis.mp4", scene(12))
    infrared = write(tmp_path / "ir.mp4", flat(range(60, 120, 10)))
    report = fuse_video(visible, infrared, tmp_path / "out.mp4", fuser=passing)
    assert report.frames == 6 and "ir.mp4 ended first" in report.notes[0]
    assert not report.problems


def test_smoothing_keeps_flicker_down_and_follows_the_scene(passing, tmp_path):
    visible = write(tmp_path / "vis.mp4", scene(30))
    wavering = [100 + 3 * (-1) ** n for n in range(15)] + [200] * 15
    infrared = write(tmp_path / "ir.mp4", flat(wavering))
    series = {}
    for smoothing in (1, 4):
        fuse_video(visible, infrared, tmp_path / "out.mp4", fuser=passing, smoothing=smoothing, crf=4)
        series[smoothing] = np.array(levels(tmp_path / "out.mp4"))
    flicker = {smoothing: np.abs(np.diff(values[3:15])).mean() for smoothing, values in series.items()}
    assert flicker[4] < flicker[1] / 3
    assert np.abs(series[4] - series[1]).max() <= 219 * LIMIT + 2, "a cut is followed at once"


def test_reads_damaged_videos_as_far_as_they_go(fuser, tmp_path):
    output = tmp_path / "out.mp4"
    long = write(tmp_path / "long.mkv", scene(60), crf="20")
    thermal = write(tmp_path / "thermal.mkv", scene(60, colour=False, seed=1), crf="20")
    whole = long.read_bytes()
    long.write_bytes(whole[: len(whole) // 2])
    report = fuse_video(long, thermal, output, fuser=fuser)
    assert 0 < report.frames < 60 and len(frames(output)) == report.frames
    assert any("ends after" in problem or "read after" in problem for problem in report.problems)

    content = bytearray(whole)
    content[len(whole) // 3 : len(whole) // 3 + 400] = bytes(400)
    long.write_bytes(content)
    report = fuse_video(long, thermal, output, fuser=fuser)
    assert report.frames and len(frames(output)) == report.frames
    assert report.problems


def test_says_what_is_wrong_and_leaves_no_file(clips, fuser, tmp_path):
    visible, infrared, output = clips
    truncated = tmp_path / "truncated.mp4"
    truncated.write_bytes(visible.read_bytes()[:900])
    (tmp_path / "empty.mp4").touch()
    small = write(tmp_path / "small.mp4", scene(2, colour=False, height=32, width=32))
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, options, message in (
        ((truncated, infrared, output), {}, r"truncated.mp4: cannot be read as a video"),
        ((tmp_path / "empty.mp4", infrared, output), {}, r"empty.mp4: cannot be read as a video"),
        (
            (tmp_path / "none.mp4", infrared, output),
            {},
            r"none.mp4: cannot be read as a video \(No such file",
        ),
        ((visible, small, output), {}, r"vis.mp4 is 64x48 and .*small.mp4 is 32x32"),
        ((visible, visible, output), {}, r"in colour, but an infrared video must be grey"),
        ((visible, infrared, visible), {}, "is an input and would be replaced"),
        ((visible, infrared, tmp_path / "out.avi"), {}, r"no known video format; use one of .mp4"),
        (clips, {"sync": "index"}, "sync must be 'timestamp' or 'frame'"),
        (clips, {"smoothing": 0}, "smoothing must be at least 1"),
        (clips, {"codec": "h266"}, "cannot be encoded with h266"),
        (clips, {"codec": "aac"}, "cannot be encoded with aac: it is no video codec"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_video(*arguments, fuser=fuser, **options)
    with pytest.raises(TypeError, match=r"smoothing must be an int, got 2\.5"):
        fuse_video(*clips, fuser=fuser, smoothing=2.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def show(planes, frame):
    """Luma in [0, 1] of a frame's first plane, against what it should be."""
    return np.abs((luma(frame).astype(np.float32) - 16) / 219 - planes).max()


@pytest.mark.parametrize(("pix_fmt", "bits"), [("gray16le", 16), ("gray12le", 12), ("gray10le", 10)])
def test_thermal_values_of_many_bits_are_mapped(weights, tmp_path, pix_fmt, bits):
    """A ramp over few of the values: nothing of it is left in 8 bit unless all are read."""
    visible = write(tmp_path / "vis.mkv", scene(3), codec="ffv1")
    low, high = 2 ** (bits - 2), 2 ** (bits - 2) + 100
    ramp = np.linspace(low, high, WIDTH).round().astype(np.uint16)[None].repeat(HEIGHT, axis=0)
    infrared = write(tmp_path / "ir.mkv", [ramp] * 3, codec="ffv1", pix_fmt=pix_fmt)
    assert frames(infrared)[0].format.name == pix_fmt
    unit = (ramp - float(low)) / (high - low)
    for asked, expected, mapped in (
        ("minmax", unit, (low, high)),
        ((low, high), unit, (low, high)),
        ((low, high + 100), unit / 2, (low, high + 100)),
        ("full", ramp / (2**bits - 1), None),
    ):
        fuser = showing_infrared(weights, thermal_range=asked)
        report = fuse_video(visible, infrared, tmp_path / "out.mkv", fuser=fuser, codec="ffv1")
        assert report.mapped == mapped
        assert show(expected, frames(tmp_path / "out.mkv")[2]) < 1 / 219
        assert [("16 bit" in note, "LOW,HIGH" in note) for note in report.notes] == (
            [(True, True)] if asked == "full" and bits == 16 else []
        )


@pytest.mark.parametrize("asked", ["minmax", "0.5%,99.5%"])
def test_what_is_hot_and_enters_does_not_change_the_rest_at_once(weights, tmp_path, asked):
    """A background of few values and, after a third of the frames, a spot far above them."""
    cold = np.linspace(7000, 7400, HEIGHT * WIDTH).round().reshape(HEIGHT, WIDTH).astype(np.uint16)
    hot = cold.copy()
    hot[10:20, 10:20] = 19000
    visible = write(tmp_path / "vis.mkv", scene(24), codec="ffv1")
    infrared = write(tmp_path / "ir.mkv", [cold] * 8 + [hot] * 16, **GREY16)
    output, background = tmp_path / "out.mkv", (slice(24, None), slice(None))
    percents = (0, 100) if asked == "minmax" else (0.5, 99.5)
    before, after = (np.percentile(image, percents) for image in (cold, hot))

    def grey(values, left):
        """By the range of the frames without the spot, as far as it is left, and of those with it."""
        without, with_spot = ((values - low) / (high - low) for low, high in (before, after))
        return with_spot + (without - with_spot) * left

    jumps = {}
    for smoothing in (1, 4, 12):
        fuser = showing_infrared(weights, thermal_range=asked)
        report = fuse_video(
            visible, infrared, output, fuser=fuser, smoothing=smoothing, codec="ffv1", workers=3
        )
        left = [1.0] * 8 + [(1 - 1 / smoothing) ** n for n in range(1, 17)]
        shown = frames(output)
        for number, frame in enumerate(shown):
            expected = grey(cold if number < 8 else hot, left[number]).clip(0, 1)
            # The smoothing of the mean brightness may change it, too.
            assert show(expected, frame) < 1 / 219 + LIMIT * (smoothing > 1)
        assert report.mapped[0] == before[0]
        assert grey(report.mapped[1], left[-1]) == pytest.approx(1, abs=1e-4), "white of the last frame"
        means = np.array([luma(frame)[background].mean() for frame in shown])
        jumps[smoothing] = np.abs(np.diff(means)).max() / 219
    assert jumps[1] > 0.7
    for smoothing in (4, 12):
        assert jumps[smoothing] < jumps[1] / smoothing + LIMIT
    settled = (means[0] - means[-1]) / 219
    assert settled > 0.7 * jumps[1], "after a while the range is that of the scene"

    fixed = showing_infrared(weights, thermal_range=(7000, 20000))
    assert fuse_video(visible, infrared, output, fuser=fixed, codec="ffv1").mapped == (7000, 20000)
    assert show((hot - 7000.0) / 13000, frames(output)[8]) < 1 / 219 + LIMIT


def test_visible_videos_of_ten_bits(weights, tmp_path):
    """The network sees all their bits; limited range is understood."""
    images = scene(2)
    visible = write(tmp_path / "vis.mkv", images, codec="libx265", pix_fmt="yuv420p10le", crf="0")
    infrared = write(tmp_path / "ir.mkv", scene(2, colour=False, seed=1), codec="ffv1", pix_fmt="gray")
    fuser = showing_visible(weights)
    fuse_video(visible, infrared, tmp_path / "out.mkv", fuser=fuser, codec="ffv1", smoothing=1)
    for source, result in zip(frames(visible), frames(tmp_path / "out.mkv"), strict=True):
        ten = np.frombuffer(source.planes[0], np.uint16).reshape(HEIGHT, -1)[:, :WIDTH]
        assert source.format.name == "yuv420p10le"
        assert show((ten - 64.0) / (940 - 64), result) <= 0.51 / 219
        assert np.abs(planes_of(source)[HEIGHT:].astype(int) - planes_of(result)[HEIGHT:]).max() <= 1


TURNS = {  # of PyAV's set_display_rotation, and the same of an array
    "left": ({"degrees": 90}, lambda a: np.rot90(a)),
    "around": ({"degrees": 180}, lambda a: np.rot90(a, 2)),
    "right": ({"degrees": -90}, lambda a: np.rot90(a, -1)),
    "mirrored": ({"degrees": 0, "hflip": True}, lambda a: a[:, ::-1]),
    "overhead": ({"degrees": 0, "vflip": True}, lambda a: a[::-1]),
    "left, mirrored": ({"degrees": 90, "hflip": True}, lambda a: np.rot90(a)[:, ::-1]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_videos_that_are_to_be_shown_turned_are_turned(passing, tmp_path, turn):
    turned, upright = TURNS[turn]
    images, thermal = scene(2), scene(2, colour=False, seed=1)
    visible = write(tmp_path / "vis.mp4", images, turned=turned, sample_aspect_ratio=Fraction(4, 3))
    infrared = write(tmp_path / "ir.mkv", [upright(i) for i in thermal], codec="ffv1", pix_fmt="gray")
    assert "DISPLAYMATRIX" in frames(visible)[0].side_data
    output = tmp_path / "out.mkv"
    fuse_video(visible, infrared, output, fuser=passing, codec="ffv1", smoothing=1)
    seen, result = frames(visible)[1], frames(output)[1]
    assert "DISPLAYMATRIX" not in result.side_data
    assert show(upright(thermal[1]) / 255, result) < 1 / 219, "infrared"
    chroma = [upright(plane) for plane in planes_of(seen)[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)]
    np.testing.assert_array_equal(
        planes_of(result)[result.height :].reshape(2, result.height // 2, result.width // 2), chroma
    )
    fuse_video(visible, infrared, tmp_path / "out.mp4", fuser=passing)
    with av.open(str(tmp_path / "out.mp4")) as file:
        aspect = file.streams.video[0].sample_aspect_ratio
    assert aspect == (Fraction(3, 4) if result.height > result.width else Fraction(4, 3))
    # The infrared one may be the one that is turned.
    lying = write(tmp_path / "lying.mkv", thermal, codec="ffv1", pix_fmt="gray", turned=turned)
    standing = write(tmp_path / "standing.mp4", [upright(image) for image in images])
    fuse_video(standing, lying, output, fuser=passing, codec="ffv1", smoothing=1)
    assert show(upright(thermal[1]) / 255, frames(output)[1]) < 1 / 219


def test_other_turns_are_refused(clips, passing, tmp_path):
    askew = write(tmp_path / "askew.mp4", scene(2), turned={"degrees": 30})
    with pytest.raises(ValueError, match=r"askew.mp4: it is to be shown turned by 30 degrees"):
        fuse_video(askew, clips[1], clips[2], fuser=passing)


@pytest.mark.parametrize("color", ["ycbcr", "rgb"])
@pytest.mark.parametrize(("codec", "color_range"), [("libx264", 1), ("libvpx-vp9", 2)])
def test_colours_mean_what_they_did(weights, tmp_path, codec, color_range, color):
    """The matrix, the primaries and the range are told to players; what is passed through stays as it is."""
    tags = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": color_range}
    visible = write(tmp_path / "vis.mkv", scene(2), codec=codec, **tags)
    infrared = write(tmp_path / "ir.mkv", scene(2, colour=False, seed=1), codec="ffv1", pix_fmt="gray")
    output = tmp_path / "out.mp4"
    fuse_video(visible, infrared, output, fuser=showing_visible(weights, color=color), crf=1, smoothing=1)
    with av.open(str(output)) as file:
        context = file.streams.video[0].codec_context
        assert {name: getattr(context, name) for name in tags} == tags
    seen, result = (frame.to_ndarray(format="rgb24").astype(int) for frame in map(first, (visible, output)))
    assert np.abs(seen - result).mean() < 3
    seen, result = (planes_of(frame).astype(int) for frame in map(first, (visible, output)))
    assert np.abs(result - seen).mean() < 0.3 and abs((result - seen).mean()) < 0.1  # not a little darker


def test_ten_bits_come_through_rgb(weights, tmp_path):
    images = [np.repeat(image, 2, axis=1) for image in scene(2)]
    visible = write(tmp_path / "vis.mkv", images, codec="ffv1", pix_fmt="yuv420p10le")
    infrared = write(tmp_path / "ir.mkv", [image[..., 0] for image in images], codec="ffv1", pix_fmt="gray")
    output = tmp_path / "out.mkv"
    fuse_video(
        visible, infrared, output, fuser=showing_visible(weights, color="rgb"), codec="ffv1", smoothing=1
    )
    for seen, result in zip(frames(visible), frames(output), strict=True):
        wanted = seen.reformat(format="yuv420p")
        assert abs((planes_of(result).astype(int) - planes_of(wanted)).mean()) < 0.3


PALETTE = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [10, 200, 120], [128] * 3, [0] * 3, [255] * 3],
    np.uint8,
)
# As which of them, in squares of 16 pixels, two rows of four.
SQUARES = np.arange(8, dtype=np.uint8).reshape(2, 4).repeat(16, axis=0).repeat(16, axis=1)


@pytest.mark.parametrize("color", ["ycbcr", "rgb"])
@pytest.mark.parametrize(("suffix", "wide"), [(".mp4", False), (".webm", False), (".mp4", True)])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("vis.mp4", "libx264rgb", "bgr24"),
        ("vis.mov", "png", "rgb24"),
        ("vis.webm", "libvpx-vp9", "gbrp"),
        ("vis.mkv", "ffv1", "bgr0"),
        ("deep.mkv", "ffv1", "gbrp10le"),
    ],
)
def test_videos_in_rgb_are_written_with_a_matrix_that_is_told(
    weights, tmp_path, name, codec, pix_fmt, suffix, wide, color
):
    """Those that FFmpeg tags as RGB, and those of which it says nothing."""
    squares = np.tile(SQUARES, (1, 20 if wide else 1))
    visible = write(tmp_path / name, [PALETTE[squares]] * 2, codec=codec, pix_fmt=pix_fmt)
    assert first(visible).format.is_rgb
    check_colours(visible, tmp_path / f"out{suffix}", showing_visible(weights, color=color))


def test_videos_with_a_palette_are_in_rgb(weights, tmp_path):
    visible = tmp_path / "vis.mov"
    palette = np.zeros((256, 4), np.uint8)
    palette[:8] = np.insert(PALETTE, 0, 255, axis=1)
    with av.open(str(visible), "w") as file:
        stream = file.add_stream("png", rate=25)
        stream.height, stream.width, stream.pix_fmt = *SQUARES.shape, "pal8"
        file.mux(stream.encode(av.VideoFrame.from_ndarray((SQUARES, palette), format="pal8")))
        file.mux(stream.encode())
    assert first(visible).format.has_palette
    check_colours(visible, tmp_path / "out.mp4", showing_visible(weights))


def check_colours(visible, output, fuser):
    """Within a few levels, but for edges, where chroma of half the size is between the two sides."""
    seen = first(visible).to_ndarray(format="rgb24").astype(int)
    thermal = scene(1, colour=False, height=seen.shape[0], width=seen.shape[1])
    infrared = write(output.parent / "ir.mkv", thermal, codec="ffv1", pix_fmt="gray")
    fuse_video(visible, infrared, output, fuser=fuser, crf=1, smoothing=1)
    with av.open(str(output)) as file:
        frame = next(file.decode(video=0))
        context = file.streams.video[0].codec_context
    matrix = 1 if frame.width >= 1280 else 6  # BT.709 for HD, else BT.601; in limited range
    for tagged in (frame, context):
        assert (tagged.colorspace, tagged.color_range) == (matrix, 1)
    inside = np.tile(np.pad(np.ones((8, 8), bool), 4), (2, frame.width // 16))
    assert np.abs(seen - frame.to_ndarray(format="rgb24"))[inside].max() <= 4


def test_colour(weights, tmp_path):
    smooth = [cv2.GaussianBlur(image, (0, 0), 5) for image in scene(2)]  # as all chroma is that is kept
    visible = write(tmp_path / "vis.mkv", smooth, codec="ffv1", pix_fmt="yuv444p")
    infrared = write(tmp_path / "ir.mkv", scene(2, colour=False, seed=1), codec="ffv1", pix_fmt="gray")
    output = tmp_path / "out.mkv"
    for color in ("gray", "rgb"):
        fuser = Fuser(weights, "cpu", color=color)
        fuse_video(visible, infrared, output, fuser=fuser, codec="ffv1", smoothing=1)
        for seen, thermal, result in zip(*map(frames, (visible, infrared, output)), strict=True):
            if color == "gray":
                assert (planes_of(result)[HEIGHT:] == 128).all()
            else:
                rgb = seen.to_ndarray(format="gbrpf32le").clip(0, 1)
                expected = fuser(rgb, thermal.to_ndarray(format="gray"))
                wanted = av.VideoFrame.from_ndarray(expected, format="gbrpf32le")
                wanted = wanted.reformat(format="yuv420p", interpolation="AREA")
                change = np.abs(wanted.to_ndarray().astype(int) - planes_of(seen.reformat(format="yuv420p")))
                assert change[:HEIGHT].mean() > 3 and change[HEIGHT:].mean() > 0.3
                assert np.abs(planes_of(result).astype(int) - wanted.to_ndarray()).max() <= 1


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"resize": "visible"}, (64, 48)),
        ({"resize": "infrared"}, (32, 24)),
        ({"homography": [[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]]}, (64, 48)),
    ],
)
def test_other_sizes_are_brought_together(weights, tmp_path, settings, size):
    visible = write(tmp_path / "vis.mp4", scene(2))
    thermal = [image[::2, ::2] for image in scene(2, colour=False, seed=1)]
    infrared = write(tmp_path / "ir.mkv", thermal, codec="ffv1", pix_fmt="gray")
    output = tmp_path / "out.mkv"
    fuser = showing_infrared(weights, **settings)
    fuse_video(visible, infrared, output, fuser=fuser, codec="ffv1", smoothing=1)
    result = frames(output)[1]
    assert (result.width, result.height) == size
    assert show(fuser(np.zeros((48, 64), np.uint8), thermal[1]) / 255, result) < 1 / 219


def test_batches_and_workers_change_nothing(clips, fuser, tmp_path):
    visible, infrared, _ = clips
    output = tmp_path / "out.mkv"
    fuse_video(visible, infrared, output, fuser=fuser, codec="ffv1")
    other = tmp_path / "other.mkv"
    report = fuse_video(visible, infrared, other, fuser=fuser, batch_size=3, workers=1, codec="ffv1")
    assert report.frames == 8
    for one, two in zip(frames(output), frames(other), strict=True):
        assert one.pts == two.pts
        assert np.abs(planes_of(one).astype(int) - planes_of(two)).max() <= 1


def command(*arguments):
    return [sys.executable, "-m", "ddrf_fast", "fuse", *map(str, arguments)]


def test_command_fuses_videos(clips, weights, tmp_path):
    visible, infrared, _ = clips
    ran = subprocess.run(
        command(visible, infrared, "-o", tmp_path / "new", "--suffix", "_fused", "--weights", weights),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"fused 8 frames into {tmp_path / 'new' / 'vis_fused.mp4'}" in ran.stdout
    assert len(frames(tmp_path / "new" / "vis_fused.mp4")) == 8


def test_command_applies_its_options_or_refuses_them(clips, weights, tmp_path, capfd):
    visible, infrared, _ = clips
    thermal = write(tmp_path / "counts.mkv", [np.full((24, 32), 9000, np.uint16)] * 8, **GREY16)
    output = tmp_path / "new"
    given = ("--weights", str(weights), "--device", "cpu")

    def fuse(*arguments):
        code = main(["fuse", *map(str, arguments), *given])
        return code, *capfd.readouterr()

    options = ("--resize", "infrared", "--thermal-range", "8000,10000", "--color", "gray", "--ext", "mkv")
    more = ("--batch", 2, "--jobs", 1, "--smoothing", 1, "--codec", "ffv1", "--json")
    code, out, err = fuse(visible, thermal, "-o", output, *options, *more)
    assert code == 0, err
    told = json.loads(out)
    assert told["output"] == str(output / "vis.mkv") and told["inputs"] == [str(visible), str(thermal)]
    assert (told["frames"], told["mapped"], told["thermal_range"]) == (8, [8000, 10000], "8000,10000")
    result = frames(output / "vis.mkv")[0]
    assert (result.width, result.height) == (32, 24)
    assert (planes_of(result)[24:] == 128).all()
    code, out, _ = fuse(visible, thermal, "-o", output, "--ext", "mkv", "--json", "--skip-existing")
    assert code == 0 and json.loads(out)["skipped"]

    (tmp_path / "h.txt").write_text("2 0 0.5\n0 2 0.5\n0 0 1\n")
    code, out, err = fuse(
        visible, thermal, "-o", tmp_path / "out.mp4", "--homography", tmp_path / "h.txt", "--thermal-range",
        "minmax",
    )  # fmt: skip
    assert code == 0 and "thermal range minmax: values from 9000 to 9000 became black to white" in out

    images = [tmp_path / name for name in ("vis.png", "ir.png")]
    for image, array in zip(images, (scene(1)[0], scene(1, colour=False)[0]), strict=True):
        write_image(image, array)
    for arguments, message in (
        ((visible, infrared, "--recursive"), "--recursive has no meaning for videos"),
        ((visible, infrared, "--ignore-unpaired"), "--ignore-unpaired has no meaning for videos"),
        ((visible, infrared, "--max-pixels", 3000), "64x48 pixels, more than the 3000 allowed"),
        ((visible, infrared, "--ext", "png"), "vis.png has no known video format"),
        ((visible, thermal), "64x48 and"),
        ((*images, "--sync", "frame"), "--sync has no meaning for images"),
        ((*images, "--smoothing", 0), "--smoothing has no meaning for images"),
        ((*images, "--codec", "ffv1"), "--codec has no meaning for images"),
        ((*images, "--crf", 0), "--crf has no meaning for images"),
    ):
        code, _, err = fuse(*arguments, "-o", tmp_path / "refused")
        assert (code, err.count("\n")) == (2, 1) and message in err, err
    for naming, called in ((("--suffix", "_fused"), "a suffix"), (("--ext", "mkv"), "an extension")):
        code, _, err = fuse(visible, infrared, "-o", tmp_path / "refused.mp4", *naming)
        assert code == 2 and f"{called} names results in a folder, but" in err
    assert not list(tmp_path.glob("refused*"))


def test_sound_of_an_unnamed_layout_is_kept(clips, tmp_path, fuser):
    """An AVI tells the number of its channels and no more."""
    with av.open(str(tmp_path / "vis.avi"), "w") as file:
        stream, sound = file.add_stream("mpeg4", rate=25), file.add_stream("pcm_s16le", rate=8000)
        stream.height, stream.width, stream.pix_fmt = *scene(1)[0].shape[:2], "yuv420p"
        sound.codec_context.layout = "stereo"
        for image in scene(4):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 1280), np.int16), format="s16", layout="stereo")
        samples.sample_rate = 8000
        file.mux(sound.encode(samples))
        file.mux(stream.encode())
    report = fuse_video(tmp_path / "vis.avi", clips[1], clips[2], fuser=fuser)
    assert report.notes == []
    with av.open(str(clips[2])) as file:
        assert file.streams.audio[0].layout.name == "stereo"


def test_one_process_fuses_a_video(clips, weights, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fuse", *map(str, clips[:2]), "-o", str(clips[2]), "--weights", str(weights)]) == 2
    assert "one process" in capfd.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_leaves_nothing(weights, tmp_path, how):
    visible = write(tmp_path / "vis.mp4", scene(250, height=240, width=320))
    infrared = write(tmp_path / "ir.mp4", scene(250, colour=False, height=240, width=320, seed=1))
    process = subprocess.Popen(
        command(visible, infrared, "-o", tmp_path / "out.mp4", "--weights", weights),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    process.send_signal(signal.SIGINT)  # as torchrun and a terminal may both: the cleaning up goes on
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ir.mp4", "vis.mp4"]
