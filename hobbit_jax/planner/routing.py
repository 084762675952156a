"""Which experts a text will ask for: recorded routing, or routing made up to resemble it.

The model's own trace (`cache/trace.py`, --trace_out of the scripts that run it) extrapolates
nothing but the text. Without one, routing is made up with the statistics of recorded models below.

How alike neighbouring tokens are decides a cache's hit rate and differs by model and by text, so
what is made up is made up twice, at both ends of what is known, and a plan gives a range. A quarter
of the layers are enough, since they are alike; `traffic.py` replays a trace by fraction of experts.

Made-up routing gives expert e of a layer at token t the score f_e + s_e(t) + q_e(t) + noise and
chooses the K largest: f is fixed (hot_experts), s and q are stationary autoregressions that forget
slowly and quickly (neighbouring tokens share experts), the noise is standard normal.

`LEAST_LOCAL`, share of the most used quarter, and overlap with the token 1, 2, 5 and 20 before, at
26 layers of 64, top-6:

    DeepSeek-V2-Lite, two texts, mean   .489   .276  .206  .182  .152
    made up                             .480   .272  .220  .172  .141

`MOST_LOCAL`, selections that repeat at the next token and within eight, hit rate of LRU with 40 %
resident, and of the most used 40 % of other text and of the text itself, at 128 experts, top-8:

    Qwen3-30B-A3B, generation           .45    .80   .90-.95  .68-.73  .92
    made up                             .45    .80   .94      .71      .90

Source of these: kekzl/imp pull requests 1358 and 1359 (three prompts of 512 tokens). Others lie
between: Qwen3.8-Flash-Next .81 with 25 % (ggml-org/llama.cpp 27861), .62 with 36 % (imp 2061).
"""

from dataclasses import dataclass

import numpy as np

from hobbit_jax.cache.trace import Trace
from hobbit_jax.models.config import ModelConfig

# Tokens of a replay: what the hot experts are learned from, what fills the cache, what is counted.
PROFILE_TOKENS, WARM_TOKENS, COUNTED_TOKENS = 300, 150, 250
TOKENS = PROFILE_TOKENS + WARM_TOKENS + COUNTED_TOKENS


@dataclass(frozen=True)
class RoutingSkew:
    """Statistics of made-up routing; standard deviations are over that of the noise."""

    hot_experts: float  # standard deviation of f over a layer's experts
    slow: float  # standard deviation of s
    slow_memory: float  # what s keeps from one token to the next, 0-1
    fast: float  # standard deviation of q
    fast_memory: float  # what q keeps from one token to the next, 0-1
    source: str  # what they were fitted to


LEAST_LOCAL = RoutingSkew(
    hot_experts=0.6, slow=0.7, slow_memory=0.9, fast=1.0, fast_memory=0.45,
    source="as local as DeepSeek-V2-Lite on two given texts",
)  # fmt: skip
MOST_LOCAL = RoutingSkew(
    hot_experts=0.47, slow=1.9, slow_memory=0.997, fast=1.25, fast_memory=0.62,
    source="as local as Qwen3-30B-A3B when it generates",
)  # fmt: skip
# Few wide experts are chosen more evenly than many narrow ones: fitted to how often
# Mixtral-8x7B-Instruct chose each expert on seven texts (efeslab/fiddler).
FEW_EXPERTS, EVEN_HOT_EXPERTS = 16, 0.25
# Of made-up routing; a model of fewer has them all.
LAYERS = 12


@dataclass(frozen=True)
class Routing:
    """A trace to replay."""

    trace: Trace  # `TOKENS` tokens at most
    source: str  # where it comes from
    extrapolates: tuple[str, ...]  # why its rates may not be the model's; empty for its own


def recorded(trace: Trace, config: ModelConfig) -> Routing:
    """The first `TOKENS` tokens of a recorded trace, or all of a shorter one.

    Raises:
        ValueError: too few tokens to learn, warm up and count on.
    """
    n_tokens = len(trace.ids_TLK)
    if n_tokens < 30:
        raise ValueError(f"{trace.name} has {n_tokens} tokens; a replay needs 30 or more")
    _, n_layers, k = trace.ids_TLK.shape
    theirs = (n_layers, trace.n_experts, k)
    ours = (config.n_layers, config.n_experts, config.experts_per_token)
    reason = (
        "routing of another model, by fraction of experts: {} layers, {} experts, top-{} "
        "instead of {}, {}, {}".format(*theirs, *ours)
    )
    reasons = (reason,) if theirs != ours else ()
    return Routing(trace.part(0, TOKENS), f"recorded: {trace.name}", reasons)


def synthetic_routing(config: ModelConfig, seed: int = 0) -> list[Routing]:
    """Routing of the model's shape with nothing of the model's own, at both localities."""
    shape = (min(LAYERS, config.n_layers), config.n_experts)
    reason = "no routing of this model: hot experts and order are made up"
    normal_LE = np.random.default_rng([seed, 1]).standard_normal(shape)
    found = []
    for skew in (LEAST_LOCAL, MOST_LOCAL):
        few = config.n_experts <= FEW_EXPERTS
        hot_experts_LE = (EVEN_HOT_EXPERTS if few else skew.hot_experts) * normal_LE
        trace = make_up(hot_experts_LE, config.experts_per_token, skew, seed)
        found.append(Routing(trace, f"made up, {skew.source}", (reason,)))
    return found


def make_up(hot_experts_LE: np.ndarray, k: int, skew: RoutingSkew, seed: int = 0) -> Trace:
    """One sequence of made-up routing, as the module says; the same bits for the same seed."""
    rng = np.random.default_rng([seed, 2])
    n_layers, n_experts = shape = hot_experts_LE.shape
    slow_LE, fast_LE = rng.standard_normal(shape), rng.standard_normal(shape)
    ids_TLK = np.empty((TOKENS, n_layers, k), np.int64)
    weights_TLK = np.empty((TOKENS, n_layers, k), np.float32)

    def next_state(state_LE: np.ndarray, memory: float) -> np.ndarray:
        return memory * state_LE + np.sqrt(1 - memory**2) * rng.standard_normal(shape)

    for token in range(TOKENS):
        slow_LE = next_state(slow_LE, skew.slow_memory)
        fast_LE = next_state(fast_LE, skew.fast_memory)
        score_LE = hot_experts_LE + skew.slow * slow_LE + skew.fast * fast_LE
        score_LE = score_LE + rng.standard_normal(shape)
        ids_LK = np.argsort(-score_LE, axis=1)[:, :k]
        score_LK = np.take_along_axis(score_LE, ids_LK, axis=1)
        odds_LK = np.exp(score_LK - score_LK[:, :1])
        ids_TLK[token], weights_TLK[token] = ids_LK, odds_LK / odds_LK.sum(axis=1, keepdims=True)
    return Trace("made up", ids_TLK, weights_TLK, np.arange(TOKENS), n_experts)
