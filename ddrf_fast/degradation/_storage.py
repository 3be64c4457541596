"""One named tensor in a safetensors file, with errors that tell what is wrong with which file."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddrf_fast._files import replacing


def save_tensor(path: str | Path, kind: str, tensor: Tensor, **metadata: str) -> None:
    """Writes `tensor` under the name `kind`, with `metadata`; a file is replaced whole or not at all."""
    with replacing(path) as temporary:
        save_file({kind: tensor.detach().cpu().contiguous()}, temporary, metadata=metadata)


def load_tensor(path: str | Path, kind: str) -> tuple[Tensor, dict[str, str]]:
    """Reads what :func:`save_tensor` wrote: the tensor, on the CPU, and its metadata.

    Raises:
        ValueError: the file is missing, is no safetensors file, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            if names != [kind]:
                raise ValueError(f"{path}: expected a file with the tensor {kind!r}, it holds {names}")
            return file.get_tensor(kind), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
