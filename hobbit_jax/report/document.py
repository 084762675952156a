"""The text of the decision document: the answer first, then what it rests on.

Owns the order of the sections: answer, rule, evidence, what is absent, what the numbers cannot
show, how to repeat them; each section has a file. A value that was not measured is printed as "–"
and never filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hobbit_jax import markdown
from hobbit_jax.report import figures
from hobbit_jax.report.answer import render_answer, render_rule
from hobbit_jax.report.cost import render_cost
from hobbit_jax.report.encoders import render_compounding
from hobbit_jax.report.frontier_results import FrontierResults
from hobbit_jax.report.peers import PeerRow, render_peers
from hobbit_jax.report.plans import Plans, render_plans
from hobbit_jax.report.quality import render_against_control, render_quality
from hobbit_jax.report.reproduce import render_gaps, render_reproduce
from hobbit_jax.report.results import Results
from hobbit_jax.report.signals import render_signals
from hobbit_jax.report.threats import threats
from hobbit_jax.report.verdict import Rule, Verdict


@dataclass(frozen=True)
class Studies:
    """What stands beside the sweep.

    Attributes:
        frontier: quality against all bytes, by signal.
        compounding: quality after an intermediate quant.
        peers: comparisons with other programs.
        plans: the planner's predictions for cards.
    """

    frontier: FrontierResults | None = None
    compounding: FrontierResults | None = None
    peers: Sequence[PeerRow] = ()
    plans: Plans | None = None


def render(
    results: Results,
    rule: Rule,
    answers: Sequence[Verdict],
    drawn: Iterable[str] = figures.NAMES,
    studies: Studies = Studies(),
) -> str:
    """The document as Markdown; `drawn` names the figures that exist."""
    drawn = set(drawn)
    sections = [
        [f"# {markdown.one_line(results.title)}"],
        render_answer(results, answers),
        render_rule(results, rule, answers),
        render_quality(results, drawn),
        _signals(results, studies, drawn),
        [*render_cost(results, rule, drawn), *_peers(studies.peers)],
        render_gaps(results),
        ["## 7. Threats to validity", "", *(f"- {text}" for text in threats(results, rule))],
        *([render_plans(studies.plans)] if studies.plans else []),
        render_reproduce(results),
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _signals(results: Results, studies: Studies, drawn: set[str]) -> list[str]:
    lines = ["## 4. Which signal", ""]
    if studies.frontier:
        lines += [*render_signals(studies.frontier, drawn), "", "### In the sweep of the cache", ""]
    lines += render_against_control(results)
    if studies.compounding:
        lines += ["", "### Compounding error", "", *render_compounding(studies.compounding)]
    return lines


def _peers(peers: Sequence[PeerRow]) -> list[str]:
    lines = render_peers(peers)
    return ["", "### Peers", "", *lines] if lines else []


def render_studies(title: str, question: str, command: str, sections: Sequence[Sequence[str]]):
    """A document of studies of quality alone."""
    head = [f"# {markdown.one_line(title)}", "", f"> {markdown.one_line(question)}"]
    end = ["## Reproduce", "", "```sh", markdown.one_line(command), "```"]
    return "\n\n".join("\n".join(section) for section in (head, *sections, end)) + "\n"
