"""Writing a file whole or not at all."""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write to, which becomes `path` in one step when the block ends well.

    Whatever the block raises goes on, and neither `path` nor its folder has changed.

    Args:
        path: where to, in a folder that exists; a file that is there is replaced. A device, a pipe or an open
            file (/dev/stdout) is no file that could be: what was written is copied into it.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with replacing(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    path = Path(path)
    if _is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            temporary.touch()
            yield temporary
            with open(temporary, "rb") as written, open(path, "ab") as stream:
                shutil.copyfileobj(written, stream)
        return
    # In the same folder, since a file is replaced in one step within a file system only.
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # that of any new file; safetensors makes its own files private
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _is_stream(path: Path) -> bool:
    open_files = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
    return path.exists() and (path.absolute().parent in open_files or not (path.is_file() or path.is_dir()))
