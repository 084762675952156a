"""What a reader needs to check a sweep: which cells are absent, and how to run it again.

Owns sections 6 and 8 of the decision document.
"""

from __future__ import annotations

import json

from hobbit_jax import markdown
from hobbit_jax.report.results import Results


def render_gaps(results: Results) -> list[str]:
    """Lines of section 6: cells without a usable row."""
    lines = ["## 6. Failed, missing and unreadable cells", ""]
    groups = (
        ("failed", results.failed),
        ("missing", results.missing),
        ("unreadable", results.unreadable),
    )
    rows = [(cell.cell, kind, cell.reason) for kind, cells in groups for cell in cells]
    if rows:
        lines += markdown.table(("cell", "state", "reason"), rows)
    else:
        lines.append(f"None: all {results.n_cells} cells have a row.")
    if results.unexpected:
        names = ", ".join(f"`{markdown.one_line(cell)}`" for cell in results.unexpected)
        lines += [
            "",
            f"Rows that are no part of this sweep, left out everywhere: {names}.",
        ]
    return lines


_FULL_SIZE = (
    "The same question of models of full size, which have not been here; they want a GPU:",
    "",
    "```sh",
    "python scripts/sweep.py --config configs/reference.py:qwen3-30b-a3b \\",
    "    --config.model=Qwen3-30B-A3B-Q4_K_M.gguf --workdir out/qwen3",
    "python scripts/sweep.py --config configs/reference.py:mixtral-8x7b \\",
    "    --config.model=Mixtral-8x7B-Instruct-Q4_K_M.gguf --workdir out/mixtral",
    "```",
    "",
    "Their cost is reckoned and not measured: 100 cells each; two low tiers of Qwen3's experts, a "
    "quarter of an hour on 2 CPU cores; up to 3 million tokens decoded for gsm8k and humaneval.",
)


def render_reproduce(results: Results) -> list[str]:
    """Lines of section 8: commands, revisions, hashes and the config."""
    facts: dict[str, set[str]] = {}
    for row in results.rows:
        found = row.provenance
        values = {
            "git revision": found.get("git_revision"),
            "model sha256": found.get("model_sha256"),
            "text sha256": found.get("text_sha256"),
            "device": found.get("device"),
            **{f"tier {k} sha256": v for k, v in (found.get("tier_sha256") or {}).items()},
            **{f"version of {k}": v for k, v in (found.get("versions") or {}).items()},
        }
        for name, value in values.items():
            facts.setdefault(name, set()).add(
                markdown.ABSENT if value is None else markdown.one_line(str(value))
            )
    seconds = [row.provenance.get("seconds") for row in results.rows]
    known = [s for s in seconds if isinstance(s, int | float)]
    lines = ["## 8. Reproduce", "", "```sh", markdown.one_line(results.command), "```", ""]
    lines += [*_FULL_SIZE, ""]
    lines += markdown.table(
        ("what", "value"),
        [(name, ", ".join(sorted(values))) for name, values in facts.items()],
    )
    lines += [
        "",
        f"{len(known)} of {len(results.rows)} rows say how long they took: "
        f"{sum(known):.0f} seconds together.",
        "",
        "The resolved config:",
        "",
        "```json",
        json.dumps(results.config, indent=1, sort_keys=True),
        "```",
    ]
    return lines
