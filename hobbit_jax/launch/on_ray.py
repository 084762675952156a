"""Workers as tasks of a Ray cluster, or of a local Ray where none is running.

Owns starting and watching them. One task is a worker's whole life, so a model is loaded once, and
its process ends with it (`max_calls=1`): JAX would keep a GPU's memory that Ray takes for free. Ray
retries nothing; the driver does, who knows what a death was of.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hobbit_jax.launch.driver import LauncherFactory
from hobbit_jax.launch.manifest import python_path
from hobbit_jax.launch.worker import Worker

try:
    import ray  # pyright: ignore[reportMissingImports]
    from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ValueError(
        "--launcher=ray wants Ray: pip install -c constraints.txt -e '.[ray]'"
    ) from error


def connect(resources: Mapping[str, Any]) -> tuple[LauncherFactory, int]:
    """See `launch.connect`; resources are Ray's, CPU and GPU among them.

    Raises:
        ValueError: no node has these resources, and Ray would wait for one for ever.
    """
    if not ray.is_initialized():
        ray.init(
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
        )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    wanted = {"CPU": 1, "GPU": min(1, gpus), **resources}
    wrong = [name for name, amount in wanted.items() if not isinstance(amount, (int, float))]
    if wrong:
        raise ValueError(f"resource {wrong[0]}={wanted[wrong[0]]}; Ray wants a number")
    if not any(all(node.get(n, 0) >= amount for n, amount in wanted.items()) for node in nodes):
        most = {n: max((node.get(n, 0) for node in nodes), default=0) for n in wanted}
        raise ValueError(
            f"no node of the Ray cluster has {_text(wanted)}; the most that one of its "
            f"{len(nodes)} has is {_text(most)}"
        )
    return functools.partial(RayLauncher, resources=wanted), max(1, gpus)


def _text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={amount:g}" for name, amount in resources.items())


def _work(workdir: Path, driver: str, name: str) -> None:
    Worker(workdir, driver, name).run()


@dataclass
class RayLauncher:
    """Starts one task a worker; `resources` are those of each."""

    workdir: Path
    driver: str
    resources: Mapping[str, float]
    poll_s: float = 0.5
    _tasks: dict[str, Any] = field(default_factory=dict)

    def start(self, names: Sequence[str], processes: int) -> None:
        """Submits workers; see `driver.Launcher`."""
        if processes > 1:
            raise NotImplementedError(
                f"a cell asks for {processes} processes together; --launcher=slurm runs those"
            )
        more = {n: amount for n, amount in self.resources.items() if n not in ("CPU", "GPU")}
        task = ray.remote(
            num_cpus=self.resources["CPU"],
            num_gpus=self.resources["GPU"],
            resources=more,
            max_retries=0,
            max_calls=1,
        )(_work)
        for name in names:
            self._tasks[name] = task.remote(self.workdir, self.driver, name)

    def ended(self) -> list[tuple[str, str]]:
        """Workers whose tasks are over; see `driver.Launcher`."""
        ended = []
        for name, task in list(self._tasks.items()):
            if not ray.wait([task], timeout=0)[0]:
                continue
            del self._tasks[name]
            try:
                ray.get(task)
                reason = "its Ray task returned"
            except RayError as error:
                said = next(iter(str(error).splitlines()), "")
                reason = f"Ray says {type(error).__name__}: {said}"
            ended.append((name, reason))
        return ended

    def stop(self) -> None:
        """Kills all workers; see `driver.Launcher`."""
        for task in self._tasks.values():
            ray.cancel(task, force=True)
        if self._tasks:
            ray.wait(list(self._tasks.values()), num_returns=len(self._tasks), timeout=10)
        self._tasks.clear()
        ray.shutdown()
