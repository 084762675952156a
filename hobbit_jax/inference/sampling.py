"""From logits to the next token: greedy, temperature and top-p.

Owns the choice of a token and its randomness. Runs on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """`temperature=0` is greedy; `top_p` keeps the smallest set of tokens with that mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; want 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; want 0 < top_p <= 1")


@partial(jax.jit, static_argnames="sampling")
def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Next token ids int32 [B]; ties in greedy choice go to the lowest id."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
        sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
        mass_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
        # A token stays while the mass before it is below top_p: the first always does.
        before_BV = mass_BV - jax.nn.softmax(sorted_BV, axis=-1)
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, -jnp.inf)
        chosen_B = jax.random.categorical(key, kept_BV, axis=-1)
        return jnp.take_along_axis(order_BV, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, scaled_BV, axis=-1).astype(jnp.int32)
