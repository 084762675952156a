"""Files that appear whole or not at all, also when several machines write them.

Owns the temporary name, its lock, the rename, the clean-up after a failure or a kill, what a full
disk is told as, and the lock of those who would make the same file.
"""

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

_POLL_S = 0.2  # between tries for a lock


def _new_partial(path: Path) -> tuple[Path, int]:
    """An empty file beside `path` under a name that no other process has, and its descriptor.

    Its lock lives as long as its writer, so what a killed writer of `path` left can be told from
    what another one is writing now. Process ids would repeat between machines, and ages say nothing
    of a file that takes hours.
    """
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except OSError as error:
            error.filename = str(path)
            raise
        with suppress(OSError):  # a file system without locks keeps its leftovers
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if partial.exists():  # nobody took it for a leftover before it was locked
            return partial, descriptor
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Removes temporary files of `path` that no living process is writing."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):  # somebody's, gone already, or on a file system without locks
            descriptor = os.open(partial, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(descriptor)


def check_space(path: Path, wanted_bytes: int) -> None:
    """Refuses to begin a file that the disk of `path` cannot hold.

    Raises:
        OSError: ENOSPC; says the path, and the wanted and free bytes.
    """
    if wanted_bytes > shutil.disk_usage(path.parent).free:
        raise _disk_full(path, f"{wanted_bytes}")


def _disk_full(path: Path, wanted: str) -> OSError:
    free_bytes = shutil.disk_usage(path.parent).free
    text = f"the disk is full: {path} wants {wanted} bytes, and {free_bytes} are free"
    return OSError(errno.ENOSPC, text)


def _says_disk_full(error: OSError) -> bool:
    # NumPy reports a short write without an error number.
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or (
        error.errno is None and "requested and" in str(error)
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; it becomes `path` if the block ends without an error.

    In the same directory: a rename across file systems would not be atomic. After an
    error nothing is left, and an older file at `path` stays as it was.

    Raises:
        OSError: from the file system; of a full disk with the path, the wanted and free bytes.
    """
    _remove_abandoned(path)
    partial, descriptor = _new_partial(path)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if not _says_disk_full(error):
            raise
        raise _disk_full(path, f"more than {partial.stat().st_size}") from error
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text, so that a reader sees all of it or nothing, also after the power fails."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def new_map(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file, mapped for writing, with room on the disk for all of its bytes.

    A map of a file with holes would end the process where the disk is full.

    Raises:
        OSError: the disk has no room.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool]:
    """Keeps others who ask from making `path` meanwhile, in a folder that exists.

    It spares work and no more: whoever makes a file nevertheless leaves the same one. The kernel
    drops the lock of a process that is killed.

    Yields:
        Whether it is held: False where another has it and is not to be waited for.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=wait, poll_interval=_POLL_S)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        # Whoever waits for the file that is gone now notices, and locks a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
