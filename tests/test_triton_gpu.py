"""The Triton kernels on a GPU, at the sizes people run, against plain torch in float64."""

import pytest
import torch

pytest.importorskip("triton")

from triton_cases import REAL, TINY, Conv

pytestmark = pytest.mark.gpu


# Compiling is what takes the time; the tiny calls have been checked by the interpreter.
CALLS = [*REAL, *(pytest.param(name, marks=pytest.mark.slow) for name in TINY)]
# Those that ask for every gradient on its own, which compiles kernels without the others' sums.
ALONE = ("conv half, code", "conv half, 1x1", "conv half, strided, scales", "degrade grid", *TINY)


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    from triton_checks import check

    with torch.backends.cudnn.flags(allow_tf32=False):
        check((REAL | TINY)[name], "cuda", each_alone=name in ALONE)


@pytest.mark.parametrize("name", ["conv single, odd sizes", "conv per sample"])
def test_tf32(name: str) -> None:
    """TF32 keeps 10 bits of each factor; sums of a few hundred products lose a little of that."""
    from triton_checks import check

    with torch.backends.cudnn.flags(allow_tf32=True):
        check(REAL[name], "cuda", floor=2e-3)


@pytest.mark.parametrize("name", ["conv half", "conv half, small map", "conv half, 1x1", "conv first layer"])
def test_two_runs_give_the_same_bits(name: str) -> None:
    from ddrf_fast.kernels import dynamic_conv as kernels

    args = REAL[name].arguments("cuda")
    out, mean = kernels.dynamic_conv_mean(*args)
    for again in range(2):
        assert torch.equal(out, kernels.dynamic_conv(*args)), again
        assert torch.equal(mean, kernels.dynamic_conv_mean(*args)[1]), again
    args = Conv.backward_arguments(args, out)
    for first, second in zip(
        kernels.dynamic_conv_backward(*args), kernels.dynamic_conv_backward(*args), strict=True
    ):
        assert torch.equal(first, second)


def test_backward_takes_little_memory() -> None:
    """Neither mixed kernels nor their gradients of a whole batch: a fixed size, in chunks."""
    from ddrf_fast.kernels import _conv_plan
    from ddrf_fast.kernels import dynamic_conv as kernels

    case = Conv((64, 256, 14, 14), 256, num_kernels=4, scales="i", dtype=torch.bfloat16, channels_last=True)
    args = case.arguments("cuda")
    out = kernels.dynamic_conv(*args)
    *tensors, mask = Conv.backward_arguments(args, out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = kernels.dynamic_conv_backward(*tensors, mask & ~1)
    added = torch.cuda.max_memory_allocated() - before
    own = sum(g.numel() * g.element_size() for g in grads)
    # The bank's gradient is summed in float32 over the chunks.
    assert added <= 1.1 * _conv_plan.MAX_MIXED_GRAD_BYTES + 4 * own + (8 << 20)


def test_batch_beyond_a_grid_axis() -> None:
    from triton_checks import check

    check(Conv((70_000, 4, 2, 2), 4, (1, 1), padding=(0, 0), num_kernels=2, groups=4), "cuda")


def test_current_stream_and_other_device() -> None:
    from ddrf_fast.kernels import dynamic_conv as kernels

    device = f"cuda:{torch.cuda.device_count() - 1}"
    args = Conv((2, 16, 9, 9), 16).arguments(device)
    expected = kernels.dynamic_conv(*args)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        out = kernels.dynamic_conv(*args)
    stream.synchronize()
    assert torch.equal(out, expected)
