"""Files of records: one a record while a study runs; put together, they are a study's JSONL.

A record's file appears whole or not at all, so a process that is killed at any moment loses no
finished record, and several writers never meet in one file. Beside the records of a study stands
its description: what its sweep was started with.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hobbit_jax.atomic import write_text
from hobbit_jax.record.asked import Scalar
from hobbit_jax.record.record import Record
from hobbit_jax.record.typed_json import plain, typed

FOLDER = "records"
DESCRIPTION = ".study.json"  # the end of the name of a study's description


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


@dataclass(frozen=True)
class Records:
    """What a folder holds: records sorted by study and name, and lines that are no record."""

    found: tuple[Record, ...]
    unreadable: Mapping[str, str]  # where -> why

    def of(self, study: str) -> list[Record]:
        """The records of one study."""
        return [record for record in self.found if record.study == study]

    def finished(self, study: Study) -> list[Record]:
        """Finished records of the trials that a study asks for, in their order."""
        done = {record.name: record for record in self.of(study.name) if record.status == "ok"}
        return [done[name] for name in study.trials if name in done]


def write_record(folder: Path, record: Record) -> Path:
    """Writes `record` under `folder`/records, over an older one of its name.

    One that failed does not replace a finished one.

    Raises:
        ValueError: a metric is no finite number.
        OSError: the folder cannot be written.
    """
    for name, value in record.metrics.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"metric {name} is {value}; want a finite number, or None")
    path = record_path(folder, record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if record.status == "ok" or not is_finished(folder, record.name):
        write_text(path, json.dumps(plain(record), allow_nan=False) + "\n")
    return path


def record_path(folder: Path, name: str) -> Path:
    """The file of one record."""
    return folder / FOLDER / f"{name}.json"


def read_record(folder: Path, name: str) -> Record | None:
    """The record in the file of that name; None if there is none that can be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return parse_record(record_path(folder, name).read_text(encoding="utf-8"))
    return None


def is_finished(folder: Path, name: str) -> bool:
    """Whether there is an "ok" record; failed and unreadable ones are made again."""
    record = read_record(folder, name)
    return record is not None and record.status == "ok"


def read_records(folder: Path) -> Records:
    """Every record under `folder`/records, from files of one record and from JSONL.

    Of several of one study and identity an "ok" one is kept, then the first.
    """
    kept: dict[tuple[str, str], Record] = {}
    unreadable = {}
    for path in sorted((folder / FOLDER).glob("*.json*")):
        if path.name.startswith(".") or path.name.endswith(DESCRIPTION):
            continue
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            where = f"{path.name}:{number}" if path.suffix == ".jsonl" else path.name
            try:
                record = parse_record(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                unreadable[where] = str(error) or type(error).__name__
                continue
            key = (record.study, record.name)
            if key not in kept or (kept[key].status, record.status) == ("failed", "ok"):
                kept[key] = record
    return Records(tuple(kept[key] for key in sorted(kept)), unreadable)


def parse_record(line: str) -> Record:
    """A record from its JSON.

    Raises:
        ValueError: no record; says which field, what it is and what was wanted.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"holds {constant}, which is not a number")

    return typed(json.loads(line, parse_constant=refuse), Record, "record")


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
