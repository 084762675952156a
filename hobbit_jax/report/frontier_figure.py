"""The figure of a quality frontier: KL against bytes, one mark a plan.

Owns how the frontier looks in pixels.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from hobbit_jax.report.figures import colour, handle, png
from hobbit_jax.report.frontier_results import FrontierResults
from hobbit_jax.report.results import RANDOM

_METHOD_COLOURS = {"rtn": "#999999", "importance": "#56B4E9", "ggml": "#8C564B", "gptq": "#E69F00"}


def frontier_figure(frontier: FrontierResults) -> bytes | None:
    """Uniform quants by encoder, and mixed plans of calibrated tiers by signal."""
    uniform, mixed = frontier.uniform, frontier.mixed
    if not mixed:
        return None
    signals = list(dict.fromkeys(m.plan.signal for m in mixed))
    methods = [name for name in _METHOD_COLOURS if any(m.plan.method == name for m in uniform)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name in methods:
            points = [(m.bytes_of_native, m.kl) for m in uniform if m.plan.method == name]
            points.sort(key=lambda point: point[0])
            axes.plot(
                [x for x, _ in points] + [1.0],
                [kl.value for _, kl in points] + [0.0],
                "--",
                color=_METHOD_COLOURS[name],
                linewidth=1,
            )
            _marks(axes, [(x, kl) for x, kl in points], "*", _METHOD_COLOURS[name], 11)
        for index, signal in enumerate(signals):
            shift = 0.003 * (index - (len(signals) - 1) / 2)
            points = [(m.bytes_of_native + shift, m.kl) for m in mixed if m.plan.signal == signal]
            _marks(axes, points, "x" if signal == RANDOM else "o", colour(signal), 6)
        axes.set_xlabel("bytes of all experts over native's (signals set apart sideways)")
        axes.set_ylabel("mean KL to native, nats per token")
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.25)
        handles = [handle(_METHOD_COLOURS[name], "*", f"uniform, {name}") for name in methods]
        handles += [
            handle(colour(s), "x" if s == RANDOM else "o", "random control" if s == RANDOM else s)
            for s in signals
        ]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)

    return png(draw, (8.6, 4.8))


def _marks(axes, points: list, marker: str, colour_name: str, size: int) -> None:
    axes.errorbar(
        [x for x, _ in points],
        [kl.value for _, kl in points],
        yerr=[
            [max(0.0, kl.value - kl.low) for _, kl in points],
            [max(0.0, kl.high - kl.value) for _, kl in points],
        ],
        fmt=marker,
        color=colour_name,
        markersize=size,
        elinewidth=1,
        capsize=2,
    )
