"""The planner's results as records, for the decision document (`report/planner_tables.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hobbit_jax.record import Benchmark, Record, machine, measured

STUDY = "planner"


def plan_record(plan: Mapping[str, Any]) -> Record:
    """The record of a plan that `plan.make_plan` made."""
    of_plan = ("context", "policy", "chunk_tokens")
    setting = {
        "model": plan["model"]["name"],
        "gpu": plan["card"]["name"],
        **{name: plan[name] for name in of_plan},
    }
    found = measured({k: v for k, v in plan.items() if k not in (*of_plan, "kind")})
    return Record(STUDY, Benchmark(STUDY, setting), **vars(found), **machine())


def check_record(
    checked: Mapping[str, Any], summary: Mapping[str, Any], public: list[dict[str, Any]]
) -> Record:
    """The record of a check: of `check.check`, `check.summarise`, and the published figures."""
    setting = {
        "device": summary["device"],
        "turns": checked["turns"],
        "link_gb_s": checked["link_gb_s"],
    }
    found = measured({**checked, "summary": summary, "public": public})
    return Record(STUDY, Benchmark(f"{STUDY} check", setting), **vars(found), **machine())
