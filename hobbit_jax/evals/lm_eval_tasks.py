"""Task definitions for lm-eval: its own ones on local files, and the miniature tasks.

Prompts, filters and metrics are the installed lm-eval's; only what needs a network is replaced: the
documents (when there is a data folder), and HumanEval's metric, which lm-eval fetches from a hub.
"""

import gzip
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template
from tqdm import tqdm

from hobbit_jax.code_runner import run_code
from hobbit_jax.evals.tasks import HELD_OUT_SEED, MAX_NEW_TOKENS
from hobbit_jax.evals.tasks import TASKS as MINIATURES

_GSM8K = {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}
# Where each of lm-eval's own tasks is defined, below its `tasks` folder, and what a data folder
# holds of its splits.
_OWN = {
    "gsm8k": ("gsm8k/gsm8k.yaml", _GSM8K),
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml", _GSM8K),
    "humaneval": ("humaneval/humaneval.yaml", {"test": "humaneval/HumanEval.jsonl.gz"}),
    "wikitext": (
        "wikitext/wikitext.yaml",
        {"validation": "wikitext2/valid.txt", "test": "wikitext2/test.txt"},
    ),
}
_MINI = "mini_"
TASKS = (*_OWN, *(_MINI + name for name in MINIATURES))

MINIATURE_PROBLEMS = 200  # unless a limit asks for another number
_PROGRAM_TIMEOUT_S = 3.0  # as in the metric that lm-eval fetches (`code_eval`)


def load_tasks(
    names: Sequence[str], data_dir: Path | None, limit: int | None = None
) -> dict[str, Task]:
    """The named tasks, ready for `lm_eval.evaluator.evaluate`.

    Args:
        names: of TASKS.
        data_dir: holds `gsm8k/{train,test}.jsonl`, `humaneval/HumanEval.jsonl.gz` and
            `wikitext2/{valid,test}.txt`; None lets lm-eval download its own.
        limit: problems per task; only the miniature tasks, which are generated, look at it here.

    Raises:
        ValueError: a damaged file.
        FileNotFoundError: a data file is missing; says which.
        NotImplementedError: an lm-eval whose definitions have moved.
    """
    configs = []
    for name in names:
        if name.startswith(_MINI):
            count = MINIATURE_PROBLEMS if limit is None else limit
            configs.append(_miniature(name.removeprefix(_MINI), count))
            continue
        definition, files = _OWN[name]
        path = Path(lm_eval.tasks.__file__).parent / definition
        if not path.is_file():
            raise NotImplementedError(f"this version of lm-eval has no tasks/{definition}")
        # HumanEval's module fetches a metric as soon as it is imported, so it never must be.
        config = load_yaml(path, resolve_func=name != "humaneval")
        if data_dir is not None:
            config["custom_dataset"] = _documents(name, files, data_dir)
            if name == "wikitext":  # it names a training split, and never uses it
                config["training_split"] = None
        if name == "humaneval":
            config |= _humaneval_scoring(config["doc_to_target"])
        configs.append(config)
    # It remarks on documents and metrics of its own tasks.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    return {config["task"]: manager.load(config)["tasks"][config["task"]] for config in configs}


# Documents


def _documents(
    name: str, files: dict[str, str], data_dir: Path
) -> Callable[..., dict[str, datasets.Dataset]]:
    """What lm-eval calls for a task's documents, with metadata that does not matter here."""
    missing = [file for file in files.values() if not (data_dir / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{data_dir} has no {' and no '.join(missing)}, which the task {name} reads; name the "
            "folder that has it (--data_dir, or data_dir in a config)"
        )
    return lambda **_: {
        split: datasets.Dataset.from_list(_read(data_dir / file)) for split, file in files.items()
    }


def _read(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
        if path.suffix == ".txt":
            return [{"page": page} for page in wikitext_pages(text)]
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        kind = "UTF-8 text" if path.suffix == ".txt" else "JSON lines"
        raise ValueError(f"{path} is not the {kind} it should be: {error}") from error


def wikitext_pages(text: str) -> list[str]:
    """WikiText's articles, cut where lm-eval's data set is: before each title of first rank."""
    pages = re.split(r"\n(?= *= (?!=).*(?<!=) = *$)", text, flags=re.MULTILINE)
    return [page for page in pages if page.strip()]


# HumanEval's verdicts


def _humaneval_scoring(target_template: str) -> dict[str, Any]:
    """Filter and metric that run a problem's tests on prompt and completion.

    The program is the one that lm-eval's metric runs: candidate, newline, tests.
    """

    def run_one(completion: str, doc: dict) -> dict[str, str]:
        program = f"{doc['prompt']}{completion}\n{apply_template(target_template, doc)}"
        outcome = run_code(program, timeout_s=_PROGRAM_TIMEOUT_S)
        verdict = outcome.detail or outcome.status
        if outcome.status == "finished":
            verdict = "passed"
        elif verdict == "passed":  # what a program calls its exceptions is no verdict
            verdict = outcome.status
        return {"program": program, "verdict": verdict}

    def run_all(responses: list[list[str]], docs: list[dict]) -> list[list[dict[str, str]]]:
        bar = tqdm(docs, desc="running programs", leave=False, disable=None)
        return [
            [run_one(completion, doc) for completion in attempts]
            for attempts, doc in zip(responses, bar, strict=True)
        ]

    def pass_at_1(doc: dict, results: list[list[dict[str, str]]]) -> dict[str, float]:
        verdicts = Counter(attempt["verdict"] for attempt in results[0])
        return {"pass@1": verdicts["passed"] / verdicts.total()}

    return {
        "filter_list": [
            {"name": "create_test", "filter": [{"function": "custom", "filter_fn": run_all}]}
        ],
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "process_results": pass_at_1,
    }


# The miniature tasks


def _miniature(name: str, count: int) -> dict[str, Any]:
    """A task of generated problems; each document knows its problem by number."""
    problems = MINIATURES[name].generate(HELD_OUT_SEED, count, "heldout")
    documents = [
        {"number": number, "prompt": problem.prompt, "solution": problem.solution}
        for number, problem in enumerate(problems)
    ]

    def process_results(doc: dict, results: list[str]) -> dict[str, float]:
        problem = problems[doc["number"]]
        return {"exact_match": float(MINIATURES[name].score(problem, results[0]))}

    return {
        "task": _MINI + name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{solution}}",
        "generation_kwargs": {
            # A function ends where its body does, which its verdict knows better than a string.
            "until": ["Q:"] if name == "arithmetic" else [],
            "max_gen_toks": MAX_NEW_TOKENS[name],
            "do_sample": False,
        },
        "num_fewshot": 0,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "process_results": process_results,
        "metadata": {"version": 1.0},
    }
