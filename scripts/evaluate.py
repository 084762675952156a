"""Scores a model on lm-eval's benchmarks, from local data files or from lm-eval's own.

    python scripts/evaluate.py --model M.gguf --tasks gsm8k,humaneval,wikitext --data_dir D \\
        --limit 100 --budget_mib 8000 [--low_format Q2_K]

Tasks humaneval and mini_functions execute the code that the model writes, in a child process; a
protection that this machine lacks is named. Writes a record and prints its table. Finished requests
stay in --workdir, where an interrupted run goes on. Mixed plans are trials of a sweep.
"""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from hobbit_jax import cli
from hobbit_jax.cache.miss_modes import Host
from hobbit_jax.code_runner import PROTECTIONS
from hobbit_jax.engine_flags import EngineOptions, engine_flags
from hobbit_jax.importance.calibration import Calibration
from hobbit_jax.inference.engine import Engine
from hobbit_jax.record import write_record
from hobbit_jax.report.table import Column, table
from hobbit_jax.sweep.texts import DATA_VARIABLE, data_folder

try:
    from hobbit_jax.evals.benchmarks import BenchmarkSettings, as_record, evaluate_engine, rows
    from hobbit_jax.evals.lm_eval_tasks import TASKS
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; pip install -c constraints.txt -e '.[eval]'")

ENGINE = engine_flags(
    "model", "implementation", "threads", "kv_format", "devices", "budget_mib", "policy",
    "miss_mode", "link_to_host", "low_format", "low_share", "profile", "pin_share", "chunk_tokens",
)  # fmt: skip
_TASKS = flags.DEFINE_list("tasks", None, f"Tasks to run, of {', '.join(TASKS)}.", required=True)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    f"Folder of the data sets, as in README; by default ${DATA_VARIABLE}, or ../shared/data beside "
    "this checkout, or what lm-eval downloads.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "out/evaluate", "Folder of the record and of finished requests."
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Number of problems per task; all by default.", 1, cli.MAX_COUNT
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Number of examples in a prompt; the task's own by default.", 0, 1000
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Number of sequences at once.", 1, 4096)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Context in tokens; the model's by default.", 2, cli.MAX_COUNT
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Number of tokens to generate at most; the task's own by default.", 1,
    cli.MAX_COUNT,
)  # fmt: skip
_CHAT_TEMPLATE = flags.DEFINE_bool(
    "chat_template", False, "Whether to wrap prompts in the file's chat template."
)
_COLUMNS = (
    Column("task", "task"),
    Column("metric", "metric"),
    Column("filter", "filter"),
    Column("problems", "problems"),
    Column("value", "interval", ".4f"),
    Column("stderr", "stderr", ".4f"),
)


def plan_of(options: EngineOptions, engine: Engine) -> dict[str, Any]:
    """What the answers depend on besides the model."""
    plan: dict[str, Any] = {"kv_format": options.kv_format, "low_format": options.low}
    plan["platform"] = jax.devices()[0].platform
    if options.low is not None:
        plan["low_sha256"] = options.low_experts(engine.model)[0].sha256()
    if engine.serves_by_residency or isinstance(engine.mode, Host):
        # What is resident, or where a miss is computed, has a part in the answers.
        plan |= {n: v for n, v in options.asked.items() if n not in ("threads", "trace_out")}
        plan |= {"budget_bytes": engine.pool.budget_bytes, "batch_size": _BATCH_SIZE.value}
    if options.profile is not None:
        path = Calibration.file(Path(options.profile))
        plan["profile_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return plan


def main(_):
    settings = BenchmarkSettings(
        tasks=tuple(_TASKS.value),
        limit=_LIMIT.value,
        num_fewshot=_NUM_FEWSHOT.value,
        batch_size=_BATCH_SIZE.value,
        max_length=_MAX_LENGTH.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        chat_template=_CHAT_TEMPLATE.value,
    )
    named = _DATA_DIR.value
    data = cli.input_folder("data_dir", named) if named else data_folder()  # or lm-eval's own
    workdir = cli.output_folder("workdir", str(_WORKDIR.value))
    began, options = time.monotonic(), ENGINE()
    engine = options.make_engine(options.load_model())
    plan = plan_of(options, engine)
    found = evaluate_engine(engine, settings, plan, data, workdir / "responses")
    setting = {**vars(settings), "tasks": ",".join(settings.tasks), "model": options.path.name}
    setting |= {name: getattr(options, name) for name in ("implementation", "budget_mib")} | plan
    path = write_record(workdir, as_record(found, setting, time.monotonic() - began))
    for name in found["missing_protections"] or ():
        print(f"warning: generated code ran with {PROTECTIONS[name]} ({name})", file=sys.stderr)
    print(f"{table(_COLUMNS, rows(found))}\nthe record: {path}")


if __name__ == "__main__":
    cli.run(main)
