"""What the page does with a pair: degrades it if asked to, fuses, restores and measures it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ddrf_fast import metrics
from ddrf_fast.data import luminance
from ddrf_fast.data.thermal import ThermalRange
from ddrf_fast.degradation import DynamicDegradation, KernelBank, enlarge
from ddrf_fast.degradation.bank import FAMILIES
from ddrf_fast.degradation.photometric import as_in_a_file
from ddrf_fast.demo.sample import MEASURES, timed
from ddrf_fast.inference import Fuser, Restorer
from ddrf_fast.inference.pictures import Picture

BLURS = ("none", *FAMILIES, "mixed")
MODALITIES = ("visible", "infrared")

_SMALLEST_MEASURED = 41  # what VIF needs


# By image and measure.
Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Damage:
    """How a pair is degraded before it is fused; by default it is not.

    Attributes:
        modalities: which of its images.
        blur: "none", a family of kernels ("motion", "isotropic", "anisotropic"), or "mixed": one of each.
        strength: factor on the lengths and widths of the default bank's kernels, up to 1.4.
        spatial: whether the blur varies over the image.
        noise: standard deviation of white noise, of 255.
        scale: every scale-th pixel is kept, and the image is then brought back to its size.
        darkness: of the visible image's scene, from 0 to 1.
        seed: of all that is drawn.
    """

    modalities: tuple[str, ...] = MODALITIES
    blur: str = "none"
    strength: float = 1.0
    spatial: bool = True
    noise: float = 0.0
    scale: int = 1
    darkness: float = 0.0
    seed: int = 0

    def __call__(self, image: Tensor, modality: str) -> Tensor:
        """Tensor[1, C, H, W] in [0, 1] degraded, as files of 8 bit hold it; itself if nothing is asked for.

        Raises:
            ValueError: a setting is out of range.
        """
        if self.blur not in BLURS:
            raise ValueError(f"blur must be one of {', '.join(BLURS)}, got {self.blur!r}")
        darkness = self.darkness if modality == "visible" else 0.0
        idle = self.blur == "none" and not self.noise and self.scale == 1 and not darkness
        if modality not in self.modalities or idle:
            return image
        sample = torch.tensor([MODALITIES.index(modality)])
        recipe = _degradation(self.blur, self.strength).sample(
            1, seed=self.seed, sample_ids=sample, spatial=self.spatial
        )
        # At 1 the darkest scene of the preset "low_light": its gamma, gain and contrast.
        tone = torch.tensor([[1 + 4 * darkness, 1 - darkness / 2, 1 - darkness / 2]])
        noise_std = torch.tensor([self.noise / 255])
        low = replace(recipe, tone=tone, noise_std=noise_std, scale=self.scale).apply(image)
        return as_in_a_file(enlarge(as_in_a_file(low), image.shape[2:], self.scale))


@dataclass(frozen=True)
class Trial:
    """What came of a pair.

    Attributes:
        clean: the images as they were read, Tensor[1, C, H, W] in [0, 1], by modality.
        images: likewise "visible" and "infrared" as the network got them, "fused", "visible-restored" and
            "infrared-restored".
        seconds: what each step took.
        thermal: the infrared image as it was read.
    """

    clean: Mapping[str, Tensor]
    images: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    thermal: Picture


def try_pair(
    fuser: Fuser,
    visible: str | Path,
    infrared: str | Path,
    damage: Damage,
    thermal_range: ThermalRange | None = None,
) -> Trial:
    """Degrades, fuses and restores a pair of files.

    Args:
        fuser: the network, and its settings.
        visible: an image file.
        infrared: another.
        damage: how they are degraded.
        thermal_range: which infrared values become black and white, before all else; None: the fuser's.

    Raises:
        TypeError, ValueError: as :class:`Fuser` for images that cannot be read or do not belong together, or
            a setting of the damage is out of range.
    """
    thermal = read(infrared, thermal_range or fuser.thermal_range)
    clean = {"visible": unit(read(visible)), "infrared": unit(thermal)}

    def fuse() -> Tensor:
        request = fuser.prepare(**given, thermal_range=ThermalRange())
        fused: Tensor = fuser.finish(request, fuser.compute([request])[0])
        return fused

    given, degrading = timed(lambda: {name: damage(image, name) for name, image in clean.items()})
    fused, fusing = timed(fuse)
    restored, restoring = timed(lambda: Restorer(fuser.network, color=fuser.color)(**given))
    return Trial(
        clean,
        {**given, "fused": fused, "visible-restored": restored[0], "infrared-restored": restored[1]},
        {"degrade": degrading, "fuse": fusing, "restore": restoring},
        thermal,
    )


def measure_fused(trial: Trial) -> Scores:
    """Of the fused image, and of the plainest fusion of the same images, against the clean ones.

    Nothing where the images are too small to be measured.
    """
    lumas = {name: luma(image) for name, image in trial.images.items()}
    visible, infrared = (luma(image) for image in trial.clean.values())
    if min(visible.shape[2:]) < _SMALLEST_MEASURED:
        return {}
    average = (lumas["visible"] + lumas["infrared"]) / 2
    return {
        name: _numbers(metrics.evaluate(image, visible, infrared, MEASURES))
        for name, image in (("fused", lumas["fused"]), ("average of both", average))
    }


def measure_restored(trial: Trial) -> Scores:
    """Of the images that were degraded, before and after their restoration, against the clean ones.

    Nothing where none was, or the images are too small to be measured.
    """
    scores = {}
    for name, clean in trial.clean.items():
        if trial.images[name] is clean or min(clean.shape[2:]) < _SMALLEST_MEASURED:
            continue
        for state, image in (("degraded", name), ("restored", f"{name}-restored")):
            found = metrics.evaluate_restored(luma(trial.images[image]), luma(clean))
            scores[f"{name}, {state}"] = _numbers(found)
    return scores


def read(path: str | Path, thermal_range: ThermalRange | None = None) -> Picture:
    """A visible image file; or an infrared one, with the range of its values."""
    return Picture.take(path, "visible" if thermal_range is None else "infrared", thermal_range)


def unit(picture: Picture) -> Tensor:
    """An image as float32 Tensor[1, 1 | 3, H, W] in [0, 1]."""
    return picture.channels().transpose(0, 1)


def luma(image: Tensor) -> Tensor:
    """Y of Tensor[1, 1 | 3, H, W]."""
    return image if image.shape[1] == 1 else luminance(image)[:, None]


@lru_cache(maxsize=8)
def _degradation(blur: str, strength: float) -> DynamicDegradation:
    """What draws kernels of that kind."""
    bank = KernelBank.default(strength=strength)
    if blur in bank.families:
        first = bank.families.index(blur) * bank.per_family
        bank = KernelBank(bank.kernels[first : first + bank.per_family], (blur,))
    mixed = len(bank.families)
    return DynamicDegradation("paper", kernels=bank, num_mixed=mixed, sharp_fraction=float(blur == "none"))


def _numbers(scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in scores.items()}
