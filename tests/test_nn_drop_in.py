"""The drop-in modules against the originals, which are written out here as grouped convolutions.

Each original has the class name, constructor and parameter names of the published one; what it computes is
written anew from the papers' equations: a kernel for every sample, and one convolution with the batch as
groups.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate
from torch import nn

import ddrf_fast.nn as fast


def grouped(x, kernels, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """One convolution of x [B, I, H, W] with kernels [B, O, I/g, kh, kw]: the batch becomes groups."""
    batch = x.shape[0]
    y = F.conv2d(
        x.flatten(0, 1)[None],
        kernels.flatten(0, 1),
        None if bias is None else bias.flatten(),
        stride,
        padding,
        dilation,
        groups * batch,
    )
    return y[0].unflatten(0, (batch, kernels.shape[1]))


class CondConv2d(nn.Module):
    """timm's."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=3,
        stride=1,
        padding="",
        dilation=1,
        groups=1,
        bias=False,
        num_experts=4,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.num_experts = num_experts
        self.kernel_size, self.stride, self.dilation = (
            v if isinstance(v, tuple) else (v, v) for v in (kernel_size, stride, dilation)
        )
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        self.dynamic_padding = padding == "same" and (self.stride != (1, 1) or any(r % 2 for r in reach))
        if padding == "valid" or self.dynamic_padding:
            padding = 0
        if isinstance(padding, str):
            padding = tuple((s - 1 + r) // 2 for s, r in zip(self.stride, reach, strict=True))
        self.padding = padding if isinstance(padding, tuple) else (padding, padding)
        self.weight_shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.randn(num_experts, math.prod(self.weight_shape)) / 4)
        self.register_parameter(
            "bias", nn.Parameter(torch.randn(num_experts, out_channels)) if bias else None
        )

    def forward(self, x, routing_weights):
        if self.dynamic_padding:
            sides = []
            for i in (1, 0):  # width first, as F.pad wants it
                covered = (math.ceil(x.shape[2 + i] / self.stride[i]) - 1) * self.stride[i]
                covered += self.dilation[i] * (self.kernel_size[i] - 1) + 1
                missing = max(covered - x.shape[2 + i], 0)
                sides += [missing // 2, missing - missing // 2]
            x = F.pad(x, sides)
        kernels = (routing_weights @ self.weight).unflatten(1, self.weight_shape)
        bias = None if self.bias is None else routing_weights @ self.bias
        return grouped(x, kernels, bias, self.stride, self.padding, self.dilation, self.groups)


class attention2d(nn.Module):
    def __init__(self, in_planes, ratios, K, temperature):
        super().__init__()
        hidden = K if in_planes == 3 else int(in_planes * ratios) + 1
        self.fc1 = nn.Conv2d(in_planes, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, K, 1)
        self.temperature = temperature

    def forward(self, x):
        hidden = self.fc1(F.adaptive_avg_pool2d(x, 1)).relu()
        return (self.fc2(hidden)[:, :, 0, 0] / self.temperature).softmax(1)


class Dynamic_conv2d(nn.Module):
    """kaijieshi7's."""

    def __init__(
        self,
        in_planes,
        out_planes,
        kernel_size,
        ratio=0.25,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        K=4,
        temperature=34,
    ):
        super().__init__()
        self.in_planes, self.out_planes, self.kernel_size = in_planes, out_planes, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.K = K
        self.attention = attention2d(in_planes, ratio, K, temperature)
        self.weight = nn.Parameter(torch.randn(K, out_planes, in_planes // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.randn(K, out_planes)) if bias else None

    def update_temperature(self):
        if self.attention.temperature != 1:
            self.attention.temperature -= 3

    def forward(self, x):
        attention = self.attention(x)
        kernels = (attention @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        bias = None if self.bias is None else attention @ self.bias
        return grouped(x, kernels, bias, self.stride, self.padding, self.dilation, self.groups)


class Attention(nn.Module):
    def __init__(self, in_planes, out_planes, kernel_size, groups, reduction, kernel_num):
        super().__init__()
        hidden = max(int(in_planes * reduction), 16)
        self.temperature = 1.0
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(in_planes, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU()
        self.channel_fc = nn.Conv2d(hidden, in_planes, 1)
        if not in_planes == groups == out_planes:
            self.filter_fc = nn.Conv2d(hidden, out_planes, 1)
        if kernel_size > 1:
            self.spatial_fc = nn.Conv2d(hidden, kernel_size**2, 1)
        if kernel_num > 1:
            self.kernel_fc = nn.Conv2d(hidden, kernel_num, 1)

    def forward(self, x):
        return self.relu(self.bn(self.fc(self.avgpool(x))))


class ODConv2d(nn.Module):
    """OSVAI's."""

    def __init__(
        self,
        in_planes,
        out_planes,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        reduction=0.0625,
        kernel_num=4,
    ):
        super().__init__()
        self.in_planes, self.out_planes, self.kernel_size = in_planes, out_planes, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.kernel_num = kernel_num
        self.attention = Attention(in_planes, out_planes, kernel_size, groups, reduction, kernel_num)
        self.weight = nn.Parameter(
            torch.randn(kernel_num, out_planes, in_planes // groups, kernel_size, kernel_size)
        )

    def update_temperature(self, temperature):
        self.attention.temperature = temperature

    def forward(self, x):
        hidden, batch = self.attention(x), x.shape[0]

        def head(name, *shape):
            if not hasattr(self.attention, name):
                return None
            return (getattr(self.attention, name)(hidden) / self.attention.temperature).view(batch, *shape)

        kernels = self.weight[None]
        if (taps := head("spatial_fc", 1, 1, 1, self.kernel_size, self.kernel_size)) is not None:
            kernels = kernels * taps.sigmoid()
        if (mix := head("kernel_fc", self.kernel_num, 1, 1, 1, 1)) is not None:
            kernels = kernels * mix.softmax(1)
        kernels = kernels.sum(1).expand(batch, *self.weight.shape[1:])
        x = x * head("channel_fc", self.in_planes, 1, 1).sigmoid()
        y = grouped(x, kernels, None, self.stride, self.padding, self.dilation, self.groups)
        filters = head("filter_fc", self.out_planes, 1, 1)
        return y if filters is None else y * filters.sigmoid()


class EqualLinear(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))
        self.bias = nn.Parameter(torch.ones(out_dim))
        self.scale = in_dim**-0.5

    def forward(self, x):
        return x @ (self.scale * self.weight).T + self.bias


class ModulatedConv2d(nn.Module):
    """rosinality's."""

    def __init__(
        self,
        in_channel,
        out_channel,
        kernel_size,
        style_dim,
        demodulate=True,
        upsample=False,
        downsample=False,
    ):
        super().__init__()
        self.in_channel, self.out_channel, self.kernel_size = in_channel, out_channel, kernel_size
        self.upsample, self.downsample, self.demodulate = upsample, downsample, demodulate
        self.scale = (in_channel * kernel_size**2) ** -0.5
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.randn(1, out_channel, in_channel, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channel)

    def forward(self, x, style):
        kernels = self.scale * self.weight * self.modulation(style)[:, None, :, None, None]
        if self.demodulate:
            kernels = kernels / (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
        return grouped(x, kernels, padding=self.padding)


class DyNetConv2d(nn.Module):
    """The paper's: feature maps of all C_out * g kernels, then mixed."""

    def __init__(self, in_channels, out_channels, kernel_size, reduction=None, group_size=6, **options):
        super().__init__()
        self.predictor = fast.CoefficientPredictor(in_channels, group_size * out_channels, reduction)
        groups = options.get("groups", 1)
        self.weight = nn.Parameter(
            torch.randn(group_size, out_channels, in_channels // groups, kernel_size, kernel_size)
        )
        self.options = options

    def forward(self, x, coefficients=None):
        hidden = x.mean((2, 3))
        for layer in self.predictor.layers:
            hidden = hidden @ layer.weight.T + layer.bias
        if coefficients is None:
            coefficients = hidden.sigmoid().view(-1, *self.weight.shape[:2])
        return sum(
            coefficients[:, i, :, None, None] * F.conv2d(x, kernels, **self.options)
            for i, kernels in enumerate(self.weight)
        )


def results(module, inputs, dtype):
    """Output, gradients of inputs and parameters, and buffers afterwards, all in `dtype`, by name."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [i.detach().to(dtype).requires_grad_() for i in inputs]
    y = module(*inputs)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = {f"input {i}": value for i, value in enumerate(inputs)} | dict(module.named_parameters())
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent.to(dtype))
    answer = {"output": y} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return answer | {n: b for n, b in module.named_buffers() if b.is_floating_point()}


def assert_same(original, module, *inputs, layout=torch.contiguous_format):
    """Loads the state dict of each into the other, and compares all results in float64 and float32."""
    original.load_state_dict(copy.deepcopy(module).state_dict())  # fits; and back to the original's values
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.5)
    module.load_state_dict(original.state_dict())
    given = [i.contiguous(memory_format=layout) if i.dim() == 4 else i for i in inputs]
    expected = results(original, inputs, torch.float64)
    lowprec = results(original, inputs, torch.float32)
    for dtype in (torch.float64, torch.float32):
        actual = results(module, given, dtype)
        assert actual.keys() == expected.keys()
        assert actual["output"].is_contiguous(memory_format=layout)
        for name, value in actual.items():
            if dtype == torch.float64:
                assert_accurate(value, expected[name], floor=1e-12, name=name)
            else:
                assert_accurate(value, expected[name], lowprec[name], name=name)


layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- CondConv --------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("size", [(9, 12), (8, 11)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "groups": 2, "stride": 2},
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": "same", "bias": True},
        {"kernel_size": 5, "stride": 2, "padding": "same", "groups": 4, "out_channels": 4},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1), "padding": "same"},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": "valid", "num_experts": 1},
        {"kernel_size": (1, 3), "padding": (0, 2), "dilation": 2},
        {"kernel_size": 1, "stride": 2, "padding": "same"},
    ],
)
def test_condconv(options, size, layout):
    options = {"in_channels": 4, "out_channels": 6, **options}
    original, module = CondConv2d(**options), fast.CondConv2d(**options)
    assert module.dynamic_padding == original.dynamic_padding and module.padding == original.padding
    x, routing = torch.randn(3, 4, *size), torch.randn(3, module.num_experts)
    assert_same(original, module, x, routing, layout=layout)


def test_condconv_same_gives_the_size_of_tensorflow():
    for size in range(5, 12):
        for stride in (1, 2, 3):
            layer = fast.CondConv2d(2, 2, 4, stride, "same")
            assert layer(torch.randn(1, 2, size, 9), torch.rand(1, 4)).shape[2] == math.ceil(size / stride)


# --- Dynamic_conv2d --------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "groups": 2, "bias": False},
        {"in_planes": 4, "out_planes": 4, "groups": 4, "dilation": 2, "padding": 2},
        {"kernel_size": 1, "ratio": 0.5},
        {"in_planes": 3, "K": 2},
        {"K": 1},
    ],
)
def test_dyconv(options, batch, layout):
    options = {"in_planes": 4, "out_planes": 6, "kernel_size": 3, **options}
    original, module = Dynamic_conv2d(**options), fast.DyConv2d(**options)
    x = torch.randn(batch, module.in_planes, 9, 7)
    assert_same(original, module, x, layout=layout)
    original.update_temperature()
    module.update_temperature()
    assert_same(original, module, x, layout=layout)


def test_dyconv_temperature():
    layer = fast.DyConv2d(4, 4, 1)
    temperatures = [layer.attention.temperature]
    for _ in range(12):
        layer.update_temperature()
        temperatures.append(layer.attention.temperature)
    assert temperatures == [34, 31, 28, 25, 22, 19, 16, 13, 10, 7, 4, 1, 1]


def test_dyconv_is_annealed_once_by_a_loop_over_modules():
    model = torch.nn.Sequential(fast.DyConv2d(4, 4, 1))
    for module in model.modules():
        if hasattr(module, "update_temperature"):
            module.update_temperature()
    assert model[0].attention.temperature == 31


# --- ODConv ----------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "groups": 2, "padding": 1},
        {"in_planes": 4, "out_planes": 4, "groups": 4, "dilation": 2},  # no filter attention
        {"kernel_size": 1},  # no spatial attention
        {"kernel_num": 1},  # no kernel attention
        {"kernel_num": 1, "kernel_size": 1, "stride": 2},
        {"in_planes": 40, "reduction": 0.5},
    ],
)
def test_odconv(options, train, layout):
    options = {"in_planes": 4, "out_planes": 6, "kernel_size": 3, **options}
    original, module = ODConv2d(**options).train(train), fast.ODConv2d(**options).train(train)
    original.update_temperature(2.7)
    module.update_temperature(2.7)
    x = torch.randn(5, module.in_planes, 9, 7)
    assert_same(original, module, x, layout=layout)
    if not train:
        assert_same(original, module, x[:1], layout=layout)


def test_odconv_trains_with_one_sample():
    original, module = ODConv2d(4, 6, 3), fast.ODConv2d(4, 6, 3)
    x = torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        original(x)
    module(torch.randn(8, 4, 5, 5))  # statistics that differ from the initial ones
    before = copy.deepcopy(module.state_dict())
    y = module(x)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    torch.testing.assert_close(y, copy.deepcopy(module).eval()(x))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


# --- DyNet -----------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "groups": 2, "reduction": 2},
        {"in_channels": 6, "groups": 6, "dilation": 2, "padding": 2},
        {"kernel_size": 1, "group_size": 1},
    ],
)
def test_dynet(options, batch, layout):
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    x = torch.randn(batch, options["in_channels"], 9, 7)
    assert_same(DyNetConv2d(**options), fast.DyNetConv2d(**options), x, layout=layout)


def test_dynet_with_coefficients_from_outside():
    original, module = DyNetConv2d(4, 6, 3), fast.DyNetConv2d(4, 6, 3, predict=False)
    module.load_state_dict({"weight": original.weight.detach()})
    original.predictor = nn.Module()
    original.predictor.layers = []
    assert_same(original, module, torch.randn(2, 4, 5, 5), torch.randn(2, 6, 6))


# --- StyleGAN --------------------------------------------------------------------------------------------


def stylegan3_convolution(x, w, s, demodulate=True, padding=0, input_gain=None):
    """StyleGAN3's, with every sample's kernel in full."""
    if demodulate:
        w = w / w.square().mean((1, 2, 3), keepdim=True).sqrt()
        s = s / s.square().mean().sqrt()
    kernels = w * s[:, None, :, None, None]
    if demodulate:
        kernels = kernels / (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    if input_gain is not None:
        kernels = kernels * input_gain.expand(x.shape[:2])[:, None, :, None, None]
    return grouped(x, kernels.to(x.dtype), padding=padding)


class Calls(nn.Module):
    """A function of x, w, s (and a gain) as a module, for `results`."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, x, w, s, *gain):
        return self.function(x, w, s, input_gain=gain[0] if gain else None, **self.options)


@layouts
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_modulated_conv(demodulate, kernel_size, batch, layout):
    arguments = (4, 6, kernel_size, 5, demodulate)
    original, module = ModulatedConv2d(*arguments), fast.ModulatedConv2d(*arguments)
    x, style = torch.randn(batch, 4, 9, 7), torch.randn(batch, 5)
    assert_same(original, module, x, style, layout=layout)


@pytest.mark.parametrize("gain", [None, (), (4,), (3, 4)])
@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_conv2d_function(demodulate, gain):
    x, w, s = torch.randn(3, 4, 9, 7), torch.randn(6, 4, 3, 3), torch.randn(3, 4)
    inputs = [x, w, s] if gain is None else [x, w, s, torch.randn(gain)]
    options = {"demodulate": demodulate, "padding": (2, 1)}
    assert_same(Calls(stylegan3_convolution, **options), Calls(fast.modulated_conv2d, **options), *inputs)


def test_modulated_conv_without_affine_layer_takes_the_style_as_it_is():
    module = fast.ModulatedConv2d(4, 6, 3, padding=0)
    x, s = torch.randn(2, 4, 9, 7), torch.randn(2, 4)
    torch.testing.assert_close(module(x, s), fast.modulated_conv2d(x, module.weight[0], s))


def test_modulated_conv_of_zero_styles_is_zero():
    module = fast.ModulatedConv2d(4, 6, 3)
    s = torch.zeros(2, 4, requires_grad=True)
    y = module(torch.randn(2, 4, 5, 5), s)
    y.sum().backward()
    assert not y.any() and s.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_modulated_conv_does_not_overflow_float16(autocast):
    original, module = ModulatedConv2d(8, 6, 3, 5), fast.ModulatedConv2d(8, 6, 3, 5)
    with torch.no_grad():
        original.modulation.bias.mul_(1000)
        original.weight.mul_(1000)
    module.load_state_dict(original.state_dict())
    x, style = torch.randn(2, 8, 9, 7), 1000 * torch.randn(2, 5)
    expected = original.double()(x.double(), style.double())
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = module(x if autocast else x.half(), style)
    assert y.dtype == torch.float16
    assert_accurate(y, expected, floor=4e-3)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = fast.modulated_conv2d(x.half(), module.weight[0], module.modulation(style.float()), padding=1)
    assert_accurate(y, expected, floor=4e-3)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modulated_conv_errs_no_more_than_stylegan_in_half_precision(cpu_backend, dtype, demodulate):
    x, w, s, gain = torch.randn(3, 48, 9, 8), torch.randn(40, 48, 3, 3), torch.randn(3, 48), torch.randn(48)
    options = {"demodulate": demodulate, "padding": 1}

    def error(y, exact):
        assert y.dtype == dtype
        return (y - exact).square().mean().sqrt()

    exact = stylegan3_convolution(x.to(dtype).double(), w.double(), s.double(), input_gain=gain, **options)
    theirs = error(stylegan3_convolution(x.to(dtype), w, s, input_gain=gain, **options), exact)
    ours = error(fast.modulated_conv2d(x.to(dtype), w, s, input_gain=gain, **options), exact)
    assert ours < 1.02 * theirs  # the rest is chance

    module = fast.ModulatedConv2d(48, 40, 3, demodulate=demodulate)
    with torch.autocast("cpu", dtype):
        assert torch.equal(module(x, s), module(x.to(dtype), s))
    exact = module.double()(x.to(dtype).double(), s.double())
    theirs = error(
        stylegan3_convolution(x.to(dtype), module.scale * module.weight[0].float(), s, **options), exact
    )
    assert error(module.float()(x.to(dtype), s), exact) < 1.02 * theirs


def test_modulated_conv_of_styles_far_apart_does_not_underflow_float16(cpu_backend):
    x, w = torch.randn(2, 8, 6, 5), torch.randn(4, 8, 3, 3)
    s = torch.randn(2, 8) * torch.tensor([[1e3], [1e-3]])
    exact = stylegan3_convolution(x.half().double(), w.double(), s.double())
    assert_accurate(fast.modulated_conv2d(x.half(), w, s), exact, stylegan3_convolution(x.half(), w, s))


def test_modulated_conv2d_differentiates_twice():
    tensors = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 3, 3), (2, 2, 2, 2), (2, 2))
    ]
    assert torch.autograd.gradgradcheck(fast.modulated_conv2d, tensors)


# --- All of them -----------------------------------------------------------------------------------------

MODULES = {
    "condconv": (lambda: fast.CondConv2d(4, 6, 3, 2, "same", bias=True), [(4, 9, 8), (4,)]),
    "dyconv": (lambda: fast.DyConv2d(4, 6, 3, padding=1), [(4, 9, 8)]),
    "odconv": (lambda: fast.ODConv2d(4, 6, 3, padding=1), [(4, 9, 8)]),
    "dynet": (lambda: fast.DyNetConv2d(4, 6, 3), [(4, 9, 8)]),
    "modulated": (lambda: fast.ModulatedConv2d(4, 6, 3, 5), [(4, 9, 8), (5,)]),
}
every_module = pytest.mark.parametrize(("make", "shapes"), MODULES.values(), ids=MODULES)


class Traced(nn.Module):
    """A model of all of them, each with its optional arguments left out."""

    def __init__(self):
        super().__init__()
        self.dynamic = fast.DynamicConv2d(4, 4, 3)
        self.router = fast.Router(4, 4)
        for name, (make, _) in MODULES.items():
            setattr(self, name, make())

    def forward(self, x, style):
        x, mean = self.dynamic(x, return_mean=True)
        return (
            self.condconv(x, self.router(mean)),
            self.dyconv(x),
            self.odconv(x),
            self.dynet(x),
            self.modulated(x, style),
        )


def test_models_are_traced_symbolically():
    model = Traced().eval()
    traced = torch.fx.symbolic_trace(model)
    for batch, height in ((2, 11), (3, 16)):
        inputs = torch.randn(batch, 4, height, 9), torch.randn(batch, 5)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert all(map(torch.equal, traced(*inputs), model(*inputs)))
    sum(y.sum() for y in traced(*inputs)).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="x must have 4 channels"):
        traced(torch.randn(2, 3, 9, 9), torch.randn(2, 5))


@every_module
@pytest.mark.parametrize("train", [True, False])
def test_empty_batch(make, shapes, train):
    module = make().train(train)
    y = module(*(torch.randn(0, *shape) for shape in shapes))
    assert y.shape[:2] == (0, 6)
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@every_module
def test_autocast(make, shapes):
    module = make()
    inputs = [torch.randn(2, *shape) for shape in shapes]
    expected = copy.deepcopy(module).double()(*(i.double() for i in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(*inputs)
    assert y.dtype == torch.bfloat16
    assert_accurate(y, expected, floor=5e-2)


@every_module
def test_compiles_with_a_free_batch_and_size(make, shapes):
    module = make().eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, extra in ((2, 0), (3, 1), (5, 2), (4, 5)):
            inputs = [torch.randn(batch, *(n + extra * (i > 0) for i, n in enumerate(s))) for s in shapes]
            with torch.compiler.set_stance("fail_on_recompile" if extra else "default"):
                torch.testing.assert_close(compiled(*inputs), module(*inputs))


@pytest.mark.parametrize("name", ["dyconv", "odconv"])
def test_annealing_the_temperature_recompiles_once(name):
    module = MODULES[name][0]()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(2, 4, 9, 8)
    for step in range(6):
        module.attention.temperature = 30.0 - 3 * step
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            torch.testing.assert_close(compiled(x), module(x))


def test_kernels_are_initialised_one_by_one():
    condconv = fast.CondConv2d(32, 64, 3, bias=True, num_experts=8)
    bound = (32 * 9) ** -0.5
    for expert in condconv.weight:
        assert 0.98 * bound < expert.abs().max() <= bound
    assert condconv.bias.abs().max() <= bound
    for kernel in fast.DyConv2d(32, 64, 3, K=8).weight:
        assert kernel.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.02)
    for kernel in fast.ODConv2d(32, 64, 3, kernel_num=8).weight:
        assert kernel.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    mixture = fast.DyNetConv2d(32, 64, 3).weight.sum(0) / 2
    assert mixture.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.02)
    modulated = fast.ModulatedConv2d(32, 64, 3, 16)
    assert modulated.weight.std().item() == pytest.approx(1, rel=0.02)
    assert modulated.modulation.bias.eq(1).all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "layer",
    [
        fast.CondConv2d,
        fast.DyConv2d,
        fast.ODConv2d,
        fast.DyNetConv2d,
        fast.DynamicConv2d,
        fast.ModulatedConv2d,
        fast.Router,
        fast.CoefficientPredictor,
    ],
)
def test_every_layer_takes_device_and_dtype(layer, device):
    made = layer(4, 4, 3, device=device, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {(device, torch.bfloat16)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fast.CondConv2d(4, 6, groups=4), ValueError, "out_channels must be a multiple of groups=4"),
        (lambda: fast.CondConv2d(4, 6, padding="full"), ValueError, "padding must be .* got 'full'"),
        (lambda: fast.CondConv2d(4, 6, num_experts=0), ValueError, "num_experts must be at least 1, got 0"),
        (
            lambda: fast.CondConv2d(4, 6)(torch.ones(1, 4, 5, 5), torch.ones(1, 3)),
            ValueError,
            "routing_weights",
        ),
        (lambda: fast.DyConv2d(4, 6, 3, groups=3), ValueError, "in_planes must be a multiple of groups=3"),
        (lambda: fast.DyConv2d(4, 6, 3, temperature=30), ValueError, "temperature must be .* got 30"),
        (lambda: fast.DyConv2d(4, 6, (3, 3)), TypeError, "kernel_size must be an int"),
        (lambda: fast.ODConv2d(4, 6, 3, kernel_num=0), ValueError, "kernel_num must be at least 1"),
        (lambda: fast.ODConv2d(4, 6, 3).update_temperature(0), ValueError, "temperature must be positive"),
        (lambda: fast.DyNetConv2d(4, 6, 3, group_size=0), ValueError, "group_size must be at least 1"),
        (lambda: fast.DyNetConv2d(4, 6, 3, reduction=5), ValueError, "reduction must be at most"),
        (
            lambda: fast.DyNetConv2d(4, 6, 3, predict=False)(torch.ones(1, 4, 5, 5)),
            ValueError,
            "coefficients must be given",
        ),
        (
            lambda: fast.DyNetConv2d(4, 6, 3)(torch.ones(1, 4, 5, 5), torch.ones(1, 5, 6)),
            ValueError,
            r"coefficients must be \[B, group_size, out_channels\] = \(1, 6, 6\)",
        ),
        (lambda: fast.DyConv2d(4, 6, 3, stride=0), ValueError, "stride must be at least 1"),
        (lambda: fast.ODConv2d(4, 6, 3, padding=-1), ValueError, "padding must be at least 0"),
        (lambda: fast.DyNetConv2d(4, 6, 3, dilation=0), ValueError, "dilation must be at least 1"),
        (lambda: fast.ModulatedConv2d(4, 6, 3, padding=-1), ValueError, "padding must be at least 0"),
        (lambda: fast.DyConv2d(4, 6, 3)(torch.ones(1, 5, 5, 5)), ValueError, "x must have 4 channels"),
        (lambda: fast.ODConv2d(4, 6, 3)(torch.ones(1, 5, 5, 5)), ValueError, "x must have 4 channels"),
        (lambda: fast.DyNetConv2d(4, 6, 3)(torch.ones(1, 5, 5, 5)), ValueError, "x must have 4 channels"),
        (lambda: fast.CondConv2d(4, 6)(torch.ones(4, 5, 5), torch.ones(1, 4)), ValueError, "x must be"),
        (
            lambda: fast.ModulatedConv2d(4, 6, 3, style_dim=4)(torch.ones(2, 4, 5, 5), torch.ones(2, 5)),
            ValueError,
            r"style must be \[B, style_dim\] = \(2, 4\)",
        ),
        (lambda: fast.ModulatedConv2d(4, 0, 3), ValueError, "out_channels must be at least 1"),
        (lambda: fast.ModulatedConv2d(4, 6, 3, style_dim=0), ValueError, "style_dim must be at least 1"),
        (
            lambda: fast.ModulatedConv2d(4, 6, 3)(torch.ones(2, 4, 5, 5), torch.ones(2, 3)),
            ValueError,
            r"style must be \[B, I\] = \(2, 4\)",
        ),
        (
            lambda: fast.modulated_conv2d(torch.ones(2, 3, 5, 5), torch.ones(1, 4, 1, 1), torch.ones(2, 4)),
            ValueError,
            r"x must be \[B, I, H, W\]",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
