"""Reads `sweep.json` and `rows/*.json`, the files that a sweep leaves in its working folder.

Owns what counts as a readable row (DESIGN.md, section 6: one JSON file per cell). A row that cannot
be read is kept by name and reason, never dropped and never repaired; a null stays None.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from hobbit_jax.report.results import (
    NATIVE,
    RESIDENCY,
    Absent,
    Decode,
    Plan,
    Pool,
    Quality,
    Residency,
    Results,
    Row,
    Setting,
    Store,
    Task,
)
from hobbit_jax.statistics import Interval

REFERENCE_MODEL = "reference model"  # a sweep's config names it by an empty string


def load_results(workdir: Path) -> Results:
    """Reads `workdir`; unreadable rows are listed in the result and logged as warnings.

    Raises:
        ValueError: no `sweep.json`, a broken one, or no row file at all.
    """
    sweep = _load_sweep(workdir / "sweep.json")
    files = sorted((workdir / "rows").glob("*.json"))
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise ValueError(f"{workdir / 'rows'} holds no row; run the sweep first")
    cells = sorted(set(sweep["cells"]))
    found = {file.stem for file in files}
    rows: list[Row] = []
    failed: list[Absent] = []
    unreadable: list[Absent] = []
    for file in files:
        if file.stem not in cells:
            continue  # of an earlier config; listed, and no part of this sweep
        try:
            row = _load_row(file)
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            unreadable.append(Absent(file.stem, reason))
            logging.warning("row %s is unreadable: %s", file.name, reason)
            continue
        if isinstance(row, Absent):
            failed.append(row)
        else:
            rows.append(row)
    rows.sort(key=lambda row: (row.plan.order, row.setting, row.cell))
    return Results(
        title=sweep["title"],
        question=sweep["question"],
        command=sweep["command"],
        config=sweep["config"],
        rule=sweep["rule"],
        n_cells=len(cells),
        rows=tuple(rows),
        failed=tuple(failed),
        missing=tuple(Absent(cell, "no row file") for cell in cells if cell not in found),
        unreadable=tuple(unreadable),
        unexpected=tuple(sorted(found - set(cells))),
    )


def _load_json(file: Path) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"holds {constant}, which is not a number")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def _load_sweep(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is absent; --workdir must name the folder of a sweep")
    try:
        sweep = _mapping(_load_json(file), "the file")
        for name in ("title", "question", "command"):
            if not isinstance(sweep.get(name), str):
                raise ValueError(f"{name} is {sweep.get(name)!r}; want a string")
        for name in ("config", "rule"):
            _mapping(sweep.get(name), name)
        cells = sweep.get("cells")
        if not isinstance(cells, list) or not all(isinstance(cell, str) for cell in cells):
            raise ValueError("cells is not a list of cell names")
    except ValueError as error:
        raise ValueError(f"{file} is not the record of a sweep: {error}") from error
    return sweep


def _load_row(file: Path) -> Row | Absent:
    record = _mapping(_load_json(file), "the file")
    cell, status = record.get("cell"), record.get("status")
    if cell != file.stem:
        raise ValueError(f"names cell {cell!r}, not {file.stem!r}")
    if status == "failed":
        try:
            plan = _plan(_mapping(record.get("config"), "config"))
        except ValueError:
            plan = None
        return Absent(file.stem, str(record.get("error") or "no error recorded"), plan)
    if status != "ok":
        raise ValueError(f"status is {status!r}; want 'ok' or 'failed'")
    config = _mapping(record.get("config"), "config")
    plan = _plan(config)
    setting = Setting(
        plan.model,
        _required(config, "budget_mib"),
        round(_number(config, "protected_fraction") or 0.0, 9),
    )
    provenance = _optional(record, "provenance") or {}
    for name, kind in (("device", str), ("tier_sha256", Mapping), ("versions", Mapping)):
        if not isinstance(provenance.get(name), kind | None):
            raise ValueError(f"provenance.{name} is {provenance[name]!r}")
    tasks = {
        name: _task(record["tasks"], name) for name in sorted(_optional(record, "tasks") or {})
    }
    return Row(
        cell=file.stem,
        plan=plan,
        setting=setting,
        quality=_quality(_optional(record, "quality")),
        tasks={name: task for name, task in tasks.items() if task},
        store=_store(_optional(record, "store")),
        pool=_pool(_optional(record, "pool")),
        decode=_decode(_optional(record, "decode")),
        selections_LE=_selections(_optional(record, "routing")),
        provenance=provenance,
    )


def _plan(config: Mapping[str, Any]) -> Plan:
    inputs = _optional(config, "inputs") or {}
    model = config.get("model", inputs.get("model")) or REFERENCE_MODEL
    for name, value in (("model", model), ("signal", config.get("signal"))):
        if not isinstance(value, str):
            raise ValueError(f"config.{name} is {value!r}; want a string")
    low_format = config.get("low_format")
    if not isinstance(low_format, str | None):
        raise ValueError(f"config.low_format is {low_format!r}; want a string or null")
    fraction = round(_required(config, "low_fraction"), 9)
    if not 0 <= fraction <= 1:
        raise ValueError(f"low_fraction is {fraction}; want 0 to 1")
    if config["signal"] != NATIVE and low_format is None:
        raise ValueError(f"signal {config['signal']!r} has no low_format")
    seed = int(_number(config, "seed") or 0)
    low_format = None if config["signal"] == NATIVE else low_format
    residency = None
    if config["signal"] == RESIDENCY:
        if not isinstance(config.get("mode"), str):
            raise ValueError(f"config.mode is {config.get('mode')!r}; want a string")
        share, budget_mib = _required(config, "low_share"), _required(config, "budget_mib")
        residency = Residency(config["mode"], share, budget_mib)
    return Plan(model, config["signal"], low_format, fraction, seed, residency)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {type(value).__name__}; want a JSON object")
    return value


def _optional(block: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return None if block.get(name) is None else _mapping(block[name], name)


def _number(block: Mapping[str, Any], name: str) -> float | None:
    value = block.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; want a number or null")
    return value


def _required(block: Mapping[str, Any], name: str) -> float:
    value = _number(block, name)
    if value is None:
        raise ValueError(f"{name} is absent; want a number")
    return value


def _whole(block: Mapping[str, Any], name: str) -> int | None:
    value = _number(block, name)
    return None if value is None else int(value)


def _interval(block: Mapping[str, Any], name: str | None = None) -> Interval | None:
    found = block if name is None else _optional(block, name)
    if found is None:
        return None
    value, low, high = (_number(found, end) for end in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return None
    if low > high:
        raise ValueError(f"{name or 'interval'} runs from {low} to {high}")
    return Interval(value, low, high)


def _quality(block: Mapping[str, Any] | None) -> Quality | None:
    if block is None:
        return None
    names = ("bits_per_byte", "perplexity", "kl_mean", "kl_p99", "top1_agreement")
    return Quality(_whole(block, "tokens"), *(_interval(block, name) for name in names))


def _task(block: Mapping[str, Any], name: str) -> Task | None:
    found = _optional(block, name)
    score = None if found is None else _interval(found)
    if found is None or score is None:
        return None
    return Task(_whole(found, "problems"), _whole(found, "correct"), score)


def _store(block: Mapping[str, Any] | None) -> Store | None:
    if block is None:
        return None
    return Store(
        experts=_whole(block, "experts"),
        native_bytes=_number(block, "native_bytes"),
        plan_bytes=_number(block, "plan_bytes"),
    )


def _pool(block: Mapping[str, Any] | None) -> Pool | None:
    if block is None:
        return None
    slots = _optional(block, "slots") or {}
    return Pool(
        _number(block, "budget_bytes"),
        _number(block, "device_bytes"),
        {name: int(_required(slots, name)) for name in sorted(slots)},
        _whole(block, "resident_pairs"),
    )


def _decode(block: Mapping[str, Any] | None) -> Decode | None:
    if block is None:
        return None
    repeats = block.get("repeat_seconds") or []
    if not isinstance(repeats, list):
        raise ValueError(f"repeat_seconds is {repeats!r}; want a list")
    return Decode(
        tokens=_whole(block, "tokens"),
        hit_rate=_number(block, "hit_rate"),
        degraded_fraction=_number(block, "degraded_fraction"),
        skipped_fraction=_number(block, "skipped_fraction"),
        exits_per_token=_number(block, "exits_per_token"),
        bytes_moved_per_token=_number(block, "bytes_moved_per_token"),
        bytes_used_per_token=_number(block, "bytes_used_per_token"),
        tokens_per_second=_interval(block, "tokens_per_second"),
        repeats=len(repeats),
    )


def _selections(block: Mapping[str, Any] | None) -> tuple[tuple[int, ...], ...] | None:
    found: Iterable | None = None if block is None else block.get("selections_LE")
    if found is None:
        return None
    try:
        counts_LE = tuple(tuple(int(count) for count in layer) for layer in found)
    except TypeError as error:
        raise ValueError("selections_LE is not a table of counts") from error
    if not counts_LE or not counts_LE[0] or len({len(layer) for layer in counts_LE}) != 1:
        raise ValueError("selections_LE is empty or its layers differ in length")
    return counts_LE
