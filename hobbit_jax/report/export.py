"""Records as one flat table, for other programs: CSV or Parquet, by the file's ending.

Owns the names of the columns: what was asked as `asked.…`, metrics and notes under their own names.
Lists of samples stay in the JSONL.
"""

from __future__ import annotations

from pathlib import Path

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
        fields.pop("samples", None)
        own = fields.pop("metrics", {}) | fields.pop("notes", {})
        rows.append({"name": record.name, "status": record.status, **fields, **own})
    frame = pandas.json_normalize(rows).convert_dtypes(convert_string=False)
    for name in frame:
        values = frame[name].dropna()
        if any(isinstance(value, list) for value in values):
            frame[name] = frame[name].map(", ".join, na_action="ignore")
        if len({type(value) for value in values}) > 1:
            frame[name] = frame[name].astype("string")
    with replacing(path) as partial:
        if path.suffix == ".csv":
            frame.to_csv(partial, index=False)
        else:
            frame.to_parquet(partial, index=False)
    return len(frame)
