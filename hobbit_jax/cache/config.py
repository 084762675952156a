"""The settings of an expert cache, in one value that engines, replays and scripts pass on."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hobbit_jax.cache.controller import BankLayout, Controller
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

    Raises:
        ValueError: a mode or a format that there is not, or a lift outside its range.
    """

    budget_bytes: int | None = None  # of each device's expert pool; None holds the plan's experts
    plan: PrecisionPlan | None = None  # who gets which precision; None is native throughout
    # Who is evicted, by name (`cache/policies`) or as a factory; one per bank.
    policy: str | PolicyFactory = DEFAULT_POLICY
    # What serves a selection whose copy is missing, by name (`miss_modes.py`) or as a setting.
    mode: str | MissMode = "fetch"
    # Raises the logarithms of the router's scores of experts that are resident, at any precision,
    # for the choice in decode (arXiv 2412.00099); their weights stay. A token's best expert stays
    # chosen. 0 routes as the model does; from about 10 on a missing expert is substituted by a
    # resident one wherever there is one.
    resident_lift: float = 0.0
    # Share of the budget (0-1) for low copies, where the mode keeps some; "adaptive" follows what
    # is used, between sequences.
    low_share: LowShare = DEFAULT_LOW_SHARE
    promotion: PromotionRule = DEFAULT_PROMOTION  # how eagerly a mode that promotes does so
    warm: WarmStart | None = None  # who is resident before the first token, and who for good
    prefetch: PrefetchRule | None = None  # who guesses what later layers of a token need
    # Device bytes beside the pool for uploads ahead of their use; None is as much as one token's
    # experts of a layer, 0 waits for each upload by itself.
    staging_bytes: int | None = None
    devices: int = 1  # that divide the experts among them; each holds all the rest
    chunk_tokens: int = 2048  # of one prefill step, over all sequences
    kv_format: str = "float32"  # of keys and values, one of `KV_FORMATS`

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

    def controller(self, layout: BankLayout, slots: Mapping[Signature, int]) -> Controller:
        """What decides by these settings, in a live engine and in a replay."""
        mode = miss_mode(self.mode)
        controller = Controller(layout, slots, policy_factory(self.policy), mode)
        if mode.promotes:
            controller.observers.append(Promotion(self.promotion, controller))
        return controller

    def fill(self, executor: Executor, plan_shares_pLE: np.ndarray) -> None:
        """Makes resident what these settings want there at first; see `WarmStart.fill`."""
        if executor.controller.mode.low_banks == "all":
            load_all(executor, LOW)
        if self.warm is not None:
            self.warm.fill(executor, plan_shares_pLE)
