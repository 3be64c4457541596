"""degrade against code of other lineages (OpenCV, kornia, SciPy), and its invariants, on the CPU."""

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from helpers import assert_accurate

import ddrf_fast
from ddrf_fast.degradation import KernelBank

pytestmark = pytest.mark.usefixtures("cpu_backend")

OPENCV_BORDER = {
    "reflect": cv2.BORDER_REFLECT_101,
    "replicate": cv2.BORDER_REPLICATE,
    "zeros": cv2.BORDER_CONSTANT,
}
SCIPY_MODE = {"reflect": "mirror", "replicate": "nearest", "circular": "wrap", "zeros": "constant"}
KORNIA_BORDER = {
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
    "zeros": "constant",
}


def problem(batch=2, size=(21, 26), bank=3, kernel=9):
    """An image, kernels without any symmetry, and weights of each pixel."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return rand(batch, 3, *size), rand(bank, kernel, kernel) / kernel**2, rand(batch, bank, *size)


def mixed(blurred, weights):
    """The sum over kernels of the images blurred with each, [M][B, C, H, W]."""
    return sum(image * weights[:, m, None] for m, image in enumerate(blurred))


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("padding", SCIPY_MODE)
def test_scipy(padding, correlation):
    image, kernels, weights = problem()
    function = scipy.ndimage.correlate if correlation else scipy.ndimage.convolve
    blurred = [
        torch.from_numpy(function(image.numpy(), k.numpy()[None, None], mode=SCIPY_MODE[padding]))
        for k in kernels
    ]
    actual = ddrf_fast.degrade(image, kernels, weights, padding=padding, correlation=correlation)
    assert_accurate(actual, mixed(blurred, weights))


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("padding", OPENCV_BORDER)
def test_opencv(padding, correlation):
    """filter2D is a correlation; it has no circular border."""
    image, kernels, weights = problem()

    def filter2d(kernel):
        kernel = kernel if correlation else kernel.flip(0, 1)
        planes = [
            cv2.filter2D(plane, cv2.CV_64F, kernel.numpy().copy(), borderType=OPENCV_BORDER[padding])
            for plane in image.flatten(0, 1).numpy()
        ]
        return torch.from_numpy(np.stack(planes)).view_as(image)

    actual = ddrf_fast.degrade(image, kernels, weights, padding=padding, correlation=correlation)
    assert_accurate(actual, mixed([filter2d(k) for k in kernels], weights), floor=1e-12)


@pytest.mark.parametrize("behaviour", ["conv", "corr"])
@pytest.mark.parametrize("padding", KORNIA_BORDER)
def test_kornia(padding, behaviour):
    filters = pytest.importorskip("kornia.filters")
    image, kernels, weights = problem()
    blurred = [
        filters.filter2d(image, k[None], border_type=KORNIA_BORDER[padding], behaviour=behaviour)
        for k in kernels
    ]
    options = {"padding": padding, "correlation": behaviour == "corr"}
    assert_accurate(ddrf_fast.degrade(image, kernels, weights, **options), mixed(blurred, weights))
    # One kernel for each sample.
    own = ddrf_fast.degrade(image, kernels[:2, None], torch.ones(2, 1, dtype=torch.float64), **options)
    expected = filters.filter2d(image, kernels[:2], border_type=KORNIA_BORDER[padding], behaviour=behaviour)
    assert_accurate(own, expected)


def test_real_images_as_opencv_blurs_them(data_dir):
    """A whole photograph, with the default bank, in float32."""
    plane = cv2.imread(str(data_dir / "tno/test/vis/05.png"), cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255
    image, kernels = torch.from_numpy(plane)[None, None], KernelBank.default().kernels
    one_hot = torch.eye(12)[:, :, None, None]
    actual = ddrf_fast.degrade(image.expand(12, -1, -1, -1), kernels, one_hot.flatten(1), correlation=True)
    for m, kernel in enumerate(kernels.numpy()):
        expected = cv2.filter2D(plane, cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT_101)
        np.testing.assert_allclose(actual[m, 0].numpy(), expected, atol=2e-6)


# ---- Invariants


@pytest.mark.parametrize("at_output", [False, True])
def test_one_hot_weights_cut_the_image_into_regions(at_output):
    """Each pixel has the kernel of its own region, whatever lies next to it: the gather model."""
    image, kernels, _ = problem()
    scale = 2 if at_output else 1
    size = [-(-n // scale) for n in image.shape[2:]]
    region = torch.randint(3, (2, *size), generator=torch.Generator().manual_seed(1))
    weights = F.one_hot(region, 3).movedim(-1, 1).to(image.dtype)
    actual = ddrf_fast.degrade(image, kernels, weights, scale=scale)
    for m in range(3):
        alone = ddrf_fast.degrade(image, kernels[m : m + 1], image.new_ones(2, 1), scale=scale)
        here = (region == m)[:, None].expand_as(actual)
        assert_accurate(actual[here], alone[here])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_ramp_shows_which_way_a_kernel_moves(scale):
    """A kernel that lies (s - 1) / 2 before its centre samples the blocks' centres, as USRNet's do.

    True convolution moves the image by the kernel's centroid, correlation the other way.
    """
    shift = (scale - 1) / 2
    taps = torch.zeros(9, dtype=torch.float64)
    whole = int(shift)
    taps[4 - whole], taps[4 - whole - 1] = 1 - (shift - whole), shift - whole  # its centroid is -shift
    kernel = (taps[:, None] * taps)[None]
    one = torch.ones(1, 1, dtype=torch.float64)
    y, x = torch.meshgrid(*[torch.arange(40, dtype=torch.float64)] * 2, indexing="ij")
    ramp = (x + 100 * y)[None, None]
    centre = F.avg_pool2d(ramp, scale)[:, :, 2:-3, 2:-3]  # off the border
    size = centre.shape[-1] + 2
    for correlation, moved in ((False, 0), (True, -2 * shift * 101)):
        actual = ddrf_fast.degrade(ramp, kernel, one, scale=scale, correlation=correlation)
        assert_accurate(actual[:, :, 2:size, 2:size], centre + moved)


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("weights_at", ["sample", "image", "grid"])
def test_strided_sites_are_those_of_the_whole(weights_at, offset):
    image, kernels, weights = problem()
    weights = {"sample": weights[..., 0, 0], "image": weights, "grid": weights[..., :3, :4]}[weights_at]
    grid = weights_at == "grid"
    whole = ddrf_fast.degrade(image, kernels, weights, grid=grid)
    for scale in (2, 3, 5):
        actual = ddrf_fast.degrade(image, kernels, weights, grid=grid, scale=scale, offset=offset)
        assert_accurate(actual, whole[:, :, offset::scale, offset::scale])


def test_noise_is_the_same_on_every_backend_split_and_thread_count():
    image, kernels, weights = (t.float() for t in problem(batch=4))
    ids = torch.tensor([3, 2**31 + 5, 0, 9])
    options = {
        "scale": 2,
        "noise_std": 0.1,
        "shot_noise": 0.05,
        "gray_noise": torch.tensor([True, False, False, True]),
        "seed": 2**40 + 3,
    }
    threads = torch.get_num_threads()
    with ddrf_fast.use_backend("reference"):
        expected = ddrf_fast.degrade(image, kernels, weights, sample_ids=ids, **options)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            actual = ddrf_fast.degrade(image, kernels, weights, sample_ids=ids, **options)
            torch.testing.assert_close(actual, expected, atol=3e-6, rtol=0)
            order = torch.randperm(4, generator=torch.Generator().manual_seed(count))
            for part in (order[:1], order[1:]):
                chosen = options | {"gray_noise": options["gray_noise"][part]}
                split = ddrf_fast.degrade(image[part], kernels, weights[part], sample_ids=ids[part], **chosen)
                torch.testing.assert_close(split, actual[part], atol=1e-6, rtol=0)
    finally:
        torch.set_num_threads(threads)
