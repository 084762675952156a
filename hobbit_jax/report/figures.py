"""The figures of the decision document, drawn from records alone.

Owns how the document looks in pixels. The same records give the same PNG bytes: default style
whatever the user's matplotlibrc says, no date, no software version.
"""

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hobbit_jax.record import MissModeTrial, Native, Record, Uniform
from hobbit_jax.report.frontier import ENCODERS, Averaged, Frontier
from hobbit_jax.report.sweep import RANDOM, Sweep, low_format, trial
from hobbit_jax.report.table import MIB
from hobbit_jax.statistics import Interval

DPI = 110
# Okabe and Ito's colours: told apart by colour-blind readers too. Black is the control.
_COLOURS = {
    "router_weight": "#D55E00",
    "frequency": "#0072B2",
    "accumulated_weight": "#009E73",
    "sensitivity": "#56B4E9",
    "miss mode": "#8C564B",
    "hybrid": "#CC79A7",
    RANDOM: "#000000",
    **dict(zip(ENCODERS, ("#999999", "#F0E442", "#7F3C8D", "#E69F00"), strict=True)),
}
_UNIFORM = _COLOURS[ENCODERS[-1]]
_MARKERS = ("o", "s", "D", "^", "v")
_KL_AXIS = "mean KL to native, nats a token"


def _kind(record: Record) -> str:
    plan = trial(record).plan
    return "miss mode" if isinstance(plan, MissModeTrial) else getattr(plan, "score", "")


def _moved(record: Record) -> float:
    """MiB a token."""
    return (record.metrics["bytes_moved_per_token"] or 0) / MIB


def kl_against_bytes_moved(sweep: Sweep, kl_limit: float) -> bytes | None:
    """KL against bytes moved a token, a panel a budget; None without a mixed plan."""
    shown = [
        r
        for r in sweep.records
        if r.interval("kl_mean_nats") and r.metrics.get("bytes_moved_per_token") is not None
    ]
    mixed = [r for r in shown if not isinstance(trial(r).plan, Native | Uniform)]
    if not mixed:
        return None
    formats = sorted({low_format(r) for r in mixed})
    markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(formats)}
    kinds = list(dict.fromkeys(map(_kind, mixed)))
    budgets = sorted({trial(r).budget_mib for r in shown})

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
        for axes, budget in zip(panels, budgets, strict=True):
            here = [r for r in shown if trial(r).budget_mib == budget]
            line = sorted((r for r in here if r not in mixed), key=_moved)
            xs, ys = [_moved(r) for r in line], [r.metrics["kl_mean_nats"] or 0 for r in line]
            axes.plot(xs, ys, "*", color=_UNIFORM, markersize=12, zorder=5)
            # Straight in KL, so curved on this axis: drawn as what mixes are compared with.
            between = np.linspace(min(xs, default=0), max(xs, default=0), 200)
            if line:
                axes.plot(between, np.interp(between, xs, ys), "--", color=_UNIFORM, zorder=1)
            for record in here:
                if (kl := record.interval("kl_mean_nats")) and record in mixed:
                    kind, low = _kind(record), low_format(record)
                    marker = "x" if kind == RANDOM else markers[low]
                    _bars(axes, [(_moved(record), kl)], marker, _colour(kind), 5)
            axes.axhline(kl_limit, color="#AA0000", linestyle=":", linewidth=1)
            axes.set_title(f"pool of {budget:g} MiB", fontsize=9)
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("MiB moved a token")
            axes.grid(alpha=0.25)
        panels[0].set_ylabel(_KL_AXIS)
        handles = [_handle(_colour(k), "x" if k == RANDOM else "o", k) for k in kinds]
        handles += [_handle("#999999", marker, name) for name, marker in markers.items()]
        handles.append(_handle(_UNIFORM, "*", "native and uniform quants, and their line"))
        handles.append(Line2D([], [], color="#AA0000", linestyle=":", label="the rule's limit"))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False
        )

    return _png(draw, (9.6, 4.0))


def frontier(study: Frontier) -> bytes:
    """KL against bytes read a selection: uniform quants by encoder, mixes by score."""
    scores = list(dict.fromkeys(p.score for p in study.mixed))
    encoders = [e for e in ENCODERS if any(p.encoder == e for p in study.uniform)]
    others = [p for p in study.plans if p.text != study.own_text and isinstance(p.plan, Uniform)]

    def points(plans: Sequence[Averaged]) -> list[tuple[float, Interval]]:
        known = [(x, p.kl) for p in plans if (x := study.bytes_read(p)) is not None]
        return sorted(known, key=lambda point: point[0])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name in encoders:
            line = points([p for p in study.uniform if p.encoder == name])
            xs, ys = [x for x, _ in line] + [1.0], [kl.value for _, kl in line] + [0.0]
            axes.plot(xs, ys, "--", color=_COLOURS[name], linewidth=1)
            _bars(axes, line, "*", _COLOURS[name], 11)
        _bars(axes, points(others), "P", _UNIFORM, 8)
        for score in scores:
            plans = [p for p in study.mixed if p.score == score]
            _bars(axes, points(plans), "x" if score == RANDOM else "o", _colour(score), 6)
        axes.set_xlabel("bytes that one use of an expert reads, over native's")
        axes.set_ylabel(_KL_AXIS)
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.25)
        handles = [_handle(_COLOURS[e], "*", f"uniform, {e}") for e in encoders]
        if others:
            handles.append(_handle(_UNIFORM, "P", f"uniform, {ENCODERS[-1]}, other text"))
        handles += [_handle(_colour(s), "x" if s == RANDOM else "o", s) for s in scores]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)

    return _png(draw, (8.6, 4.4))


def _png(draw, size_inches: tuple[float, float]) -> bytes:
    """The picture that `draw(figure)` makes, without anything of today or of this machine."""
    with mpl.rc_context():
        mpl.rcdefaults()
        figure = Figure(figsize=size_inches, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _colour(kind: str) -> str:
    return _COLOURS.get(kind, "#882255")


def _handle(colour: str, marker: str, label: str) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)


def _bars(
    axes: Axes, points: Sequence[tuple[float, Interval]], marker: str, colour: str, size: int
) -> None:
    ends = [(kl.value - kl.low, kl.high - kl.value) for _, kl in points]
    axes.errorbar(
        [x for x, _ in points],
        [kl.value for _, kl in points],
        yerr=np.maximum(np.reshape(ends, (-1, 2)).T, 0.0),
        fmt=marker,
        color=colour,
        markersize=size,
        elinewidth=1,
        capsize=2,
    )
