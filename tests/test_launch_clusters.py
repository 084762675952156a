"""Sweeps under a real Slurm and a real Ray on this machine, which are killed and preempted."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import digest_trials
import pytest
from launch_harness import (
    check_rows,
    environment,
    finish,
    kill_one,
    output,
    rows_written,
    serial_rows,
    start_sweep,
    survive,
    wait_for,
)
from slurm_cluster import SlurmCluster, missing

from hobbit_jax.record import Record, read_records

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parent.parent
SLURM_WORKER, RAY_WORKER = "submitit.core._submit", "ray::run_task"
# In a job of ten minutes submitit takes every warning for one that the time runs out.
SLURM_OPTIONS = ("--ask_s=2", "partition=low", "cpus_per_task=1", "time=10")
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",  # as much of a busy machine as Slurm's jobs
}


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


def found_by(slurm) -> dict[str, str]:
    return {name: slurm.environment()[name] for name in ("SLURM_CONF", "PATH")}


def start_slurm(slurm, workdir, trials, workers, *words, pause_s):
    more = found_by(slurm)
    words = (*SLURM_OPTIONS, *words)
    return start_sweep("slurm", workdir, trials, workers, *words, pause_s=pause_s, more=more)


def test_slurm_200_trials_under_fire(slurm, workdir, monkeypatch):
    """Workers are killed, jobs requeued, cancelled and warned; sweeps are killed too."""
    expected = serial_rows(workdir, 200, monkeypatch)

    def harm(draw) -> str | None:
        how = draw.choice(["kill", "requeue", "cancel", "warn"])
        jobs = slurm.jobs()
        if how == "kill" or not jobs:
            return kill_one(SLURM_WORKER, workdir, draw)
        command = {
            "requeue": ("scontrol", "requeue"),
            "cancel": ("scancel",),
            "warn": ("scancel", "--signal=USR2"),  # as before preemption and the end of its time
        }[how]
        return how if slurm.run(*command, draw.choice(jobs)).returncode == 0 else None

    done = survive(workdir, harm, lambda: start_slurm(slurm, workdir, 200, 2, pause_s=0.2), 200)
    slurm.run("scancel", *slurm.jobs("all"))  # of the killed sweeps; whoever was at a trial is done
    # How many there were in time depends on the machine: a quick one writes records meanwhile.
    assert done
    check_rows(workdir, expected)


def test_slurm_preempts_and_a_trial_goes_on_inside(slurm, workdir, monkeypatch):
    """A job of higher priority takes the machine in the middle of a trial's second part."""
    expected = serial_rows(workdir, 1, monkeypatch)
    process = start_slurm(slurm, workdir, 1, 1, pause_s=4)

    def parts() -> Counter:
        return Counter(line[3] for line in digest_trials.notes(workdir, "part"))

    wait_for(lambda: parts()["1"] == 1, process, workdir)
    made = slurm.run("sbatch", "-p", "high", "-n4", "--output=/dev/null", "--wrap=sleep 3")
    assert made.returncode == 0, made.stderr
    finish(process, workdir)
    # The part under way was lost, or, in the moments that Slurm grants, the one after it.
    assert parts()["0"] == 1 and sum(parts().values()) == 4, parts()
    assert "trials: 1 0 0" in output(workdir)
    check_rows(workdir, expected)


def test_ray_200_trials_under_fire(ray_installed, workdir, monkeypatch):
    """Workers are killed, and sweeps with all of their Ray. A process loads its model once."""
    expected = serial_rows(workdir, 200, monkeypatch)
    done = survive(
        workdir,
        lambda draw: kill_one(RAY_WORKER, workdir, draw),
        lambda: start_sweep("ray", workdir, 200, 2, pause_s=0.05, more=RAY_ENVIRONMENT),
        200,
        excuse="Ray does not start here",  # within its own 30 s, on a busy machine
    )
    assert len(done) >= 6, done
    check_rows(workdir, expected)
    runs = digest_trials.notes(workdir, "run")
    assert len({(pid, bench) for pid, _, _, bench in runs}) == len({pid for pid, *_ in runs})
    assert 2 * len({pid for pid, *_ in runs}) < len(runs)
    assert {line[2] for line in digest_trials.notes(workdir, "threads")} == {"1"}


SMOKE = (
    "--config.eval.windows=2", "--config.eval.context=16", "--config.eval.calibration_windows=2",
    "--config.eval.task_problems=0", "--config.eval.decode_prompt_tokens=4",
    "--config.eval.decode_tokens=4", "--config.eval.decode_repeats=1",
    "--config.cache.budget_mib=2", "--config.precision.scores=frequency",
)  # fmt: skip


def sweep(workdir: Path, *arguments: str, more=()) -> subprocess.CompletedProcess:
    tiny = digest_trials.inputs(workdir)
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
        capture_output=True, text=True, timeout=600,
        env={**environment(workdir), **RAY_ENVIRONMENT, **cache, **dict(more)},
    )  # fmt: skip


def untimed(record: Record) -> Record:
    """Without what depends on the machine's speed."""
    timed = re.compile("tokens_per_s|_s_per_token|first_token_s|repeat_s")
    kept = {name: value for name, value in record.metrics.items() if not timed.search(name)}
    samples = {name: value for name, value in record.samples.items() if not timed.search(name)}
    return replace(record, metrics=kept, samples=samples, seconds=None)


def test_the_true_sweep_by_every_launcher(slurm, ray_installed, workdir):
    """The rows of all three are the same, but for timings."""
    found = {}
    for launcher, arguments in {
        "local": ("--workers=1",),
        "slurm": ("--launcher=slurm", "--workers=2", "--resources=partition=low,time=10"),
        "ray": ("--launcher=ray", "--workers=2"),
    }.items():
        here = workdir.with_name(launcher)
        done = sweep(here, *arguments, more=found_by(slurm))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "4 trials done, 0 failed, 0 were finished before" in done.stdout
        records = read_records(here)
        assert not records.unreadable and all(record.seconds > 0 for record in records.found)
        found[launcher] = [untimed(record) for record in records.found]
    assert found["local"] == found["slurm"] == found["ray"] and len(found["ray"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--launcher=ray", "--resources=unicorn=2"), "no node of the Ray cluster has"),
        (("--launcher=ray", "--resources=CPU=many"), "resource CPU=many; Ray wants a number"),
        (("--launcher=slurm", "--resources=colour=red"), "Unavailable parameter(s): ['colour']"),
        (("--launcher=slurm", "--resources=partition=no"), "Invalid partition"),
    ],
)
def test_what_no_cluster_has_is_said_at_once(slurm, ray_installed, workdir, arguments, message):
    done = sweep(workdir, *arguments, more=found_by(slurm))
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
