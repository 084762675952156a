"""Workers as Slurm jobs, through submitit: one array for all that are started together.

Owns submission, what a job does when it is preempted or its time runs out, and how the queue is
read. Nothing here asks `sacct`, which small clusters do not have: what is done is read from the
rows, what still runs from `squeue`.

A preempted job, and one whose time runs out, is queued again by submitit (or by Slurm) under its
own number; it gives its cell back first, and any worker goes on with it from its stored parts. A
job that is gone without a word (a node that died, `scancel`, out of memory) leaves cells without
rows, for which the driver submits anew.
"""

from __future__ import annotations

import functools
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from hobbit_jax.launch.driver import LauncherFactory
from hobbit_jax.launch.manifest import Sweep, python_path
from hobbit_jax.launch.worker import Worker

try:
    import submitit  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ValueError(
        "--launcher=slurm wants submitit: pip install -c constraints.txt -e '.[slurm]'"
    ) from error

# Minutes; submitit's own 5 would be short for a cell.
_DEFAULTS = {"time": 240, "job_name": "hobbit_jax"}
_UNLIMITED = 10**6  # time-outs; `cells/leases.py` bounds those that bring nothing
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}


def connect(resources: Mapping[str, Any]) -> tuple[LauncherFactory, int]:
    """See `launch.connect`; resources are parameters of `submitit.SlurmExecutor`."""
    parameters = {**_DEFAULTS, **resources}
    try:
        submitit.SlurmExecutor("unused").update_parameters(**parameters)
    except RuntimeError as error:
        raise ValueError("--launcher=slurm finds no srun here; is this a Slurm cluster?") from error
    return functools.partial(SlurmLauncher, parameters=parameters), 1


class SlurmWorker:
    """What a job runs: one worker. submitit calls `checkpoint` when the job is to be queued again.

    Args:
        workdir, driver, name: see `worker.Worker`.
        processes: tasks of the job, which are one worker together.
        limit_s: the job's time.
    """

    def __init__(self, workdir: Path, driver: str, name: str, processes: int, limit_s: float):
        self.arguments = (workdir, driver, name, processes, limit_s)
        self.began_s: float = 0
        self.worker: Worker | None = None

    def __call__(self) -> None:
        """Works until no cell is left to take."""
        workdir, driver, name, processes, _ = self.arguments
        self.began_s = time.monotonic()
        if processes > 1:
            jax.distributed.initialize()  # finds Slurm's own variables
        self.worker = Worker(workdir, driver, name)
        self.worker.run()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Gives back what is held, at once, and says what the job runs next time."""
        limit_s = self.arguments[-1]
        # As submitit tells a time-out from preemption; it does not pass on what it found.
        timed_out = time.monotonic() - self.began_s >= min(0.8 * limit_s, limit_s - 600)
        if self.worker is not None:
            self.worker.leases.end_all("the time of its Slurm job ran out", counts=timed_out)
        return submitit.helpers.DelayedSubmission(SlurmWorker(*self.arguments))


@dataclass
class SlurmLauncher:
    """Starts one job a worker, as an array.

    Attributes:
        parameters: of every job, as `submitit.SlurmExecutor` calls them.
        poll_s: between looks at the rows.
        ask_s: between calls of `squeue`, which is all that the controller is asked.
    """

    workdir: Path
    driver: str
    parameters: Mapping[str, Any]
    poll_s: float = 2.0
    ask_s: float = 15.0
    _jobs: dict[str, str] = field(default_factory=dict)
    _asked_s: float = 0.0

    def start(self, names: Sequence[str], processes: int) -> None:
        """Submits an array of workers; see `driver.Launcher`."""
        folder = Sweep.folder(self.workdir, self.driver) / "slurm"
        executor = submitit.SlurmExecutor(folder, max_num_timeout=_UNLIMITED)
        per_node = int(self.parameters.get("ntasks_per_node", 1))
        if processes % min(per_node, processes):
            raise ValueError(f"{processes} processes do not fill nodes of {per_node} tasks each")
        per_node = min(per_node, processes)
        executor.update_parameters(
            **{
                **self.parameters,
                "ntasks_per_node": per_node,
                "nodes": processes // per_node,
                "setup": [f"export PYTHONPATH={shlex.quote(python_path())}"],
            }
        )
        limit_s = 60 * self.parameters["time"]
        with executor.batch():
            jobs = [
                executor.submit(SlurmWorker(self.workdir, self.driver, name, processes, limit_s))
                for name in names
            ]
        self._jobs.update(zip(names, (job.job_id for job in jobs), strict=True))

    def ended(self) -> list[tuple[str, str]]:
        """Workers whose jobs are over; see `driver.Launcher`."""
        now_s = time.monotonic()
        if not self._jobs or now_s - self._asked_s < self.ask_s:
            return []
        self._asked_s = now_s
        states = self._states()
        if states is None:
            return []
        ended = []
        for name, job in list(self._jobs.items()):
            state = states.get(job, "gone from the queue")
            if job not in states or state in _ENDED:
                del self._jobs[name]
                ended.append((name, f"its Slurm job {job} is {state}"))
        return ended

    def _states(self) -> dict[str, str] | None:
        """States by job; None where the controller gives no answer, as when it restarts."""
        command = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i %T"]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            return None
        lines = (line.split() for line in found.stdout.splitlines())
        return {parts[0]: parts[1] for parts in lines if len(parts) == 2}

    def stop(self) -> None:
        """Cancels all jobs; see `driver.Launcher`."""
        if self._jobs:
            jobs = list(self._jobs.values())
            # Without the grace of an ordinary cancellation, which submitit's jobs let pass unused.
            subprocess.run(["scancel", "--full", "--signal=KILL", *jobs], capture_output=True)
            subprocess.run(["scancel", *jobs], capture_output=True)
            self._jobs.clear()
