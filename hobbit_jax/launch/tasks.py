"""One task of a sweep, as every engine runs it in a worker process.

Owns the order of lock, look, work and record. A trial whose record exists is not run again; one
that is run twice after all leaves the same record.
"""

import contextlib
import functools
from pathlib import Path
from typing import Literal, NamedTuple

from hobbit_jax.atomic import exclusive
from hobbit_jax.cache_folder import keep_compiled_programs
from hobbit_jax.record import EvalSizes, Inputs, is_finished, record_path, write_record
from hobbit_jax.sweep.artifact_cache import Artifact, ArtifactCache
from hobbit_jax.sweep.trial import Trial, failed_record, run_trial

Task = Artifact | Trial

# How often a task is run whose process dies each time. More than a crash needs to be believed,
# since a process that was killed from outside looks the same.
MAX_ATTEMPTS = 10


class Outcome(NamedTuple):
    """How a task ended.

    "busy": another process is at this trial. "refused": the model or the folder cannot be used at
    all, which ends the sweep. `error` says why a trial failed or was refused.
    """

    status: Literal["ok", "failed", "busy", "refused"]
    error: str | None = None


@functools.lru_cache(maxsize=1)
def _bench(inputs: Inputs, sizes: EvalSizes, workdir: Path) -> ArtifactCache:
    """The model is loaded by the first task of a process and kept for the next that asks alike."""
    keep_compiled_programs()
    return ArtifactCache(inputs, sizes, workdir)


def run_task(task: Task, workdir: Path, wait: bool = True, death: str | None = None) -> Outcome:
    """Makes an artifact, or runs a trial and writes its record.

    `wait` is for a trial that another process is at; otherwise that is "busy". `death` says why a
    task that kills its process is given up; a trial is recorded as failed.
    """
    try:
        if isinstance(task, Artifact):
            if death is None:
                bench = _bench(task.inputs, task.sizes, workdir)
                # Every trial that needs it meets the same error again, and records it.
                with contextlib.suppress(Exception):
                    task.make(bench)
            return Outcome("ok")
        with exclusive(record_path(workdir, task.name), wait) as held:
            if not held:
                return Outcome("busy")
            if is_finished(workdir, task.name):
                return Outcome("ok")
            if death is not None:
                record = failed_record(task, death)
            else:
                record = run_trial(task, _bench(task.inputs, task.sizes, workdir))
            write_record(workdir, record)
        return Outcome(record.status, record.error)
    except (ValueError, NotImplementedError, OSError, EOFError) as error:
        return Outcome("refused", str(error))
