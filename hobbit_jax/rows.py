"""Rows: one JSON file per finished cell, and what is needed to trust it.

Owns the files of a sweep's working directory, their atomic writing, and the
provenance every row carries. Called by `sweep.py` (writes) and `report.py`
(reads). A row is written to a temporary name and renamed, so a killed sweep
leaves no half row; a missing figure is null, never 0.
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

from hobbit_jax.atomic import replacing

REPORTED_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "gguf", "tokenizers")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that a reader sees all of it or nothing."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
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
            probe.unlink()
        except OSError as error:
            raise PermissionError(
                f"workdir {self.workdir} cannot be written ({error.strerror}); give another "
                "--workdir"
            ) from error

    def path(self, cell: str) -> Path:
        """Where the row of `cell` stands."""
        return self.directory / f"{cell}.json"

    def finished(self, cell: str) -> bool:
        """Whether `cell` has an "ok" row; failed and unreadable ones are run again."""
        with contextlib.suppress(FileNotFoundError, ValueError, AttributeError):
            row = json.loads(self.path(cell).read_text(encoding="utf-8"))
            return row.get("status") == "ok"
        return False

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row under its cell's name."""
        write_json(self.path(row["cell"]), row)


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
