"""dynamic_conv: the shapes of EfficientNet-CondConv, of a ResNet-18 with dynamic 3x3, of DDRF-Net."""

import torch
from torch import Tensor

from benchmarks.peers.dynamic_conv import PEERS
from benchmarks.registry import Case, Inputs, Operation, Provider, Run, Setting, Work

# Batch sizes at N = 4, and the other bank sizes at B = 8; the most telling first.
BATCH_AND_BANK = ((8, 4), (32, 4), (1, 4), (8, 8), (8, 1))

CONDCONV_1X1 = (
    (80, 480, 14), (480, 112, 14), (112, 672, 14), (672, 112, 14),
    (672, 192, 7), (192, 1152, 7), (1152, 192, 7), (1152, 320, 7),
)  # fmt: skip
CONDCONV_DEPTHWISE = ((480, 5, 14, 1), (672, 5, 14, 1), (672, 5, 14, 2), (1152, 5, 7, 1), (1152, 3, 7, 1))
RESNET18_3X3 = (
    (64, 64, 56, 1), (128, 128, 28, 1), (256, 256, 14, 1), (512, 512, 7, 1),
    (64, 128, 56, 2), (128, 256, 28, 2), (256, 512, 14, 2),
)  # fmt: skip
# (I, O, batch, size, code channels, N): at full resolution in several widths, then the layers that the
# network has, which works at half resolution.
DDRFNET_3X3 = tuple(
    (channels, channels, batch, size, code, 4)
    for batch, size in ((1, 400), (16, 64), (16, 128))
    for channels in (16, 32, 64)
    for code in (0, 32)
) + tuple(
    (i, o, batch, size, code, 8)
    for batch, size in ((1, 200), (16, 32), (16, 64))
    for i, o, code in ((4, 32, 16), (32, 32, 16), (32, 32, 0), (72, 32, 32), (32, 8, 0))
)

QUICK = {
    "condconv 1x1 80->480 @14 B8 N4",
    "condconv 1x1 192->1152 @7 B8 N4",
    "condconv dw5 480 @14 B8 N4",
    "resnet18 3x3 64->64 @56 B1 N4",
    "resnet18 3x3 128->128 @28 B1 N4",
    "ddrfnet 3x3 16->16 @64 B16 N4",
    "ddrfnet 3x3 32->32 +code16 @32 B16 N8",
}
COMPILED = QUICK | {"ddrfnet 3x3 32->32 @200 B1 N8", "resnet18 3x3 128->128 @28 B32 N4"}


def _case(family: str, name: str, **shape: int | str | bool) -> Case:
    shape = {
        "family": family,
        "groups": 1,
        "stride": 1,
        "code": 0,
        "bias": False,
        "activation": "none",
    } | shape
    shape["padding"] = int(shape["k"]) // 2
    return Case(name, shape, quick=name in QUICK, compiled=name in COMPILED)


def _cases() -> list[Case]:
    """The most telling first: a run with a time budget drops the last ones."""
    literature = [_literature(b, n) for b, n in BATCH_AND_BANK]
    return literature[0] + _ddrfnet() + [case for cases in literature[1:] for case in cases]


def _literature(b: int, n: int) -> list[Case]:
    cases = []
    for i, o, size in CONDCONV_1X1:
        shape = {"B": b, "N": n, "I": i, "O": o, "H": size, "W": size, "k": 1}
        cases.append(_case("condconv 1x1", f"condconv 1x1 {i}->{o} @{size} B{b} N{n}", **shape))
    for c, k, size, s in CONDCONV_DEPTHWISE:
        name = f"condconv dw{k} {c} @{size}{' s2' if s == 2 else ''} B{b} N{n}"
        shape = {"B": b, "N": n, "I": c, "O": c, "H": size, "W": size, "k": k, "stride": s, "groups": c}
        cases.append(_case("condconv depthwise", name, **shape))
    for i, o, size, s in RESNET18_3X3:
        name = f"resnet18 3x3 {i}->{o} @{size}{' s2' if s == 2 else ''} B{b} N{n}"
        shape = {"B": b, "N": n, "I": i, "O": o, "H": size, "W": size, "k": 3, "stride": s}
        cases.append(_case("resnet18", name, **shape, bias=True))
    return cases


def _ddrfnet() -> list[Case]:
    cases = []
    for i, o, b, size, code, n in DDRFNET_3X3:
        name = f"ddrfnet 3x3 {i}->{o}{f' +code{code}' if code else ''} @{size} B{b} N{n}"
        shape = {"B": b, "N": n, "I": i, "O": o, "H": size, "W": size, "k": 3}
        cases.append(_case("ddrfnet", name, **shape, code=code, bias=True, activation="leaky_relu"))
    return cases


def inputs(case: Case, setting: Setting, seed: int) -> Inputs:
    """x, weight, attention (and bias, code), all of them leaves that a training step wants gradients of."""
    generator = torch.Generator(setting.device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=setting.device)

    fan_in = (case.I + case.code) // case.groups * case.k**2
    t = {
        "x": draw(case.B, case.I, case.H, case.W),
        "weight": draw(case.N, case.O, (case.I + case.code) // case.groups, case.k, case.k) / fan_in**0.5,
        "attention": draw(case.B, case.N).softmax(dim=1),
    }
    if case.bias:
        t["bias"] = draw(case.N, case.O)
    if case.code:
        t["code"] = draw(case.B, case.code)
    return {name: value.to(setting.torch_dtype).requires_grad_(setting.backward) for name, value in t.items()}


def reference(case: Case, t: Inputs) -> Tensor:
    from ddrf_fast.reference import dynamic_conv

    return dynamic_conv.dynamic_conv(
        t["x"], t["weight"], t["attention"], t.get("bias"), t.get("code"), None, None, None,
        [case.stride] * 2, [case.padding] * 2, [1, 1], case.groups, case.activation,
    )  # fmt: skip


def work(case: Case, setting: Setting) -> Work:
    """The convolution without the code (a bias, nearly) and the mixing; backward: two more of the first, and
    twice the contraction with the bank, mixing once more. Every tensor is read or written once in a pass."""
    out_size = [(size + 2 * case.padding - case.k) // case.stride + 1 for size in (case.H, case.W)]
    conv = 2 * case.B * case.O * out_size[0] * out_size[1] * (case.I // case.groups) * case.k**2
    bank = case.N * case.O * ((case.I + case.code) // case.groups) * case.k**2
    mixing = 2 * case.B * bank
    element = torch.empty((), dtype=setting.torch_dtype).element_size()
    read = element * (case.B * case.I * case.H * case.W + bank)
    written = element * case.B * case.O * out_size[0] * out_size[1]
    if not setting.backward:
        return Work(conv + mixing, read + written)
    return Work(3 * conv + 4 * mixing, (read + written) + (read + written) + read)


def _arguments(case: Case, t: Inputs) -> tuple[tuple, dict]:
    keywords = {
        "stride": case.stride,
        "padding": case.padding,
        "groups": case.groups,
        "code": t.get("code"),
        "activation": None if case.activation == "none" else case.activation,
    }
    return (t["x"], t["weight"], t["attention"], t.get("bias")), keywords


def build(case: Case, setting: Setting) -> Run:
    import ddrf_fast

    def run(t: Inputs) -> Tensor:
        positional, keywords = _arguments(case, t)
        return ddrf_fast.dynamic_conv(*positional, **keywords)

    return run


def plan(case: Case, t: Inputs) -> str:
    import ddrf_fast

    positional, keywords = _arguments(case, t)
    return str(ddrf_fast.explain("dynamic_conv", *positional, **keywords))


OPERATION = Operation(
    name="dynamic_conv",
    cases=_cases(),
    providers=(Provider("ddrf_fast", build, peer=False), *PEERS),
    inputs=inputs,
    reference=reference,
    work=work,
    per_sample=("x", "attention", "code"),
    images=("x",),
    plan=plan,
)
