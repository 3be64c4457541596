"""DDRF-Net on images whose features do not fit into memory: strip by strip, with the result of the whole.

What couples distant pixels is the attention of the dynamic layers, which needs the mean of each layer's input
over all of the image, and so the layers before it, everywhere. Independent tiles would have other attentions,
and feathering would only hide that. Here the layers come one after the other instead, each over all strips of
rows, with features kept in between, in memory or in a temporary file:

    head          writes x; its mean
    block, once   expand(x) for its mean alone, nothing is kept
    block, twice  x += project(expand(x)), in place; its mean
    tail          the restored image, and twice more where it is dark: its mean, what it was before
    fusion        merge, mix1, mix2 in the place of x; output for its mean; output and blend give the strips

So two maps of features are kept, one of each modality, where whole images need three and a half; where one
image is restored alone, one map is. The blocks' first convolutions and the last one are computed twice (a
third more operations). A convolution waits for the row below a strip and keeps the rows above, so that the
strips of its output lie one row higher than its input's; no row is computed twice, none is blended, and
results are those of the whole to rounding.
"""

import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.degradation.photometric import brighten, is_dark
from ddrf_fast.inference.layers import Branch, Code, Estimator, Fusion, Layer, NetworkLayers
from ddrf_fast.models.ddrfnet import BASE_DISTANCES, base_images, blend_bands, to_pixels
from ddrf_fast.models.estimator import details
from ddrf_fast.models.tone import light
from ddrf_fast.reference._common import unit_range

STRIP_BYTES = 16 << 20  # of features, in one strip
LEAST_ROWS = 8


class Strips:
    """A pair of images on its way through the network, or one image through its branch.

    Args:
        network: the layers.
        images: Tensor[1, 1, H, W], one for each branch: infrared and visible.
        codes: theirs.
        memory: bytes of features to keep in memory; more go to temporary files.
        rows: of a strip, at half resolution; None: as many as make 16 MiB of features.
    """

    def __init__(
        self,
        network: NetworkLayers,
        images: Sequence[Tensor],
        codes: Sequence[Code],
        memory: int,
        rows: int | None,
    ) -> None:
        self.network, self.images, self.codes = network, images, codes
        self.height, self.width = (-(-side // 2) for side in images[0].shape[2:])
        row_bytes = self.width * network.width * network.dtype.itemsize
        self.rows = rows or max(LEAST_ROWS, STRIP_BYTES // row_bytes)
        picture_bytes = 4 * self.width * network.picture_dtype.itemsize
        self._scratch = _Scratch()
        self.in_memory = self.height * len(images) * (row_bytes + picture_bytes) <= memory

    @torch.inference_mode()
    def run(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of each strip, and Tensor[1, N, rows, W]: the restored images, then the fused one."""
        network = self.network
        features = [self._store(network.width, network.dtype) for _ in network.branches]
        pictures = [self._store(4, network.picture_dtype) for _ in network.branches]
        means, codes = [], []
        for i, branch in enumerate(network.branches):
            given = self.codes[i]
            code = self._estimate(branch.estimator, i) if given.values is None else given.values
            tone = self._estimate_tone(branch, i) if given.tone is None else given.tone
            means.append(self._restore(branch, i, code, features[i], pictures[i]))
            codes.append(code)
            if bool(is_dark(tone)):
                self._undo_darkness(pictures[i], tone, given.mean)
        if network.fusion is None:
            strips: Iterator[Tensor] = (pictures[0].read(*span) for span in self._spans())
        else:
            strips = self._fuse(network.fusion, features, pictures, means, codes)
        first = 0
        height, width = self.images[0].shape[2:]
        for strip in strips:
            rows = F.pixel_shuffle(strip, 2)[:, :, : height - 2 * first, :width]
            yield 2 * first, rows
            first += strip.shape[2]

    def _estimate_tone(self, branch: Branch, index: int) -> Tensor:
        lights = _Mean()
        for (first, _), rows in zip(
            self._spans(), self._source(index, self.network.picture_dtype), strict=True
        ):
            lights.add(light(rows[:, :, first % 2 :]))  # every second row of the image
        return branch.tone(lights.value()).to(self.network.picture_dtype)

    def _estimate(self, estimator: Estimator, index: int) -> Tensor:
        precise, dtype, height = self.network.picture_dtype, self.network.dtype, self.height
        strips: Iterator[Tensor] = (details(rows).to(dtype) for rows in self._source(index, precise))
        for number, layer in enumerate(estimator.layers):
            attention = layer.static_attention(1)
            strips = self._convolved(layer, strips, attention, height=height, place=number)
            height = -(-height // layer.stride)
        energies = _Mean()
        for strip in strips:
            energies.add(strip.to(precise).square())
        return estimator.code(energies.value().to(precise)).to(dtype)

    def _restore(self, branch: Branch, index: int, code: Tensor, x: "_Store", picture: "_Store") -> Tensor:
        """Leaves the features in ``x`` and the restored image in ``picture``; the mean of the features."""
        precise, dtype = self.network.picture_dtype, self.network.dtype
        attention = branch.head.attention(self._mean(self._source(index, precise)), code)
        mean = self._write(x, self._convolved(branch.head, self._source(index, dtype), attention, code))
        for expand, project in branch.blocks:
            inner = functools.partial(self._expanded, expand, x, expand.attention(mean, code), code)
            change = self._convolved(project, inner(), project.attention(self._mean(inner())), place=1)
            mean = mean + self._write(x, change, add=True)
        for (first, last), rows in zip(self._spans(), self._source(index, precise), strict=True):
            picture.write(first, last, rows)
        tail = self._convolved(branch.tail, self._read(x), branch.tail.attention(mean))
        self._write(picture, tail, add=True)
        return mean

    def _undo_darkness(self, picture: "_Store", tone: Tensor, mean: Tensor | None) -> None:
        """Of the whole picture, in place; as :func:`~ddrf_fast.degradation.undo_darkness` does."""
        gamma, gain, contrast = tone.unbind(1)
        if mean is None:
            scene = _Mean()
            for span in self._spans():
                scene.add(brighten(picture.read(*span), gamma, gain))
            mean = scene.value().mean()
        mean = mean.to(tone)
        for span in self._spans():
            bright = brighten(picture.read(*span), gamma, gain)
            picture.write(*span, torch.lerp(mean, bright, 1 / contrast.view(-1, 1, 1, 1)))

    def _fuse(
        self,
        fusion: Fusion,
        features: "list[_Store]",
        pictures: "list[_Store]",
        means: list[Tensor],
        codes: list[Tensor],
    ) -> Iterator[Tensor]:
        """Strips of both images and the fused one, unshuffled, Tensor[1, 12, rows, W/2]."""
        image_mean = torch.cat([self._mean(self._read(picture)) for picture in pictures], dim=1)
        code = torch.cat(codes, dim=1)
        attention = fusion.merge.attention(torch.cat((*means, image_mean), dim=1), code)
        x = features[0]
        merged = self._convolved(fusion.merge, self._read(*features, *pictures), attention, code)
        mean = self._write(x, merged)
        for layer in (fusion.mix1, fusion.mix2):
            mean = self._write(x, self._convolved(layer, self._read(x), layer.attention(mean)))
        attention = fusion.output.attention(torch.cat((mean, image_mean), dim=1), code)

        def outputs() -> Iterator[Tensor]:
            return self._convolved(fusion.output, self._read(x, *pictures), attention, code)

        mean, caution = self._mean(outputs()), fusion.caution(code)
        reach = sum(BASE_DISTANCES) + 1

        def bands() -> Iterator[Tensor]:
            """Both images, and the fused one but for its base, which comes last."""
            first = 0
            for output in outputs():
                last = first + output.shape[2]
                # With the rows above and below, where there are some, that bases and details depend on.
                above, below = max(first - reach, 0), min(last + reach, self.height)
                images = torch.cat([picture.read(above, below) for picture in pictures], dim=1)
                bases = base_images(images)
                details = images - to_pixels(bases[:, 0])
                images, details, bases = (
                    x[..., first - above : last - above, :] for x in (images, details, bases)
                )
                parts = blend_bands(details, bases, output, mean, fusion.selectivity, caution)
                yield torch.cat((images, *parts), dim=1)
                first = last

        def with_base(x: Tensor) -> Tensor:
            return torch.cat((x[:, :8], x[:, 8:12] + to_pixels(x[:, 12:])), dim=1)

        # The base needs a row above and below, as a convolution does.
        return convolved(bands(), self.height, with_base, 1, functools.partial(self._scratch.join, "bands"))

    def _expanded(self, expand: Layer, x: "_Store", attention: Tensor, code: Tensor) -> Iterator[Tensor]:
        return self._convolved(expand, self._read(x), attention, code)

    def _convolved(
        self,
        layer: Layer,
        strips: Iterable[Tensor],
        attention: Tensor,
        code: Tensor | None = None,
        height: int | None = None,
        place: int = 0,
    ) -> Iterator[Tensor]:
        """The output of a layer; ``place`` is another for each of the layers that run in turns."""

        def convolve(x: Tensor) -> Tensor:
            size = (-(-side // layer.stride) for side in x.shape[2:])
            y = self._scratch(f"output {place}", (1, layer.channels, *size), x)
            layer.into(y, x, attention, code)
            return y

        join = functools.partial(self._scratch.join, f"input {place}")
        return convolved(strips, height or self.height, convolve, layer.stride, join)

    def _spans(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.height, self.rows):
            yield first, min(first + self.rows, self.height)

    def _source(self, index: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """The unshuffled image, Tensor[1, 4, rows, W/2]."""
        image = self.images[index]
        for first, last in self._spans():
            rows = image[:, :, 2 * first : 2 * last].to(self.network.device)
            rows = unit_range(rows, self.network.picture_dtype)
            missing = (0, 2 * self.width - rows.shape[3], 0, 2 * (last - first) - rows.shape[2])
            rows = F.pad(rows, missing, mode="replicate") if any(missing) else rows
            yield F.pixel_unshuffle(rows, 2).to(dtype)

    def _store(self, channels: int, dtype: torch.dtype) -> "_Store":
        store = _Memory if self.in_memory else _File
        return store((self.height, channels, self.width), dtype, self.network.device)

    def _read(self, *stores: "_Store") -> Iterator[Tensor]:
        """What they hold, one after the other along the channels."""
        for first, last in self._spans():
            parts = [store.read(first, last).to(self.network.dtype) for store in stores]
            yield self._scratch.join("channels", parts, dim=1) if len(parts) > 1 else parts[0]

    def _write(self, store: "_Store", strips: Iterable[Tensor], add: bool = False) -> Tensor:
        """Writes strips, or adds them to what is there; returns their mean.

        A store may be written while it is read for them: they lie above the rows that were read.
        """
        mean, first = _Mean(), 0
        for strip in strips:
            mean.add(strip)
            last = first + strip.shape[2]
            store.write(first, last, store.read(first, last).add_(strip) if add else strip)
            first = last
        return mean.value().to(self.network.dtype)

    def _mean(self, strips: Iterable[Tensor]) -> Tensor:
        mean = _Mean()
        for strip in strips:
            mean.add(strip)
        return mean.value().to(self.network.dtype)


def convolved(
    strips: Iterable[Tensor],
    height: int,
    convolve: Callable[[Tensor], Tensor],
    stride: int,
    join: Callable[[list[Tensor], int], Tensor],
) -> Iterator[Tensor]:
    """The convolution of an image that comes in strips of rows, in strips.

    Args:
        strips: Tensor[1, C, rows, W], from the top down. They are not referred to any longer when the next
            one is asked for.
        height: of all of them together.
        convolve: a 3x3 convolution of this stride with padding 1.
        stride: 1 or 2.
        join: ``torch.cat``, or the like.

    Yields:
        Rows of the output, as soon as all that they depend on is there; the memory is that of ``convolve``.
    """
    held, start, end, done = None, 0, 0, 0  # input rows [start, end) are held; `done` output rows are out
    for strip in strips:
        held = strip if held is None else join([held, strip], 2)
        end += strip.shape[2]
        ready = -(-height // stride) if end == height else (end - 2) // stride + 1
        if ready <= done:
            held = held.clone()
            continue
        # From the row above the first, whose own output is dropped: only the image has a border there.
        above = stride if done else 0
        last = end if end == height else stride * (ready - 1) + 2
        result = convolve(held[:, :, stride * done - above - start : last - start])
        result = result[:, :, above // stride :][:, :, : ready - done]
        done = ready
        held = held[:, :, stride * (done - 1) - start :].clone()
        start = stride * (done - 1)
        yield result


class _Scratch:
    """Memory of strips, by what it is for, that is used again.

    malloc would not do: aligned memory of a strip's size, freed and asked for again, gets a new place in
    glibc's heap, which grew to twice what is in use.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def __call__(self, purpose: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = math.prod(shape)
        memory = self._memory.get(purpose)
        if memory is None or len(memory) < size:
            memory = self._memory[purpose] = like.new_empty(size)
        return memory[:size].view(shape)

    def join(self, purpose: str, parts: list[Tensor], dim: int) -> Tensor:
        """``torch.cat``, there."""
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        return torch.cat(parts, dim, out=self(purpose, tuple(shape), parts[0]))


class _Mean:
    """The mean over all pixels of strips."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._pixels = 0

    def add(self, strip: Tensor) -> None:
        precise = torch.promote_types(strip.dtype, torch.float32)
        part = strip.sum(dim=(2, 3), dtype=precise).double()
        self._sum = part if self._sum is None else self._sum + part
        self._pixels += strip.shape[2] * strip.shape[3]

    def value(self) -> Tensor:
        assert self._sum is not None
        return self._sum / self._pixels


class _Memory:
    """Rows of an image [H, C, W], kept in memory; strips are Tensor[1, C, rows, W]."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty(shape, dtype=dtype, device=device)

    def read(self, first: int, last: int) -> Tensor:
        """These rows; they may be those of the store."""
        return self._rows[first:last].transpose(0, 1)[None]

    def write(self, first: int, last: int, strip: Tensor) -> None:
        self.read(first, last).copy_(strip)


class _File:
    """The same in a temporary file, which vanishes with it.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        height, *self._row = shape
        self._device = device
        self._row_bytes = self._row[0] * self._row[1] * dtype.itemsize
        needed, free = height * self._row_bytes, shutil.disk_usage(tempfile.gettempdir()).free
        if needed > free:
            raise OSError(
                f"features need {needed / 1e9:.1f} GB more in {tempfile.gettempdir()}, which has "
                f"{free / 1e9:.1f} GB left: set TMPDIR to a folder with more room"
            )
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the store)
        self._scratch, self._like = _Scratch(), torch.empty(0, dtype=dtype)

    def read(self, first: int, last: int) -> Tensor:
        """These rows, until the next ones are read."""
        rows = self._scratch("read", (last - first, *self._row), self._like)
        self._file.seek(first * self._row_bytes)
        self._file.readinto(memoryview(rows.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return rows.to(self._device).transpose(0, 1)[None]

    def write(self, first: int, last: int, strip: Tensor) -> None:
        rows = self._scratch("write", (last - first, *self._row), self._like).copy_(strip[0].transpose(0, 1))
        self._file.seek(first * self._row_bytes)
        self._file.write(memoryview(rows.view(torch.uint8).numpy()))  # type: ignore[arg-type]


_Store = _Memory | _File
