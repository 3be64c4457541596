"""Router and DynamicConv2d: the equation, the forms of a code, initialisation, gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate

from ddrf_fast.nn import DynamicConv2d, Router, anneal_temperature


def by_hand(layer, x, attention, code_map=None):
    """Eq. 6, sample by sample, in float64."""
    x, attention = x.double(), attention.double()
    if code_map is not None:
        x = torch.cat((x, code_map.double()), dim=1)
    outputs = []
    for sample, weights in zip(x, attention, strict=True):
        kernel = sum(weight * bank for weight, bank in zip(weights, layer.weight.double(), strict=True))
        bias = sum(weight * bank for weight, bank in zip(weights, layer.bias.double(), strict=True))
        if layer.average:
            kernel, bias = kernel / layer.num_kernels, bias / layer.num_kernels
        y = F.conv2d(sample[None], kernel, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        outputs.append(F.relu(y) if layer.activation == "relu" else y)
    return torch.cat(outputs)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1, "activation": "relu"},
        {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 2), "dilation": 2},
        {"kernel_size": 3, "groups": 2},
        {"kernel_size": (2, 4), "padding": "same", "activation": "relu"},
    ],
)
def test_equation(arguments, average):
    torch.manual_seed(0)
    layer = DynamicConv2d(4, 6, num_kernels=3, average=average, **arguments)
    torch.nn.init.normal_(layer.bias)
    x, attention = torch.randn(2, 4, 9, 8), torch.randn(2, 3)
    assert_accurate(layer(x, attention=attention), by_hand(layer, x, attention))
    assert_accurate(layer(x), by_hand(layer, x, layer.router(x)))


@pytest.mark.parametrize(("kernel_size", "padding"), [(3, 1), (4, "same")])
def test_code_forms_agree(kernel_size, padding):
    torch.manual_seed(0)
    layer = DynamicConv2d(4, 6, kernel_size, padding=padding, code_channels=5)
    x, code = torch.randn(2, 4, 7, 9), torch.randn(2, 5)
    expected = by_hand(layer, x, layer.router(x, code), code[:, :, None, None].expand(-1, -1, 7, 9))
    assert_accurate(layer(x, code), expected)
    assert_accurate(layer(x, code[:, :, None, None].expand(-1, -1, 2, 3)), expected)


def test_code_map_is_interpolated_corner_to_corner():
    torch.manual_seed(0)
    layer = DynamicConv2d(2, 2, 1, code_channels=1)
    code = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    ramp = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]).view(1, 1, 1, 5).expand(-1, -1, 3, -1)
    x, attention = torch.randn(1, 2, 3, 5), torch.ones(1, 4)
    assert_accurate(layer(x, code, attention), by_hand(layer, x, attention, ramp))


def test_router():
    torch.manual_seed(0)
    router = Router(6, 4)
    x = 10 * torch.randn(3, 6, 5, 5)
    attention = router(x)
    torch.testing.assert_close(attention.sum(1), torch.ones(3))
    hidden = F.relu(x.mean((2, 3)) @ router.squeeze.weight.T + router.squeeze.bias)
    logits = hidden @ router.excite.weight.T + router.excite.bias
    torch.testing.assert_close(attention, logits.softmax(1))
    anneal_temperature(torch.nn.Sequential(router), 0.25, start=9.0, end=1.0)
    torch.testing.assert_close(router(x), (logits / 7).softmax(1))
    anneal_temperature(router, 3.0)
    torch.testing.assert_close(router(x), attention)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("num_kernels", [1, 8])
def test_initial_mixture_has_the_variance_of_a_static_kernel(num_kernels, average):
    torch.manual_seed(0)
    layer = DynamicConv2d(32, 64, 3, num_kernels=num_kernels, average=average, activation="relu")
    mixture = layer.weight.mean(0) / (num_kernels if average else 1)
    assert mixture.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.02)
    assert not layer.bias.any()


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    layer = DynamicConv2d(4, 6, 3, padding=1, code_channels=5, average=True)
    layer(torch.randn(2, 4, 7, 9), torch.randn(2, 5)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_temperature_is_saved_and_changing_it_does_not_recompile():
    layer = DynamicConv2d(4, 4, 1)
    anneal_temperature(layer, 0.5, start=11.0)
    other = DynamicConv2d(4, 4, 1)
    other.load_state_dict(layer.state_dict())
    assert other.router.temperature == 6
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 4, 3, 3)
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        layer.router.set_temperature(2.0)
        torch.testing.assert_close(compiled(x), layer(x))


def test_repr():
    text = repr(DynamicConv2d(4, 6, 3, padding=1, code_channels=5, average=True, bias=False))
    assert "DynamicConv2d(\n  4, 6, kernel_size=(3, 3), num_kernels=4, padding=1, code_channels=5" in text
    assert "bias=False" in text and "average=True" in text and "stride" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, "in_channels must be a multiple of groups=3, got 4"),
        ({"code_channels": -1}, "code_channels must be at least 0"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"padding": -1}, "padding must be at least 0"),
        ({"padding": "bogus"}, "padding must be"),
        ({"dilation": 0}, "dilation must be at least 1"),
        ({"groups": 2, "code_channels": 1}, "groups=1"),
        ({"activation": "gelu"}, "activation"),
        ({"num_kernels": 0}, "num_kernels"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3} | arguments)


def test_bad_codes():
    plain, coded = DynamicConv2d(2, 2, 1), DynamicConv2d(2, 2, 1, code_channels=3)
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="must not be given"):
        plain(x, torch.randn(1, 3))
    with pytest.raises(ValueError, match="must be given"):
        coded(x)
    for code in (torch.randn(1, 4), torch.randn(2, 3), torch.randn(2, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"code must be .* = \(1, 3.*got shape"):
            coded(x, code)
    with pytest.raises(TypeError, match="code must be a Tensor"):
        coded(x, [1, 2, 3])


def test_messages_name_what_is_wrong():
    layer = DynamicConv2d(8, 8, 3)
    with pytest.raises(ValueError, match=r"x must have 8 channels, got shape \(2, 7, 9, 9\)"):
        layer(torch.randn(2, 7, 9, 9))
    with pytest.raises(ValueError, match=r"pooled must be \[B, C\] = \(2, 8\), got shape \(3, 8\)"):
        layer(torch.randn(2, 8, 9, 9), pooled=torch.randn(3, 8))
    for sizes in ((8, 6, 3.0), (8, 6, (3,)), (8.0, 6, 3)):
        with pytest.raises(TypeError, match="must be an int"):
            DynamicConv2d(*sizes)


@pytest.mark.parametrize("code_shape", [(2, 2), (2, 2, 3, 3)])
def test_channels_last_stays(code_shape):
    layer = DynamicConv2d(8, 6, 3, padding=1, code_channels=2)
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    assert layer(x, torch.rand(code_shape)).is_contiguous(memory_format=torch.channels_last)


def test_what_was_made_on_meta_is_initialised_as_elsewhere():
    with torch.device("meta"):
        layer = DynamicConv2d(8, 6, 3, temperature=7.0)
        assert layer(torch.randn(2, 8, 9, 9)).shape == (2, 6, 7, 7)
    layer.to_empty(device="cpu")
    for parameter in (*layer.parameters(), *layer.buffers()):
        parameter.detach().fill_(float("nan"))
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer.router.temperature == 7
    assert bool(layer(torch.randn(2, 8, 9, 9)).isfinite().all())
