"""Running a sweep's trials on this machine, on Slurm or on Ray.

A sweep is a map over trials, after the artifacts that they share (`sweep/artifact_cache.py`). Owns
the choice of an engine: a pool of processes (`on_local.py`), Ray's tasks (`on_ray.py`) or Slurm's
arrays (`on_slurm.py`). Each runs `tasks.run_task`, which leaves a record that appears whole or not
at all, so any process may be killed at any time, and any number of sweeps may share a folder.
"""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hobbit_jax
from hobbit_jax import cache_folder
from hobbit_jax.sweep.texts import DATA_VARIABLE, data_folder

if TYPE_CHECKING:
    from hobbit_jax.launch.sweeping import Engine

LAUNCHERS = ("local", "slurm", "ray")


def connect(launcher: str, resources: Sequence[str]) -> tuple["Engine", int]:
    """The engine of a launcher, and how many tasks it runs at a time by default.

    `resources` are those of one worker, NAME=VALUE.

    Raises:
        ValueError: it is not installed, finds no cluster, or knows no such resource.
    """
    try:
        module = importlib.import_module(f"hobbit_jax.launch.on_{launcher}")
    except ModuleNotFoundError as error:
        how = f"pip install -c constraints.txt -e '.[{launcher}]'"
        raise ValueError(f"--launcher={launcher}: {error}; {how}") from error
    return module.connect(parse_resources(resources))


def parse_resources(resources: Sequence[str]) -> dict[str, str | float | bool]:
    """NAME=VALUE pairs; values that look like numbers or booleans are."""
    parsed: dict[str, str | float | bool] = {}
    for item in resources:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise ValueError(f"resource {item!r}; want NAME=VALUE")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def worker_environment() -> dict[str, str]:
    """Variables with which a process on another machine finds the same packages and caches."""
    here = str(Path(hobbit_jax.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    found = {"PYTHONPATH": path, cache_folder.VARIABLE: str(cache_folder.folder())}
    data = data_folder()
    return found if data is None else found | {DATA_VARIABLE: str(data.resolve())}
