"""The measures against independent code (NumPy, SciPy, scikit-image) and against published figures."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.ndimage import gaussian_filter
from scipy.signal import convolve2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ddrf_fast import metrics
from ddrf_fast.metrics import evaluate, evaluate_restored

# Measured with NumPy, SciPy and scikit-image (not with this package) on published fusions of three TNO pairs.
GOLDEN = {
    ("ifcnn", "05"): {
        "EN": 6.480113791783973,
        "AG": 4.224205632842437,
        "SSIM": 0.7685475067287182,
        "VIF": 0.6279074955388553,
        "VIFF": 0.6800009285188828,
        "PSNR": 16.51041000153385,
        "Qabf": 0.3449263632243334,
        "MI": 2.324741888607713,
        "SF": 10.555096481245213,
        "SD": 22.638409058427506,
    },
    ("ifcnn", "12"): {
        "EN": 6.888102379327153,
        "AG": 4.545537677063285,
        "SSIM": 0.7271387798175626,
        "VIF": 0.5788011157315135,
        "VIFF": 0.440410902411937,
        "PSNR": 15.724932774024607,
        "Qabf": 0.43287960082835913,
        "MI": 1.8624164026919008,
        "SF": 10.985033970187114,
        "SD": 44.23886015681146,
    },
    ("densefuse", "05"): {
        "EN": 5.917233744925562,
        "AG": 1.979731825235247,
        "SSIM": 0.8466897707421595,
        "VIF": 0.551208988170144,
        "VIFF": 0.2973884743052379,
        "PSNR": 17.315367440434866,
        "Qabf": 0.2703133793171331,
        "MI": 2.236739308064795,
        "SF": 5.148586445504365,
        "SD": 14.953257243466505,
    },
}


@pytest.fixture
def images():
    """Fused, visible and infrared, uint8 Tensor[3, 2, 1, 54, 61]: smooth, alike but not equal."""
    generator = np.random.default_rng(0)
    common = generator.uniform(0, 255, (1, 2, 54, 61))
    own = generator.uniform(0, 255, (3, 2, 54, 61))
    field = 0.5 * common + 0.5 * own
    blurred = np.stack([[cv2.GaussianBlur(image, (0, 0), 1.2) for image in batch] for batch in field])
    stretched = (blurred - blurred.min()) / (blurred.max() - blurred.min()) * 255
    return torch.from_numpy(stretched.round().astype(np.uint8))[:, :, None]


def per_image(measure, *images):
    """`measure` of NumPy arrays [H, W], for each image of a batch."""
    return torch.tensor(np.array([measure(*(image[b, 0].numpy() for image in images)) for b in range(2)]))


@pytest.mark.parametrize(("method", "name"), GOLDEN)
def test_published_fusions_have_the_golden_figures(data_dir, method, name):
    paths = (
        data_dir / f"baselines/tno/{method}/{name}.png",
        data_dir / f"tno/test/vis/{name}.png",
        data_dir / f"tno/test/ir/{name}.png",
    )
    images = [torch.from_numpy(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) for path in paths]
    actual = {key: value.item() for key, value in evaluate(*images).items()}
    assert actual == pytest.approx(GOLDEN[method, name], rel=1e-9)


def test_entropy(images):
    def expected(image):
        probability = np.bincount(image.ravel(), minlength=256) / image.size
        return -sum(p * math.log2(p) for p in probability if p)

    torch.testing.assert_close(metrics.entropy(images[0]), per_image(expected, images[0]))
    # Floats are rounded to whole values first.
    torch.testing.assert_close(
        metrics.entropy((images[0] + 0.3) / 255), per_image(expected, images[0]).float(), atol=1e-5, rtol=0
    )
    every_value = torch.arange(256, dtype=torch.uint8).repeat(4).view(32, 32)
    assert metrics.entropy(every_value).item() == pytest.approx(8)


def test_average_gradient(images):
    def expected(image):
        y, x = np.gradient(image.astype(float))
        return np.sqrt((x**2 + y**2) / 2).mean()

    torch.testing.assert_close(metrics.average_gradient(images[0]), per_image(expected, images[0]))


def test_spatial_frequency_and_standard_deviation(images):
    def frequency(image):
        image = image.astype(float)
        return math.sqrt(((np.diff(image) ** 2).sum() + (np.diff(image, axis=0) ** 2).sum()) / image.size)

    torch.testing.assert_close(metrics.spatial_frequency(images[0]), per_image(frequency, images[0]))
    torch.testing.assert_close(metrics.standard_deviation(images[0]), per_image(np.std, images[0]))


def test_mutual_information(images):
    def expected(a, b):
        joint = np.histogram2d(a.ravel(), b.ravel(), bins=256, range=[[-0.5, 255.5]] * 2)[0] / a.size
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        return (joint[joint > 0] * np.log2(joint[joint > 0] / independent[joint > 0])).sum()

    pairs = [per_image(expected, images[0], images[k]) for k in (1, 2)]
    torch.testing.assert_close(metrics.mutual_information(*images), pairs[0] + pairs[1])
    torch.testing.assert_close(metrics.mutual_information(images[0], images[0]), metrics.entropy(images[0]))


def test_psnr(images):
    def expected(image, reference):
        return peak_signal_noise_ratio(reference, image)

    torch.testing.assert_close(metrics.psnr(*images[:2]), per_image(expected, *images[:2]))
    # Of two references, the errors are averaged and not the decibels.
    decibels = [per_image(expected, images[0], images[k]) for k in (1, 2)]
    mean = -10 * torch.log10((10 ** (-decibels[0] / 10) + 10 ** (-decibels[1] / 10)) / 2)
    torch.testing.assert_close(metrics.psnr(*images), mean)
    assert metrics.psnr(images[0], images[0]).tolist() == [math.inf, math.inf]


def test_ssim(images):
    def expected(image, reference):
        _, similarity = structural_similarity(
            reference,
            image,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        return similarity[5:-5, 5:-5].mean()

    single = [per_image(expected, images[0], images[k]) for k in (1, 2)]
    torch.testing.assert_close(metrics.ssim(images[0], images[1]), single[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(metrics.ssim(*images), (single[0] + single[1]) / 2, atol=1e-10, rtol=0)


def test_vif(images):
    functional = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")
    floats = images.double()
    single = [
        torch.stack(
            [
                functional.visual_information_fidelity(floats[0, b : b + 1], floats[k, b : b + 1])
                for b in range(2)
            ]
        )
        for k in (1, 2)
    ]
    torch.testing.assert_close(metrics.vif(images[0], images[1]), single[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(metrics.vif(*images), single[0] + single[1], atol=1e-6, rtol=0)


def han_viff(fused, *sources):
    """VIFF by the definition, with dense windows."""

    def scales(reference, image):
        reference, image = reference.astype(float), image.astype(float)
        for size in (17, 9, 5, 3):
            y, x = np.mgrid[:size, :size] - size // 2
            window = np.exp(-(x**2 + y**2) / (2 * (size / 5) ** 2))
            window /= window.sum()

            def smooth(values, window=window):
                return convolve2d(values, window, mode="valid")

            if size < 17:
                reference, image = smooth(reference)[::2, ::2], smooth(image)[::2, ::2]
            variance = np.maximum(smooth(reference**2) - smooth(reference) ** 2, 0)
            other = np.maximum(smooth(image**2) - smooth(image) ** 2, 0)
            covariance = smooth(reference * image) - smooth(reference) * smooth(image)
            gain = covariance / (variance + 1e-10)
            distortion = np.where(gain < 0, other, other - gain * covariance).clip(1e-10)
            gain = gain.clip(0)
            noise = 0.005 * 255**2
            yield (
                gain,
                np.log10(1 + gain**2 * variance / (distortion + noise)),
                np.log10(1 + variance / noise),
            )

    ratios = []
    for first, second in zip(*(scales(source, fused) for source in sources), strict=True):
        kept, total = (np.where(first[0] < second[0], first[k], second[k]) for k in (1, 2))
        ratios.append((kept + 1e-7).sum() / (total + 1e-7).sum())
    return np.dot(ratios, [1, 0, 0.15, 1]) / 2.15


def test_viff(images):
    torch.testing.assert_close(metrics.viff(*images), per_image(han_viff, *images))
    # The worse of both sources counts: one that is lost altogether costs more than a half.
    noise = torch.randint(0, 256, images[0].shape, dtype=torch.uint8)
    assert (metrics.viff(images[1], images[1], noise) < 0.5).all()


# By NIQE's implementation in MMagic 1.2.0, in float64; to 1e-3, since its table of shapes has steps of 1e-3.
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("baselines/tno/ifcnn/12.png", 4.0599123),
        ("baselines/tno/densefuse/05.png", 5.9364181),
        ("tno/test/vis/12.png", 5.1317847),
        ("msrs/test/vis/00095D.png", 3.7270348),
    ],
)
def test_niqe_of_photographs(data_dir, path, expected):
    image = torch.from_numpy(cv2.imread(str(data_dir / path), cv2.IMREAD_GRAYSCALE))
    assert metrics.niqe(image).item() == pytest.approx(expected, rel=1e-3)
    assert metrics.niqe(image.float() / 255).item() == pytest.approx(metrics.niqe(image).item(), rel=1e-6)
    stacked = metrics.niqe(torch.stack((image, image.flip(1)))[:, None])
    assert stacked.shape == (2,)
    assert stacked[0] == metrics.niqe(image)


def test_the_model_of_niqe_carries_its_notice():
    path = Path(metrics.__file__).parent.parent / "assets" / "niqe_pristine.safetensors"
    with safe_open(path, framework="pt") as file:
        notice = file.metadata()["notice"]
    assert "Copyright (c) 2011 The University of Texas at Austin" in notice
    assert notice.rstrip().endswith("COPYRIGHT NOTICE ENDS WITH THIS LINE------------%")


def test_niqe_of_what_it_cannot_measure():
    with pytest.raises(ValueError, match=r"image must hold two blocks of 96x96 pixels, got .*95, 400"):
        metrics.niqe(torch.rand(95, 400))
    assert metrics.niqe(torch.full((1, 1, 96, 192), 0.5)).isnan().all()
    assert metrics.niqe(torch.rand(0, 1, 96, 192)).shape == (0,)


def test_the_conventions_of_vifb(images):
    """VIFB 2023-04-23, written down from its MATLAB code."""

    def gradient(image):
        y, x = np.gradient(image.astype(float))
        return np.sqrt((x**2 + y**2) / 2).sum() / (image.shape[0] - 1) / (image.shape[1] - 1)

    def decibels(fused, *sources):
        errors = [np.sqrt(((fused.astype(float) - source) ** 2).sum()) / fused.size for source in sources]
        return 20 * math.log10(255 / math.sqrt(sum(errors) / 2))

    def information(fused, *sources):
        def stretched(image):
            image = (image - float(image.min())) / (float(image.max()) - image.min())
            return (image * 255).round().ravel()

        return sum(mutual_information_in_nats(stretched(fused), stretched(source)) for source in sources)

    actual = evaluate(*images, metrics=("AG", "SSIM", "PSNR", "SF", "MI"), convention="vifb")
    torch.testing.assert_close(actual["AG"], per_image(gradient, images[0]))
    torch.testing.assert_close(actual["SSIM"], 2 * metrics.ssim(*images))
    torch.testing.assert_close(actual["PSNR"], per_image(decibels, *images))
    torch.testing.assert_close(actual["SF"], metrics.spatial_frequency(images[0]))
    torch.testing.assert_close(actual["MI"], per_image(information, *images))


def test_the_conventions_of_tang(images):
    def similarity(fused, *sources):
        return sum(matlab_ssim(fused, source) for source in sources) / 2

    def frequency(image):
        image = image / 255
        return math.sqrt((np.diff(image) ** 2).mean() + (np.diff(image, axis=0) ** 2).mean())

    actual = evaluate(*images, metrics=("AG", "SSIM", "PSNR", "SF", "MI"), convention="tang")
    torch.testing.assert_close(actual["AG"], metrics.average_gradient(images[0], convention="vifb"))
    torch.testing.assert_close(actual["SSIM"], per_image(similarity, *images))
    torch.testing.assert_close(actual["PSNR"], metrics.psnr(*images) + 20 * math.log10(255))
    torch.testing.assert_close(actual["SF"], per_image(frequency, images[0]))
    torch.testing.assert_close(actual["MI"], metrics.mutual_information(*images))


def test_the_conventions_of_cddfuse(images):
    def similarity(fused, *sources):
        # What scikit-image before 0.20 took for the range of floats was -1..1.
        pairs = ((fused.astype(float), source.astype(float)) for source in sources)
        return sum(structural_similarity(*pair, data_range=2) for pair in pairs)

    def decibels(fused, *sources):
        errors = [((fused.astype(float) - source) ** 2).mean() for source in sources]
        return 10 * math.log10(float(fused.max()) ** 2 / (sum(errors) / 2))

    def information(fused, *sources):
        return sum(mutual_information_in_nats(fused.ravel(), source.ravel()) for source in sources)

    def frequency(image):
        image = image.astype(float)
        return math.sqrt((np.diff(image) ** 2).mean() + (np.diff(image, axis=0) ** 2).mean())

    actual = evaluate(*images, metrics=("AG", "SSIM", "PSNR", "SF", "MI"), convention="cddfuse")
    torch.testing.assert_close(actual["AG"], metrics.average_gradient(images[0]))
    torch.testing.assert_close(actual["SSIM"], per_image(similarity, *images))
    torch.testing.assert_close(actual["PSNR"], per_image(decibels, *images))
    torch.testing.assert_close(actual["SF"], per_image(frequency, images[0]))
    torch.testing.assert_close(actual["MI"], per_image(information, *images))


def mutual_information_in_nats(first, second):
    joint = np.histogram2d(first, second, bins=256, range=[[-0.5, 255.5]] * 2)[0] / first.size
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return (joint[joint > 0] * np.log(joint[joint > 0] / independent[joint > 0])).sum()


def matlab_ssim(first, second):
    """MATLAB's `ssim` of doubles in 0..255: its constants are those of [0, 1], the border is replicated."""

    def smooth(values):
        return gaussian_filter(values, 1.5, mode="nearest", truncate=3.5)

    first, second = first.astype(float), second.astype(float)
    mean1, mean2 = smooth(first), smooth(second)
    variances = smooth(first**2) - mean1**2 + smooth(second**2) - mean2**2
    covariance = smooth(first * second) - mean1 * mean2
    luminance = (2 * mean1 * mean2 + 1e-4) / (mean1**2 + mean2**2 + 1e-4)
    return (luminance * (2 * covariance + 9e-4) / (variances + 9e-4)).mean()


@pytest.mark.parametrize(("convention", "scale"), [("vifb", 255), ("cddfuse", 255), ("tang", 1)])
def test_qabf_of_the_code_that_everybody_copies(images, convention, scale):
    def edges(image):
        image = image * (scale / 255)
        x, y = (convolve2d(image, kernel, mode="same") for kernel in (SOBEL, -SOBEL.T))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.hypot(x, y), np.where(x == 0, np.pi / 2, np.arctan(y / x))

    def expected(fused, *sources):
        strength, angle = edges(fused)
        kept = total = 0.0
        for g, a in map(edges, sources):
            with np.errstate(invalid="ignore"):
                ratio = np.where(g == strength, strength, np.minimum(g, strength) / np.maximum(g, strength))
            alignment = 1 - abs(a - angle) / (np.pi / 2)
            quality = (
                0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (alignment - 0.8)))
            )
            kept, total = kept + (quality * g).sum(), total + g.sum()
        return kept / total

    actual = metrics.qabf(*images, convention=convention)
    # Which edges are equally strong is a matter of rounding in [0, 1].
    torch.testing.assert_close(
        actual, per_image(expected, *images), atol=2e-4 if scale == 1 else 1e-9, rtol=0
    )


SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])


def test_colour_is_measured_channel_by_channel_where_vifb_does(images):
    gray = images.float() / 255
    colour = gray.expand(-1, -1, 3, -1, -1) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
    measured = evaluate(*colour, convention="vifb")
    sf = measured.pop("SF")
    torch.testing.assert_close(
        sf, metrics.spatial_frequency(torch.cat(colour[0].split(1, dim=1), dim=3), convention="vifb")
    )
    for name, value in measured.items():
        channels = [evaluate(*colour[:, :, c : c + 1], convention="vifb")[name] for c in range(3)]
        torch.testing.assert_close(value, torch.stack(channels).mean(0))
    gray_infrared = evaluate(*colour[:2], gray[2], convention="vifb")
    channels = [evaluate(*colour[:2, :, c : c + 1], gray[2], convention="vifb") for c in range(3)]
    torch.testing.assert_close(gray_infrared["SSIM"], sum(scores["SSIM"] for scores in channels) / 3)
    with pytest.raises(ValueError, match=r"visible .*luminance.*got \[2, 3, 54, 61\]"):
        evaluate(gray[0], colour[1], gray[2], convention="vifb")
    with pytest.raises(ValueError, match=r"fused .*luminance.*got \[2, 3, 54, 61\]"):
        evaluate(*colour)


def test_restored_images(images):
    scores = evaluate_restored(*images[:2])
    assert list(scores) == ["PSNR", "SSIM", "VIF"]
    torch.testing.assert_close(scores["PSNR"], metrics.psnr(images[0], images[1]))
    with pytest.raises(ValueError, match="metrics must not hold Qabf here: it needs two sources"):
        evaluate_restored(*images[:2], metrics=("PSNR", "Qabf"))
    with pytest.raises(ValueError, match="clean must have the shape of restored"):
        evaluate_restored(images[0], images[1, ..., :50])


def test_the_papers_mean(images):
    parts = evaluate(*images, metrics=("EN", "AG", "SSIM", "VIF", "PSNR"))
    mean = evaluate(*images, metrics=["Mean"])["Mean"]
    torch.testing.assert_close(mean, torch.stack(list(parts.values())).mean(0))


def test_qabf(images):
    def edges(image):
        padded = np.pad(image.astype(float), 1, mode="reflect")
        x = convolve2d(padded, [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], mode="valid")
        y = convolve2d(padded, [[1, 2, 1], [0, 0, 0], [-1, -2, -1]], mode="valid")
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.hypot(x, y), np.where(x == 0, np.pi / 2, np.arctan(y / x))

    def expected(fused, *sources):
        strength, angle = edges(fused)
        kept = total = 0.0
        for g, a in map(edges, sources):
            with np.errstate(invalid="ignore"):
                ratio = np.where(g == strength, 1, np.minimum(g, strength) / np.maximum(g, strength))
            alignment = 1 - abs(a - angle) / (np.pi / 2)
            quality = (
                0.9994 / (1 + np.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + np.exp(-22 * (alignment - 0.8)))
            )
            kept, total = kept + (quality * g).sum(), total + g.sum()
        return kept / total

    torch.testing.assert_close(metrics.qabf(*images), per_image(expected, *images))


def test_a_batch_is_measured_image_by_image(images):
    whole = evaluate(*images)
    for b in range(2):
        for name, value in evaluate(*images[:, b, 0]).items():
            torch.testing.assert_close(value, whole[name][b : b + 1])
    empty = evaluate(*images[:, :0])
    assert {value.shape for value in empty.values()} == {torch.Size([0])}


def test_autocast_changes_nothing(images):
    floats = images.float() / 255
    expected = evaluate(*floats)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = evaluate(*floats)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_float32_is_precise_enough_to_print(images):
    expected = evaluate(*images)
    for name, value in evaluate(*images.float() / 255).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-4, atol=0)


def test_half_precision_images_are_computed_in_float32(images):
    halves = (images.float() / 255).to(torch.float16)
    expected = evaluate(*halves.float())
    for name, value in evaluate(*halves).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])


@pytest.mark.gpu
def test_a_gpu_measures_the_same(images):
    names = tuple(name for name in metrics.MEASURES if name != "NIQE")
    for convention in metrics.CONVENTIONS:
        expected = evaluate(*images, names, convention)
        for name, value in evaluate(*images.cuda(), names, convention).items():
            assert value.is_cuda
            torch.testing.assert_close(value.cpu(), expected[name], msg=f"{name}, {convention}")
    noise = torch.rand(2, 1, 200, 300)
    torch.testing.assert_close(metrics.niqe(noise.cuda()).cpu(), metrics.niqe(noise))


def test_images_without_structure():
    flat = torch.full((1, 1, 41, 41), 0.5)
    scores = {name: value.item() for name, value in evaluate(flat, flat, flat).items()}
    perfect = {"SSIM": 1, "VIF": 2, "VIFF": 1, "PSNR": math.inf, "Qabf": 1}
    assert scores == {"EN": 0, "AG": 0, "MI": 0, "SF": 0, "SD": 0} | perfect


DIFFERENTIABLE = ("AG", "SSIM", "VIF", "VIFF", "PSNR", "Qabf", "SF", "SD")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(images, name):
    fused, *sources = (images[:, :1, :, :44, :41].double() / 255).contiguous()
    # Off the integers, where edges and gradients are equal and derivatives jump.
    fused = (fused + 1e-3 * torch.rand_like(fused)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: evaluate(x, *sources, metrics=[name])[name], fused, eps=1e-7, atol=1e-4, fast_mode=True
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_finite_without_structure(name):
    fused = torch.full((1, 1, 48, 48), 0.5, requires_grad=True)
    flat = torch.full((1, 1, 48, 48), 0.25)
    evaluate(fused, flat, flat, metrics=[name])[name].sum().backward()
    assert fused.grad.isfinite().all()


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_psnr_has_finite_gradients_where_images_are_equal(images, convention):
    fused, visible, infrared = (images[:, :1].float() / 255).contiguous()
    for references in ((visible, infrared), (visible,)):
        image = torch.cat((fused, visible, torch.zeros_like(fused))).requires_grad_()
        others = [torch.cat((other, other, torch.zeros_like(other))) for other in references]
        value = metrics.psnr(image, *others, convention=convention)
        value[value.isfinite()].sum().backward()
        assert image.grad.isfinite().all()
        assert image.grad[0].abs().max() > 0
        assert value[2] == math.inf
        assert (value[1] == math.inf) == (len(references) == 1)


def test_flat_regions_are_no_matter_of_rounding():
    road = torch.rand(1, 1, 30, 64, generator=torch.Generator().manual_seed(0))
    skies = 0.9, 0.1, 0.9
    images = [torch.cat((torch.full((1, 1, 60, 64), sky), road * sky), dim=2) for sky in skies]
    for convention in metrics.CONVENTIONS:
        low, high = (
            evaluate(*(image.to(dtype) for image in images), ("SSIM", "VIFF"), convention)
            for dtype in (torch.float32, torch.float64)
        )
        for name in low:
            torch.testing.assert_close(low[name].double(), high[name], rtol=1e-5, atol=1e-6)


def test_all_measures_but_one_compile_together(images):
    names = tuple(name for name in metrics.MEASURES if name != "NIQE")  # which reads a file
    compiled = torch.compile(evaluate, backend="eager", fullgraph=True)
    for name, value in compiled(*images, names).items():
        torch.testing.assert_close(value, evaluate(*images, (name,))[name])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f, v, i: (f * 255, v, i), ValueError, r"fused must be in \[0, 1\].*got values from"),
        (
            lambda f, v, i: (f, (v * 65535).int(), i),
            ValueError,
            r"visible must be in \[0, 255\] for torch.int32",
        ),
        (lambda f, v, i: (f, v, i * math.nan), ValueError, r"infrared must be in \[0, 1\].*nan"),
        (lambda f, v, i: (f, v, i[..., :42]), ValueError, r"infrared must have the shape of fused"),
        (
            lambda f, v, i: (f.expand(1, 3, 48, 48), v, i),
            ValueError,
            r"fused .*luminance.*got \[1, 3, 48, 48\]",
        ),
        (lambda f, v, i: (f[..., :40], v[..., :40], i[..., :40]), ValueError, "at least 41x41 pixels"),
        (lambda f, v, i: (f, v.numpy(), i), TypeError, "visible must be a tensor, got ndarray"),
        (lambda f, v, i: (f > 0.5, v, i), TypeError, "fused must be floating or integer, got torch.bool"),
    ],
)
def test_wrong_images_are_named(change, error, message):
    images = torch.rand(3, 1, 1, 48, 48)
    with pytest.raises(error, match=message):
        evaluate(*change(*images))


@pytest.mark.parametrize("name", [name for name in metrics.MEASURES if name != "NIQE"])
def test_small_images_are_measured_as_far_as_they_go(name):
    """Each measure asks for no more pixels than it needs."""
    smallest = metrics.MEASURES[name].smallest
    images = torch.rand(3, 1, 1, smallest, smallest)
    assert evaluate(*images, metrics=(name,))[name].isfinite().all()
    if smallest > 1:
        with pytest.raises(ValueError, match=f"fused must be at least {smallest}x{smallest} pixels"):
            evaluate(*images[..., 1:], metrics=(name,))


def test_wrong_measures_and_conventions_are_named(images):
    with pytest.raises(ValueError, match=r"metrics must be among EN, .*got 'LPIPS'"):
        evaluate(*images, metrics=("EN", "LPIPS"))
    for call in (metrics.psnr, metrics.ssim, metrics.qabf, metrics.mutual_information, evaluate):
        with pytest.raises(ValueError, match=r"convention must be one of standard, .*got 'matlab'"):
            call(*images, convention="matlab")
    for call in (metrics.average_gradient, metrics.spatial_frequency):
        with pytest.raises(ValueError, match=r"convention must be one of standard, .*got 'matlab'"):
            call(images[0], convention="matlab")
