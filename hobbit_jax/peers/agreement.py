"""What two programs' logits on the same tokens have in common.

Owns the figures, in float64 and without any framework. The peer is the reference: a KL is KL(peer
|| ours), a difference is ours less the peer's. Intervals are 95 %, by resampling whole windows, the
same windows for both programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from hobbit_jax.statistics import Interval, bootstrap


@dataclass(frozen=True)
class Agreement:
    """Figures over all tokens; logarithms are natural, perplexity is per token."""

    tokens: int
    windows: int
    logit_max_difference: float
    logit_rms_difference: float
    logit_std: float  # of the peer's: what the differences are small or large against
    perplexity_ours: Interval
    perplexity_peer: Interval
    perplexity_difference: Interval
    kl_mean: Interval
    kl_p99: Interval
    top1_agreement: Interval


class AgreementMeter:
    """Takes windows of equal length one at a time, so that logits need not be kept."""

    def __init__(self):
        self._nll_ours: list[np.ndarray] = []
        self._nll_peer: list[np.ndarray] = []
        self._kl: list[np.ndarray] = []
        self._agree: list[np.ndarray] = []
        self._largest = 0.0
        self._squares = self._sum = self._sum_squares = 0.0
        self._count = 0

    def add(self, ours_TV: np.ndarray, peer_TV: np.ndarray, targets_T: np.ndarray) -> None:
        """One window: logits of both, and the tokens that followed.

        Raises:
            ValueError: shapes that do not match, or a logit that is not finite.
        """
        if ours_TV.shape != peer_TV.shape or len(targets_T) != len(ours_TV):
            raise ValueError(
                f"got logits {ours_TV.shape} and {peer_TV.shape} for {len(targets_T)} tokens; want "
                "one row of one width for each"
            )
        for name, logits_TV in (("our", ours_TV), ("the peer's", peer_TV)):
            if not np.isfinite(logits_TV).all():
                raise ValueError(f"{name} logits are not all finite")
        ours_TV, peer_TV = ours_TV.astype(np.float64), peer_TV.astype(np.float64)
        difference_TV = ours_TV - peer_TV
        self._largest = max(self._largest, float(np.abs(difference_TV).max()))
        self._squares += float(np.square(difference_TV).sum())
        self._sum += float(peer_TV.sum())
        self._sum_squares += float(np.square(peer_TV).sum())
        self._count += peer_TV.size
        log_q_TV, log_p_TV = log_softmax(ours_TV, axis=-1), log_softmax(peer_TV, axis=-1)
        at = np.arange(len(targets_T)), targets_T
        self._nll_ours.append(-log_q_TV[at])
        self._nll_peer.append(-log_p_TV[at])
        self._kl.append((np.exp(log_p_TV) * (log_p_TV - log_q_TV)).sum(axis=-1))
        self._agree.append(ours_TV.argmax(axis=-1) == peer_TV.argmax(axis=-1))

    def result(self) -> Agreement:
        """The figures of all windows so far."""
        ours_WT, peer_WT = np.stack(self._nll_ours), np.stack(self._nll_peer)
        kl_WT, agree_WT = np.stack(self._kl), np.stack(self._agree)
        count = len(ours_WT)
        variance = self._sum_squares / self._count - (self._sum / self._count) ** 2

        def interval(statistic) -> Interval:
            return bootstrap(statistic, count)

        def perplexity(nll_WT: np.ndarray, w: np.ndarray) -> float:
            return float(np.exp(nll_WT[w].mean()))

        return Agreement(
            tokens=ours_WT.size,
            windows=count,
            logit_max_difference=self._largest,
            logit_rms_difference=float(np.sqrt(self._squares / self._count)),
            logit_std=float(np.sqrt(max(variance, 0.0))),
            perplexity_ours=interval(lambda w: perplexity(ours_WT, w)),
            perplexity_peer=interval(lambda w: perplexity(peer_WT, w)),
            perplexity_difference=interval(
                lambda w: perplexity(ours_WT, w) - perplexity(peer_WT, w)
            ),
            kl_mean=interval(lambda w: kl_WT[w].mean()),
            kl_p99=interval(lambda w: np.quantile(kl_WT[w], 0.99)),
            top1_agreement=interval(lambda w: agree_WT[w].mean()),
        )
