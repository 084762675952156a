"""From a folder of records to the decision document, its appendix and its figures.

Owns the files that a report writes: `decision.md` (two pages), `appendix.md` (everything that it
rests on) and `figures/`. The same records give the same bytes of every file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from hobbit_jax.atomic import replacing
from hobbit_jax.record import Records, Study, read_records, read_study, study_names
from hobbit_jax.record.asked import Benchmark, CacheTrial
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
from hobbit_jax.report.sweep import Sweep, is_candidate, is_control
from hobbit_jax.report.table import listed, one_line
from hobbit_jax.report.verdict import Rule, Verdict, verdicts

DOCUMENT, APPENDIX, FIGURES = "decision.md", "appendix.md", "figures"


@dataclass(frozen=True)
class Section:
    """A section of the appendix; a long one is collapsed where Markdown is shown as HTML."""

    title: str
    parts: Sequence[str]
    long: bool = False


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
    main = next((f for f in studies.quality.values() if f.mixed), None)
    images = {"frontier.png": figures.frontier(main) if main else None}
    if studies.sweep is None:
        texts = {DOCUMENT: _quality_document(studies, _drawn(images))}
    else:
        rule = Rule.of(studies.sweep.study.rule)
        judged = verdicts(studies.sweep, rule)
        images |= _sweep_figures(studies.sweep, rule, judged)
        texts = {
            DOCUMENT: _decision(
                studies, studies.sweep, rule, judged, main, _drawn(images), workdir
            ),
            APPENDIX: _appendix(studies, studies.sweep, rule, judged, _drawn(images)),
        }
    (workdir / FIGURES).mkdir(exist_ok=True)
    for name, image in images.items():
        path = workdir / FIGURES / name
        if image is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, image)
    for name, text in texts.items():
        _write(workdir / name, text.encode())
    return workdir / DOCUMENT


def _drawn(images: Mapping[str, bytes | None]) -> set[str]:
    return {name for name, image in images.items() if image is not None}


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def _sweep_figures(sweep: Sweep, rule: Rule, judged: Sequence[Verdict]) -> dict[str, bytes | None]:
    plain = [r for r in sweep.records if not sweep.draws(r) and not is_candidate(r)]
    best = [v.best.record for v in judged]
    native = next((r for r in sweep.records if r.samples.get("selections_LE")), None)
    return {
        "kl_against_bytes_moved.png": figures.kl_against_bytes_moved(sweep, rule.kl_limit),
        "moved_against_budget.png": figures.moved_against_budget(
            sweep, [r for r in (*plain, *best) if not is_control(r)]
        ),
        "expert_use.png": figures.expert_use(native),
    }


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
    loader = jinja2.PackageLoader("hobbit_jax.report", "templates")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: one_line(text).replace("|", "\\|")
    return environment


def _decision(
    studies: Studies,
    sweep: Sweep,
    rule: Rule,
    judged: Sequence[Verdict],
    frontier: Frontier | None,
    drawn: set[str],
    workdir: Path,
) -> str:
    quants = answers.uniform_quants(sweep, rule)
    plans = planner_tables.plans(studies.found.of(planner_tables.STUDY))
    revisions = sorted({(record.revision or "unknown")[:12] for record in sweep.records})
    return _templates().get_template("decision.md.j2").render(
        model=sweep.model,
        warning=rule_warning(sweep.study),
        headline=answers.headline(sweep, quants, judged),
        question=one_line(sweep.study.question),
        answers=answers.answers(sweep, rule, judged, frontier, studies.found),
        gpus=planner_tables.decision_table(plans),
        routing=listed(sorted({s for p in plans for s in p.record.samples["routing_source"]})),
        asked=answers.asked_items(sweep, studies.found),
        verdicts=sweep_tables.verdict_table(sweep, judged),
        preference=sweep_tables.preference(),
        figures=drawn,
        command=one_line(sweep.study.command),
        workdir=workdir.name,
        n_records=len(sweep.records),
        seconds=f"{sum(record.seconds or 0 for record in sweep.records):.0f}",
        revisions=listed(revisions),
        devices=listed(sorted({record.device or "unknown" for record in sweep.records})),
    )  # fmt: skip


def _appendix(
    studies: Studies, sweep: Sweep, rule: Rule, judged: Sequence[Verdict], drawn: set[str]
) -> str:
    sections = [
        *_sweep_sections(sweep, judged, drawn),
        *(_quality_section(frontier, drawn) for frontier in studies.quality.values()),
        *_planner_sections(studies.found),
    ]
    baselines = baseline_tables.section(studies.found.of(baseline_tables.STUDY))
    if baselines:
        sections.append(Section("Beside other programs", [baselines], long=True))
    lines = [f"- {text}" for text in limitations(sweep, studies.found)]
    config = json.dumps(sweep.study.config, indent=1, sort_keys=True)
    sections += [
        Section("Limitations", ["\n".join(lines)]),
        Section("Provenance", [sweep_tables.provenance(sweep.records)], long=True),
        Section("The resolved config", [f"```json\n{config}\n```"], long=True),
    ]
    return _templates().get_template("appendix.md.j2").render(
        title=one_line(sweep.study.title),
        warning=rule_warning(sweep.study),
        rule=rule,
        preference=sweep_tables.preference(),
        sections=sections,
    )  # fmt: skip


def _figure(name: str, caption: str, drawn: set[str]) -> list[str]:
    return [f"![{caption}]({FIGURES}/{name})\n\n*{caption}*"] if name in drawn else []


def _sweep_sections(sweep: Sweep, judged: Sequence[Verdict], drawn: set[str]) -> list[Section]:
    about_quality = (
        "Bytes of all experts on the host under each plan. Quality does not depend on the budget, "
        "so each plan has one line; a miss mode demotes what is missing when it is wanted, so it "
        "has one a budget, from decoding one sequence at a time on fewer windows."
    )
    about_cost = (
        "Every plan gets the same pool bytes, native with its SLRU cache included. Speed is shown "
        "only where a GPU measured it; the time to the first token is the median of warm prefills."
    )
    about_control = (
        "Within the windows that both have. A share of selections (router_weight) and a share of "
        "experts are different amounts of demoted work. The control of a miss mode demotes as many "
        "uses at random: the straight line between native, the random shares and the uniform quant."
    )
    costs = [(f"### {b:g} MiB", sweep_tables.cost(sweep, b)) for b in sweep.budgets]
    moved = _figure("moved_against_budget.png", "Bytes moved against the budget.", drawn)
    use = _figure(
        "expert_use.png", "How unequally experts are used natively, on the calibration text.", drawn
    )
    found = [
        Section("Every candidate", [sweep_tables.candidates(sweep, judged)], long=True),
        Section("Quality", [about_quality, sweep_tables.quality(sweep)], long=True),
        Section("Against demoting at random", [about_control, sweep_tables.against_control(sweep)],
                long=True),
        Section("Cost at equal pool bytes", [about_cost, *(part for pair in costs for part in pair),
                *moved, *use], long=True),
    ]  # fmt: skip
    absent = sweep_tables.absent(sweep)
    return [*found, Section("Absent trials", [absent or f"None: all {len(sweep.study.trials)} "
            "trials left a record."])]  # fmt: skip


def _about_quality(frontier: Frontier) -> str:
    seeds = sorted({seed for plan in frontier.plans for seed in plan.seeds})
    text = (
        f"Measured for quality alone, on {frontier.tokens:,} held-out tokens in "
        f"{frontier.windows} windows; seeds of the calibration windows: {listed(map(str, seeds))}. "
        "Differences are taken within each window and seed."
    )
    absent = len(frontier.missing) + len(frontier.failed)
    if absent:
        text += f" **{absent} of {len(frontier.study.trials)} trials have no usable record.**"
    return text


def _quality_section(frontier: Frontier, drawn: set[str]) -> Section:
    parts = [one_line(frontier.study.question), _about_quality(frontier)]
    for title, text, shown in frontier_tables.sections(frontier):
        parts += [f"### {title}", text, shown]
    if frontier.mixed:
        parts += _figure(
            "frontier.png", "KL against the bytes that one use of an expert reads.", drawn
        )
    return Section(frontier.study.title, parts, long=True)


def _planner_sections(found: Records) -> list[Section]:
    records = found.of(planner_tables.STUDY)
    plans = planner_tables.plans(records)
    sections = []
    if plans:
        parts = [planner_tables.whole_table(plans), *planner_tables.reading(plans)]
        sections.append(Section("What the planner predicts", parts))
    shown = {
        planner_tables.CHECK: planner_tables.check_section,
        planner_tables.REPORTS: planner_tables.reports_section,
    }
    parts = [
        shown[r.asked.subject](r)
        for r in records
        if isinstance(r.asked, Benchmark) and r.asked.subject in shown
    ]
    if parts:
        sections.append(Section("How far off the planner is", parts, long=True))
    return sections


def _quality_document(studies: Studies, drawn: set[str]) -> str:
    """The document of a folder that holds studies of quality alone: one a file."""
    frontier = next(iter(studies.quality.values()))
    study = frontier.study
    return _templates().get_template("study.md.j2").render(
        title=one_line(study.title),
        question=one_line(study.question),
        about=_about_quality(frontier),
        sections=frontier_tables.sections(frontier),
        figures=drawn,
        command=one_line(study.command),
    )  # fmt: skip
