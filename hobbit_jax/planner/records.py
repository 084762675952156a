"""The planner's results as records, for the decision document (`report/planner_tables.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hobbit_jax.record import Benchmark, Record, machine, measured

STUDY = "planner"


def plan_record(plan: Mapping[str, Any]) -> Record:
    """The record of a plan that `plan.make_plan` made."""
    of_plan = ("context", "kv_format", "policy", "chunk_tokens")
    setting = {
        "model": plan["model"]["name"],
        "gpu": plan["gpu"]["name"],
        **{name: plan[name] for name in of_plan},
    }
    found = measured({k: v for k, v in plan.items() if k not in (*of_plan, "kind")})
    return Record(STUDY, Benchmark(STUDY, setting), **vars(found), **machine())


def reports_record(compared: Mapping[str, Any]) -> Record:
    """The record of `published_benchmarks.compare_reports`."""
    setting = {"reports": len(compared["rows"])}
    found = measured(compared)
    return Record(STUDY, Benchmark(f"{STUDY} reports", setting), **vars(found), **machine())
