"""Records as one flat table, for other programs: CSV or Parquet, by the file's ending.

Owns the names of the columns: what was asked as `asked.…`, metrics and notes under their own names.
Lists of samples stay in the JSONL.
"""

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
    frame = pandas.json_normalize(rows).convert_dtypes()
    for name in frame.select_dtypes("object"):  # lists, and values of several types
        frame[name] = frame[name].map(
            lambda value: ", ".join(map(str, value)) if isinstance(value, list) else str(value),
            na_action="ignore",
        )
    with replacing(path) as partial:
        write = frame.to_csv if path.suffix == ".csv" else frame.to_parquet
        write(partial, index=False)
    return len(frame)
