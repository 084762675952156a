"""Attention of query heads that share key/value heads.

Conventions follow llama.cpp's graphs: projection, bias, norm of q and k, rotary embedding, and
scores over the square root of a head's width, all in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.models.caches import Arrays, Caches, Places
from hobbit_jax.models.config import GroupedQuery, Rope
from hobbit_jax.models.modules import BlockWeights, rms_normalised
from pallas_kernels.ggml import ops as ggml


def rotate(x_BTHd: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the first `rope.dim` channels of each head by its position."""
    half = rope.dim // 2
    inverse_wavelength = rope.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rope.divisors:
        inverse_wavelength /= jnp.asarray(rope.divisors, jnp.float32)
    if rope.yarn is not None:
        inverse_wavelength *= rope.yarn.slowdown(rope.base, rope.dim)
    angle_BT1h = positions_BT.astype(jnp.float32)[:, :, None, None] * jnp.reshape(
        inverse_wavelength, (1, 1, 1, half)
    )
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    if rope.yarn is not None and rope.yarn.magnitude != 1:
        cos, sin = cos * rope.yarn.magnitude, sin * rope.yarn.magnitude
    rotated, passed = x_BTHd[..., : rope.dim], x_BTHd[..., rope.dim :]
    if rope.style == "neox":
        a, b = rotated[..., :half], rotated[..., half:]
        rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    else:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        rotated = pairs.reshape(rotated.shape)
    return jnp.concatenate([rotated, passed], axis=-1)


def attend(
    q_BTHd: jax.Array,
    k_BCGd: jax.Array,
    v_BCGd: jax.Array,
    positions_BT: jax.Array,
    scale: float | None = None,
    window: int = 0,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention of each token to the keys up to its own position, [B, T, H * d].

    Key c stands at position c. Values may be of another width d than queries and keys.
    """
    batch, tokens, n_heads, head_dim = q_BTHd.shape
    length, n_kv_heads = k_BCGd.shape[1:3]
    q_BTGgd = q_BTHd.reshape(batch, tokens, n_kv_heads, n_heads // n_kv_heads, head_dim)
    scores = jnp.einsum("btgmd,bcgd->bgmtc", q_BTGgd, k_BCGd)
    scores *= head_dim**-0.5 if scale is None else scale
    age_BTC = positions_BT[:, :, None] - jnp.arange(length)[None, None, :]
    visible_BTC = age_BTC >= 0
    if window:
        visible_BTC &= age_BTC < window
    scores = jnp.where(visible_BTC[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    if sinks_H is not None:
        sinks = sinks_H.reshape(1, n_kv_heads, -1, 1, 1)
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    shares = jax.nn.softmax(scores, axis=-1)[..., :length]
    mixed = jnp.einsum("bgmtc,bcgd->btgmd", shares, v_BCGd)
    return mixed.reshape(batch, tokens, n_heads * v_BCGd.shape[-1])


class GroupedQueryAttention(nnx.Module):
    """The matrices of `config.GroupedQuery`, and what it computes. See `layer.Mixer`."""

    def __init__(self, spec: GroupedQuery, rms_eps: float, weights: BlockWeights):
        self.spec, self.rms_eps = spec, rms_eps
        self.projections = nnx.List([weights.linear(role) for role in spec.projections])
        self.output = weights.linear("attn_output")
        self.sinks = nnx.Param(weights.array("attn_sinks")) if spec.sinks else None
        normed = spec.qk_norm != "none"
        self.q_norm = weights.norm("attn_q_norm") if normed else None
        self.k_norm = weights.norm("attn_k_norm") if normed else None

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> tuple[jax.Array, Arrays]:
        """Rotated queries (and gates), and the tokens' rotated keys and values."""
        del caches, places
        spec, (batch, tokens, _) = self.spec, x_BTD.shape
        projected = [matrix(x_BTD) for matrix in self.projections]
        if spec.fused:
            ends = np.cumsum([spec.n_heads, spec.n_kv_heads]) * spec.head_dim
            projected = jnp.split(projected[0], ends, axis=-1)
        # Values that are keys are those before norm and rotation.
        q_BTN, k_BTN, v_BTN = projected[0], projected[1], projected[-1]
        gate_BTN = None
        if spec.gated:
            pairs = q_BTN.reshape(batch, tokens, spec.n_heads, 2, spec.head_dim)
            q_BTN, gate_BTN = (pairs[..., i, :].reshape(batch, tokens, -1) for i in range(2))
        if self.q_norm is not None and self.k_norm is not None and spec.qk_norm == "full":
            q_BTN, k_BTN = self.q_norm(q_BTN), self.k_norm(k_BTN)
        q_BTHd = q_BTN.reshape(batch, tokens, spec.n_heads, spec.head_dim)
        k_BTGd = k_BTN.reshape(batch, tokens, spec.n_kv_heads, spec.head_dim)
        v_BTGd = v_BTN.reshape(batch, tokens, spec.n_kv_heads, spec.head_dim)
        if spec.value_norm:
            v_BTGd = rms_normalised(v_BTGd, self.rms_eps)
        if self.q_norm is not None and self.k_norm is not None and spec.qk_norm == "head":
            q_BTHd, k_BTGd = self.q_norm(q_BTHd), self.k_norm(k_BTGd)
        q_BTHd = rotate(q_BTHd, positions_BT, spec.rope)
        keys, values = (state.name for state in spec.states())
        writes = {keys: rotate(k_BTGd, positions_BT, spec.rope), values: v_BTGd}
        passed_BTN = q_BTHd.reshape(batch, tokens, -1)
        if gate_BTN is not None:
            passed_BTN = jnp.concatenate([passed_BTN, gate_BTN], axis=-1)
        return passed_BTN, writes

    def mix(
        self, passed_BTN: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> jax.Array:
        """What attention adds to the stream, [B, T, D]."""
        spec = self.spec
        width = spec.n_heads * spec.head_dim
        q_BTHd = passed_BTN[..., :width].reshape(*passed_BTN.shape[:2], spec.n_heads, -1)
        keys, values = (caches.by_token[state.name] for state in spec.states())
        place = places[spec.states()[0].name]
        how = spec.score_scale, spec.window, None if self.sinks is None else self.sinks[...]
        if self.output.is_raw:
            # Reads the keys of each token's window alone.
            place = jnp.asarray(place)
            mixed_BTN = ggml.attention(q_BTHd, keys, values, place, positions_BT, *how)
        else:
            k_BCGd, v_BCGd = (array[place].astype(jnp.float32) for array in (keys, values))
            mixed_BTN = attend(q_BTHd, k_BCGd, v_BCGd, positions_BT, *how)
        if spec.gated:
            mixed_BTN = mixed_BTN * jax.nn.sigmoid(passed_BTN[..., width : 2 * width])
        return self.output(mixed_BTN)
