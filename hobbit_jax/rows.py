"""Rows: one JSON file per finished cell, and what is needed to trust it.

Owns the files of a sweep's working directory, their atomic writing, and the provenance every row
carries. A row appears whole and by one name, so a killed worker leaves no half row and two workers
no two; a missing figure is null, never 0.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from hobbit_jax.atomic import place_first, replacing

REPORTED_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that a reader sees all of it or nothing."""
    text = _json(value)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class RowStore:
    """The rows of one working directory."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.directory = workdir / "rows"

    def create(self) -> None:
        """Makes the directory and checks that it can be written.

        Raises:
            PermissionError: it cannot; says which directory.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".{os.getpid()}.probe"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise PermissionError(
                f"workdir {self.workdir} cannot be written ({error.strerror}); give another "
                "--workdir"
            ) from error

    def path(self, cell: str) -> Path:
        """Where the row of `cell` stands."""
        return self.directory / f"{cell}.json"

    def names(self) -> set[str]:
        """Cells that have a row of any kind."""
        found = (name for name in os.listdir(self.directory) if not name.startswith("."))
        return {name.removesuffix(".json") for name in found}

    def read(self, cell: str) -> dict[str, Any] | None:
        """The row of `cell`; None if there is none that can be read."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            row = json.loads(self.path(cell).read_text(encoding="utf-8"))
            return row if isinstance(row, dict) else None
        return None

    def finished(self, cell: str) -> bool:
        """Whether `cell` has an "ok" row; failed and unreadable ones are run again."""
        row = self.read(cell)
        return row is not None and row.get("status") == "ok"

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row under its cell's name, unless the cell has been finished meanwhile."""
        path = self.path(row["cell"])
        if not place_first(path, _json(row)) and not self.finished(row["cell"]):
            write_json(path, row)


def git_revision() -> str | None:
    """The checkout's commit, with "+dirty" for uncommitted changes; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """None where the package is missing, as it may be on a machine that only runs kernels."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


@functools.cache
def machine() -> dict[str, Any]:
    """Device, processor, versions and revision of this process, as of its first row.

    A long sweep runs the code it started with, whatever the checkout becomes meanwhile.
    """
    device = jax.devices()[0]
    kind = _processor_name() if device.platform == "cpu" else device.device_kind
    return {
        "git_revision": git_revision(),
        "device": f"{device.platform}: {kind}",
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in REPORTED_PACKAGES},
        },
    }
