"""The adapter from lm-eval's requests to our engine: likelihoods, generation, memory.

Likelihoods are computed a second time in float64 from single sequences; generation is the
engine's own, cut at stop strings, and a scripted engine's, whose text is known.
"""

import itertools
import json
import math

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is missing: pip install -e '.[eval]'")

from lm_eval_oracles import (
    EOS,
    Scripted,
    expected_rolling,
    expected_score,
    requests,
    scripted_lm,
    write_one_layer,
)

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.evals.lm_eval_model import EngineLM
from hobbit_jax.evals.responses import Responses
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.models.loading import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_one_layer(tmp_path_factory.mktemp("one_layer")), "xla")


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return model.tokenizer()


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, HostExperts(model.config, model.file), CacheConfig(chunk_tokens=64))


# Likelihoods on a real model


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
        lm = EngineLM(engine, tokenizer, batch_size=batch_size)
        got = lm.loglikelihood(requests("loglikelihood", *TEXTS))
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([p for p, _ in got], [p for p, _ in expected], atol=2e-4)
        assert lm.counts.truncated_contexts == 0 and lm.counts.scored == len(TEXTS)


def test_a_context_too_long_is_cut_from_the_left(engine, tokenizer):
    long = "x" * 100
    lm = EngineLM(engine, tokenizer)
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


def test_rolling_likelihood(engine, tokenizer):
    texts = [("the rain in spain " * 9)[:150], "short", "", "x" * 16, "one"]
    lm = EngineLM(engine, tokenizer, max_length=16, batch_size=3)
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
    lm = EngineLM(engine, tokenizer, batch_size=3)

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


def test_what_prompts_share_is_run_once(engine, tokenizer, monkeypatch):
    """And the texts are those of the same prompts one by one, each in a call of its own."""
    shared = "examples of a task that are the same for all: "
    prompts = [shared + end for end in ("a", "bcd", "ef", "gh")]
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    asked = requests("generate_until", *[(prompt, options) for prompt in prompts])
    alone = [EngineLM(engine, tokenizer).generate_until([one])[0] for one in asked]
    fed, append = [], engine._append
    monkeypatch.setattr(
        engine, "_append", lambda ids, n: fed.append(int(n.sum())) or append(ids, n)
    )
    assert EngineLM(engine, tokenizer, batch_size=3).generate_until(asked) == alone
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    same = len(tokenizer.encode(shared))
    assert same > 32 and sum(fed) == same + sum(lengths) - len(lengths) * same
    # Prompts of which one is cut have no beginning in common any more.
    fed.clear()
    cut = EngineLM(engine, tokenizer, batch_size=4, max_length=max(lengths) + 5)
    assert all(cut.generate_until(asked))
    assert sum(fed) >= sum(lengths) - len(lengths)
    # A beginning that is longer than the context is cut as ever.
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    longer = [shared * 9 + end for end in ("a", "bcd")]
    assert len(tokenizer.encode(longer[0])) > engine.config.context_length
    asked = requests("generate_until", *[(prompt, options) for prompt in longer])
    assert all(EngineLM(engine, tokenizer).generate_until(asked))


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
    assert lm.counts.reused == 1


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
    assert (resumed.counts.reused, left[0]) == (4, 0)
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
        def score_parts(self, ids_BT):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return super().score_parts(ids_BT)

    def lm():
        engine = Interrupted(tokenizer, None, 16)
        remembered = Responses(tmp_path, {})
        return EngineLM(engine, tokenizer, remembered, batch_size=1)

    one_token = -math.log(len(tokenizer.byte_lengths()))
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
