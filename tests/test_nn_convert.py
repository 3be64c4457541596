"""convert: what it swaps, what it keeps, what it leaves, and what it says about it."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from test_nn_drop_in import CondConv2d, Dynamic_conv2d, ModulatedConv2d, ODConv2d
from torch import nn

import ddrf_fast.nn as fast
from ddrf_fast.nn import convert
from ddrf_fast.ops import use_backend


class Routed(nn.Module):
    """A block as in CondConv's EfficientNets: one routing for several layers."""

    def __init__(self, channels):
        super().__init__()
        self.routing = nn.Linear(channels, 4)
        self.wide = CondConv2d(channels, 2 * channels, 1, bias=True)
        self.deep = CondConv2d(2 * channels, 2 * channels, 3, 2, "same", groups=2 * channels)
        self.narrow = CondConv2d(2 * channels, channels, 1)

    def forward(self, x):
        routing = self.routing(x.mean((2, 3))).sigmoid()
        return self.narrow(self.deep(self.wide(x, routing).relu(), routing).relu(), routing)


class Styled(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.style = nn.Linear(channels, 5)
        self.conv = ModulatedConv2d(channels, channels, 3, 5)

    def forward(self, x):
        return self.conv(x, self.style(x.mean((2, 3))))


def example():
    """Nested, with a module in two places, a block in two places, tied weights and a frozen layer."""
    twice, block = Dynamic_conv2d(6, 6, 3, padding=1, groups=2), Routed(6)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Sequential(twice, nn.ReLU(), ODConv2d(6, 6, 3, padding=1), twice),
        block,
        nn.ModuleDict({"styled": Styled(6), "unused": ODConv2d(6, 6, 1, kernel_num=1)})["styled"],
        nn.Sequential(block, Dynamic_conv2d(6, 4, 3, padding=1, bias=False)),
    )
    model[4][1].attention.fc1.weight = model[1][0].attention.fc1.weight
    model[1][2].weight.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_report():
    model = nn.Sequential(example(), nn.Conv3d(1, 1, 1), fast.ODConv2d(4, 4, 3))
    report = convert(model)
    here = "test_nn_drop_in"
    assert str(report).splitlines() == [
        "swapped 11, left 0 that look like dynamic convolutions",
        f"  0.1.0: {here}.Dynamic_conv2d -> ddrf_fast.nn.dyconv.DyConv2d",
        f"  0.1.2: {here}.ODConv2d -> ddrf_fast.nn.odconv.ODConv2d",
        f"  0.1.3: {here}.Dynamic_conv2d -> ddrf_fast.nn.dyconv.DyConv2d",
        f"  0.2.wide: {here}.CondConv2d -> ddrf_fast.nn.condconv.CondConv2d",
        f"  0.2.deep: {here}.CondConv2d -> ddrf_fast.nn.condconv.CondConv2d",
        f"  0.2.narrow: {here}.CondConv2d -> ddrf_fast.nn.condconv.CondConv2d",
        f"  0.3.conv: {here}.ModulatedConv2d -> ddrf_fast.nn.modulated_conv.ModulatedConv2d",
        f"  0.4.0.wide: {here}.CondConv2d -> ddrf_fast.nn.condconv.CondConv2d",
        f"  0.4.0.deep: {here}.CondConv2d -> ddrf_fast.nn.condconv.CondConv2d",
        f"  0.4.0.narrow: {here}.CondConv2d -> ddrf_fast.nn.condconv.CondConv2d",
        f"  0.4.1: {here}.Dynamic_conv2d -> ddrf_fast.nn.dyconv.DyConv2d",
        "  isinstance of an old class no longer finds these (in a loop over temperatures)",
    ]
    assert model[0][1][0] is model[0][1][3] and model[0][2] is model[0][4][0]
    assert str(convert(model)) == "swapped 0, left 0 that look like dynamic convolutions"


@pytest.mark.parametrize("train", [True, False])
def test_same_results_and_the_very_same_parameters(train):
    model = example().double().train(train)
    model[1][2].attention.bn.eval()
    original = copy.deepcopy(model)
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(state, torch.get_rng_state())
    assert list(tensors.items()) == [(n, id(t)) for n, t in model.state_dict(keep_vars=True).items()]
    assert all(modes[name] == m.training for name, m in model.named_modules())
    assert not model[1][2].weight.requires_grad
    original.load_state_dict(model.state_dict())
    model.load_state_dict(original.state_dict())

    x = torch.randn(4, 3, 11, 9, dtype=torch.float64)
    expected, actual = original(x), model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("before", [True, False])
def test_an_optimizer_made_before_or_after_takes_the_same_step(before):
    model = example().double()
    original = copy.deepcopy(model)
    if not before:
        convert(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (original, model)]
    if before:
        convert(model)
    for _ in range(2):
        x = torch.randn(4, 3, 11, 9, dtype=torch.float64)
        for m, optimizer in zip((original, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_device_and_temperature(dtype):
    model = nn.Sequential(Dynamic_conv2d(4, 4, 3), ODConv2d(4, 4, 3)).to(dtype)
    model[0].update_temperature()
    model[1].update_temperature(7.3)
    convert(model)
    assert model(torch.randn(2, 4, 9, 9).to(dtype)).dtype == dtype
    assert model[0].attention.temperature == 31 and model[1].attention.temperature == 7.3
    meta = nn.Sequential(copy.deepcopy(model[0])).to("meta")
    assert len(convert(meta).left) == 0
    with torch.device("meta"):
        meta = nn.Sequential(CondConv2d(4, 4), Dynamic_conv2d(4, 4, 3))
    assert len(convert(meta).swapped) == 2
    assert all(p.is_meta for p in meta.parameters())


def test_older_attention_without_bias_and_with_other_hidden_size():
    layer = Dynamic_conv2d(8, 4, 3)
    layer.attention.fc1, layer.attention.fc2 = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 4, 1, bias=False)
    model = nn.Sequential(layer)
    x = torch.randn(2, 8, 5, 5)
    expected = model(x)
    assert len(convert(model).swapped) == 1
    torch.testing.assert_close(model(x), expected)


# --- Hooks -----------------------------------------------------------------------------------------------


def test_hooks_on_the_module_and_on_its_layers_stay_with_their_handles():
    model, calls = nn.Sequential(Dynamic_conv2d(4, 4, 3)), []
    handles = [
        model[0].register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__)),
        model[0].register_forward_hook(
            lambda module, args, kwargs, y: calls.append("forward"), with_kwargs=True
        ),
        model[0].register_full_backward_hook(lambda module, i, o: calls.append("backward")),
        model[0].attention.fc1.register_forward_hook(lambda module, args, y: calls.append("fc1")),
    ]
    assert len(convert(model).swapped) == 1
    assert not calls
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    model(x).sum().backward()
    assert calls == ["DyConv2d", "fc1", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: m.register_state_dict_post_hook(lambda *_: None), "hooks on its state dict"),
        (lambda m: m.attention.register_forward_hook(lambda *_: None), "its part attention has hooks"),
        (lambda m: m.attention.relu.register_forward_hook(lambda *_: None), "its part attention.relu has"),
        (lambda m: setattr(m, "forward", lambda x: x), "forward was replaced on the instance"),
        (lambda m: setattr(m, "scale", nn.Parameter(torch.ones(1))), "parameters are not as expected: scale"),
        (lambda m: setattr(m, "kernel_num", 3), "on trial|RuntimeError|ValueError"),
        (lambda m: delattr(m, "kernel_num"), "AttributeError: .*kernel_num"),
        (lambda m: setattr(m.attention, "relu", nn.ReLU6()), "on trial it did not compute"),
        (lambda m: setattr(m.attention, "avgpool", nn.AdaptiveMaxPool2d(1)), "on trial it did not compute"),
        (lambda m: nn.utils.parametrizations.weight_norm(m), "a subclass of ODConv2d"),
    ],
)
def test_what_would_be_lost_or_is_not_the_original_is_left_alone(spoil, reason):
    model = nn.Sequential(ODConv2d(4, 6, 3))
    spoil(model[0])
    layer, attributes = model[0], dict(vars(model[0]))
    parts = dict(model.named_modules())
    report = convert(model)
    assert model[0] is layer and vars(layer) == attributes and dict(model.named_modules()) == parts
    assert not report.swapped
    (left,) = report.left
    assert left.name == "0"
    assert re.search(reason, left.reason), left.reason


# --- Left alone ------------------------------------------------------------------------------------------


def test_changed_copies_and_strangers():
    class Forked(CondConv2d):
        def forward(self, x, routing_weights):
            return super().forward(x, routing_weights.softmax(1))

    Forked.__name__ = "CondConv2d"

    class Different(Dynamic_conv2d):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    Different.__name__ = "Dynamic_conv2d"

    class DynamicConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1, 4, 9))

    class Heir(Dynamic_conv2d):
        pass

    class DynamicConvBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DynamicConv()

    model = nn.ModuleDict(
        {
            "forked": Forked(4, 4),
            "different": Different(4, 4, 3),
            "resampling": ModulatedConv2d(4, 4, 3, 5, upsample=True),
            "stranger": DynamicConvBlock(),
            "heir": Heir(4, 4, 3),
        }
    )
    before = dict(model.named_modules())
    state = torch.get_rng_state()
    report = convert(model)
    assert torch.equal(state, torch.get_rng_state())
    assert dict(model.named_modules()) == before and not report.swapped
    reasons = {left.name: left.reason for left in report.left}
    assert reasons.keys() == {"forked", "different", "resampling", "stranger.conv", "heir"}
    assert "on trial it did not compute what its name stands for" in reasons["forked"]
    assert "on trial it did not compute what its name stands for" in reasons["different"]
    assert "resamples" in reasons["resampling"]
    assert reasons["heir"] == "a subclass of Dynamic_conv2d, which may compute something else"
    assert reasons["stranger.conv"] == (
        "not one of the classes CondConv2d, Dynamic_conv2d, ODConv2d, ModulatedConv2d"
    )


def test_the_trial_does_not_touch_what_hooks_hold():
    class Uncopyable:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def __call__(self, *_):
            pass

    model = nn.Sequential(ODConv2d(4, 4, 3))
    model[0].register_forward_hook(Uncopyable())
    running = model[0].attention.bn.running_mean.clone()
    assert len(convert(model).swapped) == 1
    assert torch.equal(model[0].attention.bn.running_mean, running)
    assert model[0].attention.bn.num_batches_tracked == 0


def test_the_model_itself_cannot_be_swapped():
    model = ODConv2d(4, 4, 3)
    report = convert(model)
    assert "(the model): test_nn_drop_in.ODConv2d left: a model cannot be swapped in place" in str(report)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        convert([ODConv2d(4, 4, 3)])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_trial_needs_no_backend_that_is_forced(backend):
    model = example()
    with use_backend(backend):
        report = convert(model)
    assert not report.left
    assert report.swapped
