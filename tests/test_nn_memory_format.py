"""Modules with banks of five dimensions under model.to(memory_format=torch.channels_last)."""

import copy

import pytest
import torch
from helpers import assert_accurate
from test_nn_convert import example
from torch import nn

import ddrf_fast.nn as fast
from ddrf_fast.models import DDRFNet, DDRFNetConfig

IMAGE = (3, 4, 9, 8)
# How to make each module, and the shapes of its inputs.
MODULES = {
    "CondConv2d": (lambda: fast.CondConv2d(4, 6, 3, bias=True), [IMAGE, (3, 4)]),
    "DyConv2d": (lambda: fast.DyConv2d(4, 6, 3, padding=1), [IMAGE]),
    "DynamicConv2d": (lambda: fast.DynamicConv2d(4, 6, 3, code_channels=2), [IMAGE, (3, 2)]),
    "DynamicConv2d, 1x1": (lambda: fast.DynamicConv2d(4, 6, 1), [IMAGE]),
    "DynamicConv2d, depthwise": (lambda: fast.DynamicConv2d(4, 4, 3, groups=4), [IMAGE]),
    "DyNetConv2d": (lambda: fast.DyNetConv2d(4, 6, 3), [IMAGE]),
    "ModulatedConv2d": (lambda: fast.ModulatedConv2d(4, 6, 3, 5), [IMAGE, (3, 5)]),
    "ODConv2d": (lambda: fast.ODConv2d(4, 6, 3), [IMAGE]),
    "DDRFNet": (lambda: DDRFNet(DDRFNetConfig(width=8, blocks=1, num_kernels=2)), 2 * [(1, 1, 32, 32)]),
}
WITH_BANKS = [name for name in MODULES if name != "CondConv2d"]  # whose bank is flat
channels_last = torch.channels_last


def make(name):
    torch.manual_seed(0)
    module, shapes = MODULES[name]
    return module().eval(), [torch.randn(shape) for shape in shapes]


def exactly(module, inputs):
    """What the module gives in float64."""
    return first(copy.deepcopy(module).double()(*(x.double() for x in inputs))).detach()


def banks(module):
    return [parameter for parameter in module.parameters() if parameter.dim() == 5]


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", MODULES)
def test_channels_last(name):
    module, inputs = make(name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    exact = exactly(module, inputs)
    expected, parameters = first(module(*inputs)), list(module.parameters())
    expected.square().sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]

    assert module.to(memory_format=channels_last) is module
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert all(a is b for a, b in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert all(bank.is_contiguous() and bank.grad.is_contiguous() for bank in banks(module))
    assert all(bank.requires_grad and bank.is_leaf for bank in banks(module))
    for parameter, gradient in zip(parameters, gradients, strict=True):  # kept, like the values
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)

    inputs = [x.contiguous(memory_format=channels_last) if x.dim() == 4 else x for x in inputs]
    optimizer.zero_grad()
    found = first(module(*inputs))
    assert_accurate(found, exact, expected)
    assert found.is_contiguous(memory_format=channels_last)
    found.square().sum().backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
    optimizer.step()
    assert not torch.equal(first(module(*inputs)), found)


def test_a_converted_model():
    model = example().eval()
    x = torch.randn(2, 3, 12, 11)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    report = fast.convert(model)
    model.to(memory_format=channels_last)
    assert len(report.swapped) == 11 and not report.left
    assert banks(model) and all(bank.is_contiguous() for bank in banks(model))
    torch.testing.assert_close(model(x.contiguous(memory_format=channels_last)), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("name", WITH_BANKS)
def test_with_a_dtype_and_back(name):
    module, inputs = make(name)
    expected = first(module(*inputs))
    module.to(torch.float64, memory_format=channels_last)
    assert all(bank.dtype == torch.float64 and bank.is_contiguous() for bank in banks(module))
    module.to(torch.float32, memory_format=torch.contiguous_format)
    assert torch.equal(first(module(*inputs)), expected)


@pytest.mark.parametrize("name", WITH_BANKS)
def test_under_the_settings_of_torch_future(name):
    module, inputs = make(name)
    exact, expected = exactly(module, inputs), first(module(*inputs))
    expected.square().sum().backward()
    parameters = list(module.parameters())
    gradients = [bank.grad.clone() for bank in banks(module)]
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        module.to(memory_format=channels_last)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    try:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        module.to(memory_format=channels_last)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    for bank, gradient in zip(banks(module), gradients, strict=True):
        assert isinstance(bank, nn.Parameter) and bank.requires_grad and bank.is_leaf
        assert bank.is_contiguous() and torch.equal(bank.grad, gradient)
    assert_accurate(first(module(*inputs)), exact, expected)


@pytest.mark.parametrize("name", WITH_BANKS)
def test_what_else_goes_over_the_parameters(name):
    module, inputs = make(name)
    exact, expected = exactly(module, inputs), first(module(*inputs))
    module.to(memory_format=channels_last).share_memory()
    assert all(bank.is_shared() for bank in banks(module))
    twin = copy.deepcopy(module)
    assert all(bank.is_contiguous() for bank in banks(twin))

    empty = MODULES[name][0]().to("meta").to(memory_format=channels_last)
    assert all(bank.is_meta for bank in banks(empty))
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(module.state_dict())
    for other in (twin, empty):
        assert_accurate(first(other(*inputs)), exact, expected)
    assert all(bank.dtype == torch.float16 for bank in banks(twin.half()))


def test_frozen_and_parametrized_banks():
    layer = fast.DynamicConv2d(4, 6, 3)
    layer.weight.requires_grad_(False)
    assert not layer.to(memory_format=channels_last).weight.requires_grad
    nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(IMAGE)
    expected = layer(x)
    torch.testing.assert_close(layer.to(memory_format=channels_last)(x), expected)


def test_other_errors_are_torchs_own():
    layer = fast.DynamicConv2d(4, 6, 3).to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        layer.to("cpu", memory_format=channels_last)
