"""Writing a file whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write to, which becomes `path` in one step when the block ends well.

    Whatever the block raises goes on, and neither `path` nor its folder has changed.

    Args:
        path: where to, in a folder that exists; a file that is there is replaced.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> with replacing(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    path = Path(path)
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
