"""Which experts a token chooses, and with which weights.

Owns the one router of all families, whose settings are `config.RouterConfig`. Everything is
float32.

Source: llama.cpp, src/llama-graph.cpp (`build_moe_ffn`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.modules import BlockWeights, rms_normalised

# llama.cpp's least divisor of a renormalisation: the smallest normal float16.
_LEAST_SUM = 6.103515625e-5

# From logits to scores; any other gating leaves logits as they are.
_GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}


class Routing(NamedTuple):
    """What the router chose: expert ids int32 and their weights float32, both [..., K].

    Experts stand in descending order of weight.
    """

    ids: jax.Array
    weights: jax.Array


class Router(nnx.Module):
    """The router of one block."""

    def __init__(self, config: ModelConfig, weights: BlockWeights):
        self.settings, self.k = config.router, config.experts_per_token
        self.linear = None if self.settings.gating == "always" else weights.router()
        biased = self.settings.selection_bias
        self.bias = nnx.Param(weights.array("exp_probs_b.bias")) if biased else None
        self.rms_eps, settings = config.rms_eps, self.settings
        own = weights.array("router.scale") * config.d_model**-0.5 if settings.own_input else None
        self.input_scale = None if own is None else nnx.Param(own)
        scaled = settings.expert_scale
        self.expert_scale = nnx.Param(weights.array("ffn_down_exps.scale")) if scaled else None

    def scores(self, h: jax.Array) -> jax.Array:
        """Every expert's score, float32 [..., E]."""
        if self.linear is None:
            return jnp.ones((*h.shape[:-1], 1))
        if self.input_scale is not None:
            normalised = rms_normalised(h, self.rms_eps)
            h = normalised * jnp.broadcast_to(self.input_scale[...], h.shape)
        logits, gate = self.linear(h), _GATES.get(self.settings.gating)
        return logits if gate is None else gate(logits)

    def __call__(self, h: jax.Array, lift_E: jax.Array | None = None) -> Routing:
        """The K experts of each token, heaviest first.

        Args:
            h: [..., D]; what the experts read, or the stream for a router with an input of its own.
            lift_E: float32, by which the logarithms of scores are raised for the choice, and for
                the choice alone. Each token's best expert stays chosen.
        """
        settings, scores = self.settings, self.scores(h)
        if self.bias is None and settings.groups == 1 and lift_E is None:
            weights, ids = jax.lax.top_k(scores, self.k)
        else:
            chosen_by = self._selection_scores(scores)
            if lift_E is not None:
                best = jax.nn.one_hot(jnp.argmax(chosen_by, axis=-1), len(lift_E), dtype=jnp.bool_)
                if settings.gating == "softmax_of_chosen":
                    lifted = scores + jnp.broadcast_to(lift_E, scores.shape)
                else:
                    lifted = scores * jnp.broadcast_to(jnp.exp(lift_E), scores.shape)
                chosen_by = jnp.where(best, jnp.inf, self._selection_scores(lifted))
            ids = jax.lax.top_k(chosen_by, self.k)[1]
            # What is chosen by another number than its weight is put in the order of weights.
            weights, order = jax.lax.top_k(jnp.take_along_axis(scores, ids, axis=-1), self.k)
            ids = jnp.take_along_axis(ids, order, axis=-1)
        if settings.gating == "softmax_of_chosen":
            weights = jax.nn.softmax(weights)
        if settings.renormalise:
            total = jnp.sum(weights, axis=-1, keepdims=True)
            # The best K of a softmax never come near the bound.
            are_best = settings.gating == "softmax" and self.bias is None
            weights /= total if are_best else jnp.maximum(total, _LEAST_SUM)
        weights = weights if settings.scale == 1 else weights * settings.scale
        if self.expert_scale is not None:
            weights, order = jax.lax.top_k(weights * self.expert_scale[...][ids], self.k)
            ids = jnp.take_along_axis(ids, order, axis=-1)
        return Routing(ids, weights)

    def _selection_scores(self, scores: jax.Array) -> jax.Array:
        """By what experts are chosen: biased, and -inf outside of the chosen groups."""
        groups = self.settings.groups
        if self.bias is not None:
            scores = scores + jnp.broadcast_to(self.bias[...], scores.shape)
        if groups == 1:
            return scores
        grouped = scores.reshape(*scores.shape[:-1], groups, -1)
        best = jnp.sum(jax.lax.top_k(grouped, self.settings.ranked_by)[0], axis=-1)
        kept = jax.lax.top_k(best, self.settings.groups_used)[1]
        is_kept = jnp.any(jax.nn.one_hot(kept, groups, dtype=jnp.bool_), axis=-2)
        return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)
