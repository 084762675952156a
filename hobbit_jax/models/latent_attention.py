"""Latent attention (MLA): heads' keys and values are projections of one vector a token.

A token's latent vector c and one rotated key, which all heads share, are all that is kept of it. A
head's own projections are *absorbed*: that of the keys turns its query instead, and that of the
values its mixture of latent vectors:

    score = (key_projᵀ·q_plain)·c + q_rotated·k_rotated;  out = value_proj·Σ softmax(score)·c

So this is attention of all query heads to one key/value head, whose value is a part of its key.

Source: arXiv 2405.04434, section 2.1; llama.cpp, src/models/deepseek2.cpp.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hobbit_jax.models.attention import Rope, attend, rotate
from hobbit_jax.models.caches import Arrays, Caches, Places
from hobbit_jax.models.config import Shapes, State
from hobbit_jax.models.modules import BlockWeights
from pallas_kernels.ggml import ops as ggml


@dataclass(frozen=True)
class LatentAttention:
    """The attention of `latent_attention.py`."""

    n_heads: int  # of queries
    d_latent: int  # width of the vector from which all heads' keys and values follow
    d_query_latent: int  # likewise of the queries; 0 where they are projected from the stream
    plain_dim: int  # values of a head's query and key that do not rotate; the rotated ones follow
    value_dim: int  # of a head
    rope: Rope  # of the rotated values
    log_multiplier: float = 0.0  # of the logarithm of YaRN's factor, in scores

    @property
    def score_scale(self) -> float:
        """Of scores."""
        factor = 1.0 if self.rope.yarn is None else self.rope.yarn.factor
        stretch = 1 + self.log_multiplier * math.log(factor)
        return stretch**2 / math.sqrt(self.plain_dim + self.rope.dim)

    def tensors(self, d_model: int) -> Shapes:
        """Those of a block."""
        query, query_latent = self.n_heads * (self.plain_dim + self.rope.dim), self.d_query_latent
        from_stream: Shapes = {"attn_q": (query, d_model)}
        from_latent: Shapes = {
            "attn_q_a": (query_latent, d_model),
            "attn_q_a_norm": (query_latent,),
            "attn_q_b": (query, query_latent),
        }
        return {
            **(from_latent if query_latent else from_stream),
            "attn_kv_a_mqa": (self.row_width, d_model),
            "attn_kv_a_norm": (self.d_latent,),
            "attn_k_b": (self.n_heads, self.d_latent, self.plain_dim),
            "attn_v_b": (self.n_heads, self.value_dim, self.d_latent),
            "attn_output": (d_model, self.n_heads * self.value_dim),
        }

    @property
    def row_width(self) -> int:
        """Numbers that the cache keeps of a token: the latent vector and the rotated key."""
        return self.d_latent + self.rope.dim

    @property
    def passed_width(self) -> int:
        """See `GroupedQuery.passed_width`: queries, as wide as what they meet."""
        return self.n_heads * self.row_width

    def states(self) -> tuple[State, ...]:
        """One row a token, which serves as the key and, without its end, as the value."""
        return (State(f"latent_{self.d_latent}+{self.rope.dim}", (1, self.row_width), True),)


class LatentMixer(nnx.Module):
    """The matrices of `LatentAttention`, and what it computes. See `layer.Mixer`.

    Here Z is the width of the latent vector, R that of what the cache keeps of a token, N and V
    those of a head's query before it is turned, without its rotated end, and of its value.
    """

    def __init__(self, spec: LatentAttention, weights: BlockWeights):
        self.spec = spec
        latent = spec.d_query_latent > 0
        self.to_query_latent = weights.linear("attn_q_a") if latent else None
        self.query_norm = weights.norm("attn_q_a_norm") if latent else None
        self.query = weights.linear("attn_q_b" if latent else "attn_q")
        self.to_row = weights.linear("attn_kv_a_mqa")
        self.latent_norm = weights.norm("attn_kv_a_norm")
        self.keys, self.values = weights.of_heads("attn_k_b"), weights.of_heads("attn_v_b")
        self.output = weights.linear("attn_output")

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> tuple[jax.Array, Arrays]:
        """Queries as wide as the cache's rows, and the tokens' rows."""
        spec, (batch, tokens, _) = self.spec, x_BTD.shape
        read = x_BTD
        if self.to_query_latent is not None and self.query_norm is not None:
            read = self.query_norm(self.to_query_latent(x_BTD))
        q_BTHd = self.query(read).reshape(batch, tokens, spec.n_heads, -1)
        keys_HZN = self.keys.weights().reshape(spec.n_heads, spec.d_latent, spec.plain_dim)
        turned_BTHZ = jnp.einsum("bthn,hzn->bthz", q_BTHd[..., : spec.plain_dim], keys_HZN)
        rotated_BTHd = rotate(q_BTHd[..., spec.plain_dim :], positions_BT, spec.rope)
        q_BTHR = jnp.concatenate([turned_BTHZ, rotated_BTHd], axis=-1)
        row_BTR = self.to_row(x_BTD)
        latent_BT1Z = self.latent_norm(row_BTR[..., : spec.d_latent])[:, :, None]
        key_BT1d = rotate(row_BTR[:, :, None, spec.d_latent :], positions_BT, spec.rope)
        row_BT1R = jnp.concatenate([latent_BT1Z, key_BT1d], axis=-1)
        return q_BTHR.reshape(batch, tokens, -1), {spec.states()[0].name: row_BT1R}

    def mix(
        self, passed_BTN: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> jax.Array:
        """What attention adds to the stream, [B, T, D]."""
        spec, (batch, tokens, _) = self.spec, passed_BTN.shape
        q_BTHR = passed_BTN[..., : spec.passed_width].reshape(batch, tokens, spec.n_heads, -1)
        name = spec.states()[0].name
        rows, place = caches.by_token[name], places[name]
        if self.output.is_raw:
            # Mixes the rotated keys too, of which nothing is made.
            mixed_BTN = ggml.attention(
                q_BTHR, rows, rows, jnp.asarray(place), positions_BT, spec.score_scale
            )
        else:
            row_BC1R = rows[place].astype(jnp.float32)
            latent_BC1Z = row_BC1R[..., : spec.d_latent]
            mixed_BTN = attend(q_BTHR, row_BC1R, latent_BC1Z, positions_BT, spec.score_scale)
        mixed_BTHZ = mixed_BTN.reshape(batch, tokens, spec.n_heads, -1)[..., : spec.d_latent]
        values_HVZ = self.values.weights().reshape(spec.n_heads, spec.value_dim, spec.d_latent)
        value_BTHV = jnp.einsum("bthz,hvz->bthv", mixed_BTHZ, values_HVZ)
        return self.output(value_BTHV.reshape(batch, tokens, -1))
