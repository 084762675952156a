"""The miniature tasks, held-out problems: arithmetic by its answer, functions by running them."""

from __future__ import annotations

from collections.abc import Callable
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
    prompts: list[str],
    max_new_tokens: int,
    batch: int | None = None,
) -> list[str]:
    """Greedy completions up to the end of generation, of `batch` prompts at a time or of all."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    context = max(map(len, encoded)) + max_new_tokens
    texts: list[str] = []
    for start in range(0, len(encoded), batch or len(encoded)):
        part = encoded[start : start + (batch or len(encoded))]
        generated = engine.generate(
            part, max_new_tokens, stop_ids=tokenizer.eog_ids, context=context
        )
        steps = [np.full(len(part), -1), *(ids_B for ids_B, _ in generated)]
        # As a stream, since they continue the prompt: `decode` drops a text's first space.
        rows = (row[row >= 0].tolist() for row in np.stack(steps, axis=1))
        texts += ["".join(tokenizer.decode_stream(row)) for row in rows]
    return texts


def evaluate_all(
    engine: Engine, tokenizer: Tokenizer, problems: int, batch: int | None = None
) -> dict[str, dict[str, Any]]:
    """Scores of both tasks; none where `problems` is 0."""
    names = TASKS if problems else ()
    return {task: evaluate(engine, tokenizer, task, problems, batch) for task in names}


def evaluate(
    engine: Engine, tokenizer: Tokenizer, task: TaskName, problems: int, batch: int | None = None
) -> dict[str, Any]:
    """Scores `problems` held-out problems of one task, `batch` at a time or all together.

    Returns:
        Exact match (arithmetic) or pass@1 (functions) with Wilson's 95 % interval, and `solved`,
        each problem in order, so that two plans can be compared problem by problem.
    """
    generate, score = TASKS[task]
    asked = generate(HELD_OUT_SEED, problems, "heldout")
    prompts = [problem.prompt for problem in asked]
    texts = complete(engine, tokenizer, prompts, MAX_NEW_TOKENS[task], batch)
    solved = [bool(score(problem, text)) for problem, text in zip(asked, texts, strict=True)]
    correct = sum(solved)
    scored = vars(share(correct, problems))
    return {"problems": problems, "correct": correct, **scored, "solved": solved}
