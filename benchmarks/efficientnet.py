"""efficientnet: EfficientNet-B0 with CondConv whole (4 kernels a bank), beside the static EfficientNet-B0.

Inference runs in eval mode, batch normalisation as it stands (nobody folds it into the convolutions); a
training step normalises by the batch. The static network computes something else and is no peer: it shows
what kernels of one's own for every sample cost a whole model (`to_static` in the summary).

`ddrf_fast` has everything in channels_last, which is what torch advises for convolutional networks;
`ddrf_fast_nchw` is shown for comparison.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models.efficientnet import Convolve, EfficientNetB0
from benchmarks.peers import dynamic_conv as peers
from benchmarks.registry import PASSES, Case, Inputs, Operation, Provider, Run, Setting, Work

NUM_KERNELS = 4


def _case(batch: int, modes: tuple[str, ...]) -> Case:
    shape = {"B": batch, "H": 224, "W": 224, "N": NUM_KERNELS}
    return Case(f"condconv-b0-{NUM_KERNELS}e 224 B{batch}", shape, quick=batch == 1, modes=modes)


grouped = peers.as_public(peers.grouped_nchw)


def _inputs(num_kernels: int, case: Case, setting: Setting, seed: int) -> Inputs:
    """Images, and a network with random weights that is normalised for them (else its output would fade)."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    image = torch.randn((case.B, 3, case.H, case.W), generator=generator, device=setting.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = EfficientNetB0(num_kernels).to(setting.device)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momentum = norms[0].momentum
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(image, grouped)
    for norm in norms:
        norm.momentum = momentum
    network = network.to(setting.torch_dtype).train(setting.backward).requires_grad_(setting.backward)
    return {"image": image.to(setting.torch_dtype), "network": network}


def _computed_with(convolve: Convolve | None) -> Run:
    return lambda t: t["network"](t["image"], convolve)


def reference(case: Case, t: Inputs) -> Tensor:
    return _computed_with(grouped)(t)


@functools.cache
def macs(num_kernels: int, height: int, width: int) -> int:
    """Multiply-adds of one image: convolutions and linear layers, and the mixing of kernels."""
    network = EfficientNetB0(num_kernels).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.empty(1, 3, height, width, device="meta"), grouped)
    return counter.get_total_flops() // 2


def work(case: Case, setting: Setting) -> Work:
    """The multiply-adds, thrice with a backward; parameters and images move once a pass."""
    passes = 3 if setting.backward else 1
    element = torch.empty((), dtype=setting.torch_dtype).element_size()
    parameters = sum(p.numel() for p in EfficientNetB0(NUM_KERNELS).to("meta").parameters())
    bytes_moved = element * (parameters + case.B * 3 * case.H * case.W)
    return Work(2 * passes * case.B * macs(NUM_KERNELS, case.H, case.W), passes * bytes_moved)


def _grouped_channels_last(*arguments: Any, **keywords: Any) -> Tensor:
    """What comes out of the grouped convolution is in no layout that batch normalisation knows."""
    y = peers.as_public(peers.grouped_channels_last)(*arguments, **keywords)
    return y.contiguous(memory_format=torch.channels_last)


def _matrix_product(pointwise: peers.Formula, depthwise: Convolve) -> Convolve:
    """1x1 as batched matrix products, the others grouped."""
    product = peers.as_public(pointwise)

    def convolve(*arguments: Any, **keywords: Any) -> Tensor:
        return (product if keywords["groups"] == 1 else depthwise)(*arguments, **keywords)

    return convolve


def build(case: Case, setting: Setting) -> Run:
    import ddrf_fast

    return _computed_with(ddrf_fast.dynamic_conv)


def plan(case: Case, t: Inputs) -> str:
    return "every CondConv as in dynamic_conv"


def _peer(name: str, convolve: Convolve, layout: str) -> Provider:
    return Provider(name, lambda case, setting: _computed_with(convolve), layout=layout)


def _static(layout: str) -> Provider:
    return Provider(
        f"static_{layout}",
        lambda case, setting: _computed_with(None),
        layout=layout,
        peer=False,
        of=STATIC,
    )


CONDCONV = Operation(
    name="efficientnet",
    cases=[_case(1, ("fwd",)), _case(8, PASSES)],
    providers=(),
    inputs=functools.partial(_inputs, NUM_KERNELS),
    reference=reference,
    work=work,
    per_sample=("image",),
    images=("image", "network"),
    plan=plan,
    depth=5.0,
    coupled=True,
)
STATIC = dataclasses.replace(CONDCONV, name="efficientnet_static", inputs=functools.partial(_inputs, 0))
OPERATION = dataclasses.replace(
    CONDCONV,
    providers=(
        Provider("ddrf_fast", build, peer=False, layout="channels_last"),
        Provider("ddrf_fast_nchw", build, peer=False, layout="nchw"),
        _peer("condconv_grouped_nchw", grouped, "nchw"),
        _peer("condconv_grouped_channels_last", _grouped_channels_last, "channels_last"),
        _peer("condconv_bmm_nchw", _matrix_product(peers.bmm_nchw, grouped), "nchw"),
        _peer(
            "condconv_bmm_channels_last",
            _matrix_product(peers.bmm_channels_last, _grouped_channels_last),
            "channels_last",
        ),
        _static("nchw"),
        _static("channels_last"),
    ),
)
