"""What the planner predicts for GPUs: one line a model and GPU, and how far off the planner is.

Owns what the document says of records of `scripts/plan.py` and `scripts/check_plan.py`. All of it
is prediction; where the planner ran on no GPU the text says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hobbit_jax.record import Record
from hobbit_jax.report.table import Column, listed, one_line, table

STUDY, CHECK, REPORTS = "planner", "planner check", "planner reports"


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
        names = self.record.samples[f"choices_{who}"]
        return " or ".join(dict.fromkeys(names))

    def speed(self, who: str) -> str:
        """Tokens a second of `chosen`."""
        options = {o["name"]: o for o in [*self.settings, *self.record.samples["rivals"]]}
        key = "compiled_tokens_per_second" if who == "compiled" else "tokens_per_second"
        names = self.record.samples[f"choices_{who}"]
        return extent(
            [
                options[name].get(key, options[name]["tokens_per_second"])[at]
                for at, name in enumerate(names)
            ],
            ".0f",
        )

    @property
    def action(self) -> str:
        """What to do, in a few words."""
        if len(self.settings) == 1:
            return "keep native: all experts fit"
        return self.chosen("overall")


def extent(values: Sequence[float], form: str) -> str:
    """From least to most of what is predicted under each routing."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


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
    return f"{extent(native['tokens_per_second'], '.0f')}, {extent(native['hit_rate'], '.2f')}"


def _joint(plan: Plan) -> str:
    chosen = set(plan.record.samples["choices_overall"])
    share = sum(share for name, share in plan.record.samples["joint_overall"] if name in chosen)
    return f"{100 * share:.0f} %"


def whole_table(found: Sequence[Plan]) -> str:
    """Every figure of the plans that the appendix shows."""

    def speeds(options: Sequence[Mapping[str, Any]]) -> str | None:
        shown = [f"{o['name']} {extent(o['tokens_per_second'], '.0f')}" for o in options]
        return "; ".join(shown) or None

    columns = [
        Column("model", lambda p: p.record.setting["model"]),
        Column("GPU", lambda p: p.record.setting["gpu"]),
        Column("pool, GB", lambda p: p.record.metrics["memory_pool"], ".1f", unit=1e9),
        Column(
            "native: residents, hit rate",
            lambda p: f"{p.native['residents']}, {extent(p.native['hit_rate'], '.2f')}",
        ),
        Column("tokens/s in this engine", lambda p: speeds(p.settings)),
        Column("tokens/s elsewhere", lambda p: speeds(p.record.samples["rivals"])),
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
    return "\n\n".join([text, table(columns, times)])


def reports_section(record: Record) -> str:
    """How far the cost model is from speeds that others report, misses included."""
    m, wrong = record.metrics, record.samples["wrong_pairs"]
    groups = {
        name.removeprefix("median_errors_"): value
        for name, value in m.items()
        if name.startswith("median_errors_")
    }
    text = (
        f"Nothing was tuned to these. The median error is {100 * (m['median_error'] or 0):.0f} % "
        f"({listed([f'{name}: {100 * (value or 0):.0f} %' for name, value in groups.items()], '')})"
        f". Of {m['pairs']} pairs of one model whose reports differ by more than a quarter, "
        f"{m['pairs_in_order']} are forecast in their order. The others: {'; '.join(wrong)}."
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


_TIMES = ("measured_ms", "ratio_replayed", "ratio_counted")


def _spread(metrics: Mapping[str, Any], name: str) -> str:
    return f"{metrics[name]:.2f} ({metrics[f'{name}_low']:.2f} to {metrics[f'{name}_high']:.2f})"


def _both(title: str, field: str, form: str, unit: float) -> list[Column]:
    return [
        Column(title, field, form, unit=unit),
        Column(f"{title}, replayed", f"{field}_replayed", form, unit=unit),
    ]
