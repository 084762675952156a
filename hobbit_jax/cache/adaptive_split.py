"""How much of the pool low copies get, learned from what the model has routed so far.

Owns the choice between a few divisions of the pool. Each has a shadow, a replay that goes on from
decision to decision: between sequences every shadow replays the last decoded tokens, and the pool
is divided anew where that clearly moves fewer bytes.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import Observer
from hobbit_jax.cache.counter import Replay
from hobbit_jax.cache.counts import Counts
from hobbit_jax.cache.pool_sizing import CANDIDATE_SHARES, pool_slots
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.cache.warm_start import Executor
from pallas_kernels.reference import Signature

Divisions = Mapping[float, Mapping[Signature, int]]  # slots per bank by share of the low copies


@dataclass(frozen=True)
class SplitRule:
    """When the pool is divided anew."""

    # Bytes that the present division moves above the least, as a share, before it is given up. Of
    # all divisions within it the one that degrades least is taken.
    margin: float = 0.05
    # Copies that a shadow may gain in the tokens that are judged, as a share of those that
    # promotion may bring. A division that fills faster is not judged: where low copies come only in
    # the background, a large share for them looks bad until they are there.
    most_growth: float = 0.1
    window_tokens: int = 256  # newest decoded tokens, of which a decision judges the second half
    first_tokens: int = 64  # before the first decision; each further one waits twice as long
    most_tokens: int = 1024  # the longest wait


DEFAULT_SPLIT = SplitRule()


def candidates(executor: Executor, cache: CacheConfig, shares_pLE: np.ndarray) -> Divisions:
    """The divisions of an executor's banks, as `pool_slots` makes them of `CANDIDATE_SHARES`."""
    layout, mode = executor.controller.layout, executor.controller.mode
    banks = {bank.signature for bank in executor.controller.banks}
    divisions: dict[float, Mapping[Signature, int]] = {}
    for share in CANDIDATE_SHARES:
        slots, _ = pool_slots(shares_pLE, mode, layout, cache.budget_bytes, share)
        if slots.keys() == banks and slots not in divisions.values():
            divisions[share] = slots
    return divisions


class AdaptiveSplit(Observer):
    """Divides the banks of an executor, a live pool or a replay, by what was routed so far.

    All `divisions` are of its banks. Of `cache` they have plan, mode, policy and promotion, and are
    tried from a cold start. Its pins hold under every division.
    """

    def __init__(
        self,
        executor: Executor,
        divisions: Divisions,
        cache: CacheConfig,
        shares_pLE: np.ndarray,
        rule: SplitRule = DEFAULT_SPLIT,
    ):
        self._executor, self._cache, self._shares_pLE = executor, cache, shares_pLE
        self.divisions, self.rule = divisions, rule
        self.history: list[tuple[int, float]] = []  # decoded tokens before it, share
        of_each = {bank.signature: bank.policy.capacity for bank in executor.controller.banks}
        self.share = next(share for share, slots in divisions.items() if slots == of_each)
        cold, layout = replace(cache, warm=None), executor.controller.layout
        self._shadows = {s: Replay(layout, slots, cold) for s, slots in divisions.items()}
        self.tokens = self._position = 0
        self._wait, self._decided_at = rule.first_tokens, 0
        self._recent: deque[tuple[int, list[RouterOutput]]] = deque(maxlen=rule.window_tokens)

    def after_routing(self, routed: RouterOutput) -> None:
        """Remembers a layer of what is decoded; prompts are left out."""
        if routed.h_TD is not None or not routed.valid_T.any():
            return
        if not self._recent or routed.layer <= self._recent[-1][1][-1].layer:
            self._recent.append((self._position, []))
            self.tokens, self._position = self.tokens + 1, self._position + 1
        self._recent[-1][1].append(routed)

    def decide(self) -> float | None:
        """Between two sequences: the share to change to; None to stay, or if it is too early."""
        self._position = 0
        if len(self.divisions) < 2 or self.tokens - self._decided_at < self._wait:
            return None
        self._decided_at, self._wait = self.tokens, min(2 * self._wait, self.rule.most_tokens)
        judged = {share: self._judged(shadow) for share, shadow in self._shadows.items()}
        self._recent.clear()
        found = {share: counts for share, counts in judged.items() if counts is not None}
        if self.share not in found:
            return None
        most = min(t.bytes_moved for t in found.values()) * (1 + self.rule.margin)
        if found[self.share].bytes_moved <= most:
            return None
        good = [share for share, counts in found.items() if counts.bytes_moved <= most]
        self.share = min(good, key=lambda s: (found[s].demoted, found[s].bytes_moved))
        return self.share

    def _judged(self, shadow: Replay) -> Counts | None:
        """What the window's second half comes to, after the first; None while the banks fill."""
        half = len(self._recent) // 2
        before, copies = Counts(), 0
        for index, (position, layers) in enumerate(self._recent):
            if index == half:
                before, copies = replace(shadow.counts), shadow.resident_pLE.sum()
            shadow.token(layers, position)
        if shadow.controller.mode.promotes:
            promoted = self._cache.promotion.per_token * (len(self._recent) - half)
            if shadow.resident_pLE.sum() - copies > self.rule.most_growth * promoted:
                return None
        return shadow.counts - before

    def begin_sequences(self) -> None:
        """Divides the banks anew if what was routed so far says so."""
        share = self.decide()
        if share is None:
            return
        executor = self._executor
        for bank in executor.controller.banks:
            executor.unpin(bank.policy.pinned)
        executor.resize(self.divisions[share])
        if self._cache.warm is not None:
            self._cache.warm.pin(executor, self._shares_pLE)
        self.history.append((self.tokens, share))
