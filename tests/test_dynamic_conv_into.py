"""dynamic_conv_into: the numbers of dynamic_conv, in memory of the caller's."""

import pytest
import torch

import ddrf_fast
from ddrf_fast.ops.dynamic_conv import dynamic_conv_into


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 16, 9, 14), (1, 32, 41, 30), (3, 5, 8, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("code_channels", [0, 3])
def test_writes_or_adds_what_dynamic_conv_gives(cpu_backend, shape, dtype, accumulate, stride, code_channels):
    batch, channels = shape[:2]
    outputs, bank = 12, 3
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(bank, outputs, channels + code_channels, 3, 3).to(dtype) / 8
    attention, bias = torch.randn(batch, bank).to(dtype), torch.randn(bank, outputs).to(dtype)
    code = torch.randn(batch, code_channels).to(dtype) if code_channels else None
    settings = {"stride": stride, "padding": 1, "code": code, "activation": "leaky_relu"}
    expected, mean = ddrf_fast.dynamic_conv(x, weight, attention, bias, return_mean=True, **settings)

    rows, columns = expected.shape[2:]
    whole = torch.full((batch, outputs + 7, rows, columns), torch.nan, dtype=dtype)
    y = whole[:, 4 : 4 + outputs]
    before = torch.randn(y.shape).to(dtype)
    if accumulate:
        y.copy_(before)
    found = dynamic_conv_into(
        y, x, weight, attention, bias, code, (stride, stride), (1, 1), "leaky_relu", accumulate
    )
    # Added before or after rounding to the dtype: at most one more rounding.
    epsilon = torch.finfo(dtype).eps
    tolerance = {"atol": 4 * epsilon, "rtol": 4 * epsilon}
    torch.testing.assert_close(y, before + expected if accumulate else expected, **tolerance)
    torch.testing.assert_close(found, mean, **tolerance)
    assert whole[:, :4].isnan().all() and whole[:, 4 + outputs :].isnan().all()
