"""The mode `arrays` of `model`: all that a user waits for, from two arrays of uint8 to one.

ddrf_fast is its session, `Fuser`, loaded once, with the weights of the package. Its peers run the same
network with the same weights in plain torch, and convert from and to arrays as briefly as torch can. IFCNN is
another method: no peer, as it computes another image, but what ddrf_fast shall be faster than; its weights
are random, and the gate compares it with itself in float64. One large pair is fused by ddrf_fast alone, for
the memory that it takes.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.models.ifcnn import IFCNN
from benchmarks.registry import LAYOUTS, Case, Inputs, Operation, Provider, Run, Setting, Target, Work

MODE = "arrays"
IMAGES = ("visible", "infrared")
# (H, W)
SIZES = ((400, 400), (480, 640))
QUICK = (400, 400)
LARGE = (3000, 4000)

Array = NDArray[Any]
Network = Callable[[Tensor, Tensor], Tensor]  # images [1, 1, H, W] in [0, 1] -> the fused one


def cases() -> list[Case]:
    return [*map(_case, SIZES), _case(LARGE, large=True)]


def _case(size: tuple[int, int], **more: bool) -> Case:
    height, width = size
    shape = {"B": 1, "H": height, "W": width, **more}
    return Case(f"arrays {height}x{width}", shape, quick=size == QUICK, compiled=True, modes=(MODE,))


def is_large(case: Case) -> bool:
    return "large" in case.shape


def but_large(case: Case, setting: Setting) -> str | None:
    """Why a peer does not take part."""
    return "a pair for the memory of ddrf_fast" if is_large(case) else None


def but_large_on_gpu(case: Case, setting: Setting) -> str | None:
    """Why ddrf_fast does not."""
    return "a pair for the memory on CPUs" if is_large(case) and setting.device == "cuda" else None


def elsewhere(reason: str) -> Callable[[Case, Setting], str | None]:
    """For providers of the other modes."""
    return lambda case, setting: reason if setting.mode == MODE else None


def inputs(case: Case, setting: Setting, seed: int) -> Inputs:
    """Two grey images, on the CPU whatever the device is; tensors here, `of_arrays` makes arrays of them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 1, case.H, case.W)
    return {name: torch.randint(256, shape, generator=generator, dtype=torch.uint8) for name in IMAGES}


def of_arrays(fuse: Callable[[Array, Array], Array]) -> Run:
    """What is given arrays [H, W] and returns one; none is copied to become a tensor, or was one."""

    def run(t: Inputs) -> Tensor:
        visible, infrared = (t[name][0, 0].numpy() for name in IMAGES)
        return torch.from_numpy(fuse(visible, infrared))[None, None]

    return run


def converted(network: Network, device: str, dtype: torch.dtype) -> Run:
    """A network between the conversions that it takes in plain torch."""

    def fuse(*arrays: Array) -> Array:
        visible, infrared = (torch.from_numpy(a)[None, None].to(device).to(dtype).div_(255) for a in arrays)
        fused = network(visible, infrared)
        return fused.clamp(0, 1).mul_(255).round_().to(torch.uint8)[0, 0].cpu().numpy()

    return of_arrays(fuse)


def ddrfnet(device: str, dtype: torch.dtype) -> Network:
    """The network with the weights of the package, as a function that gives the fused image."""
    from ddrf_fast.models import load_model

    model = load_model(device=device).to(dtype)

    def fused(visible: Tensor, infrared: Tensor) -> Tensor:
        return model(visible, infrared).fused

    return fused


def reference(case: Case, t: Inputs) -> Tensor:
    """In float64, rounded as everybody rounds.

    That takes a dozen GB for a large pair, whose strips are compared with the engine's pass of the whole.
    """
    import ddrf_fast
    from ddrf_fast.inference.engine import Engine
    from ddrf_fast.models import load_model

    if is_large(case):
        engine = Engine(load_model(), torch.float32, tile=0)
        return converted(lambda *images: engine(*images).fused, "cpu", torch.float32)(t)
    with ddrf_fast.use_backend("reference"):
        return converted(ddrfnet("cpu", torch.float64), "cpu", torch.float64)(t)


def work(flops_per_pixel: float, case: Case) -> Work:
    """Nearly all are convolutions; the weights and three images of 8 bit are moved."""
    from ddrf_fast.models.checkpoint import DEFAULT_WEIGHTS

    pixels = case.H * case.W
    return Work(flops_per_pixel * pixels, DEFAULT_WEIGHTS.stat().st_size + 3 * pixels)


def build(case: Case, setting: Setting, dtype: str | None = None) -> Run:
    """The session as a user calls it."""
    import ddrf_fast

    name = dtype or str(setting.torch_dtype).removeprefix("torch.")
    return of_arrays(ddrf_fast.Fuser(device=setting.device, dtype=name))


def plan(case: Case) -> str:
    import ddrf_fast

    strips = ddrf_fast.Fuser(dtype="float32").network.engine.in_strips(torch.Size((1, 1, case.H, case.W)))
    return "strip by strip" if strips else "as a whole"


def _ifcnn(layout: str, device: str, dtype: torch.dtype) -> Run:
    from ddrf_fast.data import luminance

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = IFCNN().eval().to(device, dtype).to(memory_format=LAYOUTS[layout])

    def fused(*images: Tensor) -> Tensor:
        coloured = [image.expand(-1, 3, -1, -1).contiguous(memory_format=LAYOUTS[layout]) for image in images]
        return luminance(network(*coloured))[:, None]

    return converted(fused, device, dtype)


def _ifcnn_provider(layout: str) -> Provider:
    def build(case: Case, setting: Setting) -> Run:
        return _ifcnn(layout, setting.device, setting.torch_dtype)

    return Provider(f"ifcnn_{layout}", build, _only_here, layout, peer=False, of=IFCNN_ALONE)


def _only_here(case: Case, setting: Setting) -> str | None:
    return but_large(case, setting) if setting.mode == MODE else f"in the mode {MODE} only"


def _where_it_differs(case: Case, setting: Setting) -> str | None:
    return "as ddrf_fast" if setting.dtype == "bfloat16" else _only_here(case, setting)


IFCNN_ALONE = Operation(
    name="ifcnn",
    cases=(),
    providers=(),
    inputs=inputs,
    reference=lambda case, t: _ifcnn("nchw", "cpu", torch.float64)(t),
    work=lambda case, setting: Work(0, 0),  # nobody asks: the roof and the plan are those of the case
    plan=lambda case, t: "",
    per_sample=IMAGES,
    images=IMAGES,
    depth=5.0,
)
PROVIDERS = (
    Provider(
        "ddrf_fast_bfloat16",
        functools.partial(build, dtype="bfloat16"),
        _where_it_differs,
        peer=False,
        precision="bfloat16",
    ),
    _ifcnn_provider("nchw"),
    _ifcnn_provider("channels_last"),
)


def targets(records: Sequence[Mapping[str, Any]]) -> list[Target]:
    """What was to be reached on two cores, and what was; of cases and peers that were measured."""
    found = []
    for ours in records:
        if (ours["provider"], ours["mode"], ours["device"]) != ("ddrf_fast", MODE, "cpu"):
            continue
        case, time = ours["case"], ours["median_ms"]
        if is_large(Case(case, ours["shape"])):
            if ours["peak_memory_mib"] is not None:
                gigabytes = ours["peak_memory_mib"] * 2**20 / 1e9
                found.append(Target(case, "GB of memory", gigabytes, 1.5, at_most=True))
            continue
        if time is not None and (ours["shape"]["H"], ours["shape"]["W"]) == QUICK:
            found.append(Target(case, "milliseconds", time, 100.0, at_most=True))
        for prefix, name, factor in (
            ("ifcnn_", "IFCNN", 1.0),
            ("grouped_", "plain torch", 3.0),
            ("compiled_", "torch.compile", 1.0),
        ):
            others = [
                r["median_ms"]
                for r in records
                if (r["case"], r["mode"]) == (case, MODE) and r["provider"].startswith(prefix)
            ]
            known = [other for other in others if other is not None]
            if time is not None and known:
                found.append(Target(case, f"times as fast as {name}", min(known) / time, factor))
    return found
