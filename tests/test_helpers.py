"""The comparison itself must be able to fail."""

import pytest
import torch
from helpers import assert_accurate, max_error


def test_accepts_rounding_and_refuses_errors():
    reference = torch.rand(100, dtype=torch.float64)
    rounded = reference.bfloat16()
    assert_accurate(rounded, reference, lowprec=rounded)
    with pytest.raises(AssertionError, match="is above"):
        assert_accurate(rounded + 0.1, reference, lowprec=rounded)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(rounded[:5], reference)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(reference.float(), reference, lowprec=rounded)


def test_nan_is_an_infinite_error():
    assert max_error(torch.tensor([float("nan")]), torch.tensor([0.0])) == float("inf")
    with pytest.raises(AssertionError):
        assert_accurate(torch.tensor([float("nan")]), torch.zeros(1, dtype=torch.float64))


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(7).isnan().all()
    assert torch.empty_like(torch.zeros(3, 3)).isnan().all()
    assert torch.zeros(2).new_empty((5,)).isnan().all()
