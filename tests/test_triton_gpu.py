"""The Triton kernels on a GPU, at the sizes people run, against plain torch in float64."""

import pytest
import torch

pytest.importorskip("triton")

from triton_cases import REAL, TINY, Conv

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", [*REAL, *TINY])
def test_call(name: str) -> None:
    from triton_checks import check

    with torch.backends.cudnn.flags(allow_tf32=False):
        check((REAL | TINY)[name], "cuda")


@pytest.mark.parametrize("name", ["conv single, odd sizes", "conv per sample"])
def test_tf32(name: str) -> None:
    """TF32 keeps 10 bits of each factor; sums of a few hundred products lose a little of that."""
    from triton_checks import check

    with torch.backends.cudnn.flags(allow_tf32=True):
        check(REAL[name], "cuda", floor=2e-3)


def test_two_runs_give_the_same_bits() -> None:
    from ddrf_fast.kernels import dynamic_conv as kernels

    case = REAL["conv half"]
    args = case.arguments("cuda")
    out = kernels.dynamic_conv(*args)
    args = case.backward_arguments(args, out)
    for first, second in zip(
        kernels.dynamic_conv_backward(*args), kernels.dynamic_conv_backward(*args), strict=True
    ):
        assert torch.equal(first, second)


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
