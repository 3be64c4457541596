"""dynamic_conv and sample_conv2d against their definition, sample by sample with F.conv2d in float64."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FLOOR, assert_accurate, off_the_kink
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ddrf_fast
import ddrf_fast.flops

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = ("in_scale", "out_scale", "tap_scale")


def definition(
    x, weight, attention, bias=None, *, code=None, in_scale=None, out_scale=None, tap_scale=None, **conv
):
    """Eq. 6, one sample after the other."""
    activation = conv.pop("activation", None)
    results = []
    for b in range(x.shape[0]):
        mixed, beta = 0, None if bias is None else 0
        for k in range(weight.shape[0]):
            share = attention[b, k]  # a number, or one for each output channel
            mixed = mixed + (share[:, None, None, None] if share.dim() else share) * weight[k]
            beta = beta if bias is None else beta + share * bias[k]
        sample = x[b]
        if in_scale is not None:
            channels = torch.ones(mixed.shape[1] * conv.get("groups", 1), dtype=x.dtype)
            channels[: x.shape[1]] = in_scale[b]
            per_group = channels.view(conv.get("groups", 1), -1)
            per_output = mixed.shape[0] // conv.get("groups", 1)
            mixed = mixed * per_group.repeat_interleave(per_output, 0)[:, :, None, None]
        if out_scale is not None:
            mixed = mixed * out_scale[b][:, None, None, None]
        if tap_scale is not None:
            mixed = mixed * tap_scale[b]
        if code is not None:
            sample = torch.cat((sample, code[b][:, None, None].expand(-1, *sample.shape[1:])))
        results.append(F.conv2d(sample[None], mixed, beta, **conv))
    y = torch.cat(results)
    return {None: y, "relu": F.relu(y), "leaky_relu": F.leaky_relu(y, 0.01)}[activation]


def inputs(
    batch=2, channels=6, out=4, bank=3, kernel=(3, 3), size=(7, 8), groups=1, code=0, per_channel=False
):
    """Fresh random tensors of the operation, float64, by name; those that are optional are all there."""

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64)

    named = {
        "x": normal(batch, channels, *size),
        "weight": normal(bank, out, (channels + code) // groups, *kernel),
        "attention": normal(batch, bank, out) if per_channel else normal(batch, bank),
        "bias": normal(bank, out),
        "in_scale": normal(batch, channels),
        "out_scale": normal(batch, out),
        "tap_scale": normal(batch, *kernel),
    }
    if code:
        named["code"] = normal(batch, code)
    return named


CASES = {
    "plain": ({}, {}),
    "padded": ({}, {"padding": 1}),
    "per output channel": ({"per_channel": True}, {"padding": 1}),
    "strided": ({"size": (9, 10)}, {"stride": (2, 3), "padding": (0, 2)}),
    "dilated": ({"size": (9, 10)}, {"dilation": (2, 1), "padding": 2}),
    "grouped": ({"groups": 2}, {"groups": 2, "padding": 1}),
    "depthwise": ({"channels": 4, "groups": 4}, {"groups": 4, "padding": 1}),
    "1x1": ({"kernel": (1, 1)}, {}),
    "rectangular": ({"kernel": (3, 5)}, {"padding": (1, 2)}),
    "even": ({"kernel": (2, 4)}, {"padding": 1}),
    "coded": ({"code": 3}, {"padding": 1}),
    "coded, strided": ({"code": 3, "size": (8, 7)}, {"padding": 2, "stride": 2}),
    "one of each": ({"batch": 1, "channels": 1, "out": 1, "bank": 1, "size": (1, 1)}, {"padding": 1}),
    "relu": ({}, {"activation": "relu"}),
    "leaky_relu": ({}, {"activation": "leaky_relu", "padding": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_is_its_definition(case):
    shapes, options = CASES[case]
    named = inputs(**shapes)
    assert_accurate(ddrf_fast.dynamic_conv(**named, **options), definition(**named, **options))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_errs_as_little_as_torch(dtype, channels_last):
    named = {k: v.to(dtype) for k, v in inputs(channels=32, out=24, size=(12, 11), code=5).items()}
    if channels_last:
        named["x"] = named["x"].contiguous(memory_format=torch.channels_last)
    y = ddrf_fast.dynamic_conv(**named, padding=1)
    exact = definition(**{k: v.double() for k, v in named.items()}, padding=1)
    assert_accurate(y, exact, lowprec=definition(**named, padding=1))
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_float32_are_not_rounded_in_half_precision(dtype):
    named = {k: v.to(dtype) for k, v in inputs(channels=32, out=24, size=(12, 11), code=5).items()}
    named |= {k: torch.randn(named[k].shape).requires_grad_() for k in SCALES}
    y = ddrf_fast.dynamic_conv(**named, padding=1)
    exact = {k: v.detach().double().requires_grad_() for k, v in named.items()}
    expected = definition(**exact, padding=1)
    assert_accurate(y, expected, floor=FLOOR[dtype])
    cotangent = torch.randn(y.shape).to(dtype)
    grads = torch.autograd.grad(y, [named[k] for k in SCALES], cotangent)
    wanted = torch.autograd.grad(expected, [exact[k] for k in SCALES], cotangent.double())
    for grad, right in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert_accurate(grad, right, floor=FLOOR[dtype])
    with torch.autocast("cpu", dtype):
        y = ddrf_fast.dynamic_conv(**named | {"x": named["x"].float()}, padding=1)
    assert y.dtype == dtype
    assert_accurate(y, expected, floor=2 * FLOOR[dtype])


@pytest.mark.parametrize(
    "case", ["coded, strided", "per output channel", "grouped", "depthwise", "leaky_relu", "dilated"]
)
def test_gradients_to_second_order(case):
    shapes, options = CASES[case]
    linear = functools.partial(ddrf_fast.dynamic_conv, **options | {"activation": None})
    named = off_the_kink(lambda: inputs(**shapes), linear)

    def run(*tensors):
        return ddrf_fast.dynamic_conv(**dict(zip(named, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(run, tuple(named.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(named.values()), fast_mode=True)


@pytest.mark.parametrize(
    "wanted", ["x", "weight", "attention", "bias", "code", "in_scale", "out_scale", "tap_scale"]
)
def test_each_gradient_alone(wanted):
    named = inputs(code=2)
    named[wanted].requires_grad_()
    ours = torch.autograd.grad(ddrf_fast.dynamic_conv(**named, padding=1).square().sum(), named[wanted])
    theirs = torch.autograd.grad(definition(**named, padding=1).square().sum(), named[wanted])
    assert_accurate(ours[0], theirs[0], floor=1e-12)


def test_sample_conv2d_is_a_convolution_for_each_sample():
    x, weight, bias = torch.randn(3, 4, 6, 5), torch.randn(3, 6, 2, 3, 3), torch.randn(3, 6)
    y = ddrf_fast.sample_conv2d(x, weight, bias, groups=2, padding="same", activation="relu")
    each = [F.relu(F.conv2d(x[b : b + 1], weight[b], bias[b], groups=2, padding="same")) for b in range(3)]
    torch.testing.assert_close(y, torch.cat(each))
    tensors = tuple(t.double().requires_grad_() for t in (x, weight, bias))
    run = lambda *t: ddrf_fast.sample_conv2d(*t, groups=2, padding=1)  # noqa: E731
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_code_is_constant_channels_that_are_never_made():
    named = inputs(code=4)
    del named["in_scale"]
    code = named.pop("code")
    stretched = torch.cat((named["x"], code[:, :, None, None].expand(-1, -1, 7, 8)), dim=1)
    plain = ddrf_fast.dynamic_conv(**{**named, "x": stretched}, padding=2)
    assert_accurate(ddrf_fast.dynamic_conv(**named, code=code, padding=2), plain)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [(3, 5), (2, 4), (1, 2), (4, 3)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_strings_are_those_of_torch(padding, kernel, layout):
    options = {"padding": padding, "dilation": (2, 1)}
    named = inputs(kernel=kernel, code=2)
    named["x"] = named["x"].contiguous(memory_format=layout)
    leaves = [t.requires_grad_() for t in named.values()]
    expected = definition(**named, **options)
    cotangent = torch.randn_like(expected)
    found = ddrf_fast.dynamic_conv(**named, **options, return_mean=True)
    ours, theirs = (torch.autograd.grad(y, leaves, cotangent) for y in (found[0], expected))
    for ours_of, theirs_of in zip(ours, theirs, strict=True):
        assert_accurate(ours_of, theirs_of, floor=1e-12)
    with torch.no_grad():
        without_gradients = ddrf_fast.dynamic_conv(**named, **options, return_mean=True)
    for y, mean in (found, without_gradients):
        assert y.is_contiguous(memory_format=layout)
        assert_accurate(y, expected)
        assert_accurate(mean, expected.mean((2, 3)))
    x, weight = named["x"], torch.randn(2, 4, 6, *kernel).double()
    each = [F.conv2d(x[b : b + 1], weight[b], **options) for b in range(2)]
    assert_accurate(ddrf_fast.sample_conv2d(x, weight, **options), torch.cat(each))


def test_empty_batch_gives_empty_output_and_zero_gradients():
    named = {k: v.requires_grad_() for k, v in inputs(batch=0).items()}
    y = ddrf_fast.dynamic_conv(**named, padding=1)
    assert y.shape == (0, 4, 7, 8)
    y.sum().backward()
    assert not named["weight"].grad.any()
    assert named["x"].grad.shape == (0, 6, 7, 8)


def test_any_strides_are_taken():
    named = inputs(batch=3)
    expected = definition(**named, padding=1)
    views = dict(named)
    views["x"] = named["x"].permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    views["weight"] = named["weight"].flip(0).flip(0).transpose(1, 2).contiguous().transpose(1, 2)
    views["attention"] = named["attention"].t().contiguous().t()
    assert_accurate(ddrf_fast.dynamic_conv(**views, padding=1), expected)
    sliced = {**named, "x": torch.cat((named["x"], named["x"]), dim=1)[:, :6]}
    assert_accurate(ddrf_fast.dynamic_conv(**sliced, padding=1), expected)
    shared = {**named, "attention": named["attention"][:1].expand(3, -1)}
    assert_accurate(ddrf_fast.dynamic_conv(**shared), definition(**shared))


def test_numbers_of_numpy_are_taken():
    x, weight, attention = torch.rand(2, 3, 7, 7), torch.rand(2, 4, 3, 3, 3), torch.rand(2, 2)
    y = ddrf_fast.dynamic_conv(x, weight, attention, padding=np.int64(1), stride=(np.int32(2), 1))
    assert torch.equal(y, ddrf_fast.dynamic_conv(x, weight, attention, padding=1, stride=(2, 1)))


def _square_sum(x: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 4 * 3 * 9).view(1, 4, 3, 3, 3)
    return ddrf_fast.dynamic_conv(x, weight, x.new_ones(len(x), 1), activation="relu").square().sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_may_be_checkpointed(reentrant):
    x = torch.randn(2, 3, 7, 7, requires_grad=True)
    (expected,) = torch.autograd.grad(_square_sum(x), x)
    checkpoint(_square_sum, x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.vmap, lambda f: torch.func.vmap(torch.func.grad(f))]
)
def test_transforms_compile(transform):
    x = torch.randn(3, 2, 3, 7, 7)[0] if transform is torch.func.grad else torch.randn(3, 2, 3, 7, 7)
    compiled = torch.compile(lambda x: transform(_square_sum)(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), transform(_square_sum)(x), rtol=1e-4, atol=1e-4)


def test_shapes_without_memory():
    with ddrf_fast.use_backend("auto"), torch.device("meta"):
        x, weight, attention = torch.rand(2, 3, 7, 7), torch.rand(2, 4, 3, 3, 3), torch.rand(2, 2)
        assert ddrf_fast.dynamic_conv(x, weight, attention).shape == (2, 4, 5, 5)
        even = weight[..., 1:]
        assert ddrf_fast.dynamic_conv(x, even, attention, padding="same").shape == (2, 4, 7, 7)
        assert ddrf_fast.degrade(x, torch.rand(2, 3, 3), torch.rand(2, 2)).shape == x.shape
        assert ddrf_fast.route(x, None, None, torch.rand(4, 3), None).shape == (2, 4)


def test_two_runs_give_the_same_bits():
    named = {k: v.float().requires_grad_() for k, v in inputs(batch=3, channels=16, out=16).items()}

    def run() -> list[Tensor]:
        y = ddrf_fast.dynamic_conv(**named, padding=1)
        return [y, *torch.autograd.grad(y.sin().sum(), list(named.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_only_the_inputs_are_saved_for_the_backward():
    named = {k: v.requires_grad_() for k, v in inputs().items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ddrf_fast.dynamic_conv(**named, padding=1)
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in named.values()}
        saved.clear()
        y = ddrf_fast.dynamic_conv(**named, padding=1, activation="relu")
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (*named.values(), y)}


WRONG = {
    "x must be a Tensor": ({"x": [1, 2]}, TypeError),
    r"x must be \[B, I, H, W\], got shape \(6, 7, 8\)": ({"x": torch.rand(6, 7, 8)}, ValueError),
    "x must be one of float32, float64, bfloat16, float16, got int64": (
        {"x": torch.ones(2, 6, 7, 8, dtype=torch.int64)},
        TypeError,
    ),
    r"weight must be \[N, O, I/g, kh, kw\], got shape": ({"weight": torch.rand(4, 6, 3, 3)}, ValueError),
    "weight must be on the device of x, cpu, got meta": (
        {"weight": torch.rand(3, 4, 6, 3, 3, device="meta")},
        ValueError,
    ),
    "attention must be a Tensor": (
        {"attention": None, "weight": torch.rand(2, 4, 6, 3, 3), "bias": torch.rand(2, 4)},
        TypeError,
    ),
    "bias must be a Tensor": ({"bias": [1.0]}, TypeError),
    "weight expects 5 input channels .* but x has 6": ({"weight": torch.rand(3, 4, 5, 3, 3)}, ValueError),
    "weight must hold at least one kernel": (
        {"weight": torch.rand(0, 4, 6, 3, 3), "attention": torch.rand(2, 0), "bias": None},
        ValueError,
    ),
    "weight must have no empty dimension": (
        {"weight": torch.rand(3, 0, 6, 3, 3), "bias": torch.rand(3, 0), "out_scale": None},
        ValueError,
    ),
    r"attention must be \[B, N\] = \(2, 3\), got shape \(2, 5\)": (
        {"attention": torch.rand(2, 5)},
        ValueError,
    ),
    r"attention must be \[B, N, O\] = \(2, 3, 4\)": ({"attention": torch.rand(2, 3, 5)}, ValueError),
    "attention must have the dtype of x": ({"attention": torch.rand(2, 3).double()}, TypeError),
    "attention must be on the device of x, cpu, got meta": (
        {"attention": torch.rand(2, 3, device="meta")},
        ValueError,
    ),
    r"bias must be \[N, O\] = \(3, 4\), got shape \(4, 3\)": ({"bias": torch.rand(4, 3)}, ValueError),
    r"code must be \[B, D\]": ({"code": torch.rand(2, 3, 1)}, ValueError),
    "but x has 6 and code 3": ({"code": torch.rand(2, 3)}, ValueError),
    r"in_scale must be \[B, I\]": ({"in_scale": torch.rand(2, 7)}, ValueError),
    r"out_scale must be \[B, O\]": ({"out_scale": torch.rand(1, 4)}, ValueError),
    r"tap_scale must be \[B, kh, kw\]": ({"tap_scale": torch.rand(2, 9)}, ValueError),
    "out_scale must have the dtype of x": ({"out_scale": torch.rand(2, 4).double()}, TypeError),
    "out_scale must be on the device of x": ({"out_scale": torch.rand(2, 4, device="meta")}, ValueError),
    "stride must be at least 1, got 0": ({"stride": 0}, ValueError),
    "stride must be an int or two ints, got 1.5": ({"stride": 1.5}, TypeError),
    r"stride must be an int or two ints, got \(True, 1\)": ({"stride": (True, 1)}, TypeError),
    "dilation must be an int or two ints, got True": ({"dilation": True}, TypeError),
    "padding must be at least 0": ({"padding": (-1, 0)}, ValueError),
    'padding must be an int, two ints, "same" or "valid", got \'full\'': ({"padding": "full"}, ValueError),
    'padding="same" needs stride 1': ({"padding": "same", "stride": 2}, ValueError),
    "groups must divide the 6 input and the 4 output channels, got 4": ({"groups": 4}, ValueError),
    "groups must be at least 1": ({"groups": 0}, ValueError),
    "groups must be an int": ({"groups": 2.0}, TypeError),
    "code needs groups=1": ({"code": torch.rand(2, 3), "groups": 2}, ValueError),
    "activation must be None, 'relu' or 'leaky_relu', got 'gelu'": ({"activation": "gelu"}, ValueError),
    "activation must be None, .* got 'none'": ({"activation": "none"}, ValueError),
    "does not fit into x of": ({"x": torch.rand(2, 6, 2, 8)}, ValueError),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    change, error = WRONG[message]
    named = {k: v.float() for k, v in inputs().items()} | change
    with pytest.raises(error, match=message):
        ddrf_fast.dynamic_conv(**named)


def test_sample_conv2d_names_wrong_arguments():
    x = torch.rand(2, 3, 5, 5)
    with pytest.raises(ValueError, match="weight must hold one kernel for each of the 2 samples, got 3"):
        ddrf_fast.sample_conv2d(x, torch.rand(3, 4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"bias must be \[B, O\] = \(2, 4\)"):
        ddrf_fast.sample_conv2d(x, torch.rand(2, 4, 3, 3, 3), torch.rand(4, 2))
    with pytest.raises(TypeError, match="weight must be a Tensor"):
        ddrf_fast.sample_conv2d(x, None)


def test_operations_are_counted():
    x, weight, attention, grad = (
        torch.rand(shape) for shape in ((2, 8, 9, 9), (3, 6, 8, 3, 3), (2, 3), (2, 6, 7, 7))
    )
    convolution, mixing = 2 * 2 * 6 * 7 * 7 * 8 * 9, 2 * 2 * 3 * 6 * 8 * 9
    arguments = (x, weight, attention, None, None, None, None, None, [1, 1], [0, 0], [1, 1], 1)
    operators = torch.ops.ddrf_fast

    def count(operator, *arguments):
        with FlopCounterMode(display=False) as counter:
            operator(*arguments)
        return counter.get_total_flops()

    for operator in (operators.dynamic_conv, operators.dynamic_conv_mean):
        assert count(operator, *arguments, "none") == convolution + mixing
    of_inputs, of_kernels = convolution + mixing, convolution + 2 * mixing
    for mask, expected in ((1, of_inputs), (2, convolution + mixing), (7, of_inputs + of_kernels), (0, 0)):
        assert count(operators.dynamic_conv_backward, grad, *arguments, mask) == expected
