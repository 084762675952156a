"""Runs every cell of a config and writes one row each; finished cells are skipped.

python scripts/sweep.py --config configs/reference.py --workdir out/reference_sweep
python scripts/sweep.py --config configs/reference.py:demo --config.cache.budget_mib=2 --workdir W
python scripts/sweep.py --config C --workdir W --launcher=slurm --workers=8 \\
    --resources=partition=gpu,gpus_per_node=1,time=240
python scripts/sweep.py --config C --workdir W --launcher=ray --workers=8 --resources=CPU=4,GPU=1
"""

import importlib.util
import json
import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from hobbit_jax import cli
from hobbit_jax.launch import LAUNCHERS, connect
from hobbit_jax.launch.sweeping import run_sweep

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, F.py or F.py:arg.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where rows, tiers and caches are kept.")
_LAUNCHER = flags.DEFINE_enum(
    "launcher", "local", LAUNCHERS, "The engine that runs the trials: processes here, Slurm or Ray."
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Number of tasks to run at a time, each in a process with the model loaded; by default one for "
    "each GPU here or in Ray's cluster, one without. Several on one machine disturb each other's "
    "timings.",
    1,
)
_RESOURCES = flags.DEFINE_list(
    "resources",
    [],
    "Resources of one worker, NAME=VALUE: submitit's parameters of Slurm jobs, or Ray's.",
)
flags.mark_flags_as_required(["config", "workdir"])


def _cells(config_file: str):
    """The config module's own expansion of the config into cells."""
    spec = importlib.util.spec_from_file_location("sweep_config", config_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.sweep(_CONFIG.value)


def main(_) -> int:
    config = _CONFIG.value
    config_file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":", 1)[0]
    description = {
        "title": config.title,
        "question": config.question,
        "command": shlex.join(["python", *sys.argv]),
        "config": json.loads(config.to_json_best_effort()),
        "rule": config.rule.to_dict(),
    }
    engine, default_workers = connect(_LAUNCHER.value, _RESOURCES.value)
    workers = _WORKERS.value or default_workers
    workdir = Path(str(_WORKDIR.value))
    ran, skipped, failed = run_sweep(_cells(config_file), description, workdir, engine, workers)
    print(f"{ran - failed} cells done, {failed} failed, {skipped} were finished before")
    print(f"next: python scripts/report.py --workdir {_WORKDIR.value}")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
