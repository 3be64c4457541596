"""Checkpoints that a training goes on from, and its end by a signal."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar

from ddrf_fast.training.module import TrainingModule

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProgressBar(TQDMProgressBar):
    """Losses and images per second, without Lightning's version number."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)
        return metrics


class Interrupted(Exception):
    """A signal ended the training, the first one after its checkpoint was written."""


class BestCheckpoint(ModelCheckpoint):
    """That of the lowest validation loss, which is known in a folder that was moved as well."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        paths = {name: here(value) for name, value in state_dict.items() if name.endswith("_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})


class Checkpoints(Callback):
    """Keeps the last state of a training in a file, whole at any time.

    It is written at the end of each epoch, after so many minutes, and on SIGINT (Ctrl-C) or SIGTERM, which
    end the training after the step at hand by :class:`Interrupted`; the second Ctrl-C interrupts at once.

    Args:
        path: the file.
        minutes: from one checkpoint to the next within an epoch.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path = path
        self.minutes = minutes
        self._signalled = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._saved = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._saved = time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise Interrupted
        self._signalled = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object
    ) -> None:
        # After the last step of an epoch come a validation and the epoch's own checkpoint. Processes write
        # together; GPUs agree on it now and then only, as they wait for that.
        waits = trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda"
        if trainer.is_last_batch or (waits and trainer.global_step % 8):
            return
        due = self._signalled or time.monotonic() - self._saved > 60 * self.minutes
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._save(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._check(module)

    def _check(self, module: lightning.LightningModule) -> None:
        """No weights are kept, and no images made, that are no numbers."""
        assert isinstance(module, TrainingModule)
        step = module.first_step_without_loss()
        if step is not None:
            kept = f"; {self.path} is from before" if self.path.is_file() else ""
            raise ValueError(
                f"the loss of step {step} is no number: try a lower learning_rate than "
                f"{module.config.learning_rate}, or gradient_clip{kept}"
            )

    def _save(self, trainer: lightning.Trainer) -> None:
        self._check(trainer.lightning_module)
        temporary = self.path.with_name(f".{self.path.name}.part")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            os.replace(temporary, self.path)
        self._saved = time.monotonic()
        if trainer.strategy.reduce_boolean_decision(self._signalled, all=False):
            raise Interrupted

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
