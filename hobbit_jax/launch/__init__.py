"""Running a sweep's cells in worker processes: on this machine, under Slurm, or under Ray.

A launcher (`on_local.py`, `on_slurm.py`, `on_ray.py`) starts workers and says which have ended, and
that is all it does. A worker (`worker.py`) takes cells from the working directory until there are
none. The driver (`driver.py`) starts workers while cells are left. What makes this right stands in
the working directory and not in the scheduler: rows that appear whole and once (`rows.py`),
leases (`cells/leases.py`), and parts of cells (`cells/workbench.py`). So any number of drivers and
launchers may share a working directory, and any process of them may be killed at any time.

    workdir/rows/CELL.json      finished
    workdir/leases/             who is at which cell; empty when nothing runs
    workdir/launch/DRIVER/      what a driver tells its workers, how those ended, Slurm's logs
    workdir/parts/              parts of unfinished cells
    workdir/cache/              what cells share
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hobbit_jax.launch.driver import LauncherFactory

LAUNCHERS = ("local", "slurm", "ray")


def connect(launcher: str, resources: Sequence[str]) -> tuple[LauncherFactory, int]:
    """What makes the launcher of that name, and how many workers it starts by default.

    Args:
        launcher: one of `LAUNCHERS`.
        resources: of one worker, as NAME=VALUE.

    Raises:
        ValueError: it is not installed, finds no cluster, or knows no such resource.
    """
    module = importlib.import_module(f"hobbit_jax.launch.on_{launcher}")
    return module.connect(parse_resources(resources))


def parse_resources(resources: Sequence[str]) -> dict[str, str | float | bool]:
    """NAME=VALUE pairs; values that look like numbers or booleans are."""
    parsed: dict[str, str | float | bool] = {}
    for item in resources:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise ValueError(f"resource {item!r}; want NAME=VALUE")
        if value.lower() in ("true", "false"):
            parsed[name] = value.lower() == "true"
        elif value.replace(".", "", 1).isdigit():
            parsed[name] = float(value) if "." in value else int(value)
        else:
            parsed[name] = value
    return parsed
