"""What the launchers' tests share: driver processes, a killer of workers, and what rows must be."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import cluster_cells

from hobbit_jax import atomic
from hobbit_jax.cells.leases import Leases
from hobbit_jax.cells.sweep import run_cell
from hobbit_jax.cells.workbench import Workbench
from hobbit_jax.launch.driver import drive
from hobbit_jax.launch.on_local import LocalLauncher

TESTS = Path(__file__).resolve().parent
_started: list[subprocess.Popen] = []


def run_sweep(cells, description, workdir: Path) -> tuple[int, int, int]:
    """`drive` with one local worker, which is as strict about dtypes as conftest makes tests."""
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    with mock.patch.dict(os.environ, strict):
        return drive(cells, description, workdir, LocalLauncher, 1)


def environment(workdir: Path, pause_s: float = 0) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "CELL_LOG": str(workdir.with_suffix(".log")),
        "CELL_PAUSE_S": str(pause_s),
        "TQDM_DISABLE": "1",
    }


def driver(
    launcher: str,
    workdir: Path,
    cells: int,
    workers: int,
    *options: str,
    pause_s: float = 0,
    more: Mapping[str, str] = {},
) -> subprocess.Popen:
    """A driver process; its output is in `<workdir>.out`, `more` goes into its environment."""
    with workdir.with_suffix(".out").open("a") as out:
        process = subprocess.Popen(
            [
                sys.executable, str(TESTS / "cluster_cells.py"), launcher, str(workdir), str(cells),
                str(workers), *options,
            ],
            stdout=out, stderr=subprocess.STDOUT, env={**environment(workdir, pause_s), **more},
        )  # fmt: skip
    _started.append(process)
    return process


def end_drivers() -> None:
    """Kills what a failed test has left."""
    for process in _started:
        process.kill()
        process.wait()
    _started.clear()


def output(workdir: Path) -> str:
    return workdir.with_suffix(".out").read_text()


def finish(process: subprocess.Popen, workdir: Path, timeout_s: float = 420) -> None:
    assert process.wait(timeout_s) == 0, output(workdir)[-3000:]


def worker_pids(mark: str, workdir: Path) -> list[int]:
    """Worker processes of a working directory: `mark` is in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in command and f"CELL_LOG={workdir}.log\0".encode() in variables:
            found.append(int(path.name))
    return found


def wait_for(condition, process: subprocess.Popen, workdir: Path, timeout_s: float = 420) -> None:
    """Waits while `process` lives; fails with its output."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, output(workdir)[-3000:]
        assert time.monotonic() < deadline, output(workdir)[-3000:]
        time.sleep(0.1)


def rows_written(workdir: Path) -> int:
    return len(list((workdir / "rows").glob("*.json")))


class Killer(threading.Thread):
    """Kills a random one of `find()` every `period_s` or so, until it is stopped.

    But not before two rows were written since the last time, or on a slow machine all workers
    would die before they have begun.
    """

    def __init__(self, find, workdir: Path, period_s: float):
        super().__init__(daemon=True)
        self.find, self.workdir, self.period_s = find, workdir, period_s
        self.killed, self.over, self.random = 0, threading.Event(), random.Random(0)
        self.start()

    def run(self):
        rows = 0
        while not self.over.wait(self.period_s * self.random.uniform(0.5, 1.5)):
            if rows_written(self.workdir) < rows + 2:
                continue
            rows, pids = rows_written(self.workdir), self.find()
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(pids), signal.SIGKILL)
                    self.killed += 1

    def stop(self) -> int:
        """How many it killed."""
        self.over.set()
        self.join()
        return self.killed


def serial_rows(workdir: Path, count: int, monkeypatch) -> dict[str, dict]:
    """What one process without launcher, kills or parts of others makes of the cells."""
    aside = workdir.with_name("serial")
    monkeypatch.setenv("CELL_LOG", str(aside.with_suffix(".log")))
    made = cluster_cells.cells(workdir, count)
    leases = Leases(aside, "serial")
    bench = Workbench(made[0].inputs, made[0].sizes, aside, leases)
    rows = {cell.name: run_cell(cell, bench) for cell in made}
    leases.close()
    return rows


def check_rows(workdir: Path, expected: dict[str, dict]) -> None:
    """One row a cell, each as in a serial run, and nothing else left behind."""
    found = sorted(path.name for path in (workdir / "rows").iterdir())
    assert found == sorted(f"{name}.json" for name in expected)
    for name, row in expected.items():
        written = json.loads((workdir / "rows" / f"{name}.json").read_text())
        assert written.keys() == row.keys()
        for key in row.keys() - {"provenance"}:
            assert written[key] == json.loads(json.dumps(row[key])), (name, key)
    assert not cluster_cells.notes(workdir, "overlap")
    assert not list(workdir.rglob(atomic.PARTIAL_GLOB))
    assert not list((workdir / "leases").iterdir())
    assert not (workdir / "parts").exists()
