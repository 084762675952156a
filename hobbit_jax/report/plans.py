"""The section "What to run on a card": predictions for cards that nobody here has.

Owns what the document says of the planner's records (`planner/plan.py`, `planner/check.py`), and
their caveats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hobbit_jax import markdown
from hobbit_jax.planner.plan import faster_rival

_GIB = 2**30


@dataclass(frozen=True)
class Plans:
    """The records of a folder: plans, and at most one check of the model behind them."""

    plans: list[dict[str, Any]] = field(default_factory=list)
    check: dict[str, Any] | None = None


def load_plans(directory: Path) -> Plans | None:
    """The records in `directory`; None where there are none.

    Raises:
        ValueError: a file that is no such record; says which.
    """
    plans, check = [], None
    for path in sorted(directory.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            kind = record["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of the planner: {error!r}") from error
        if kind == "plan":
            plans.append(record)
        elif kind == "check":
            check = record
        else:
            raise ValueError(f"{path} is of kind {kind!r}; want plan or check")
    if not plans and check is None:
        return None
    plans.sort(key=lambda p: (p["model"]["name"], p["memory"]["vram"], p["card"]["name"]))
    return Plans(plans, check)


def render_plans(plans: Plans) -> list[str]:
    """The section, its heading included."""
    lines = [
        "## What to run on a card",
        "",
        "**Predictions from a cost model (`scripts/plan.py`), none of them measured on a GPU.** "
        "Residents and bytes follow from the engine's own sizing of its pool; hit rates and exits "
        "from replayed routing; tokens/s from bandwidths and costs of which most are assumed.",
    ]
    for model in dict.fromkeys(plan["model"]["name"] for plan in plans.plans):
        of_model = [plan for plan in plans.plans if plan["model"]["name"] == model]
        lines += ["", f"### {markdown.one_line(model)}", "", *_sizes(of_model[0]), ""]
        lines += _table(of_model)
        reasons = dict.fromkeys(r for p in of_model for r in p["routing"]["extrapolates"])
        lines += ["", *_verdict(of_model)]
        lines += ["", *(f"It extrapolates: {markdown.one_line(reason)}." for reason in reasons)]
    if plans.plans:
        lines += ["", *_reading(plans.plans[0])]
    if plans.check:
        lines += ["", "### How far off the planner is", "", *_check(plans.check)]
    return lines


def _sizes(plan: dict[str, Any]) -> list[str]:
    model = plan["model"]
    low = ", ".join(f"{size / 1e9:.1f} GB in {f}" for f, size in model["low_bytes"].items())
    return [
        f"{model['layers'] * model['experts']} experts: {model['native_bytes'] / 1e9:.1f} GB "
        f"natively (Q4_K_M), {low}."
    ]


def _table(plans: list[dict[str, Any]]) -> list[str]:
    rows = []
    for plan in plans:
        by_name = {s["name"]: s for s in plan["settings"]}
        chosen, native = by_name[plan["choice"]], plan["settings"][0]
        uniform = [s for s in plan["settings"] if s["asked"] == "low"]
        rows.append(
            (
                f"{plan['card']['name']}, {plan['memory']['vram'] / _GIB:g} GiB",
                f"{plan['memory']['pool'] / 1e9:.1f}",
                f"{native['residents']}, {native['hit_rate']:.2f}",
                f"{native['tokens_per_second']:.0f}",
                " / ".join(f"{s['tokens_per_second']:.0f}" for s in uniform) or None,
                _fastest(plan, "floor"),
                " / ".join(f"{s['tokens_per_second']:.0f}" for s in plan["rivals"]) or None,
                chosen["name"],
                f"{chosen['residents']}, {chosen['hit_rate']:.2f}",
                f"{chosen['traffic']['exits']:.1f}",
                f"{chosen['low_uses']:.2f}",
                f"{chosen['tokens_per_second']:.0f} (×{chosen['speedup']:.2f})",
                "a CPU rival" if faster_rival(plan) else "the choice",
            )
        )
    head = (
        "card", "pool GB", "native: residents, hit rate", "native tokens/s",
        "uniform Q3_K / Q2_K", "floor", "CPU rivals", "choice", "residents, hit rate",
        "exits a token", "low uses", "tokens/s, of native", "fastest",
    )  # fmt: skip
    return markdown.table(head, rows)


def _verdict(plans: list[dict[str, Any]]) -> list[str]:
    """In words, card by card."""
    lines = []
    for plan in plans:
        card, native = plan["card"]["name"], plan["settings"][0]
        if len(plan["settings"]) == 1:
            lines.append(f"- {card}: all experts fit natively; there is nothing to choose.")
            continue
        chosen = next(s for s in plan["settings"] if s["name"] == plan["choice"])
        text = (
            f"- {card}: {chosen['name']}, ×{chosen['speedup']:.2f} of native's "
            f"{native['tokens_per_second']:.1f} tokens/s"
        )
        if (rival := faster_rival(plan)) is not None:
            text += (
                f"; but {rival['name']} is predicted at {rival['tokens_per_second']:.1f} and "
                "degrades nothing"
            )
        hangs = {s["choice"] for s in plan["sensitivity"]} - {plan["choice"]}
        if hangs:
            names = " or ".join(sorted(hangs))
            text += f"; with one assumed constant halved or doubled also {names}"
        lines.append(text + ".")
    return lines


def _fastest(plan: dict[str, Any], mode: str) -> str | None:
    found = [s for s in plan["settings"] if s["mode"] == mode]
    if not found:
        return None
    best = max(found, key=lambda s: s["tokens_per_second"])
    return f"{best['tokens_per_second']:.0f} ({best['low_format']})"


def _reading(plan: dict[str, Any]) -> list[str]:
    constants = {c["name"]: c for c in plan["constants"]}
    assumed = ", ".join(
        f"{name} {constants[name]['value']:g} {constants[name]['unit']}" for name in plan["assumed"]
    )
    return [
        f"{plan['context']} tokens of context, prefill by {plan['chunk_tokens']}, "
        f"{plan['memory']['reserve'] / _GIB:g} GiB kept for the driver. *CPU rivals* compute on "
        "the CPU, natively, every expert (llama.cpp's --cpu-moe) / those of the layers that do not "
        "fit (--n-cpu-moe) / those that a profile finds least used; ours fetches them instead. "
        "With a smaller quant they would be faster too. "
        "*Low uses* is the share of selections that ran below native. The choice begins at "
        "native and takes what is expected to lose more only where it is "
        f"{plan['speedup_needed']:g} times as fast; the loss is that share times what the format "
        "cost the reference model, which is no measurement of this model.",
        "",
        f"Assumed, never measured on a GPU: {assumed}. Nothing is assumed to overlap.",
    ]


def _check(check: dict[str, Any]) -> list[str]:
    summary = check["summary"]
    where = "a GPU" if summary["on_gpu"] else "no GPU"
    clock = "time"
    if not summary["on_gpu"]:
        clock = "processor time"
        if check["link_gb_s"]:
            clock += f" and waits for an emulated link of {check['link_gb_s']:g} GB/s"
    time, counted = (
        f"a median of {s['median']:.2f}, from {s['low']:.2f} to {s['high']:.2f}"
        for s in (summary["time_ratio"], summary["time_ratio_counted"])
    )
    error = 100 * summary["time_ratio"]["median_error"]
    lines = [
        f"On {summary['device']} with {summary['cpu_count']} cores ({where}), the reference model "
        f"decoding in turns, {check['turns']} turns of {check['tokens_of_a_turn']:g} tokens. "
        "Constants were fitted to five settings in each turn; the other "
        f"{summary['settings']} were predicted. Predicted over measured, in {clock}: {time} "
        f"(median error {error:.0f} %) with replayed routing; {counted} with the counts that the "
        "engine reported. It says that counts and their costs add up as the model has it; it says "
        "nothing of a GPU's constants.",
        "",
    ]
    times = check["times"][summary["clock"]]
    if check["link_gb_s"] and not summary["on_gpu"]:
        lines[:-1] += [
            "",
            "Exits and moved bytes rise together, so the fit does not tell their costs apart: it "
            f"finds a link of {times['constants']['pcie_gb_s']['median']:.2f} GB/s where there is "
            f"one of {check['link_gb_s']:g}. Sums are predicted, single constants not measured.",
        ]
    lines += markdown.table(
        (
            "setting", "ms a token", "predicted over measured, replayed", "the same, counted",
            "hit rate, replayed", "exits, replayed", "MB moved, replayed",
        ),
        (
            (
                row["setting"],
                f"{times['measured_ms'][i]['median']:.1f}",
                f"{times['ratio_replayed'][i]['median']:.2f}",
                f"{times['ratio_counted'][i]['median']:.2f}"
                + (" (fitted)" if row["calibrates"] else ""),
                f"{row['hit_rate']:.3f}, {row['hit_rate_replayed']:.3f}",
                f"{row['exits']:.2f}, {row['exits_replayed']:.2f}",
                f"{row['moved_bytes'] / 1e6:.3f}, {row['moved_bytes_replayed'] / 1e6:.3f}",
            )
            for i, row in enumerate(check["rows"])
        ),
    )  # fmt: skip
    if check["public"]:
        lines += [
            "",
            "Speeds that others report, predicted with the default constants and the card's "
            "figures, not tuned to them:",
            "",
            *markdown.table(
                ("what", "reported", "predicted", "ratio", "host bandwidth", "source"),
                (
                    (
                        row["what"],
                        f"{row['reported']:.1f}",
                        f"{row['predicted']:.1f}",
                        f"×{row['ratio']:.2f}",
                        row["host_bandwidth"],
                        row["source"],
                    )
                    for row in check["public"]
                ),
            ),
        ]
    return lines
