"""A worker: takes cells from the working directory, one at a time, until none is left to take.

Owns the order of claim, work and row, and how a worker's end is told. `python -m
hobbit_jax.launch.worker` is the local one's. The model is loaded when the first cell wants it and
kept for the next.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path

import jax
import numpy as np

from hobbit_jax.cells.leases import Lease, Leases
from hobbit_jax.cells.sweep import SweepCell, failed_row, processes, run_cell
from hobbit_jax.cells.workbench import EvalSizes, Inputs, Workbench
from hobbit_jax.launch.manifest import Sweep, write_end
from hobbit_jax.rows import RowStore

# A user's, such as a model that does not open; any other exception here is a bug.
_MISTAKES = (ValueError, NotImplementedError, OSError, EOFError)


class Worker:
    """One worker of one driver. `name` is unique; a restart of a preempted one keeps it."""

    def __init__(self, workdir: Path, driver: str, name: str):
        self.workdir, self.driver, self.name = workdir, driver, name
        self.sweep = Sweep.load(workdir, driver)
        self.rows = RowStore(workdir)
        self.rank, self.count = jax.process_index(), jax.process_count()
        owner = name if self.rank == 0 else f"{name}.{self.rank}"
        self.leases = Leases(workdir, owner, self.sweep.stale_s)
        # This worker before it was preempted: it cannot be alive beside this one.
        self.leases.bury(owner)
        self._index = {
            cell.name: index
            for index, cell in enumerate(self.sweep.cells)
            if processes(cell) == self.count
        }
        self._settled: set[str] = set()
        self._benches: dict[tuple[Inputs, EvalSizes], Workbench] = {}

    def run(self) -> None:
        """Works, and leaves word of the end; the driver shows an error as its own."""
        failure = None
        try:
            while self._work_one():
                pass
        except Exception as error:
            failure = error
            if not isinstance(failure, _MISTAKES):
                traceback.print_exc()
        finally:
            # Also when interrupted: what is half done is given back at once.
            self.leases.end_all()
            self.leases.close()
        if self.rank == 0:
            mistake = isinstance(failure, _MISTAKES)
            write_end(self.workdir, self.driver, self.name, failure, mistake)

    def _work_one(self) -> bool:
        lease = self._take() if self.rank == 0 else None
        index = -1 if lease is None else self._index[lease.name]
        if self.count > 1:
            index = int(_broadcast(np.int32(index)))
        if index < 0:
            return False
        cell = self.sweep.cells[index]
        if lease is not None and lease.deaths >= self.sweep.max_deaths:
            times = f"{lease.deaths} times in a row"
            row = failed_row(cell, f"RuntimeError: its worker died {times}; last: {lease.reason}")
        else:
            row = run_cell(cell, self._bench(cell))
        if lease is not None:
            self.rows.write(row)
            self._settled.add(cell.name)
            self.leases.finish(lease)
        return True

    def _take(self) -> Lease | None:
        """Claims the first cell that is neither settled nor somebody's."""
        while True:
            for name in self.rows.names().intersection(self._index) - self._settled:
                if self.sweep.settled(self.rows, name):
                    self._settled.add(name)
            lease = self.leases.claim(n for n in self._index if n not in self._settled)
            # Its last owner may have finished it between the look at its row and the claim.
            if lease is None or not self.sweep.settled(self.rows, lease.name):
                return lease
            self._settled.add(lease.name)
            self.leases.finish(lease)

    def _bench(self, cell: SweepCell) -> Workbench:
        # Outside the cell's own try: a model that does not open fails the sweep, not a cell.
        key = (cell.inputs, cell.sizes)
        if key not in self._benches:
            self._benches[key] = Workbench(*key, self.workdir, self.leases)
        return self._benches[key]


def _broadcast(value: np.int32) -> np.ndarray:
    from jax.experimental import multihost_utils  # starts a backend when imported

    return multihost_utils.broadcast_one_to_all(value)


def _end_with_driver(worker: Worker) -> None:
    """Ends this process when the driver is gone, which holds the other end of stdin."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    worker.leases.end_all()
    os._exit(1)


def main() -> None:
    """A worker of the local launcher: workdir, driver and name as arguments."""
    workdir, driver, name = sys.argv[1:]
    worker = Worker(Path(workdir), driver, name)
    threading.Thread(target=_end_with_driver, args=(worker,), daemon=True).start()
    worker.run()


if __name__ == "__main__":
    main()
