"""Which text a model is calibrated on, by name or from a file.

Owns the named texts: "code" (held-out source files that ship with the package), "tasks" (generated
problems, none of them held out), and "mixed", as many characters of either. What is calibrated on
code alone loses the problems: GPTQ at Q2_K then solves 0.68 of the arithmetic, plain rounding 0.82,
so "mixed" is the default of `scripts/calibrate.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hobbit_jax import reference
from hobbit_jax.synthetic_tasks.documents import task_documents

CODE_TEXT, TASKS_TEXT, MIXED_TEXT = "code", "tasks", "mixed"
NAMED_TEXTS = (CODE_TEXT, TASKS_TEXT, MIXED_TEXT)


def calibration_documents(text: str) -> list[str]:
    """Documents of a calibration text: one of `NAMED_TEXTS`, or the path of a UTF-8 file.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    if text == CODE_TEXT:
        return reference.held_out_texts("calibration")
    if text == TASKS_TEXT:
        return task_documents(seed=0, count=4000)
    if text == MIXED_TEXT:
        sources = reference.held_out_texts("calibration")
        problems = task_documents(seed=0, count=4000)
        order = np.random.default_rng(0).permutation(len(problems))
        ends = np.cumsum([len(problems[index]) for index in order])
        kept = order[ends <= sum(map(len, sources))]
        return [*sources, *(problems[index] for index in kept)]
    return [read_text(Path(text))]


def evaluation_documents(text: str) -> list[str]:
    """Documents of an evaluation text: the path of a UTF-8 file, or "" for held-out source files.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    return [read_text(Path(text))] if text else reference.held_out_texts("evaluation")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: there is none, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text (byte {error.start}); want a text file"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
