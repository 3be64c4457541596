"""Fuses two videos, frame by frame, in constant memory: frames are read ahead in threads, a few at a time.

Video stores luma and chroma apart, and the network fuses luma: that plane is replaced, and the chroma of the
visible video stays as it is, without a conversion to RGB and back (unless the fuser's colour is "rgb").

Noise and a thermal camera's automatic gain make the whole image a little brighter or darker from one frame
to the next, which is seen as flicker. So the mean of the fused frames is averaged over time, within narrow
limits: what changes by more is taken to be the scene. A thermal range of the frames' own values would jump
with what enters the scene; it is averaged, too, without a limit.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddrf_fast._files import replacing
from ddrf_fast._frames import Luma, Orientation, Template, av, check_depth, is_colour, planar, rgb
from ddrf_fast.data.thermal import SteadyRange, ThermalRange
from ddrf_fast.inference import Fuser
from ddrf_fast.inference.network import PathLike
from ddrf_fast.inference.session import Request
from ddrf_fast.inference.streaming import ahead, grouped
from ddrf_fast.ops._checks import integer

Sync = Literal["timestamp", "frame"]


class Container(NamedTuple):
    """How a file of some extension is written: its format, and the codec with its constant quality."""

    format: str
    codec: str
    crf: int


_LAYOUTS = {"1 channels": "mono", "2 channels": "stereo"}
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
HOLD = 0.9  # how long the last infrared frame goes on being the nearest, in frames
MISSING = 0.5  # seconds of a video that may lack at its end before that is told


@dataclass
class VideoReport:
    """What came of two videos.

    Attributes:
        frames: how many were fused.
        notes: what is worth knowing: audio that was left out, a video that ended before the other.
        problems: what was wrong with the inputs, and was passed over: damaged frames, a missing end.
        mapped: the lowest and highest infrared values that became black and white, where the fuser's thermal
            range is another than "full".
    """

    frames: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    mapped: tuple[float, float] | None = None


def fuse_video(
    visible: PathLike,
    infrared: PathLike,
    output: PathLike,
    *,
    fuser: Fuser | None = None,
    sync: Sync = "timestamp",
    smoothing: int = SMOOTHING,
    batch_size: int = 1,
    workers: int = 2,
    codec: str | None = None,
    crf: int | None = None,
    progress: bool = False,
) -> VideoReport:
    """Fuses a visible and an infrared video.

    The result has the frames, time stamps, chroma and audio of the visible video, in 8 bit (yuv420p; a last
    column or row is repeated where a side is odd). It ends where the first of both ends. The file appears
    when it is finished, or not at all. Videos that are to be shown turned, as phones store them, are turned.

    Args:
        visible: a video file, in colour or grey; of up to 16 bits, as the network sees it.
        infrared: the same, grey. A thermal range is applied to its luma as it is stored, such as 0 to 65535
            in gray16le, or 16 (black) to 235 in 8-bit yuv420p; "minmax" and percentiles are those of the
            frames, averaged as `smoothing` says.
        output: ends in .mp4, .m4v, .mov, .mkv or .webm.
        fuser: the network, and its settings: colour, thermal range, resizing, homography and the limit of
            pixels hold for every frame; None: the defaults, with the weights that come with the package.
        sync: "timestamp": each visible frame is fused with the infrared frame nearest in time (from the first
            frame of each on), whatever the frame rates; "frame": the first with the first, and so on.
        smoothing: over how many frames two things are averaged (exponentially, a new frame counts for
            1/smoothing): the mean brightness, which changes a frame by at most 0.02 of the range; and the
            grey of each value by a thermal range of "minmax" or percentiles, as thermal cameras damp their
            automatic gain. 1: every frame by itself.
        batch_size: how many frames go through the network together.
        workers: threads that prepare frames, beside the one that decodes.
        codec: FFmpeg's name of a video codec; None: libx264, or libvpx-vp9 for .webm.
        crf: the codec's constant quality, smaller is better; None: 18, or 24 for libvpx-vp9.
        progress: show a progress bar on stderr, where that is a terminal.

    Returns:
        How many frames were fused, and what there is to know about it.

    Raises:
        TypeError: `smoothing`, `batch_size` or `workers` is no int.
        ValueError: PyAV is not installed, a video cannot be read, has no frame, too many pixels, or is to be
            shown turned by another angle than quarter turns; sizes differ, the infrared one is in colour, the
            output is an input or of unknown format, a setting is none of those above or refused by the codec.
        OSError: the output cannot be written.

    Example:
        >>> import cv2, numpy as np
        >>> paths = [getfixture("tmp_path") / name for name in ("visible.mp4", "infrared.mp4", "fused.mp4")]
        >>> for path in paths[:2]:
        ...     video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (64, 48))
        ...     for grey in (80, 90, 100):
        ...         _ = video.write(np.full((48, 64, 3), grey, np.uint8))
        ...     video.release()
        >>> fuse_video(*paths).frames
        3
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
    integer("smoothing", smoothing, 1)
    integer("batch_size", batch_size, 1)
    integer("workers", workers, 1)
    report = VideoReport()
    fuser = fuser or Fuser()
    with ExitStack() as stack:
        first = stack.enter_context(_Source(Path(visible), fuser.max_pixels))
        second = stack.enter_context(_Source(Path(infrared), fuser.max_pixels))
        _check(first, second, fuser, sync, report)
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = stack.enter_context(replacing(output))
        shape = second if fuser.resize == "infrared" else first
        writer = stack.enter_context(_Writer(temporary, output, first, shape, codec, crf, report))
        steady = _Steady(smoothing)

        def prepare(item: tuple[Any, Luma, ThermalRange]) -> tuple[Request, Template]:
            seen, luma, thermal_range = item
            request = fuser.prepare(
                _visible(seen, first.turn, fuser),
                _infrared(luma, second.turn, fuser),
                thermal_range=thermal_range,
            )
            height, width = request.planes.shape[2:]
            return request, Template.of(seen, width, height, first.turn, fuser.color == "gray")

        pairs = _ranged(
            _pairs(first, second, sync, writer.copy_audio, report),
            SteadyRange(fuser.thermal_range, smoothing),
        )
        prepared = stack.enter_context(closing(ahead(pairs, prepare, workers, workers + batch_size)))
        bar = tqdm(
            desc="fuse",
            unit="frame",
            total=first.stream.frames or None,
            file=sys.stderr,
            disable=None if progress else True,
        )
        stack.enter_context(closing(bar))
        for group in grouped(prepared, batch_size, key=lambda item: item[0].key):
            outputs = fuser.compute([request for request, _ in group])
            for (request, template), fused in zip(group, outputs, strict=True):
                _note(report, request, second)
                writer.write(template.fused(steady(fused)))
                report.frames += 1
            bar.update(len(group))
        writer.finish()
        if not report.frames:
            raise ValueError(f"{first.path} and {second.path} have no frame in common")
    return report


def _visible(frame: Any, turn: Orientation, fuser: Fuser) -> NDArray[Any]:
    return turn(rgb(frame) if fuser.color == "rgb" else Luma.of(frame).unit())


def _infrared(luma: Luma, turn: Orientation, fuser: Fuser) -> NDArray[Any]:
    as_stored = luma.whole or fuser.thermal_range.kind != "full"
    return turn(luma.values if as_stored else luma.unit())


def _note(report: VideoReport, request: Request, infrared: "_Source") -> None:
    """What there is to tell of a frame's thermal values."""
    if request.mapped:
        low, high = report.mapped or request.mapped
        report.mapped = min(low, request.mapped[0]), max(high, request.mapped[1])
    if request.narrow and not report.frames:
        low, high = request.narrow
        report.notes.append(
            f"{infrared.path} has 16 bit, but its first frame values from {low} to {high} only, and it was "
            "taken as it is; the thermal range LOW,HIGH or percentile spreads them"
        )


class _Source:
    """A video that is decoded; counts what is wrong with it."""

    def __init__(self, path: Path, max_pixels: int) -> None:
        self.path = path
        self.first = self._first()
        try:
            check_depth(self.first)
            self.turn = Orientation.of(self.first)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.size = width, height = self.turn.size(self.first.width, self.first.height)
        if width * height > max_pixels:
            raise ValueError(
                f"{path}: its frames have {width}x{height} pixels, more than the {max_pixels} allowed "
                "(max_pixels)"
            )
        self.container = av.open(f"file:{os.fspath(path)}")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.audio = self.container.streams.audio[0] if self.container.streams.audio else None
        # Of a raw stream, whose frames have no times, the average is FFmpeg's default.
        average = None if self.first.pts is None else self.stream.average_rate
        self.rate = average or self.stream.guessed_rate or 25
        self.step = max(1, round(1 / (self.rate * self.stream.time_base)))

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self.container.close()

    def _first(self) -> Any:
        """The first frame, which tells what the file's header may not."""
        try:
            with av.open(f"file:{os.fspath(self.path)}") as container:  # a name with a colon is no URL
                if not container.streams.video:
                    raise ValueError(f"{self.path}: holds no video")
                for packet in container.demux(container.streams.video[0]):
                    with suppress(av.InvalidDataError):
                        for frame in packet.decode():
                            return frame
        except av.FFmpegError as error:
            raise ValueError(f"{self.path}: cannot be read as a video ({error.strerror})") from error
        raise ValueError(f"{self.path}: holds no frame that can be read")

    @property
    def aspect(self) -> Any:
        """Of a pixel, turned; None where it is not told."""
        aspect = self.stream.codec_context.sample_aspect_ratio
        return 1 / aspect if aspect and self.turn.transposed else aspect

    def frames(
        self, report: VideoReport, copy_audio: Callable[[Any], None] | None = None
    ) -> Iterator[tuple[float, Any]]:
        """The frames, each with its time in seconds after the first; audio packets go to `copy_audio`.

        The times, and the frames' own time stamps, increase.
        """
        streams = [self.stream] if copy_audio is None or self.audio is None else [self.stream, self.audio]
        size, time, damaged, count = (self.first.width, self.first.height), 0.0, 0, 0
        start = last = None
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
                    frame.pts = last = self._time_stamp(frame, last)
                    start = last if start is None else start
                    time, count = float((last - start) * self.stream.time_base), count + 1
                    yield time, frame
        except av.FFmpegError as error:
            report.problems.append(f"{self.path}: cannot be read after {time:.1f} s ({error.strerror})")
        if damaged:
            report.problems.append(f"{self.path}: {damaged} damaged frames")
        length = self._length()
        if time + MISSING < length:
            report.problems.append(f"{self.path}: ends after {time:.1f} of {length:.1f} s")

    def _time_stamp(self, frame: Any, last: int | None) -> int:
        """Of a frame after one with the time stamp `last`, in units of the stream's time base."""
        # AVI tells no times to show frames at, and what FFmpeg makes of that is wrong for B-frames. A frame's
        # dts is that of the packet with which it came out of the decoder, and those are in order.
        by_packet = self.container.format.name == "avi" or frame.pts is None
        stamp: int | None = frame.dts if by_packet else frame.pts
        if last is None:
            return stamp or 0
        # Raw streams tell no times, frames that were left in the decoder no dts, and where recordings were
        # joined the time may start anew.
        if stamp is None or stamp < last - self.step:
            return last + self.step
        # Frames of one time stamp would stop the pairing, and muxers refuse them.
        return max(stamp, last + 1)

    def _length(self) -> float:
        """In seconds, as the file says it; 0 where it does not."""
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        return (self.container.duration or 0) / av.time_base


def _check(visible: _Source, infrared: _Source, fuser: Fuser, sync: Sync, report: VideoReport) -> None:
    if visible.size != infrared.size and fuser.resize is None and fuser.homography is None:
        raise ValueError(
            "two videos need one size, but {} is {}x{} and {} is {}x{}: if they show the same, resize "
            "visible or infrared brings the other one to that size; a homography aligns them".format(
                visible.path, *visible.size, infrared.path, *infrared.size
            )
        )
    if is_colour(infrared.first):
        raise ValueError(
            f"{infrared.path} is in colour, but an infrared video must be grey: are visible and infrared "
            "swapped?"
        )
    if sync == "frame" and abs(visible.rate / infrared.rate - 1) > 0.01:
        report.notes.append(
            f"frames are paired by number, but the frame rates are {float(visible.rate):.4g} and "
            f"{float(infrared.rate):.4g}: the sync 'timestamp' pairs them by time"
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


def _ranged(
    pairs: Iterator[tuple[Any, Any]], steady: SteadyRange
) -> Iterator[tuple[Any, Luma, ThermalRange]]:
    """The pairs, each with its thermal range: drawn in their order, while threads prepare them in any."""
    for seen, thermal in pairs:
        luma = Luma.of(thermal)
        yield seen, luma, steady(luma.values)


class _Steady:
    """Fused frames, with the mean brightness averaged over time."""

    def __init__(self, smoothing: int) -> None:
        self.weight = 1 / smoothing
        self.level: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, fused: Tensor) -> Tensor:
        """Tensor[N, 1, H, W], clipped to [0, 1] and on the CPU."""
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
        shape: _Source,
        codec: str | None,
        crf: int | None,
        report: VideoReport,
    ) -> None:
        self.packets: SimpleQueue[Any] = SimpleQueue()
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
            context = self.stream.codec_context
            context.width, context.height = (side + side % 2 for side in shape.size)
            context.pix_fmt = "yuv420p"
            context.time_base = source.stream.time_base
            seen = planar(source.first, source.first.width, source.first.height)
            context.color_range, context.colorspace = seen.color_range, seen.colorspace
            context.color_primaries, context.color_trc = seen.color_primaries, seen.color_trc
            if shape.aspect is not None:
                context.sample_aspect_ratio = shape.aspect
            self.audio = None
            if source.audio is not None:
                name = source.audio.codec_context.name
                if name in self.file.supported_codecs:
                    self.audio = self.file.add_stream_from_template(source.audio)
                    # An AVI tells but the number of channels, which not all containers take.
                    layout = _LAYOUTS.get(source.audio.codec_context.layout.name)
                    if layout is not None:
                        self.audio.codec_context.layout = layout
                else:
                    report.notes.append(f"{output.suffix} cannot hold the audio ({name}), it was left out")
            self.file.start_encoding()
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
        """Takes packets of the source's audio, in any thread; None where there is none."""
        return None if self.audio is None else self.packets.put

    def _copy(self) -> None:
        while not self.packets.empty():
            packet = self.packets.get()
            packet.stream = self.audio
            self.file.mux(packet)

    def write(self, frame: Any) -> None:
        """The next frame, in yuv420p."""
        self._copy()
        self.file.mux(self.stream.encode(frame))

    def finish(self) -> None:
        """Writes the last audio, and what the encoder holds back."""
        self._copy()
        self.file.mux(self.stream.encode(None))
