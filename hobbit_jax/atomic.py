"""Files that appear whole or not at all, also when several machines write them.

Owns the temporary name, the rename, the clean-up after a failure, and the lock of those who would
make the same file.
"""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PARTIAL_GLOB = ".*.partial"
_POLL_S = 0.2  # between tries for a lock


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process has; process ids repeat between machines."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; it becomes `path` if the block ends without an error.

    In the same directory: a rename across file systems would not be atomic. After an
    error nothing is left, and an older file at `path` stays as it was.
    """
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def place_first(path: Path, text: str) -> bool:
    """Writes `text` as a new file `path`, whole; of several writers one succeeds.

    By a hard link, which is atomic on local and network file systems alike.

    Returns:
        Whether it was this writer; the file of another stays as it is.
    """
    partial = _partial(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost, and then finds its own link.
            return partial.stat().st_nlink == 2
        return True
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool]:
    """Keeps others who ask from making `path` meanwhile, in a folder that exists.

    It spares work and no more: whoever makes a file nevertheless leaves the same one. The kernel
    drops the lock of a process that is killed; what such a one left half written is removed.

    Args:
        path: to be made.
        wait: for another holder.

    Yields:
        Whether it is held: False where another has it and `wait` is False.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=wait, poll_interval=_POLL_S)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        for partial in path.parent.glob(f".{glob.escape(path.name)}{PARTIAL_GLOB[1:]}"):
            partial.unlink(missing_ok=True)
        yield True
    finally:
        lock.release()
