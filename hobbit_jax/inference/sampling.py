"""From logits to the next token: greedy, temperature and top-p, on the device."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

# Logits over a lower temperature overflow float32, and their softmax has been the greedy choice, to
# the last bit, for long.
GREEDY_BELOW = 1e-30
MAX_TEMPERATURE = 1e6
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0  # to `MAX_TEMPERATURE`; below `GREEDY_BELOW` the choice is greedy
    top_p: float = 1.0  # above 0; the smallest set of tokens with that mass is kept
    seed: int = 0  # to `MAX_SEED`

    def __post_init__(self):
        if not 0 <= self.temperature <= MAX_TEMPERATURE:  # false for NaN
            raise ValueError(
                f"temperature is {self.temperature}; want 0 (greedy) to {MAX_TEMPERATURE:g}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; want 0 < top_p <= 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}; want 0 to {MAX_SEED}")
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)


def seed_key(seed: int) -> jax.Array:
    """The key of a seed from 0 to `MAX_SEED`, of which `jax.random.key` takes the low 32 bits."""
    key, high = jax.random.key(seed & 0xFFFFFFFF), seed >> 32
    return jax.random.fold_in(key, high) if high else key


@partial(jax.jit, static_argnames="sampling")
def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Next token ids int32 [B]; ties in greedy choice go to the lowest id."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV / sampling.temperature
    if sampling.top_p == 1:
        return jax.random.categorical(key, scaled_BV, axis=-1).astype(jnp.int32)
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays while the mass before it is below top_p; the first does, however small that.
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, -jnp.inf)
    kept_BV = kept_BV.at[:, 0].set(sorted_BV[:, 0])
    chosen_B = jax.random.categorical(key, kept_BV, axis=-1)
    return jnp.take_along_axis(order_BV, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
