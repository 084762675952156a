"""Sweeps under a real Slurm and a real Ray on this machine, which are killed at and preempted."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cluster_cells
import pytest
from launch_harness import (
    Killer,
    check_rows,
    driver,
    environment,
    finish,
    output,
    rows_written,
    serial_rows,
    wait_for,
    worker_pids,
)
from slurm_cluster import SlurmCluster, missing

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parent.parent
SLURM_WORKER, RAY_WORKER = "submitit.core._submit", "ray::_work"
# The driver's patience is for real clusters; here the controller is ours.
SLURM_OPTIONS = ("--poll_s=0.3", "--ask_s=1", "partition=low", "cpus_per_task=1", "time=10")
RAY_OPTIONS = ("--poll_s=0.2",)
NO_NEWS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running Slurm of four CPUs."""
    lacking = missing() + [n for n in ("submitit",) if importlib.util.find_spec(n) is None]
    if lacking:
        pytest.skip(
            f"no {', '.join(lacking)}: apt-get install slurm-wlm munge; "
            "pip install -c constraints.txt -e '.[slurm]'"
        )
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def ray_installed():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("no ray: pip install -c constraints.txt -e '.[ray]'")


def slurm_driver(slurm, workdir, cells, workers, *options, pause_s=0.0):
    more = slurm.environment()
    keep = {name: more[name] for name in ("SLURM_CONF", "PATH")}
    options = (*SLURM_OPTIONS, *options)
    return driver("slurm", workdir, cells, workers, *options, pause_s=pause_s, more=keep)


def test_slurm_jobs_are_killed_requeued_and_cancelled(slurm, workdir, monkeypatch):
    """So is the driver; then one under Slurm and a local one finish the rest together."""
    expected = serial_rows(workdir, 24, monkeypatch)
    first = slurm_driver(slurm, workdir, 24, 3, pause_s=0.15)
    draw, done = random.Random(0), Counter()

    def harm() -> list[int]:
        """Worker processes to kill; or does something else to a job, and kills none."""
        how = draw.choice(["kill", "requeue", "cancel", "preempt"])
        jobs = slurm.jobs()
        if how == "kill" or not jobs:
            return worker_pids(SLURM_WORKER, workdir)
        command = {
            "requeue": ("scontrol", "requeue"),
            "cancel": ("scancel",),
            "preempt": ("scancel", "--signal=USR2"),  # as submitit is told of preemption
        }[how]
        done[how] += slurm.run(*command, draw.choice(jobs)).returncode == 0
        return []

    killer = Killer(harm, workdir, 2.5)
    try:
        wait_for(lambda: rows_written(workdir) >= 8, first, workdir)
        first.kill()  # its jobs go on without it
        first.wait()
        second = slurm_driver(slurm, workdir, 24, 2, pause_s=0.15)
        beside = driver("local", workdir, 24, 1, pause_s=0.15)
        finish(second, workdir)
        finish(beside, workdir)
    finally:
        done["kill"] = killer.stop()
    assert sum(done.values()) >= 1, done  # a fast machine is done before there are many
    slurm.run("scancel", *slurm.jobs("all"))
    check_rows(workdir, expected)


def test_slurm_preempts_and_a_cell_goes_on_inside(slurm, workdir, monkeypatch):
    """A job of higher priority takes the machine in the middle of a cell's second part."""
    expected = serial_rows(workdir, 1, monkeypatch)
    process = slurm_driver(slurm, workdir, 1, 1, pause_s=4)

    def parts() -> Counter:
        return Counter(line[3] for line in cluster_cells.notes(workdir, "part"))

    wait_for(lambda: parts()["1"] == 1, process, workdir)
    made = slurm.run("sbatch", "-p", "high", "-n4", "--output=/dev/null", "--wrap=sleep 3")
    assert made.returncode == 0, made.stderr
    finish(process, workdir)
    # The part under way was lost, or, in the moments that Slurm grants, the one after it.
    assert parts()["0"] == 1 and sum(parts().values()) == 4, parts()
    assert "cells: 1 0 0" in output(workdir)
    check_rows(workdir, expected)


def test_slurm_time_runs_out_and_a_cell_goes_on_inside(slurm, workdir, monkeypatch):
    """A cell of 36 s at least, in jobs that are warned within their first half minute."""
    expected = serial_rows(workdir, 1, monkeypatch)
    process = slurm_driver(slurm, workdir, 1, 1, "time=1", "signal_delay_s=30", pause_s=12)
    finish(process, workdir)
    runs = len(cluster_cells.notes(workdir, "run"))
    parts = Counter(line[3] for line in cluster_cells.notes(workdir, "part"))
    # Each time-out costs the part that was under way, and no other.
    assert runs >= 2 and sum(parts.values()) == 3 + runs - 1, (runs, parts)
    check_rows(workdir, expected)


def test_slurm_cell_of_two_processes(slurm, workdir):
    """They share one `jax.distributed`; one row comes of it."""
    finish(slurm_driver(slurm, workdir, 1, 1, "--kind=processes", "ntasks_per_node=2"), workdir)
    (row,) = [json.loads(path.read_text()) for path in (workdir / "rows").iterdir()]
    assert row["status"] == "ok" and row["sum"] == 3.0
    ranks = sorted(line[2:] for line in cluster_cells.notes(workdir, "rank"))
    assert ranks == [["0", "of", "2"], ["1", "of", "2"]]
    other = workdir.with_name("local")
    process = driver("local", other, 1, 1, "--kind=processes")
    assert process.wait(120) and "--launcher=slurm runs those" in output(other)


def test_ray_workers_are_killed(ray_installed, workdir, monkeypatch):
    """So is the driver, with all of its Ray; a second goes on. A worker loads its model once."""
    expected = serial_rows(workdir, 24, monkeypatch)
    first = driver("ray", workdir, 24, 2, *RAY_OPTIONS, pause_s=0.15, more=NO_NEWS)
    killer = Killer(lambda: worker_pids(RAY_WORKER, workdir), workdir, 2.5)
    try:
        wait_for(lambda: rows_written(workdir) >= 8, first, workdir)
        first.kill()
        first.wait()
        finish(driver("ray", workdir, 24, 2, *RAY_OPTIONS, pause_s=0.15, more=NO_NEWS), workdir)
    finally:
        killed = killer.stop()
    assert killed >= 2
    check_rows(workdir, expected)
    runs = cluster_cells.notes(workdir, "run")
    assert len({(pid, bench) for pid, _, _, bench in runs}) == len({pid for pid, *_ in runs})
    assert len({pid for pid, *_ in runs}) < len(runs)


SMOKE = (
    "--config.eval.windows=2", "--config.eval.context=16", "--config.eval.calibration_windows=2",
    "--config.eval.task_problems=0", "--config.eval.decode_prompt_tokens=4",
    "--config.eval.decode_tokens=4", "--config.eval.decode_repeats=1",
    "--config.cache.budget_mib=2", "--config.precision.signals=frequency",
)  # fmt: skip


def sweep(workdir: Path, *arguments: str, more=()) -> subprocess.CompletedProcess:
    tiny = cluster_cells.inputs(workdir)
    # What one launcher's workers have compiled, the next one's need not.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [
            sys.executable, str(REPOSITORY / "scripts/sweep.py"),
            f"--config={REPOSITORY}/configs/reference.py:demo", *SMOKE,
            f"--config.model={tiny.model}", f"--workdir={workdir}", *arguments,
        ],
        capture_output=True, text=True, timeout=420,
        env={**environment(workdir), **NO_NEWS, **cache, **dict(more)},
    )  # fmt: skip


def test_the_true_sweep_by_every_launcher(slurm, ray_installed, workdir):
    """The rows of all three are the same, but for timings."""
    kept = {name: slurm.environment()[name] for name in ("SLURM_CONF", "PATH")}
    found = {}
    for launcher, arguments in {
        "local": ("--workers=1",),
        "slurm": ("--launcher=slurm", "--workers=2", "--resources=partition=low,time=10"),
        "ray": ("--launcher=ray", "--workers=2"),
    }.items():
        here = workdir.with_name(launcher)
        done = sweep(here, *arguments, more=kept)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "4 cells done, 0 failed, 0 were finished before" in done.stdout
        rows = {p.name: json.loads(p.read_text()) for p in (here / "rows").iterdir()}
        for row in rows.values():
            assert row.pop("provenance")["seconds"] > 0
            for timing in ("tokens_per_second", "repeat_seconds", "first_token_s"):
                del row["decode"][timing]
        found[launcher] = rows
    assert found["local"] == found["slurm"] == found["ray"] and len(found["ray"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--launcher=ray", "--resources=unicorn=2"), "no node of the Ray cluster has"),
        (("--launcher=ray", "--resources=CPU=many"), "resource CPU=many; Ray wants a number"),
        (("--launcher=slurm", "--resources=colour=red"), "Unavailable parameter(s): ['colour']"),
    ],
)
def test_what_no_cluster_has_is_said_at_once(slurm, ray_installed, workdir, arguments, message):
    kept = {name: slurm.environment()[name] for name in ("SLURM_CONF", "PATH")}
    done = sweep(workdir, *arguments, more=kept)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert not rows_written(workdir)


def test_a_launcher_that_is_not_installed_says_how(workdir):
    hide = workdir.parent / "hide"
    for name in ("submitit", "ray"):
        (hide / name).mkdir(parents=True)
        (hide / name / "__init__.py").write_text(
            f"raise ModuleNotFoundError('No module named {name}')"
        )
    for launcher, extra in (("slurm", "slurm"), ("ray", "ray")):
        path = f"{hide}:{environment(workdir)['PYTHONPATH']}:{os.environ.get('PYTHONPATH', '')}"
        done = sweep(workdir, f"--launcher={launcher}", more={"PYTHONPATH": path})
        assert done.returncode == 2
        assert f"pip install -c constraints.txt -e '.[{extra}]'" in done.stderr.splitlines()[-1]
