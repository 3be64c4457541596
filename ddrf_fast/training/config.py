"""The settings of a training, flat: what the command line sets and what the weights file records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of :func:`ddrf_fast.training.train`.

    Attributes:
        data: folders of pairs, each with ``ir/`` and ``vis/``.
        output: the weights file to write.
        crop: side of the square crops in pixels, even, at least 32.
        batch_size: crops in a step.
        steps: optimiser steps.
        max_minutes: end the training (with its learning rate run down to the end) after so much time even if
            fewer steps were done; None: never. The result then depends on the machine's speed.
        learning_rate: largest rate of Adam; it warms up, then falls along a cosine.
        seed: of everything random. The same seed gives the same weights on the same machine.
        threads: CPU threads; None: as torch chooses.
        device: "auto", "cpu" or "cuda".
        width: channels of the network's features.
        num_kernels: kernels in each of its banks.
        noise_std: (lowest, highest) noise level for images in [0, 1].
        sharp_fraction: part of the images that are not blurred, so that sharp ones are left sharp.
        noiseless_fraction: part of the images that get no noise.
        spatial_fraction: part of the steps in which the blur varies over the image.
        known_fraction: part of the codes that are given; the others are left to the blind estimator.
        annealing_fraction: part of the training in which the routers' temperature falls from 30 to 1.
        restoration_weight: weight of the restoration loss of either image.
        similarity_weight: weight of eq. 7.
        negative_weight: weight of eq. 8.
        positive_weight: weight of eq. 9.
        estimator_weight: weight of the blind estimators' own loss.
        negative_mode: "text" or "literal", see :func:`ddrf_fast.losses.negative_loss`.
        validation_pairs: pairs kept out of the training, spread over the data, to measure what was reached.
        progress_bar: show one.

    Raises:
        ValueError: a setting is out of range.
    """

    data: tuple[str, ...] = ()
    output: str = "ddrfnet.safetensors"
    crop: int = 96
    batch_size: int = 16
    steps: int = 20_000
    max_minutes: float | None = None
    learning_rate: float = 1e-3
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    width: int = 32
    num_kernels: int = 8
    noise_std: tuple[float, float] = (0.0, 25 / 255)
    sharp_fraction: float = 0.4
    noiseless_fraction: float = 0.4
    spatial_fraction: float = 0.5
    known_fraction: float = 0.5
    annealing_fraction: float = 0.1
    restoration_weight: float = 1.0
    similarity_weight: float = 0.1
    negative_weight: float = 0.1
    positive_weight: float = 1.0
    estimator_weight: float = 0.02
    negative_mode: str = "text"
    validation_pairs: int = 8
    progress_bar: bool = True

    def __post_init__(self) -> None:
        if self.crop < 32 or self.crop % 2:
            raise ValueError(f"crop must be even and at least 32, got {self.crop}")
        for name in ("batch_size", "steps", "width", "num_kernels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sharp_fraction", "noiseless_fraction", "spatial_fraction", "known_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, got {self.max_minutes}")
        if self.validation_pairs < 0:
            raise ValueError(f"validation_pairs must not be negative, got {self.validation_pairs}")
        if self.negative_mode not in ("text", "literal"):
            raise ValueError(f'negative_mode must be "text" or "literal", got {self.negative_mode!r}')
