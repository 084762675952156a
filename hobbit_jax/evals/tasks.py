"""The miniature tasks, held-out problems: arithmetic by its answer, functions by running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.statistics import share
from hobbit_jax.synthetic_tasks import arithmetic, execution, functions

TaskName = Literal["arithmetic", "functions"]
# How problems are made, and a completion is judged.
TASKS: dict[TaskName, tuple[Callable[..., list[Any]], Callable[..., bool]]] = {
    "arithmetic": (arithmetic.generate, arithmetic.score),
    "functions": (functions.generate, execution.score),
}
MAX_NEW_TOKENS = {"arithmetic": 64, "functions": 48}
HELD_OUT_SEED = 2026


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
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    # Of all batches, so that one program serves them.
    context = max(map(len, encoded)) + max(most_new_tokens)
    texts: list[str] = []
    for start in range(0, len(encoded), batch or len(encoded)):
        part = slice(start, start + (batch or len(encoded)))
        most = most_new_tokens[part]
        generated = engine.generate(
            encoded[part], max(most), stop_ids=tokenizer.eog_ids, context=context
        )
        steps = [np.full(len(most), -1), *(ids_B for ids_B, _ in generated)]
        for row, limit in zip(np.stack(steps, axis=1)[:, 1:], most, strict=True):
            ids = row[:limit]
            # As a stream, since it continues the prompt: `decode` drops a text's first space.
            texts.append("".join(tokenizer.decode_stream(ids[ids >= 0].tolist())))
    return texts


def evaluate(
    engine: Engine, tokenizer: Tokenizer, problems: int, batch: int | None = None
) -> dict[str, dict[str, Any]]:
    """Scores `problems` held-out problems of each task, `batch` at a time or all of them together.

    Returns:
        By task, none where `problems` is 0: exact match (arithmetic) or pass@1 (functions) with
        Wilson's 95 % interval, and `solved`, each problem in order, so that two plans can be
        compared problem by problem.
    """
    if not problems:
        return {}
    asked = {
        task: generate(HELD_OUT_SEED, problems, "heldout") for task, (generate, _) in TASKS.items()
    }
    prompts = [problem.prompt for of_task in asked.values() for problem in of_task]
    most = [MAX_NEW_TOKENS[task] for task in asked for _ in range(problems)]
    texts, found = complete(engine, tokenizer, prompts, most, batch), {}
    for number, (task, (_, score)) in enumerate(TASKS.items()):
        answers = texts[number * problems : (number + 1) * problems]
        solved = [bool(score(p, text)) for p, text in zip(asked[task], answers, strict=True)]
        correct = sum(solved)
        scored = vars(share(correct, problems))
        found[task] = {"problems": problems, "correct": correct, **scored, "solved": solved}
    return found
