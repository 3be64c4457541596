"""A training step of DDRF-Net: clean pairs are degraded at random, restored and fused, and judged."""

import math
import time

import lightning
import torch
from torch import Tensor

from ddrf_fast.degradation import DynamicDegradation
from ddrf_fast.losses import charbonnier, fusion_loss, restoration_loss
from ddrf_fast.metrics import psnr, ssim
from ddrf_fast.models import DDRFNet, DDRFNetConfig
from ddrf_fast.nn import DynamicConv2d, anneal_temperature
from ddrf_fast.training.config import TrainingConfig
from ddrf_fast.training.crops import Images


class TrainingModule(lightning.LightningModule):
    """DDRF-Net with its losses, its random degradations and its optimiser.

    Every random number of a step comes from a generator seeded by the configuration's seed and the number of
    the step.

    Args:
        config: the settings.
    """

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DDRFNet(DDRFNetConfig(width=config.width, num_kernels=config.num_kernels))
        # A part of the images is left sharp and a part free of noise, so that the network leaves such alone.
        self.degradation = DynamicDegradation(
            "paper",
            noise_std=config.noise_std,
            sharp_fraction=config.sharp_fraction,
            white_fraction=1 - config.noiseless_fraction,
        )
        self.validation_degradation = DynamicDegradation("paper", noise_std=config.noise_std, spatial=True)
        self.model.code_basis.copy_(self.degradation.components)
        self.curve: list[float] = []
        self._started = time.monotonic()

    def losses(
        self, visible: Tensor, infrared: Tensor, positive: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Degrades, restores and fuses a batch of clean pairs.

        Args:
            visible: Tensor[B, 1, H, W] in [0, 1].
            infrared: Tensor[B, 1, H, W] in [0, 1].
            positive: Tensor[B, 1, H, W] in [0, 1], the positive sample of eq. 9.
            generator: draws the degradations and which of their codes the network is told.

        Returns:
            Scalars: "loss", the weighted sum, and its terms.
        """
        config, batch_size = self.config, len(visible)
        spatial = bool(torch.rand((), generator=generator) < config.spatial_fraction)
        seeds = torch.randint(2**63 - 1, (3,), generator=generator).tolist()
        batches = [
            self.degradation(image, seed=seed, spatial=spatial)
            for image, seed in zip((visible, infrared, positive), seeds, strict=True)
        ]
        degraded = [batch.image.clamp(0, 1) for batch in batches]  # as any image from a file is
        codes = [batch.codes for batch in batches[:2]]
        estimates = self.model.estimate_codes(degraded[0], degraded[1])
        told = torch.rand(2, batch_size, generator=generator).to(visible.device) < config.known_fraction
        restored = self.model(degraded[0], degraded[1], *map(_choose, told, codes, estimates))
        fusion = fusion_loss(
            restored.fused,
            (visible, infrared),
            degraded[:2],
            positive,
            degraded_positive=degraded[2],
            similarity_weight=config.similarity_weight,
            negative_weight=config.negative_weight,
            positive_weight=config.positive_weight,
            negative_mode=config.negative_mode,
        )
        restoration = restoration_loss(restored.visible, visible) + restoration_loss(
            restored.infrared, infrared
        )
        estimator = torch.stack(
            [
                charbonnier(estimate * self.model.code_scale, _mean_code(code) * self.model.code_scale)
                for estimate, code in zip(estimates, codes, strict=True)
            ]
        ).sum()
        loss = fusion.total + config.restoration_weight * restoration + config.estimator_weight * estimator
        return {
            "loss": loss,
            "restoration": restoration,
            "similarity": fusion.similarity,
            "negative": fusion.negative,
            "positive": fusion.positive,
            "estimator": estimator,
        }

    def training_step(self, batch: Images, batch_index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.global_step)
        losses = self.losses(*batch, generator)
        self.log_dict(losses, prog_bar=True)
        self.curve.append(losses["loss"].item())
        return losses["loss"]

    def validation_step(self, batch: Images, batch_index: int) -> None:
        """Restoration (blind) of fixed degradations, and fusion of the clean pair."""
        visible, infrared, _ = batch
        degraded = [
            self.validation_degradation(image, seed=2 * batch_index + i).image.clamp(0, 1)
            for i, image in enumerate((visible, infrared))
        ]
        restored = self.model(*degraded)
        fused = self.model(visible, infrared).fused
        self.log_dict(
            {
                "degraded_visible_psnr": psnr(degraded[0], visible).mean(),
                "restored_visible_psnr": psnr(restored.visible, visible).mean(),
                "degraded_infrared_psnr": psnr(degraded[1], infrared).mean(),
                "restored_infrared_psnr": psnr(restored.infrared, infrared).mean(),
                "fused_ssim": (ssim(fused, visible).mean() + ssim(fused, infrared).mean()) / 2,
            },
            batch_size=len(visible),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam. The banks learn N times faster, since eq. 6 divides what they change by N."""
        banks = [
            parameter
            for layer in self.modules()
            if isinstance(layer, DynamicConv2d)
            for parameter in (layer.weight, layer.bias)
        ]
        in_banks = set(banks)
        others = [parameter for parameter in self.parameters() if parameter not in in_banks]
        return torch.optim.Adam(
            [
                {"params": banks, "peak": self.config.learning_rate * self.config.num_kernels},
                {"params": others, "peak": self.config.learning_rate},
            ]
        )

    def on_train_start(self) -> None:
        self._started = time.monotonic()

    def on_train_batch_start(self, batch: Images, batch_index: int) -> None:
        """Sets the learning rate and the temperature for the progress made."""
        progress = self.progress()
        factor = min(1.0, (progress + 1e-3) / 0.02) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak"] * factor
        anneal_temperature(self.model, progress / self.config.annealing_fraction)

    def on_train_batch_end(self, *_: object) -> None:
        if self.progress() >= 1:
            self.trainer.should_stop = True

    def progress(self) -> float:
        """How much of the training is over, in [0, 1]: by steps, or by time where a limit is nearer."""
        done = self.global_step / self.config.steps
        if self.config.max_minutes is not None:
            done = max(done, (time.monotonic() - self._started) / 60 / self.config.max_minutes)
        return min(done, 1.0)


def _mean_code(code: Tensor) -> Tensor:
    """Tensor[B, D] of a code Tensor[B, D] or of a code map Tensor[B, D, h, w]."""
    return code if code.dim() == 2 else code.mean(dim=(2, 3))


def _choose(told: Tensor, code: Tensor, estimate: Tensor) -> Tensor:
    """For each sample the code where it is told (bool Tensor[B]), elsewhere the estimate, stretched."""
    ones = [1] * (code.dim() - 2)
    return torch.where(told.view(-1, 1, *ones), code, estimate.view(*estimate.shape, *ones))
