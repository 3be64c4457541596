"""Folders and hub repositories in the layout of Hugging Face: ``config.json`` and ``model.safetensors``."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ddrf_fast.models.ddrfnet import DDRFNet


class PretrainedMixin:
    """``save_pretrained`` and ``from_pretrained`` of :class:`~ddrf_fast.models.DDRFNet`.

    Not huggingface_hub's own mixin, which a class can only inherit where that package is installed.
    """

    def save_pretrained(
        self: Any,
        folder: str | os.PathLike[str],
        *,
        record: dict[str, Any] | None = None,
    ) -> Path:
        """Writes ``model.safetensors`` and ``config.json``; ``hf upload`` puts such a folder on the hub.

        Args:
            folder: is created; files of these names are replaced.
            record: as in :func:`~ddrf_fast.models.save_model`.

        Returns:
            The folder.

        Raises:
            ValueError: the model holds NaN or infinite weights.
        """
        from ddrf_fast.models import checkpoint

        folder = Path(folder)
        checkpoint.save_model(self, folder / checkpoint.PRETRAINED_WEIGHTS, record)
        checkpoint.write_config(self.config, folder / checkpoint.PRETRAINED_CONFIG)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
    ) -> "DDRFNet":
        """Reads a folder of :meth:`save_pretrained`, or a repository of the Hugging Face hub.

        Args:
            name: the folder; where there is none of that name, the repository ("owner/name"), for which
                huggingface_hub must be installed.
            revision: branch, tag or commit of the repository.
            cache_dir: where the hub's files are kept; None: huggingface_hub's own.
            local_files_only: take what was fetched before, without the network.
            device: where the model shall be.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: there is no such folder or repository, huggingface_hub is needed and not installed, or
                the files cannot be read or do not fit, as in :func:`~ddrf_fast.models.load_model`.

        Example:
            >>> from ddrf_fast.models import DDRFNet
            >>> folder = DDRFNet().save_pretrained(getfixture("tmp_path") / "mine")
            >>> sorted(path.name for path in folder.iterdir())
            ['config.json', 'model.safetensors']
            >>> model = DDRFNet.from_pretrained(folder)
        """
        from ddrf_fast.models import checkpoint

        folder = Path(name)
        if not folder.is_dir():
            files = [checkpoint.PRETRAINED_CONFIG, checkpoint.PRETRAINED_WEIGHTS]
            folder = _fetch(os.fspath(name), files, revision, cache_dir, local_files_only)
        return checkpoint.load_model(folder, device)


def _fetch(
    name: str,
    files: list[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"{name} is no folder; repositories of the hub need huggingface_hub: pip install 'ddrf-fast[hub]'"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=files,
                revision=revision,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is no folder, and the hub does not give it: {reason}") from error
