"""Files that appear whole or not at all, also when several machines write them.

Owns the temporary name, the rename, and the clean-up after a failure.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL_GLOB = ".*.partial"


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


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, so that a reader sees all of it or nothing.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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
