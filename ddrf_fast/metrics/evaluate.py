"""All measures by their usual names, for fused images and for restored ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddrf_fast.metrics._images import Convention, check_convention, prepare
from ddrf_fast.metrics.edges import qabf
from ddrf_fast.metrics.fidelity import psnr, ssim
from ddrf_fast.metrics.information import entropy, mutual_information
from ddrf_fast.metrics.naturalness import niqe
from ddrf_fast.metrics.sharpness import average_gradient, spatial_frequency, standard_deviation
from ddrf_fast.metrics.visual_information import vif, viff


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        compute: of an image, its references, and the convention, Tensor[B].
        references: how many references it takes: "none", "any" or "two".
        higher_is_better: which direction ranks read as better.
        smallest: rows and columns that it needs (those of NIQE depend on one another; it checks them itself).
    """

    compute: Callable[[Tensor, Sequence[Tensor], Convention], Tensor]
    references: str = "any"
    higher_is_better: bool = True
    smallest: int = 1


MEASURES: dict[str, Measure] = {
    "EN": Measure(lambda image, references, convention: entropy(image), "none"),
    "AG": Measure(
        lambda image, references, convention: average_gradient(image, convention=convention),
        "none",
        smallest=2,
    ),
    "SSIM": Measure(
        lambda image, references, convention: ssim(image, *references, convention=convention), smallest=11
    ),
    "VIF": Measure(lambda image, references, convention: vif(image, *references), smallest=41),
    "VIFF": Measure(lambda image, references, convention: viff(image, *references), "two", smallest=41),
    "PSNR": Measure(lambda image, references, convention: psnr(image, *references, convention=convention)),
    "Qabf": Measure(
        lambda image, references, convention: qabf(image, *references, convention=convention),
        "two",
        smallest=2,
    ),
    "MI": Measure(
        lambda image, references, convention: mutual_information(image, *references, convention=convention)
    ),
    "SF": Measure(
        lambda image, references, convention: spatial_frequency(image, convention=convention),
        "none",
        smallest=2,
    ),
    "SD": Measure(lambda image, references, convention: standard_deviation(image), "none"),
    "NIQE": Measure(lambda image, references, convention: niqe(image), "none", higher_is_better=False),
    "Mean": Measure(
        lambda image, references, convention: paper_mean(image, *references, convention=convention),
        smallest=41,
    ),
}
"""The measures by name."""

FUSION_METRICS = ("EN", "AG", "SSIM", "VIF", "VIFF", "PSNR", "Qabf", "MI", "SF", "SD")
"""What :func:`evaluate` measures by default."""

RESTORATION_METRICS = ("PSNR", "SSIM", "VIF")
"""What :func:`evaluate_restored` measures by default."""

_MEAN_OF = ("EN", "AG", "SSIM", "VIF", "PSNR")


def paper_mean(
    image: Tensor, reference: Tensor, *references: Tensor, convention: Convention = "standard"
) -> Tensor:
    """The "Mean" of DDRF-Net's Table 4: that of EN, AG, SSIM, VIF and PSNR.

    Bits, grey values and decibels are added up as they are, so that PSNR and AG decide alone. It is there to
    compare with that table; its Table 3 averages a sixth figure that is not printed.

    Args:
        image: Tensor[B, 1, H, W] or Tensor[H, W].
        reference: the same shape.
        references: more of them.
        convention: of its parts.

    Returns:
        Tensor[B], higher is better.

    Raises:
        ValueError: also where the image is smaller than 41x41, or the convention is unknown.

    Example:
        >>> fused, visible, infrared = torch.rand(3, 1, 1, 48, 48)
        >>> paper_mean(fused, visible, infrared).shape
        torch.Size([1])
    """
    check_convention(convention)
    parts = [MEASURES[name].compute(image, (reference, *references), convention) for name in _MEAN_OF]
    return torch.stack(parts).mean(0)


def evaluate(
    fused: Tensor,
    visible: Tensor,
    infrared: Tensor,
    metrics: Sequence[str] = FUSION_METRICS,
    convention: Convention = "standard",
) -> dict[str, Tensor]:
    """Several measures of fused images against their sources.

    Args:
        fused: Tensor[B, 1, H, W] or Tensor[H, W], in [0, 1] or uint8; in the convention "vifb" also
            Tensor[B, 3, H, W], measured channel by channel and averaged.
        visible: the same shape, or where channels are measured one or three of them.
        infrared: likewise.
        metrics: names of :data:`MEASURES`.
        convention: one of :data:`CONVENTIONS`.

    Returns:
        Name of the measure -> Tensor[B].

    Raises:
        ValueError: the shapes differ, an image is smaller than a measure needs (for VIF and VIFF 41x41, for
            SSIM 11x11, for AG, SF and Qabf 2x2, for NIQE 96x192), values are out of range, or a measure or
            the convention is unknown.
        TypeError: an image is no tensor of numbers.

    Example:
        >>> scores = evaluate(*torch.rand(3, 2, 1, 48, 48))
        >>> list(scores), scores["SSIM"].shape
        (['EN', 'AG', 'SSIM', 'VIF', 'VIFF', 'PSNR', 'Qabf', 'MI', 'SF', 'SD'], torch.Size([2]))
    """
    images = {"fused": fused, "visible": visible, "infrared": infrared}
    return _evaluate(images, metrics, convention)


def evaluate_restored(
    restored: Tensor,
    clean: Tensor,
    metrics: Sequence[str] = RESTORATION_METRICS,
    convention: Convention = "standard",
) -> dict[str, Tensor]:
    """Several measures of restored images against the clean ones.

    Args:
        restored: Tensor[B, 1, H, W] or Tensor[H, W], in [0, 1] or uint8.
        clean: the same shape.
        metrics: names of :data:`MEASURES` without those that need two sources, VIFF and Qabf.
        convention: one of :data:`CONVENTIONS`.

    Returns:
        Name of the measure -> Tensor[B].

    Raises:
        ValueError: as for :func:`evaluate`, or a measure needs two sources.
        TypeError: an image is no tensor of numbers.

    Example:
        >>> clean = torch.rand(48, 48)
        >>> evaluate_restored(clean * 0.5, clean)["SSIM"].shape
        torch.Size([1])
    """
    return _evaluate({"restored": restored, "clean": clean}, metrics, convention)


def check_metrics(metrics: Sequence[str], sources: int) -> None:
    """Refuses measures that :func:`evaluate` or :func:`evaluate_restored` would not take.

    Args:
        metrics: names of measures.
        sources: with how many images each is compared: 2 of a fusion, 1 of a restoration.

    Raises:
        ValueError: a measure is unknown, or needs two sources.
    """
    for name in metrics:
        if name not in MEASURES:
            raise ValueError(f"metrics must be among {', '.join(MEASURES)}, got {name!r}")
        if MEASURES[name].references == "two" and sources != 2:
            raise ValueError(f"metrics must not hold {name} here: it needs two sources")


def _evaluate(images: dict[str, Tensor], metrics: Sequence[str], convention: Convention) -> dict[str, Tensor]:
    check_convention(convention)
    check_metrics(metrics, len(images) - 1)
    image, *references = images.values()
    if convention == "vifb" and image.ndim == 4 and image.shape[1] == 3:
        return _by_channels(images, metrics)
    # By their own names, and before anything is computed.
    smallest = max([1, *(MEASURES[name].smallest for name in metrics)])
    prepare(image, *references, smallest=smallest, names=tuple(images))
    return {name: MEASURES[name].compute(image, references, convention) for name in metrics}


def _by_channels(images: dict[str, Tensor], metrics: Sequence[str]) -> dict[str, Tensor]:
    """Of colour images in the convention "vifb"; a source may be gray."""
    parts = [{name: image[:, c % image.shape[1], None] for name, image in images.items()} for c in range(3)]
    scores = [_evaluate(part, metrics, "vifb") for part in parts]
    result = {name: torch.stack([values[name] for values in scores]).mean(0) for name in metrics}
    if "SF" in metrics:  # which its code takes of the channels side by side
        wide = {name: torch.cat([part[name] for part in parts], dim=3) for name in images}
        result |= _evaluate(wide, ("SF",), "vifb")
    return result
