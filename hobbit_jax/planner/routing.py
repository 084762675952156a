"""Which experts a text will ask for: recorded routing, or routing made up to resemble it.

Owns the trace that a plan's replays run on, and the reasons why that trace is not the model's own.
Three sources, the best first:

- the model's own trace (`cache/trace.py`): nothing is extrapolated but the text;
- its profile (a calibration's counts): the hot experts are its own, the order of tokens is made up;
- nothing: hot experts and order are made up, with the statistics of recorded models below. Another
  model's trace is taken by fraction of experts (`traffic.py`).

Made-up routing gives expert e of a layer at token t the score f_e + s_e(t) + q_e(t) + noise and
chooses the K largest: f is fixed (hot_experts), s and q are stationary autoregressions that forget
slowly and quickly (neighbouring tokens share experts), the noise is standard normal. Share of the
most used quarter, and overlap with the token 1, 2, 5 and 20 before, at 26 layers of 64, top-6:

    DeepSeek-V2-Lite, two texts, mean   .489   .276  .206  .182  .152
    made up                             .480   .272  .220  .172  .141
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from hobbit_jax.cache.trace import Trace
from hobbit_jax.models.config import ModelConfig

# Tokens of a replay: what the hot experts are learned from, what fills the cache, what is counted.
PROFILE_TOKENS, WARM_TOKENS, COUNTED_TOKENS = 300, 150, 250
TOKENS = PROFILE_TOKENS + WARM_TOKENS + COUNTED_TOKENS


@dataclass(frozen=True)
class RoutingSkew:
    """Statistics of made-up routing; standard deviations are over that of the noise.

    Attributes:
        hot_experts: standard deviation of f over a layer's experts.
        slow: standard deviation of s.
        slow_memory: what s keeps from one token to the next, 0-1.
        fast: standard deviation of q.
        fast_memory: what q keeps from one token to the next, 0-1.
        source: what they were fitted to.
    """

    hot_experts: float
    slow: float
    slow_memory: float
    fast: float
    fast_memory: float
    source: str


DEEPSEEK_V2_LITE = RoutingSkew(
    hot_experts=0.6, slow=0.7, slow_memory=0.9, fast=1.0, fast_memory=0.45,
    source="fitted to the recorded routing of DeepSeek-V2-Lite (26 layers, 64 experts, top-6, two "
    "texts): hot experts and shared experts of neighbouring tokens",
)  # fmt: skip
MIXTRAL = RoutingSkew(
    hot_experts=0.25, slow=0.7, slow_memory=0.9, fast=1.0, fast_memory=0.45,
    source="hot experts fitted to how often Mixtral-8x7B-Instruct chose each expert on seven texts "
    "(efeslab/fiddler); likeness of neighbouring tokens taken from DeepSeek-V2-Lite",
)  # fmt: skip
# Few wide experts are chosen more evenly than many narrow ones.
FEW_EXPERTS = 16


@dataclass(frozen=True)
class Routing:
    """A trace to replay.

    Attributes:
        trace: `TOKENS` tokens at most.
        source: where it comes from.
        extrapolates: why its rates may not be the model's, one reason each; empty for its own.
    """

    trace: Trace
    source: str
    extrapolates: tuple[str, ...]


def recorded(trace: Trace, config: ModelConfig) -> Routing:
    """The first `TOKENS` tokens of a recorded trace, or all of a shorter one.

    Raises:
        ValueError: too few tokens to learn, warm up and count on.
    """
    n_tokens = len(trace.ids_TLK)
    if n_tokens < 30:
        raise ValueError(f"{trace.name} has {n_tokens} tokens; a replay needs 30 or more")
    part = Trace(
        trace.name,
        trace.ids_TLK[:TOKENS],
        trace.weights_TLK[:TOKENS],
        trace.position_T[:TOKENS],
        trace.n_experts,
    )
    _, n_layers, k = trace.ids_TLK.shape
    theirs = (n_layers, trace.n_experts, k)
    ours = (config.n_layers, config.n_experts, config.experts_per_token)
    reasons: tuple[str, ...] = ()
    if theirs != ours:
        reasons = (
            "routing of another model, by fraction of experts: {} layers, {} experts, top-{} "
            "instead of {}, {}, {}".format(*theirs, *ours),
        )
    return Routing(part, f"recorded: {trace.name}", reasons)


def profiled(uses_LE: np.ndarray, config: ModelConfig, seed: int = 0) -> Routing:
    """Made-up order of tokens around the hot experts of a profile.

    Raises:
        ValueError: a profile of another shape.
    """
    wanted = (config.n_layers, config.n_experts)
    if uses_LE.shape != wanted:
        raise ValueError(
            f"the profile has layers and experts {list(uses_LE.shape)}; the model {list(wanted)}"
        )
    skew = skew_for(config)
    hot_experts_LE = _fit_hot_experts(uses_LE, config.experts_per_token, skew)
    trace = make_up(hot_experts_LE, config.experts_per_token, skew, seed)
    reason = (
        "the profile has hot experts only; how alike neighbouring tokens are is made up, after "
        "DeepSeek-V2-Lite"
    )
    return Routing(trace, "hot experts of the model's own profile", (reason,))


def synthetic_routing(config: ModelConfig, seed: int = 0) -> Routing:
    """Routing of the model's shape with nothing of the model's own."""
    skew = skew_for(config)
    rng = np.random.default_rng([seed, 1])
    hot_experts_LE = skew.hot_experts * rng.standard_normal((config.n_layers, config.n_experts))
    trace = make_up(hot_experts_LE, config.experts_per_token, skew, seed)
    return Routing(trace, "made up", (f"no routing of this model: made up, {skew.source}",))


def skew_for(config: ModelConfig) -> RoutingSkew:
    """The recorded model that is more alike in its number of experts."""
    return MIXTRAL if config.n_experts <= FEW_EXPERTS else DEEPSEEK_V2_LITE


def make_up(
    hot_experts_LE: np.ndarray, k: int, skew: RoutingSkew, seed: int = 0, n_tokens: int = TOKENS
) -> Trace:
    """One sequence of made-up routing, as the module says; the same bits for the same seed."""
    rng = np.random.default_rng([seed, 2])
    (n_layers, n_experts), shape = hot_experts_LE.shape, hot_experts_LE.shape
    slow_LE, fast_LE = rng.standard_normal(shape), rng.standard_normal(shape)
    ids_TLK = np.empty((n_tokens, n_layers, k), np.int64)
    weights_TLK = np.empty((n_tokens, n_layers, k), np.float32)

    def next_state(state_LE: np.ndarray, memory: float) -> np.ndarray:
        return memory * state_LE + np.sqrt(1 - memory**2) * rng.standard_normal(shape)

    for token in range(n_tokens):
        slow_LE = next_state(slow_LE, skew.slow_memory)
        fast_LE = next_state(fast_LE, skew.fast_memory)
        score_LE = hot_experts_LE + skew.slow * slow_LE + skew.fast * fast_LE
        score_LE = score_LE + rng.standard_normal(shape)
        ids_LK = np.argsort(-score_LE, axis=1)[:, :k]
        score_LK = np.take_along_axis(score_LE, ids_LK, axis=1)
        odds_LK = np.exp(score_LK - score_LK[:, :1])
        ids_TLK[token], weights_TLK[token] = ids_LK, odds_LK / odds_LK.sum(axis=1, keepdims=True)
    return Trace("made up", ids_TLK, weights_TLK, np.arange(n_tokens), n_experts)


def _fit_hot_experts(uses_LE: np.ndarray, k: int, skew: RoutingSkew) -> np.ndarray:
    """Fixed scores that give a profile's shares: the quantile of each expert's share.

    An expert is chosen when its score is above about the same bar as everybody's, so its mean score
    is the bar less the bar's distance in standard deviations. Shares are met to a few per cent.
    """
    chosen_LE = k * (uses_LE + 0.5) / (uses_LE + 0.5).sum(axis=1, keepdims=True)
    spread = np.sqrt(1 + skew.slow**2 + skew.fast**2)
    return spread * norm.ppf(np.clip(chosen_LE, 1e-4, 1 - 1e-4))
