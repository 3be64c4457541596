"""Checkpoints that a training goes on from, and its end by a signal."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProgressBar(TQDMProgressBar):
    """Losses and images per second, without Lightning's version number."""

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments)
        metrics.pop("v_num", None)
        return metrics


class Interrupted(Exception):
    """A signal ended the training, after its checkpoint was written."""


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
        self._signalled = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object
    ) -> None:
        # After the last step of an epoch come a validation and the epoch's own checkpoint. Processes write
        # together, but agree on it now and then only: a GPU waits for that.
        if trainer.is_last_batch or (trainer.world_size > 1 and trainer.global_step % 8):
            return
        due = self._signalled or time.monotonic() - self._saved > 60 * self.minutes
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
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
