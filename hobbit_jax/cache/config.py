"""The settings of an expert cache, in one value that engines, replays and scripts pass on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hobbit_jax.cache.controller import BankLayout, Controller, Observer
from hobbit_jax.cache.miss_modes import LOW, MissMode, miss_mode
from hobbit_jax.cache.policies import DEFAULT_POLICY, PolicyFactory, policy_factory
from hobbit_jax.cache.pool_sizing import DEFAULT_LOW_SHARE, LowShare
from hobbit_jax.cache.prefetch import PrefetchRule
from hobbit_jax.cache.promotion import DEFAULT_PROMOTION, Promotion, PromotionRule
from hobbit_jax.cache.warm_start import Executor, WarmStart, load_all
from hobbit_jax.experts.precision import PrecisionPlan
from hobbit_jax.models.caches import KV_FORMATS
from pallas_kernels.reference import Signature

MAX_RESIDENT_LIFT = 50.0  # e to it times a score is far from float32's greatest number


@dataclass(frozen=True, eq=False)
class CacheConfig:
    """What is kept on the device, and what happens to a selection that is not.

    Attributes:
        budget_bytes: bytes of each device's expert pool; None holds every expert of the plan.
        plan: who gets which precision; None is native throughout.
        policy: who is evicted, by name (`cache/policies`) or as a factory; one per bank.
        mode: what serves a selection whose copy is missing, by name (`cache/miss_modes.py`) or as a
            setting.
        resident_lift: raises the logarithms of the router's scores of experts that are resident, at
            any precision, for the choice in decode (arXiv 2412.00099); their weights stay. A
            token's best expert stays chosen. 0 routes as the model does; from about 10 on a missing
            expert is substituted by a resident one wherever there is one.
        low_share: share of the budget (0-1) for low copies, where the mode keeps some; "adaptive"
            follows what is used, between sequences.
        promotion: how eagerly a mode that promotes does so.
        warm: which experts are resident before the first token, and which for good.
        prefetch: who guesses what later layers of a token need; None guesses nothing.
        staging_bytes: device bytes beside the pool for uploads ahead of their use; None is as much
            as one token's experts of a layer, 0 waits for each upload by itself.
        devices: how many divide the experts among them; each holds all the rest.
        chunk_tokens: tokens of one prefill step, over all sequences.
        kv_format: of keys and values, one of `KV_FORMATS`.

    Raises:
        ValueError: a mode or a format that there is not, or a lift outside its range.
    """

    budget_bytes: int | None = None
    plan: PrecisionPlan | None = None
    policy: str | PolicyFactory = DEFAULT_POLICY
    mode: str | MissMode = "fetch"
    resident_lift: float = 0.0
    low_share: LowShare = DEFAULT_LOW_SHARE
    promotion: PromotionRule = DEFAULT_PROMOTION
    warm: WarmStart | None = None
    prefetch: PrefetchRule | None = None
    staging_bytes: int | None = None
    devices: int = 1
    chunk_tokens: int = 2048
    kv_format: str = "float32"

    def __post_init__(self):
        if self.kv_format not in KV_FORMATS:
            raise ValueError(
                f"kv_format is {self.kv_format!r}; want one of {', '.join(KV_FORMATS)} "
                "(--kv_format)"
            )
        if not 0 <= self.resident_lift <= MAX_RESIDENT_LIFT:
            raise ValueError(
                f"resident_lift is {self.resident_lift}; want 0 to {MAX_RESIDENT_LIFT:g} "
                "(--resident_lift)"
            )
        miss_mode(self.mode)

    def controller(
        self, layout: BankLayout, slots: Mapping[Signature, int], observers: Sequence[Observer] = ()
    ) -> Controller:
        """What decides by these settings, in a live engine and in a replay.

        The observers are told of every decision after promotion, where there is one.
        """
        mode = miss_mode(self.mode)
        promotion = [Promotion(self.promotion)] if mode.promotes else []
        policy = policy_factory(self.policy)
        return Controller(layout, slots, policy, [*promotion, *observers], mode)

    def fill(self, executor: Executor, plan_shares_pLE: np.ndarray) -> None:
        """Makes resident what these settings want there before the first token.

        Raises:
            ValueError: a profile of another shape, or pins that leave a bank too few slots.
        """
        if executor.controller.mode.low_banks == "all":
            load_all(executor, LOW)
        if self.warm is not None:
            self.warm.fill(executor, plan_shares_pLE)
