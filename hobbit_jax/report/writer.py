"""From a sweep's folder to its decision document and figures.

Owns the files that a report writes. Called by `scripts/report.py`. The same rows give the
same bytes of every file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hobbit_jax.atomic import replacing
from hobbit_jax.report import figures
from hobbit_jax.report.document import render
from hobbit_jax.report.read_results import load_results
from hobbit_jax.report.results import NATIVE, RANDOM, Plan, Results
from hobbit_jax.report.verdict import Outcome, Rule, Verdict, verdicts


def write_report(workdir: Path) -> Path:
    """Writes `decision.md` and `figures/*.png` into `workdir`, each whole or not at all.

    A figure of an earlier run that these rows do not give is removed.

    Returns:
        The path of the document.

    Raises:
        ValueError: `workdir` holds no sweep, a rule without a limit, or no row.
    """
    results = load_results(workdir)
    rule = Rule.of(results.rule)
    answers = verdicts(results, rule)
    routing = next((r for r in results.rows if r.plan.signal == NATIVE and r.selections_LE), None)
    images = {
        figures.NAMES[0]: figures.quality_vs_bytes(results, rule.kl_limit),
        figures.NAMES[1]: figures.speed_vs_budget(results, _plans_to_show(results, answers)),
        figures.NAMES[2]: figures.expert_use(routing),
    }
    (workdir / "figures").mkdir(exist_ok=True)
    for name, image in images.items():
        path = workdir / "figures" / name
        if image is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, image)
    drawn = {name for name, image in images.items() if image is not None}
    document = workdir / "decision.md"
    _write(document, render(results, rule, answers, drawn).encode())
    return document


def _plans_to_show(results: Results, answers: Sequence[Verdict]) -> list[Plan]:
    best = {a.best.row.plan for a in answers if a.best.outcome is not Outcome.NOT_NEEDED}
    control = {p.order[3:5] for p in best}
    return [
        plan
        for plan in results.plans
        if not plan.is_mixed
        or plan in best
        or (plan.signal == RANDOM and plan.order[3:5] in control)
    ]


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)
