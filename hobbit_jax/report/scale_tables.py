"""Decodes at a real model's size: counts, bytes and CPU seconds by budget and setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hobbit_jax.record import Record
from hobbit_jax.report.table import Column, ratio, table

_MOVED = "bytes_moved_per_token"


def _budget(record: Record) -> str:
    n_bytes = record.setting["budget_bytes"]
    return "all" if n_bytes is None else f"{n_bytes / 2**30:g}"


def scale_table(records: Sequence[Record]) -> str:
    """Means over the tokens after the first, which compiles; CPU seconds are medians with a range.

    The last column is bytes against native's, where the same tokens were decoded natively at the
    same budget.
    """

    def workload(record: Record) -> dict[str, Any]:
        return {k: v for k, v in record.setting.items() if k not in ("setting", "low_format")}

    def of_native(record: Record) -> str | None:
        for other in records:
            base = other.metrics.get(_MOVED)
            if other.setting["setting"] == "native" and workload(other) == workload(record):
                return ratio((record.metrics[_MOVED] or 0) / base) if base else None
        return None

    columns = [
        Column("GiB", _budget),
        Column("setting", lambda r: f"{r.setting['setting']} {r.setting['low_format'] or ''}"),
        Column("slots", "slots_total"),
        Column("hit rate", "hit_rate", ".3f"),
        Column("misses a token", "misses_per_token", ".0f"),
        Column("round trips a token", "host_round_trips_per_token", ".1f"),
        Column("MB a token", _MOVED, ".0f", unit=1e6),
        Column("demoted", "demoted_selection_share", ".3f"),
        Column("CPU s a token", "decode_cpu_s_per_token", ".2f", interval=True),
        Column("bytes against native", of_native),
    ]
    rows = sorted(records, key=lambda r: r.setting["setting"] != "native")
    return table(columns, sorted(rows, key=lambda r: r.setting["budget_bytes"] or float("inf")))
