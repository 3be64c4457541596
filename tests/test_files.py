"""What is written is whole or not there, and goes into what is no file."""

import os
import subprocess
import sys
import threading

import pytest

from ddrf_fast._files import replacing


def test_what_is_broken_off_leaves_what_was_there(tmp_path):
    def write() -> None:
        with replacing(tmp_path / "note.txt") as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    (tmp_path / "note.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert (tmp_path / "note.txt").read_text() == "old"


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    with replacing(pipe) as temporary:
        temporary.write_text("whole")
    reader.join()
    assert got == ["whole"]
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_table_goes_to_the_output_after_what_was_printed(tmp_path):
    code = (
        "from ddrf_fast._tables import write_csv; print('first', flush=True);"
        "write_csv('/dev/stdout', ['a', 'b'], [[1, 2]]); write_csv('/dev/null', ['a'], [])"
    )
    before = os.lstat("/dev/stdout").st_ino, os.lstat("/dev/null").st_ino
    expected = "first\na,b\n1,2\n"
    command = [sys.executable, "-c", code]
    piped = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert piped.stdout == expected
    with open(tmp_path / "out.txt", "w") as file:
        subprocess.run(command, stdout=file, check=True)
    assert (tmp_path / "out.txt").read_text() == expected
    assert (os.lstat("/dev/stdout").st_ino, os.lstat("/dev/null").st_ino) == before
