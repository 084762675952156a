"""Records as one flat table, for other programs: CSV or Parquet, by the file's ending.

Owns the names of the columns: what was asked as `asked.…`, metrics and notes under their own names.
Lists of samples stay in the JSONL.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hobbit_jax.atomic import replacing
from hobbit_jax.record import Records
from hobbit_jax.record.typed_json import plain

ENDINGS = (".csv", ".parquet")


def export(found: Records, path: Path) -> int:
    """Writes every record as a row; returns how many there are.

    Raises:
        ValueError: another ending, or no record.
        ModuleNotFoundError: pandas, or for Parquet pyarrow, is not installed.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"--export {path} ends in {path.suffix!r}; want one of {', '.join(ENDINGS)}"
        )
    if not found.found:
        raise ValueError("there is no record to export; --workdir must name a folder with records/")
    import pandas  # heavy, and wanted here alone

    rows = []
    for record in found.found:
        fields = plain(record)
        row = {"study": record.study, "name": record.name, "status": record.status}
        row |= _flat("asked", fields.pop("asked"))
        for name in ("metrics", "notes"):
            row |= fields.pop(name, {})
        fields.pop("samples", None)
        rows.append(
            row | {k: v for name, value in fields.items() for k, v in _flat(name, value).items()}
        )
    frame = pandas.DataFrame(rows).convert_dtypes()
    mixed = [name for name in frame if len({type(v) for v in frame[name].dropna()}) > 1]
    frame[mixed] = frame[mixed].astype("string")
    with replacing(path) as partial:
        if path.suffix == ".csv":
            frame.to_csv(partial, index=False)
        else:
            frame.to_parquet(partial, index=False)
    return len(frame)


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            k: v for key, inner in value.items() for k, v in _flat(f"{name}.{key}", inner).items()
        }
    return {name: ", ".join(map(str, value)) if isinstance(value, list) else value}
