"""degrade_adjoint: the dot-product identity, its gradients, and what holds for every operation."""

import itertools

import pytest
import torch
from helpers import assert_accurate
from torch import Tensor
from torch.library import opcheck

import ddrf_fast
from ddrf_fast.ops import BackendUnavailableError

PADDINGS = ("reflect", "replicate", "circular", "zeros", "valid")
WEIGHTS_AT = ("sample", "image", "output", "grid")
SITES = ((1, 0), (2, 0), (2, 1), (3, 2))  # scale, offset


def problem(weights_at="sample", *, size=(11, 12), batch=2, channels=2, kernel=5, **options):
    """(degrade, degrade_adjoint) of one linear map, an image and a degraded image; kernels asymmetric."""
    generator = torch.Generator().manual_seed(len(weights_at) + size[0])

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image = rand(batch, channels, *size)
    per_sample = (batch,) if weights_at in ("output", "grid") else ()
    kernels = rand(*per_sample, 3, kernel, kernel)
    empty = ddrf_fast.degrade(image, kernels, rand(batch, 3), **options)
    places = {"sample": (), "image": size, "output": tuple(empty.shape[2:]), "grid": (3, 2)}[weights_at]
    weights = rand(batch, 3, *places)
    if weights_at == "grid":
        options["grid"] = True
    return image, kernels, weights, rand(*empty.shape), options


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("correlation", [False, True])
def test_the_dot_products_are_equal(correlation, padding, weights_at):
    for scale, offset in SITES:
        image, kernels, weights, degraded, options = problem(
            weights_at, scale=scale, offset=offset, padding=padding, correlation=correlation
        )
        forth = ddrf_fast.degrade(image, kernels, weights, **options)
        back = ddrf_fast.degrade_adjoint(degraded, kernels, weights, size=image.shape[2:], **options)
        assert back.shape == image.shape
        torch.testing.assert_close((forth * degraded).sum(), (image * back).sum(), rtol=1e-12, atol=1e-11)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("padding", PADDINGS)
def test_it_is_the_transposed_matrix(padding):
    """Every entry, by one image for each pixel in the batch."""
    _, kernels, _, _, options = problem(size=(6, 7), channels=1, scale=2, offset=1, padding=padding)
    weights = torch.rand(1, 3, 6, 7, dtype=torch.float64)
    pixels = torch.eye(42, dtype=torch.float64).view(42, 1, 6, 7)
    matrix = ddrf_fast.degrade(pixels, kernels, weights.expand(42, -1, -1, -1), **options)
    count, places = matrix[0].numel(), matrix.shape[2:]
    sites = torch.eye(count, dtype=torch.float64).view(count, 1, *places)
    transposed = ddrf_fast.degrade_adjoint(
        sites, kernels, weights.expand(count, -1, -1, -1), size=(6, 7), **options
    )
    assert_accurate(transposed.flatten(1), matrix.flatten(1).mT, floor=1e-14)


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_size_is_that_of_whole_blocks_by_default(padding):
    for scale, offset in SITES:
        options = {"scale": scale, "offset": offset, "padding": padding}
        image, kernels, weights, degraded, options = problem(
            size=(12 + 4 * (padding == "valid"),) * 2, **options
        )
        expected = ddrf_fast.degrade_adjoint(degraded, kernels, weights, size=image.shape[2:], **options)
        assert torch.equal(ddrf_fast.degrade_adjoint(degraded, kernels, weights, **options), expected)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_to_second_order(padding, weights_at):
    _, kernels, weights, degraded, options = problem(
        weights_at, size=(7, 8), channels=1, batch=1, kernel=3, scale=2, padding=padding
    )
    inputs = tuple(t.requires_grad_() for t in (degraded, kernels, weights))

    def run(degraded, kernels, weights):
        return ddrf_fast.degrade_adjoint(degraded, kernels, weights, size=(7, 8), **options)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(
        run, inputs, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )


@pytest.mark.usefixtures("cpu_backend")
def test_its_gradient_is_degrade():
    image, kernels, weights, degraded, options = problem("grid", scale=2)
    degraded.requires_grad_()
    back = ddrf_fast.degrade_adjoint(degraded, kernels, weights, size=image.shape[2:], **options)
    (found,) = torch.autograd.grad(back, degraded, image)
    assert torch.equal(found, ddrf_fast.degrade(image, kernels, weights, **options))


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_dtype_are_kept(dtype):
    _, kernels, weights, degraded, options = problem("image", channels=3, padding="circular")
    low = [t.to(dtype) for t in (degraded, kernels, weights)]
    low[0] = low[0].contiguous(memory_format=torch.channels_last)
    back = ddrf_fast.degrade_adjoint(*low, **options)
    assert back.is_contiguous(memory_format=torch.channels_last)
    exact = ddrf_fast.degrade_adjoint(*(t.double() for t in low), **options)
    plain = exact.float().to(dtype)
    assert_accurate(back, exact, lowprec=plain, floor=1e-5)


def test_an_empty_batch_gives_an_empty_image():
    back = ddrf_fast.degrade_adjoint(
        torch.zeros(0, 2, 4, 5), torch.rand(3, 3, 3), torch.rand(0, 3), scale=2, size=(8, 9)
    )
    assert back.shape == (0, 2, 8, 9)


def test_torch_func_sees_through():
    _, kernels, weights, degraded, _ = problem(batch=1)
    many = torch.stack([degraded, 2 * degraded, degraded.flip(2)])

    def back(value: Tensor) -> Tensor:
        return ddrf_fast.degrade_adjoint(value, kernels, weights)

    torch.testing.assert_close(torch.func.vmap(back)(many), torch.stack([back(v) for v in many]))
    gradients = torch.func.vmap(torch.func.grad(lambda v: back(v).square().sum()))(many)
    one_by_one = [torch.func.grad(lambda v: back(v).square().sum())(v) for v in many]
    torch.testing.assert_close(gradients, torch.stack(one_by_one))


def test_it_compiles_whole():
    torch._dynamo.reset()

    def step(estimate: Tensor, observed: Tensor, kernels: Tensor, weights: Tensor) -> Tensor:
        residual = ddrf_fast.degrade(estimate, kernels, weights, scale=2) - observed
        return estimate - ddrf_fast.degrade_adjoint(residual, kernels, weights, scale=2)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in ((3, (8, 10)), (4, (12, 14))):
        image, kernels, weights, degraded, _ = problem(batch=batch, size=size, kernel=3, scale=2)
        inputs = [t.requires_grad_() for t in (image, degraded, kernels, weights)]
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
        ours = torch.autograd.grad(compiled(*inputs).sin().sum(), inputs)
        theirs = torch.autograd.grad(step(*inputs).sin().sum(), inputs)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch", [2, 0])
def test_opcheck_of_the_image_gradient_alone(batch):
    """The raw operator as it is called here."""
    kernels, weights = torch.rand(3, 3, 3), torch.rand(batch, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = torch.rand(batch, 2, 8, 9).contiguous(memory_format=layout)
        degraded = torch.rand(batch, 2, 4, 5)
        raw = (degraded, image, kernels, weights, *[None] * 4, 2, 0, "reflect", False, "sample", 1)
        opcheck(torch.ops.ddrf_fast.degrade_backward.default, raw)


def test_autocast_runs_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        back = ddrf_fast.degrade_adjoint(
            torch.rand(1, 1, 6, 6).bfloat16(), torch.rand(1, 3, 3), torch.ones(1, 1)
        )
    assert back.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("weights_at", WEIGHTS_AT)
def test_gpu_backends_agree(weights_at, backend):
    for (scale, offset), padding in itertools.product(SITES, PADDINGS):
        image, kernels, weights, degraded, options = problem(
            weights_at, scale=scale, offset=offset, padding=padding
        )
        size = tuple(image.shape[2:])
        exact = ddrf_fast.degrade_adjoint(degraded, kernels, weights, size=size, **options)
        low = [t.float().cuda() for t in (degraded, kernels, weights)]
        with ddrf_fast.use_backend(backend):
            try:
                back = ddrf_fast.degrade_adjoint(*low, size=size, **options)
            except BackendUnavailableError as error:
                pytest.skip(str(error))
        assert_accurate(back.cpu(), exact, floor=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"degraded": torch.rand(3, 4)}, ValueError, r"degraded must be \[B, C, H', W'\]"),
        ({"degraded": [1.0]}, TypeError, "degraded must be a Tensor"),
        ({"size": (9, 8)}, ValueError, r"degraded must be \[B, C, 5, 4\], what an image of 9x8"),
        ({"size": (0, 8)}, ValueError, "size must be at least 1"),
        ({"size": "8"}, TypeError, "size must be an int or two ints"),
        ({"scale": 0}, ValueError, "scale must be at least 1"),
        ({"weights": torch.rand(2, 4)}, ValueError, r"weights must start with \[B, M\] = \(2, 3\)"),
        ({"padding": "mirror"}, ValueError, "padding must be one of"),
        ({"kernels": torch.rand(3, 3, 3).double()}, TypeError, "kernels must have the dtype of degraded"),
        ({"kernels": [1.0], "padding": "valid"}, TypeError, "kernels must be a Tensor.*, got list"),
        ({"weights": None}, TypeError, "weights must be a Tensor.*, got NoneType"),
        ({"size": (2, 2), "kernels": torch.rand(3, 7, 7)}, ValueError, "^size of 2x2 is too small"),
        ({"offset": 8, "padding": "valid"}, ValueError, "offset must be below 8, got 8"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    named = {
        "degraded": torch.rand(2, 1, 4, 4),
        "kernels": torch.rand(3, 3, 3),
        "weights": torch.rand(2, 3),
        "scale": 2,
    }
    with pytest.raises(error, match=message):
        ddrf_fast.degrade_adjoint(**(named | changes))


def test_it_is_explained():
    image, kernels, weights = torch.rand(1, 2, 24, 25), torch.rand(2, 5, 5), torch.rand(1, 2, 12, 13)
    degraded = ddrf_fast.degrade(image, kernels, weights, scale=2)
    with ddrf_fast.use_backend("native"):
        forth = ddrf_fast.explain("degrade", image, kernels, weights, scale=2)
        back = ddrf_fast.explain(
            ddrf_fast.degrade_adjoint, degraded, kernels, weights, size=(24, 25), scale=2
        )
    assert str(back).startswith("degrade_adjoint: native (asked for by name)")
    assert forth.plan.endswith(f"; gradients: {back.plan}")
    with ddrf_fast.use_backend("reference"):
        assert "transposed" in ddrf_fast.explain("degrade_adjoint", degraded, kernels, weights).plan
    with pytest.raises(TypeError, match="noise_std"):
        ddrf_fast.explain("degrade_adjoint", degraded, kernels, weights, noise_std=1.0)
