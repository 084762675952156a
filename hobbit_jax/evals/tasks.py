"""The miniature tasks, held-out problems: arithmetic by its answer, functions by running them."""

from typing import Any

import numpy as np

from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.statistics import share
from hobbit_jax.synthetic_tasks import arithmetic, functions

TASKS = {"arithmetic": arithmetic, "functions": functions}
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
    context, batch = max(map(len, encoded)) + max_new_tokens, batch or len(encoded)
    texts: list[str] = []
    for start in range(0, len(encoded), batch):
        part = encoded[start : start + batch]
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
    engine: Engine, tokenizer: Tokenizer, task: str, problems: int, batch: int | None = None
) -> dict[str, Any]:
    """Scores `problems` held-out problems of one of `TASKS`, `batch` at a time or all together.

    Returns:
        Exact match (arithmetic) or pass@1 (functions) with Wilson's 95 % interval, and `solved`,
        each problem in order, so that two plans can be compared problem by problem.
    """
    asked = TASKS[task].generate(HELD_OUT_SEED, problems, "heldout")
    prompts = [problem.prompt for problem in asked]
    texts = complete(engine, tokenizer, prompts, MAX_NEW_TOKENS[task], batch)
    solved = [TASKS[task].score(*answered) for answered in zip(asked, texts, strict=True)]
    correct = sum(solved)
    scored = vars(share(correct, problems))
    return {"problems": problems, "correct": correct, **scored, "solved": solved}
