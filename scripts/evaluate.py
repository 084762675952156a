"""Scores a model on lm-eval's benchmarks, from local data files or from lm-eval's own.

    python scripts/evaluate.py --model M.gguf --tasks gsm8k,humaneval,wikitext --data_dir D \\
        --limit 100 --budget_mib 8000 [--low_format Q2_K]

Tasks humaneval and mini_functions execute the code that the model writes, in a child process; a
protection that this machine lacks is named. Writes one JSON and prints its table. Finished requests
stay in --workdir, where an interrupted run goes on. Mixed plans are cells of a sweep.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from hobbit_jax import cli
from hobbit_jax.atomic import write_json
from hobbit_jax.code_runner import PROTECTIONS
from hobbit_jax.engine_flags import EngineFlags, low_experts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import LoadedModel

try:
    from hobbit_jax.evals.benchmarks import BenchmarkSettings, evaluate_engine, table
    from hobbit_jax.evals.lm_eval_tasks import TASKS
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; pip install -c constraints.txt -e '.[eval]'")

DATA_VARIABLE = "HOBBIT_DATA_DIR"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

ENGINE = EngineFlags(
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
_OUT = flags.DEFINE_string(
    "out",
    None,
    "JSON file to write; by default evaluation.json in --workdir, or a name of its own beside one "
    "of other settings.",
)
_WORKDIR = flags.DEFINE_string("workdir", "out/evaluate", "Folder of finished requests.")
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
_JSON = flags.DEFINE_bool("json", False, "Whether to print the JSON instead of a table.")


def data_folder() -> Path | None:
    """Where the data sets are; None leaves them to lm-eval.

    Raises:
        ValueError: the folder that was named is not there.
    """
    if _DATA_DIR.value:
        return cli.input_folder("data_dir", _DATA_DIR.value)
    if os.environ.get(DATA_VARIABLE):
        return cli.input_folder(f"data_dir (${DATA_VARIABLE})", os.environ[DATA_VARIABLE])
    return SHARED_DATA if SHARED_DATA.is_dir() else None


def plan_of(model: LoadedModel, engine: Engine) -> dict[str, Any]:
    """What the answers depend on besides the model, as a sweep's cells call it."""
    kv_format = ENGINE.value("kv_format")
    cache = {} if kv_format == "float32" else {"kv_format": kv_format}
    if ENGINE.low_format is None:
        return {"signal": "native", **cache}
    low_sha256 = low_experts(model, ENGINE.low_format).sha256()
    low = {"low_format": ENGINE.low_format, "sha256": low_sha256, **cache}
    if not ENGINE.keeps_low_copies:
        return {"signal": "uniform", **low}
    names = ("miss_mode", "low_share", "policy", "pin_share", "profile")
    return {
        "signal": "residency",
        **low,
        **{name: ENGINE.value(name) for name in names},
        "budget_bytes": engine.pool.budget_bytes,
        "batch_size": _BATCH_SIZE.value,
    }


def out_path(workdir: Path, asked: dict[str, Any]) -> Path:
    """Where the record goes: not over one of other settings, unless --out says so."""
    if _OUT.value:
        return cli.output_file("out", _OUT.value)
    path = workdir / "evaluation.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8")).get("asked")
    except FileNotFoundError:
        return path
    except (ValueError, AttributeError):
        known = None
    if known == asked:
        return path
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return workdir / f"evaluation-{digest[:12]}.json"


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
    data, workdir = data_folder(), cli.output_folder("workdir", str(_WORKDIR.value))
    if _OUT.value:
        cli.output_file("out", _OUT.value)
    model = ENGINE.load_model()
    engine = ENGINE.make_engine(model)
    plan = plan_of(model, engine)
    asked = {
        "model_sha256": model.file.sha256(),
        "plan": plan,
        "settings": {**vars(settings), "tasks": list(settings.tasks)},
        "implementation": ENGINE.value("implementation"),
        "budget_mib": ENGINE.value("budget_mib"),
    }
    out = out_path(workdir, asked)
    record = evaluate_engine(engine, settings, plan, data, workdir / "responses")
    record |= {"asked": asked, "budget_bytes": engine.pool.budget_bytes}
    write_json(out, record)
    for name in record["missing_protections"] or ():
        print(f"warning: generated code ran with {PROTECTIONS[name]} ({name})", file=sys.stderr)
    print(json.dumps(record) if _JSON.value else f"{table(record)}\nwritten: {out}")


if __name__ == "__main__":
    cli.run(main)
