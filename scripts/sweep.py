"""Runs every trial of a config and writes one record each; finished trials are skipped.

Formats, encoders, budgets, texts, memory, disk and outputs are checked before anything runs, and
all problems are said at once.

python scripts/sweep.py --config configs/reference.py --workdir out/reference_sweep --dry_run
python scripts/sweep.py --config configs/reference.py --workdir out/reference_sweep
python scripts/sweep.py --config configs/reference.py:demo --config.cache.budget_mib=2 --workdir W
python scripts/sweep.py --config C --workdir W --launcher=slurm --workers=8 \\
    --resources=partition=gpu,gpus_per_node=1,time=240
python scripts/sweep.py --config C --workdir W --launcher=ray --workers=8 --resources=CPU=4,GPU=1
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from hobbit_jax import cache_folder, cli
from hobbit_jax.config_overrides import load_module
from hobbit_jax.launch import LAUNCHERS, connect
from hobbit_jax.launch.sweeping import run_sweep
from hobbit_jax.record import is_finished
from hobbit_jax.resources import free_disk_bytes, host_bytes, mib, workers_device_bytes
from hobbit_jax.sweep.forecast import forecast_hours
from hobbit_jax.sweep.preflight import Preflight, preflight
from hobbit_jax.sweep.trial import Trial, spread

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, F.py or F.py:arg.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for records and what trials share.")
_LAUNCHER = flags.DEFINE_enum(
    "launcher", "local", LAUNCHERS, "Launcher that runs the trials: processes here, Slurm or Ray."
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
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the trials and the hours, memory and disk that they take, and exit."
)
flags.mark_flags_as_required(["config", "workdir"])


def _print_dry_run(trials: Sequence[Trial], found: Preflight, workdir: Path) -> None:
    left = [trial for trial in trials if not is_finished(workdir, trial.name)]
    for trial in trials:
        print(f"{'to run  ' if trial in left else 'finished'}  {trial.name}")
    print(f"trials  {len(trials)}, of which {len(trials) - len(left)} are finished")
    print(f"memory  {mib(found.device_bytes)} on the device of {mib(workers_device_bytes())} free")
    if found.host_bytes:
        print(f"        {mib(found.host_bytes)} for the encoder of {mib(host_bytes())} free")
    for folder, wanted in found.disk.items():
        print(f"disk    {mib(wanted)} in {folder} of {mib(free_disk_bytes(folder))} free")
    if left and not found.problems:
        hours = forecast_hours(left, found.to_encode)
        parts = ", ".join(f"{name} {value:.2g}" for name, value in hours.items())
        print(f"hours   {sum(hours.values()):.2g} of one worker here, roughly: {parts}")


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
    workdir = cli.output_folder("workdir", str(_WORKDIR.value))
    trials = spread(load_module(config_file).sweep(config))
    here = _LAUNCHER.value == "local"
    found = preflight(trials, description["config"], workdir, here)
    if _DRY_RUN.value:
        _print_dry_run(trials, found, workdir)
    found.refuse()
    if _DRY_RUN.value:
        return 0
    cache_folder.export()
    engine, default_workers = connect(_LAUNCHER.value, _RESOURCES.value)
    workers = _WORKERS.value or default_workers
    ran, skipped, failed = run_sweep(trials, description, workdir, engine, workers)
    print(f"{ran - failed} trials done, {failed} failed, {skipped} were finished before")
    print(f"next: python scripts/report.py --workdir {_WORKDIR.value}")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
