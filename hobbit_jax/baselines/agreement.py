"""How far two programs' logits on the same tokens are apart; the baseline is the reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hobbit_jax.evals.logit_comparison import (
    Comparison,
    PositionFigures,
    compare_in_float64,
    summarize,
)
from hobbit_jax.statistics import Interval, bootstrap


@dataclass(frozen=True)
class Agreement:
    """Figures over all tokens; logarithms are natural, perplexity is per token."""

    windows: int
    logit_max_difference: float
    logit_rms_difference: float
    logit_std: float  # of the baseline's: what the differences are small or large against
    comparison: Comparison
    perplexity_baseline: Interval
    perplexity_difference: Interval


class AgreementMeter:
    """Takes windows of equal length one at a time, so that logits need not be kept."""

    def __init__(self):
        self._ours: list[PositionFigures] = []
        self._baseline: list[PositionFigures] = []
        self._largest = 0.0
        self._squares = self._sum = self._sum_squares = 0.0
        self._count = 0

    def add(self, ours_TV: np.ndarray, baseline_TV: np.ndarray, targets_T: np.ndarray) -> None:
        """One window: logits of both, and the tokens that followed.

        Raises:
            ValueError: shapes that do not match, or a logit that is not finite.
        """
        compared = compare_in_float64(ours_TV[None], baseline_TV[None], targets_T[None])
        self._ours.append(compared)
        self._baseline.append(
            compare_in_float64(baseline_TV[None], baseline_TV[None], targets_T[None])
        )
        ours_TV, baseline_TV = ours_TV.astype(np.float64), baseline_TV.astype(np.float64)
        difference_TV = ours_TV - baseline_TV
        self._largest = max(self._largest, float(np.abs(difference_TV).max()))
        self._squares += float(np.square(difference_TV).sum())
        self._sum += float(baseline_TV.sum())
        self._sum_squares += float(np.square(baseline_TV).sum())
        self._count += baseline_TV.size

    def result(self) -> Agreement:
        """The figures of all windows so far."""
        ours_WT, baseline_WT = (
            np.concatenate([part.nll_BT for part in parts])
            for parts in (self._ours, self._baseline)
        )
        variance = self._sum_squares / self._count - (self._sum / self._count) ** 2

        def difference(w: np.ndarray) -> float:
            return float(np.exp(ours_WT[w].mean()) - np.exp(baseline_WT[w].mean()))

        return Agreement(
            windows=len(ours_WT),
            logit_max_difference=self._largest,
            logit_rms_difference=float(np.sqrt(self._squares / self._count)),
            logit_std=float(np.sqrt(max(variance, 0.0))),
            comparison=summarize(self._ours),
            perplexity_baseline=summarize(self._baseline).perplexity,
            perplexity_difference=bootstrap(difference, len(ours_WT)),
        )
