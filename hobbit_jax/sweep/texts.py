"""Which text a model is calibrated or evaluated on, by name or from files.

Owns the named texts: "code" (held-out source files that ship with the package), "tasks" (generated
problems, none of them held out), "mixed", which is "code,tasks", and two of the data sets that
README names, "wikitext" and "gsm8k", of which one file calibrates and the test file evaluates
(`DATA_TEXTS`). Names and files that are joined by commas give as many characters of each. What is
calibrated on code alone loses the problems: GPTQ at Q2_K then solves 0.68 of the arithmetic, plain
rounding 0.82, so "mixed" is the default of `scripts/calibrate.py`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hobbit_jax import reference
from hobbit_jax.synthetic_tasks.documents import task_documents

CODE_TEXT, TASKS_TEXT, MIXED_TEXT = "code", "tasks", "mixed"
NAMED_TEXTS = (CODE_TEXT, TASKS_TEXT, MIXED_TEXT)
# Name → files below the folder of the data sets that calibrate and evaluate.
DATA_TEXTS = {
    "wikitext": ("wikitext2/valid.txt", "wikitext2/test.txt"),
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
}
DATA_VARIABLE = "HOBBIT_DATA_DIR"


def data_folder() -> Path | None:
    """The folder of the data sets: $HOBBIT_DATA_DIR, or ../shared/data beside this checkout.

    Raises:
        ValueError: the variable names no folder.
    """
    named = os.environ.get(DATA_VARIABLE)
    folder = Path(named or Path(__file__).resolve().parents[3] / "shared" / "data")
    if named and not folder.is_dir():
        raise ValueError(f"${DATA_VARIABLE} is {named}; want the folder of the data sets")
    return folder if folder.is_dir() else None


def calibration_documents(text: str) -> list[str]:
    """Documents of a calibration text: named texts and paths of files, with commas between, or ""
    for source code.

    Each part gives as many characters as the shortest has, in whole documents drawn from it.

    Raises:
        ValueError: a file is missing, not UTF-8, or not what its name says.
    """
    text = {"": CODE_TEXT, MIXED_TEXT: f"{CODE_TEXT},{TASKS_TEXT}"}.get(text, text)
    parts = [_calibration_part(name.strip()) for name in text.split(",")]
    length = min(sum(map(len, part)) for part in parts)
    return [document for part in parts for document in _first(part, length)]


def evaluation_documents(text: str) -> list[str]:
    """Documents of an evaluation text: one of `DATA_TEXTS`, the path of a file, or "" for held-out
    source files.

    Raises:
        ValueError: the file is missing, not UTF-8, or not what its name says.
    """
    return _read(text, half=1) if text else reference.held_out_texts("evaluation")


def _calibration_part(name: str) -> list[str]:
    if name == CODE_TEXT:
        return reference.held_out_texts("calibration")
    if name == TASKS_TEXT:
        return task_documents(seed=0, count=4000)
    return _read(name, half=0)


def _first(documents: list[str], length: int) -> list[str]:
    """`length` characters of `documents`, drawn whole unless there is only one."""
    if sum(map(len, documents)) <= length:
        return documents
    if len(documents) == 1:
        return [documents[0][:length]]
    order = np.random.default_rng(0).permutation(len(documents))
    ends = np.cumsum([len(documents[index]) for index in order])
    return [documents[index] for index in order[ends <= length]]


def _read(name: str, half: int) -> list[str]:
    """Documents of a file, or of the `half` of `DATA_TEXTS` that calibrates (0) or evaluates (1).

    A text is one document; a .jsonl file has one a line: the strings of its object.
    """
    path = Path(name)
    if name in DATA_TEXTS:
        folder = data_folder()
        if folder is None:
            raise ValueError(
                f"the text {name} is one of the data sets of README; set ${DATA_VARIABLE} to their "
                "folder"
            )
        path = folder / DATA_TEXTS[name][half]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text (byte {error.start}); want a text file"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if path.suffix != ".jsonl":
        return [text]
    return [_line(path, at, line) for at, line in enumerate(text.splitlines(), 1) if line.strip()]


def _line(path: Path, at: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {at} is no JSON ({error}); want an object") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}, line {at} is {type(found).__name__}; want an object of JSON")
    return "\n".join(value for value in found.values() if isinstance(value, str))
