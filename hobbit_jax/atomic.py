"""Files that appear whole or not at all.

Owns the temporary name, the rename, and the clean-up after a failure. Called by
everything that writes a file others may read: GGUF files, rows, caches, reports.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; it becomes `path` if the block ends without an error.

    In the same directory: a rename across file systems would not be atomic. After an
    error nothing is left, and an older file at `path` stays as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
