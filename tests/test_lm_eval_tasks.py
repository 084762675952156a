"""lm-eval's benchmarks on our engine: every figure against a computation by hand.

The engine below the adapter is scripted and knows a known share of the answers; problems,
prompts and filters are the real ones. Then the whole way on real models.
"""

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install -e '.[eval]'")

from lm_eval_oracles import Scripted, expected_rolling, scripted_lm, write_one_layer

from hobbit_jax import reference
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.evals import tasks as direct_tasks
from hobbit_jax.evals.benchmarks import (
    BenchmarkSettings,
    as_record,
    evaluate,
    evaluate_engine,
    rows,
    shares,
)
from hobbit_jax.evals.lm_eval_tasks import load_tasks, wikitext_pages
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.models.loading import load_model
from hobbit_jax.record import read_records
from hobbit_jax.synthetic_tasks import arithmetic, functions

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_one_layer(tmp_path_factory.mktemp("one_layer")), "xla")


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return model.tokenizer()


def run(lm, *names, data_dir=None, limit=None):
    settings = BenchmarkSettings(names, limit)
    return evaluate(lm, settings, data_dir)["tasks"]


def figures(task) -> dict[tuple[str, str], dict]:
    return {(m["metric"], m["filter"]): m for m in task["metrics"]}


# Figures by hand, on the real data sets, through lm-eval's prompts and filters


def lines(path: Path) -> list[dict]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def expect(metric: dict, correct: int, total: int) -> None:
    p = correct / total
    assert metric["value"] == pytest.approx(p)
    assert metric["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (total - 1)))
    assert metric["low"] < p < metric["high"] and metric["higher_is_better"]


def test_gsm8k_by_hand(tokenizer, data_dir):
    """Of 12 problems, 5 are answered in the format, 3 outside of it, and 4 wrongly."""
    problems = lines(data_dir / "gsm8k" / "test.jsonl")[:12]
    number = {p["question"]: i for i, p in enumerate(problems)}
    seen = []

    def answer(prompt):
        shots = prompt.split("Question: ")
        assert prompt.endswith("\nAnswer:") and shots[0] == ""
        seen.append(shots)
        index = number[shots[-1].removesuffix("\nAnswer:")]
        truth = problems[index]["answer"].split("#### ")[1]
        if index < 5:
            return f" {problems[index]['answer']}\n\nQuestion: And 2 + 2?\nAnswer: #### 4"
        return f" It is ${truth}." if index < 8 else " 1 + 1 = 2\n#### 123456789"

    lm = scripted_lm(tokenizer, answer, max_new_tokens=1024)  # a token here is a letter
    task = run(lm, "gsm8k", data_dir=data_dir, limit=12)["gsm8k"]
    expect(figures(task)["exact_match", "strict-match"], 5, 12)
    expect(figures(task)["exact_match", "flexible-extract"], 8, 12)
    assert (task["problems"], task["problems_in_all"], task["num_fewshot"]) == (12, 1319, 5)
    # The examples that `lm_eval --tasks gsm8k` draws, in the order of the problems.
    train, draw = lines(data_dir / "gsm8k" / "train.jsonl"), random.Random(1234)
    for problem in problems:
        examples = [f"{p['question']}\nAnswer: {p['answer']}\n\n" for p in draw.sample(train, 5)]
        assert ["", *examples, f"{problem['question']}\nAnswer:"] in seen


def test_gsm8k_cot_by_hand(tokenizer, data_dir):
    problems = lines(data_dir / "gsm8k" / "test.jsonl")[:6]
    number = {p["question"]: i for i, p in enumerate(problems)}

    def answer(prompt):
        shots = prompt.split("Q: ")
        assert len(shots) == 10 and all("The answer is" in shot for shot in shots[1:9])
        index = number[shots[-1].removesuffix("\n\nA:").removesuffix("\nA:")]
        truth = problems[index]["answer"].split("#### ")[1]
        if index < 3:
            return f" So there are many. The answer is {truth}.\n\nQ: more? A: 7"
        return f" {truth}" if index == 3 else " The answer is 123456789."

    lm = scripted_lm(tokenizer, answer)
    task = run(lm, "gsm8k_cot", data_dir=data_dir, limit=6)["gsm8k_cot"]
    expect(figures(task)["exact_match", "strict-match"], 3, 6)
    expect(figures(task)["exact_match", "flexible-extract"], 4, 6)
    assert task["num_fewshot"] == 8


def test_humaneval_by_hand(data_dir):
    """All 164 problems; a third is answered wrongly, in ways that a suite must survive.

    With the vocabulary of Llama, whose spaces are part of its words.
    """
    tokenizer = Tokenizer(open_gguf(data_dir / "vocab" / "ggml-vocab-llama-spm.gguf"))
    problems = lines(data_dir / "humaneval" / "HumanEval.jsonl.gz")
    number = {p["prompt"]: i for i, p in enumerate(problems)}
    wrong = {
        0: ("    while True: pass\n", "timed out"),
        3: ("    import os\n    while True: os.fork()\n", "PermissionError"),
        6: ("    return bytearray(10 << 30)\n", "MemoryError"),
        9: ("    import sys; sys.exit(0)\n", "SystemExit"),
        12: ("    import os; os._exit(0)\n", "ended"),
        15: ("    return (\n", "SyntaxError"),
        18: ("    import os; os.kill(os.getppid(), 9)\n", "PermissionError"),
        21: ("    return input()\n", "EOFError"),
        27: ('    raise type("passed", (Exception,), {})\n', "raised"),
        24: ("    import urllib.request as r\n    r.urlopen('http://a.b')\n", "URLError"),
    }
    plainly_wrong = ("    raise ValueError\n", "ValueError")

    def answer(prompt):
        index = number[prompt.removeprefix("<s>")]
        if index % 3:
            return problems[index]["canonical_solution"] + "\nprint(never printed"
        return wrong.get(index, plainly_wrong)[0] + "\n# and so on"

    lm = scripted_lm(tokenizer, answer, batch_size=41)
    task = run(lm, "humaneval", data_dir=data_dir)["humaneval"]
    right = sum(1 for i in range(164) if i % 3)
    expect(figures(task)["pass@1", "create_test"], right, 164)
    verdicts = Counter(wrong.get(i, plainly_wrong)[1] for i in range(0, 164, 3))
    # Tests that expect an exception may themselves catch what the candidate raises.
    assert task["verdicts"] == {"passed": right, **verdicts}


def test_wikitext_by_hand(tokenizer, data_dir):
    """Every token of a page has probability 1/V; lm-eval counts the words of the raw page."""
    pages = wikitext_pages((data_dir / "wikitext2" / "test.txt").read_text(encoding="utf-8"))
    assert len(pages) == 62  # lm-eval's number of test documents
    assert all(page.lstrip().startswith("= ") for page in pages)
    # Texts of the tiny tokenizer are long; the last pages are read, by name of the data folder.
    lm = scripted_lm(tokenizer, None, context=2048)
    task = run(lm, "wikitext", data_dir=data_dir, limit=2)["wikitext"]
    loaded = load_tasks(["wikitext"], data_dir)["wikitext"]
    assert [doc["page"] for doc in loaded.eval_docs] == pages
    tokens = sum(len(tokenizer.encode(loaded.doc_to_target({"page": p}))) for p in pages[:2])
    words = sum(len(re.split(r"\s+", p)) for p in pages[:2])
    log_p = -tokens * math.log(len(tokenizer.byte_lengths()))
    got = figures(task)
    assert got["word_perplexity", "none"]["value"] == pytest.approx(math.exp(-log_p / words))
    n_bytes = sum(len(p.encode()) for p in pages[:2])
    assert got["bits_per_byte", "none"]["value"] == pytest.approx(-log_p / n_bytes / math.log(2))
    assert not got["bits_per_byte", "none"]["higher_is_better"]


def test_miniature_tasks_by_hand(tokenizer, monkeypatch):
    sums = arithmetic.generate(direct_tasks.HELD_OUT_SEED, 10, "heldout")
    programs = functions.generate(direct_tasks.HELD_OUT_SEED, 10, "heldout")
    solutions = {p.prompt: p.solution for p in [*sums, *programs]}
    known = {p.prompt for p in [*sums[:7], *programs[:4]]}

    def answer(prompt):
        if prompt not in known:
            return " 1 + 1 = 2\n#### 999\n" if prompt.startswith("Q:") else "    return 'no'\n"
        return solutions[prompt] + ("Q: more" if prompt.startswith("Q:") else "\ndef g(): pass")

    # A token here is a letter, of which the direct path allows too few for the longest answers.
    monkeypatch.setitem(direct_tasks.MAX_NEW_TOKENS, "arithmetic", 256)
    monkeypatch.setitem(direct_tasks.MAX_NEW_TOKENS, "functions", 256)
    tasks = run(scripted_lm(tokenizer, answer), "mini_arithmetic", "mini_functions", limit=10)
    # The same as the scores that a sweep measures without lm-eval.
    direct = direct_tasks.evaluate(Scripted(tokenizer, answer), tokenizer, 10)
    for name, correct in (("arithmetic", 7), ("functions", 4)):
        expect(figures(tasks[f"mini_{name}"])["exact_match", "none"], correct, 10)
        share = direct[name]
        assert sum(share["solved"]) == correct
        assert shares({"tasks": tasks})[f"mini_{name}"] == share


def test_unknown_tasks_and_absent_data(tmp_path):
    for names in (("gsm9k",), (), ("gsm8k", "gsm8k")):
        with pytest.raises(ValueError, match=r"; want some of gsm8k, gsm8k_cot, humaneval"):
            BenchmarkSettings(names)
    for name, missing in (("gsm8k", "train.jsonl"), ("wikitext", "valid.txt")):
        with pytest.raises(FileNotFoundError, match=missing):
            load_tasks([name], tmp_path)
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"HumanEval.jsonl.gz is not the JSON lines"):
        load_tasks(["humaneval"], tmp_path)


# The whole way, on the shipped model


@pytest.mark.slow
def test_the_shipped_model_on_real_data(data_dir, tmp_path):
    model = load_model(reference.model_path(), "xla")
    engine = Engine(model, HostExperts(model.config, model.file), CacheConfig(4 << 20))
    settings = BenchmarkSettings(
        ("gsm8k", "humaneval", "wikitext"), 1, max_length=128, max_new_tokens=8, batch_size=1
    )
    plan = {"signal": "native"}
    record = evaluate_engine(engine, settings, plan, data_dir, tmp_path)
    assert record["requests"]["generated"] == 2 and record["requests"]["truncated_contexts"] >= 1
    assert all(record["tasks"][name]["problems"] == 1 for name in settings.tasks)
    assert record["model"]["model_sha256"] == model.file.sha256()
    # lm-eval's perplexity, once more, in float64.
    tokenizer = model.tokenizer()
    task = load_tasks(["wikitext"], data_dir)["wikitext"]
    page = task.eval_docs[0]["page"]
    ids = tokenizer.encode(task.doc_to_target({"page": page}), add_bos=False)
    prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    log_p = expected_rolling(engine, ids, prefix, 128)
    got = figures(record["tasks"]["wikitext"])["word_perplexity", "none"]["value"]
    assert math.log(got) == pytest.approx(-log_p / len(re.split(r"\s+", page)), rel=1e-5)
    again = evaluate_engine(engine, settings, plan, data_dir, tmp_path)
    assert again["requests"]["reused"] == 3 and again["requests"]["scored"] == 0
    assert again["tasks"] == record["tasks"]
    assert json.loads(json.dumps(record)) == record
    kept = as_record(record, {}, 1.0)
    assert set(kept.versions) >= {"lm_eval", "jax"}
    assert sum(name.endswith("_stderr") for name in kept.metrics) == len(rows(record)) == 2 + 1 + 3
    assert set(shares(record)) == {"gsm8k", "humaneval"}
    assert {score["problems"] for score in shares(record).values()} == {1}


@pytest.mark.slow
def test_the_script(model, tmp_path):
    script = REPOSITORY / "scripts" / "evaluate.py"
    args = ("--tasks=mini_functions", "--limit=2", "--max_new_tokens=2", "--budget_mib=8")
    done = subprocess.run(
        [sys.executable, script, f"--model={model.file.paths[0]}", "--low_format=Q2_K", *args],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    (record,) = read_records(tmp_path / "out" / "evaluate").found
    assert record.interval("mini_functions_exact_match").value == 0.0
    assert "| mini_functions | exact_match |" in done.stdout
    assert record.setting["low_format"] == "Q2_K" and record.setting["budget_mib"] == 8
    assert "missing_protections" in record.notes
    assert not list(tmp_path.glob(".*"))  # no data set and no cache at home
