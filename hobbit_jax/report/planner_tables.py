"""What the planner predicts for GPUs: one line a model and GPU, and how far off the planner is.

Owns what the document says of records of `scripts/plan.py` and `scripts/check_plan.py`. All of it
is prediction; where the planner ran on no GPU the text says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hobbit_jax.record import Benchmark, Record
from hobbit_jax.report.table import Column, listed, one_line, ratio, table

STUDY, CHECK = "planner", "planner check"


@dataclass(frozen=True)
class Plan:
    """The record of one model on one GPU."""

    record: Record

    @property
    def setting(self) -> Mapping[str, Any]:
        """Model, gpu, context, policy."""
        assert isinstance(self.record.asked, Benchmark)
        return self.record.asked.setting

    @property
    def settings(self) -> Sequence[Mapping[str, Any]]:
        """What was predicted; the first is native."""
        return self.record.samples["settings"]

    @property
    def native(self) -> Mapping[str, Any]:
        """Native experts streamed under SLRU."""
        return self.settings[0]

    @property
    def choice(self) -> Mapping[str, Any]:
        """What the planner would run in this engine."""
        return next(s for s in self.settings if s["name"] == self.record.notes["choice"])

    @property
    def faster_baseline(self) -> Mapping[str, Any] | None:
        """The fastest baseline at native precision, where it beats the choice."""
        baselines = self.record.samples["rivals"]
        best = max(baselines, key=lambda b: b["tokens_per_second"], default=None)
        slow = best is None or best["tokens_per_second"] <= self.choice["tokens_per_second"]
        return None if slow else best

    @property
    def action(self) -> str:
        """What to do, in a few words."""
        if len(self.settings) == 1:
            return "keep native: all experts fit"
        if self.faster_baseline:
            return f"do not stream; {self.faster_baseline['name']}"
        name = self.choice["name"]
        return "stream native experts" if self.choice is self.native else name

    @property
    def other_choices(self) -> list[str]:
        """What is chosen where one assumed constant is halved or doubled."""
        found = {s["choice"] for s in self.record.samples["sensitivity"]}
        return sorted(found - {self.record.notes["choice"]})


def plans(records: Sequence[Record]) -> list[Plan]:
    """Of a study's records those that are plans, by model and memory."""
    found = [
        Plan(r) for r in records if isinstance(r.asked, Benchmark) and r.asked.subject == STUDY
    ]
    return sorted(found, key=lambda p: (p.setting["model"], p.record.metrics["memory_vram"] or 0))


def decision_table(found: Sequence[Plan]) -> str:
    """What to do on which GPU."""
    columns = [
        Column("model", lambda p: p.setting["model"]),
        Column("GPU", lambda p: f"{p.setting['gpu']}, {p.record.metrics['card_vram_gib']:g} GiB"),
        Column("do", "action"),
        Column("tokens/s", _speed, ".0f"),
        Column("native SLRU: tokens/s, hit rate", _native),
        Column("changes with one constant halved or doubled", _changes),
    ]
    return table(columns, found)


def _speed(plan: Plan) -> float:
    return (plan.faster_baseline or plan.choice)["tokens_per_second"]


def _native(plan: Plan) -> str:
    return f"{plan.native['tokens_per_second']:.0f}, {plan.native['hit_rate']:.2f}"


def _changes(plan: Plan) -> str:
    return listed(plan.other_choices, "no")


def whole_table(found: Sequence[Plan]) -> str:
    """Every figure of the plans that the appendix shows."""

    def named(asked: str, plan: Plan) -> str | None:
        speeds = [f"{s['tokens_per_second']:.0f}" for s in plan.settings if s["asked"] == asked]
        return " / ".join(speeds) or None

    def baselines(plan: Plan) -> str | None:
        found = plan.record.samples["rivals"]
        return "; ".join(f"{b['name']} {b['tokens_per_second']:.0f}" for b in found) or None

    def floor(plan: Plan) -> str | None:
        found = [s for s in plan.settings if s["mode"] == "floor"]
        best = max(found, key=lambda s: s["tokens_per_second"], default=None)
        return f"{best['tokens_per_second']:.0f} ({best['low_format']})" if best else None

    columns = [
        Column("model", lambda p: p.setting["model"]),
        Column("GPU", lambda p: p.setting["gpu"]),
        Column("pool, GB", lambda p: p.record.metrics["memory_pool"], ".1f", unit=1e9),
        Column("native: residents, hit rate", lambda p: _residents(p.native)),
        Column("native tokens/s", lambda p: p.native["tokens_per_second"], ".0f"),
        Column("uniform tokens/s", lambda p: named("low", p)),
        Column("floor tokens/s", floor),
        Column("baselines at native precision, tokens/s", baselines),
        Column("choice", lambda p: p.choice["name"]),
        Column("residents, hit rate", lambda p: _residents(p.choice)),
        Column("host round trips a token", lambda p: p.choice["traffic"]["exits"], ".1f"),
        Column("uses below native", lambda p: p.choice["low_uses"], ".2f"),
        Column("tokens/s", lambda p: p.choice["tokens_per_second"], ".0f"),
        Column("of native", lambda p: ratio(p.choice["speedup"])),
    ]
    return table(columns, found)


def _residents(setting: Mapping[str, Any]) -> str:
    return f"{setting['residents']}, {setting['hit_rate']:.2f}"


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
    lines = [
        f"{found[0].setting['context']} tokens of context, "
        f"{(record.metrics['memory_reserve'] or 0) / 2**30:g} GiB kept for the driver. The choice "
        "begins at native and takes what is expected to lose more only where it is "
        f"{record.metrics['speedup_needed']:g}× as fast. Nothing is assumed to overlap.",
        f"Assumed, never measured on a GPU: {', '.join(assumed)}.",
        "The baselines compute on the CPU at native precision; with a smaller quant they would be "
        "faster too, and that like-for-like rival is not in the table.",
    ]
    return lines + [f"It extrapolates: {one_line(reason)}." for reason in reasons]


def check_section(record: Record) -> str:
    """How far the planner was off on the machine that checked it, and on published figures."""
    m, clock = record.metrics, record.notes["summary_clock"]
    link = "" if not m["link_gb_s"] else f", an emulated link of {m['link_gb_s']:g} GB/s"
    text = (
        f"On {record.notes['summary_device']} with {m['summary_cpu_count']} cores"
        f"{'' if m['summary_on_gpu'] else ' (no GPU)'}{link}: constants were fitted to five "
        f"settings, {m['summary_settings']} others were predicted. Predicted over measured "
        f"{_spread(m, 'summary_time_ratio')} with replayed routing and "
        f"{_spread(m, 'summary_time_ratio_counted')} with the engine's own counts; median error "
        f"{100 * (m['summary_time_ratio_median_error'] or 0):.0f} %. It says that counts and costs "
        "add up as the model has it, and nothing of a GPU's constants."
    )
    times = [
        {**row, "ms": ms["median"], "replayed": replayed["median"], "counted": counted["median"]}
        for row, ms, replayed, counted in zip(
            record.samples["rows"],
            *(record.samples[f"times_{clock}_{name}"] for name in _TIMES),
            strict=True,
        )
    ]
    columns = [
        Column("setting", "setting"),
        Column("ms a token", "ms", ".1f"),
        Column("predicted over measured, replayed", "replayed", ".2f"),
        Column("the same, counted", "counted", ".2f"),
        Column("fitted", lambda row: "yes" if row["calibrates"] else None),
        *_both("hit rate", "hit_rate", ".3f", 1),
        *_both("host round trips", "exits", ".2f", 1),
        *_both("MB moved", "moved_bytes", ".3f", 1e6),
    ]
    published = [
        Column("what", "what"),
        Column("reported tokens/s", "reported", ".1f"),
        Column("predicted", "predicted", ".1f"),
        Column("predicted over reported", "ratio", ".2f"),
        Column("host bandwidth", "host_bandwidth"),
        Column("source", "source"),
    ]
    parts = [text, table(columns, times), table(published, record.samples.get("public", ()))]
    return "\n\n".join(filter(None, parts))


_TIMES = ("measured_ms", "ratio_replayed", "ratio_counted")


def _spread(metrics: Mapping[str, Any], name: str) -> str:
    return f"{metrics[name]:.2f} ({metrics[f'{name}_low']:.2f} to {metrics[f'{name}_high']:.2f})"


def _both(title: str, field: str, form: str, unit: float) -> list[Column]:
    return [
        Column(title, field, form, unit=unit),
        Column(f"{title}, replayed", f"{field}_replayed", form, unit=unit),
    ]
