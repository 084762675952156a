"""From a folder of records to the decision document, its appendix and its figures.

Owns the files that a report writes: `decision.md` (two pages), `appendix.md` (everything that it
rests on) and `figures/`. Their text stands in `templates/`, which call the tables and answers. The
same records give the same bytes of every file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from hobbit_jax.atomic import replacing
from hobbit_jax.record import (
    CacheTrial,
    Records,
    Study,
    read_records,
    read_study,
    study_names,
)
from hobbit_jax.report import (
    answers,
    baseline_tables,
    figures,
    frontier_tables,
    planner_tables,
    sweep_tables,
)
from hobbit_jax.report.frontier import Frontier
from hobbit_jax.report.limitations import limitations
from hobbit_jax.report.sweep import Sweep
from hobbit_jax.report.table import listed, one_line
from hobbit_jax.report.verdict import Rule, verdicts

DOCUMENT, APPENDIX, FIGURES = "decision.md", "appendix.md", "figures"


@dataclass(frozen=True)
class Studies:
    """What a folder holds: at most one sweep of the cache, studies of quality, other records."""

    found: Records
    sweep: Sweep | None = None
    quality: Mapping[str, Frontier] = field(default_factory=dict)


def read_studies(workdir: Path) -> Studies:
    """Reads every study that has a description.

    Raises:
        ValueError: there is none, two sweeps of the cache, or one without a record.
    """
    found, names = read_records(workdir), study_names(workdir)
    if not names:
        raise ValueError(
            f"{workdir} has no study under records/; --workdir must name the folder of a sweep"
        )
    sweeps: list[Sweep] = []
    quality: dict[str, Frontier] = {}
    for name in names:
        study = read_study(workdir, name)
        if any(isinstance(record.asked, CacheTrial) for record in found.of(name)):
            sweeps.append(Sweep.of(study, found))
        else:
            quality[name] = Frontier.of(study, found)
    if len(sweeps) > 1:
        raise ValueError(
            f"{workdir} has {len(sweeps)} sweeps of the cache, "
            f"{listed(sweep.study.name for sweep in sweeps)}; want one a folder"
        )
    return Studies(found, sweeps[0] if sweeps else None, quality)


def write_report(workdir: Path) -> Path:
    """Writes the document of a folder's records, each file whole or not at all.

    Returns:
        The path of `decision.md`.

    Raises:
        ValueError: the folder holds no study, a rule without a limit, or no record.
    """
    studies = read_studies(workdir)
    frontier = next((f for f in studies.quality.values() if f.mixed), None)
    images = {"frontier.png": figures.frontier(frontier) if frontier else None}
    about: dict[str, object] = {"studies": studies, "frontier": frontier, "workdir": workdir.name}
    if studies.sweep is None:
        frontier = next(iter(studies.quality.values()))
        about |= {"frontier": frontier, "sweep_study": frontier.study}
        templates = {DOCUMENT: "study.md.j2"}
    else:
        rule = Rule.of(studies.sweep.study.rule)
        judged = verdicts(studies.sweep, rule)
        best = [verdict.best.record for verdict in judged]
        images |= figures.of_sweep(studies.sweep, rule.kl_limit, best)
        about |= {"rule": rule, "judged": judged, **_about(studies, studies.sweep)}
        templates = {DOCUMENT: "decision.md.j2", APPENDIX: "appendix.md.j2"}
    about["figures"] = {name for name, image in images.items() if image is not None}
    (workdir / FIGURES).mkdir(exist_ok=True)
    for name, image in images.items():
        path = workdir / FIGURES / name
        if image is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, image)
    for name, template in templates.items():
        text = _templates().get_template(template).render(**about)
        _write(workdir / name, text.encode())
    return workdir / DOCUMENT


def _about(studies: Studies, sweep: Sweep) -> dict[str, object]:
    """What both templates of a sweep are told besides the studies."""
    found = studies.found
    planned = found.of(planner_tables.STUDY)
    return {
        "sweep": sweep,
        "warning": rule_warning(sweep.study),
        "plans": planner_tables.plans(planned),
        "reports": [r for r in planned if r.subject == planner_tables.REPORTS],
        "baselines": baseline_tables.section(found.of(baseline_tables.STUDY)),
        "limitations": list(limitations(sweep, found)),
        "config": json.dumps(sweep.study.config, indent=1, sort_keys=True),
        "revisions": sorted({(r.revision or "unknown")[:12] for r in sweep.records}),
        "devices": sorted({r.device or "unknown" for r in sweep.records}),
    }


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def rule_warning(study: Study) -> str | None:
    """What the document says on top where its rule is not the one of the first record."""
    if study.first_rule is None:
        return "The rule that stood before the first record is not known; this one may be newer."
    changed = [
        f"{name} was {study.first_rule.get(name)} and is {study.rule.get(name)}"
        for name in sorted(study.first_rule.keys() | study.rule.keys())
        if study.first_rule.get(name) != study.rule.get(name)
    ]
    if not changed:
        return None
    return (
        f"This document is under another rule than the study's first record: {'; '.join(changed)}."
    )


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hobbit_jax.report", "templates"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters |= {
        "cell": lambda text: one_line(text).replace("|", "\\|"),
        "one_line": one_line,
        "listed": listed,
    }
    called = (answers, frontier_tables, planner_tables, sweep_tables)
    environment.globals |= {module.__name__.rsplit(".", 1)[1]: module for module in called}
    return environment
