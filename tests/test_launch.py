"""Launchers: every trial gets one whole, right record, whoever is killed, preempted or doubled.

Here: locks, the graph, and processes of this machine. Slurm and Ray, which start daemons, are in
test_launch_clusters.py.
"""

import itertools
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future

import digest_trials
import pytest
from launch_harness import (
    check_rows,
    environment,
    finish,
    kill_one,
    output,
    serial_rows,
    start_sweep,
    survive,
    wait_for,
    worker_pids,
)

from hobbit_jax import atomic
from hobbit_jax.launch import connect, parse_resources
from hobbit_jax.launch.on_local import visible_gpus
from hobbit_jax.launch.sweeping import Graph, map_tasks
from hobbit_jax.record import (
    Benchmark,
    CacheTrial,
    EvalSizes,
    Mixed,
    MixedInBytes,
    PerSelection,
    QualityTrial,
    Uniform,
    read_record,
    record_name,
    record_path,
)
from hobbit_jax.sweep.artifact_cache import ArtifactCache, all_artifacts
from hobbit_jax.sweep.trial import Trial
from pallas_kernels.ggml.ops import default_threads

LOCAL_WORKER = "multiprocessing.spawn"


def test_a_killed_holder_leaves_no_lock(tmp_path):
    path = tmp_path / "x[1]"
    hold = (
        "import sys, time; from pathlib import Path; from hobbit_jax.atomic import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print(flush=True); time.sleep(3600)"
    )
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(path)) as holder:
        holder.stdout.readline()
        with atomic.exclusive(path, wait=False) as held:
            assert not held
        holder.kill()
        with atomic.exclusive(path) as held:
            assert held
    assert not list(tmp_path.iterdir())


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


@pytest.mark.slow
def test_a_trial_names_all_artifacts_that_it_needs(workdir, monkeypatch):
    """Made in the graph's order, each from those before it; the trials then make no more."""
    (workdir.parent / "evaluation.txt").write_text("another text of some other words " * 50)
    monkeypatch.setenv("HOBBIT_CACHE_DIR", str(workdir))
    on = digest_trials.inputs(workdir), EvalSizes(2, 16, 2, 0, 4, 4, 1)
    trials = [
        Trial(CacheTrial(Mixed("sensitivity", 0.5, "Q2_K", "gptq"), 2, *on)),
        Trial(QualityTrial(Uniform("Q3_K", "gptq"), *on, seed=1)),
        Trial(QualityTrial(Uniform("Q2_K", "ggml", ("Q4_0",)), *on)),
        Trial(QualityTrial(MixedInBytes("random", 0.8, ("Q2_K",), score_text="tasks"), *on)),
        Trial(QualityTrial(PerSelection("router_weight", (0.5, 0.5), ("Q2_K",)), *on)),
    ]
    bench = ArtifactCache(*on, workdir)

    def made() -> set[str]:
        kept = [*workdir.glob("cache/*"), *workdir.glob("low_precision/*")]
        return {path.name for path in kept if not path.name.startswith(".")}

    graph, count = Graph(trials), 0
    for trial, later in itertools.pairwise(trials):
        needed = all_artifacts([trial])
        assert all(graph.rank[task] < graph.rank[later] for task in (trial, *needed))
    while ready := [task for task in graph.get_ready() if task not in trials]:
        before = made()
        for artifact in ready:
            artifact.make(bench)
        count += len(ready)
        assert len(made()) == count and made() > before
        graph.done(*ready)
    for trial in trials:
        trial.run(bench)
    assert len(made()) == count


def test_workers_that_never_start_end_the_sweep(workdir):
    class DeadPool:
        died, attempts, submitted = (OSError,), 3, 0

        def submit(self, *_):
            self.submitted += 1
            future = Future()
            future.set_exception(OSError("no such interpreter"))
            return future

        def stop(self):
            self.submitted = -self.submitted

    pool = DeadPool()
    graph = Graph(digest_trials.trials(workdir, 2))
    with pytest.raises(RuntimeError, match="workers end before they begin; last: no such interp"):
        list(map_tasks(pool, graph, workdir, 1))
    assert pool.submitted == -6


@pytest.mark.cluster
def test_200_trials_under_fire(workdir, monkeypatch):
    """A worker is killed every few records, and the sweep itself twice; then two go on together."""
    expected = serial_rows(workdir, 200, monkeypatch)
    done = survive(
        workdir,
        lambda draw: kill_one(LOCAL_WORKER, workdir, draw),
        lambda: start_sweep("local", workdir, 200, 2, pause_s=0.05),
        200,
    )
    assert done.count("kill") >= 8
    check_rows(workdir, expected)
    # The workers of a sweep share the processors.
    threads = {line[2] for line in digest_trials.notes(workdir, "threads")}
    assert threads == {str(max(1, default_threads() // 2))}


@pytest.mark.slow
def test_trials_that_fail_or_kill_their_process(workdir, monkeypatch):
    """They are recorded, the others are finished, and the same command tries them again."""
    for _ in range(2):
        options = ("--kinds=crash,fail", "--attempts=2")
        finish(start_sweep("local", workdir, 3, 1, *options), workdir)
        for name, error in (
            ("crash-999", "RuntimeError: its process died each time"),
            ("fail-999", "ValueError: this one fails"),
        ):
            record = read_record(workdir, record_name(Benchmark(name, {})))
            assert record.status == "failed" and record.error.startswith(error)
    runs = [line[2] for line in digest_trials.notes(workdir, "run")]
    assert (runs.count("crash-999"), runs.count("fail-999"), len(runs)) == (4, 2, 9)
    assert "trials: 5 0 2" in output(workdir) and "trials: 2 3 2" in output(workdir)
    for name in ("crash-999", "fail-999"):
        record_path(workdir, record_name(Benchmark(name, {}))).unlink()
    # What failed trials have measured, and others who may be at it, are left alone.
    shutil.rmtree(workdir / "parts")
    for lock in workdir.rglob(".*.lock"):
        lock.unlink()
    check_rows(workdir, serial_rows(workdir, 3, monkeypatch))


def test_ctrl_c_stops_the_processes(workdir):
    process = start_sweep("local", workdir, 0, 1, "--kinds=stuck")
    wait_for(workdir.with_suffix(".log").exists, process, workdir)
    assert len(worker_pids(LOCAL_WORKER, workdir)) == 1
    process.send_signal(signal.SIGINT)
    process.wait(60)  # the trial would sleep on
    assert not worker_pids(LOCAL_WORKER, workdir)
    assert "stopped: 0 of 1 trials have records; the same command goes on" in output(workdir)


def test_a_model_that_does_not_open_ends_the_sweep(workdir):
    (workdir.parent / "tiny.gguf").unlink()
    (workdir.parent / "tiny.gguf").write_text("no model")
    assert start_sweep("local", workdir, 3, 2).wait(600) == 1
    assert "ValueError" in output(workdir) and not list((workdir / "rows").glob("*.json"))
