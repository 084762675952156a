"""Launchers: every cell gets one whole, right row, whoever is killed, preempted or doubled.

Here: leases and the local launcher. Slurm and Ray, which start daemons, are in
test_launch_clusters.py.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cluster_cells
import pytest

from hobbit_jax import atomic
from hobbit_jax.launch import connect, parse_resources
from hobbit_jax.launch.local import visible_gpus
from hobbit_jax.leases import Leases
from hobbit_jax.rows import RowStore
from hobbit_jax.sweep import run_cell
from hobbit_jax.workbench import Workbench

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def workdir(tmp_path, two_banks_path) -> Path:
    """A working directory to be made, beside the cells' inputs."""
    (tmp_path / "tiny.gguf").symlink_to(two_banks_path)
    (tmp_path / "text.txt").write_text("a text of some words " * 50)
    return tmp_path / "work"


def environment(workdir: Path, pause_s: float = 0) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "CELL_LOG": str(workdir.with_suffix(".log")),
        "CELL_PAUSE_S": str(pause_s),
        "TQDM_DISABLE": "1",
    }


def driver(launcher: str, workdir: Path, cells: int, workers: int, *options: str, pause_s=0.0):
    """A driver process; its output is in `<workdir>.out`."""
    with workdir.with_suffix(".out").open("a") as out:
        return subprocess.Popen(
            [
                sys.executable, str(TESTS / "cluster_cells.py"), launcher, str(workdir), str(cells),
                str(workers), *options,
            ],
            stdout=out, stderr=subprocess.STDOUT, env=environment(workdir, pause_s),
        )  # fmt: skip


def output(workdir: Path) -> str:
    return workdir.with_suffix(".out").read_text()


def finish(process: subprocess.Popen, workdir: Path, timeout_s: float = 240) -> None:
    try:
        assert process.wait(timeout_s) == 0, output(workdir)[-3000:]
    finally:
        process.kill()


def worker_pids(mark: str, workdir: Path) -> list[int]:
    """Worker processes of a working directory, by their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if mark.encode() in command and str(workdir).encode() in command:
            found.append(int(path.parent.name))
    return found


class Killer(threading.Thread):
    """Kills a random one of `find()` every `period_s` or so, until it is stopped."""

    def __init__(self, find, period_s: float):
        super().__init__(daemon=True)
        self.find, self.period_s, self.killed, self.over = find, period_s, 0, threading.Event()
        self.random = random.Random(0)
        self.start()

    def run(self):
        while not self.over.wait(self.period_s * self.random.uniform(0.5, 1.5)):
            pids = self.find()
            if pids:
                try:
                    os.kill(self.random.choice(pids), signal.SIGKILL)
                    self.killed += 1
                except ProcessLookupError:
                    pass

    def stop(self) -> int:
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


def test_one_claim_of_many_succeeds(tmp_path):
    """Eight threads as eight owners claim, and end, the same names over and over."""
    holders, clashes, taken = {}, [], []

    def claim(owner: str):
        leases, draw = Leases(tmp_path, owner), random.Random(owner)
        for _ in range(60):
            lease = leases.claim([draw.choice("abc")])
            if lease is None:
                continue
            if holders.setdefault(lease.name, owner) != owner:
                clashes.append(lease)
            taken.append(lease)
            time.sleep(0.001)
            del holders[lease.name]
            if draw.random() < 0.5:
                leases.end(lease)
            else:
                leases.finish(lease)
        leases.close()

    threads = [threading.Thread(target=claim, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes and len(taken) > 50


def test_a_lease_lives_while_its_owner_does(tmp_path):
    alive, other = Leases(tmp_path, "alive", 0.6), Leases(tmp_path, "other", 0.6)
    held = alive.claim(["cell"])
    assert held is not None and other.holders() == {"cell": "alive"}
    time.sleep(1.2)
    assert other.claim(["cell"]) is None
    assert other.claim(["cell", "next"]).name == "next"
    alive.close()  # its heart stops, as a killed process's does
    time.sleep(0.8)
    taken = other.claim(["cell"])
    assert (taken.generation, taken.deaths) == (1, 1) and "alive fell silent" in taken.reason
    # The first owner wakes up: it can neither end nor finish what is another's now.
    alive.end(held, "late", counts=True)
    alive.finish(held)
    assert other.holders()["cell"] == "other" and alive.claim(["cell"]) is None
    other.close()


def test_deaths_count_until_something_is_stored(tmp_path):
    def die(advance: bool, counts: bool = True):
        leases = Leases(tmp_path, "o")
        lease = leases.claim(["cell"])
        if advance:
            leases.advance()
        leases.close()
        assert Leases(tmp_path, "driver").bury("o", "killed", counts) == 1
        return lease.deaths, lease.reason

    assert [die(False), die(False), die(True), die(False), die(False, False), die(False)] == [
        (0, ""), (1, "killed"), (2, "killed"), (0, "killed"), (1, "killed"), (1, "killed"),
    ]  # fmt: skip


def test_the_first_whole_row_stays(tmp_path):
    rows = RowStore(tmp_path)
    rows.create()
    for first, second, kept in [("failed", "ok", 2), ("ok", "ok", 1), ("ok", "failed", 1)]:
        cell = f"{first}-{second}"
        rows.write({"cell": cell, "status": first, "by": 1})
        rows.write({"cell": cell, "status": second, "by": 2})
        assert rows.read(cell)["by"] == kept
    rows.path("torn").write_text('{"cell": "to')
    rows.write({"cell": "torn", "status": "ok"})
    assert rows.finished("torn") and not list(rows.directory.glob(".*"))


def test_temporary_names_differ_between_machines(tmp_path, monkeypatch):
    """Two machines may have the same process id, and write the same tier at the same time."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "tier"
    with atomic.replacing(path) as one, atomic.replacing(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_resources_are_read():
    read = parse_resources(["partition=gpu", "time=240", "mem=1.5", "exclusive=true"])
    assert read == {"partition": "gpu", "time": 240, "mem": 1.5, "exclusive": True}
    with pytest.raises(ValueError, match="'gpu'; want NAME=VALUE"):
        parse_resources(["gpu"])
    with pytest.raises(ValueError, match="takes no resources"):
        connect("local", ["GPU=1"])
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2", "5"]
    assert not visible_gpus({"CUDA_VISIBLE_DEVICES": ""})
    assert not visible_gpus({"CUDA_VISIBLE_DEVICES": "2,5", "JAX_PLATFORMS": "cpu"})


@pytest.mark.cluster
def test_200_cells_whose_workers_are_killed(workdir, monkeypatch):
    """Workers die every second or two; after a while the driver does too, and a second takes over
    while a third works beside it."""
    expected = serial_rows(workdir, 200, monkeypatch)
    first = driver("local", workdir, 200, 2, pause_s=0.1)
    killer = Killer(lambda: worker_pids("hobbit_jax.launch.worker", workdir), 2.0)
    rows = workdir / "rows"
    while not rows.exists() or len(list(rows.glob("*.json"))) < 60:
        assert first.poll() is None, output(workdir)[-3000:]
        time.sleep(0.1)
    first.kill()
    first.wait()
    beside = [driver("local", workdir, 200, 1, pause_s=0.1) for _ in range(2)]
    for process in beside:
        finish(process, workdir)
    assert killer.stop() >= 10
    check_rows(workdir, expected)


def test_a_cell_that_kills_its_worker(workdir, monkeypatch):
    """It is tried as often as was said, and the other cells are finished; a rerun tries it again."""
    for deaths in (2, 1):
        finish(driver("local", workdir, 3, 1, "--kind=crash", f"--max_deaths={deaths}"), workdir)
        row = RowStore(workdir).read("crash-999")
        assert row["status"] == "failed" and f"its worker died {deaths} times" in row["error"]
        assert "killed by SIGKILL" in row["error"]
    assert [line[2] for line in cluster_cells.notes(workdir, "run")].count("crash-999") == 3
    assert "cells: 4 0 1" in output(workdir) and "cells: 1 3 1" in output(workdir)
    expected = serial_rows(workdir, 3, monkeypatch)
    (workdir / "rows" / "crash-999.json").unlink()
    check_rows(workdir, expected)


def test_ctrl_c_stops_the_children(workdir):
    process = driver("local", workdir, 0, 1, "--kind=stuck")
    deadline = time.monotonic() + 120
    while not workdir.with_suffix(".log").exists():
        assert process.poll() is None and time.monotonic() < deadline, output(workdir)[-3000:]
        time.sleep(0.05)
    assert len(worker_pids("hobbit_jax.launch.worker", workdir)) == 1
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert time.monotonic() - began < 10
    assert not worker_pids("hobbit_jax.launch.worker", workdir)
    assert "stopped: 0 of 1 cells have rows; the same command goes on" in output(workdir)
    assert Leases(workdir, "next").claim(["stuck-999"]).deaths == 0  # free at once, and not blamed
