"""The settings of a training: what YAML files and the command line set, and what the weights file records."""

import dataclasses
import datetime
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddrf_fast.data import PairedFolder, ThermalRange
from ddrf_fast.degradation.presets import PRESETS as DEGRADATIONS
from ddrf_fast.models import DDRFNetConfig
from ddrf_fast.models.classical import CLASSICAL_FUSIONS
from ddrf_fast.training.resizing import LARGEST_SCALE

PRESETS = Path(__file__).parent / "presets"

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Device = Literal["auto", "cpu", "cuda"]
NegativeMode = Literal["text", "literal"]


@dataclass(frozen=True)
class PairSource:
    """A data set, or a part of one; as for :class:`ddrf_fast.data.PairedFolder`."""

    path: str
    layout: str = "auto"
    split: str | None = None
    thermal_range: str = "full"

    @classmethod
    def of(cls, entry: Any) -> "PairSource":
        """A folder's path, or a mapping of these settings.

        Raises:
            ValueError: it is neither, has other keys, or a thermal range that is none.
        """
        if isinstance(entry, PairSource):
            return entry
        if isinstance(entry, (str, os.PathLike)):
            return cls(os.fspath(entry))
        try:
            source = cls(**entry)
        except TypeError:
            names = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ValueError(f"data: expected a folder or {{{names}}}, got {entry!r}") from None
        for name, value in dataclasses.asdict(source).items():
            if not isinstance(value, str) and (name, value) != ("split", None):
                raise ValueError(f"data: {name} must be a text, got {value!r}")
        ThermalRange.parse(source.thermal_range)
        return source

    def folder(self) -> PairedFolder:
        """Its pairs."""
        return PairedFolder(self.path, self.layout, self.split, self.thermal_range)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of :func:`ddrf_fast.training.train`; :func:`load_config` reads them from YAML.

    Attributes:
        data: data sets: folders, or ``{path: …, layout: …, split: …, thermal_range: …}``
            (:class:`ddrf_fast.data.PairedFolder`).
        output: folder of the results: weights, checkpoints, TensorBoard's events and these settings.
        model: sizes of the network, and which of its parts are dynamic.
        crop: side of the square crops in pixels, even, at least 32.
        batch_size: crops in a step, those of all processes together: their number does not change the result.
        initial_weights: a weights file that the training starts from, of the same ``model`` (fine-tuning), or
            "package": those that come with the package. The routers' temperature stays 1 then. None: fresh
            weights.
        epochs: how often the data are gone through.
        crops_per_pair: crops that an epoch takes of each pair.
        max_minutes: end the training (with its learning rate run down to the end) after so much time even if
            fewer steps were done; None: never. The result then depends on the machine's speed.
        learning_rate: largest rate of Adam; it warms up, then falls along a cosine.
        gradient_clip: largest norm of the gradient; 0: not clipped.
        ema_decay: of the moving average of the weights, which is what is validated and exported; it starts
            lower. 0: no average.
        precision: "32-true", "bf16-mixed" or "16-mixed" (float16 with a scaled loss): that of the network.
            Degradations and losses are computed in float32.
        compile: put the network through torch.compile.
        deterministic: on a GPU, the same bits in every run, where torch can. A CPU gives them anyway.
        seed: of everything random. The same seed gives the same weights on the same machine.
        threads: CPU threads; None: as torch chooses.
        device: "auto", "cpu" or "cuda".
        num_workers: processes that cut the crops; 0: none beside this one.
        cache: keep all pairs in memory (three bytes a pixel) instead of reading them for each crop.
        degradation: preset of :class:`~ddrf_fast.degradation.DynamicDegradation`.
        scales: of the down-sampling, one drawn for each step; the image is brought back to its size.
        resized_fraction: part of the images that a program has made smaller, by any factor up to three, and
            enlarged; one is drawn for each kind of image and step. They have no other blur or down-sampling.
        noise_std: (lowest, highest) level of white noise for images in [0, 1]; None: as the preset says.
        dark_fraction: part of the images that are taken in the dark; None: as the preset says.
        sharp_fraction: part of the images that are not blurred, so that sharp ones are left sharp.
        noiseless_fraction: part of the images that get no noise.
        clean_fraction: part of the pairs of which neither image is degraded, but for down-sampling.
        spatial_fraction: part of the steps in which the blur varies over the image.
        known_fraction: part of the codes that are given; the others are left to the blind estimator.
        annealing_fraction: part of the training in which the routers' temperature falls from 30 to 1.
        restoration_weight: weight of the restoration loss of either image.
        restoration_epochs: the restoration loss counts in the first so many epochs; None: in all.
        similarity_weight: weight of eq. 7.
        negative_weight: weight of eq. 8.
        positive_weight: weight of eq. 9.
        positive_fusions: names in :data:`~ddrf_fast.models.classical.CLASSICAL_FUSIONS`; the one that is best
            for a pair makes its positive samples.
        degraded_positive_fusion: the classical fusion whose result the positive sample gives way to, the more
            the less is left of the pair: its share is ``1 - 3 p^2 + 2 p^3``, where p is the product of the
            SSIM of both degraded images with the clean ones. None: the same sample, however degraded.
        fidelity_weight: weight of :func:`ddrf_fast.losses.fidelity_loss`, which is put in the place of the
            positive sample's loss for pairs of which less than half is left (that share above 0.5); 0: the
            positive sample counts for all pairs. Needs crops of 41 pixels at least.
        estimator_weight: weight of the blind estimators' own loss, and of that of recognising pairs of which
            less than half is left by their codes.
        negative_mode: "text" or "literal", see :func:`ddrf_fast.losses.negative_loss`.
        validation_pairs: pairs kept out of the training, spread over the data, to measure what was reached.
        validate_every: epochs from one validation to the next.
        early_stop_patience: end the training after so many validations without a lower loss, and export the
            best weights instead of the last; None: never.
        checkpoint_minutes: a checkpoint is written at the end of each epoch, and after so much time.
        log_every: steps from one line of TensorBoard's scalars to the next.
        progress_bar: show one.

    Raises:
        ValueError: a setting is out of range.
    """

    data: tuple[Any, ...] = ()
    output: str = "runs/ddrfnet"
    model: DDRFNetConfig = DDRFNetConfig()  # noqa: RUF009 (frozen)
    crop: int = 96
    batch_size: int = 16
    initial_weights: str | None = None
    epochs: int = 89
    crops_per_pair: int = 16
    max_minutes: float | None = None
    learning_rate: float = 1e-3
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = "32-true"
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    threads: int | None = None
    device: Device = "auto"
    num_workers: int = 0
    cache: bool = True
    degradation: str = "paper"
    scales: tuple[int, ...] = (1,)
    resized_fraction: float = 0.0
    noise_std: tuple[float, float] | None = None
    dark_fraction: float | None = None
    sharp_fraction: float = 0.4
    noiseless_fraction: float = 0.4
    clean_fraction: float = 0.0
    spatial_fraction: float = 0.5
    known_fraction: float = 0.5
    annealing_fraction: float = 0.1
    restoration_weight: float = 1.0
    restoration_epochs: int | None = None
    similarity_weight: float = 0.1
    negative_weight: float = 0.1
    positive_weight: float = 1.0
    positive_fusions: tuple[str, ...] = tuple(CLASSICAL_FUSIONS)
    degraded_positive_fusion: str | None = None
    fidelity_weight: float = 0.0
    estimator_weight: float = 0.02
    negative_mode: NegativeMode = "text"
    validation_pairs: int = 8
    validate_every: int = 1
    early_stop_patience: int | None = None
    checkpoint_minutes: float = 10.0
    log_every: int = 10
    progress_bar: bool = True

    def __post_init__(self) -> None:
        one = isinstance(self.data, (str, os.PathLike, Mapping, PairSource))
        entries: Any = [self.data] if one else self.data
        object.__setattr__(self, "data", tuple(PairSource.of(entry) for entry in entries))
        if self.crop < 32 or self.crop % 2:
            raise ValueError(f"crop must be even and at least 32, got {self.crop}")
        if not self.scales or min(self.scales) < 1 or any(self.crop % scale for scale in self.scales):
            raise ValueError(f"scales must be divisors of the crop of {self.crop}, got {list(self.scales)}")
        smallest = self.model.kernel_size // 2 + 1  # to be blurred
        if self.resized_fraction > 0 and round(self.crop / LARGEST_SCALE) < smallest:
            raise ValueError(
                f"crop must be at least {math.ceil(LARGEST_SCALE * smallest) - 1} where resized_fraction "
                f"is not 0, got {self.crop}"
            )
        if self.fidelity_weight > 0 and self.crop < 41:
            raise ValueError(f"crop must be at least 41 where fidelity_weight is not 0, got {self.crop}")
        if self.degradation not in DEGRADATIONS:
            raise ValueError(
                f"degradation must be one of {', '.join(DEGRADATIONS)}, got {self.degradation!r}"
            )
        unknown = [name for name in self.positive_fusions if name not in CLASSICAL_FUSIONS]
        if unknown or not self.positive_fusions:
            names = ", ".join(CLASSICAL_FUSIONS)
            raise ValueError(f"positive_fusions must be some of {names}, got {list(self.positive_fusions)}")
        name = self.degraded_positive_fusion
        if name is not None and name not in CLASSICAL_FUSIONS:
            names = ", ".join(CLASSICAL_FUSIONS)
            raise ValueError(f"degraded_positive_fusion must be one of {names}, got {name!r}")
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if self.seed >= 2**60:
            raise ValueError(f"seed must be below 2^60, got {self.seed}")
        if self.early_stop_patience is not None and self.validation_pairs == 0:
            raise ValueError("early_stop_patience needs validation_pairs, got 0 of them")
        for name in ("learning_rate", "max_minutes", "checkpoint_minutes", "annealing_fraction"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in _FRACTIONS:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        for name, choice in (("precision", Precision), ("device", Device), ("negative_mode", NegativeMode)):
            if getattr(self, name) not in get_args(choice):
                names = ", ".join(get_args(choice))
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")

    def to_yaml(self) -> str:
        """The settings as :func:`load_config` reads them."""
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))


_TEXTS = {"data", "output", "initial_weights"}  # of which YAML makes numbers and dates of some
_FRACTIONS = (
    "resized_fraction",
    "clean_fraction",
    "dark_fraction",
    "sharp_fraction",
    "noiseless_fraction",
    "spatial_fraction",
    "known_fraction",
    "annealing_fraction",
    "ema_decay",
)
_SMALLEST = {
    **dict.fromkeys(("batch_size", "epochs", "crops_per_pair", "validate_every", "log_every", "threads"), 1),
    **dict.fromkeys(("seed", "num_workers", "validation_pairs", "restoration_epochs", "gradient_clip"), 0),
    **dict.fromkeys((f"{name}_weight" for name in ("restoration", "similarity", "negative", "positive")), 0),
    "fidelity_weight": 0,
    "estimator_weight": 0,
    "early_stop_patience": 1,
}


def load_config(
    files: Sequence[str | os.PathLike[str]] = (), overrides: Sequence[str] = ()
) -> TrainingConfig:
    """Reads settings: the defaults, then each file, then each override, the later before the earlier.

    Args:
        files: YAML files, or names of presets that come with the package: "paper" (its settings), "static"
            (the static twin of the network), "restoration" (restore_0 of Fig. 7: no fusion loss), "fig8_a" to
            "fig8_h" (the experiments of Fig. 8).
        overrides: ``key=value`` with a value in YAML, ``model.width=16`` for a nested one.

    Returns:
        The settings.

    Raises:
        ValueError: a file cannot be read, or a setting is unknown, of another type or out of range; the
            message names it.

    Example:
        >>> config = load_config(["paper"], ["data=[pairs/day,pairs/night]", "model.width=16"])
        >>> config.epochs, config.model.width, config.data[1].path
        (89, 16, 'pairs/night')
    """
    config = OmegaConf.structured(TrainingConfig)
    for file in files:
        path = Path(file)
        if not path.is_file() and (PRESETS / f"{file}.yaml").is_file():
            path = PRESETS / f"{file}.yaml"
        try:
            settings = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
            raise ValueError(f"{path}: cannot be read ({error}); presets are {names}") from error
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
        if not isinstance(settings, Mapping):
            raise ValueError(f"{path}: expected settings as 'key: value', got {settings!r}")
        for key, value in settings.items():
            config = _merged(config, {str(key): value}, f"{path}: {key}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"expected a setting as key=value, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{override}: not YAML: {error}") from error
        if key in _TEXTS and isinstance(value, (bool, int, float, datetime.date)):
            value = text
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = _merged(config, nested, override)
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, TrainingConfig)
    return settings


def _merged(config: Any, settings: dict[str, Any], where: str) -> Any:
    if isinstance(settings.get("data"), (str, Mapping)):  # one data set
        settings = {"data": [settings["data"]]}
    try:
        return OmegaConf.merge(config, settings)
    except (OmegaConfBaseException, TypeError) as error:
        text = " ".join(str(error).split("\n")[0].split()).replace("'TrainingConfig'", "the settings")
        raise ValueError(f"{where}: {text}") from None
