"""Tasks as Slurm jobs, through submitit: one array for every stage of a sweep.

Owns how tasks are shared out over jobs, and what becomes of the tasks of a job that ends without
them. Stages (artifacts, artifacts made of those, trials) wait for each other in Slurm's own queue.
submitit queues a preempted job, and one whose time runs out, again under its own number.
"""

import functools
import math
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit  # pyright: ignore[reportMissingImports]
from submitit.core.utils import FailedJobError, pickle_load  # pyright: ignore[reportMissingImports]
from submitit.slurm.slurm import SlurmInfoWatcher  # pyright: ignore[reportMissingImports]

from hobbit_jax.launch import worker_environment
from hobbit_jax.launch.sweeping import Engine, Graph, Outcomes, death
from hobbit_jax.launch.tasks import MAX_ATTEMPTS, Outcome, Task, run_task
from hobbit_jax.record import is_finished
from hobbit_jax.sweep.artifact_cache import Artifact

# Minutes; submitit's own 5 would be short for a trial.
_DEFAULTS = {"time": 240, "job_name": "hobbit_jax"}
_UNLIMITED = 10**6  # time-outs: each brings the trials of a job forward by a part
# A job has several tasks where there are many, since each job waits and loads the model once; and
# every worker several jobs, so that all end at about the same time.
_JOBS_PER_WORKER = 4
_POLL_S = 2.0  # between looks for results


def connect(resources: Mapping[str, Any]) -> tuple[Engine, int]:
    """See `launch.connect`; resources are parameters of `submitit.SlurmExecutor`."""
    parameters = {**_DEFAULTS, **resources}
    try:
        submitit.SlurmExecutor("unused").update_parameters(**parameters)
    except RuntimeError as error:
        raise ValueError("--launcher=slurm finds no srun here; is this a Slurm cluster?") from error
    return functools.partial(run, parameters=parameters), 1


@dataclass
class TaskList:
    """What one job runs; submitit asks for a `checkpoint` when the job is to be queued again."""

    workdir: Path  # of the sweep
    tasks: Sequence[Task]  # in this order; those that another process is at come last
    given_up: dict[Task, str] = field(default_factory=dict)  # of tasks that kill their process, why

    def __call__(self) -> list[Outcome]:
        """Runs all tasks; returns their outcomes in the same order."""
        outcomes = dict.fromkeys(self.tasks, Outcome("busy"))
        for wait in (False, True):  # the second time, for what another process was at
            for task in self.tasks:
                if outcomes[task].status == "busy":
                    outcomes[task] = run_task(task, self.workdir, wait, self.given_up.get(task))
        return list(outcomes.values())

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same list: finished trials are passed over, a begun one goes on at its last part."""
        return submitit.helpers.DelayedSubmission(self)


class QueueWatcher(SlurmInfoWatcher):
    """Tells submitit's jobs their state by `squeue`: small clusters have no `sacct`."""

    def _make_command(self) -> list[str] | None:
        if not self._registered - self._finished:
            return None
        return ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i %T"]

    def read_info(self, string: str | bytes) -> dict[str, dict[str, str]]:
        """States by job; one that the queue has forgotten has ended."""
        text = string if isinstance(string, str) else string.decode()
        pairs = [line.split() for line in text.splitlines()]
        forgotten = dict.fromkeys(self._registered, "FORGOTTEN")
        states = forgotten | {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        return {job: {"State": state} for job, state in states.items()}


def run(
    graph: Graph, workdir: Path, workers: int, parameters: Mapping[str, Any], ask_s: int = 15
) -> Outcomes:
    """A `sweeping.Engine` of jobs with these parameters of `submitit.SlurmExecutor`.

    Every `ask_s` seconds `squeue` is called, which is all that the controller is asked.
    """
    submitit.SlurmJob.watcher = QueueWatcher(ask_s)
    jobs: dict[submitit.Job, TaskList] = {}
    deaths: Counter[Task] = Counter()
    given_up: dict[Task, str] = {}
    try:
        after: dict[str, str] = {}
        while graph.is_active():
            stage = graph.get_ready()
            graph.done(*stage)
            new = _submit(_share_out(stage, workdir, workers), workers, {**parameters, **after})
            after = {"dependency": "afterany:" + next(iter(new)).job_id.split("_")[0]}
            jobs |= new
        while jobs:
            time.sleep(_POLL_S)
            again = []
            for job in [job for job in jobs if job.done()]:
                tasks = jobs.pop(job)
                reason, outcomes = _end(job, tasks)
                yield from outcomes.items()
                left = [task for task in tasks.tasks if task not in outcomes]
                if left:
                    deaths[left[0]] += 1
                    if deaths[left[0]] >= MAX_ATTEMPTS:
                        given_up[left[0]] = death(reason, deaths[left[0]], MAX_ATTEMPTS)
                    again.append(TaskList(workdir, [*left[1:], left[0]], given_up))
            jobs |= _submit(again, workers, parameters)
    finally:
        if jobs:
            numbers = [job.job_id for job in jobs]
            # Without the grace of an ordinary cancellation, which submitit's jobs let pass unused.
            subprocess.run(["scancel", "--full", "--signal=KILL", *numbers], capture_output=True)
            subprocess.run(["scancel", *numbers], capture_output=True)


def _share_out(stage: Sequence[Task], workdir: Path, workers: int) -> list[TaskList]:
    """One job for each artifact, and some for the trials."""
    trials = [task for task in stage if not isinstance(task, Artifact)]
    size = max(1, math.ceil(len(trials) / (workers * _JOBS_PER_WORKER)))
    return [
        *(TaskList(workdir, [task]) for task in stage if isinstance(task, Artifact)),
        *(TaskList(workdir, trials[n : n + size]) for n in range(0, len(trials), size)),
    ]


def _submit(
    lists: Sequence[TaskList], workers: int, parameters: Mapping[str, Any]
) -> dict[submitit.Job, TaskList]:
    """Submits one array, of which so many jobs run at a time.

    Raises:
        ValueError: Slurm takes no job with these parameters.
    """
    if not lists:
        return {}
    executor = submitit.SlurmExecutor(lists[0].workdir / "slurm", max_num_timeout=_UNLIMITED)
    setup = [f"export {name}={shlex.quote(v)}" for name, v in worker_environment().items()]
    own = {"array_parallelism": workers, "setup": setup}
    executor.update_parameters(**{**parameters, **own})
    try:
        with executor.batch():
            jobs = [executor.submit(tasks) for tasks in lists]
    except FailedJobError as error:
        line = str(error).strip().splitlines()[-1]
        raise ValueError(f"--resources: Slurm takes no such job: {line}") from error
    return dict(zip(jobs, lists, strict=True))


def _end(job: submitit.Job, tasks: TaskList) -> tuple[str, dict[Task, Outcome]]:
    """What is known of an ended job: of its end, and of the tasks that have an outcome.

    An artifact whose job died has one too: the trials make it.
    """
    reason = f"its Slurm job {job.job_id} is {job.state}"
    if job.paths.result_pickle.exists():
        kind, result = pickle_load(job.paths.result_pickle)
        if kind == "success":
            return reason, dict(zip(tasks.tasks, result, strict=True))
        reason = str(result).strip().splitlines()[-1]
    done = (
        task
        for task in tasks.tasks
        if isinstance(task, Artifact) or is_finished(tasks.workdir, task.name)
    )
    return reason, dict.fromkeys(done, Outcome("ok"))
