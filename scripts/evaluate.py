"""Scores a model on lm-eval's benchmarks, from local data files or from lm-eval's own.

    python scripts/evaluate.py --model M.gguf --tasks gsm8k,humaneval,wikitext --data_dir D \\
        --limit 100 --budget_mib 8000 [--low_format Q2_K]

Writes one JSON and prints its table. Finished requests stay in --workdir, where an interrupted run
goes on. --low_format is that of every expert; mixed plans are cells of a sweep.
"""

import sys
from pathlib import Path

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.atomic import write_json
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.code_runner import PROTECTIONS
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.experts.tiers import TierSpec, open_tier
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from pallas_kernels.backends import IMPLEMENTATIONS

try:
    from hobbit_jax.evals.benchmarks import BenchmarkSettings, evaluate_engine, table
    from hobbit_jax.evals.lm_eval_tasks import TASKS
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; pip install -c constraints.txt -e '.[eval]'")

_MODEL = flags.DEFINE_string("model", None, "GGUF file; the shipped reference model by default")
_TASKS = flags.DEFINE_list("tasks", None, f"of {', '.join(TASKS)}", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "data sets as in README; else lm-eval's own")
_OUT = flags.DEFINE_string("out", None, "the JSON; <workdir>/evaluation.json by default")
_WORKDIR = flags.DEFINE_string("workdir", "out/evaluate", "finished requests and tiers")
_LIMIT = flags.DEFINE_integer("limit", None, "problems per task; all by default", 1)
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "the task's own by default", 0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "sequences at once", 1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "context; the model's by default", 2)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "the task's own by default", 1)
_CHAT_TEMPLATE = flags.DEFINE_bool("chat_template", False, "wrap prompts in the file's template")
_BUDGET_MIB = flags.DEFINE_float("budget_mib", None, "expert pool; all resident by default", 0.0)
_LOW_FORMAT = flags.DEFINE_string("low_format", None, "of every expert; the file's by default")
_IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, IMPLEMENTATIONS, "matrix products; the device's fastest by default"
)


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
    workdir = Path(str(_WORKDIR.value))
    model = load_model(_MODEL.value or reference.model_path(), _IMPLEMENTATION.value)
    low, plan = [], {"signal": "native"}  # as a sweep's cells call them
    if _LOW_FORMAT.value:
        spec = TierSpec(_LOW_FORMAT.value)
        low = [open_tier(model.file, model.config, spec, low_precision_folder())]
        plan = {"signal": "uniform", "low_format": _LOW_FORMAT.value, "sha256": low[0].sha256()}
    store = HostExperts(model.config, model.file, low)
    budget_bytes = None if _BUDGET_MIB.value is None else int(_BUDGET_MIB.value * 2**20)
    engine = Engine(model, store, budget_bytes, uniform_plan(store, len(low)))
    data = Path(_DATA_DIR.value) if _DATA_DIR.value else None
    record = evaluate_engine(engine, settings, plan, data, workdir / "responses")
    out = Path(_OUT.value) if _OUT.value else workdir / "evaluation.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**record, "budget_bytes": engine.pool.budget_bytes})
    for name in record["missing_protections"] or ():
        print(f"warning: generated code ran with {PROTECTIONS[name]} ({name})", file=sys.stderr)
    print(table(record))
    print(f"written: {out}")


if __name__ == "__main__":
    cli.run(main)
