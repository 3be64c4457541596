"""Fuses two videos, frame by frame, in constant memory.

Video stores luma and chroma apart, and the network fuses luma: that plane is replaced, and the chroma of the
visible video stays as it is, without a conversion to RGB and back.

Noise and a thermal camera's automatic gain make the whole image a little brighter or darker from one frame
to the next, which is seen as flicker. So the mean of the fused frames is averaged over time, within narrow
limits: what changes by more is taken to be the scene.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddrf_fast._files import replacing
from ddrf_fast.inference import Fuser

try:
    import av
except ImportError:  # who has no video needs none; fuse_video says what is missing
    av = None

Sync = Literal["timestamp", "frame"]
PathLike = str | os.PathLike[str]


class Container(NamedTuple):
    """How a file of some extension is written: its format, and the codec with its constant quality."""

    format: str
    codec: str
    crf: int


CONTAINERS = {
    ".mp4": Container("mp4", "libx264", 18),
    ".m4v": Container("mp4", "libx264", 18),
    ".mov": Container("mov", "libx264", 18),
    ".mkv": Container("matroska", "libx264", 18),
    ".webm": Container("webm", "libvpx-vp9", 24),
}
"""What a fused video may be, by extension; qualities that are hardly told from the source."""

SMOOTHING = 4
LIMIT = 0.02  # how much brighter or darker, in [0, 1], the smoothing may make a frame
GREY_TOLERANCE = (
    0.02  # mean distance from grey up to which the chroma of an infrared frame is taken for noise
)
HOLD = 0.9  # how long the last infrared frame goes on being the nearest, in frames
MISSING = 0.5  # seconds of a video that may lack at its end before that is told


@dataclass
class VideoReport:
    """What came of two videos.

    Attributes:
        frames: how many were fused.
        notes: what is worth knowing: audio that was left out, a video that ended before the other.
        problems: what was wrong with the inputs, and was passed over: damaged frames, a missing end.
    """

    frames: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def fuse_video(
    visible: PathLike,
    infrared: PathLike,
    output: PathLike,
    *,
    fuser: Fuser | None = None,
    sync: Sync = "timestamp",
    smoothing: int = SMOOTHING,
    resize: bool = False,
    codec: str | None = None,
    crf: int | None = None,
    progress: bool = False,
) -> VideoReport:
    """Fuses a visible and an infrared video.

    The result has the frames, time stamps, chroma and audio of the visible video, in 8 bit (yuv420p; a last
    column or row is repeated where a side is odd). It ends where the first of both ends. The file appears
    when it is finished, or not at all.

    Args:
        visible: a video file, in colour or grey.
        infrared: the same, grey, registered to it.
        output: ends in .mp4, .m4v, .mov, .mkv or .webm.
        fuser: the network; None: the weights that come with the package.
        sync: "timestamp": each visible frame is fused with the infrared frame nearest in time (from the first
            frame of each on), whatever the frame rates; "frame": the first with the first, and so on.
        smoothing: over how many frames the mean brightness is averaged (exponentially); it changes a frame by
            at most 0.02 of the range. 1: every frame by itself.
        resize: bring the infrared frames to the size of the visible ones.
        codec: FFmpeg's name of a video codec; None: libx264, or libvpx-vp9 for .webm.
        crf: the codec's constant quality, smaller is better; None: 18, or 24 for libvpx-vp9.
        progress: show a progress bar on stderr, where that is a terminal.

    Returns:
        How many frames were fused, and what there is to know about it.

    Raises:
        ValueError: PyAV is not installed, a video cannot be read or has no frame, sizes differ, the infrared
            one is in colour, the output is an input or of unknown format, a setting is none of those above or
            refused by the codec.
        OSError: the output cannot be written.
    """
    if av is None:
        raise ValueError("video needs PyAV: pip install 'ddrf-fast[video]'")
    output = Path(output)
    if output.suffix.lower() not in CONTAINERS:
        raise ValueError(f"{output} has no known video format; use one of {', '.join(CONTAINERS)}")
    if os.path.realpath(output) in (os.path.realpath(visible), os.path.realpath(infrared)):
        raise ValueError(f"{output} is an input and would be replaced; choose another output")
    if sync not in get_args(Sync):
        raise ValueError(f"sync must be 'timestamp' or 'frame', got {sync!r}")
    if smoothing < 1:
        raise ValueError(f"smoothing must be at least 1 frame, got {smoothing}")
    report = VideoReport()
    with ExitStack() as stack:
        first = stack.enter_context(_Source(Path(visible)))
        second = stack.enter_context(_Source(Path(infrared)))
        _check(first, second, resize, sync, report)
        fuser = fuser or Fuser()
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = stack.enter_context(replacing(output))
        writer = stack.enter_context(_Writer(temporary, output, first, codec, crf, report))
        steady = _Steady(fuser, smoothing)
        pairs = _pairs(first, second, sync, writer.copy_audio, report)
        bar = tqdm(
            pairs,
            desc="fuse",
            unit="frame",
            total=first.stream.frames or None,
            file=sys.stderr,
            disable=None if progress else True,
        )
        for seen, thermal in bar:
            seen, thermal = _planar(seen), _planar(thermal, seen if resize else thermal)
            if not report.frames:
                _refuse_colour(thermal, second.path)
            writer.write(seen, steady(_luma(seen), _luma(thermal)))
            report.frames += 1
        writer.finish()
        if not report.frames:
            raise ValueError(f"{first.path} and {second.path} have no frame in common")
    return report


class _Source:
    """A video that is decoded; counts what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.container = av.open(os.fspath(path))
        except av.FFmpegError as error:
            raise ValueError(f"{path}: cannot be read as a video ({error.strerror})") from error
        if not self.container.streams.video:
            self.container.close()
            raise ValueError(f"{path}: holds no video")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.audio = self.container.streams.audio[0] if self.container.streams.audio else None
        self.rate = self.stream.average_rate or self.stream.guessed_rate or 25

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self.container.close()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.stream.codec_context.width, self.stream.codec_context.height

    def frames(
        self, report: VideoReport, copy_audio: Callable[[Any], None] | None = None
    ) -> Iterator[tuple[float, Any]]:
        """The frames, each with its time in seconds after the first; audio packets go to `copy_audio`."""
        streams = [self.stream] if copy_audio is None or self.audio is None else [self.stream, self.audio]
        size, start, time, damaged, count = self.size, None, 0.0, 0, 0
        try:
            for packet in self.container.demux(streams):
                if packet.stream is not self.stream:
                    if copy_audio is not None and packet.dts is not None:
                        copy_audio(packet)
                    continue
                try:
                    decoded = packet.decode()
                except av.InvalidDataError:
                    damaged += 1
                    continue
                for frame in decoded:
                    damaged += frame.is_corrupt
                    if (frame.width, frame.height) != size:
                        raise ValueError(f"{self.path}: its size changes after {count} frames")
                    now = float(count / self.rate) if frame.time is None else frame.time
                    start = now if start is None else start
                    time, count = now - start, count + 1
                    yield time, frame
        except av.FFmpegError as error:
            report.problems.append(f"{self.path}: cannot be read after {time:.1f} s ({error.strerror})")
        if damaged:
            report.problems.append(f"{self.path}: {damaged} damaged frames")
        length = self._length()
        if time + MISSING < length:
            report.problems.append(f"{self.path}: ends after {time:.1f} of {length:.1f} s")

    def _length(self) -> float:
        """In seconds, as the file says it; 0 where it does not."""
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        return (self.container.duration or 0) / av.time_base


def _check(visible: _Source, infrared: _Source, resize: bool, sync: Sync, report: VideoReport) -> None:
    if visible.size != infrared.size and not resize:
        raise ValueError(
            "two videos need one size, but {} is {}x{} and {} is {}x{}: if they show the same, resize brings "
            "the infrared one to the size of the other".format(
                visible.path, *visible.size, infrared.path, *infrared.size
            )
        )
    if sync == "frame" and abs(visible.rate / infrared.rate - 1) > 0.01:
        report.notes.append(
            f"frames are paired by number, but the frame rates are {float(visible.rate):.4g} and "
            f"{float(infrared.rate):.4g}: --sync timestamp pairs them by time"
        )


def _pairs(
    visible: _Source,
    infrared: _Source,
    sync: Sync,
    copy_audio: Callable[[Any], None] | None,
    report: VideoReport,
) -> Iterator[tuple[Any, Any]]:
    """Frames that belong together, until one video ends."""
    seen, thermal = visible.frames(report, copy_audio), infrared.frames(report)
    if sync == "frame":
        for one, other in zip_longest(seen, thermal):
            if one is None or other is None:
                ended = visible if one is None else infrared
                report.notes.append(f"{ended.path} ended first, the rest of the other video was left out")
                return
            yield one[1], other[1]
        return
    current, following = next(thermal, None), next(thermal, None)
    for time, frame in seen:
        while current and following and abs(following[0] - time) < abs(current[0] - time):
            current, following = following, next(thermal, None)
        if current is None or (following is None and time > current[0] + HOLD / infrared.rate):
            report.notes.append(f"{infrared.path} ended first, the rest of the other video was left out")
            return
        yield frame, current[1]


def _planar(frame: Any, like: Any = None) -> Any:
    """The frame in yuv420p, of the size of another one if there is one."""
    width, height = (frame.width, frame.height) if like is None else (like.width, like.height)
    if (frame.format.name, frame.width, frame.height) == ("yuv420p", width, height):
        return frame
    return frame.reformat(width, height, "yuv420p", dst_color_range="MPEG", interpolation="BICUBIC")


def _refuse_colour(thermal: Any, path: Path) -> None:
    distance = max(np.abs(_plane(thermal, index).astype(np.float32) - 128).mean() for index in (1, 2)) / 255
    if distance > GREY_TOLERANCE:
        raise ValueError(
            f"{path} is in colour, but an infrared video must be grey: are visible and infrared swapped?"
        )


def _plane(frame: Any, index: int) -> NDArray[np.uint8]:
    plane = frame.planes[index]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]


def _levels(frame: Any) -> tuple[int, int]:
    """Black and white of the luma of a frame in yuv420p."""
    return (0, 255) if frame.color_range == av.video.reformatter.ColorRange.JPEG else (16, 235)


def _luma(frame: Any) -> Tensor:
    """Luma in [0, 1] of a frame in yuv420p, Tensor[1, 1, H, W]."""
    black, white = _levels(frame)
    return ((torch.from_numpy(_plane(frame, 0).astype(np.float32)) - black) / (white - black)).clamp(0, 1)[
        None, None
    ]


class _Steady:
    """The network, with the mean brightness averaged over time."""

    def __init__(self, fuser: Fuser, smoothing: int) -> None:
        self.fuser = fuser
        self.weight = 1 / smoothing
        self.level: Tensor | None = None

    def __call__(self, visible: Tensor, infrared: Tensor) -> Tensor:
        """Fuses Tensor[1, 1, H, W] in [0, 1]."""
        with torch.inference_mode():
            fused = self.fuser.network.fuse(visible, infrared)
            mean = fused.mean()
            level = mean if self.level is None else torch.lerp(self.level, mean, self.weight)
            self.level = level = mean + (level - mean).clamp(-LIMIT, LIMIT)
            return (fused + (level - mean)).clamp(0, 1).cpu()


class _Writer:
    """The fused video, as it is encoded; closed at the end of its block."""

    def __init__(
        self,
        path: Path,
        output: Path,
        source: _Source,
        codec: str | None,
        crf: int | None,
        report: VideoReport,
    ) -> None:
        container = CONTAINERS[output.suffix.lower()]
        if codec is None:
            crf = container.crf if crf is None else crf
        options = {} if crf is None else {"crf": str(crf)}
        if (codec or container.codec) == "libvpx-vp9":
            options |= {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
        self.file = av.open(os.fspath(path), "w", format=container.format)
        try:
            if av.Codec(codec or container.codec, "w").type != "video":
                raise ValueError("it is no video codec")
            self.stream = self.file.add_stream(codec or container.codec, rate=source.rate, options=options)
            context, given = self.stream.codec_context, source.stream.codec_context
            context.width, context.height = (side + side % 2 for side in source.size)
            context.pix_fmt = "yuv420p"
            context.time_base = source.stream.time_base
            if given.sample_aspect_ratio is not None:
                context.sample_aspect_ratio = given.sample_aspect_ratio
            self.audio = None
            if source.audio is not None:
                name = source.audio.codec_context.name
                if name in self.file.supported_codecs:
                    self.audio = self.file.add_stream_from_template(source.audio)
                else:
                    report.notes.append(f"{output.suffix} cannot hold the audio ({name}), it was left out")
        except (av.FFmpegError, ValueError) as error:
            self.file.close()
            raise ValueError(
                f"{output} cannot be encoded with {codec or container.codec}: {error}"
            ) from error

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    @property
    def copy_audio(self) -> Callable[[Any], None] | None:
        """Takes packets of the source's audio; None where there is none."""
        return None if self.audio is None else self._copy

    def _copy(self, packet: Any) -> None:
        packet.stream = self.audio
        self.file.mux(packet)

    def write(self, seen: Any, luma: Tensor) -> None:
        """A frame like `seen`, in yuv420p, with this luma, Tensor[1, 1, H, W] in [0, 1]."""
        black, white = _levels(seen)
        planes = [(luma[0, 0] * (white - black) + black).round().to(torch.uint8).numpy()]
        planes += [_plane(seen, 1), _plane(seen, 2)]
        height, width = planes[0].shape
        planes[0] = np.pad(planes[0], ((0, height % 2), (0, width % 2)), mode="edge")
        even = planes[0].shape[1]
        together = np.concatenate([plane.ravel() for plane in planes]).reshape(-1, even)
        frame = av.VideoFrame.from_ndarray(together, format="yuv420p")
        frame.pts, frame.time_base = seen.pts, seen.time_base
        frame.color_range, frame.colorspace = seen.color_range, seen.colorspace
        self.file.mux(self.stream.encode(frame))

    def finish(self) -> None:
        """Writes what the encoder holds back."""
        self.file.mux(self.stream.encode(None))
