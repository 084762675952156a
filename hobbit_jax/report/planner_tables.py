"""What the planner predicts for GPUs: one line a model and GPU, and how far off the planner is.

Owns what the document says of records of `scripts/plan.py` and `scripts/dev/check_plan.py`. All of
it is prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hobbit_jax.planner.table import alternatives, speeds, spread
from hobbit_jax.record import Record
from hobbit_jax.report.table import Column, listed, one_line, table

STUDY, REPORTS = "planner", "planner reports"


@dataclass(frozen=True)
class Plan:
    """The record of one model on one GPU."""

    record: Record

    @property
    def settings(self) -> Sequence[Mapping[str, Any]]:
        """What was predicted; the first is native."""
        return self.record.samples["settings"]

    @property
    def native(self) -> Mapping[str, Any]:
        """Native experts streamed under SLRU."""
        return self.settings[0]

    def chosen(self, who: str) -> str:
        """What to run: "here", "overall" or in a "compiled" engine; under each routing."""
        return alternatives(self.record.samples[f"choices_{who}"])

    def speed(self, who: str) -> str:
        """Tokens a second of `chosen`."""
        options = [*self.settings, *self.record.samples["baselines"]]
        return speeds(options, self.record.samples[f"choices_{who}"], who)

    @property
    def action(self) -> str:
        """What to do, in a few words."""
        if len(self.settings) == 1:
            return "keep native: all experts fit"
        return self.chosen("overall")


def plans(records: Sequence[Record]) -> list[Plan]:
    """Of a study's records those that are plans, by model and memory."""
    found = [Plan(r) for r in records if r.subject == STUDY]
    return sorted(
        found, key=lambda p: (p.record.setting["model"], p.record.metrics["memory_vram"] or 0)
    )


def decision_table(found: Sequence[Plan]) -> str:
    """What to do on which GPU."""
    columns = [
        Column("model", lambda p: p.record.setting["model"]),
        Column(
            "GPU", lambda p: f"{p.record.setting['gpu']}, {p.record.metrics['gpu_vram_gib']:g} GiB"
        ),
        Column("do", "action"),
        Column("tokens/s", lambda p: p.speed("overall")),
        Column("in a compiled engine", lambda p: f"{p.chosen('compiled')}: {p.speed('compiled')}"),
        Column("native SLRU: tokens/s, hit rate", _native),
        Column("chosen in, of joint draws", _joint),
    ]
    return table(columns, found)


def _native(plan: Plan) -> str:
    native = plan.native
    return f"{spread(native['tokens_per_second'], '.0f')}, {spread(native['hit_rate'], '.2f')}"


def _joint(plan: Plan) -> str:
    chosen = set(plan.record.samples["choices_overall"])
    share = sum(share for name, share in plan.record.samples["joint_overall"] if name in chosen)
    return f"{100 * share:.0f} %"


def whole_table(found: Sequence[Plan]) -> str:
    """Every figure of the plans that the appendix shows."""

    def listed_speeds(options: Sequence[Mapping[str, Any]]) -> str | None:
        shown = [f"{o['name']} {spread(o['tokens_per_second'], '.0f')}" for o in options]
        return "; ".join(shown) or None

    columns = [
        Column("model", lambda p: p.record.setting["model"]),
        Column("GPU", lambda p: p.record.setting["gpu"]),
        Column("pool, GB", lambda p: p.record.metrics["memory_pool"], ".1f", unit=1e9),
        Column(
            "native: residents, hit rate",
            lambda p: f"{p.native['residents']}, {spread(p.native['hit_rate'], '.2f')}",
        ),
        Column("tokens/s in this engine", lambda p: listed_speeds(p.settings)),
        Column("tokens/s elsewhere", lambda p: listed_speeds(p.record.samples["baselines"])),
        Column("choice in this engine", lambda p: p.chosen("here")),
    ]
    return table(columns, found)


def reading(found: Sequence[Plan]) -> list[str]:
    """What the predictions rest on."""
    if not found:
        return []
    record = found[0].record
    constants = {c["name"]: c for c in record.samples["constants"]}
    assumed = [
        f"{name} {constants[name]['value']:g} {constants[name]['unit']}"
        for name in record.samples["assumed"]
    ]
    reasons = dict.fromkeys(r for p in found for r in p.record.samples["routing_extrapolates"])
    sources = dict.fromkeys(s for p in found for s in p.record.samples["routing_source"])
    lines = [
        f"{record.setting['context']} tokens of context, "
        f"{(record.metrics['memory_reserve'] or 0) / 2**30:g} GiB kept for the driver. The choice "
        "begins with the fastest that loses nothing and takes what is expected to lose more only "
        f"where it is {record.metrics['speedup_needed']:g}× as fast.",
        f"A range is over routing: {'; '.join(sources)}.",
        f"Assumed, never measured on a GPU: {', '.join(assumed)}. *Joint draws* are of all of them "
        "at once between half and double, with the routing, another KV format and a longer "
        "context; the share is of those that choose the same.",
        "*Elsewhere* is llama.cpp on the same file and on its smaller ones, and a fork of it that "
        "keeps hot experts on the GPU, all with a compiled engine's constants.",
    ]
    return lines + [f"It extrapolates: {one_line(reason)}." for reason in reasons]


def reports_section(record: Record) -> str:
    """How far the cost model is from speeds that others report, misses included."""
    m = record.metrics
    wrong, error = "; ".join(record.samples["wrong_pairs"]), m["summary_median_error"] or 0
    groups = {
        name.removeprefix("median_errors_"): value
        for name, value in m.items()
        if name.startswith("median_errors_")
    }
    text = (
        f"Nothing was tuned to these. The median error is {100 * error:.0f} % "
        f"({listed([f'{name}: {100 * (value or 0):.0f} %' for name, value in groups.items()], '')})"
        f". Of {m['summary_pairs']} pairs of one model whose reports differ by more than a "
        f"quarter, {m['summary_pairs_in_order']} are forecast in their order. The others: {wrong}."
    )
    columns = [
        Column("what", "what"),
        Column("reported tokens/s", "reported", ".1f"),
        Column("predicted", "predicted", ".1f"),
        Column("predicted over reported", "ratio", ".2f"),
        Column("host bandwidth", "host_bandwidth"),
        Column("whose", "group"),
        Column("source", "source"),
    ]
    return f"{text}\n\n{table(columns, record.samples['rows'])}"
