"""Tables as small specifications: a column has a title, a field and a format.

Owns how a number, an interval and an absent figure are printed. To show a metric, add one `Column`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hobbit_jax.record import Record
from hobbit_jax.statistics import Interval

ABSENT = "–"
MIB = 2**20


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    field: str | Callable[[Any], Any]  # a metric's name, a key, or a function of the row
    form: str = ""  # of the number, without the braces; an interval is printed with it thrice
    interval: bool = False  # print the metric with its two ends
    unit: float = 1  # of the table, in units of the metric: 2**20 shows bytes as MiB

    def text(self, row: Any) -> str:
        """The cell of `row`, a `Record`, a mapping or whatever `field` takes."""
        return figure(self.value(row), self.form, self.unit)

    def value(self, row: Any) -> Any:
        """What the cell shows, before it is formatted."""
        if callable(self.field):
            return self.field(row)
        if isinstance(row, Record):
            return row.interval(self.field) if self.interval else row.metrics.get(self.field)
        return row.get(self.field) if isinstance(row, Mapping) else getattr(row, self.field)


def table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """A Markdown table; columns without a single figure are left out, without rows it is empty."""
    cells = [[column.text(row).replace("|", "\\|") for column in columns] for row in rows]
    if not cells:
        return ""
    shown = [i for i in range(len(columns)) if any(row[i] != ABSENT for row in cells)]
    head = [columns[i].title for i in shown]
    lines = [head, ["---"] * len(shown), *([row[i] for i in shown] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def padded(markdown: str) -> str:
    """A Markdown table for the screen: columns of one width, and no marks."""
    head, _, *lines = markdown.splitlines()
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in (head, *lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def figure(value: Any, form: str = "", unit: float = 1) -> str:
    """A value as it is printed: `0.42`, `0.42 [0.40, 0.44]` or words on one line."""
    if value is None:
        return ABSENT
    if isinstance(value, Interval):
        middle, low, high = (format(v / unit, form) for v in (value.value, value.low, value.high))
        return f"{middle} [{low}, {high}]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(value if unit == 1 else value / unit, form)
    return one_line(str(value))


def one_line(text: str) -> str:
    """`text` with every run of white space as one blank."""
    return " ".join(text.split())


def ratio(value: float | None) -> str:
    """`0.42×`."""
    return ABSENT if value is None else f"{value:.2f}×"


def percent(share: float) -> str:
    """`12 %` of a share (0-1)."""
    return f"{100 * share:g} %"


def listed(names: Iterable[str], none: str = "none") -> str:
    """`a, b and c`."""
    found = list(names)
    if len(found) < 2:
        return found[0] if found else none
    return f"{', '.join(found[:-1])} and {found[-1]}"
