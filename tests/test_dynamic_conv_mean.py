"""dynamic_conv(..., return_mean=True): the mean of the output, and what a chain of layers makes of it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOOR, assert_accurate, max_error, off_the_kink
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import ddrf_fast
from ddrf_fast.models import DDRFNet, DDRFNetConfig
from ddrf_fast.nn import DynamicConv2d

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "attention", "bias", "code", "in_scale", "out_scale", "tap_scale")


def inputs(shape=(2, 6, 7, 8), out=5, bank=3, kernel=3, code=0, groups=1, dtype=torch.float64):
    """Random tensors of the operation by name, all that are optional included."""
    batch, channels = shape[:2]
    shapes = {
        "x": shape,
        "weight": (bank, out, channels // groups + code, kernel, kernel),
        "attention": (batch, bank),
        "bias": (bank, out),
        "in_scale": (batch, channels),
        "out_scale": (batch, out),
        "tap_scale": (batch, kernel, kernel),
    } | ({"code": (batch, code)} if code else {})
    return {name: torch.randn(sizes).to(dtype) for name, sizes in shapes.items()}


def call(named: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    return ddrf_fast.dynamic_conv(**named, **options, return_mean=True)


def raw(named: dict[str, Tensor], activation="none", padding=1, stride=1) -> tuple[Tensor, Tensor]:
    return torch.ops.ddrf_fast.dynamic_conv_mean(*raw_arguments(named, activation, padding, stride))


def raw_arguments(named: dict[str, Tensor], activation="none", padding=1, stride=1) -> tuple:
    tensors = tuple(named.get(name) for name in NAMES)
    return *tensors, [stride, stride], [padding, padding], [1, 1], 1, activation


CASES = {
    "plain": ({}, {}),
    "relu": ({}, {"padding": 1, "activation": "relu"}),
    "leaky_relu": ({}, {"padding": 2, "activation": "leaky_relu"}),
    "coded": ({"code": 3}, {"padding": 1, "activation": "relu"}),
    "strided": ({"shape": (2, 6, 11, 13)}, {"stride": (2, 3), "padding": 1}),
    "grouped": ({"groups": 2, "out": 4}, {"groups": 2, "padding": 1}),
    "depthwise": ({"groups": 6, "out": 6}, {"groups": 6, "padding": 1, "activation": "relu"}),
    "one pixel": ({"shape": (3, 6, 1, 1)}, {"padding": 1}),
    "one pixel of output": ({"shape": (3, 6, 3, 3)}, {}),
    "1x1": ({"kernel": 1, "shape": (2, 16, 20, 21)}, {"activation": "relu"}),
    "wide": ({"shape": (1, 3, 4, 700), "out": 33}, {"padding": 1}),
    "many channels": ({"shape": (2, 40, 14, 14), "out": 70}, {"padding": 1, "activation": "relu"}),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("cpu_backend")
def test_output_and_its_mean(case, dtype, channels_last):
    torch.manual_seed(0)
    shapes, options = CASES[case]
    named = inputs(**shapes, dtype=dtype)
    if channels_last:
        named["x"] = named["x"].contiguous(memory_format=torch.channels_last)
    y, mean = call(named, **options)
    assert torch.equal(y, ddrf_fast.dynamic_conv(**named, **options))
    assert y.stride() == ddrf_fast.dynamic_conv(**named, **options).stride()
    assert mean.dtype == dtype
    assert mean.is_contiguous()
    with ddrf_fast.use_backend("reference"):
        exact = ddrf_fast.dynamic_conv(**{n: t.double() for n, t in named.items()}, **options)
    assert_accurate(mean, exact.mean((2, 3)), lowprec=y.mean((2, 3)))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(1, 30), st.integers(1, 40)),
    out=st.integers(1, 40),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    activation=st.sampled_from([None, "relu", "leaky_relu"]),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, out, kernel, stride, activation, channels_last, dtype):
    named = inputs(shape, out, kernel=kernel, dtype=dtype)
    if channels_last:
        named["x"] = named["x"].contiguous(memory_format=torch.channels_last)
    options = {"padding": kernel // 2, "stride": stride, "activation": activation}
    y, mean = call(named, **options)
    assert mean.shape == y.shape[:2]
    if y.numel():  # each pixel may have been rounded after the mean was taken
        assert max_error(mean, y.double().mean((2, 3))) <= FLOOR[dtype] * float(y.abs().max())


@pytest.mark.usefixtures("cpu_backend")
def test_any_strides_are_taken():
    named = inputs(shape=(3, 6, 7, 8))
    expected = call(named, padding=1)
    views = [
        named["x"].permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        torch.cat((named["x"], named["x"]), dim=1)[:, :6],
    ]
    for x in views:
        torch.testing.assert_close(call({**named, "x": x}, padding=1), expected)
    one = {**named, "x": named["x"][:1].expand(3, -1, -1, -1)}
    torch.testing.assert_close(call(one, padding=1), call({**one, "x": one["x"].contiguous()}, padding=1))


def test_same_bits_whatever_the_number_of_threads():
    many = [
        inputs(shape, 40, dtype=torch.float32) for shape in ((1, 16, 90, 91), (9, 3, 30, 40), (2, 64, 7, 7))
    ]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([call(named, padding=1) for named in many])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for (y, mean), (y_other, mean_other) in zip(results[0], others, strict=True):
            assert torch.equal(y, y_other)
            assert torch.equal(mean, mean_other)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_to_second_order(activation):
    linear = functools.partial(ddrf_fast.dynamic_conv, padding=1)
    named = off_the_kink(lambda: inputs((2, 3, 5, 4), 4, code=2), linear)

    def run(*tensors):
        return call(dict(zip(named, tensors, strict=True)), padding=1, activation=activation)

    assert torch.autograd.gradcheck(run, tuple(named.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(named.values()), fast_mode=True)


@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "expanded"])
def test_opcheck(layout, batch):
    named = inputs((batch, 4, 7, 10), 6, code=2, dtype=torch.float32)
    x = named["x"]
    named["x"] = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "expanded": x[:1].expand_as(x),
    }[layout]
    opcheck(torch.ops.ddrf_fast.dynamic_conv_mean.default, raw_arguments(named, "relu", stride=2))


def test_vmap_and_torch_func():
    named = inputs()
    many = torch.stack([named["x"] * s for s in (1.0, 0.5, -2.0)], dim=1)
    banks = torch.stack([named["weight"], named["weight"].flip(0)])
    for function in (lambda n: call(n, padding=1), raw):  # the raw one as in an exported program
        each = [function({**named, "x": x}) for x in many.unbind(1)]
        expected = tuple(map(torch.stack, zip(*each, strict=True)))
        found = torch.vmap(lambda x, f=function: f({**named, "x": x}), in_dims=1)(many)
        torch.testing.assert_close(found, expected)
        each = [function({**named, "weight": bank}) for bank in banks]
        expected = tuple(map(torch.stack, zip(*each, strict=True)))
        found = torch.vmap(lambda bank, f=function: f({**named, "weight": bank}))(banks)
        torch.testing.assert_close(found, expected)

    def loss(x):
        y, mean = call({**named, "x": x}, padding=1, activation="relu")
        return y.square().sum() + mean.cos().sum()

    x = named["x"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(named["x"]), expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast(gradients):
    named = {name: t.requires_grad_(gradients) for name, t in inputs(dtype=torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, mean = call(named, padding=1)
        low = raw({name: t.detach() for name, t in named.items()})
    assert {y.dtype, mean.dtype, low[0].dtype, low[1].dtype} == {torch.bfloat16}
    torch.testing.assert_close(mean.float(), y.float().mean((2, 3)), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("gradients", [False, True])
def test_compiles_whole_with_free_batch_and_size(gradients):
    torch._dynamo.reset()
    run = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")

    def compare(shape):
        named = inputs(shape, code=3, dtype=torch.float32)
        for t in named.values():
            t.requires_grad_(gradients)
        found, expected = (f(named, padding=1, activation="relu") for f in (run, call))
        torch.testing.assert_close(found, expected)
        if gradients:
            ours, theirs = (
                torch.autograd.grad(y.sin().sum() + mean.cos().sum(), list(named.values()))
                for y, mean in (found, expected)
            )
            torch.testing.assert_close(ours, theirs)

    compare((12, 6, 17, 19))
    with torch.compiler.set_stance("fail_on_recompile"):
        compare((14, 6, 21, 15))
        compare((15, 6, 16, 13))


class Chain(torch.nn.Module):
    """Three dynamic layers in a row; `chained` hands the means on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = DynamicConv2d(3, 8, 3, padding=1, activation="relu", code_channels=2)
        self.second = DynamicConv2d(8, 8, 3, padding=1, activation="relu", average=True, num_kernels=3)
        self.third = DynamicConv2d(8, 5, 1, code_channels=2, average=True)

    def forward(self, x: Tensor, code: Tensor, chained: bool = True) -> Tensor:
        if not chained:
            return self.third(self.second(self.first(x, code)), code)
        x, mean = self.first(x, code, return_mean=True)
        x, mean = self.second(x, pooled=mean, return_mean=True)
        return self.third(x, code, pooled=mean)


class Operators(TorchDispatchMode):
    """Lists what is called, with the number of dimensions of the first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], Tensor):
            self.calls.append((str(function), args[0].dim()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("map_of_codes", [False, True])
def test_a_chain_of_layers_pools_once(map_of_codes):
    torch.manual_seed(0)
    net, x = Chain(), torch.randn(2, 3, 9, 10)
    code = torch.randn(2, 2, 3, 4) if map_of_codes else torch.randn(2, 2)
    expected = net(x, code, chained=False)
    torch.testing.assert_close(net(x, code), expected)  # where gradients are recorded
    with torch.no_grad(), Operators() as seen:
        found = net(x, code)
    torch.testing.assert_close(found, expected)
    if not map_of_codes:  # a layer is two launches
        assert seen.calls == [
            ("ddrf_fast.route.default", 4),
            ("ddrf_fast.dynamic_conv_mean.default", 4),
            ("ddrf_fast.route.default", 2),
            ("ddrf_fast.dynamic_conv_mean.default", 4),
            ("ddrf_fast.route.default", 2),
            ("ddrf_fast.dynamic_conv.default", 4),
        ]
    grads = [
        torch.autograd.grad(net(x, code, chained).square().sum(), list(net.parameters()))
        for chained in (False, True)
    ]
    torch.testing.assert_close(*grads)


def test_a_chain_exports_and_compiles():
    net = Chain().eval().requires_grad_(False)
    dim = torch.export.Dim
    shapes = {0: dim("batch"), 2: dim("height"), 3: dim("width")}
    example = torch.rand(3, 3, 8, 9), torch.rand(3, 2)
    program = torch.export.export(net, example, dynamic_shapes=(shapes, {0: shapes[0]}))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"ddrf_fast.route.default", "ddrf_fast.dynamic_conv_mean.default"} <= targets
    x, code = torch.rand(5, 3, 11, 7), torch.rand(5, 2)
    torch.testing.assert_close(program.module()(x, code), net(x, code))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, code), net(x, code))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(*example), net(*example))


def test_the_network_reads_nothing_again_for_an_attention():
    torch.manual_seed(0)
    net = DDRFNet(DDRFNetConfig(width=8, blocks=2, num_kernels=4)).eval()
    images = torch.rand(1, 1, 14, 18), torch.rand(1, 1, 14, 18)
    expected = net(*images)
    with torch.no_grad(), Operators() as seen:
        found = net(*images)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    routes = [dim for name, dim in seen.calls if name == "ddrf_fast.route.default"]
    assert len(routes) == sum(isinstance(module, DynamicConv2d) for module in net.modules())
    assert routes.count(4) == 2  # the images alone


def test_fallback_composes_where_there_is_no_fused_kernel():
    from ddrf_fast.ops.dynamic_conv import _mean

    named = inputs(dtype=torch.float32)
    y, mean = _mean(*raw_arguments(named))
    torch.testing.assert_close(mean, F.adaptive_avg_pool2d(y, 1).flatten(1))
    torch.testing.assert_close((y, mean), raw(named))
