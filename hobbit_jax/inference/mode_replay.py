"""Miss modes, warm starts and the adaptive split on recorded routing, without a model.

This module owns the walk over a trace under a mode, and its figures. Everything that decides is the
live engine's: `cache/controller.py`, `adaptive_split.py`, `cache/warm_start.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from hobbit_jax.cache.budget import BankDemand, divide_precisions
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import BankLayout
from hobbit_jax.cache.counter import Replay, RoutedStep, Tally
from hobbit_jax.cache.miss_modes import MISS_MODES, MissMode
from hobbit_jax.cache.pool_sizing import ADAPTIVE, CANDIDATE_SHARES, DEFAULT_LOW_SHARE, LowShare
from hobbit_jax.cache.promotion import DEFAULT_PROMOTION, PromotionRule
from hobbit_jax.cache.trace import Trace
from hobbit_jax.cache.warm_start import WarmStart
from hobbit_jax.experts.store import NATIVE
from hobbit_jax.inference.adaptive_split import DEFAULT_SPLIT, CapacityTuner, SplitRule
from pallas_kernels.reference import Signature

# Misses are also given for the first so many tokens, where a warm start acts.
FIRST_TOKENS = (1, 16, 64)
_NATIVE, _LOW = Signature("native", "", ""), Signature("low", "", "")


@dataclass(frozen=True)
class ModeSetting:
    """One cache to replay.

    Attributes:
        mode: by its name.
        policy: by its name.
        capacity: native slots that the budget would hold.
        expert_bytes: of a native expert.
        low_bytes: of a low expert.
        low_share: of the budget for low copies, where the mode keeps some.
        pin_share: of each bank, by the profile.
        promotion: for modes that promote.
    """

    mode: str
    policy: str
    capacity: int
    expert_bytes: int
    low_bytes: int
    low_share: LowShare = DEFAULT_LOW_SHARE
    pin_share: float = 0.0
    promotion: PromotionRule = DEFAULT_PROMOTION


def _division(setting: ModeSetting, mode: MissMode, trace: Trace, share: float):
    """Slots per bank, as `pool_sizing.pool_slots` divides them."""
    pairs, k = trace.uses_LE.size, trace.ids_TLK.shape[2]
    low = []
    if mode.low_banks in ("cache", "all"):
        least = pairs if mode.low_banks == "all" else k
        low = [BankDemand(_LOW, setting.low_bytes, pairs, least)]
    native = [BankDemand(_NATIVE, setting.expert_bytes, pairs, k if mode.native_waits else 0)]
    return divide_precisions(
        native, low, setting.capacity * setting.expert_bytes, share if low else 0.0
    )


def routed_tokens(trace: Trace) -> Iterator[tuple[int, list[RoutedStep]]]:
    """Each token's position in its sequence and its layers, all of it asked for natively."""
    order_TLK = np.argsort(-trace.weights_TLK, axis=-1, kind="stable")
    ids_TLK = np.take_along_axis(trace.ids_TLK, order_TLK, -1)
    weights_TLK = np.take_along_axis(trace.weights_TLK, order_TLK, -1)
    requested_TK = np.full((1, ids_TLK.shape[2]), NATIVE, np.int32)
    for ids_LK, weights_LK, position in zip(
        ids_TLK, weights_TLK, trace.position_T.tolist(), strict=True
    ):
        steps = [
            RoutedStep(position, layer, ids_LK[[layer]], weights_LK[[layer]], requested_TK)
            for layer in range(len(ids_LK))
        ]
        yield position, steps


def replay_mode(
    trace: Trace,
    setting: ModeSetting,
    uses_LE: np.ndarray | None = None,
    rule: SplitRule = DEFAULT_SPLIT,
) -> dict[str, Any]:
    """Replays a trace, every selection asked for natively; the figures, ready for JSON.

    Args:
        trace: of one sequence after the other, each decoded token by token.
        setting: of the cache.
        uses_LE: a profile's; a cold start if None.
        rule: of the adaptive split, which decides where a sequence begins.

    Raises:
        ValueError: too small a budget, pins that leave no room for a step, or a bad argument.
    """
    mode, k = MISS_MODES[setting.mode], trace.ids_TLK.shape[2]
    adaptive = setting.low_share == ADAPTIVE and mode.low_banks == "cache"
    share = DEFAULT_LOW_SHARE if setting.low_share == ADAPTIVE else setting.low_share
    slots = _division(setting, mode, trace, share)
    cache = CacheConfig(mode=mode, policy=setting.policy, promotion=setting.promotion)
    layout = BankLayout(
        trace.n_experts,
        k,
        [[bank] * trace.ids_TLK.shape[1] for bank in (_NATIVE, _LOW)],
        {_NATIVE: setting.expert_bytes, _LOW: setting.low_bytes},
    )
    replay = Replay(layout, slots, cache)
    if uses_LE is not None:
        requested_pLE = np.stack([np.ones(uses_LE.shape), np.zeros(uses_LE.shape)])
        WarmStart(uses_LE, setting.pin_share).fill(replay.counter, requested_pLE, mode)
    divisions = {s: _division(setting, mode, trace, s) for s in CANDIDATE_SHARES if adaptive}
    divisions = {s: found for s, found in divisions.items() if found.keys() == slots.keys()}
    tuner = CapacityTuner(layout, divisions, share, cache, rule)
    began, changes, first_misses = replace(replay.tally), [], {}
    tokens = tqdm(routed_tokens(trace), total=len(trace.ids_TLK), unit="token", disable=None)
    for number, (position, steps) in enumerate(tokens):
        if position == 0 and (new := tuner.decide()) is not None:
            replay.counter.resize(divisions[new])
            changes.append([number, new])
        replay.token(number, steps)
        if adaptive:
            for step in steps:
                tuner.record(step)
        if number + 1 in FIRST_TOKENS:
            first_misses[number + 1] = replay.tally.since(began).misses
    return {
        **{name: value for name, value in asdict(setting).items() if name != "promotion"},
        "slots": {bank.signature.gate: bank.policy.capacity for bank in replay.banks},
        **rates(replay.tally.since(began)),
        "first_misses": first_misses,
        "redivisions": changes,
        "warm": uses_LE is not None,
        "trace": trace.name,
    }


def rates(tally: Tally) -> dict[str, float]:
    """Per token, per selection and per use."""
    tokens, selections = max(1, tally.tokens), max(1, tally.selections)
    return {
        "hit_rate": tally.hits / max(1, tally.hits + tally.misses),
        "misses_per_token": tally.misses / tokens,
        "bytes_moved_per_token": tally.bytes_moved / tokens,
        "promotions_per_token": tally.promotions / tokens,
        "degraded_share": tally.degraded / selections,
        "skipped_share": tally.skipped / selections,
    }
