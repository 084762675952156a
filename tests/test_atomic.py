"""Files that appear whole or not at all: what a kill and a full disk leave."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hobbit_jax import atomic

WRITER = """
import sys, time
from pathlib import Path
from hobbit_jax.atomic import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


def begin(path: Path) -> subprocess.Popen:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "begun\n"
    return writer


def kill(writer: subprocess.Popen) -> None:
    os.kill(writer.pid, signal.SIGKILL)
    with writer:
        writer.wait()


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path, other = tmp_path / "a[1].json", tmp_path / "a[1].json.txt"
    killed, living, elsewhere = begin(path), begin(path), begin(other)
    kill(killed)
    assert len(list(tmp_path.glob(".*.partial"))) == 3
    with atomic.replacing(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert len(list(tmp_path.glob(".*.partial"))) == 2  # the living ones go on
    kill(living)
    kill(elsewhere)
    for name in (path, other):
        atomic.write_text(name, "late")
    assert sorted(tmp_path.iterdir()) == [path, other]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("344064 requested and 3968 written"),  # as np.save has it
    ],
)
def test_a_full_disk_says_path_wanted_and_free_bytes(tmp_path, error):
    path = tmp_path / "x.npy"
    with (
        pytest.raises(OSError, match=rf"{path} wants more than 4 bytes, and \d+ are free") as info,
        atomic.replacing(path) as partial,
    ):
        partial.write_bytes(b"half")
        raise error
    assert info.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_file_larger_than_the_disk_is_not_begun(tmp_path):
    with pytest.raises(OSError, match=rf"wants {2**60} bytes, and \d+ are free"):
        atomic.check_space(tmp_path / "x", 2**60)


def test_np_save_to_a_full_device_is_such_an_error():
    with (
        pytest.raises(OSError) as info,
        open("/dev/full", "wb", buffering=0) as full,
    ):
        np.save(full, np.zeros(10**6))
    assert atomic._says_disk_full(info.value)


def test_a_missing_folder_is_named_by_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as info, atomic.replacing(tmp_path / "no" / "x"):
        raise AssertionError("begun")
    assert info.value.filename == str(tmp_path / "no" / "x")
