"""A plan's record as text for people.

Owns the wording.
"""

from __future__ import annotations

from typing import Any

from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.planner.plan import GIB, faster_rival


def render(plan: dict[str, Any], check: dict[str, Any]) -> str:
    """The answer, most important first.

    Args:
        plan: `make_plan`'s record.
        check: `plan.recorded_check`'s, if there is one.
    """
    return "\n".join(
        [*_facts(plan), "", *_settings(plan), "", *_choice(plan), "", *_caveats(plan, check)]
    )


def _facts(plan: dict[str, Any]) -> list[str]:
    model, memory = plan["model"], plan["memory"]
    pairs = model["layers"] * model["experts"]
    sizes = {"natively": model["native_bytes"]}
    sizes |= {f"in {format}": size for format, size in model["low_bytes"].items()}
    parts = ", ".join(
        f"{name.replace('_', ' ')} {memory[name] / GIB:.2f}"
        for name in ("dense", "kv_cache", "scratch", "reserve")
    )
    lines = [
        f"{model['name']} on {plan['card']['name']}: {pairs} experts "
        f"({model['layers']} layers of {model['experts']}, {model['experts_per_token']} a token)",
    ]
    for name, size in sizes.items():
        fits = "all fit" if size <= memory["pool"] else f"{memory['pool'] / size:.0%} fit"
        lines.append(f"  experts {name:<9} {size / 1e9:6.2f} GB  {fits}")
    lines.append(
        f"  pool for experts   {memory['pool'] / 1e9:6.2f} GB = {memory['vram'] / GIB:g} GiB less "
        f"{parts} (GiB; {plan['context']} tokens of context, prefill by {plan['chunk_tokens']})"
    )
    return lines


def _settings(plan: dict[str, Any]) -> list[str]:
    widest = max(len(s["name"]) for s in [*plan["settings"], *plan["rivals"]])
    head = (
        f"{'setting':<{widest}}  residents    hit  exits  moved MB  low uses  tokens/s  of native"
    )
    lines = [head + "  (all predicted)", "-" * len(head)]
    for s in plan["settings"]:
        traffic = s["traffic"]
        lines.append(
            f"{s['name']:<{widest}}  {s['residents']:>9}  {s['hit_rate']:.3f}  "
            f"{traffic['exits']:>5.1f}  {traffic['moved_bytes'] / 1e6:>8.1f}  "
            f"{s['low_uses']:>8.2f}  {s['tokens_per_second']:>8.1f}  {s['speedup']:>8.2f}x"
        )
    native = plan["settings"][0]["tokens_per_second"]
    for s in plan["rivals"]:
        lines.append(
            f"{s['name']:<{widest}}  {s['on_card']:>8.0%} on the card, the rest computed by the CPU"
            f"{s['tokens_per_second']:>11.1f}  {s['tokens_per_second'] / native:>8.2f}x"
        )
    lines += [f"{name}: left out, {reason}" for name, reason in plan["left_out"].items()]
    return lines


def _choice(plan: dict[str, Any]) -> list[str]:
    chosen = next(s for s in plan["settings"] if s["name"] == plan["choice"])
    lines = [
        f"Choice: {chosen['name']}, {chosen['tokens_per_second']:.1f} tokens/s predicted.",
        f"Run it: {how_to_run(chosen, plan['memory']['pool'], plan['chunk_tokens'])}.",
    ]
    lines.append(
        "Rule: least expected loss first, the next where it is "
        f"{plan['speedup_needed']:g} times as fast. The loss is the share of low "
        "uses times what the format cost the reference model; measure it on yours (sweep.py)."
    )
    speed = chosen["tokens_per_second"]
    rivals = [plan["settings"][0], *_uniform(plan), *plan["rivals"]]
    compared = [
        f"{speed / s['tokens_per_second']:.2f}x {s['name']}"
        for s in rivals
        if s["name"] != chosen["name"]
    ]
    if compared:
        lines.append("Against: " + ", ".join(compared) + ".")
    rival = faster_rival(plan)
    if rival is not None:
        lines.append(
            f"BETTER ELSEWHERE: {rival['name']} is predicted to be faster "
            f"({rival['tokens_per_second']:.1f} tokens/s) and degrades nothing. hobbit_jax does "
            "not compute on the CPU; llama.cpp does."
        )
    return lines


def how_to_run(setting: dict[str, Any], pool_bytes: int, chunk_tokens: int) -> str:
    """The command, or what there is instead of one."""
    run = f"generate.py --budget_mib {pool_bytes // 2**20} --chunk_tokens {chunk_tokens}"
    if setting["asked"] == "low":
        return (
            f"quantize.py --format {setting['low_format']} --out low.gguf, {run} --model low.gguf"
        )
    if setting["asked"] == "frequency":
        return (
            "a static plan (sweep.py with signal frequency, low_fraction "
            f"{setting['low_pairs']:g}, low_format {setting['low_format']}); generate.py has no "
            "flag for one"
        )
    run += f" --miss_mode {setting['mode']}"
    if setting["low_format"] is None:
        return run
    run += f" --low_format {setting['low_format']}"
    cached = MISS_MODES[setting["mode"]].low_banks == "cache"
    return f"{run} --low_share {setting['low_share']:g}" if cached else run


def _uniform(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for s in plan["settings"] if s["asked"] == "low"]


def _caveats(plan: dict[str, Any], check: dict[str, Any]) -> list[str]:
    lines = [f"Routing: {plan['routing']['source']}."]
    lines += [f"EXTRAPOLATES: {reason}." for reason in plan["routing"]["extrapolates"]]
    lines.append(
        "Assumed and never measured on a GPU: "
        + ", ".join(
            f"{c['name']} {c['value']:g}" for c in plan["constants"] if c["name"] in plan["assumed"]
        )
        + "."
    )
    moved = [s for s in plan["sensitivity"] if s["choice"] != plan["choice"]]
    if moved:
        lines.append(
            "The choice hangs on them: "
            + "; ".join(f"{s['choice']} with {s['name']} {s['value']:g}" for s in moved)
            + "."
        )
    elif plan["sensitivity"]:
        lines.append("Halving or doubling any one of them leaves the choice as it is.")
    ratio = check["time_ratio"]
    where = "a GPU" if check["on_gpu"] else f"{check['cpu_count']} CPU cores only, never on a GPU"
    lines.append(
        f"Checked on {where} ({check['device']}): median error "
        f"{100 * ratio['median_error']:.0f} % of the time of {check['settings']} "
        f"settings that no constant was fitted to (predicted over measured "
        f"{ratio['low']:.2f} to {ratio['high']:.2f})."
    )
    lines.append(
        "JAX takes 75 % of a card unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; prefill "
        "and the start are not predicted."
    )
    return lines
