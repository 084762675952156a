"""lm-eval on our engine: every figure against a computation by hand.

The adapter runs over a `Scripted` engine that knows a known share of the answers, and over real
tiny models, whose likelihoods are computed a second time in float64 from single sequences.
"""

import gzip
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance
from tiny_models import TinyModel, write_model

from hobbit_jax import reference
from hobbit_jax.chat_template import ChatTemplate
from hobbit_jax.engine import Engine
from hobbit_jax.evals import tasks as direct_tasks
from hobbit_jax.evals.benchmarks import (
    BenchmarkSettings,
    end_ids,
    evaluate,
    evaluate_engine,
    shares,
    table,
)
from hobbit_jax.evals.lm_eval_model import EngineLM
from hobbit_jax.evals.lm_eval_tasks import load_tasks, wikitext_pages
from hobbit_jax.evals.responses import Responses
from hobbit_jax.gguf_file import open_gguf, write_gguf
from hobbit_jax.loading import load_model
from hobbit_jax.minitasks import arithmetic, functions
from hobbit_jax.store import HostExperts
from hobbit_jax.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
EOS = 257  # of the tiny models


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("task", i, 1)) for i, args in enumerate(arguments)]


# One layer in simple formats: a program is compiled for every shape that a test asks for.
ONE_LAYER = TinyModel(
    "qwen3moe", 7, 4, 2, 64, 4, 2, 1e6, 1e-6,
    experts=(("Q8_0", "Q8_0", "Q8_0"),),
    dense=("F16", "F16", "F16", "F16", "F32", "F16", "F16"),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("one_layer") / "tiny.gguf"
    write_model(ONE_LAYER, path)
    return load_model(path)


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return model.tokenizer()


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, HostExperts(model.config, model.file), chunk_tokens=64)


class Scripted:
    """An engine that continues a prompt as `answer(text)` says, token by token, and then ends.

    As a real one, it goes on with a sequence until its end token, whatever has been written.
    """

    def __init__(self, tokenizer, answer, context: int = 8192):
        self.config = SimpleNamespace(context_length=context, vocab_size=tokenizer.vocab_size)
        self.tokenizer, self.answer = tokenizer, answer
        self.calls: list[tuple] = []

    def score(self, ids_BT):
        """Every token is as probable as any other."""
        return jnp.zeros((*ids_BT.shape, self.config.vocab_size), jnp.float32)

    def generate(self, prompts, max_new_tokens, sampling=None, stop_ids=()):
        self.calls.append((prompts, max_new_tokens, sampling, stop_ids))
        assert max(map(len, prompts)) + max_new_tokens <= self.config.context_length
        texts = [self.answer(self.tokenizer.decode(prompt)) for prompt in prompts]
        rows = [[*self.tokenizer.encode(text, add_bos=False), *stop_ids[:1]] for text in texts]
        for step in range(max_new_tokens):
            ids = [row[step] if step < len(row) else stop_ids[0] for row in rows]
            ids_B = np.asarray([-1 if token in stop_ids else token for token in ids])
            if (ids_B < 0).all():
                return
            yield ids_B, None


def scripted_lm(tokenizer, answer, responses=None, context=8192, **options) -> EngineLM:
    fake = Scripted(tokenizer, answer, context)
    return EngineLM(fake, tokenizer, responses, progress=False, **options)


def run(lm, *names, data_dir=None, limit=None):
    settings = BenchmarkSettings(names, limit)
    return evaluate(lm, settings, data_dir, progress=False)["tasks"]


def figures(task) -> dict[tuple[str, str], dict]:
    return {(m["metric"], m["filter"]): m for m in task["metrics"]}


# Likelihoods on a real model


def log_softmax(engine, ids, width: int = 64) -> np.ndarray:
    """Of one sequence alone, in float64; filled up to one length with what must not matter."""
    filled_T = np.asarray([*ids, *[7] * (width - len(ids))], np.int32)
    logits_TV = np.asarray(engine.score(filled_T[None])[0, : len(ids)], np.float64)
    return logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))


def expected_score(engine, context, continuation) -> tuple[float, bool]:
    ids = context + continuation
    log_p_TV = log_softmax(engine, ids[:-1])[len(context) - 1 :]
    log_p = log_p_TV[np.arange(len(continuation)), continuation].sum()
    return log_p, bool((log_p_TV.argmax(axis=-1) == continuation).all())


TEXTS = (
    ("she said", " hello there"),
    ("he", "he"),
    ("", "a text without context"),
    ("a context with spaces at its end  ", "word"),
    ("short", "!"),
    ("exactly as long as the model's context is, in its ", "tokens: 64"),
)


def test_loglikelihood_is_the_sum_of_log_softmax(engine, tokenizer):
    def ids(text):
        return tokenizer.encode(text)

    expected = [
        expected_score(
            engine,
            *((ids(c), ids(c + t)[len(ids(c)) :]) if c else ([EOS], ids(t)))
            if not c.endswith(" ")
            else (ids(c.rstrip()), ids(c + t)[len(ids(c.rstrip())) :]),
        )
        for c, t in TEXTS
    ]
    for batch_size in (1, 3):
        lm = EngineLM(engine, tokenizer, batch_size=batch_size, progress=False)
        got = lm.loglikelihood(requests("loglikelihood", *TEXTS))
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([p for p, _ in got], [p for p, _ in expected], atol=2e-4)
        assert lm.counts.truncated_contexts == 0 and lm.counts.scored == len(TEXTS)


def test_a_context_too_long_is_cut_from_the_left(engine, tokenizer):
    long = "x" * 100
    lm = EngineLM(engine, tokenizer, progress=False)
    ((log_p, _),) = lm.loglikelihood(requests("loglikelihood", (long, "yz")))
    kept = tokenizer.encode(long)[-63:]  # 65 tokens, of which the last is only predicted
    np.testing.assert_allclose(
        log_p, expected_score(engine, kept, tokenizer.encode("yz"))[0], atol=2e-4
    )
    assert lm.counts.truncated_contexts == 1
    with pytest.raises(ValueError, match=r"continuation of 65 tokens; want 1 to .* 64"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 65)))
    for refused in ({"max_length": 65}, {"max_length": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="want"):
            EngineLM(engine, tokenizer, **refused)


def expected_rolling(engine, ids, prefix: int, width: int) -> float:
    """Every token once, after as much context as `width` allows."""
    stream, total, done = [prefix, *ids], 0.0, 0
    while done < len(ids):
        end = min(len(ids), done + width)
        start = max(0, end - width)
        log_p_TV = log_softmax(engine, stream[start:end], max(width, 64))
        total += sum(log_p_TV[i - start, ids[i]] for i in range(done, end))
        done = end
    return total


def test_rolling_likelihood(engine, tokenizer):
    texts = [("the rain in spain " * 9)[:150], "short", "", "x" * 16, "one"]
    lm = EngineLM(engine, tokenizer, max_length=16, batch_size=3, progress=False)
    got = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", *[(t,) for t in [*texts, texts[1]]])
    )
    expected = [expected_rolling(engine, tokenizer.encode(text), EOS, 16) for text in texts]
    np.testing.assert_allclose(got, [*expected, expected[1]], atol=1e-3)
    assert got[2] == 0


# Generation


def test_generation_is_the_engines_up_to_a_stop_string(engine, tokenizer):
    prompts = ["one", "a longer prompt than that", "he he he"]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    # Room for 64 tokens, as the adapter rounds it; 12 of them are looked at.
    steps = engine.generate(encoded, 64 - max(map(len, encoded)), stop_ids=[EOS])
    rows = np.stack([ids_B for ids_B, _ in itertools.islice(steps, 12)], axis=1).tolist()
    alone = ["".join(tokenizer.decode_stream(t for t in row if t >= 0)) for row in rows]
    lm = EngineLM(engine, tokenizer, batch_size=3, progress=False)

    def generate(stops):
        options = {"until": stops, "max_gen_toks": 12, "do_sample": False}
        return lm.generate_until(requests("generate_until", *[(p, options) for p in prompts]))

    assert generate([]) == alone
    stops = [text[4:6] for text in alone]  # of two tokens or more
    expected = [min((t.split(stop)[0] for stop in stops), key=len) for t in alone]
    assert all(text and len(text) < len(whole) for text, whole in zip(expected, alone, strict=True))
    assert generate(stops) == expected

    # What greedy decoding writes is greedy, and nothing else.
    other = [*rows[1][:5], (rows[1][5] + 1) % 256]
    pairs = [
        (("", ""), encoded[0], rows[0][:6]),
        (("", ""), encoded[1], other),
        (("", ""), encoded[2], rows[2][:3]),
    ]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs)] == [True, False, True]


def test_stop_strings_limits_and_end_tokens(tokenizer):
    written = "He said\n\nQ: next question and é and more"
    lm = scripted_lm(tokenizer, lambda _: written, batch_size=2)

    def generate(**options):
        (text,) = lm.generate_until(requests("generate_until", ("prompt", options)))
        return text

    assert generate(until=[]) == written
    before = lm.counts.new_tokens
    assert generate(until="\n\nQ:") == "He said"
    assert lm.counts.new_tokens == before + len(tokenizer.encode("He said\n\nQ:"))
    assert generate(until=["question", "said\n"]) == "He "
    assert generate(until=["absent", ""]) == written
    cut = written[: len(tokenizer.decode(tokenizer.encode(written)[:5]))]
    before = lm.counts.new_tokens
    assert generate(until=[], max_gen_toks=5) == cut
    assert lm.counts.new_tokens == before + 5
    assert generate(until=[], max_new_tokens=5) == cut  # Hugging Face's name for it
    at = len(tokenizer.encode(written[: written.index("é")])) + 1
    assert generate(until=[], max_gen_toks=at).endswith("and \ufffd")  # half a character
    assert scripted_lm(tokenizer, lambda _: "").generate_until(
        requests("generate_until", ("", {"until": []}))
    ) == [""]
    # Every batch asks for the same round length, whatever the limit: one program serves them.
    assert {len(rows[0]) + room for rows, room, _, _ in lm._engine.calls} <= {64, 512}
    with pytest.raises(NotImplementedError, match=r"top_k; supported are do_sample"):
        generate(until=[], top_k=5)


def test_sampling_options_reach_the_engine_and_are_not_remembered(tokenizer):
    lm = scripted_lm(tokenizer, lambda _: "text", batch_size=1)
    hot = {"until": [], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    cold = {"until": [], "do_sample": False, "temperature": 0.7}
    asked = requests("generate_until", ("p", hot), ("p", hot), ("p", cold))
    for _ in range(2):
        assert lm.generate_until(asked) == ["text"] * 3
    sampling = [(s.temperature, s.top_p, s.seed) for _, _, s, _ in lm._engine.calls]
    assert sampling == [(0.7, 0.9, 0), (0.7, 0.9, 1), (0.0, 1.0, 2), (0.7, 0.9, 0), (0.7, 0.9, 1)]
    assert lm.reused == 1


def test_prompts_are_cut_from_the_left_and_counted(tokenizer):
    lm = scripted_lm(tokenizer, lambda _: "x" * 200, context=100, batch_size=4)
    prompt = "".join(chr(97 + i % 26) for i in range(300))

    def generate(limit):
        lm.generate_until(requests("generate_until", (prompt, {"max_gen_toks": limit})))
        rows, room, _, _ = lm._engine.calls[-1]
        return tokenizer.decode(rows[0]), room

    assert generate(30) == (prompt[-70:], 30)
    assert (lm.counts.truncated_contexts, lm.counts.shortened_generations) == (1, 0)
    assert generate(1024) == (prompt[-50:], 50)  # lm-eval would refuse
    assert (lm.counts.truncated_contexts, lm.counts.shortened_generations) == (2, 1)


def test_an_interrupted_run_goes_on(tokenizer, tmp_path):
    prompts = [f"prompt {'x' * i}" for i in range(10)]
    asked = requests("generate_until", *[(p, {"until": []}) for p in prompts])
    left = [4]

    def answer(prompt):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return prompt.upper()

    def lm(**identity):
        return scripted_lm(tokenizer, answer, Responses(tmp_path, identity), batch_size=2)

    with pytest.raises(KeyboardInterrupt):
        lm(model="a").generate_until(asked)
    left[0] = 6
    resumed = lm(model="a")
    assert resumed.generate_until(asked) == [p.upper() for p in prompts]
    assert (resumed.reused, left[0]) == (4, 0)
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())
    with pytest.raises(KeyboardInterrupt):
        lm(model="b").generate_until(asked)  # another model knows nothing of this
    damaged = next(tmp_path.rglob("*.json"))
    damaged.write_text(damaged.read_text()[:-9])
    left[0] = 2
    assert lm(model="a").generate_until(asked) == [p.upper() for p in prompts]
    assert left[0] == 0


def test_interrupted_scores_go_on(tokenizer, tmp_path):
    """A text of many windows is remembered when all of them are scored, and not before."""
    left = [0]

    class Interrupted(Scripted):
        def score(self, ids_BT):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return super().score(ids_BT)

    def lm():
        engine = Interrupted(tokenizer, None, 16)
        remembered = Responses(tmp_path, {})
        return EngineLM(engine, tokenizer, remembered, batch_size=1, progress=False)

    one_token = -math.log(tokenizer.vocab_size)
    rolling = [("x" * 40,), ("y" * 80,)]  # of 3 and 5 windows
    for kind, arguments, tokens, first, second in (
        ("loglikelihood_rolling", rolling, [40, 80], 5, 5),
        ("loglikelihood", [("a", "bcd"), ("", "ef"), ("g", "h")], [3, 2, 1], 2, 1),
    ):
        asked = requests(kind, *arguments)
        left[0] = first
        with pytest.raises(KeyboardInterrupt):
            getattr(lm(), kind)(asked)
        left[0] = second
        got = getattr(lm(), kind)(asked)
        totals = [answer[0] if isinstance(answer, tuple) else answer for answer in got]
        np.testing.assert_allclose(totals, np.asarray(tokens) * one_token, rtol=1e-6)
        assert left[0] == 0


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


def test_humaneval_by_hand(tokenizer, data_dir):
    """All 164 problems; a third is answered wrongly, in ways that a suite must survive."""
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
        24: ("    import urllib.request as r\n    r.urlopen('http://a.b')\n", "URLError"),
    }
    plainly_wrong = ("    raise ValueError\n", "ValueError")

    def answer(prompt):
        index = number[prompt]
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
    log_p = -tokens * math.log(tokenizer.vocab_size)
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
    for name, correct in (("arithmetic", 7), ("functions", 4)):
        expect(figures(tasks[f"mini_{name}"])["exact_match", "none"], correct, 10)
        # The same as the score that a sweep measures without lm-eval.
        direct = direct_tasks.evaluate(Scripted(tokenizer, answer), tokenizer, name, 10)
        assert shares({"tasks": tasks})[f"mini_{name}"] == asdict(direct)


def test_unknown_tasks_and_absent_data(tmp_path):
    for names in (("gsm9k",), (), ("gsm8k", "gsm8k")):
        with pytest.raises(ValueError, match=r"; want some of gsm8k, gsm8k_cot, humaneval"):
            BenchmarkSettings(names)
    for wrong in ({"limit": 0}, {"max_new_tokens": 0}, {"num_fewshot": -1}):
        with pytest.raises(ValueError, match="want"):
            BenchmarkSettings(("gsm8k",), **wrong)
    for name, missing in (("gsm8k", "train.jsonl"), ("wikitext", "valid.txt")):
        with pytest.raises(FileNotFoundError, match=missing):
            load_tasks([name], tmp_path)
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"HumanEval.jsonl.gz is not the JSON lines"):
        load_tasks(["humaneval"], tmp_path)


# Chat templates

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}\n"
    "{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system here') }}{% endif %}[{{ m.role }}]{{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% if loop.last %}{% break %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER, REPLY = {"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": " So: "}
SYSTEM = {"role": "system", "content": "Be brief"}


def test_chat_templates():
    chatml = ChatTemplate(CHATML, "<s>", "</s>")
    opened = "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"
    assert chatml.render([USER]) == opened
    assert chatml.render([USER, REPLY], False) == opened + " So: "
    strict = ChatTemplate(STRICT, "<s>", "</s>")
    assert strict.render([SYSTEM, USER]) == "<s>[user]Hi <b>[assistant]"
    assert strict.render([USER, REPLY], False) == "<s>[user]Hi <b>[assistant]So:"
    indented = "{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n"
    assert ChatTemplate(indented, "", "").render([USER]) == "x\n"
    assert ChatTemplate("{{ messages | tojson }}", "", "").render([USER]) == json.dumps([USER])
    with pytest.raises(ValueError, match="the file's chat template: no tools"):
        ChatTemplate("{{ raise_exception('no tools') }}", "", "").render([USER])
    with pytest.raises(NotImplementedError, match=r"syntax that plain Jinja lacks.*generation"):
        ChatTemplate("{% generation %}", "", "")
    with pytest.raises(ValueError, match="access to attribute"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", "", "").render([USER])


def test_the_files_template_wraps_the_prompts(model, tokenizer, tmp_path):
    """BOS stands once, the few-shot examples are turns, and a file without a template says so."""
    with pytest.raises(ValueError, match=r"no tokenizer.chat_template; it has no chat template"):
        ChatTemplate.from_gguf(model.file, tokenizer)
    metadata = {
        **model.file.metadata,
        "tokenizer.chat_template": STRICT,
        "tokenizer.chat_template.other": CHATML,
        "tokenizer.ggml.bos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eot_token_id": 65,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3],  # "he" is a control token here
    }
    path = tmp_path / "chat.gguf"
    tensors = [(t.name, t.format, t.shape, t.raw) for t in model.file.tensors.values()]
    write_gguf(path, metadata, tensors)
    file = open_gguf(path)
    chatty = Tokenizer.from_gguf(file)
    chat = ChatTemplate.from_gguf(file, chatty)
    assert ChatTemplate.from_gguf(file, chatty, "other").source == CHATML
    with pytest.raises(ValueError, match=r"no tokenizer.chat_template.tool; it has tokenizer.chat"):
        ChatTemplate.from_gguf(file, chatty, "tool")
    lm = scripted_lm(chatty, lambda _: "x", chat=chat)
    problems = arithmetic.generate(direct_tasks.HELD_OUT_SEED, 1, "heldout")
    evaluate(lm, BenchmarkSettings(("mini_arithmetic",), 1, chat_template=True), None, False)
    ((row,), _, _, _) = lm._engine.calls[0]
    assert row.count(EOS) == 1 and row[0] == EOS
    assert chatty.decode(row[1:]) == f"[user]{problems[0].prompt}[assistant]"
    assert (
        chatty.encode("[user]") == lm.tok_encode("[user]") == [EOS, *lm.tok_encode("[user]", False)]
    )
    # A stop string that is a token ends a generation, as the file's own end tokens do.
    assert end_ids(file) == (EOS, 65)
    lm = scripted_lm(chatty, lambda _: "she said", end_ids=end_ids(file))
    for stops, wanted, written in ([["he"], [65, 256, EOS], "s"], [["sa"], [65, EOS], "s "]):
        asked = requests("generate_until", ("p", {"until": stops}))
        assert lm.generate_until(asked) == [written]
        assert lm._engine.calls[-1][3] == wanted
    with pytest.raises(ValueError, match="made without one"):
        scripted_lm(chatty, None).apply_chat_template([USER])


# The whole way, on the shipped model


def test_the_shipped_model_on_real_data(data_dir, tmp_path):
    model = load_model(reference.model_path())
    engine = Engine(model, HostExperts(model.config, model.file), 4 << 20)
    settings = BenchmarkSettings(
        ("gsm8k", "humaneval", "wikitext"), 1, max_length=128, max_new_tokens=8, batch_size=1
    )
    plan = {"signal": "native"}
    record = evaluate_engine(engine, settings, plan, data_dir, tmp_path, progress=False)
    assert record["requests"]["generated"] == 2 and record["requests"]["truncated_contexts"] >= 1
    assert all(record["tasks"][name]["problems"] == 1 for name in settings.tasks)
    assert record["model"]["model_sha256"] == model.file.sha256()
    assert set(record["provenance"]["versions"]) >= {"lm_eval", "jax"}
    # lm-eval's perplexity, once more, in float64.
    tokenizer = model.tokenizer()
    task = load_tasks(["wikitext"], data_dir)["wikitext"]
    page = task.eval_docs[0]["page"]
    ids = tokenizer.encode(task.doc_to_target({"page": page}), add_bos=False)
    prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    log_p = expected_rolling(engine, ids, prefix, 128)
    got = figures(record["tasks"]["wikitext"])["word_perplexity", "none"]["value"]
    assert math.log(got) == pytest.approx(-log_p / len(re.split(r"\s+", page)), rel=1e-5)
    again = evaluate_engine(engine, settings, plan, data_dir, tmp_path, progress=False)
    assert again["requests"]["reused"] == 3 and again["requests"]["scored"] == 0
    assert again["tasks"] == record["tasks"]
    assert json.loads(json.dumps(record)) == record
    assert len(table(record).splitlines()) == 1 + 2 + 1 + 3
    assert set(shares(record)) == {"gsm8k", "humaneval"}
    assert {score["problems"] for score in shares(record).values()} == {1}


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
    record = json.loads((tmp_path / "out" / "evaluate" / "evaluation.json").read_text())
    assert record["tasks"]["mini_functions"]["value"] == 0.0 and "mini_functions" in done.stdout
    assert record["model"]["plan"]["low_format"] == "Q2_K"
    assert record["budget_bytes"] == 8 << 20 and record["missing_protections"] is not None
    assert not list(tmp_path.glob(".*"))  # no data set and no cache at home
