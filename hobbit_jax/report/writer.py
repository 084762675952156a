"""From a sweep's folder to its decision document and figures.

Owns the files that a report writes. The same rows give the same bytes of every file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hobbit_jax.atomic import replacing
from hobbit_jax.report import figures
from hobbit_jax.report.document import Studies, render, render_studies
from hobbit_jax.report.encoders import render_compounding
from hobbit_jax.report.frontier_figure import frontier_figure
from hobbit_jax.report.frontier_results import is_frontier, load_frontier
from hobbit_jax.report.peers import FOLDER, load_peers
from hobbit_jax.report.plans import load_plans
from hobbit_jax.report.read_results import load_results
from hobbit_jax.report.results import NATIVE, RANDOM, Plan, Results
from hobbit_jax.report.signals import FIGURE, render_signals
from hobbit_jax.report.verdict import Outcome, Rule, Verdict, verdicts


def write_report(workdir: Path) -> Path:
    """Writes `decision.md` and `figures/*.png` into `workdir`, each whole or not at all.

    What stands beside the sweep is read from `workdir`/frontier and /compounding (studies of
    quality alone), /peers (comparisons with other programs) and /planner (predictions); where
    `workdir` itself is a study of quality, the document is about nothing else. A figure of an
    earlier run that these rows do not give is removed.

    Returns:
        The path of the document.

    Raises:
        ValueError: `workdir` holds no sweep, a rule without a limit, or no row.
    """
    if is_frontier(workdir):
        return _write_study(workdir)
    frontier, compounding = (
        load_frontier(workdir / name) if is_frontier(workdir / name) else None
        for name in ("frontier", "compounding")
    )
    peers, plans = load_peers(workdir / FOLDER), load_plans(workdir / "planner")
    studies = Studies(frontier, compounding, peers, plans)
    results = load_results(workdir)
    rule = Rule.of(results.rule)
    answers = verdicts(results, rule)
    routing = next((r for r in results.rows if r.plan.signal == NATIVE and r.selections_LE), None)
    images = {
        figures.NAMES[0]: figures.quality_vs_bytes(results, rule.kl_limit),
        figures.NAMES[1]: figures.speed_vs_budget(results, _plans_to_show(results, answers)),
        figures.NAMES[2]: figures.expert_use(routing),
        FIGURE: frontier_figure(frontier) if frontier else None,
    }
    drawn = _write_figures(workdir, images)
    document = workdir / "decision.md"
    text = render(results, rule, answers, drawn, studies)
    _write(document, text.encode())
    return document


def _write_study(workdir: Path) -> Path:
    study = load_frontier(workdir)
    drawn = _write_figures(workdir, {FIGURE: frontier_figure(study)})
    through = any(m.plan.through for m in study.measured)
    section = (
        ["## Compounding error", "", *render_compounding(study)]
        if through
        else ["## Which signal", "", *render_signals(study, drawn)]
    )
    sweep = study.sweep
    text = render_studies(sweep["title"], sweep["question"], sweep["command"], [section])
    document = workdir / "decision.md"
    _write(document, text.encode())
    return document


def _write_figures(workdir: Path, images: dict[str, bytes | None]) -> set[str]:
    """Writes the figures that there are, removes the others; the names of the former."""
    (workdir / "figures").mkdir(exist_ok=True)
    for name, image in images.items():
        path = workdir / "figures" / name
        if image is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, image)
    return {name for name, image in images.items() if image is not None}


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
