"""What the rows of a sweep cannot show, derived from what they say about themselves.

Owns the document's threats to validity. Nothing is assumed about the machine: each sentence depends
on the device, the sizes and the hashes that the rows record.
"""

from __future__ import annotations

from collections.abc import Iterator

from hobbit_jax.report.results import MIB, RANDOM, Results
from hobbit_jax.report.verdict import Rule

SMALL_MODEL_BYTES = 2**30


def threats(results: Results, rule: Rule) -> list[str]:
    """One sentence or two for each threat that applies to these rows."""
    n_mixed = sum(plan.is_mixed for plan in results.plans)
    return [
        *_devices(results, rule),
        *_model(results),
        *_sizes(results),
        *_consistency(results),
        "The best candidate is chosen on the text that it is judged on, among "
        f"{n_mixed} mixed plans. Part of its lead may be luck.",
        "Intervals resample the evaluation windows of one text. They do not cover another text, "
        "another model or another training run. They are compared unpaired, so a difference "
        "that is called equal may still be real.",
        "Cells are timed one after the other, minutes apart. The range over a cell's repeats does "
        "not cover what else the machine did meanwhile: unless it was quiet for the whole sweep, "
        "do not rank plans by tokens/s.",
        "One rival is not in these rows: computing a missed expert on the CPU at full precision "
        "(llama.cpp --cpu-moe). On a desktop it may beat every plan here.",
    ]


def _devices(results: Results, rule: Rule) -> Iterator[str]:
    names = sorted({row.device or "an unnamed device" for row in results.rows})
    if not names:
        return
    where = ", ".join(names)
    if not any(row.on_gpu for row in results.rows):
        yield (
            f"All rows were measured on {where}, and none of them names a GPU. A fetch there is "
            "a copy in host memory, not a PCIe transfer, and a low-bit product runs other code "
            "than on a GPU. Tokens/s and their ratios say nothing about a card. Hit rates, "
            "bytes and quality are counts: they do not depend on the device's speed."
        )
    elif all(row.on_gpu for row in results.rows):
        yield (
            f"Timings are of {where} with its own host link. The {rule.card} of the rule was "
            "not measured unless it is this device; for it there is only the bound."
        )
    else:
        yield (
            f"Rows come from GPUs and from other devices ({where}). Speed is judged on the GPU "
            "rows only."
        )
    if len(names) > 1:
        yield "Rows of different devices are never compared in speed; such a ratio is absent."
    yield (
        "The bound counts expert bytes at the rule's bandwidths. Real decode is slower, by an "
        "amount that these rows do not give."
    )


def _model(results: Results) -> Iterator[str]:
    sizes = {
        (row.plan.model, row.store.experts, row.store.native_bytes)
        for row in results.rows
        if row.store and row.store.experts and row.store.native_bytes
    }
    for model, experts, native_bytes in sorted(sizes):
        text = f"`{model}` has {experts} layer-expert pairs, {native_bytes / MIB:.2f} MiB natively."
        if native_bytes < SMALL_MODEL_BYTES:
            text += (
                " That is a small model. Larger ones route over more experts, are trained longer "
                "and may bear low precision better or worse; repeat the sweep on them before "
                "deciding for them."
            )
        yield text


def _sizes(results: Results) -> Iterator[str]:
    texts = sorted({r.quality.tokens for r in results.rows if r.quality and r.quality.tokens})
    decoded = sorted({r.decode.tokens for r in results.rows if r.decode and r.decode.tokens})
    problems = sorted({t.problems for r in results.rows for t in r.tasks.values() if t.problems})
    repeats = sorted({row.decode.repeats for row in results.rows if row.decode})
    parts = []
    if texts:
        parts.append(f"quality on {_span(texts)} tokens")
    if problems:
        parts.append(f"tasks on {_span(problems)} problems")
    if decoded:
        parts.append(f"cost on {_span(decoded)} decoded tokens in {_span(repeats)} repeats")
    if parts:
        yield "Sizes of a row: " + ", ".join(parts) + "."
    if results.rows and not problems:
        yield "No task was scored. KL can stay low where reasoning breaks."
    seeds = {row.plan.seed for row in results.rows if row.plan.signal == RANDOM}
    if len(seeds) == 1:
        yield (
            "The random control has one seed. Its interval covers the text, not the draw of "
            "experts."
        )


def _consistency(results: Results) -> Iterator[str]:
    for name in ("git_revision", "model_sha256", "text_sha256"):
        values = {str(row.provenance.get(name)) for row in results.rows}
        if len(values) > 1:
            yield f"The rows differ in {name}: {', '.join(sorted(values))}."
    if any("+dirty" in str(row.provenance.get("git_revision")) for row in results.rows):
        yield "Some rows were made from a checkout with uncommitted changes."
    for plan in results.plans:
        kls = {row.kl_mean for row in results.rows_of(plan) if row.kl_mean}
        if len({f"{kl.value:.4f}" for kl in kls}) > 1:
            yield (
                f"The KL of {results.label(plan)} differs between budgets, although outputs "
                "should not depend on the budget. The first row is shown."
            )
    seen: dict[tuple, str] = {}
    for row in results.rows:
        first = seen.setdefault((row.plan, row.setting), row.cell)
        if first != row.cell:
            yield (
                f"`{row.cell}` repeats `{first}` in everything that this document compares; "
                "judgements use the first."
            )


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
