"""What a driver and its workers tell each other, as files of the working directory.

Owns the sweep as a driver leaves it for its workers, the rule of which rows settle it, and the word
that a worker leaves when it ends by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hobbit_jax
from hobbit_jax.atomic import replacing
from hobbit_jax.cells.sweep import SweepCell
from hobbit_jax.rows import RowStore, write_json


@dataclass(frozen=True)
class Sweep:
    """What a driver tells its workers; a file of the working directory.

    Attributes:
        cells: in the order in which they are taken.
        earlier: cells with a failed or unreadable row from before, and that row's stamp; they are
            run again, once.
        max_deaths: workers that a cell may cost in a row without anything stored.
        stale_s: see `leases.Leases`.
    """

    cells: tuple[SweepCell, ...]
    earlier: dict[str, tuple[int, int]]
    max_deaths: int
    stale_s: float

    @staticmethod
    def folder(workdir: Path, driver: str) -> Path:
        """Where one driver and its workers keep their files."""
        return workdir / "launch" / driver

    @classmethod
    def load(cls, workdir: Path, driver: str) -> Sweep:
        """What `driver` has left for its workers."""
        return pickle.loads((cls.folder(workdir, driver) / "sweep.pickle").read_bytes())

    @classmethod
    def plan(
        cls, cells: Sequence[SweepCell], rows: RowStore, max_deaths: int, stale_s: float
    ) -> Sweep:
        """A sweep that runs whatever of `cells` has no finished row now."""
        stamps = {c.name: row_stamp(rows, c.name) for c in cells if not rows.finished(c.name)}
        earlier = {name: stamp for name, stamp in stamps.items() if stamp is not None}
        return cls(tuple(cells), earlier, max_deaths, stale_s)

    def save(self, workdir: Path, driver: str) -> None:
        """Leaves the sweep for the workers of `driver`."""
        path = self.folder(workdir, driver) / "sweep.pickle"
        path.parent.mkdir(parents=True)
        with replacing(path) as partial:
            partial.write_bytes(pickle.dumps(self))

    def settled(self, rows: RowStore, cell: str) -> str | None:
        """The status of the row that this sweep wants of `cell`; None while there is none."""
        row = rows.read(cell)
        if row is None or row.get("status") not in ("ok", "failed"):
            return None
        if row["status"] == "failed" and self.earlier.get(cell) == row_stamp(rows, cell):
            return None
        return row["status"]


def row_stamp(rows: RowStore, cell: str) -> tuple[int, int] | None:
    """What tells the row that stands there from one that replaces it."""
    with contextlib.suppress(FileNotFoundError):
        stat = rows.path(cell).stat()
        return stat.st_ino, stat.st_mtime_ns
    return None


def _end_path(workdir: Path, driver: str, worker: str) -> Path:
    return Sweep.folder(workdir, driver) / f"{worker}.end.json"


def write_end(
    workdir: Path, driver: str, worker: str, error: Exception | None, mistake: bool
) -> None:
    """Says that `worker` ended by itself, and if for an error, whether it is a user's mistake."""
    said = {} if error is None else {"message": str(error), "mistake": mistake}
    write_json(_end_path(workdir, driver, worker), said)


def read_end(workdir: Path, driver: str, worker: str) -> dict[str, Any] | None:
    """What `worker` said; None if it was cut short."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(_end_path(workdir, driver, worker).read_text(encoding="utf-8"))
    return None


def python_path() -> str:
    """PYTHONPATH with which another process finds the same packages as this one."""
    here = str(Path(hobbit_jax.__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
