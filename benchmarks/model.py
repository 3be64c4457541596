"""model: DDRF-Net whole, blind as it is used: single images, training crops, and whole training steps.

Every provider runs the same network with the same weights; only the function behind its dynamic convolutions
differs, and in a training step the one that degrades the images beforehand (12 kernels of 25x25, mixed
differently all over the image, and noise), too. The losses and the optimiser are the same for all.

In the mode `arrays` (arrays.py) it is the session of ddrf_fast that competes, from arrays of 8 bit to such.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arrays
from benchmarks.arrays import IMAGES
from benchmarks.peers import degrade as degrade_peers
from benchmarks.peers import dynamic_conv as peers
from benchmarks.registry import (
    PASSES,
    Case,
    Inputs,
    Operation,
    Provider,
    Run,
    Setting,
    Work,
    input_bytes,
)

Degrade = Callable[[Inputs, Tensor, Tensor], Tensor]

# (B, H, W): images to fuse, and training batches of crops.
SHAPES = ((1, 400, 400), (1, 480, 640), (16, 64, 64), (16, 96, 96), (16, 128, 128))
QUICK = ((1, 400, 400), (4, 64, 64))


def _cases() -> list[Case]:
    """Single images are fused; batches are fused and trained on, without and with losses and degradation."""
    return [
        Case(
            f"ddrfnet {h}x{w} B{b}",
            {"B": b, "H": h, "W": w},
            quick=(b, h, w) in QUICK,
            compiled=True,
            modes=(*PASSES, "step") if b > 1 else PASSES[:1],
        )
        for b, h, w in dict.fromkeys(SHAPES + QUICK)
    ] + arrays.cases()


def inputs(case: Case, setting: Setting, seed: int) -> Inputs:
    """Two images and the network with random weights, whose gradients a training step wants.

    Of a step also the image to fuse to, and how both images are degraded.
    """
    if setting.mode == arrays.MODE:
        return arrays.inputs(case, setting, seed)

    from ddrf_fast.degradation import KernelBank
    from ddrf_fast.models import DDRFNet

    generator = torch.Generator(setting.device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, device=setting.device)
        return values.to(setting.torch_dtype)

    shape = (case.B, 1, case.H, case.W)
    found: Inputs = {"visible": draw(*shape), "infrared": draw(*shape)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DDRFNet().to(setting.device, setting.torch_dtype)
    found["network"] = network.requires_grad_(setting.backward)
    network.fusion.caution.requires_grad_(False)  # no image depends on it with a gradient
    if setting.mode == "step":
        kernels = KernelBank.default().kernels.to(setting.device, setting.torch_dtype)
        weights = {f"{name}_weights": draw(case.B, len(kernels), 8, 8).softmax(1) for name in IMAGES}
        found |= {"positive": draw(*shape), "kernels": kernels, "noise_std": 0.1 * draw(case.B), **weights}
    return found


def exact(t: Inputs) -> Inputs:
    """Without noise, which eager code draws otherwise."""
    return {name: value for name, value in t.items() if name != "noise_std"}


def degrade(t: Inputs, image: Tensor, weights: Tensor) -> Tensor:
    import ddrf_fast

    return ddrf_fast.degrade(image, t["kernels"], weights, grid=True, noise_std=t.get("noise_std", 0.0))


def eager_degrade(t: Inputs, image: Tensor, weights: Tensor) -> Tensor:
    """The fastest of the eager forms on crops: all kernels at once, then the weighted sum."""
    shape = {"k": t["kernels"].shape[-1], "s": 1, "weights": "grid", "H": image.shape[2], "W": image.shape[3]}
    named = t | {"image": image, "weights": weights}
    return degrade_peers.with_noise(named, degrade_peers.strided_conv(Case("", shape), named))


def forward(t: Inputs, degrade: Degrade = degrade) -> Tensor:
    """[B, 3, H, W]: the fused and both restored images, so that a training step reaches every parameter."""
    images = [t[name] for name in IMAGES]
    if "kernels" in t:
        with torch.no_grad():
            images = [degrade(t, t[name], t[f"{name}_weights"]).clamp(0, 1) for name in IMAGES]
    return torch.cat(t["network"](*images), dim=1)


def loss(t: Inputs, output: Tensor) -> Tensor:
    """As in ddrf_fast.training, without the estimator's and the negative samples'."""
    from ddrf_fast.losses import positive_loss, restoration_loss, similarity_loss

    fused, visible, infrared = output.split(1, dim=1)
    sources = [t[name] for name in IMAGES]
    restoration = restoration_loss(visible, sources[0]) + restoration_loss(infrared, sources[1])
    return restoration + similarity_loss(fused, sources) + positive_loss(fused, t["positive"])


def reference(case: Case, t: Inputs) -> Tensor:
    import ddrf_fast

    if "network" not in t:
        return arrays.reference(case, t)

    with ddrf_fast.use_backend("reference"):
        return forward(t)


@contextlib.contextmanager
def replaced(function: Callable[..., Any]) -> Iterator[None]:
    """Puts `function` where the package's modules call `dynamic_conv`."""
    import ddrf_fast

    original = ddrf_fast.dynamic_conv
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("ddrf_fast.nn") and vars(module).get("dynamic_conv") is original
    ]
    for module in modules:
        module.dynamic_conv = function
    try:
        yield
    finally:
        for module in modules:
            module.dynamic_conv = original


def _peer(
    name: str,
    formula: peers.Formula,
    layout: str,
    skip: Callable[[Case, Setting], str | None] = arrays.but_large,
    compiled: bool = False,
) -> Provider:
    function = peers.as_public(formula)
    prepare: Any = functools.partial(torch.compile, dynamic=False) if compiled else lambda eager: eager

    def build(case: Case, setting: Setting) -> Run:
        if setting.mode == arrays.MODE:
            network = prepare(arrays.ddrfnet(setting.device, setting.torch_dtype))
            run = arrays.converted(network, setting.device, setting.torch_dtype)
        else:
            run = prepare(functools.partial(forward, degrade=eager_degrade))

        def run_replaced(t: Inputs) -> Tensor:
            with replaced(function):
                return run(t)

        return run_replaced

    return Provider(name, build, skip, layout, warm_up=compiled)


def _loop_channels_last(case: Case, t: Inputs, x: Tensor) -> Tensor:
    """One-channel images have no layout: the first layer sets it, and the next ones keep it."""
    return peers.loop(case, t, x.contiguous(memory_format=torch.channels_last))


def _static(case: Case, t: Inputs, x: Tensor) -> Tensor:
    """The first kernel alone and no code: a layer's least work."""
    x = t["x"]
    kernel = t["weight"][0, :, : x.shape[1] // case.groups]
    return F.conv2d(x, kernel, t["bias"][0], case.stride, case.padding, case.dilation, case.groups)


@functools.cache
def _flops(case_name: str) -> int:
    case = next(case for case in OPERATION.cases if case.name == case_name)
    counter = FlopCounterMode(display=False)
    with replaced(peers.as_public(_static)), torch.no_grad(), counter:
        forward(inputs(case, Setting(), seed=0))
    return counter.get_total_flops()


def work(case: Case, setting: Setting) -> Work:
    """The convolutions of the static twin, thrice with a backward; parameters and images move once a pass.

    Not counted: a step's degradation, loss and optimiser.
    """
    if setting.mode == arrays.MODE:
        image = OPERATION.cases[0]
        return arrays.work(_flops(image.name) / (image.H * image.W), case)
    passes = 3 if setting.backward else 1
    return Work(passes * _flops(case.name), passes * input_bytes(inputs(case, setting, seed=0)))


def build(case: Case, setting: Setting) -> Run:
    return arrays.build(case, setting) if setting.mode == arrays.MODE else forward


def build_compiled(case: Case, setting: Setting) -> Run:
    return torch.compile(forward, dynamic=False)


def plan(case: Case, t: Inputs) -> str:
    return "every layer as in dynamic_conv" if "network" in t else arrays.plan(case)


ONE_PAIR = arrays.elsewhere("for one pair as the grouped convolution")
NO_SESSION = arrays.elsewhere("a session is not compiled")
OPERATION = Operation(
    name="model",
    cases=_cases(),
    providers=(
        Provider("ddrf_fast", build, arrays.but_large_on_gpu, peer=False),
        _peer("grouped_nchw", peers.grouped_nchw, "nchw"),
        _peer("grouped_channels_last", peers.grouped_channels_last, "channels_last"),
        _peer("loop_nchw", peers.loop, "nchw", ONE_PAIR),
        _peer("loop_channels_last", _loop_channels_last, "channels_last", ONE_PAIR),
        Provider("compiled_ddrf_fast", build_compiled, NO_SESSION, peer=False, warm_up=True),
        _peer("compiled_grouped_nchw", peers.grouped_nchw, "nchw", compiled=True),
        *arrays.PROVIDERS,
    ),
    inputs=inputs,
    reference=reference,
    work=work,
    per_sample=(*IMAGES, *(f"{name}_weights" for name in IMAGES), "positive"),
    images=IMAGES,
    plan=plan,
    exact=exact,
    loss=loss,
    depth=5.0,
    kinked=True,
    targets=arrays.targets,
)
