"""A plan's record as text for people.

Owns the wording.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hobbit_jax.cache.miss_modes import MISS_MODES
from hobbit_jax.planner.plan import DRAWS, GIB


def render(plan: dict[str, Any], check: dict[str, Any]) -> str:
    """The answer, most important first.

    Args:
        plan: `make_plan`'s record.
        check: `recorded_check`'s.
    """
    return "\n".join(
        [*_facts(plan), "", *_options(plan), "", *_choice(plan), "", *_caveats(plan, check)]
    )


def spread(values: Sequence[float], form: str) -> str:
    """What is predicted under each routing, from least to most, or one value if they are alike."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def alternatives(names: Sequence[str]) -> str:
    """The choices under each routing, the least local first."""
    return " or ".join(dict.fromkeys(names))


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
        f"{model['name']} on {plan['gpu']['name']}: {pairs} experts "
        f"({model['layers']} layers of {model['experts']}, {model['experts_per_token']} a token)",
    ]
    for name, size in sizes.items():
        fits = "all fit" if size <= memory["pool"] else f"{memory['pool'] / size:.0%} fit"
        lines.append(f"  experts {name:<9} {size / 1e9:6.2f} GB  {fits}")
    lines.append(
        f"  pool for experts   {memory['pool'] / 1e9:6.2f} GB = {memory['vram'] / GIB:g} GiB less "
        f"{parts} (GiB; {plan['context']} tokens of context in {plan['kv_format']}, prefill by "
        f"{plan['chunk_tokens']})"
    )
    return lines


def _options(plan: dict[str, Any]) -> list[str]:
    widest = max(len(s["name"]) for s in [*plan["settings"], *plan["baselines"]])
    head = (
        f"{'setting':<{widest}}  residents  hit rate   round trips     moved MB   below native  "
        "loss    tokens/s   in a compiled engine"
    )
    lines = [head + "  (all predicted)", "-" * len(head)]
    for s in plan["settings"]:
        exits = [traffic["exits"] for traffic in s["traffic"]]
        moved = [traffic["moved_bytes"] / 1e6 for traffic in s["traffic"]]
        lines.append(
            f"{s['name']:<{widest}}  {s['residents']:>9}  {spread(s['hit_rate'], '.2f'):>9}  "
            f"{spread(exits, '.1f'):>11}  {spread(moved, '.1f'):>12}  "
            f"{spread(s['low_uses'], '.2f'):>12}  {max(s['expected_loss']):.3f}  "
            f"{spread(s['tokens_per_second'], '.1f'):>9}  "
            f"{spread(s['compiled_tokens_per_second'], '.1f'):>12}"
        )
    for s in plan["baselines"]:
        on_gpu = f"{s['flag']}{spread(s['on_gpu'], '.0%')} of selections on the GPU, others on CPU"
        lines.append(
            f"{s['name']:<{widest}}  {on_gpu:<63}  {max(s['expected_loss']):.3f}  "
            f"{'':>9}  {spread(s['tokens_per_second'], '.1f'):>12}"
        )
    lines += [f"{name}: left out, {reason}" for name, reason in plan["left_out"].items()]
    return lines


def _choice(plan: dict[str, Any]) -> list[str]:
    options, choices = [*plan["settings"], *plan["baselines"]], plan["choices"]
    said = {
        who: f"{alternatives(names)}, {speeds(options, names, who)} tokens/s predicted"
        for who, names in choices.items()
    }
    lines = [f"Choice in this engine: {said['here']}."]
    for setting in plan["settings"]:
        if setting["name"] in choices["here"]:
            lines.append(f"Run it: {how_to_run(setting, plan)}.")
    if choices["overall"] != choices["here"]:
        lines.append(f"BETTER ELSEWHERE: {said['overall']}.")
    lines.append(f"In a compiled engine with these modes: {said['compiled']}.")
    lines.append(
        "Rule: the fastest that loses nothing first, then by expected loss, each where it is "
        f"{plan['speedup_needed']:g} times as fast, up to a loss of {plan['most_loss']:g}. The "
        "loss is the share of low uses times what the format cost the reference model; measure it "
        "on yours (sweep.py)."
    )
    return lines


def speeds(options: Sequence[Mapping[str, Any]], names: Sequence[str], who: str) -> str:
    """Tokens a second of the options that `who` chose under each routing."""
    by_name = {option["name"]: option for option in options}
    key = "compiled_tokens_per_second" if who == "compiled" else "tokens_per_second"
    found = [
        by_name[name].get(key, by_name[name]["tokens_per_second"])[at]
        for at, name in enumerate(names)
    ]
    return spread(found, ".0f")


def how_to_run(setting: dict[str, Any], plan: dict[str, Any]) -> str:
    """The command of a setting of ours."""
    run = (
        f"generate.py --budget_mib {plan['memory']['pool'] // 2**20} --chunk_tokens "
        f"{plan['chunk_tokens']} --kv_format {plan['kv_format']}"
    )
    low = setting["low_format"]
    if setting["asked"] == "low":
        return (
            f"quantize.py --format {low} --method gptq --calibration C --out low.gguf, {run} "
            "--model low.gguf"
        )
    mode = MISS_MODES[setting["mode"]]
    run += f" --miss_mode {setting['mode']}"
    run += f" --link_to_host {setting['link_to_host']:.2g}" if mode.computes else ""
    run += f" --low_format {low}" if low else ""
    return run + (f" --low_share {setting['low_share']:g}" if mode.low_banks == "cache" else "")


def _caveats(plan: dict[str, Any], check: dict[str, Any]) -> list[str]:
    sources = plan["routing"]["source"]
    lines = [f"Routing: {' to '.join(sources)}."]
    lines += [f"EXTRAPOLATES: {reason}." for reason in plan["routing"]["extrapolates"]]
    values = {c["name"]: c["value"] for c in plan["constants"]}
    lines.append(
        "Assumed and never measured on a GPU: "
        + ", ".join(f"{name} {values[name]:g}" for name in plan["assumed"])
        + "."
    )
    moved: dict[str, list[str]] = {}
    for entry in plan["sensitivity"]:
        if entry["overall"] != plan["choices"]["overall"]:
            moved.setdefault(alternatives(entry["overall"]), []).append(entry["changed"])
    lines.append(
        "One at a time, halved or doubled: "
        + (
            "; ".join(f"{name} with {', '.join(changes)}" for name, changes in moved.items())
            or "the best choice stays"
        )
        + "."
    )
    often = ", ".join(f"{name} {share:.0%}" for name, share in plan["joint"]["overall"])
    lines.append(f"All at once, with the routing, context and KV format ({DRAWS} draws): {often}.")
    lines.append(
        f"Checked against {check['reports']} public reports, and on no GPU here: median error "
        f"{check['median_error']:.0%}, {check['pairs_in_order']} of {check['pairs']} pairs in "
        "order."
    )
    lines.append(
        "JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; prefill "
        "and the start are not predicted."
    )
    return lines
