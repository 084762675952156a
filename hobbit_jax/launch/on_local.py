"""Workers as processes of this machine, each with a GPU of its own where there are any.

Owns starting and killing them. A worker ends when its driver does, however that ended: it holds the
reading end of a pipe that nobody writes to.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hobbit_jax.launch.driver import LauncherFactory
from hobbit_jax.launch.manifest import python_path

_NO_GPU = ("", "-1", "NoDevFiles")


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that JAX would use here, as CUDA_VISIBLE_DEVICES names them."""
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [] if chosen in _NO_GPU else chosen.split(",")
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else []


def connect(resources: Mapping[str, object]) -> tuple[LauncherFactory, int]:
    """See `launch.connect`."""
    if resources:
        raise ValueError(
            "the local launcher takes no resources; CUDA_VISIBLE_DEVICES says which GPUs"
        )
    gpus = visible_gpus()
    return functools.partial(LocalLauncher, gpus=gpus), max(1, len(gpus))


@dataclass
class LocalLauncher:
    """Starts one process a worker."""

    workdir: Path
    driver: str
    gpus: Sequence[str] = ()
    poll_s: float = 0.1
    _running: dict[str, tuple[subprocess.Popen, int]] = field(default_factory=dict)

    def start(self, names: Sequence[str], processes: int) -> None:
        """Starts workers; see `driver.Launcher`."""
        if processes > 1:
            raise NotImplementedError(
                f"a cell asks for {processes} processes together; --launcher=slurm runs those"
            )
        for name in names:
            taken = {place for _, place in self._running.values()}
            place = next(place for place in range(len(taken) + 1) if place not in taken)
            # Bars of several workers stand below each other and the driver's.
            environment = {
                **os.environ,
                "PYTHONPATH": python_path(),
                "TQDM_POSITION": str(place + 1),
            }
            if self.gpus:
                if place >= len(self.gpus):
                    raise ValueError(
                        f"{place + 1} workers or more on {len(self.gpus)} GPUs; want one for each"
                    )
                environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place]
            command = [sys.executable, "-m", "hobbit_jax.launch.worker"]
            process = subprocess.Popen(
                [*command, str(self.workdir), self.driver, name],
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # ctrl-C is the driver's
            )
            self._running[name] = (process, place)

    def ended(self) -> list[tuple[str, str]]:
        """Workers that have ended, and by what; see `driver.Launcher`."""
        ended = []
        for name, (process, _) in list(self._running.items()):
            status = process.poll()
            if status is not None:
                self._kill(process)  # whatever children it has left
                del self._running[name]
                ended.append((name, _reason(status)))
        return ended

    def stop(self) -> None:
        """Kills all workers; nothing needs a gentler end. See `driver.Launcher`."""
        for process, _ in self._running.values():
            self._kill(process)
        for process, _ in self._running.values():
            process.wait()
        self._running.clear()

    @staticmethod
    def _kill(process: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin is not None
        process.stdin.close()


def _reason(status: int) -> str:
    if status >= 0:
        return f"the worker ended with status {status}"
    name = signal.Signals(-status).name
    hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
    return f"the worker was killed by {name}{hint}"
