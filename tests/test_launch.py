"""Launchers: every cell gets one whole, right row, whoever is killed, preempted or doubled.

Here: leases and the local launcher. Slurm and Ray, which start daemons, are in
test_launch_clusters.py.
"""

import os
import random
import signal
import threading
import time

import cluster_cells
import pytest
from hobbit_jax.rows import RowStore
from launch_harness import (
    Killer,
    check_rows,
    driver,
    finish,
    output,
    rows_written,
    serial_rows,
    wait_for,
    worker_pids,
)

from hobbit_jax import atomic
from hobbit_jax.cells.leases import Leases
from hobbit_jax.launch import connect, parse_resources
from hobbit_jax.launch.on_local import visible_gpus

LOCAL_WORKER = "hobbit_jax.launch.worker"


def test_each_thing_is_made_once_by_many(tmp_path):
    """Eight owners at sixty things; half of the tries are given up and taken over by others."""
    names = [f"{n // 10}.{n % 10}" for n in range(60)]
    made, at_work, clashes = [], [], []

    def work(owner: str):
        leases, draw = Leases(tmp_path, owner), random.Random(owner)
        while len(made) < len(names):
            lease = leases.claim(draw.sample(names, 8))
            if lease is None:
                continue
            if lease.name not in made:
                clashes.extend(name for name in at_work if name == lease.name)
                at_work.append(lease.name)
                time.sleep(0.001)
                at_work.remove(lease.name)
                if draw.random() < 0.5:
                    leases.end(lease)
                    continue
                made.append(lease.name)
            leases.finish(lease)
        leases.close()

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(names) and not clashes


def test_a_lease_lives_while_its_owner_does(tmp_path):
    stale_s = 6.0
    alive, other = Leases(tmp_path, "alive", stale_s), Leases(tmp_path, "other", stale_s)
    held = alive.claim(["cell"])
    assert held is not None and other.holders() == {"cell": "alive"}
    file = tmp_path / "leases" / "cell.0"

    def age():
        """As if the lease had not been touched for longer than it may be."""
        os.utime(file, times=(file.stat().st_mtime - 2 * stale_s,) * 2)
        return file.stat().st_mtime

    aged, deadline = age(), time.monotonic() + 60
    while file.stat().st_mtime == aged:  # until its heart beats
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert other.claim(["cell"]) is None
    assert other.claim(["cell", "next"]).name == "next"
    alive.close()  # its heart stops, as a killed process's does
    age()
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
    """One every few seconds; after a while the driver too, and then two go on together."""
    expected = serial_rows(workdir, 200, monkeypatch)
    first = driver("local", workdir, 200, 2, pause_s=0.1)
    killer = Killer(lambda: worker_pids(LOCAL_WORKER, workdir), workdir, 3.0)
    wait_for(lambda: rows_written(workdir) >= 60, first, workdir)
    first.kill()
    first.wait()
    beside = [driver("local", workdir, 200, 1, pause_s=0.1) for _ in range(2)]
    for process in beside:
        finish(process, workdir)
    assert killer.stop() >= 8
    check_rows(workdir, expected)


def test_a_cell_that_kills_its_worker(workdir, monkeypatch):
    """It is tried as often as was said, the others are finished, and a rerun tries it again."""
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
    wait_for(workdir.with_suffix(".log").exists, process, workdir)
    assert len(worker_pids(LOCAL_WORKER, workdir)) == 1
    process.send_signal(signal.SIGINT)
    process.wait(30)  # the cell would sleep on
    assert not worker_pids(LOCAL_WORKER, workdir)
    assert "stopped: 0 of 1 cells have rows; the same command goes on" in output(workdir)
    assert Leases(workdir, "next").claim(["stuck-999"]).deaths == 0  # free at once, and not blamed
