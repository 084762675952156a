"""The driver: starts workers while cells are left, and shows how far they are.

Owns when a worker is started, what its death means, and how a sweep ends or is interrupted. It
computes nothing and may be killed at any time.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from hobbit_jax.atomic import PARTIAL_GLOB
from hobbit_jax.cells.leases import STALE_S, Leases
from hobbit_jax.cells.sweep import SweepCell, processes
from hobbit_jax.launch.manifest import Sweep, read_end
from hobbit_jax.rows import RowStore, write_json

# In a row, without anything stored in between. More than a crash needs to be believed, since a
# worker that was killed from outside looks the same.
MAX_DEATHS = 10
# In a row, before they took a cell: whatever is wrong is not the cells.
_MAX_FRUITLESS = 20


class Launcher(Protocol):
    """Starts workers (`worker.py`) and says which have ended; see `on_local.py`."""

    poll_s: float  # between two looks

    def start(self, names: Sequence[str], processes: int) -> None:
        """Starts workers of these names, each of so many processes together.

        Raises:
            ValueError, NotImplementedError: they can never run here.
        """
        ...

    def ended(self) -> list[tuple[str, str]]:
        """Workers that have ended since the last call, and what is known of the reason."""
        ...

    def stop(self) -> None:
        """Ends all workers at once; returns when they can write nothing more."""
        ...


def drive(
    cells: Sequence[SweepCell],
    description: dict[str, Any],
    workdir: Path,
    launch: LauncherFactory,
    workers: int,
    max_deaths: int = MAX_DEATHS,
    stale_s: float = STALE_S,
) -> tuple[int, int, int]:
    """Runs every cell that has no finished row; a failing cell is recorded and the rest go on.

    Args:
        cells: in the order in which they are taken.
        description: title, question, command, config and rule, kept as `sweep.json` for the
            report.
        workdir: seen by all workers under this name.
        launch: makes the launcher for (workdir, driver).
        workers: at most so many at a time.
        max_deaths, stale_s: see `manifest.Sweep`.

    Returns:
        How many cells ran (here or by another driver meanwhile), were finished before, and failed.

    Raises:
        ValueError, NotImplementedError, OSError: the model or the workdir cannot be used at all.
        RuntimeError: workers end before they can take a cell.
    """
    workdir = workdir.resolve()
    rows = RowStore(workdir)
    rows.create()
    names = [cell.name for cell in cells]
    if len(set(names)) != len(names):
        raise ValueError("two cells of the sweep are the same; check its axes for repetitions")
    write_json(workdir / "sweep.json", {**description, "cells": names})
    sweep = Sweep.plan(cells, rows, max_deaths, stale_s)
    run = _Run(sweep, rows, workdir)
    skipped = len(cells) - len(run.pending)
    if run.pending:
        sweep.save(workdir, run.driver)
        launcher = launch(workdir, run.driver)
        try:
            run.until_settled(launcher, workers)
        except KeyboardInterrupt:
            left = f"{len(names) - len(run.pending)} of {len(names)} cells have rows"
            print(f"\nstopped: {left}; the same command goes on from there", file=sys.stderr)
            raise
        finally:
            launcher.stop()
            for name in run.alive:
                run.leases.bury(name)
        if not run.failed:  # or else Slurm's logs may say more
            shutil.rmtree(Sweep.folder(workdir, run.driver), ignore_errors=True)
    if not run.pending:
        _tidy(workdir, run.leases)
    return len(cells) - skipped, skipped, run.failed


class LauncherFactory(Protocol):
    """Makes a launcher for the workers of one driver."""

    def __call__(self, workdir: Path, driver: str) -> Launcher: ...  # noqa: D102


class _Run:
    """One driver's cells that are not settled, and its workers that have not ended."""

    def __init__(self, sweep: Sweep, rows: RowStore, workdir: Path):
        self.sweep, self.rows, self.workdir = sweep, rows, workdir
        self.driver = secrets.token_hex(4)
        self.leases = Leases(workdir, self.driver, sweep.stale_s)
        self.pending = {c.name: processes(c) for c in sweep.cells if not rows.finished(c.name)}
        self.alive: dict[str, int] = {}  # workers, and of how many processes
        self.started = self.failed = self.fruitless = 0

    def until_settled(self, launcher: Launcher, workers: int) -> None:
        """Starts workers and looks after them until every cell has its row."""
        total, shown = len(self.sweep.cells), None
        with tqdm(total=total, initial=total - len(self.pending), unit="cell") as progress:
            while self._settle(progress):
                self._bury(launcher.ended())
                holders = self.leases.holders()
                self._start(launcher, workers, holders)
                at_work = [name for name in self.pending if name in holders]
                if at_work and at_work[0] != shown:
                    shown = at_work[0]
                    progress.set_description(shown.rsplit("-", 1)[0])
                time.sleep(launcher.poll_s)

    def _settle(self, progress: tqdm) -> bool:
        for name in self.rows.names().intersection(self.pending):
            status = self.sweep.settled(self.rows, name)
            if status is None:
                continue
            if status == "failed":
                self.failed += 1
                row = self.rows.read(name) or {}
                progress.write(f"failed: {name}: {row.get('error')}")
            del self.pending[name]
            progress.update()
        return bool(self.pending)

    def _bury(self, ended: Sequence[tuple[str, str]]) -> None:
        for name, reason in ended:
            del self.alive[name]
            said = read_end(self.workdir, self.driver, name)
            if said is None:
                died_at_work = self.leases.bury(name, reason, counts=True)
                self.fruitless = 0 if died_at_work else self.fruitless + 1
                if self.fruitless >= _MAX_FRUITLESS:
                    raise RuntimeError(
                        f"{self.fruitless} workers in a row ended before they took a cell; "
                        f"last: {reason}"
                    )
                continue
            self.fruitless = 0
            if said:
                # A mistake of the user's, or a bug, whose traceback the worker has shown.
                raise (ValueError if said["mistake"] else RuntimeError)(said["message"])

    def _start(self, launcher: Launcher, workers: int, holders: dict[str, str]) -> None:
        free: dict[int, int] = {}
        for name, count in self.pending.items():
            if name not in holders:
                free[count] = free.get(count, 0) + 1
        busy = set(holders.values())
        for count, cells in free.items():
            # Workers that have just started will take some of these cells.
            idle = sum(c == count for name, c in self.alive.items() if name not in busy)
            new = min(workers - len(self.alive), cells - idle)
            if new > 0:
                names = [f"{self.driver}-{self.started + n}" for n in range(new)]
                launcher.start(names, count)
                self.alive.update(dict.fromkeys(names, count))
                self.started += new


def _tidy(workdir: Path, leases: Leases) -> None:
    """Removes what the killed left, unless somebody is at work."""
    leftovers = [*workdir.rglob(PARTIAL_GLOB), *leases.directory.iterdir()]
    # Looked up first: whatever the living write comes after this listing, or shows as a lease.
    if leases.holders():
        return
    for path in leftovers:
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(workdir / "parts", ignore_errors=True)
