"""The miniature tasks, held-out problems: arithmetic by its answer, functions by running them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.statistics import share
from hobbit_jax.synthetic_tasks import arithmetic, functions

TASKS = {"arithmetic": arithmetic, "functions": functions}
MAX_NEW_TOKENS = {"arithmetic": 64, "functions": 48}
HELD_OUT_SEED = 2026
_LEAST_BATCH = 64  # a smaller one saves less than its program takes to compile
_SCORED_AT_ONCE = 8  # the child that runs a function mostly waits for the kernel


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    most_new_tokens: Sequence[int],
    batch: int | None = None,
) -> list[str]:
    """Greedy completions up to the end of generation, of `batch` prompts at a time or of all.

    Each has at most its own number of `most_new_tokens`.
    """
    encoded, batch = [tokenizer.encode(prompt) for prompt in prompts], batch or len(prompts)
    # Of all batches, so that one program serves them.
    context = max(map(len, encoded)) + max(most_new_tokens)
    texts: list[str] = []
    for start in range(0, len(encoded), batch):
        part, most = encoded[start : start + batch], most_new_tokens[start : start + batch]
        generated = engine.generate(
            part, max(most), stop_ids=tokenizer.eog_ids, context=context, least_batch=_LEAST_BATCH
        )
        ids_NB = np.asarray([ids_B for ids_B, _ in generated]).reshape(-1, len(part))
        for row_N, limit in zip(ids_NB.T, most, strict=True):
            # As a stream, since it continues the prompt: `decode` drops a text's first space.
            ids = [token for token in row_N[:limit].tolist() if token >= 0]
            texts.append("".join(tokenizer.decode_stream(ids)))
    return texts


def evaluate(
    engine: Engine, tokenizer: Tokenizer, problems: int, batch: int | None = None
) -> dict[str, dict[str, Any]]:
    """Scores `problems` held-out problems of each task, `batch` at a time or all of them together.

    Returns:
        By task, none where `problems` is 0: exact match (arithmetic) or pass@1 (functions) with
        Wilson's 95 % interval, and `solved`, 1 or 0 for each problem in order, so that two plans
        can be compared problem by problem.
    """
    if not problems:
        return {}
    asked = {
        name: task.generate(HELD_OUT_SEED, problems, "heldout") for name, task in TASKS.items()
    }
    prompts = [problem.prompt for of_task in asked.values() for problem in of_task]
    most = [MAX_NEW_TOKENS[name] for name in asked for _ in range(problems)]
    texts, found = complete(engine, tokenizer, prompts, most, batch), {}
    with ThreadPoolExecutor(_SCORED_AT_ONCE) as threads:
        for name, of_task in asked.items():
            answers, texts = texts[:problems], texts[problems:]
            pairs = zip(of_task, answers, strict=True)
            verdicts = [threads.submit(TASKS[name].score, *pair) for pair in pairs]
            solved = [int(verdict.result()) for verdict in verdicts]
            scored = vars(share(sum(solved), problems))
            found[name] = {"problems": problems, "correct": sum(solved), **scored, "solved": solved}
    return found
