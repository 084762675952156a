"""What the launchers' tests share: processes that run a sweep, a killer, and what must be left."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import digest_trials

from hobbit_jax.launch import on_local, sweeping
from hobbit_jax.record import Record, read_records
from hobbit_jax.record.files import DESCRIPTION, FOLDER
from hobbit_jax.sweep.artifact_cache import ArtifactCache
from hobbit_jax.sweep.trial import run_trial

TESTS = Path(__file__).resolve().parent
_started: list[subprocess.Popen] = []


def run_sweep(trials, description, workdir: Path) -> tuple[int, int, int]:
    """A sweep in one process, which is as strict about dtypes as conftest makes tests."""
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    with mock.patch.dict(os.environ, strict):
        return sweeping.run_sweep(trials, description, workdir, on_local.run, 1)


def environment(workdir: Path, pause_s: float = 0) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "TRIAL_LOG": str(workdir.with_suffix(".log")),
        "TRIAL_PAUSE_S": str(pause_s),
        "TQDM_DISABLE": "1",
    }


def start_sweep(
    launcher: str, workdir: Path, trials: int, workers: int, *words: str,
    pause_s: float = 0, more: Mapping[str, str] = {},
) -> subprocess.Popen:  # fmt: skip
    """A process of digest_trials.py; its output is in `<workdir>.out`."""
    with workdir.with_suffix(".out").open("a") as out:
        process = subprocess.Popen(
            [
                sys.executable, str(TESTS / "digest_trials.py"), launcher, str(workdir),
                str(trials), str(workers), *words,
            ],
            stdout=out, stderr=subprocess.STDOUT, env={**environment(workdir, pause_s), **more},
        )  # fmt: skip
    _started.append(process)
    return process


def end_sweeps() -> None:
    """Kills what a failed test has left."""
    for process in _started:
        process.kill()
        process.wait()
    _started.clear()


def output(workdir: Path) -> str:
    return workdir.with_suffix(".out").read_text()


def finish(process: subprocess.Popen, workdir: Path) -> None:
    status = process.wait(600)
    assert status == 0, f"status {status}: {output(workdir)[-3000:]}"


def worker_pids(mark: str, workdir: Path) -> list[int]:
    """Worker processes of a working directory: `mark` is in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
            if mark.encode() in command and f"TRIAL_LOG={workdir}.log\0".encode() in variables:
                found.append(int(path.name))
    return found


def wait_for(condition, process: subprocess.Popen, workdir: Path) -> None:
    """Waits while `process` lives; fails with its output."""
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, output(workdir)[-3000:]
        assert time.monotonic() < deadline, output(workdir)[-3000:]
        time.sleep(0.1)


def rows_written(workdir: Path) -> int:
    return len(record_files(workdir))


def record_files(workdir: Path) -> list[Path]:
    """Files of one record each."""
    found = (workdir / FOLDER).glob("*.json")
    return sorted(path for path in found if not path.name.endswith(DESCRIPTION))


class Killer(threading.Thread):
    """Harms by `harm(draw)`, which says how, after every few records until it is stopped.

    Not by the clock: on a slow machine all workers would die before they have begun.
    """

    def __init__(self, harm: Callable[[random.Random], str | None], workdir: Path):
        super().__init__(daemon=True)
        self.harm, self.workdir = harm, workdir
        self.done: list[str] = []
        self.over = threading.Event()
        self.start()

    def run(self):
        draw = random.Random(0)
        rows = 0
        while not self.over.wait(draw.uniform(0.2, 1)):
            if rows_written(self.workdir) >= rows + 5:
                rows = rows_written(self.workdir)
                self.done += filter(None, [self.harm(draw)])


def kill_one(mark: str, workdir: Path, draw: random.Random) -> str | None:
    """Kills a worker."""
    pids = worker_pids(mark, workdir)
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(draw.choice(pids), signal.SIGKILL)
        return "kill"
    return None


def survive(
    workdir: Path, harm, start: Callable[[], subprocess.Popen], count: int, excuse: str = "\0"
) -> list[str]:
    """Runs sweeps until one is finished; kills the others, and harms workers by `harm`.

    In the end two share the folder; one that ends with `excuse` is started once more. Returns what
    was done to workers.
    """
    killer = Killer(harm, workdir)
    try:
        for share in (0.3, 0.6):
            process = start()
            wait_for(lambda share=share: rows_written(workdir) >= share * count, process, workdir)
            process.kill()
            process.wait()
        for process in [start(), start()]:
            excused = process.wait(600) != 0 and excuse in output(workdir)
            finish(start() if excused else process, workdir)
    finally:
        killer.over.set()
        killer.join()
    return killer.done


def serial_rows(workdir: Path, count: int, monkeypatch) -> dict[str, Record]:
    """What one process without launcher, kills or parts of others makes of the trials."""
    aside = workdir.with_name("serial")
    monkeypatch.setenv("TRIAL_LOG", str(aside.with_suffix(".log")))
    made = digest_trials.trials(workdir, count)
    bench = ArtifactCache(made[0].inputs, made[0].sizes, aside)
    return {trial.name: run_trial(trial, bench) for trial in made}


def check_rows(workdir: Path, expected: dict[str, Record]) -> None:
    """One record a trial, each as in a serial run, and nothing else left behind."""
    records = read_records(workdir)
    assert not records.unreadable and rows_written(workdir) == len(expected)
    assert {record.name for record in records.found} == expected.keys()
    for record in records.found:
        assert record.seconds is not None and record.seconds >= 0
        # conftest.py gives the tests' own process several devices.
        alike = {"seconds": None, "device_count": None}
        assert replace(record, **alike) == replace(expected[record.name], **alike)
    hidden = [path for path in workdir.rglob(".*") if path.suffix in (".partial", ".lock")]
    assert not hidden and not (workdir / "parts").exists()
