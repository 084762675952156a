"""lm-eval's benchmarks on an engine: one call, one JSON-able record with intervals.

Scores and standard errors are lm-eval's own; intervals are this room's.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED

from hobbit_jax.code_runner import missing_protections
from hobbit_jax.evals.lm_eval_model import EngineLM
from hobbit_jax.evals.lm_eval_tasks import TASKS, load_tasks
from hobbit_jax.evals.responses import Responses
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.chat_template import ChatTemplate
from hobbit_jax.record import Benchmark, Record, machine, measured
from hobbit_jax.statistics import Interval, bootstrap, share

_RUNNING_CODE = ("humaneval", "mini_functions")
STUDY = "benchmarks"


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured, and how much of it.

    `limit`, `max_length` and `max_new_tokens` are without bound when None (see `EngineLM`);
    `num_fewshot` is the task's own when None; `chat_template` wraps prompts in the file's.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    max_new_tokens: int | None = None
    chat_template: bool = False

    def __post_init__(self):
        names = self.tasks
        if not names or not set(names) <= set(TASKS) or len(set(names)) < len(names):
            raise ValueError(
                f"tasks are {', '.join(names) or 'none'}; want some of {', '.join(TASKS)}"
            )


def evaluate_engine(
    engine: Engine,
    settings: BenchmarkSettings,
    plan: Mapping[str, Any],
    data_dir: Path | None,
    responses_dir: Path | None = None,
) -> dict[str, Any]:
    """Runs the tasks of `settings` on `engine`, going on from what `responses_dir` holds.

    `plan` names the engine's precision plan and precisions, as JSON: two engines on one file whose
    answers may differ must differ here. Their budget changes no score.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: from the tasks and the model.
    """
    file, tokenizer = engine.model.file, engine.model.tokenizer()
    answers_depend_on = {
        "model_sha256": file.sha256(),
        "plan": dict(plan),
        "implementation": engine.model.implementation,
        "max_length": settings.max_length,
        "max_new_tokens": settings.max_new_tokens,
        "eog_ids": list(tokenizer.eog_ids),
    }
    lm = EngineLM(
        engine,
        tokenizer,
        Responses(responses_dir, answers_depend_on),
        chat=ChatTemplate.from_gguf(file, tokenizer) if settings.chat_template else None,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        max_new_tokens=settings.max_new_tokens,
    )
    return {
        "model": {"name": file.paths[0].name, **answers_depend_on},
        **evaluate(lm, settings, data_dir),
    }


def evaluate(lm: EngineLM, settings: BenchmarkSettings, data_dir: Path | None) -> dict[str, Any]:
    """Scores, counts and protections of `settings.tasks` on a language model of lm-eval's kind."""
    tasks = load_tasks(settings.tasks, data_dir, settings.limit)
    for task in tasks.values():
        # As `lm_eval.simple_evaluate` does, without its global seeds: the same few-shot examples.
        asked, own = settings.num_fewshot, task.get_config("num_fewshot")
        if asked and own == 0:
            raise ValueError(
                f"num_fewshot is {asked}, and {task.config.task} has no examples; leave it out, or "
                "ask other tasks"
            )
        task.set_config(key="num_fewshot", value=(own or 0) if asked is None else asked)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    results: Any = evaluator.evaluate(
        lm,
        {"tasks": tasks},
        limit=settings.limit,
        apply_chat_template=settings.chat_template,
        fewshot_as_multiturn=settings.chat_template,
        confirm_run_unsafe_code=True,  # it runs in `hobbit_jax.code_runner`
    )
    runs_code = any(name in _RUNNING_CODE for name in settings.tasks)
    return {
        "tasks": {name: _task_record(name, task, results) for name, task in tasks.items()},
        "requests": asdict(lm.counts),
        "missing_protections": list(missing_protections()) if runs_code else None,
    }


def _task_record(name: str, task: Task, results: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one task, with Wilson's interval of a share and the bootstrap over documents
    of anything else."""
    samples = results["samples"][name]
    aggregations: Any = task.aggregation()
    metrics = []
    for key, value in results["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        values = [s[metric] for s in samples if s["filter"] == filter_name]
        correct = int(sum(values)) if all(value in (0, 1) for value in values) else None
        if correct is not None:
            interval = share(correct, len(values))
        else:
            aggregate = aggregations[metric]
            interval = bootstrap(
                lambda drawn, f=aggregate, v=values: f([v[i] for i in drawn]), len(values)
            )
        stderr = results["results"][name][f"{metric}_stderr,{filter_name}"]
        metrics.append(
            {
                "metric": metric,
                "filter": filter_name,
                **vars(interval),
                "value": float(value),
                "correct": correct,
                "solved": None if correct is None else [int(value) for value in values],
                "stderr": None if stderr == "N/A" else float(stderr),
                "higher_is_better": bool(results["higher_is_better"][name][metric]),
            }
        )
    counts = results["n-samples"][name]
    record = {
        "problems": counts["effective"],
        "problems_in_all": counts["original"],
        "num_fewshot": results["n-shot"][name],
        "task_version": results["versions"][name],
        "metrics": metrics,
    }
    if name == "humaneval":
        attempts = [attempt for s in samples for attempt in s["filtered_resps"][0]]
        record["verdicts"] = dict(Counter(attempt["verdict"] for attempt in attempts))
    return record


def shares(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The first metric of the tasks that score a share of problems, as a sweep's record has it.

    `solved` has 1 or 0 for each problem in order, so that two plans can be compared one by one.
    """
    kept = ("correct", "value", "low", "high", "solved")
    return {
        name: {"problems": task["problems"]} | {key: task["metrics"][0][key] for key in kept}
        for name, task in found["tasks"].items()
        if task["metrics"][0]["correct"] is not None
    }


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every metric of every task of what `evaluate` found, with its interval."""
    return [
        {**m, "task": name, "problems": task["problems"],
         "interval": Interval(m["value"], m["low"], m["high"])}
        for name, task in found["tasks"].items()
        for m in task["metrics"]
    ]  # fmt: skip


def as_record(found: Mapping[str, Any], setting: Mapping[str, Any], seconds: float) -> Record:
    """The record of what `evaluate_engine` found under `setting`."""
    metrics = {
        "_".join([row["task"], row["metric"], row["filter"]]).removesuffix("_none"): {
            "value": row["interval"], "stderr": row["stderr"], "problems": row["problems"]
        }
        for row in rows(found)
    }  # fmt: skip
    verdicts = {
        name: task["verdicts"] for name, task in found["tasks"].items() if "verdicts" in task
    }
    missing = ", ".join(found["missing_protections"] or ())
    others = {"requests": found["requests"], "verdicts": verdicts, "missing_protections": missing}
    kept = replace(
        measured(metrics | others), file_sha256={"model": found["model"]["model_sha256"]}
    )
    packages = {name: metadata.version(name) for name in ("lm_eval", "datasets", "jinja2")}
    here = {**machine(), "versions": machine()["versions"] | packages}
    seconds = round(seconds, 2)
    return Record(STUDY, Benchmark(STUDY, setting), **vars(kept), **here, seconds=seconds)
