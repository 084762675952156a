"""Tasks of a Ray cluster, or of a local Ray where none is running.

Owns their submission; Ray finds their places by the resources that they ask for and retries those
whose process or node dies. A process with a GPU ends after each task, as is Ray's default, since
JAX would keep the memory that Ray takes for free; without, it keeps the model for the next one.
"""

import functools
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import exceptions  # pyright: ignore[reportMissingImports]

from hobbit_jax.launch import worker_environment
from hobbit_jax.launch.sweeping import Engine, map_tasks
from hobbit_jax.launch.tasks import MAX_ATTEMPTS, Outcome, run_task
from pallas_kernels.ggml.ops import THREADS_VARIABLE


def connect(resources: Mapping[str, Any]) -> tuple[Engine, int]:
    """See `launch.connect`; resources are Ray's, CPU and GPU among them.

    Raises:
        ValueError: Ray does not start, or no node has these resources, for which it would wait for
            ever.
    """
    if not ray.is_initialized():
        threads = {THREADS_VARIABLE: f"{max(1, int(_number('CPU', resources.get('CPU', 1))))}"}
        variables = {**worker_environment(), **threads}
        try:
            ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": variables})
        except Exception as error:  # Ray raises no narrower one when it is not up within 30 s
            raise ValueError(f"--launcher=ray: Ray does not start here: {error}") from error
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    wanted = {"CPU": 1, "GPU": min(1, gpus), **resources}
    for name, amount in wanted.items():
        _number(name, amount)
    if not any(all(node.get(n, 0) >= amount for n, amount in wanted.items()) for node in nodes):
        most = {n: max((node.get(n, 0) for node in nodes), default=0) for n in wanted}
        raise ValueError(
            f"no node of the Ray cluster has {_text(wanted)}; the most that one of its "
            f"{len(nodes)} has is {_text(most)}"
        )
    return functools.partial(map_tasks, RayTasks(wanted)), max(1, gpus)


def _number(name: str, amount: Any) -> float:
    if not isinstance(amount, (int, float)):
        raise ValueError(f"resource {name}={amount}; Ray wants a number")
    return amount


def _text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={amount:g}" for name, amount in resources.items())


class RayTasks:
    """Ray's workers, as a `sweeping.Pool`."""

    died: tuple[type[Exception], ...] = (
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.LocalRayletDiedError,
    )
    attempts = 1  # Ray has made the others

    def __init__(self, resources: Mapping[str, float]):
        self._task = ray.remote(
            num_cpus=resources["CPU"],
            num_gpus=resources["GPU"],
            resources={n: amount for n, amount in resources.items() if n not in ("CPU", "GPU")},
            max_retries=MAX_ATTEMPTS - 1,
        )(run_task)

    def submit(self, *arguments: Any) -> Future[Outcome]:
        """See `sweeping.Pool`."""
        return self._task.remote(*arguments).future()

    def stop(self) -> None:
        """See `sweeping.Pool`."""
        ray.shutdown()
