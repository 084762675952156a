"""Low-precision plans against the native cache at equal bytes, on recorded routing.

Owns which cells are replayed and how their table reads; the replay is `cache/replay.py`'s. Every
cell of a capacity has the bytes of that many native slots. A plan by frequency takes its counts
from a profile: another text's, as a user would have them, or the replayed text's own, which no user
has and which bounds what a better profile could bring.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hobbit_jax import markdown
from hobbit_jax.atomic import replacing
from hobbit_jax.cache.replay import lay_out, replay
from hobbit_jax.cache.trace import Trace

SHARES = (0.25, 0.5, 0.75, 0.9)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One plan at one capacity."""

    capacity: int
    plan: str
    low_share: float = 0.0
    own_profile: bool = False
    seed: int = 0

    @property
    def label(self) -> str:
        """The row of the table that it belongs to; seeds share one."""
        if self.plan == "native":
            return "native"
        if self.plan == "floor":
            return "floor"
        if self.low_share == 1.0:
            return "uniform low"
        by = {"frequency": "frequency, other text", "random": "random (control)"}[self.plan]
        by = "frequency, own text" if self.own_profile else by
        return f"{self.low_share:.0%} low by {by}"


def cells(capacities: Sequence[int]) -> list[Cell]:
    """All of them, each capacity's native one first."""
    listed = []
    for capacity in capacities:
        listed.append(Cell(capacity, "native"))
        for own in (False, True):
            listed += [Cell(capacity, "frequency", share, own) for share in SHARES]
        listed += [Cell(capacity, "random", s, seed=seed) for s in SHARES for seed in SEEDS]
        listed += [Cell(capacity, "frequency", 1.0), Cell(capacity, "floor")]
    return listed


def run(
    cell: Cell, trace: Trace, other: Trace, policy: str, expert_bytes: int, low_bytes: int
) -> dict[str, Any]:
    """Replays one cell; a floor that the bytes cannot hold has no figures but says so."""
    row: dict[str, Any] = {"label": cell.label, **vars(cell), "trace": trace.name, "policy": policy}
    profile = trace if cell.own_profile else other
    try:
        layout = lay_out(
            trace, cell.capacity, expert_bytes, cell.plan, low_bytes, cell.low_share, profile,
            cell.seed,
        )  # fmt: skip
    except ValueError as error:
        if cell.plan != "floor":
            raise
        return {**row, "status": str(error)}
    figures = replay(trace, policy, layout, cell.capacity, profile)
    if cell.plan != "frequency":
        figures.pop("profile")
    # Speeds are another machine's next time; the rest is not.
    return {**row, **{k: v for k, v in figures.items() if "per_s" not in k and "cpu_s" not in k}}


def rows(
    path: Path,
    listed: Sequence[Cell],
    trace: Trace,
    other: Trace,
    policy: str,
    expert_bytes: int,
    low_bytes: int,
) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, one per cell; those that it lacks are replayed and written.

    Raises:
        ValueError: the file has rows of other cells.
    """
    done = []
    if path.is_file():
        done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row, cell in zip(done, listed, strict=False):
        wanted = {**vars(cell), "trace": trace.name, "policy": policy}
        if any(row.get(key) != value for key, value in wanted.items()):
            raise ValueError(f"{path} has rows of other settings; give another --out")
    for cell in tqdm(listed[len(done) :], desc=path.stem, disable=None):
        done.append(run(cell, trace, other, policy, expert_bytes, low_bytes))
        with replacing(path) as partial:
            lines = (json.dumps(row) + "\n" for row in done)
            partial.write_text("".join(lines), encoding="utf-8")
    return done


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown for the rows of one trace, in their order."""
    head = ["slots' bytes", "plan", "residents", "× native", "hit rate", "waits", "degraded"]
    lines, by_label = [], {}
    for row in rows:
        by_label.setdefault((row["capacity"], row["label"]), []).append(row)
    for (capacity, label), same in by_label.items():
        if "status" in same[0]:
            lines.append([capacity, label, *[None] * 6])
            continue
        native = by_label[capacity, "native"][0]

        def span(key: str, form: str, same=same, divisor: float = 1.0) -> str:
            values = [row[key] / divisor for row in same]
            middle = form.format(float(np.median(values)))
            if len(values) == 1:
                return middle
            return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"

        lines.append(
            [
                capacity,
                label,
                span("residents", "{:.0f}"),
                span("residents", "{:.2f}", divisor=native["residents"]),
                span("hit_rate", "{:.3f}"),
                span("wait_rate", "{:.3f}"),
                span("degraded_share", "{:.3f}"),
                span("bytes_moved", "{:.2f}", divisor=native["bytes_moved"]),
            ]
        )
    return markdown.table([*head, "bytes moved, × native"], lines)
