"""DDRF-Net for inference: the numbers of ``DDRFNet``, sooner and in less memory.

What is the same for every image is done once, when the engine is built: parameters in the dtype that the
network computes in, one form for dynamic and static layers. What is the same for all images of one size is
done once for that size: all features live in one block of memory, laid out so that every layer finds its
input in one piece. The fusion's input is the features of both branches and the restored images, one after
the other, and each branch writes its part there; the last layer's input is the same memory from the middle
on. So nothing is concatenated, a residual is added by the convolution that computes it, and a call allocates
next to nothing. On CUDA devices all launches of a size are recorded as one graph. A branch that restores an
image alone is the same with one part of features and none of the fusion.

Images that would take too much memory are computed strip by strip (:mod:`ddrf_fast.inference.strips`), with
the same result.
"""

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.degradation.photometric import is_dark, undo_darkness
from ddrf_fast.inference.layers import Branch, Code, Fusion, NetworkLayers
from ddrf_fast.inference.strips import Strips
from ddrf_fast.models import DDRFNet
from ddrf_fast.models.ddrfnet import (
    DDRFOutput,
    Modality,
    base_images,
    blend,
    check_image,
    check_images,
    pad_to_even,
    split_code,
)
from ddrf_fast.models.estimator import details, energy
from ddrf_fast.models.tone import light
from ddrf_fast.ops import _native
from ddrf_fast.ops._checks import INTEGER

MEMORY = 600 << 20  # bytes of features, unless less is free
MOST_GRAPHS = 8  # image sizes whose CUDA graphs are kept

Dtype: TypeAlias = torch.dtype | str
Tile: TypeAlias = int | str

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""What the network can compute in, by name."""

# Of infrared, visible and fused image; of one image alone _RESTORED.
_ALL, _RESTORED, _FUSED = slice(0, 3), slice(0, 1), slice(2, 3)


class Strip(NamedTuple):
    """Some rows of a result.

    Attributes:
        row: the first of them.
        output: the fused and the restored images, each Tensor[1, 1, rows, W].
    """

    row: int
    output: DDRFOutput


class Engine:
    """Runs a :class:`~ddrf_fast.models.DDRFNet`: restores and fuses pairs of images, or restores images.

    Calls from several threads take turns.

    Args:
        model: the network, on the device that it shall run on; its weights are not to change afterwards.
        dtype: what features and parameters are computed in: float32, bfloat16, float16 or float64, as a
            ``torch.dtype`` or its name; "auto": bfloat16 on CPUs with AVX-512 and on CUDA devices that have
            it, else float32. Images and what is added to them stay float32 (float64 with float64).
        tile: rows of the strips that large images are computed in, with the result of the whole but for
            rounding; 0: no strips; "auto": whole as long as an image's features fit into 600 MiB and into
            half of the memory that is free.

    Attributes:
        model: the network.
        dtype: what it computes in.
        device: where it runs.

    Raises:
        ValueError: ``dtype`` or ``tile`` is none of those.

    Example:
        >>> engine = Engine(DDRFNet().eval())
        >>> output = engine(torch.rand(1, 1, 37, 50), torch.rand(1, 1, 37, 50))
        >>> output.fused.shape
        torch.Size([1, 1, 37, 50])
        >>> engine.restore("infrared", torch.rand(1, 1, 37, 50)).shape
        torch.Size([1, 1, 37, 50])
    """

    def __init__(self, model: DDRFNet, dtype: Dtype = "auto", tile: Tile = "auto") -> None:
        if tile != "auto" and not (type(tile) is int and tile >= 0):
            raise ValueError(f"tile must be 'auto', 0 for no strips or their height in pixels, got {tile!r}")
        self.model = model
        self.device = model.code_basis.device
        self.dtype = resolve_dtype(dtype, self.device)
        self.tile = tile
        self._pair = NetworkLayers.of(model, self.dtype)
        self._branches: dict[Modality, NetworkLayers] = {
            "infrared": self._pair.alone(0),
            "visible": self._pair.alone(1),
        }
        self._lock = threading.Lock()
        self._space: _Space | None = None
        self._graphs: OrderedDict[tuple[object, ...], _Graph | Literal["seen", "refused"]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory and what belongs to this process."""
        return self.__dict__ | {"_lock": None, "_space": None, "_graphs": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})

    @torch.inference_mode()
    def __call__(
        self,
        visible: Tensor,
        infrared: Tensor,
        visible_code: Tensor | None = None,
        infrared_code: Tensor | None = None,
        visible_mean: Tensor | None = None,
    ) -> DDRFOutput:
        """Restores and fuses a batch of pairs, as :meth:`DDRFNet.forward` does.

        Args:
            visible: Tensor[B, 1, H, W], luma in [0, 1], on any device; any H, W >= 1.
            infrared: Tensor[B, 1, H, W] in [0, 1].
            visible_code: how ``visible`` was degraded, as ``DDRFNet.forward`` takes it: Tensor[B, 16 or 19]
                for the whole image, or a coarse map Tensor[B, 16 or 19, h, w]; None: estimated from the
                image.
            infrared_code: the same for ``infrared``.
            visible_mean: Tensor[B], about which dark ``visible`` get their contrast back, where they are
                channels of a whole (:func:`~ddrf_fast.degradation.undo_darkness`); None: their own means. Not
                with a map of codes.

        Returns:
            The fused and the two restored images, of the size and dtype of ``visible``, not clipped; on the
            engine's device, or where ``visible`` is if they were computed in strips. With a map of codes the
            network runs whole and in the model's own dtype.

        Raises:
            TypeError: images that are not floating.
            ValueError: images that are not [B, 1, H, W], differ in shape or are empty, or codes of another
                shape.
        """
        images = self._of_pair(visible, infrared, visible_code, infrared_code, visible_mean, _ALL)
        return DDRFOutput(fused=images[:, 2:], visible=images[:, 1:2], infrared=images[:, :1])

    @torch.inference_mode()
    def fuse(
        self,
        visible: Tensor,
        infrared: Tensor,
        visible_code: Tensor | None = None,
        infrared_code: Tensor | None = None,
        visible_mean: Tensor | None = None,
    ) -> Tensor:
        """The fused image of a call, Tensor[B, 1, H, W]; in strips, no other image is held as a whole."""
        return self._of_pair(visible, infrared, visible_code, infrared_code, visible_mean, _FUSED)

    @torch.inference_mode()
    def restore(self, modality: Modality, image: Tensor, code: Tensor | None = None) -> Tensor:
        """Restores images of one modality by its branch alone, as :meth:`DDRFNet.restore` does.

        Args:
            modality: "visible" or "infrared".
            image: Tensor[B, 1, H, W] in [0, 1], on any device; any H, W >= 1.
            code: as ``visible_code`` of a call.

        Returns:
            Tensor[B, 1, H, W], of the dtype of ``image``, where and how a call returns it.

        Raises:
            TypeError: an image that is not floating.
            ValueError: another modality, or an image or a code of another shape.
        """
        check_image(modality, image)
        if _is_map(code):
            return self.model.restore(modality, *self._for_model(image, code)).to(image.dtype)
        codes = [self._network_code("code", code, len(image))]
        return self._images(self._branches[modality], [image], codes, _RESTORED)

    def strips(
        self,
        visible: Tensor,
        infrared: Tensor,
        visible_code: Tensor | None = None,
        infrared_code: Tensor | None = None,
    ) -> Iterator[Strip]:
        """Restores and fuses a pair of any size in constant memory, a strip of rows after the other.

        The whole images are read several times before the first strip comes: the attention of every layer
        depends on all of the image.

        Args:
            visible: Tensor[1, 1, H, W], luma: floating in [0, 1], or uint8 or uint16, which are scaled to
                [0, 1]. It may lie in a file (``torch.from_numpy`` of a ``numpy.memmap``).
            infrared: Tensor[1, 1, H, W], likewise.
            visible_code: Tensor[1, 16 or 19], or None: estimated from the image.
            infrared_code: the same for ``infrared``.

        Yields:
            The strips from the top down: the first row, and its :class:`DDRFOutput` of Tensor[1, 1, rows, W]
            on the engine's device, floating and not clipped.

        Raises:
            TypeError: images of another dtype.
            ValueError: as for a call; a batch of more than one pair.
            OSError: there is no room for the features in the folder of temporary files (``TMPDIR``).

        Example:
            >>> engine = Engine(DDRFNet().eval(), tile=32)
            >>> image = torch.randint(0, 256, (1, 1, 70, 50), dtype=torch.uint8)
            >>> [(strip.row, tuple(strip.output.fused.shape)) for strip in engine.strips(image, image)]
            [(0, (1, 1, 28, 50)), (28, (1, 1, 32, 50)), (60, (1, 1, 10, 50))]
        """
        check_images(visible, infrared, INTEGER)
        if len(visible) != 1:
            raise ValueError(f"strips takes one pair, got a batch of {len(visible)}")
        codes = self._pair_codes(visible_code, infrared_code, 1)
        return (
            Strip(row, DDRFOutput(rows[:, 2:], rows[:, 1:2], rows[:, :1]))
            for row, rows in self._strips(self._pair, (infrared, visible), codes)
        )

    def in_strips(self, shape: torch.Size, modality: Modality | None = None) -> bool:
        """Whether images Tensor[B, 1, H, W] of this shape are computed strip by strip.

        Args:
            shape: of each image.
            modality: of images that are restored alone; None: of pairs.
        """
        return self._is_large(self._pair if modality is None else self._branches[modality], shape)

    def _is_large(self, network: NetworkLayers, shape: torch.Size) -> bool:
        if self.tile == "auto":
            space = self._space
            if space is not None and space.fits(network, shape):
                return False  # there is room: it is taken
            return _Space(network, shape, torch.device("meta")).bytes > _budget(self.device)
        return 0 < int(self.tile) < shape[2]

    def _of_pair(
        self,
        visible: Tensor,
        infrared: Tensor,
        visible_code: Tensor | None,
        infrared_code: Tensor | None,
        visible_mean: Tensor | None,
        keep: slice,
    ) -> Tensor:
        """Those to keep of the infrared, the visible and the fused image, Tensor[B, ., H, W]."""
        check_images(visible, infrared)
        if _is_map(visible_code) or _is_map(infrared_code):
            output = self.model(*self._for_model(visible, infrared, visible_code, infrared_code))
            images = torch.cat((output.infrared, output.visible, output.fused), dim=1)
            return images[:, keep].to(visible.dtype)
        codes = self._pair_codes(visible_code, infrared_code, len(visible))
        if visible_mean is not None:
            codes[1] = codes[1]._replace(mean=visible_mean.to(self.device))
        return self._images(self._pair, (infrared, visible), codes, keep)

    def _for_model(self, *tensors: Tensor | None) -> list[Any]:
        parameters = self.model.code_basis
        return [None if tensor is None else tensor.to(parameters) for tensor in tensors]

    def _pair_codes(
        self, visible_code: Tensor | None, infrared_code: Tensor | None, batch: int
    ) -> list[Code]:
        given = {"infrared_code": infrared_code, "visible_code": visible_code}
        return [self._network_code(name, code, batch) for name, code in given.items()]

    def _network_code(self, name: str, code: Tensor | None, batch: int) -> Code:
        if code is None:
            return Code()
        scale = self.model.code_scale
        values, tone = split_code(name, code.to(scale), batch, len(scale))
        return Code(None if values is None else (values * scale).to(self.dtype), tone)

    def _images(
        self, network: NetworkLayers, images: Sequence[Tensor], codes: Sequence[Code], keep: slice
    ) -> Tensor:
        """Those to keep of the restored images and the fused one, Tensor[B, ., H, W], whole or in strips."""
        last = images[-1]  # the visible one of a pair
        batch, _, height, width = last.shape
        if not self._is_large(network, last.shape):
            with self._lock:
                pictures = self._run(network, [image.to(self.device) for image in images], codes)
                # In memory of its own, before another thread has its turn.
                result = F.pixel_shuffle(pictures[:, 4 * keep.start : 4 * keep.stop], 2)
            return result[:, :, :height, :width].to(last.dtype)
        result = last.new_empty(batch, keep.stop - keep.start, height, width)
        for i in range(batch):
            one = slice(i, i + 1)
            given = [code.of(one) for code in codes]
            for row, rows in self._strips(network, [image[one] for image in images], given):
                result[one, :, row : row + rows.shape[2]] = rows[:, keep]
        return result

    def _strips(
        self, network: NetworkLayers, images: Sequence[Tensor], codes: Sequence[Code]
    ) -> Iterator[tuple[int, Tensor]]:
        rows = None if self.tile in ("auto", 0) else (int(self.tile) + 1) // 2
        return Strips(network, images, codes, _budget(self.device), rows).run()

    def _run(self, network: NetworkLayers, images: Sequence[Tensor], codes: Sequence[Code]) -> Tensor:
        """The restored images and the fused one, unshuffled, in memory that the next run overwrites."""
        shape = images[0].shape
        if self.device.type == "cuda":
            graph = self._graph(network, images, codes)
            if graph is not None:
                return graph.replay(images, codes)
        if self._space is None or not self._space.fits(network, shape):
            self._space = None  # first give back
            self._space = _Space(network, shape, self.device)
        return self._space.run(network, images, codes)

    def _graph(
        self, network: NetworkLayers, images: Sequence[Tensor], codes: Sequence[Code]
    ) -> "_Graph | None":
        """All launches for what is like these, recorded when it comes for the second time.

        None before that, and where the device has refused.
        """
        dtypes = tuple(image.dtype for image in images)
        key = (network, images[0].shape, dtypes, tuple(part is None for code in codes for part in code))
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = "seen"
        elif graph == "seen":
            graph = _Graph.record(network, images, codes) or "refused"
        self._graphs[key] = graph  # at the end: what has not come for longest goes first
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return graph if isinstance(graph, _Graph) else None


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype meant by ``dtype``, see :class:`Engine`.

    Raises:
        ValueError: it is none of those.

    Example:
        >>> resolve_dtype("float32", torch.device("cpu"))
        torch.float32
    """
    if dtype == "auto":
        half = False
        if device.type == "cuda":
            half = torch.cuda.get_device_capability(device) >= (8, 0)
        elif device.type == "cpu":
            # Half the bytes are worth a factor of 1.1 to 1.3; with AVX2 converting them costs more than that.
            half = _native.cpu_capability() in ("avx512", "avx512_bf16", "amx_bf16")
        return torch.bfloat16 if half else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return resolved


def _budget(device: torch.device) -> int:
    """Bytes that features may take."""
    free = None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        with contextlib.suppress(OSError, StopIteration):  # Linux tells it
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return MEMORY if free is None else min(MEMORY, free // 2)


def _is_map(code: Tensor | None) -> bool:
    return code is not None and code.dim() == 4


class _Space:
    """The memory of all features of a batch of one size, and the pass through it.

    ``pictures`` holds, unshuffled, the restored images and the fused one; ``joint`` the features of each
    branch and then the images, as the fusion takes them.
    """

    def __init__(self, network: NetworkLayers, shape: torch.Size, device: torch.device) -> None:
        self.shape, self.branches, self.width = shape, len(network.branches), network.width
        batch, _, height, width = shape
        size = ((height + 1) // 2, (width + 1) // 2)

        def empty(channels: int, size: tuple[int, int], dtype: torch.dtype = network.dtype) -> Tensor:
            return torch.empty(batch, channels, *size, dtype=dtype, device=device)

        images = self.branches + (network.fusion is not None)
        last = (network.branches[0].tail if network.fusion is None else network.fusion.output).channels
        self.pictures = empty(4 * images, size, network.picture_dtype)
        self.joint = empty(self.branches * (self.width + 4), size)
        self.work = empty(self.width, size)
        self.last = empty(last, size)
        self.estimated: list[Tensor] = []
        for layer in network.branches[0].estimator.layers:
            size = tuple(-(-side // layer.stride) for side in size)  # type: ignore[assignment]
            self.estimated.append(empty(layer.channels, size))

    @property
    def bytes(self) -> int:
        features = (self.pictures, self.joint, self.work, self.last, *self.estimated)
        return sum(tensor.nbytes for tensor in features)

    def fits(self, network: NetworkLayers, shape: torch.Size) -> bool:
        """Whether ``run`` takes these: either branch alone needs the same."""
        return self.shape == shape and self.branches == len(network.branches)

    def run(self, network: NetworkLayers, images: Sequence[Tensor], codes: Sequence[Code]) -> Tensor:
        """The restored images and the fused one, in the order of the branches; returns ``pictures``."""
        sources = self.pictures[:, : 4 * self.branches]
        inputs = self.joint[:, self.branches * self.width :]
        for i, image in enumerate(images):
            self._take(image, sources[:, 4 * i : 4 * i + 4])
        inputs.copy_(sources)
        means, used = [], []
        for i, (branch, given) in enumerate(zip(network.branches, codes, strict=True)):
            picture = sources[:, 4 * i : 4 * i + 4]
            code = self._estimate(branch, picture) if given.values is None else given.values
            tone = branch.tone(light(picture).mean(dim=(2, 3))) if given.tone is None else given.tone
            means.append(self._restore(branch, i, code))
            used.append(code)
            # Hardly ever dark. A CUDA device would have to be waited for to know.
            if picture.is_cuda or bool(is_dark(tone).any()):
                picture.copy_(undo_darkness(picture, tone, given.mean))
        if network.fusion is not None:
            inputs.copy_(sources)
            self._fuse(network.fusion, sources, means, used)
        return self.pictures

    def _take(self, image: Tensor, target: Tensor) -> None:
        """The unshuffled image Tensor[B, 4, H/2, W/2]."""
        if image.shape[2] % 2 or image.shape[3] % 2:
            image = pad_to_even(image)
        for j in range(4):
            target[:, j : j + 1] = image[:, :, j // 2 :: 2, j % 2 :: 2]

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).to(self.joint.dtype)

    def _estimate(self, branch: Branch, picture: Tensor) -> Tensor:
        x = details(picture).to(self.joint.dtype)
        for layer, y in zip(branch.estimator.layers, self.estimated, strict=True):
            layer.into(y, x, layer.static_attention(len(x)))
            x = y
        return branch.estimator.code(energy(x)).to(self.joint.dtype)

    def _restore(self, branch: Branch, index: int, code: Tensor) -> Tensor:
        """Leaves the features in ``joint`` and the restored image in ``pictures``; the features' mean."""
        width = self.width
        first = self.branches * width + 4 * index
        image, features = self.joint[:, first : first + 4], self.joint[:, width * index : width * (index + 1)]
        picture = self.pictures[:, 4 * index : 4 * index + 4]
        mean = branch.head.into(features, image, branch.head.attention(self._mean(picture), code), code)
        for expand, project in branch.blocks:
            inner = expand.into(self.work, features, expand.attention(mean, code), code)
            change = project.into(features, self.work, project.attention(inner), accumulate=True)
            mean = mean + change
        change = self.last[:, :4]
        branch.tail.into(change, features, branch.tail.attention(mean))
        picture.add_(change)
        return mean

    def _fuse(self, fusion: Fusion, sources: Tensor, means: list[Tensor], codes: list[Tensor]) -> None:
        """Leaves the fused image in ``pictures``."""
        width = self.width
        image_mean = self._mean(sources)
        work, mix = self.work, self.joint[:, :width]
        code = torch.cat(codes, dim=1)
        attention = fusion.merge.attention(torch.cat((*means, image_mean), dim=1), code)
        mean = fusion.merge.into(work, self.joint, attention, code)
        mean = fusion.mix1.into(mix, work, fusion.mix1.attention(mean))
        mean = fusion.mix2.into(self.joint[:, width : 2 * width], mix, fusion.mix2.attention(mean))
        attention = fusion.output.attention(torch.cat((mean, image_mean), dim=1), code)
        mean = fusion.output.into(self.last, self.joint[:, width:], attention, code)
        self.pictures[:, 8:] = blend(
            sources, base_images(sources), self.last, mean, fusion.selectivity, fusion.caution(code)
        )


class _Graph(NamedTuple):
    """All launches of a pass, recorded on a CUDA device, with the memory that they work on."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    pictures: Tensor
    space: _Space

    @classmethod
    def record(
        cls, network: NetworkLayers, images: Sequence[Tensor], codes: Sequence[Code]
    ) -> "_Graph | None":
        """None, and a warning, where the device refuses."""
        images = [image.clone() for image in images]
        codes = [Code(*(None if part is None else part.clone() for part in code)) for code in codes]
        try:
            space = _Space(network, images[0].shape, network.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(network.device):
                # Before, on a stream of its own, what the first launches compile and allocate.
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    space.run(network, images, codes)
                torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.graph(graph):
                    pictures = space.run(network, images, codes)
        except RuntimeError as error:
            height, width = images[0].shape[2:]
            warnings.warn(
                f"no CUDA graph could be recorded for images of {width}x{height}, which take longer without: "
                f"{error}",
                stacklevel=2,
            )
            return None
        return cls(graph, _tensors(images, codes), pictures, space)

    def replay(self, images: Sequence[Tensor], codes: Sequence[Code]) -> Tensor:
        for own, given in zip(self.inputs, _tensors(images, codes), strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.pictures


def _tensors(images: Sequence[Tensor], codes: Sequence[Code]) -> tuple[Tensor, ...]:
    """All that a pass is given."""
    return (*images, *(part for code in codes for part in code if part is not None))
