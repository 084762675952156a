"""What a model keeps of its sequences between tokens.

Owns the arrays: one for all blocks that keep states of one shape, so that a loop over blocks can
write into it in place. Tokens' own states (keys, values) stand at their positions; the others (the
matrix of a recurrence) are replaced as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from hobbit_jax.models.config import ModelConfig

# Of keys and values between tokens. float32 is the default: half the bytes cost KL on every text,
# and the figures of docs/ are of float32 (docs/log/2026-11-29-cpu-backend.md has the measurement).
KV_FORMATS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

Arrays = dict[str, jax.Array]
Places = Mapping[str, Any]  # by name of a state; an index past the end: the block has none


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("by_token", "recurrent"),
    meta_fields=("context",),
)
@dataclass(frozen=True)
class Caches:
    """All blocks' states of B sequences."""

    by_token: Arrays  # [n, B, C, ...] of one of `KV_FORMATS`, where n blocks keep such a state
    recurrent: Arrays  # float32 [n, B, ...]
    context: int  # C; a token at position C is padding, and nothing is kept of it

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self))

    def write(self, places: Places, positions_BT: jax.Array, writes: Arrays) -> Self:
        """Puts what a block made of T tokens at the block's places."""
        by_token, recurrent = dict(self.by_token), dict(self.recurrent)
        for name, new in writes.items():
            if name in recurrent:
                array = recurrent[name]
                recurrent[name] = array.at[places[name]].set(new, mode="drop")
            else:
                array = by_token[name]
                at = (places[name], jnp.arange(len(positions_BT))[:, None], positions_BT)
                by_token[name] = array.at[at].set(new.astype(array.dtype), mode="drop")
        return replace(self, by_token=by_token, recurrent=recurrent)

    @jax.jit
    def of(self, rows_R: jax.Array) -> Self:
        """Those of some sequences, int32 [R], in this order."""
        return jax.tree.map(lambda array: array[:, rows_R], self)

    @partial(jax.jit, donate_argnames="self")
    def begun_with(self, prefix: Self) -> Self:
        """Copies the one sequence of `prefix`, whose positions are all filled, to every one."""
        by_token = {
            name: array.at[:, :, : prefix.context].set(prefix.by_token[name])
            for name, array in self.by_token.items()
        }
        recurrent = {
            name: jnp.broadcast_to(prefix.recurrent[name], array.shape)
            for name, array in self.recurrent.items()
        }
        return replace(self, by_token=by_token, recurrent=recurrent)


def empty_caches(
    config: ModelConfig, batch: int, context: int, kv_format: str = "float32"
) -> Caches:
    """No sequence has any token yet."""
    by_token, recurrent = {}, {}
    for name, (state, count) in config.states.items():
        if state.by_token:
            shape = (count, batch, context, *state.shape)
            by_token[name] = jnp.zeros(shape, KV_FORMATS[kv_format])
        else:
            recurrent[name] = jnp.zeros((count, batch, *state.shape))
    return Caches(by_token, recurrent, context)
