"""The three figures of the decision document, drawn from rows alone.

Owns how the document looks in pixels. The same rows give the same PNG bytes: default style whatever
the user's matplotlibrc says, no date, no software version.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hobbit_jax.report.comparisons import uniform_points, use_shares
from hobbit_jax.report.results import MIB, NATIVE, RANDOM, UNIFORM, Plan, Results, Row
from hobbit_jax.statistics import Interval

NAMES = ("quality_vs_bytes.png", "speed_vs_budget.png", "expert_use.png")
DPI = 110
# Okabe and Ito's colours: told apart by colour-blind readers too. Black is the control.
_COLOURS = {
    "router_weight": "#D55E00",
    "frequency": "#0072B2",
    "accumulated_weight": "#009E73",
    "sensitivity": "#56B4E9",
    "residency": "#8C564B",
    "hybrid": "#CC79A7",
    NATIVE: "#555555",
    UNIFORM: "#E69F00",
    RANDOM: "#000000",
}
_SPARE = ("#F0E442", "#7F3C8D", "#999933", "#882255")
_MARKERS = ("o", "s", "D", "^", "v")
_CONTROL_MARKERS = ("x", "+", "1", "2", "3")


def quality_vs_bytes(results: Results, kl_limit: float) -> bytes | None:
    """KL against total expert bytes, one point per plan; None where no mixed plan has a KL."""
    points = {p: point for p in results.plans if p.is_mixed and (point := _point(results, p))}
    plans = list(points)
    if not plans:
        return None
    formats = sorted({plan.low_format or "" for plan in plans})
    signals = list(dict.fromkeys(plan.signal for plan in plans))
    sizes = [size for size, _ in points.values()]
    lines = [uniform_points(model, results) for model in sorted({p.model for p in plans})]
    sizes += [size / MIB for line in lines for _, size, _ in line]
    step = 0.006 * (max(sizes) - min(sizes))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for line in lines:
            _uniform_line(axes, line)
        for plan, (size, kl) in points.items():
            is_control = plan.signal == RANDOM
            markers = _CONTROL_MARKERS if is_control else _MARKERS
            shift = step * (signals.index(plan.signal) - (len(signals) - 1) / 2)
            axes.errorbar(
                size + shift,
                kl.value,
                yerr=[[max(0.0, kl.value - kl.low)], [max(0.0, kl.high - kl.value)]],
                fmt=markers[formats.index(plan.low_format or "") % 5],
                color=colour(plan.signal),
                markersize=3 + 3 * is_control + 4 * plan.low_fraction,
                elinewidth=1,
                capsize=2,
                zorder=3 if is_control else 4,
            )
        axes.axhline(kl_limit, color="#AA0000", linestyle=":", linewidth=1)
        axes.margins(x=0.14)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("bytes of all experts on the host, MiB (signals set apart sideways)")
        axes.set_ylabel("mean KL to native, nats per token")
        axes.grid(alpha=0.25)
        handles = [handle(colour(s), "o", s) for s in signals if s != RANDOM]
        for index, low in enumerate(formats):
            handles.append(handle("#999999", _MARKERS[index % 5], f"low format {low}"))
            if RANDOM in signals:
                mark = _CONTROL_MARKERS[index % 5]
                handles.append(handle(_COLOURS[RANDOM], mark, f"random control, {low}"))
        handles.append(handle(_COLOURS[UNIFORM], "*", "uniform"))
        handles.append(handle(_COLOURS[NATIVE], "P", "native, KL 0"))
        handles.append(Line2D([], [], color="#AA0000", linestyle=":", label="the rule's limit"))
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)

    return png(draw, (8.6, 4.8))


def speed_vs_budget(results: Results, shown: Sequence[Plan]) -> bytes | None:
    """Bytes moved and tokens/s against the budget for `shown`; None without a timing."""
    rows = [row for row in results.rows if row.decode and row.plan in shown]
    if not any(row.bytes_moved is not None for row in rows):
        return None
    formats = sorted({plan.low_format for plan in shown if plan.low_format})
    fractions = sorted({plan.low_fraction for plan in shown if plan.is_mixed})
    budgets = sorted({row.setting.budget_mib for row in rows})

    def draw(figure: Figure) -> None:
        moved_axes, speed_axes = figure.subplots(1, 2)
        for plan in shown:
            for policy in sorted({row.setting.protected_fraction for row in rows}):
                group = [
                    row
                    for row in rows
                    if row.plan == plan and row.setting.protected_fraction == policy
                ]
                # The format shows in the line and in the filling, the share in the marker.
                nth = formats.index(plan.low_format) if plan.low_format else 0
                marker = {NATIVE: "P", UNIFORM: "*", RANDOM: _CONTROL_MARKERS[nth % 5]}.get(
                    plan.signal
                ) or _MARKERS[fractions.index(plan.low_fraction) % 5]
                look = {
                    "color": colour(plan.signal),
                    "marker": marker,
                    "linestyle": ("-", "--", "-.", ":")[nth % 4],
                    "fillstyle": ("full", "none", "left", "right")[nth % 4],
                    "linewidth": 0.8 if plan.signal == RANDOM else 1.4,
                    "markersize": 8 if plan.signal in (RANDOM, UNIFORM) else 6,
                    "zorder": 2 if plan.signal == RANDOM else 3,
                }
                _moved_line(moved_axes, group, look, results.label(plan))
                _speed_line(speed_axes, group, look)
        for axes in (moved_axes, speed_axes):
            axes.set_xlabel("pool budget, MiB")
            axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
        moved_axes.set_ylabel("MiB moved per decoded token")
        speed_axes.set_ylabel("decoded tokens/s (median, min to max)")
        devices = sorted({row.device or "unknown device" for row in rows})
        speed_axes.set_title("measured on " + ", ".join(devices), fontsize=8)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)

    return png(draw, (9.6, 4.8))


def expert_use(row: Row | None) -> bytes | None:
    """How unequally each layer uses its experts; None without routing counts."""
    shares_LE = use_shares(row.selections_LE) if row and row.selections_LE else None
    if shares_LE is None:
        return None
    n_layers, n_experts = shares_LE.shape

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        extent = (0.5, n_experts + 0.5, n_layers - 0.5, -0.5)
        image = left.imshow(
            shares_LE * n_experts, aspect="auto", cmap="viridis", extent=extent, vmin=0
        )
        figure.colorbar(image, ax=left, label="use ÷ equal use")
        left.set_xlabel("experts of the layer, most used first")
        left.set_ylabel("layer")
        left.set_yticks(range(0, n_layers, max(1, n_layers // 8)))
        covered_LE = np.cumsum(shares_LE, axis=1)
        x_E = np.arange(n_experts + 1) / n_experts
        for layer, covered_E in enumerate(covered_LE):
            colour = mpl.colormaps["cividis"](layer / max(1, n_layers - 1))
            label = f"layer {layer}" if layer in (0, n_layers - 1) else None
            covered_from_none = np.concatenate([[0.0], covered_E])
            right.plot(x_E, covered_from_none, color=colour, linewidth=1, label=label)
        right.plot([0, 1], [0, 1], color="#AA0000", linestyle=":", label="equal use")
        right.set_xlabel("share of the layer's experts")
        right.set_ylabel("share of selections they serve")
        right.grid(alpha=0.25)
        right.legend(fontsize=8, frameon=False)

    return png(draw, (9.6, 3.8))


def png(draw, size_inches: tuple[float, float]) -> bytes:
    """The picture that `draw(figure)` makes, without anything of today or of this machine."""
    with mpl.rc_context():
        mpl.rcdefaults()
        figure = Figure(figsize=size_inches, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _point(results: Results, plan: Plan) -> tuple[float, Interval] | None:
    row = results.quality_row(plan)
    if row is None or row.kl_mean is None or row.plan_bytes is None:
        return None
    return row.plan_bytes / MIB, row.kl_mean


def colour(signal: str) -> str:
    """The colour of a signal in every figure."""
    return _COLOURS.get(signal) or _SPARE[sum(signal.encode()) % len(_SPARE)]


def handle(colour: str, marker: str, label: str) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)


def _uniform_line(axes: Axes, points: list) -> None:
    sizes = [size / MIB for _, size, _ in points]
    kls = [kl.value for _, _, kl in points]
    axes.plot(sizes, kls, color=_COLOURS[UNIFORM], linewidth=1, linestyle="--", zorder=1)
    for (label, _, kl), size in zip(points, sizes, strict=True):
        is_native = label == NATIVE
        axes.errorbar(
            size,
            kl.value,
            yerr=[[max(0.0, kl.value - kl.low)], [max(0.0, kl.high - kl.value)]],
            fmt="P" if is_native else "*",
            color=_COLOURS[NATIVE if is_native else UNIFORM],
            markersize=9 if is_native else 14,
            capsize=2,
            zorder=2,
        )
        axes.annotate(
            label.removeprefix(f"{UNIFORM} "),
            (size, kl.value),
            (-8, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
        )


def _moved_line(axes: Axes, rows: list[Row], look: dict, label: str) -> None:
    known = [row for row in rows if row.bytes_moved is not None]
    axes.plot(
        [row.setting.budget_mib for row in known],
        [(row.bytes_moved or 0.0) / MIB for row in known],
        label=label if known else None,
        **look,
    )


def _speed_line(axes: Axes, rows: list[Row], look: dict) -> None:
    known = [(r.setting.budget_mib, r.decode.tokens_per_second) for r in rows if r.decode]
    known = [(budget, speed) for budget, speed in known if speed]
    if known:
        axes.errorbar(
            [budget for budget, _ in known],
            [speed.value for _, speed in known],
            yerr=[
                [max(0.0, speed.value - speed.low) for _, speed in known],
                [max(0.0, speed.high - speed.value) for _, speed in known],
            ],
            capsize=2,
            **look,
        )
