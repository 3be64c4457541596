"""route against its definition in float64, and what holds for it in torch."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CAPABILITIES, assert_accurate, run_capability
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import ddrf_fast
import ddrf_fast.flops
from ddrf_fast.nn import Router
from ddrf_fast.ops import _native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("x", "squeeze_weight", "squeeze_bias", "excite_weight", "excite_bias")


def definition(
    x,
    squeeze_weight,
    squeeze_bias,
    excite_weight,
    excite_bias,
    code=None,
    temperature=1.0,
    normalization="softmax",
    scale=1.0,
):
    """Step by step, in the tensors' own precision."""
    hidden = x.mean((2, 3)) if x.dim() == 4 else x
    hidden = hidden if code is None else torch.cat((hidden, code), dim=1)
    if squeeze_weight is not None:
        hidden = F.relu(F.linear(hidden, squeeze_weight, squeeze_bias))
    logits = F.linear(hidden, excite_weight, excite_bias) / temperature
    return scale * (logits.softmax(1) if normalization == "softmax" else logits.sigmoid())


def inputs(shape=(2, 12, 7, 8), hidden=6, kernels=4, code=0, one_layer=False, bias=True, dtype=torch.float64):
    """Random tensors of the operation by name."""

    def normal(*sizes):
        return torch.randn(sizes).to(dtype)

    units = shape[1] + code
    named = {
        "x": normal(*shape),
        "squeeze_weight": None if one_layer else normal(hidden, units),
        "squeeze_bias": normal(hidden) if bias and not one_layer else None,
        "excite_weight": normal(kernels, units if one_layer else hidden),
        "excite_bias": normal(kernels) if bias else None,
    }
    return named | ({"code": normal(shape[0], code)} if code else {})


def call(named: dict[str, Tensor | None], **options) -> Tensor:
    positional = [named[name] for name in NAMES]
    options |= {name: t for name, t in named.items() if name not in NAMES}
    return ddrf_fast.route(*positional, **options)


def double(named: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double() for name, t in named.items()}


CASES = {
    "image": ({}, {}),
    "pooled": ({"shape": (3, 12)}, {}),
    "coded": ({"code": 3}, {"temperature": 2.5}),
    "pooled and coded": ({"shape": (3, 12), "code": 3}, {"scale": 0.25}),
    "one layer, sigmoid": ({"one_layer": True}, {"normalization": "sigmoid"}),
    "one layer, coded": ({"one_layer": True, "code": 2}, {"temperature": 30.0}),
    "without biases": ({"bias": False}, {"normalization": "sigmoid", "scale": 2.0}),
    "one pixel": ({"shape": (2, 5, 1, 1)}, {}),
    "one channel": ({"shape": (2, 1, 9, 5)}, {}),
    "one kernel": ({"kernels": 1}, {}),
    "more than a block": ({"shape": (2, 3, 50, 61)}, {}),
    "many channels": ({"shape": (17, 1100, 2, 2), "hidden": 9}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("cpu_backend")
def test_is_its_definition(case):
    torch.manual_seed(0)
    shapes, options = CASES[case]
    named = inputs(**shapes)
    assert_accurate(call(named, **options), definition(**named, **options))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, or some of them, in every way they may lie in memory."""
    last = x.contiguous(memory_format=torch.channels_last)
    return {
        "NCHW": x,
        "channels_last": last,
        "rows apart": x[:, :, 1:, 2:],
        "rows apart, channels_last": last[:, :, 1:, 2:],
        "channels apart, channels_last": last[:, 1:],
        "transposed": x.transpose(2, 3),
        "columns apart": x[..., ::2],
        "batch innermost": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "expanded batch": x[:1].expand_as(x),
        "expanded pixels": x[..., :1, :1].expand_as(x),
        "expanded channels": x[:, :1].expand_as(x),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", layouts(torch.rand(2, 2, 2, 3)))
@pytest.mark.usefixtures("cpu_backend")
def test_every_dtype_and_layout(layout, dtype):
    torch.manual_seed(0)
    for shape in ((2, 20, 33, 34), (3, 7, 5, 6)):
        named = inputs(shape, dtype=dtype, code=3)
        named["x"] = x = layouts(named["x"])[layout]
        units = x.shape[1] + 3
        named["squeeze_weight"] = named["squeeze_weight"][:, :units] / units**0.5
        exact = definition(**double(named), temperature=2.0)
        found = call(named, temperature=2.0)
        assert found.dtype == dtype
        assert_accurate(found, exact, lowprec=definition(**named, temperature=2.0))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40)),
    hidden=st.integers(1, 40),
    kernels=st.integers(1, 20),
    code=st.integers(0, 4),
    options=st.sampled_from([{}, {"one_layer": True}, {"bias": False}]),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, hidden, kernels, code, options, channels_last, dtype):
    named = inputs(shape, hidden, kernels, code, dtype=dtype, **options)
    if channels_last:
        named["x"] = named["x"].contiguous(memory_format=torch.channels_last)
    exact = definition(**double(named), temperature=5.0)
    floor = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype)  # sums of 300, by which logits err
    assert_accurate(call(named, temperature=5.0), exact, definition(**named, temperature=5.0), floor)


def test_large_images_lose_nothing():
    """A mean of a million equal summands, which a single float sum would miss by far."""
    x = torch.full((1, 2, 1000, 1001), 0.1)
    weight = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    for layout in (torch.contiguous_format, torch.channels_last):
        found = ddrf_fast.route(
            x.contiguous(memory_format=layout), None, None, weight, None, normalization="sigmoid"
        )
        torch.testing.assert_close(found, torch.full((1, 2), 10.0).sigmoid(), rtol=2e-7, atol=0)


def test_nan_and_infinity_stay():
    nan, one = float("nan"), torch.ones(2, 1)
    x = torch.tensor([[nan], [float("inf")], [-float("inf")], [1e30]])[:, :, None, None]
    for first in (None, torch.ones(1, 1)):
        for normalization in ("softmax", "sigmoid"):
            found = ddrf_fast.route(x, first, None, one, None, normalization=normalization)
            with ddrf_fast.use_backend("reference"):
                expected = ddrf_fast.route(x, first, None, one, None, normalization=normalization)
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_same_bits_whatever_the_number_of_threads():
    named = [
        inputs(shape, hidden=40, dtype=torch.float32)
        for shape in ((1, 48, 90, 91), (9, 3, 70, 80), (9, 203, 7, 7), (40, 600))
    ]
    named += [
        n | {"x": n["x"].contiguous(memory_format=torch.channels_last)} for n in named if n["x"].dim() == 4
    ]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([call(n) for n in named])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    program = """
import torch, ddrf_fast
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 37, 19, 21).to(dtype).contiguous(memory_format=layout)
        w, v = torch.randn(9, 37).to(dtype) / 6, torch.randn(5, 9).to(dtype) / 3
        found = ddrf_fast.route(x, w, None, v, None)
        with ddrf_fast.use_backend("reference"):
            torch.testing.assert_close(found, ddrf_fast.route(x, w, None, v, None))
"""
    run_capability(program, capability)


@pytest.mark.parametrize("case", ["coded", "pooled and coded", "one layer, sigmoid", "without biases"])
def test_gradients_to_second_order(case):
    shapes, options = CASES[case]
    named = {name: t for name, t in inputs(**shapes).items() if t is not None}
    tensors = tuple(t.requires_grad_() for t in named.values())
    absent = dict.fromkeys(NAMES)

    def run(temperature, *values):
        values = absent | dict(zip(named, values, strict=True))
        return call(values, **{**options, "temperature": temperature})

    temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (temperature, *tensors), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (temperature, *tensors), fast_mode=True)


@pytest.mark.parametrize(
    ("layout", "batch"), [*((layout, 2) for layout in layouts(torch.rand(2, 2, 2, 3))), ("NCHW", 0)]
)
def test_opcheck(layout, batch):
    x = layouts(torch.randn(batch, 6, 5, 7))[layout]
    channels = x.shape[1]
    raw = torch.randn(3, channels + 2), torch.randn(3), torch.randn(4, 3), None, torch.randn(batch, 2)
    opcheck(torch.ops.ddrf_fast.route.default, (x, *raw, torch.tensor(2.0), "softmax", 0.5))
    pooled = x.mean((2, 3))
    opcheck(
        torch.ops.ddrf_fast.route.default,
        (pooled, None, None, torch.randn(4, channels), torch.randn(4), None, None, "sigmoid", 1.0),
    )


@pytest.mark.parametrize("gradients", [False, True])
def test_numbers_of_numpy_are_taken(gradients):
    named = {name: t.requires_grad_(gradients) for name, t in inputs().items()}
    for kind in (np.float32, np.float64, np.int64, Fraction):
        found = call(named, temperature=kind(2), scale=kind(3))
        assert torch.equal(found, call(named, temperature=2.0, scale=3.0))


@pytest.mark.parametrize("one_layer", [False, True])
def test_operations_are_counted_as_those_of_linear_layers(one_layer):
    named = inputs((3, 12, 7, 8), hidden=6, kernels=4, code=2, one_layer=one_layer)
    expected = 2 * 3 * 14 * 4 if one_layer else 2 * 3 * (14 * 6 + 6 * 4)
    for gradients in (False, True):
        tensors = {name: None if t is None else t.requires_grad_(gradients) for name, t in named.items()}
        with FlopCounterMode(display=False) as counter:
            call(tensors)
        assert counter.get_total_flops() == expected


def test_vmap_and_torch_func():
    named = inputs(code=3)
    many = torch.stack([named["x"] * s for s in (1.0, 0.5, -2.0)], dim=1)
    one_by_one = torch.stack([call({**named, "x": x}) for x in many.unbind(1)])
    torch.testing.assert_close(torch.vmap(lambda x: call({**named, "x": x}), in_dims=1)(many), one_by_one)
    # The raw operator, as in an exported program: folded, and with a mapped weight one by one.
    raw = torch.ops.ddrf_fast.route.default
    rest = (*(named[name] for name in NAMES[1:]), named["code"], None, "softmax", 1.0)
    torch.testing.assert_close(torch.vmap(lambda x: raw(x, *rest), in_dims=1)(many), one_by_one)
    assert torch.vmap(lambda x: raw(x, *rest), in_dims=1)(many[:, :0]).shape == (0, 2, 4)
    biases = torch.randn(3, 4, dtype=torch.float64)
    found = torch.vmap(lambda bias: raw(many[:, 0], *rest[:3], bias, *rest[4:]))(biases)
    expected = torch.stack([call({**named, "x": many[:, 0], "excite_bias": bias}) for bias in biases])
    torch.testing.assert_close(found, expected)

    def loss(x):
        return call({**named, "x": x}).square().sum()

    x = named["x"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(named["x"]), expected)
    tangent = torch.randn_like(x)
    torch.testing.assert_close(torch.func.jvp(loss, (named["x"],), (tangent,))[1], (expected * tangent).sum())


@pytest.mark.parametrize("gradients", [False, True])
def test_compiles_whole_with_free_batch_size_and_temperature(gradients):
    torch._dynamo.reset()
    run = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")

    def compare(shape, temperature):
        named = inputs(shape, code=3, dtype=torch.float32)
        for t in named.values():
            t.requires_grad_(gradients)
        found, expected = (f(named, temperature=temperature, scale=0.125) for f in (run, call))
        torch.testing.assert_close(found, expected)
        if gradients:
            ours, theirs = (
                torch.autograd.grad(y.sin().sum(), list(named.values())) for y in (found, expected)
            )
            torch.testing.assert_close(ours, theirs)

    compare((12, 6, 17, 19), 2.5)
    with torch.compiler.set_stance("fail_on_recompile"):
        compare((14, 6, 21, 15), 3.5)
        compare((15, 6, 16, 13), 31.0)


def test_a_temperature_of_a_buffer_is_not_looked_at():
    router = Router(6, 4)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(router, fullgraph=True, backend="eager")
        x = torch.randn(2, 6, 5, 5)
        compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            router.set_temperature(7.0)
            torch.testing.assert_close(compiled(x), router(x))
        torch.testing.assert_close(compiled(x.mean((2, 3))), router(x))


def test_exports_as_one_operator():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router(6, 4, temperature=3.0)

        def forward(self, x: Tensor, code: Tensor) -> Tensor:
            return self.router(x, code)

    net = Net().eval().requires_grad_(False)
    dim = torch.export.Dim
    shapes = {0: dim("batch"), 2: dim("height"), 3: dim("width")}
    program = torch.export.export(
        net, (torch.rand(3, 4, 8, 9), torch.rand(3, 2)), dynamic_shapes=(shapes, {0: shapes[0]})
    )
    assert "ddrf_fast.route.default" in {str(node.target) for node in program.graph.nodes}
    x, code = torch.rand(5, 4, 3, 7), torch.rand(5, 2)
    torch.testing.assert_close(program.module()(x, code), net(x, code))


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_keeps_the_dtype_of_x(gradients):
    named = inputs(dtype=torch.float32, code=3)
    for name in NAMES[1:]:
        named[name].requires_grad_(gradients)
    expected = call(named)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(named).dtype == torch.float32
        low = call({**named, "x": named["x"].bfloat16()})
        raw = [named[name] for name in NAMES[1:]]
        raw = torch.ops.ddrf_fast.route(
            named["x"].bfloat16(), *(t.detach() for t in raw), named["code"], None, "softmax", 1.0
        )
    assert low.dtype == raw.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.03, rtol=0.03)
    torch.testing.assert_close(raw.float(), expected, atol=0.03, rtol=0.03)
    if gradients:
        low.float().square().sum().backward()
        assert named["squeeze_weight"].grad.dtype == torch.float32


def test_a_gradient_is_explained():
    x, weight = torch.rand(2, 8, 5, 5), torch.rand(3, 8, requires_grad=True)
    found = ddrf_fast.explain("route", x, None, None, weight, None)
    assert found.backend == "reference"
    assert found.plan == "a mean, a matrix product for each layer, and the normalization"
    assert "its gradient is that of plain torch" in str(found) or not _native.status()["_C"][0]
    with torch.no_grad():
        assert ddrf_fast.explain("route", x, None, None, weight, None).plan == ""


def test_the_choice_is_explained():
    named = inputs(dtype=torch.float32)
    assert ddrf_fast.explain(ddrf_fast.route, *named.values()).backend == "native"
    with ddrf_fast.use_backend("reference"):
        plan = ddrf_fast.explain("route", *named.values(), temperature=2.0).plan
    assert plan == "a mean, a matrix product for each layer, and the normalization"


WRONG = {
    "x must be a Tensor": ({"x": 3}, TypeError),
    r"x must be \[B, C, H, W\] or \[B, C\], got shape \(2, 12, 7\)": (
        {"x": torch.rand(2, 12, 7)},
        ValueError,
    ),
    "x must have at least one pixel": ({"x": torch.rand(2, 12, 0, 8)}, ValueError),
    r"squeeze_weight must be \[hidden, C\] = \(6, 12\), got shape \(6, 13\)": (
        {"squeeze_weight": torch.rand(6, 13)},
        ValueError,
    ),
    r"squeeze_weight must be \[hidden, C \+ D\] = \(6, 15\)": ({"code": torch.rand(2, 3)}, ValueError),
    r"squeeze_bias must be \[hidden\] = \(6,\)": ({"squeeze_bias": torch.rand(5)}, ValueError),
    "squeeze_bias needs squeeze_weight": ({"squeeze_weight": None}, ValueError),
    r"excite_weight must be \[N, hidden\] = \(4, 6\)": ({"excite_weight": torch.rand(4, 7)}, ValueError),
    "excite_weight must give at least one weight": (
        {"excite_weight": torch.rand(0, 6), "excite_bias": None},
        ValueError,
    ),
    r"excite_bias must be \[N\] = \(4,\)": ({"excite_bias": torch.rand(3)}, ValueError),
    r"code must be \[B, D\] = \(2, 3\), got shape \(1, 3\)": (
        {"code": torch.rand(1, 3), "squeeze_weight": torch.rand(6, 15)},
        ValueError,
    ),
    "squeeze_weight must have the dtype of x": ({"squeeze_weight": torch.rand(6, 12).double()}, TypeError),
    "temperature must be positive, got 0": ({"temperature": 0}, ValueError),
    "temperature must be a number, got 'hot'": ({"temperature": "hot"}, TypeError),
    "temperature must be a number or a floating tensor without dimensions": (
        {"temperature": torch.ones(1)},
        ValueError,
    ),
    "temperature must be on the device of x": ({"temperature": torch.ones((), device="meta")}, ValueError),
    "normalization must be 'softmax' or 'sigmoid', got 'sum'": ({"normalization": "sum"}, ValueError),
    "scale must be a number, got None": ({"scale": None}, TypeError),
    "scale must be a number, got True": ({"scale": True}, TypeError),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    change, error = WRONG[message]
    with pytest.raises(error, match=message):
        call(inputs(dtype=torch.float32) | change)


RAW_WRONG = {
    "x: expected 4 dimensions": {0: torch.rand(2, 3, 4)},
    "x: expected at least one pixel": {0: torch.rand(2, 12, 0, 3)},
    "squeeze_weight: expected shape": {1: torch.rand(6, 13)},
    "squeeze_bias: expected shape": {2: torch.rand(7)},
    "squeeze_bias: needs": {1: None},
    "excite_weight: expected 2 dimensions": {3: torch.rand(4)},
    "excite_bias: expected dtype": {4: torch.rand(4).double()},
    "code: expected shape": {5: torch.rand(3, 2)},
    "temperature: expected a number": {6: torch.rand(1)},
    "normalization: expected": {7: "sum"},
}


@pytest.mark.skipif(not _native.status()["_C"][0], reason=_native.status()["_C"][1])
@pytest.mark.parametrize("message", RAW_WRONG)
def test_raw_operator_refuses_what_does_not_fit(message):
    args = [*inputs(dtype=torch.float32).values(), None, None, "softmax", 1.0]
    for i, value in RAW_WRONG[message].items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddrf_fast.route(*args)
