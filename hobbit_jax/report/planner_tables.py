"""What the planner predicts for GPUs: the tables of one plan and of many.

Owns how records of `scripts/plan.py` and `scripts/dev/check_plan.py` are shown; the sentences stand
in `templates/`. All of it is prediction, and a range is over routing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.record import Record
from hobbit_jax.report.table import Column, table

STUDY, REPORTS = "planner", "planner reports"
Option = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """The record of one model on one GPU."""

    record: Record

    @property
    def settings(self) -> Sequence[Option]:
        """What was predicted of this engine; the first is native experts streamed under SLRU."""
        return self.record.samples["settings"]

    @property
    def baselines(self) -> Sequence[Option]:
        """What was predicted of llama.cpp and a fork of it."""
        return self.record.samples["baselines"]

    def choices(self, who: str) -> list[Option]:
        """What to run with "native" experts, "here", "overall" or in a "compiled" engine, under
        each routing, the least local first."""
        options = {option["name"]: option for option in [*self.settings, *self.baselines]}
        return [options[name] for name in self.record.samples[f"choices_{who}"]]

    def chosen(self, who: str) -> str:
        """The names of `choices`."""
        return " or ".join(dict.fromkeys(map(_named, self.choices(who))))

    def speed(self, who: str) -> str:
        """Tokens a second of `chosen`."""
        key = "compiled_tokens_per_second" if who == "compiled" else "tokens_per_second"
        found = [o.get(key, o["tokens_per_second"])[i] for i, o in enumerate(self.choices(who))]
        return spread(found, ".0f")

    def loss(self, who: str) -> float:
        """The most nats a token that `chosen` is expected to lose, by the reference model."""
        return max(o["expected_loss"][i] for i, o in enumerate(self.choices(who)))

    @property
    def native_fits(self) -> bool:
        """Whether no expert has to leave the GPU."""
        return len(self.settings) == 1

    @property
    def constants(self) -> list[Option]:
        """The cost model's that are assumed and were never measured on a GPU."""
        named = {c["name"]: c for c in self.record.samples["constants"]}
        return [named[name] for name in self.record.samples["assumed"]]

    @property
    def sensitivity(self) -> dict[str, list[str]]:
        """Other choices than `chosen("overall")`, and the single changes that lead to each."""
        found: dict[str, list[str]] = {}
        for entry in self.record.samples["sensitivity"]:
            choice = " or ".join(dict.fromkeys(entry["overall"]))
            found.setdefault(choice, []).append(entry["changed"])
        found.pop(self.chosen("overall"), None)
        return found

    @property
    def commands(self) -> list[str]:
        """How to run each of this engine's settings that is chosen."""
        chosen = self.record.samples["choices_here"]
        return [self._command(s) for s in self.settings if s["name"] in chosen]

    def _command(self, setting: Option) -> str:
        pool = int(self.record.metrics["memory_pool"] or 0)
        run = f"generate.py --budget_mib {pool // 2**20}"
        for flag in ("chunk_tokens", "kv_format"):
            run += f" --{flag} {self.record.setting[flag]}"
        low, mode = setting["low_format"], MISS_MODES[setting["mode"]]
        if setting["asked"] == "low":
            encode = f"quantize.py --format {low} --method gptq --calibration C --out low.gguf"
            return f"{encode}, {run} --model low.gguf"
        run += f" --miss_mode {setting['mode']}"
        run += f" --link_to_host {setting['link_to_host']:.2g}" if mode.computes else ""
        run += f" --low_format {low}" if low else ""
        return run + (f" --low_share {setting['low_share']:g}" if mode.low_banks == "cache" else "")


def spread(values: Sequence[float], form: str) -> str:
    """What is predicted under each routing, from least to most, or one value if they are alike."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _named(option: Option) -> str:
    """Its name, which says of llama.cpp how many layers' experts are on the CPU."""
    flag = option.get("flag", "").rstrip(": ")
    return option["name"].replace("--n-cpu-moe", flag) if flag else option["name"]


def plans(records: Sequence[Record]) -> list[Plan]:
    """Of a study's records those that are plans, by model and memory."""
    found = [r for r in records if r.subject == STUDY]
    found.sort(key=lambda r: (r.setting["model"], r.metrics["memory_vram"] or 0))
    return list(map(Plan, found))


def _predicted(key: str, form: str, unit: float = 1) -> Callable[[Option], str | None]:
    """A field of options, or of their traffic, under each routing."""

    def shown(option: Option) -> str | None:
        values = option.get(key) or [t[key] for t in option["traffic"] if key in t]
        return spread([value / unit for value in values], form) if values else None

    return shown


_speed, _hit_rate = _predicted("tokens_per_second", ".0f"), _predicted("hit_rate", ".2f")


def options_table(plan: Plan) -> str:
    """Every setting of this engine, and what llama.cpp would do."""
    columns = [
        Column("setting", _named),
        Column("residents", lambda o: o.get("residents")),
        Column("hit rate", _predicted("hit_rate", ".2f")),
        Column("round trips", _predicted("exits", ".1f")),
        Column("MB moved", _predicted("moved_bytes", ".1f", unit=1e6)),
        Column("below native", _predicted("low_uses", ".2f")),
        Column("on the GPU, %", _predicted("on_gpu", ".0f", unit=0.01)),
        Column("expected KL", lambda o: max(o["expected_loss"]), ".3f"),
        Column("tokens/s", _predicted("tokens_per_second", ".1f")),
        Column("if compiled", _predicted("compiled_tokens_per_second", ".1f")),
    ]
    return table(columns, [*plan.settings, *plan.baselines])


def decision_table(found: Sequence[Plan]) -> str:
    """What to do on which GPU."""

    def joint(plan: Plan) -> str:
        chosen, draws = plan.record.samples["choices_overall"], plan.record.samples["joint_overall"]
        return f"{100 * sum(share for name, share in draws if name in chosen):.0f} %"

    def of_smaller(value: Callable[[Plan], Any]) -> Callable[[Plan], Any]:
        return lambda plan: value(plan) if plan.loss("overall") else None

    def native(plan: Plan) -> str:
        return f"all fit: {plan.chosen('native')}" if plan.native_fits else plan.chosen("native")

    columns = [
        Column("model", lambda p: p.record.setting["model"]),
        Column(
            "GPU", lambda p: f"{p.record.setting['gpu']}, {p.record.metrics['gpu_vram_gib']:g} GiB"
        ),
        Column("fastest with native experts", native),
        Column("tokens/s", lambda p: p.speed("native")),
        Column("with smaller ones", of_smaller(lambda p: p.chosen("overall"))),
        Column("tokens/s", of_smaller(lambda p: p.speed("overall"))),
        Column("expected KL", of_smaller(lambda p: p.loss("overall")), ".3f"),
        Column("chosen in", joint),
        Column("native experts fetched: tokens/s", lambda p: _speed(p.settings[0])),
        Column("hit rate", lambda p: _hit_rate(p.settings[0])),
    ]
    return table(columns, found)


def reports_table(record: Record) -> str:
    """Speeds that others report beside the cost model's."""
    columns = [
        Column("what", "what"),
        Column("reported tokens/s", "reported", ".1f"),
        Column("predicted", "predicted", ".1f"),
        Column("predicted over reported", "ratio", ".2f"),
        Column("host bandwidth", "host_bandwidth"),
        Column("whose", "group"),
        Column("source", "source"),
    ]
    return table(columns, record.samples["rows"])
