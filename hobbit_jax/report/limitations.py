"""What the records of a sweep cannot show, derived from what they say about themselves."""

from __future__ import annotations

from collections.abc import Iterator

from hobbit_jax.record import Records
from hobbit_jax.report.answers import SMALL_MODEL_BYTES
from hobbit_jax.report.sweep import Sweep, is_candidate, is_control, low_format, on_gpu, trial
from hobbit_jax.report.table import MIB, listed
from hobbit_jax.report.verdict import task_names


def limitations(sweep: Sweep, found: Records) -> Iterator[str]:
    """One sentence or two for each limitation that applies."""
    yield from _devices(sweep)
    yield from _model(sweep)
    yield from _sizes(sweep)
    yield from _consistency(sweep)
    n_mixed = sum(map(is_candidate, sweep.per_plan()))
    yield (
        f"The best candidate is chosen on the text that it is judged on, among {n_mixed} mixes. "
        "Part of its lead may be luck."
    )
    yield (
        "Intervals resample the evaluation windows of one text. They do not cover another text, "
        "another model, another training run or another draw of experts."
    )
    yield "Bytes moved, hit rates and round trips are totals over the repeats and have no interval."
    yield (
        "Computing a missed expert on the CPU at full precision is no part of this sweep. On a "
        "desktop it may beat every plan here."
    )
    if found.of("decode"):
        yield (
            "Two things must not be read together: speeds on the emulated link were measured with "
            "plainly encoded low copies, the quality of this sweep with those of its own encoder."
        )


def _devices(sweep: Sweep) -> Iterator[str]:
    names = sorted({record.device or "an unnamed device" for record in sweep.records})
    gpus = sum(map(on_gpu, sweep.records))
    if not gpus:
        yield (
            f"All records were measured on {listed(names)}, and none of them names a GPU. A fetch "
            "there is a copy in host memory, so tokens/s are left out and the time to the first "
            "token says nothing about a GPU. Hit rates, bytes and quality do not depend on it."
        )
    elif gpus < len(sweep.records):
        yield f"Records come from GPUs and from other devices ({listed(names)})."
    if len(names) > 1:
        yield "Records of different devices are never compared in speed."


def _model(sweep: Sweep) -> Iterator[str]:
    names = ("experts", "native_bytes")
    sizes = {tuple(r.metrics.get(name) or 0 for name in names) for r in sweep.records}
    for experts, native_bytes in sorted(size for size in sizes if all(size)):
        text = f"The model has {experts} experts in all layers, {native_bytes / MIB:.2f} MiB."
        if native_bytes < SMALL_MODEL_BYTES:
            text += (
                " That is a small model. Larger ones route over more experts, are trained longer "
                "and may bear low precision better or worse: repeat the sweep on them."
            )
        yield text


def _sizes(sweep: Sweep) -> Iterator[str]:
    def span(metric: str) -> str:
        values = sorted({r.metrics.get(metric) or 0 for r in sweep.records} - {0})
        return " to ".join(map(str, dict.fromkeys([*values[:1], *values[-1:]]))) or "0"

    tasks = sorted({name for record in sweep.records for name in task_names(record)})
    scored = "".join(
        f", {name.removeprefix('task_')} on {span(f'{name}_problems')} problems" for name in tasks
    )
    yield (
        f"Quality was measured on {span('evaluation_tokens')} tokens and cost on "
        f"{span('decode_tokens')} decoded tokens{scored}."
    )
    if not tasks:
        yield "No task was scored. KL can stay low where reasoning breaks."
    elif not any(f"{tasks[0]}_solved" in record.samples for record in sweep.records):
        yield (
            "These records do not say which problem was solved, so task scores are compared as "
            "independent shares, whose intervals are wider than paired ones."
        )
    seeds = {trial(record).seed for record in sweep.records if is_control(record)}
    if seeds:
        yield (
            f"The random control has {len(seeds)} draw{'s' if len(seeds) > 1 else ''}. Below every "
            "one of few draws does not mean below random choice in general; 20 are wanted."
        )


def _consistency(sweep: Sweep) -> Iterator[str]:
    facts: dict[str, set[str]] = {}
    for record in sweep.records:
        low = f"low_{low_format(record)}"
        facts.setdefault("revision", set()).add(str(record.revision))
        for name, shown in (("model", "model"), ("text", "text"), (low, f"{low[4:]} file")):
            if name != "low_None":
                facts.setdefault(shown, set()).add(record.file_sha256.get(name, "?"))
    for name, values in facts.items():
        if len(values) > 1:
            yield f"The records differ in {name}: {', '.join(sorted(values))}."
    if any("+dirty" in revision for revision in facts.get("revision", ())):
        yield "Some records were made from a checkout with uncommitted changes."
