"""enlarge: what was down-sampled, at its old size and in its old place."""

import pytest
import torch

from ddrf_fast import degrade
from ddrf_fast.degradation import enlarge


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(24, 36), (23, 37), (1, 2)])
def test_each_pixel_stays_where_it_was(size: tuple[int, int], scale: int):
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    small = degrade(image, one, torch.ones(2, 1, dtype=torch.float64), scale=scale)
    large = enlarge(small, size, scale)
    assert large.shape == image.shape
    torch.testing.assert_close(large[..., ::scale, ::scale], image[..., ::scale, ::scale])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_slope_does_not_move(scale: int):
    """Cubic interpolation bends it a little; moved by half a pixel it would be off by 0.005 everywhere."""
    rows, columns = torch.meshgrid(torch.arange(61.0), torch.arange(53.0), indexing="ij")
    image = (2 * rows - columns)[None, None] / 100
    large = enlarge(image[..., ::scale, ::scale], (61, 53), scale)
    inside = slice(2 * scale, 10 * scale)  # whole periods
    deviation = (large - image)[..., inside, inside]
    assert deviation.mean().abs() < 1e-5
    assert deviation.abs().max() < 0.01


def test_scale_1_changes_nothing():
    image = torch.rand(1, 2, 5, 7)
    assert torch.equal(enlarge(image, (5, 7), 1), image)


@pytest.mark.parametrize(
    ("shape", "size", "scale", "message"),
    [
        (
            (1, 1, 8, 10),
            (17, 20),
            2,
            r"\[B, C, 9, 10\], what is left of 17x20 at scale 2, got \[1, 1, 8, 10\]",
        ),
        ((8, 10), (16, 20), 2, r"got \[8, 10\]"),
        ((1, 1, 8, 10), (8, 10), 0, "scale must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(shape, size, scale, message):
    with pytest.raises(ValueError, match=message):
        enlarge(torch.rand(shape), size, scale)
