"""Files of records: one a record while a study runs; put together, they are a study's JSONL.

A record's file appears whole or not at all, so a process that is killed at any moment loses no
finished record, and several writers never meet in one file.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hobbit_jax.atomic import write_text
from hobbit_jax.record.record import Record
from hobbit_jax.record.typed_json import plain, typed

FOLDER = "records"
DESCRIPTION = ".study.json"  # the end of the name of a study's description


@dataclass(frozen=True)
class Records:
    """What a folder holds: records sorted by study and name, and lines that are no record."""

    found: tuple[Record, ...]
    unreadable: Mapping[str, str]  # where -> why

    def of(self, study: str) -> list[Record]:
        """The records of one study."""
        return [record for record in self.found if record.study == study]


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
