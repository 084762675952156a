"""A sweep from its trials to their records, on any engine.

Owns which trials are left, the graph of artifacts and trials, the loop over it for engines that
take one task at a time, and the progress bar. It computes nothing and may be killed at any time.
"""

import contextlib
import heapq
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from hobbit_jax.launch.tasks import Outcome, Task
from hobbit_jax.record import Study, is_finished, read_study, study_names, write_study
from hobbit_jax.sweep.artifact_cache import Artifact
from hobbit_jax.sweep.trial import Trial


class Graph(TopologicalSorter[Task]):
    """Trials after their artifacts, and those after theirs.

    `rank` counts a trial, then what it needs, then the next trial. Whoever takes the least first
    finishes trials in their order, and makes no file long before it is read.
    """

    def __init__(self, trials: Sequence[Trial]):
        super().__init__()
        self.rank: dict[Task, int] = {}
        for trial in trials:
            found: list[Task] = [trial]
            while found:
                task = found.pop()
                if task not in self.rank:
                    self.rank[task] = len(self.rank)
                    self.add(task, *task.artifacts)
                    found.extend(task.artifacts)
        self.prepare()


Outcomes = Generator[tuple[Task, Outcome]]
# Runs a graph in a working directory, so many tasks at a time, and yields each when it is done.
# It ends whatever it has started when it is closed.
Engine = Callable[[Graph, Path, int], Outcomes]


def run_sweep(
    trials: Sequence[Trial],
    description: dict[str, Any],
    workdir: Path,
    engine: Engine,
    workers: int,
) -> tuple[int, int, int]:
    """Runs every trial that has no finished record; one that fails is recorded, the rest go on.

    `description` has title, question, command, config and rule of the study. All workers see
    `workdir` under this name.

    Returns:
        How many trials ran, were finished before, and failed.

    Raises:
        ValueError, OSError: the model or the workdir cannot be used.
    """
    workdir = workdir.resolve()
    names = tuple(trial.name for trial in trials)
    write_study(workdir, Study(trials[0].study, **description, trials=names))
    left = [trial for trial in trials if not is_finished(workdir, trial.name)]
    before, settled, failed, shared = len(trials) - len(left), 0, 0, 0
    with (
        tqdm(total=len(trials), initial=before, unit="trial") as progress,
        contextlib.closing(engine(Graph(left), workdir, workers)) as outcomes,
    ):
        try:
            for task, outcome in outcomes:
                if outcome.status == "refused":
                    raise ValueError(outcome.error)
                if isinstance(task, Artifact):
                    shared += 1
                    progress.set_postfix_str(f"{shared} shared files")
                    continue
                if outcome.status == "failed":
                    failed += 1
                    progress.write(f"failed: {task.name}: {outcome.error}")
                settled += 1
                progress.update()
        except KeyboardInterrupt:
            done = f"{before + settled} of {len(trials)} trials have records"
            print(f"\nstopped: {done}; the same command goes on from there", file=sys.stderr)
            raise
    _tidy(workdir)
    return len(left), before, failed


class Pool(Protocol):
    """Processes that run one task each."""

    died: tuple[type[Exception], ...]  # what a future raises when the process of its task has died
    attempts: int  # how often to submit a task whose process dies each time

    def submit(self, *arguments: Any) -> Future[Outcome]:
        """Has an idle process run `run_task` with these arguments."""
        ...

    def stop(self) -> None:
        """Ends idle processes and kills the others; returns when they can write nothing more."""
        ...


def map_tasks(pool: Pool, graph: Graph, workdir: Path, workers: int) -> Outcomes:
    """An `Engine` of a pool: submits each task when those that it needs are done, least rank first.

    Raises:
        RuntimeError: processes die even where nothing is left to do but to write a record.
    """
    # Whether another sweep is at it, and rank, which no other task has.
    waiting: list[tuple[bool, int, Task]] = []
    running: dict[Future[Outcome], Task] = {}
    deaths: Counter[Task] = Counter()
    given_up: dict[Task, str] = {}
    try:
        while graph.is_active():
            for task in graph.get_ready():
                heapq.heappush(waiting, (False, graph.rank[task], task))
            while waiting and len(running) < workers:
                last, _, task = heapq.heappop(waiting)
                # Its lock is another sweep's, or still that of the process that died of it.
                patient = last or deaths[task] > 0
                future = pool.submit(task, workdir, patient, given_up.get(task))
                running[future] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    outcome = future.result()
                except pool.died as error:
                    deaths[task] += 1
                    if deaths[task] >= pool.attempts:
                        given_up[task] = death(error, deaths[task], pool.attempts)
                    heapq.heappush(waiting, (False, graph.rank[task], task))
                    continue
                if outcome.status == "busy":  # a process of another sweep is at it: last, then
                    heapq.heappush(waiting, (True, graph.rank[task], task))
                    continue
                graph.done(task)
                yield task, outcome
    finally:
        pool.stop()


def death(reason: object, deaths: int, attempts: int) -> str:
    """The error of a task whose process died so often.

    Raises:
        RuntimeError: it did so again where the task was only to be recorded.
    """
    last = next(iter(str(reason).splitlines()), "")
    if deaths >= 2 * attempts:
        raise RuntimeError(f"workers end before they begin; last: {last}")
    return f"RuntimeError: its process died each time (out of memory?); last: {last}"


def _tidy(workdir: Path) -> None:
    """Removes what only unfinished trials need, and locks of processes that were killed.

    Nothing is removed while a trial of any study of the folder is unfinished: another sweep may be
    at it, and a failed one goes on from its parts.
    """
    studies = (read_study(workdir, name) for name in study_names(workdir))
    if not all(is_finished(workdir, trial) for study in studies for trial in study.trials):
        return
    shutil.rmtree(workdir / "parts", ignore_errors=True)
    for lock in workdir.rglob(".*.lock"):
        lock.unlink(missing_ok=True)
