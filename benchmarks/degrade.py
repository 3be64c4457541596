"""degrade: training batches of 3x256x256 and single 1x400x400 images, with banks of real blur kernels.

The cases of the family "loader" are what a data loader's worker does, on one thread: an array [H, W, C] of
uint8 in, one out. They have providers and a reference of their own, and as they want one thread, no part in
the mean of the others.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.degrade import PEERS, on_numpy, opencv, scipy
from benchmarks.registry import Case, Inputs, Operation, Provider, Run, Setting, Work

GRID = (8, 8)
# (M, k, where the weights are): a single blur, few and many kernels, small and large, per sample and per
# pixel.
BANKS = (
    (12, 25, "image"), (12, 25, "grid"), (12, 15, "image"), (12, 21, "sample"), (3, 15, "grid"),
    (12, 7, "image"), (1, 21, "sample"), (12, 21, "image"), (3, 15, "image"), (3, 15, "sample"),
    (12, 25, "sample"),
)  # fmt: skip
SINGLE = ((1, 3, 256), (1, 1, 400))
# What the banks above leave out, for one image.
OTHERS = ((12, 7, "sample"), (3, 7, "grid"), (1, 25, "grid"), (3, 25, "image"), (1, 15, "image"))
# Batches as restoration training has them: s, M, k, weights.
BATCHES = (
    (4, 12, 25, "image"), (4, 12, 21, "sample"), (1, 12, 25, "image"), (4, 12, 25, "grid"),
    (2, 3, 15, "image"), (4, 12, 25, "output"), (1, 12, 21, "sample"), (1, 1, 21, "sample"),
    (4, 1, 21, "sample"),
)  # fmt: skip

# M, k, s, weights.
LOADERS = (
    (12, 21, 4, "sample"), (12, 21, 2, "sample"), (12, 21, 1, "sample"), (3, 15, 1, "sample"),
    (12, 25, 4, "grid"), (12, 25, 2, "grid"), (12, 25, 1, "grid"), (3, 15, 4, "grid"), (3, 15, 2, "grid"),
)  # fmt: skip

QUICK = {
    "3x256x256 B1 M12 k25 s4 image",
    "3x256x256 B1 M12 k15 s2 image",
    "3x256x256 B1 M3 k15 s1 grid",
    "1x400x400 B1 M12 k25 s4 grid",
    "1x400x400 B1 M1 k21 s1 sample",
    "3x128x128 B4 M12 k15 s4 image noise",
}
COMPILED = QUICK | {"3x256x256 B16 M12 k25 s4 image", "3x256x256 B16 M12 k21 s4 sample"}


def _case(b: int, c: int, size: int, m: int, k: int, s: int, weights: str, noise: bool = False) -> Case:
    name = f"{c}x{size}x{size} B{b} M{m} k{k} s{s} {weights}{' noise' if noise else ''}"
    shape = {"B": b, "C": c, "H": size, "W": size, "M": m, "k": k, "s": s, "weights": weights, "noise": noise}
    return Case(name, shape, quick=name in QUICK, compiled=name in COMPILED)


def _cases() -> list[Case]:
    """The most telling first: a run with a time budget drops the last ones."""
    cases = [_case(16, 3, 256, m, k, s, weights) for s, m, k, weights in BATCHES]
    cases += [
        _case(b, 3, size, 12, k, 4, "image", noise=True) for b, size, k in ((16, 256, 25), (4, 128, 15))
    ]
    cases += [
        _case(*image, m, k, s, weights) for m, k, weights in BANKS for s in (4, 2, 1) for image in SINGLE
    ]
    cases += [_case(*SINGLE[0], m, k, s, weights) for m, k, weights in OTHERS for s in (4, 2, 1)]
    return cases + [_loader_case(_case(*SINGLE[0], m, k, s, weights)) for m, k, s, weights in LOADERS]


def _loader_case(case: Case) -> Case:
    return Case(f"loader {case.name}", {**case.shape, "family": "loader"}, modes=("fwd",))


@functools.cache
def bank(m: int, k: int) -> Tensor:
    """m kernels of k x k, evenly from motion, isotropic and anisotropic blur, with the zeros of real ones."""
    from ddrf_fast.degradation import KernelBank

    kernels = KernelBank.default(kernel_size=k).kernels
    return (
        kernels[torch.linspace(0, len(kernels) - 1, m + 2)[1:-1].round().long()]
        if m < len(kernels)
        else kernels
    )


def inputs(case: Case, setting: Setting, seed: int) -> Inputs:
    """image, kernels, weights on the simplex (and noise_std [B]), all of them leaves with gradients."""
    generator = torch.Generator(setting.device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=setting.device)

    size = {
        "image": (case.H, case.W),
        "output": (-(-case.H // case.s), -(-case.W // case.s)),
        "grid": GRID,
        "sample": (),
    }
    t = {
        "image": draw(case.B, case.C, case.H, case.W).sigmoid(),
        "kernels": bank(case.M, case.k).to(setting.device),
        "weights": draw(case.B, case.M, *size[case.weights]).softmax(dim=1),
    }
    if case.noise:
        t["noise_std"] = draw(case.B).abs() * 0.05
    return {
        name: value.to(setting.torch_dtype, copy=True).requires_grad_(setting.backward)
        for name, value in t.items()
    }


def without_noise(t: Inputs) -> Inputs:
    """Providers draw different random numbers: the gate compares what is under them."""
    if "noise_std" in t:
        # Not differentiated: its gradient is the noise itself.
        t = t | {"noise_std": torch.zeros_like(t["noise_std"])}
    return t


def reference(case: Case, t: Inputs) -> Tensor:
    from ddrf_fast.reference import degrade

    return degrade.degrade(
        t["image"], t["kernels"], t["weights"], *[None] * 5,
        case.s, 0, [-(-case.H // case.s), -(-case.W // case.s)], "reflect", False, case.weights,
    )  # fmt: skip


def work(case: Case, setting: Setting) -> Work:
    """The fewest multiply-adds known, over taps that are not zero: weights per sample reduce to one kernel;
    per pixel, the kernel is mixed first or every kernel applied, whichever is less. Backward the same, where
    the product of image and gradient is shared by the gradients of kernels and weights. Weight maps are read
    at the strided sites."""
    kernels = bank(case.M, case.k) != 0
    taps, union = int(kernels.sum()), int(kernels.any(dim=0).sum())
    sites = case.B * -(-case.H // case.s) * -(-case.W // case.s)
    if case.weights == "sample":
        forward, backward = case.C * union, 2 * case.C * union
    else:
        mix_first, apply_first = taps + case.C * union, case.C * taps
        forward = min(mix_first, apply_first)
        backward = min(mix_first + case.C * union + 2 * taps, 3 * apply_first)
    element = torch.empty((), dtype=setting.torch_dtype).element_size()
    weights = {"sample": case.B * case.M, "grid": case.B * case.M * GRID[0] * GRID[1]}.get(
        case.weights, sites * case.M
    )
    read = element * (case.B * case.C * case.H * case.W + weights + case.M * case.k**2)
    written = element * sites * case.C
    if not setting.backward:
        return Work(2 * sites * forward, read + written)
    return Work(2 * sites * (forward + backward), 3 * read + 2 * written)


def _arguments(case: Case, t: Inputs) -> tuple[tuple, dict]:
    keywords = {"scale": case.s, "grid": case.weights == "grid"}
    if "noise_std" in t:
        keywords |= {"noise_std": t["noise_std"], "seed": 7}
    return (t["image"], t["kernels"], t["weights"]), keywords


def build(case: Case, setting: Setting) -> Run:
    import ddrf_fast

    def run(t: Inputs) -> Tensor:
        positional, keywords = _arguments(case, t)
        return ddrf_fast.degrade(*positional, **keywords)

    return run


def build_numpy(case: Case, setting: Setting) -> Run:
    """What a data loader's worker calls, image by image [H, W, C], on its own thread."""
    import ddrf_fast.numpy

    def run(t: Inputs) -> Tensor:
        images = t["image"].permute(0, 2, 3, 1).contiguous().numpy()
        kernels, weights = t["kernels"].numpy(), t["weights"].numpy()
        noise_std = t["noise_std"].tolist() if "noise_std" in t else [0.0] * case.B
        out = [
            ddrf_fast.numpy.degrade(
                images[b], kernels, weights[b], scale=case.s, grid=case.weights == "grid",
                noise_std=noise_std[b], seed=7, sample_id=b,
            )
            for b in range(case.B)
        ]  # fmt: skip
        return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)

    return run


def plan(case: Case, t: Inputs) -> str:
    import ddrf_fast

    positional, keywords = _arguments(case, t)
    return str(ddrf_fast.explain("degrade", *positional, **keywords))


def loader_inputs(case: Case, setting: Setting, seed: int) -> Inputs:
    t = inputs(case, setting, seed)
    return t | {"image": (t["image"] * 255).round().to(torch.uint8)}


def loader_reference(case: Case, t: Inputs) -> Tensor:
    """In grey levels, before they are rounded."""
    return 255 * reference(case, t)


LOADER = Operation(
    name="degrade_loader",
    cases=(),
    providers=(),
    inputs=loader_inputs,
    reference=loader_reference,
    work=work,
    per_sample=("image", "weights"),
    images=("image",),
    plan=plan,
    depth=50.0,  # half a grey level
)


def _is_loader(case: Case) -> bool:
    return case.shape.get("family") == "loader"


def _but_for_loaders(provider: Provider) -> Provider:
    def skip(case: Case, setting: Setting) -> str | None:
        return "a case for loaders" if _is_loader(case) else provider.skip(case, setting)

    return replace(provider, skip=skip)


def _for_loaders(name: str, build: Callable[[Case, Setting], Run], module: str, peer: bool) -> Provider:
    def skip(case: Case, setting: Setting) -> str | None:
        if not _is_loader(case):
            return "for the cases of loaders"
        if torch.get_num_threads() != 1:
            return "a loader's worker has one thread: --threads 1"
        return on_numpy(module)(case, setting)

    return Provider(name, build, skip, layout="channels_last", peer=peer, of=LOADER)


OPERATION = Operation(
    name="degrade",
    cases=_cases(),
    providers=(
        *map(
            _but_for_loaders,
            (
                Provider("ddrf_fast", build, peer=False),
                Provider("ddrf_fast_numpy", build_numpy, on_numpy("ddrf_fast.numpy"), peer=False),
                *PEERS,
            ),
        ),
        _for_loaders("ddrf_fast", build_numpy, "ddrf_fast.numpy", peer=False),
        _for_loaders("opencv_loop", lambda case, setting: lambda t: opencv(case, t), "cv2", peer=True),
        _for_loaders("scipy_loop", lambda case, setting: lambda t: scipy(case, t), "scipy", peer=True),
    ),
    inputs=inputs,
    reference=reference,
    work=work,
    per_sample=("image", "weights", "noise_std"),
    images=("image",),
    plan=plan,
    exact=without_noise,
)
