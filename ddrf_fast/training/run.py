"""Runs a training from its configuration to the weights file."""

import dataclasses
import os
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from ddrf_fast.models import load_model, save_model
from ddrf_fast.training.callbacks import BestCheckpoint, Checkpoints, Interrupted, ProgressBar
from ddrf_fast.training.config import TrainingConfig
from ddrf_fast.training.crops import Crops, Pairs, RandomCrops, StepBatches, ValidationCrops, load_pairs
from ddrf_fast.training.module import TrainingModule

WEIGHTS = "ddrfnet.safetensors"
# What may be different where a training goes on: where it runs, not what it computes.
_MAY_CHANGE = {"device", "threads", "num_workers", "cache", "checkpoint_minutes", "log_every", "progress_bar"}
_EXPECTED_WARNINGS = (
    "does not have many workers",  # crops are cut in microseconds
    "your dataloader is not resumable",  # it is: StepBatches starts with the step at hand
    "have no `val_dataloader`",  # where all pairs are trained with
    "treespec, LeafSpec",  # Lightning uses what torch has deprecated
    "exists and is not empty",  # config.yaml is there before the checkpoint
    "smaller than the logging interval",  # the interval counts steps over epochs
    "recommended to use `self.log",  # all processes validate the same
    "`broadcast_buffers` is deprecated",  # older torch has no other name for it
)


def train(config: TrainingConfig, resume: bool = False) -> Path:
    """Trains DDRF-Net and writes its weights, with the record of the training in the file's metadata.

    In the folder ``config.output``: the weights ``ddrfnet.safetensors``; ``config.yaml``; ``last.ckpt``, from
    which the training goes on as if it had not been interrupted, to the bit where the machine is the same;
    ``best.ckpt``, that of the lowest validation loss; ``tensorboard/``. Started by ``torchrun``, it runs in
    several processes.

    Args:
        config: the settings.
        resume: go on from ``last.ckpt`` where it is there.

    Returns:
        The path of the weights file.

    Raises:
        ValueError: there is no data or no such device, a pair is smaller than the crop, the folder holds a
            training already, the one to be resumed had other settings or pairs or its checkpoint cannot be
            read, or the loss is no number any more.
        KeyboardInterrupt: a signal ended the training, after a checkpoint was written.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but there is no CUDA device")
    output = Path(config.output)
    last = output / "last.ckpt"
    before = _to_resume(config, last, resume)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    trainer = _trainer(config, output, Checkpoints(last, config.checkpoint_minutes))
    world_size, on_gpu = trainer.world_size, trainer.strategy.root_device.type == "cuda"
    if config.batch_size % world_size:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {world_size}, got {config.batch_size}"
        )
    training, validation = load_pairs(
        config.data,
        config.crop,
        config.validation_pairs,
        config.cache,
        progress_bar=config.progress_bar and trainer.is_global_zero,
        fusions=config.positive_fusions,
    )
    pairs = {"training": training.names, "validation": validation.names}
    if before is not None:
        _check_same_pairs(config, pairs, before, last)
    steps = max(1, round(len(training) * config.crops_per_pair / config.batch_size))
    torch.manual_seed(config.seed)
    module = TrainingModule(config, steps, pairs)
    if config.initial_weights is not None and before is None:
        of_package = config.initial_weights == "package"
        module.start_from(load_model(None if of_package else config.initial_weights))
    crops = _crops(config, training, steps, trainer)
    held_out = DataLoader(ValidationCrops(validation, max(config.scales))) if validation else None
    output.mkdir(parents=True, exist_ok=True)
    if trainer.is_global_zero:
        (output / "config.yaml").write_text(config.to_yaml())
    with warnings.catch_warnings():
        for expected in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{expected}.*")
        _fit(trainer, module, crops, held_out, last, resumes=before is not None)
        seconds = module.seconds()
        best = output / "best.ckpt"
        if config.early_stop_patience is not None and best.is_file():
            module.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
        steps_done = trainer.global_step
        measures = _validate(trainer, module, held_out, last)
    record: dict[str, Any] = {
        "config": _settings(config),
        "training_pairs": training.names,
        "validation_pairs": validation.names,
        "steps": steps_done,
        "minutes": round(seconds / 60, 2),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "processes": world_size,
        "torch": torch.__version__,
        "validation": {name.partition("/")[2]: round(value, 4) for name, value in measures.items()},
        "loss_curve": _downsample(module.curve().tolist()),
    }
    path = output / WEIGHTS
    if trainer.is_global_zero:
        save_model(module.average, path, record)
    trainer.strategy.barrier("weights")
    return path


def _to_resume(config: TrainingConfig, last: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint from which the training goes on; None: it begins."""
    if resume and last.is_file():
        before = _read_checkpoint(last)
        _check_same(config, before["settings"], last)
        return before
    if last.exists():
        raise ValueError(f"{last.parent} holds a training already: resume it, or choose another output")
    return None


def _crops(
    config: TrainingConfig, training: Pairs, steps: int, trainer: lightning.Trainer
) -> DataLoader[Crops]:
    """This process's part of the batches, from the trainer's step on."""
    batches = StepBatches(
        lambda: trainer.global_step, steps, config.batch_size, trainer.global_rank, trainer.world_size
    )
    return DataLoader(
        RandomCrops(training, config.crop, config.seed),
        batch_sampler=batches,
        num_workers=config.num_workers,
        persistent_workers=False,
        pin_memory=trainer.strategy.root_device.type == "cuda",
    )


def _fit(
    trainer: lightning.Trainer,
    module: TrainingModule,
    crops: DataLoader[Any],
    held_out: DataLoader[Any] | None,
    last: Path,
    resumes: bool,
) -> None:
    """Trains to the end, from the last checkpoint on where there is something to resume."""
    try:
        trainer.fit(module, crops, held_out, ckpt_path=last if resumes else None, weights_only=True)
    except Interrupted:
        raise _interruption(trainer, last) from None
    except ValueError as error:
        # Of a process that loads data torch tells the whole traceback; the last line of it is ours.
        _, of_worker, message = str(error).rpartition("\nValueError: ")
        if not of_worker:
            raise
        raise ValueError(message.strip()) from error


def _validate(
    trainer: lightning.Trainer, module: TrainingModule, held_out: DataLoader[Any] | None, last: Path
) -> Mapping[str, float]:
    """The measures of the network as it will be written; nothing where no pairs were held out."""
    if held_out is None:
        return {}
    handler = signal.getsignal(signal.SIGINT)
    try:
        return trainer.validate(module, held_out, verbose=False)[0]
    except SystemExit:  # what Lightning makes of Ctrl-C, and ignores it from then on
        signal.signal(signal.SIGINT, handler)
        raise _interruption(trainer, last) from None


def _interruption(trainer: lightning.Trainer, last: Path) -> KeyboardInterrupt:
    goes_on = f"; resumed, it goes on from {last}" if last.is_file() else ""
    return KeyboardInterrupt(f"after {trainer.global_step} steps{goes_on}")


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """What :class:`Checkpoints` wrote, on the CPU."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"settings", "pairs"} - set(checkpoint)
    except Exception as error:  # whatever a damaged file makes of the unpickling
        raise ValueError(f"{path} cannot be read as a checkpoint: {type(error).__name__}") from error
    if missing:
        raise ValueError(f"{path} is no checkpoint of a training: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def _trainer(config: TrainingConfig, output: Path, checkpoints: Checkpoints) -> lightning.Trainer:
    callbacks: list[Callback] = [checkpoints]
    if config.validation_pairs:
        loss = "validation/loss"
        # Both decide when a validation ends, so that the checkpoint at the end of an epoch knows of it.
        callbacks.append(
            BestCheckpoint(
                output, "best", monitor=loss, save_on_train_epoch_end=False, enable_version_counter=False
            )
        )
        if config.early_stop_patience is not None:
            callbacks.append(
                EarlyStopping(loss, patience=config.early_stop_patience, check_on_train_epoch_end=False)
            )
    if config.progress_bar:
        callbacks.append(ProgressBar(refresh_rate=config.log_every))
    launched = torch.distributed.is_torchelastic_launched()
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if launched else 1
    return lightning.Trainer(
        accelerator=config.device,
        devices=local,
        num_nodes=int(os.environ["WORLD_SIZE"]) // local if launched else 1,
        strategy=DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True) if launched else "auto",
        precision=config.precision,
        deterministic="warn" if config.deterministic else None,
        max_epochs=config.epochs,
        gradient_clip_val=config.gradient_clip or None,
        check_val_every_n_epoch=config.validate_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(output, name=None, version="tensorboard", default_hp_metric=False),
        log_every_n_steps=config.log_every,
        callbacks=callbacks,
        enable_checkpointing=bool(config.validation_pairs),
        enable_model_summary=False,
        enable_progress_bar=config.progress_bar,
    )


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings but for the place of the results, which a file knows best itself."""
    settings = dataclasses.asdict(config)
    del settings["output"]
    return settings


def _check_same(config: TrainingConfig, before: dict[str, Any], path: Path) -> None:
    """Raises a ValueError that names the settings in which both trainings differ."""
    now = _settings(config)

    def what_counts(settings: dict[str, Any]) -> dict[str, Any]:  # data may have moved
        return settings | {"data": [source | {"path": ""} for source in settings["data"]]}

    old, new = what_counts(before), what_counts(now)
    changed = [
        f"{name} was {before.get(name)!r}, got {value!r}"
        for name, value in now.items()
        if name not in _MAY_CHANGE and old.get(name) != new[name]
    ]
    if changed:
        raise ValueError(f"{path} was written with other settings: {'; '.join(changed)}")


def _check_same_pairs(
    config: TrainingConfig, pairs: dict[str, list[str]], before: dict[str, Any], path: Path
) -> None:
    """Raises a ValueError where the training to be resumed had other pairs, wherever their folders were."""
    old = _without_folders(before["pairs"], before["settings"])
    if old != _without_folders(pairs, _settings(config)):
        raise ValueError(f"{path} was written with other pairs of images: resume with those, or train anew")


def _without_folders(pairs: dict[str, list[str]], settings: dict[str, Any]) -> dict[str, list[str]]:
    """The names of pairs without the folders of their data sets, which may have moved."""
    folders = sorted((f"{source['path']}/" for source in settings["data"]), key=len, reverse=True)

    def own(name: str) -> str:
        return name.removeprefix(next((folder for folder in folders if name.startswith(folder)), ""))

    return {part: [own(name) for name in names] for part, names in pairs.items()}


def _downsample(curve: list[float]) -> list[float]:
    """Means of consecutive stretches of a curve, at most 200 of them."""
    length = max(1, -(-len(curve) // 200))
    return [
        round(sum(curve[i : i + length]) / len(curve[i : i + length]), 5)
        for i in range(0, len(curve), length)
    ]
