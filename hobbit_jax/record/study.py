"""What a sweep was started with, kept beside its records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hobbit_jax.atomic import write_text
from hobbit_jax.record.asked import Scalar
from hobbit_jax.record.files import DESCRIPTION, FOLDER, read_records
from hobbit_jax.record.typed_json import plain, typed


@dataclass(frozen=True)
class Study:
    """What a sweep was started with.

    Attributes:
        name: of the study; its records have it.
        title, question, command: for the document.
        config: the resolved config.
        rule: the limits that decide.
        first_rule: those that stood before the study's first record; None where records were
            there before any description.
        trials: names of all records that the study asks for.
    """

    name: str
    title: str
    question: str
    command: str
    config: Mapping[str, Any]
    rule: Mapping[str, Scalar]
    trials: tuple[str, ...]
    first_rule: Mapping[str, Scalar] | None = None


def write_study(folder: Path, study: Study) -> Study:
    """Keeps `study` beside its records; the rule that stood before the first record is kept too."""
    path = folder / FOLDER / f"{study.name}{DESCRIPTION}"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = read_records(folder)
    begun = bool(records.of(study.name) or records.unreadable)
    first_rule = study.rule
    if begun:
        earlier = read_study(folder, study.name) if path.exists() else None
        first_rule = earlier.first_rule if earlier else None
    study = replace(study, first_rule=first_rule)
    write_text(path, json.dumps(plain(study), indent=1, allow_nan=False) + "\n")
    return study


def read_study(folder: Path, name: str) -> Study:
    """The description of a study.

    Raises:
        ValueError: there is none, or it is broken.
    """
    path = folder / FOLDER / f"{name}{DESCRIPTION}"
    if not path.is_file():
        raise ValueError(f"{path} is absent; --workdir must name the folder of a sweep")
    try:
        return typed(json.loads(path.read_text(encoding="utf-8")), Study, "study")
    except ValueError as error:
        raise ValueError(f"{path} is no description of a study: {error}") from error


def study_names(folder: Path) -> list[str]:
    """Studies that have a description under `folder`."""
    found = (folder / FOLDER).glob(f"*{DESCRIPTION}")
    return sorted(path.name.removesuffix(DESCRIPTION) for path in found)
