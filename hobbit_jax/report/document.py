"""From a folder of records to the decision document, its appendix and its figures.

Owns the files that a report writes: `decision.md` (two pages), `appendix.md` (everything that it
rests on), `for_engines.md` (what it means for an engine's maintainer) and `figures/`. Their text
stands in `templates/`, which call the tables and answers. The same records give the same bytes of
every file.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from hobbit_jax.atomic import replacing
from hobbit_jax.cache.miss_modes import LINK_TO_HOST, ROWS_AT_ONCE
from hobbit_jax.record import CacheTrial, Record, Records, read_records, read_study, study_names
from hobbit_jax.report import (
    answers,
    baseline_tables,
    figures,
    frontier_tables,
    miss_tables,
    planner_tables,
    sweep_tables,
)
from hobbit_jax.report.frontier import Frontier, frontiers
from hobbit_jax.report.miss_tables import MissStudy
from hobbit_jax.report.sweep import Sweep
from hobbit_jax.report.table import figure, listed, one_line, padded
from hobbit_jax.report.verdict import PREFERENCE, Rule, verdicts

LETTER = "for_engines.md"
DOCUMENT, APPENDIX, FIGURES = "decision.md", "appendix.md", "figures"


@dataclass(frozen=True)
class Studies:
    """What a folder holds: at most one sweep of the cache and one study of misses, studies of
    quality, other records.
    """

    found: Records
    sweep: Sweep | None
    misses: MissStudy | None
    quality: tuple[Frontier, ...]

    @property
    def mixed(self) -> Frontier | None:
        """The first study of quality that has mixes."""
        return next((frontier for frontier in self.quality if frontier.mixed), None)

    @property
    def real(self) -> list[Frontier]:
        """The first study that judges a model of the user's on several texts."""
        for first in self.quality:
            own = [f for f in self.quality if f.model and f.study == first.study]
            if len(own) > 1:
                return own
        return []


def read_studies(workdir: Path) -> Studies:
    """Reads every study that has a description.

    A study of the cache without a rule decides nothing: it is one of ways to serve a miss.

    Raises:
        ValueError: there is none, two of one kind, or one without a record.
    """
    found, names = read_records(workdir), study_names(workdir)
    if not names:
        raise ValueError(
            f"{workdir} has no study under records/; --workdir must name the folder of a sweep"
        )
    sweeps: list[Sweep] = []
    misses: list[MissStudy] = []
    quality: list[Frontier] = []
    for study in (read_study(workdir, name) for name in names):
        if any(isinstance(record.asked, CacheTrial) for record in found.of(study.name)):
            if study.rule:
                sweep = Sweep.of(study, found)
                if not (sweep.records or sweep.failed):
                    raise ValueError(
                        f"no record of {workdir} is one of the study {study.name} as it is "
                        "described now; run the sweep first"
                    )
                sweeps.append(sweep)
            else:
                misses.append(MissStudy.of(study, found))
        else:
            quality += frontiers(study, found)
    for what, same in (("sweeps of the cache", sweeps), ("studies of misses", misses)):
        if len(same) > 1:
            raise ValueError(
                f"{workdir} has {len(same)} {what}, {listed(one.study.name for one in same)}; "
                "want one a folder"
            )
    return Studies(
        found, sweeps[0] if sweeps else None, misses[0] if misses else None, tuple(quality)
    )


def write_report(workdir: Path) -> Path:
    """Writes the document of a folder's records, each file whole or not at all.

    Returns:
        The path of `decision.md`.

    Raises:
        ValueError: the folder holds no study, a rule without a limit, or no record.
    """
    studies = read_studies(workdir)
    about: dict[str, Any] = {"studies": studies, "workdir": workdir.name}
    templates, images = {DOCUMENT: "study.md.j2"}, {}
    if studies.sweep is not None:
        about |= _about(studies, studies.sweep)
        templates = {name: f"{name}.j2" for name in (DOCUMENT, APPENDIX, LETTER)}
        image = figures.kl_against_bytes_moved(studies.sweep, about["rule"].kl_limit)
        images["kl_against_bytes_moved.png"] = image
    if studies.mixed is not None:
        images["frontier.png"] = figures.frontier(studies.mixed)
    files = {f"{FIGURES}/{name}": image for name, image in images.items() if image is not None}
    for name, template in templates.items():
        files[name] = _render(template, **about, figures=files).encode()
    (workdir / FIGURES).mkdir(exist_ok=True)
    for name, data in files.items():
        with replacing(workdir / name) as partial:
            partial.write_bytes(data)
    return workdir / DOCUMENT


def _about(studies: Studies, sweep: Sweep) -> dict[str, Any]:
    """What both templates of a sweep are told besides the studies."""
    found, rule = studies.found, Rule.of(sweep.study.rule)
    judged, planned = verdicts(sweep, rule), found.of(planner_tables.STUDY)
    return {
        "sweep": sweep,
        "rule": rule,
        "verdicts": judged,
        "outcomes": [verdict.outcome for verdict in judged],
        "quants": answers.uniform_quants(sweep, rule),
        "link_to_host": LINK_TO_HOST,
        "rows_at_once": ROWS_AT_ONCE,
        "preference": ", then ".join(words for words, _ in PREFERENCE),
        "plans": planner_tables.plans(planned),
        "reports": [r for r in planned if r.subject == planner_tables.REPORTS],
        "baselines": baseline_tables.section(found.of(baseline_tables.STUDY)),
        "provenance": sweep_tables.provenance(sweep.records),
        "config": json.dumps(sweep.study.config, indent=1, sort_keys=True),
        "revisions": sorted({(r.revision or "unknown")[:12] for r in sweep.records}),
        "devices": sorted({r.device or "an unnamed device" for r in sweep.records}),
    }


def render_plan(record: Record, check: Mapping[str, float]) -> str:
    """What the planner predicts for one model and GPU, for the screen, by its record and the
    summary of how far such predictions were off.
    """
    return _render("plan.md.j2", plan=planner_tables.Plan(record), check=check)


def _render(template: str, **about: Any) -> str:
    return _templates().get_template(template).render(**about)


def _joined(lines: str, separator: str) -> str:
    """The lines of a block as one, those without a word left out."""
    return separator.join(line.strip() for line in lines.splitlines() if line.strip())


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hobbit_jax.report", "templates"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters |= {
        "cell": lambda text: one_line(text).replace("|", "\\|"),
        "figure": figure,
        "joined": _joined,
        "listed": listed,
        "one_line": one_line,
        "padded": padded,
    }
    called = (answers, frontier_tables, miss_tables, planner_tables, sweep_tables)
    environment.globals |= {module.__name__.rsplit(".", 1)[1]: module for module in called}
    return environment
