"""What the tests of lm-eval on our engine hold it against: no test stands here.

A `Scripted` engine that writes known answers, a tiny model of one layer, and the likelihoods of
an engine computed a second time, in float64 and one sequence at a time.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from tiny_models import TinyModel, write_model

from hobbit_jax.evals.lm_eval_model import EngineLM

# One layer in simple formats: a program is compiled for every shape that a test asks for.
ONE_LAYER = TinyModel(
    "qwen3moe", 7, 4, 2, 64, 4, 2, 1e6, 1e-6,
    experts=(("Q8_0", "Q8_0", "Q8_0"),),
    dense=("F16", "F16", "F16", "F16", "F32", "F16", "F16"),
)  # fmt: skip


EOS = 257  # of the tiny models


def write_one_layer(folder: Path) -> Path:
    path = folder / "tiny.gguf"
    write_model(ONE_LAYER, path)
    return path


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("task", i, 1)) for i, args in enumerate(arguments)]


class Scripted:
    """An engine that continues a prompt as `answer(text)` says, token by token, and then ends.

    As a real one, it goes on with a sequence until its end token, whatever has been written.
    """

    def __init__(self, tokenizer, answer, context: int = 8192):
        self.config = SimpleNamespace(
            context_length=context, vocab_size=len(tokenizer.byte_lengths())
        )
        self.tokenizer, self.answer = tokenizer, answer
        self.serves_by_residency = True  # so no prompt is run in two parts
        self.calls: list[tuple] = []

    def score_parts(self, ids_BT):
        """Every token is as probable as any other; in two parts."""
        for part_BT in np.array_split(ids_BT, min(2, ids_BT.shape[1]), axis=1):
            yield jnp.zeros((*part_BT.shape, self.config.vocab_size), jnp.float32)

    def generate(self, prompts, max_new_tokens, sampling=None, stop_ids=(), context=None, **_):
        self.calls.append((prompts, max_new_tokens, sampling, stop_ids))
        longest = max(map(len, prompts)) + max_new_tokens
        assert longest <= (context or self.config.context_length) <= self.config.context_length
        rows = []
        for prompt in prompts:
            # As a model would go on: a text of its own may begin with another space.
            text = self.tokenizer.decode(prompt)
            whole = self.tokenizer.encode(text + self.answer(text), add_bos=False)
            rows.append([*whole[len(prompt) :], *stop_ids[:1]])
        for step in range(max_new_tokens):
            ids = [row[step] if step < len(row) else stop_ids[0] for row in rows]
            ids_B = np.asarray([-1 if token in stop_ids else token for token in ids])
            if (ids_B < 0).all():
                return
            yield ids_B, None


def scripted_lm(tokenizer, answer, responses=None, context=8192, **options) -> EngineLM:
    fake = Scripted(tokenizer, answer, context)
    return EngineLM(fake, tokenizer, responses, **options)


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
