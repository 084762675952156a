"""Markdown for a document whose bytes may depend on its rows only.

Owns how a table, a figure and a number are printed: fixed formats, one line a cell, "–" for what
was not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hobbit_jax.statistics import Interval

ABSENT = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; a None cell is absent, a cell is put on one line and escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (ABSENT if cell is None else one_line(str(cell)) for cell in row)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def figure(name: str, drawn: set[str], caption: str) -> list[str]:
    """Lines that show a figure of `figures/`, or say that these rows do not give it."""
    if name not in drawn:
        return ["", f"There is no {name}: no row has what it shows."]
    return ["", f"![{caption}](figures/{name})", "", f"*{caption}*"]


def one_line(text: str) -> str:
    """`text` with every run of white space as one blank."""
    return " ".join(text.split())


def number(value: float | Interval | None, form: str) -> str:
    """A figure, or the value of an interval, in the format `form`."""
    if value is None:
        return ABSENT
    return form.format(value.value if isinstance(value, Interval) else value)


def mib(value: float | None, int8_split: int) -> str:
    """Bytes as MiB, without the unit."""
    return ABSENT if value is None else f"{value / 2**20:.{int8_split}f}"


def interval(value: Interval | None, form: str = "{:.2f}") -> str:
    """`value [low, high]`."""
    if value is None:
        return ABSENT
    return f"{form} [{form}, {form}]".format(value.value, value.low, value.high)


def relation(difference: Interval | None) -> str:
    """Whether the interval of a difference lies below 0, above, or on both sides."""
    if difference is None:
        return ABSENT
    if difference.high < 0:
        return "less"
    return "more" if difference.low > 0 else "not told apart"
