"""DDRF-Net for inference: the numbers of ``DDRFNet.forward``, sooner and in less memory.

What is the same for every image is done once, when the engine is built: parameters in the dtype that the
network computes in, one form for dynamic and static layers. What is the same for all images of one size is
done once for that size: all features live in one block of memory, laid out so that every layer finds its
input in one piece. The fusion's input is the features of both branches and the restored images, one after
the other, and each branch writes its part there; the last layer's input is the same memory from the middle
on. So nothing is concatenated, a residual is added by the convolution that computes it, and a call allocates
next to nothing. On CUDA devices all launches of a size are recorded as one graph.

Images that would take too much memory are computed strip by strip (:mod:`ddrf_fast.inference.strips`), with
the same result.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddrf_fast.inference.layers import Branch, NetworkLayers
from ddrf_fast.inference.strips import Strip, Strips
from ddrf_fast.models import DDRFNet
from ddrf_fast.models.ddrfnet import DDRFOutput, blend, check_images, low_pass, pad_to_even
from ddrf_fast.models.estimator import details, energy

MEMORY = 600 << 20  # bytes of features, unless less is free
MOST_GRAPHS = 8  # image sizes whose CUDA graphs are kept

Tile = int | str


class Engine:
    """Runs a :class:`~ddrf_fast.models.DDRFNet`: restores and fuses pairs of images.

    Calls from several threads take turns.

    Args:
        model: the network, on the device that it shall run on; its weights are not to change afterwards.
        dtype: what features and parameters are computed in: "auto" (float32 on CPUs, bfloat16 on CUDA
            devices that have it), or a floating dtype. Images and what is added to them stay float32 (float64
            with float64).
        tile: whether an image is computed whole or in strips of rows, with equal results: "auto" (whole as
            long as its features fit into 600 MiB and into half of the memory that is free), "never", or the
            height of a strip in pixels.

    Attributes:
        model: the network.
        dtype: what it computes in.
        device: where it runs.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: another ``dtype`` or ``tile``.

    Example:
        >>> engine = Engine(DDRFNet().eval())
        >>> output = engine(torch.rand(1, 1, 37, 50), torch.rand(1, 1, 37, 50))
        >>> output.fused.shape
        torch.Size([1, 1, 37, 50])
    """

    def __init__(
        self, model: DDRFNet, dtype: torch.dtype | Literal["auto"] = "auto", tile: Tile = "auto"
    ) -> None:
        if tile not in ("auto", "never") and not (type(tile) is int and tile > 0):
            raise ValueError(f"tile must be 'auto', 'never' or a height in pixels, got {tile!r}")
        self.model = model
        self.device = model.code_basis.device
        self.dtype = resolve_dtype(dtype, self.device)
        self.tile = tile
        self._network = NetworkLayers.of(model, self.dtype)
        self._lock = threading.Lock()
        self._space: _Space | None = None
        self._graphs: OrderedDict[tuple[object, ...], _Graph | None] = OrderedDict()

    @torch.inference_mode()
    def __call__(
        self,
        visible: Tensor,
        infrared: Tensor,
        visible_code: Tensor | None = None,
        infrared_code: Tensor | None = None,
    ) -> DDRFOutput:
        """Restores and fuses a batch of pairs, as :meth:`DDRFNet.forward` does.

        Args:
            visible: Tensor[B, 1, H, W], luma in [0, 1], on any device; any H, W >= 1.
            infrared: Tensor[B, 1, H, W] in [0, 1].
            visible_code: how ``visible`` was degraded: Tensor[B, 16] for the whole image, or a coarse map
                Tensor[B, 16, h, w]; None: estimated from the image.
            infrared_code: the same for ``infrared``.

        Returns:
            The fused and the two restored images, of the size and dtype of ``visible``, on the engine's
            device, not clipped. With a map of codes the network runs whole and in the model's own dtype.

        Raises:
            ValueError: images that are not [B, 1, H, W], differ in shape or are empty, or codes of another
                shape.
        """
        check_images(visible, infrared)
        dtype = visible.dtype
        visible, infrared = (image.to(self.device) for image in (visible, infrared))
        if any(code is not None and code.dim() == 4 for code in (visible_code, infrared_code)):
            parameters = self.model.code_basis.dtype
            maps = [c if c is None else c.to(self.device) for c in (visible_code, infrared_code)]
            output = self.model(visible.to(parameters), infrared.to(parameters), *maps)
            return DDRFOutput(*(image.to(dtype) for image in output))
        if self.in_strips(visible.shape):
            pairs = range(len(visible))
            given = [
                [None if c is None else c[i : i + 1] for c in (visible_code, infrared_code)] for i in pairs
            ]
            result = DDRFOutput(*(torch.empty_like(visible) for _ in range(3)))
            for i in pairs:
                for strip in self.strips(visible[i : i + 1], infrared[i : i + 1], *given[i]):
                    for whole, rows in zip(result, strip.output, strict=True):
                        whole[i : i + 1, :, strip.row : strip.row + rows.shape[2]] = rows
            return result
        codes = [
            self._network_code(name, code, len(visible))
            for name, code in (("infrared_code", infrared_code), ("visible_code", visible_code))
        ]
        height, width = visible.shape[2:]
        with self._lock:
            images = self._run(infrared, visible, *codes)
        images = images[:, :, :height, :width].to(dtype)
        return DDRFOutput(fused=images[:, 2:], visible=images[:, 1:2], infrared=images[:, :1])

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
            visible_code: Tensor[1, 16], or None: estimated from the image.
            infrared_code: the same for ``infrared``.

        Yields:
            The strips from the top down: the first row, and its :class:`DDRFOutput` of Tensor[1, 1, rows, W]
            on the engine's device, floating and not clipped.

        Raises:
            ValueError: as for a call; a batch of more than one pair.
            OSError: there is no room for the features in the folder of temporary files (``TMPDIR``).

        Example:
            >>> engine = Engine(DDRFNet().eval(), tile=32)
            >>> image = torch.randint(0, 256, (1, 1, 70, 50), dtype=torch.uint8)
            >>> [(strip.row, tuple(strip.output.fused.shape)) for strip in engine.strips(image, image)]
            [(0, (1, 1, 30, 50)), (30, (1, 1, 32, 50)), (62, (1, 1, 8, 50))]
        """
        check_images(visible, infrared)
        if len(visible) != 1:
            raise ValueError(f"strips takes one pair, got a batch of {len(visible)}")
        codes = [
            self._network_code(name, code, 1)
            for name, code in (("infrared_code", infrared_code), ("visible_code", visible_code))
        ]
        rows = None if self.tile in ("auto", "never") else (int(self.tile) + 1) // 2
        strips = Strips(self._network, (infrared, visible), (codes[0], codes[1]), _budget(self.device), rows)
        return strips.run()

    def _network_code(self, name: str, code: Tensor | None, batch: int) -> Tensor | None:
        """A code in the network's units."""
        if code is None:
            return None
        channels = self.model.config.code_channels
        if code.shape != (batch, channels):
            raise ValueError(f"{name} must be [{batch}, {channels}], got {list(code.shape)}")
        return (code.to(self.model.code_scale) * self.model.code_scale).to(self.dtype)

    def in_strips(self, shape: torch.Size) -> bool:
        """Whether images Tensor[B, 1, H, W] of this shape are computed strip by strip."""
        if self.tile == "auto":
            return _Space.bytes_of(self._network, shape) > _budget(self.device)
        return self.tile != "never" and int(self.tile) < shape[2]

    def _run(
        self, infrared: Tensor, visible: Tensor, infrared_code: Tensor | None, visible_code: Tensor | None
    ) -> Tensor:
        """Tensor[B, 3, H, W]: infrared, visible and fused; H and W even."""
        inputs = infrared, visible, infrared_code, visible_code
        if self.device.type == "cuda":
            # Those of a size are recorded when it comes for the second time.
            key = (visible.shape, infrared.dtype, visible.dtype, infrared_code is None, visible_code is None)
            if key in self._graphs:
                self._graphs.move_to_end(key)
                graph = self._graphs[key] = self._graphs[key] or _Graph.record(self._network, inputs)
                if graph is not None:
                    return graph.replay(inputs)
            else:
                self._graphs[key] = None
                if len(self._graphs) > MOST_GRAPHS:
                    self._graphs.popitem(last=False)
        if self._space is None or self._space.shape != visible.shape:
            self._space = None  # first give back
            self._space = _Space(self._network, visible.shape)
        return self._space.run(*inputs)


def resolve_dtype(dtype: torch.dtype | Literal["auto"], device: torch.device) -> torch.dtype:
    """The dtype meant by ``dtype``, see :class:`Engine`.

    Raises:
        TypeError: a dtype that is not floating.

    Example:
        >>> resolve_dtype("auto", torch.device("cpu"))
        torch.float32
    """
    if dtype == "auto":
        half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if half else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be 'auto' or a floating torch.dtype, got {dtype!r}")
    return dtype


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


class _Space:
    """The memory of all features of a batch of one size, and the pass through it.

    ``pictures`` holds, unshuffled, infrared, visible and fused image; ``joint`` the infrared features, the
    visible features and both images, as the fusion takes them.
    """

    def __init__(self, network: NetworkLayers, shape: torch.Size) -> None:
        self.network, self.shape = network, shape
        batch, _, height, width = shape
        self.size = size = ((height + 1) // 2, (width + 1) // 2)

        def empty(channels: int, size: tuple[int, int], dtype: torch.dtype = network.dtype) -> Tensor:
            return torch.empty(batch, channels, *size, dtype=dtype, device=network.device)

        self.pictures = empty(12, size, network.picture_dtype)
        self.joint = empty(2 * network.width + 8, size)
        self.work = empty(network.width, size)
        self.last = empty(network.output.channels, size)
        self.estimated: list[Tensor] = []
        for layer in network.branches[0].estimator.layers:
            size = tuple(-(-side // layer.stride) for side in size)  # type: ignore[assignment]
            self.estimated.append(empty(layer.channels, size))

    @staticmethod
    def bytes_of(network: NetworkLayers, shape: torch.Size) -> int:
        pixels = shape[0] * ((shape[2] + 1) // 2) * ((shape[3] + 1) // 2)
        element, picture = (dtype.itemsize for dtype in (network.dtype, network.picture_dtype))
        estimator, side = 0.0, 1
        for layer in network.branches[0].estimator.layers:
            side *= layer.stride
            estimator += layer.channels / side**2
        features = 3 * network.width + 8 + network.output.channels + int(estimator)
        return pixels * (features * element + 12 * picture)

    def run(
        self, infrared: Tensor, visible: Tensor, infrared_code: Tensor | None, visible_code: Tensor | None
    ) -> Tensor:
        """Tensor[B, 3, H, W]: infrared, visible and fused; not in the memory of this space."""
        network, width = self.network, self.network.width
        sources, images = self.pictures[:, :8], self.joint[:, 2 * width :]
        for i, image in enumerate((infrared, visible)):
            self._take(image, self.pictures[:, 4 * i : 4 * i + 4])
        images.copy_(sources)
        means, codes = [], []
        for i, given in enumerate((infrared_code, visible_code)):
            branch = network.branches[i]
            code = self._estimate(branch, sources[:, 4 * i : 4 * i + 4]) if given is None else given
            means.append(self._restore(branch, i, code))
            codes.append(code)
        images.copy_(sources)
        image_mean = self._mean(sources)
        work, mix = self.work, self.joint[:, :width]
        code = torch.cat(codes, dim=1)
        attention = network.merge.attention(torch.cat((*means, image_mean), dim=1), code)
        mean = network.merge.into(work, self.joint, attention, code)
        mean = network.mix1.into(mix, work, network.mix1.attention(mean))
        mean = network.mix2.into(self.joint[:, width : 2 * width], mix, network.mix2.attention(mean))
        attention = network.output.attention(torch.cat((mean, image_mean), dim=1))
        network.output.into(self.last, self.joint[:, width:], attention)
        self.pictures[:, 8:] = blend(sources, low_pass(sources), self.last, network.selectivity)
        return F.pixel_shuffle(self.pictures, 2)

    def _take(self, image: Tensor, target: Tensor) -> None:
        """The unshuffled image Tensor[B, 4, H/2, W/2]."""
        if image.shape[2] % 2 or image.shape[3] % 2:
            image = pad_to_even(image)
        for j in range(4):
            target[:, j : j + 1] = image[:, :, j // 2 :: 2, j % 2 :: 2]

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).to(self.network.dtype)

    def _estimate(self, branch: Branch, picture: Tensor) -> Tensor:
        x = details(picture).to(self.network.dtype)
        for layer, y in zip(branch.estimator.layers, self.estimated, strict=True):
            layer.into(y, x, layer.attention(x[:, :, 0, 0]))
            x = y
        return branch.estimator.code(energy(x)).to(self.network.dtype)

    def _restore(self, branch: Branch, index: int, code: Tensor) -> Tensor:
        """Leaves the features in ``joint`` and the restored image in ``pictures``; the features' mean."""
        width = self.network.width
        first = 2 * width + 4 * index
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


class _Graph(NamedTuple):
    """All launches of a pass, recorded on a CUDA device, with the memory that they work on."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    images: Tensor
    space: _Space

    @classmethod
    def record(cls, network: NetworkLayers, inputs: tuple[Tensor | None, ...]) -> "_Graph | None":
        """None where the device refuses."""
        own = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        assert own[0] is not None
        space = _Space(network, own[0].shape)
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError), torch.cuda.device(network.device):
            # Before, on a stream of its own, what the first launches compile and allocate.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                space.run(*own)  # type: ignore[arg-type]
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                images = space.run(*own)  # type: ignore[arg-type]
            return cls(graph, own, images, space)
        return None

    def replay(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self.graph.replay()
        return self.images.clone()
