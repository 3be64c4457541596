"""The losses against their equations and against what they are for."""

import pytest
import torch
import torch.nn.functional as F

from ddrf_fast import losses
from ddrf_fast.metrics import ssim, viff
from ddrf_fast.models.classical import CLASSICAL_FUSIONS


@pytest.fixture
def images():
    """Two smooth random images with some noise, Tensor[2, 2, 1, 24, 28]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 1, 6, 7, generator=generator)
    smooth = F.interpolate(coarse, size=(24, 28), mode="bicubic").clamp(0, 1)
    return (smooth + 0.05 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1).view(2, 2, 1, 24, 28)


def blur(image):
    return F.avg_pool2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def test_charbonnier_and_gradients_by_hand():
    prediction, target = torch.tensor([[[[0.0, 3.0]]]]), torch.tensor([[[[0.0, 0.0]]]])
    assert losses.charbonnier(prediction, target, epsilon=4.0).item() == pytest.approx(0.5)
    image = torch.tensor([[[[0.0, 1.0], [4.0, 2.0]]]])
    # differences along rows 1, -2 and along columns 4, 1
    assert losses.gradient_difference(image, torch.zeros_like(image)).item() == pytest.approx(1.5 + 2.5)


def test_restoration_loss(images):
    visible, infrared = images
    expected = losses.charbonnier(infrared, visible) + 0.5 * (1 - ssim(infrared, visible).mean())
    torch.testing.assert_close(losses.restoration_loss(infrared, visible, ssim_weight=0.5), expected)
    assert losses.restoration_loss(visible, visible).item() == pytest.approx(0, abs=1e-6)


def test_images_too_small_for_a_window_are_refused():
    for size in ((10, 20), (20, 8)):
        with pytest.raises(ValueError, match="image must be at least 11x11 pixels"):
            losses.similarity(torch.rand(1, 1, *size), torch.rand(1, 1, *size))


def test_similarity_is_equation_7(images):
    visible, infrared = images
    fused = (visible + infrared) / 2
    by_hand = 1 - (ssim(visible, fused) + ssim(infrared, fused)).mean() / 2
    torch.testing.assert_close(losses.similarity_loss(fused, (visible, infrared)), by_hand)


def test_negative_as_printed_and_as_meant(images):
    visible, infrared = images
    fused = (visible + infrared) / 2
    degraded = [blur(visible), blur(infrared)]
    similarity = (ssim(fused, degraded[0]) + ssim(fused, degraded[1])).mean() / 2
    torch.testing.assert_close(losses.negative_loss(fused, degraded, mode="literal"), 1 - similarity)
    torch.testing.assert_close(losses.negative_loss(fused, degraded), similarity)


def test_negative_loss_repels_and_its_print_attracts(images):
    visible, _ = images
    degraded = blur(visible)
    halfway = ((visible + degraded) / 2).requires_grad_()
    for mode, sign in (("text", -1), ("literal", 1)):
        (gradient,) = torch.autograd.grad(losses.negative_loss(halfway, [degraded], mode=mode), halfway)
        # a step against the gradient moves towards (+) or away from (-) the degraded image
        assert sign * (-gradient * (degraded - halfway)).sum() > 0


def test_negative_loss_does_not_push_a_clean_image(images):
    visible, infrared = images
    degraded = [blur(visible)]
    clean = visible.clone().requires_grad_()
    loss = losses.negative_loss(clean, degraded, [visible])
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert losses.negative_loss(degraded[0], degraded, [visible]) > 0.05
    with pytest.raises(ValueError, match="mode"):
        losses.negative_loss(infrared, degraded, mode="printed")
    with pytest.raises(ValueError, match="one image for each"):
        losses.negative_loss(infrared, degraded, [])


def test_positive_sample_is_the_best_of_each_image(images):
    visible, infrared = images
    positive, best = losses.positive_sample(visible, infrared)
    candidates = [method(visible, infrared).clamp(0, 1) for method in CLASSICAL_FUSIONS.values()]
    scores = torch.stack([losses.fusion_quality(candidate, visible, infrared) for candidate in candidates])
    for i in range(2):
        assert scores[best[i], i] == scores[:, i].max()
        assert torch.equal(positive[i], candidates[best[i]][i])
    # another evaluation function, which prefers the brightest image
    _, best = losses.positive_sample(visible, infrared, evaluate=lambda fused, *_: fused.mean(dim=(1, 2, 3)))
    assert list(CLASSICAL_FUSIONS)[best[0]] in ("maximum", "laplacian_maximum")


def test_fusion_quality_prefers_kept_detail(images):
    visible, _ = images
    flat = torch.full_like(visible, 0.5)
    quality = [losses.fusion_quality(image, visible, flat) for image in (visible, (visible + flat) / 2, flat)]
    assert (quality[0] > quality[1]).all() and (quality[1] > quality[2]).all()
    assert (quality[0] > 0.99).all()
    assert torch.isfinite(losses.fusion_quality(flat, flat, flat)).all()


def test_equation_10_is_the_weighted_sum(images):
    visible, infrared = images
    fused = (visible + infrared) / 2
    degraded = (blur(visible), blur(infrared))
    positive, _ = losses.positive_sample(visible, infrared)
    result = losses.fusion_loss(
        fused, (visible, infrared), degraded, positive, degraded_positive=blur(positive),
        similarity_weight=2.0, negative_weight=3.0, positive_weight=5.0,
    )  # fmt: skip
    negatives = [losses.negative_loss(fused, [d], [c]) for d, c in zip(
        (*degraded, blur(positive)), (visible, infrared, positive), strict=True)]  # fmt: skip
    torch.testing.assert_close(result.negative, torch.stack(negatives).mean())
    torch.testing.assert_close(result.similarity, losses.similarity_loss(fused, (visible, infrared)))
    torch.testing.assert_close(result.positive, losses.positive_loss(fused, positive))
    torch.testing.assert_close(
        result.total, 2 * result.similarity + 3 * result.negative + 5 * result.positive
    )


def test_losses_are_finite_and_differentiable_for_wild_and_for_flat_images(larger):
    visible, infrared = larger
    for fused in (torch.full_like(visible, 0.5), 100 * visible - 50, visible.clone()):
        fused.requires_grad_()
        result = losses.fusion_loss(
            fused, (visible, infrared), (blur(visible), blur(infrared)), visible, lost=torch.ones(2).bool()
        )
        total = result.total + losses.restoration_loss(fused, visible)
        (gradient,) = torch.autograd.grad(total, fused)
        assert torch.isfinite(total) and torch.isfinite(gradient).all()


def test_similarity_is_in_float32_whatever_comes(images):
    """A variance is the small difference of two means: bfloat16 would lose it."""
    visible, infrared = images
    expected = losses.similarity(visible, infrared)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.similarity(visible, infrared), expected)
    halves = (visible.bfloat16(), infrared.bfloat16())
    rounded = losses.similarity(*(half.float() for half in halves))
    assert torch.equal(losses.similarity(*halves), rounded)


def test_information_is_in_float32_whatever_comes(larger):
    visible, infrared = larger
    fused = (visible + infrared) / 2
    expected = losses.information(fused, visible, infrared)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.information(fused, visible, infrared), expected)
    halves = [image.bfloat16() for image in (fused, visible, infrared)]
    assert torch.equal(losses.information(*halves), losses.information(*(half.float() for half in halves)))


@pytest.fixture
def larger():
    """Two smooth random images with some noise, Tensor[2, 2, 1, 60, 53]: VIFF needs 41 pixels."""
    coarse = torch.rand(4, 1, 12, 11, generator=torch.Generator().manual_seed(1))
    smooth = F.interpolate(coarse, size=(60, 53), mode="bicubic").clamp(0, 1)
    return (smooth + 0.05 * torch.rand_like(smooth)).clamp(0, 1).view(2, 2, 1, 60, 53)


def test_information_is_viff_as_long_as_nothing_is_added(larger):
    visible, infrared = larger
    for fused in (0.4 * (visible + infrared), blur(visible), torch.full_like(visible, 0.5)):
        expected = viff(fused, visible, infrared)
        torch.testing.assert_close(losses.information(fused, visible, infrared), expected, atol=1e-4, rtol=0)
    sharpened = 0.5 + 2 * (visible - 0.5)
    assert (viff(sharpened.clamp(-1, 2), visible, visible) > 1.2).all()
    kept = losses.information(sharpened, visible, visible)
    assert (kept <= 1 + 1e-6).all() and (kept > 0.99).all()


def test_fidelity_by_hand(larger):
    """Of one image twice: nothing is lost by itself, and a brighter one deviates only."""
    visible, infrared = larger
    expected = torch.tensor([0.0, 0.0])
    torch.testing.assert_close(losses.fidelity_loss(visible, visible, visible), expected, atol=1e-4, rtol=0)
    brighter = losses.fidelity_loss(visible + 0.1, visible, visible, deviation_weight=30.0)
    torch.testing.assert_close(brighter, expected + 0.3, atol=1e-3, rtol=0)
    mean = (visible + infrared) / 2
    without = 1 - losses.information(mean, visible, infrared)
    torch.testing.assert_close(losses.fidelity_loss(mean, visible, infrared), without)


def test_fidelity_takes_the_place_of_the_positive_sample_of_lost_pairs(larger):
    visible, infrared = larger.double()  # in float32 the gradient of what asks for nothing is rounding
    fused = ((visible + infrared) / 2 + 0.05).requires_grad_()
    degraded, positive = (blur(visible), blur(infrared)), visible
    weights = {
        "similarity_weight": 0.0,
        "negative_weight": 0.0,
        "positive_weight": 2.0,
        "fidelity_weight": 3.0,
    }
    lost = torch.tensor([False, True])
    result = losses.fusion_loss(fused, (visible, infrared), degraded, positive, lost=lost, **weights)
    faithful = losses.fidelity_loss(fused, visible, infrared)[1] / 2
    torch.testing.assert_close(result.fidelity, faithful)
    torch.testing.assert_close(result.total, 2 * result.positive + 3 * faithful)
    # Each sample is moved by its own term alone.
    (gradient,) = torch.autograd.grad(result.positive, fused, retain_graph=True)
    assert gradient[0].any() and gradient[1].abs().max() < 1e-6 * gradient[0].abs().max()
    (gradient,) = torch.autograd.grad(result.fidelity, fused)
    assert not gradient[0].any() and gradient[1].any()
    without = losses.fusion_loss(fused, (visible, infrared), degraded, positive, **weights)
    assert without.fidelity == 0
    torch.testing.assert_close(without.positive, losses.positive_loss(fused, positive))


def test_the_losses_of_two_by_two_images_by_hand():
    """Everything but SSIM, on numbers that can be worked out on paper."""
    fused = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]])
    positive = torch.tensor([[[[0.5, 0.8], [0.5, 0.5]]]])
    # Charbonnier: three zeros and sqrt(0.3² + 0.4²) - 0.4 = 0.1, over four pixels.
    assert losses.charbonnier(fused, positive, epsilon=0.4).item() == pytest.approx(0.1 / 4)
    # Of the error -0.3 at one corner: horizontal differences -0.3, 0 and vertical ones 0, 0.3.
    assert losses.gradient_difference(fused, positive).item() == pytest.approx(0.15 + 0.15)


def test_activity_is_looked_for_anywhere_in_a_window():
    edge, moved, none = torch.zeros(3, 1, 1, 17, 17).unbind(0)
    edge[..., 3:] = 0.5
    moved[..., 6:] = 0.5
    assert losses.activity_difference(moved, edge).item() == 0
    # One of 8 columns of differences has the step, in half of the windows.
    assert losses.activity_difference(none, edge).item() == pytest.approx(0.5 / 8 / 2)
    moved[..., :9] = 0  # into the window beside
    assert losses.activity_difference(moved, edge).item() == pytest.approx(0.5 / 8)
    fused = torch.rand(1, 1, 17, 17)
    without = losses.positive_loss(fused, edge, activity_weight=0)
    activity = losses.activity_difference(fused, edge)
    torch.testing.assert_close(losses.positive_loss(fused, edge, activity_weight=3), without + 3 * activity)


def test_losses_of_flat_images_by_hand():
    """SSIM of flat images is its luminance term (2 ab + C1) / (a² + b² + C1), C1 = 1e-4."""

    def flat(value):
        return torch.full((1, 1, 16, 16), value, dtype=torch.float64)

    def ssim_of(a, b):
        return (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)

    fused, sources, degraded, positive = 0.5, (0.4, 0.8), (0.1, 0.9), 0.6
    similar = 1 - (ssim_of(0.4, 0.5) + ssim_of(0.8, 0.5)) / 2
    repelled = [ssim_of(0.1, 0.5) - ssim_of(0.1, 0.4), ssim_of(0.9, 0.5) - ssim_of(0.9, 0.8)]
    repelled.append(ssim_of(0.3, 0.5) - ssim_of(0.3, 0.6))  # H3: the degraded positive sample
    negative = sum(max(0, value) for value in repelled) / 3
    distance = (0.1**2 + 1e-6) ** 0.5 - 1e-3
    near = distance + 0.5 * (1 - ssim_of(0.5, 0.6))
    result = losses.fusion_loss(
        flat(fused),
        [flat(value) for value in sources],
        [flat(value) for value in degraded],
        flat(positive),
        degraded_positive=flat(0.3),
    )
    expected = (similar + negative + near, similar, negative, near, 0)  # eq. 10, 7, 8, 9
    assert [value.item() for value in result] == pytest.approx(expected, abs=1e-9)
    literal = losses.negative_loss(flat(fused), [flat(value) for value in degraded], mode="literal")
    assert literal.item() == pytest.approx(1 - (ssim_of(0.1, 0.5) + ssim_of(0.9, 0.5)) / 2, abs=1e-9)
    restoration = losses.restoration_loss(flat(0.7), flat(0.6))
    assert restoration.item() == pytest.approx(distance + 0.1 * (1 - ssim_of(0.7, 0.6)), abs=1e-9)
