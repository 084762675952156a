"""Decodes at a real model's size: counts, bytes and CPU seconds by budget and setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hobbit_jax.record import Benchmark, Record
from hobbit_jax.report.table import Column, ratio, table

_MOVED = "bytes_moved_per_token"


def _setting(record: Record) -> dict[str, Any]:
    assert isinstance(record.asked, Benchmark)
    return dict(record.asked.setting)


def _workload(record: Record) -> dict[str, Any]:
    """What must be equal where two settings are compared."""
    return {k: v for k, v in _setting(record).items() if k not in ("setting", "low_format")}


def scale_table(records: Sequence[Record]) -> str:
    """Means over the tokens after the first, which compiles; CPU seconds are medians with a range.

    The last column is bytes against native's, where the same tokens were decoded natively at the
    same budget.
    """

    def order(record: Record) -> tuple[float, bool, str]:
        setting = _setting(record)
        budget = setting["budget_bytes"]
        is_native = setting["setting"] == "native"
        return budget or float("inf"), not is_native, str(setting["setting"])

    def of_native(record: Record) -> str | None:
        same = (r for r in records if _workload(r) == _workload(record))
        native = next((r for r in same if _setting(r)["setting"] == "native"), None)
        if native is None or not native.metrics[_MOVED]:
            return None
        return ratio((record.metrics[_MOVED] or 0) / (native.metrics[_MOVED] or 1))

    def budget(record: Record) -> str:
        n_bytes = _setting(record)["budget_bytes"]
        return "all" if n_bytes is None else f"{n_bytes / 2**30:g}"

    def name(record: Record) -> str:
        setting = _setting(record)
        return " ".join(filter(None, (setting["setting"], setting["low_format"])))

    columns = [
        Column("GiB", budget),
        Column("setting", name),
        Column("slots", "slots_total"),
        Column("hit rate", "hit_rate", ".3f"),
        Column("misses a token", "misses_per_token", ".0f"),
        Column("round trips a token", "host_round_trips_per_token", ".1f"),
        Column("MB a token", _MOVED, ".0f", unit=1e6),
        Column("demoted", "demoted_selection_share", ".3f"),
        Column("CPU s a token", "decode_cpu_s_per_token", ".2f", interval=True),
        Column("bytes against native", of_native),
    ]
    return table(columns, sorted(records, key=order))
