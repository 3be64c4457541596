"""A training step of DDRF-Net: clean pairs are degraded at random, restored and fused, and judged."""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from ddrf_fast.degradation import Degradation, DynamicDegradation, draws, enlarge, preset, undo_darkness
from ddrf_fast.degradation.photometric import TONE_CHANNELS, as_in_a_file, is_dark
from ddrf_fast.losses import charbonnier, fusion_loss, restoration_loss, similarity
from ddrf_fast.metrics import psnr, ssim
from ddrf_fast.models import DDRFNet, DDRFOutput
from ddrf_fast.models.classical import CLASSICAL_FUSIONS
from ddrf_fast.models.ddrfnet import pad_to_even
from ddrf_fast.models.tone import ToneEstimator, light_means, with_tone
from ddrf_fast.nn import DynamicConv2d, anneal_temperature
from ddrf_fast.training.config import TrainingConfig
from ddrf_fast.training.crops import Crops
from ddrf_fast.training.resizing import Resizing

_VALIDATION_SEED = 2**40  # the same degradations whatever the seed of the training
# A training has four seeds: of three degradations, and of who is clean or told the code.
_CHANCES, _SEEDS = 3, 4
# A pair of which less is kept is to be fused with caution, and has no positive sample where there is the
# fidelity loss.
_LOST = 0.5
# To brighten an image that is not dark is as bad as to leave so many dark ones as they are.
_SURELY = 16.0
_SHOWN = 4  # validation pairs that TensorBoard shows


class TrainingModule(lightning.LightningModule):
    """DDRF-Net with its losses, its random degradations and its optimiser.

    Random numbers depend on the configuration's seed and the number of the step or of the sample, so a
    training that is interrupted goes on as if nothing had happened, and the samples of a step may be spread
    over any number of processes.

    Args:
        config: the settings.
        steps_per_epoch: steps in an epoch.
        pairs: names of the pairs it is trained and validated on, for its checkpoints.

    Attributes:
        model: the network that is trained.
        average: the network with the moving average of the weights, which is validated and exported.

    Raises:
        ValueError: the degradation's codes do not fit the network's.
    """

    def __init__(
        self, config: TrainingConfig, steps_per_epoch: int, pairs: dict[str, list[str]] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.pairs = pairs or {}
        self.model = DDRFNet(config.model)
        usual = preset(config.degradation)
        if config.noise_std is not None:
            usual = usual.with_noise(config.noise_std)
        if config.dark_fraction is not None:
            usual = dataclasses.replace(usual, dark_fraction=config.dark_fraction)
        noisy = (1 - config.noiseless_fraction) / (usual.white_fraction + usual.shot_fraction)
        # A part of the images is left sharp and a part free of noise, so that the network leaves such alone.
        self.degradation = DynamicDegradation(
            usual,
            sharp_fraction=config.sharp_fraction,
            white_fraction=noisy * usual.white_fraction,
            shot_fraction=noisy * usual.shot_fraction,
        )
        self.validation_degradation = DynamicDegradation(usual)
        if self.model.code_basis.shape != self.degradation.components.shape:
            raise ValueError(
                f"degradation {config.degradation} has codes [number, kernel_size²] = "
                f"{list(self.degradation.components.shape)}, but the model's are "
                f"{list(self.model.code_basis.shape)}: set model.kernel_size and model.code_channels"
            )
        self.model.code_basis.copy_(self.degradation.components)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        if config.compile:
            self.model.compile(dynamic=False)
        self._curve: list[Tensor] = []
        # Of earlier steps, and runs where this one goes on:
        self._earlier_curve, self._earlier_seconds = torch.zeros(0), 0.0
        self._started = time.monotonic()
        self._window = (0, time.monotonic())

    def start_from(self, model: DDRFNet) -> None:
        """Goes on from the weights of another training.

        Raises:
            ValueError: that network has another configuration.
        """
        if model.config != self.config.model:
            raise ValueError(
                f"initial_weights are of a network with {model.config}, but model is {self.config.model}"
            )
        for network in (self.model, self.average):
            network.load_state_dict(model.state_dict())

    def degrade(
        self,
        degradation: DynamicDegradation,
        crops: Crops,
        seed: int,
        spatial: bool,
        scale: int = 1,
        clean: Tensor | None = None,
        resizings: Sequence[Resizing | None] = (None, None, None),
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Degrades the three images of each sample, each by its own degradation.

        Args:
            degradation: what to draw from.
            crops: a batch.
            seed: the degradations of a sample depend on this and its number.
            spatial: let the blur vary over the image.
            scale: of the down-sampling; the image is brought back to its size.
            clean: bool Tensor[B], the samples that are neither blurred, darkened nor given noise.
            resizings: of the visible, infrared and positive images, each in the place of its blur and its
                down-sampling.

        Returns:
            The visible, infrared and positive images, degraded, as a file of 8 bit holds them, and the codes
            and the tones Tensor[B, 3] of the first two.
        """
        degraded, codes, tones = [], [], []
        pca = self.model.kernel_code  # need not be that of this degradation
        for number, (image, resizing) in enumerate(zip(crops[1:], resizings, strict=True)):
            recipe = degradation.sample(
                len(image), seed=_SEEDS * seed + number, sample_ids=crops.sample_ids, spatial=spatial
            )
            if clean is not None:
                recipe = degradation.cleared(recipe, clean)
            if resizing is not None:
                small = as_in_a_file(with_kernel(recipe, degradation.identity).apply(resizing.smaller(image)))
                degraded.append(as_in_a_file(resizing.larger(small, image.shape[2:])))
                recipe = with_kernel(recipe, resizing.kernel(recipe.kernels.shape[-1]))
            else:
                low = as_in_a_file(dataclasses.replace(recipe, scale=scale).apply(image))
                degraded.append(as_in_a_file(enlarge(low, image.shape[2:], scale)))
            codes.append(recipe.codes(pca).to(image.dtype))
            tones.append(image.new_ones(len(image), TONE_CHANNELS) if recipe.tone is None else recipe.tone)
        return degraded, codes[:2], tones[:2]

    def kept(self, crops: Crops, degraded: list[Tensor], tones: list[Tensor]) -> Tensor:
        """How much is left of each pair when its darkness is undone: Tensor[B] from 0 to 1, by its SSIM."""
        lit = map(undo_darkness, degraded[:2], tones)
        kept = torch.stack(list(map(similarity, lit, crops[1:3]))).clamp(0, 1).prod(dim=0)
        return kept.square() * (3 - 2 * kept)

    def positive(self, crops: Crops, kept: Tensor) -> Tensor:
        """The positive samples, where wanted with regard to how degraded their pairs are."""
        name = self.config.degraded_positive_fusion
        if name is None:
            return crops.positive
        other = CLASSICAL_FUSIONS[name](crops.visible, crops.infrared).clamp(0, 1)
        return other.lerp(crops.positive, kept.view(-1, 1, 1, 1))

    def losses(
        self,
        output: DDRFOutput,
        crops: Crops,
        degraded: list[Tensor],
        estimates: tuple[Tensor, Tensor],
        codes: list[Tensor],
        tones: list[Tensor],
        restoration_weight: float,
    ) -> dict[str, Tensor]:
        """What a step is judged by, in float32: "loss", the weighted sum, and its terms, each a scalar."""
        config = self.config
        fused, visible, infrared = (image.float() for image in output)
        kept = self.kept(crops, degraded, tones)
        fusion = fusion_loss(
            fused,
            (crops.visible, crops.infrared),
            degraded[:2],
            self.positive(crops, kept),
            degraded_positive=degraded[2],
            lost=kept < _LOST if config.fidelity_weight else None,
            similarity_weight=config.similarity_weight,
            negative_weight=config.negative_weight,
            positive_weight=config.positive_weight,
            fidelity_weight=config.fidelity_weight,
            negative_mode=config.negative_mode,
        )
        restoration = restoration_loss(visible, crops.visible) + restoration_loss(infrared, crops.infrared)
        scale = self.model.code_scale
        estimator = torch.stack(
            [
                charbonnier(estimate[:, : len(scale)].float() * scale, _mean_code(code) * scale)
                for estimate, code in zip(estimates, codes, strict=True)
            ]
        ).sum()
        network, lost = self.model if self.training else self.average, (kept < _LOST).float()
        recognised = [network.caution_logit(*map(_mean_code, known)).float() for known in (estimates, codes)]
        caution = torch.stack([F.binary_cross_entropy_with_logits(odds, lost) for odds in recognised]).mean()
        estimators = network.visible_tone, network.infrared_tone
        darkness = torch.stack(list(map(darkness_loss, estimators, degraded, crops[1:3], tones))).sum()
        return {
            "loss": fusion.total
            + restoration_weight * restoration
            + config.estimator_weight * (estimator + caution + darkness),
            "restoration": restoration,
            "similarity": fusion.similarity,
            "negative": fusion.negative,
            "positive": fusion.positive,
            "fidelity": fusion.fidelity,
            "estimator": estimator,
            "caution": caution,
            "darkness": darkness,
        }

    def step_losses(self, crops: Crops, step: int) -> dict[str, Tensor]:
        """Degrades, restores and fuses a batch of clean pairs.

        Args:
            crops: the batch.
            step: number of the step.

        Returns:
            As :meth:`losses`.
        """
        config = self.config
        random = np.random.default_rng((config.seed, step))
        spatial = bool(random.random() < config.spatial_fraction)
        scale = int(random.choice(config.scales))
        resizings = [
            Resizing.draw(random) if random.random() < config.resized_fraction else None for _ in crops[1:]
        ]
        with _full_precision(crops.visible):
            chances_seed = torch.full_like(crops.sample_ids[0], _SEEDS * config.seed + _CHANCES)
            chances = draws.uniform(draws.standard_normal(chances_seed, crops.sample_ids, 3))
            told = (chances[:, :2] < config.known_fraction).unbind(1)
            clean = chances[:, 2] < config.clean_fraction
            degraded, codes, tones = self.degrade(
                self.degradation, crops, config.seed, spatial, scale, clean, resizings
            )
        estimates = self.model.estimate_codes(degraded[0], degraded[1])
        # Tones are told: how bright the scene was is nothing that branches and fusion could learn.
        chosen = map(with_tone, map(_choose, told, codes, estimates), tones)
        output = self.model(degraded[0], degraded[1], *chosen)
        with _full_precision(crops.visible):
            epoch = step // self.steps_per_epoch
            weight = self.restoration_weight(epoch)
            return self.losses(output, crops, degraded, estimates, codes, tones, weight)

    def restoration_weight(self, epoch: int) -> float:
        """The weight of the restoration loss in an epoch."""
        last = self.config.restoration_epochs
        return self.config.restoration_weight if last is None or epoch < last else 0.0

    def training_step(self, batch: Crops, batch_index: int) -> Tensor:
        losses = self.step_losses(batch, self.global_step)
        means = self.trainer.strategy.reduce(torch.stack(list(losses.values())).detach(), reduce_op="mean")
        self.log_dict(dict(zip(losses, means, strict=True)), prog_bar=True)
        self._curve.append(means[0])
        return losses["loss"]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.update_average(self.global_step)

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Moves the average towards the weights, quickly at first."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        torch._foreach_copy_(list(self.average.buffers()), list(self.model.buffers()))

    def validation_step(self, batch: Crops, batch_index: int) -> None:
        """Blind restoration and fusion of fixed degradations, and fusion of the clean pair."""
        with _full_precision(batch.visible):
            degraded, codes, tones = self.degrade(
                self.validation_degradation, batch, _VALIDATION_SEED, True, max(self.config.scales)
            )
        estimates = self.average.estimate_codes(degraded[0], degraded[1])
        output = self.average(degraded[0], degraded[1])
        clean = self.average(batch.visible, batch.infrared)
        with _full_precision(batch.visible):
            weight = self.restoration_weight(self.config.epochs)
            losses = self.losses(output, batch, degraded, estimates, codes, tones, weight)
            # As they would be in a file; where nothing asks for restoration, they may be far from an image.
            fused, visible, infrared, clean_fused = (x.float().clamp(0, 1) for x in (*output, clean.fused))
            sources = (batch.visible, batch.infrared)
            measures = {
                "loss": losses["loss"],
                "degraded_visible_psnr": psnr(degraded[0], batch.visible).mean(),
                "restored_visible_psnr": psnr(visible, batch.visible).mean(),
                "degraded_infrared_psnr": psnr(degraded[1], batch.infrared).mean(),
                "restored_infrared_psnr": psnr(infrared, batch.infrared).mean(),
                "fused_ssim": torch.stack([ssim(clean_fused, x).mean() for x in sources]).mean(),
                "degraded_fused_ssim": torch.stack([ssim(fused, x).mean() for x in sources]).mean(),
            }
        self.log_dict({f"validation/{name}": value for name, value in measures.items()}, batch_size=1)
        if isinstance(self.logger, TensorBoardLogger) and batch_index < _SHOWN:
            rows = (
                (batch.visible, degraded[0], visible, clean_fused),
                (batch.infrared, degraded[1], infrared, fused),
            )
            grid = torch.cat([torch.cat(row, dim=3) for row in rows], dim=2)[0]
            # Columns: clean, degraded, restored; then the fusion of the clean and of the degraded pair.
            self.logger.experiment.add_image(f"validation/{batch_index}", grid, self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam. The banks learn N times faster, since eq. 6 divides what they change by N."""
        banks = [
            parameter
            for layer in self.model.modules()
            if isinstance(layer, DynamicConv2d)
            for parameter in (layer.weight, layer.bias)
        ]
        in_banks = set(banks)
        others = [parameter for parameter in self.model.parameters() if parameter not in in_banks]
        groups = [
            {"params": banks, "peak": self.config.learning_rate * self.config.model.num_kernels},
            {"params": others, "peak": self.config.learning_rate},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=self.config.learning_rate)

    def on_train_start(self) -> None:
        self._started = time.monotonic()
        early = self.trainer.early_stopping_callback
        stopped = early is not None and early.wait_count >= early.patience
        self.trainer.should_stop |= stopped or self.progress() >= 1  # resumed when it was over

    def on_train_epoch_start(self) -> None:
        self._window = (self.global_step, time.monotonic())

    def on_train_batch_start(self, batch: Crops, batch_index: int) -> None:
        """Sets the learning rate and the temperature for the progress made."""
        progress = self.progress()
        factor = min(1.0, (progress + 1e-3) / 0.02) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak"] * factor
        if self.config.initial_weights is None:
            anneal_temperature(self.model, progress / self.config.annealing_fraction)

    def on_train_batch_end(self, *_: object) -> None:
        if self.config.max_minutes is not None and self.progress() >= 1:
            self.trainer.should_stop = True
        if self.global_step % self.config.log_every == 0:
            steps, now = self.global_step, time.monotonic()
            rate = (steps - self._window[0]) * self.config.batch_size / (now - self._window[1])
            self._window = (steps, now)
            learning_rate = self.trainer.optimizers[0].param_groups[-1]["lr"]
            self.log("images_per_second", rate, prog_bar=True)
            self.log("learning_rate", learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve()
        checkpoint["seconds"] = self.seconds()
        checkpoint["settings"] = dataclasses.asdict(self.config)
        checkpoint["pairs"] = self.pairs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._earlier_curve, self._earlier_seconds = checkpoint["curve"].cpu(), checkpoint["seconds"]

    def curve(self) -> Tensor:
        """The loss of each step, earlier runs included: Tensor[steps] on the CPU."""
        if self._curve:
            self._earlier_curve = torch.cat([self._earlier_curve, torch.stack(self._curve).cpu()])
            self._curve.clear()
        return self._earlier_curve

    def first_step_without_loss(self) -> int | None:
        """The number of the first step whose loss was not finite."""
        wrong = (~self.curve().isfinite()).nonzero()
        return int(wrong[0]) if len(wrong) else None

    def seconds(self) -> float:
        """How long the training took so far, earlier runs of it included."""
        return self._earlier_seconds + time.monotonic() - self._started

    def progress(self) -> float:
        """How much of the training is over, in [0, 1]: by steps, or by time where a limit is nearer."""
        done = self.global_step / (self.config.epochs * self.steps_per_epoch)
        if self.config.max_minutes is not None:
            # By the clock of one process, that all do the same.
            minutes = self.trainer.strategy.broadcast(self.seconds() / 60)
            done = max(done, minutes / self.config.max_minutes)
        return min(done, 1.0)


def darkness_loss(estimator: ToneEstimator, degraded: Tensor, clean: Tensor, tone: Tensor) -> Tensor:
    """Whether dark images are recognised, and how far from the clean one each is when its darkness is undone.

    Args:
        estimator: which is trained.
        degraded: Tensor[B, 1, H, W].
        clean: likewise.
        tone: Tensor[B, 3], of each degraded image.

    Returns:
        A scalar: the cross-entropy, and ten times the mean deviation.
    """
    dark = is_dark(tone).float()
    odds, guess = estimator.guess(light_means(pad_to_even(degraded)))
    recognition = F.binary_cross_entropy_with_logits(odds, dark, weight=_SURELY + (1 - _SURELY) * dark)
    error = undo_darkness(degraded, guess).clamp(-0.2, 1.2) - clean
    deviation = (error.square().mean(dim=(1, 2, 3)) + 1e-4).sqrt()
    number = _mean_over_processes(dark.sum())  # whose gradients are averaged, too
    return recognition + 10 * (deviation * dark).sum() / torch.where(number > 0, number, 1)


def _mean_over_processes(value: Tensor) -> Tensor:
    """Of the processes that train together, where there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


def with_kernel(recipe: Degradation, kernel: Tensor) -> Degradation:
    """The recipe with this blur, Tensor[k, k], in the place of each of its own."""
    return dataclasses.replace(recipe, kernels=kernel.to(recipe.kernels).expand_as(recipe.kernels))


def _full_precision(image: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.autocast(image.device.type, enabled=False)


def _mean_code(code: Tensor) -> Tensor:
    """Tensor[B, D] of a code Tensor[B, D] or of a code map Tensor[B, D, h, w]."""
    return code if code.dim() == 2 else code.mean(dim=(2, 3))


def _choose(told: Tensor, code: Tensor, estimate: Tensor) -> Tensor:
    """For each sample the code where it is told (bool Tensor[B]), elsewhere the estimate, stretched."""
    estimate = estimate[:, : code.shape[1]]
    ones = [1] * (code.dim() - 2)
    return torch.where(told.view(-1, 1, *ones), code, estimate.view(*estimate.shape, *ones))
