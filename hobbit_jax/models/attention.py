"""Attention of query heads that share key/value heads.

Conventions follow llama.cpp's graphs: projection, bias, norm of q and k, rotary embedding, and
scores over the square root of a head's width, all in float32.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.models.caches import Arrays, Caches, Places
from hobbit_jax.models.config import Shapes, State
from hobbit_jax.models.modules import BlockWeights, rms_normalised
from pallas_kernels.attention_triton import decode_attention
from pallas_kernels.backends import KERNELS
from pallas_kernels.ggml import ops as ggml


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies for a context longer than the trained one, at every position.

    Pairs that turn less than `beta_slow` times over the trained context turn `factor` times slower,
    those that turn more than `beta_fast` times as before, and between them there is a ramp.

    Source: arXiv 2309.00071; llama.cpp, ggml/src/ggml-cpu/ops.cpp (`rope_yarn`), which rounds the
    ends of the ramp outwards to whole pairs.
    """

    factor: float
    trained_context: int  # tokens
    beta_fast: float
    beta_slow: float
    magnitude: float  # of cosines and sines

    def slowdown(self, base: float, dim: int) -> np.ndarray:
        """What multiplies each pair's frequency, float32 [dim / 2]."""

        def pair(turns: float) -> float:
            """The pair that turns so often, which need not be a whole number."""
            wavelength = self.trained_context / (2 * math.pi * turns)
            return dim * math.log(wavelength) / (2 * math.log(base))

        low = max(0, math.floor(pair(self.beta_fast)))
        high = min(dim - 1, math.ceil(pair(self.beta_slow)))
        ramp = np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)
        return (1 - ramp + ramp / self.factor).astype(np.float32)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dim` values of a head."""

    base: float
    dim: int
    style: Literal["neox", "norm"]  # pairs (i, i + dim/2), or (2i, 2i + 1)
    yarn: Yarn | None = None
    divisors: tuple[float, ...] = ()  # of the pairs' frequencies, as `ROPE_DIVISORS` holds them


@dataclass(frozen=True)
class GroupedQuery:
    """Attention of query heads that share key/value heads."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope
    qk_norm: Literal["none", "head", "full"] = "none"  # over nothing, a head, the projection
    gated: bool = False  # each head's query rows are followed by as many of a sigmoid gate
    biased: tuple[str, ...] = ()  # roles of the projections that have a bias
    fused: bool = False  # queries, keys and values are rows of one matrix, in this order
    window: int = 0  # tokens that a query sees, itself among them; 0 for all before it
    sinks: bool = False  # each head has one score more, which takes weight and has no value
    score_scale: float | None = None  # of scores; None is 1 over the square root of `head_dim`
    values_are_keys: bool = False  # before their norm and rotation
    value_norm: bool = False  # beside a `qk_norm` over a head, without a learned scale

    @property
    def projections(self) -> tuple[str, ...]:
        """Roles of the matrices of queries, keys and values."""
        if self.fused:
            return ("attn_qkv",)
        return ("attn_q", "attn_k", *([] if self.values_are_keys else ["attn_v"]))

    def tensors(self, d_model: int) -> Shapes:
        """Those of a block."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        norms: Shapes = {
            "none": {},
            "head": {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)},
            "full": {"attn_q_norm": (q,), "attn_k_norm": (kv,)},
        }[self.qk_norm]
        rows = {"attn_q": q * (1 + self.gated), "attn_k": kv, "attn_v": kv, "attn_qkv": q + 2 * kv}
        matrices: Shapes = {role: (rows[role], d_model) for role in self.projections}
        matrices["attn_output"] = (d_model, q)
        if self.sinks:
            norms["attn_sinks"] = (self.n_heads,)
        biases = {f"{role}.bias": (matrices[role][0],) for role in self.biased}
        return {**matrices, **norms, **biases}

    @property
    def passed_width(self) -> int:
        """Numbers of a token that go from `Mixer.project` to `Mixer.mix`: queries and gates."""
        return self.n_heads * self.head_dim * (1 + self.gated)

    def states(self) -> tuple[State, ...]:
        """Keys and values; blocks with heads of equal number and width share arrays."""
        shape = (self.n_kv_heads, self.head_dim)
        return tuple(State(f"{n}_{shape[0]}x{shape[1]}", shape, True) for n in ("keys", "values"))


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
    v_BCGe: jax.Array,
    positions_BT: jax.Array,
    scale: float | None = None,
    window: int = 0,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention of each token to the keys up to its own position, [B, T, H * e].

    Key c stands at position c. The width e of values may be another than that of queries and keys.
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
    mixed = jnp.einsum("bgmtc,bcge->btgme", shares, v_BCGe)
    return mixed.reshape(batch, tokens, n_heads * v_BCGe.shape[-1])


class GroupedQueryAttention(nnx.Module):
    """The matrices of `GroupedQuery`, and what it computes. See `layer.Mixer`."""

    def __init__(self, spec: GroupedQuery, weights: BlockWeights):
        self.spec = spec
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
        q_BTHd, k_BTGd, v_BTGd = (
            x.reshape(batch, tokens, -1, spec.head_dim) for x in (q_BTN, k_BTN, v_BTN)
        )
        if self.q_norm is not None and self.k_norm is not None and spec.qk_norm == "head":
            q_BTHd, k_BTGd = self.q_norm(q_BTHd), self.k_norm(k_BTGd)
            if spec.value_norm:
                v_BTGd = rms_normalised(v_BTGd, self.k_norm.eps)
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
        implementation = self.output.implementation
        if q_BTHd.shape[1] == 1 and implementation in KERNELS:
            mixed_BN = decode_attention(
                q_BTHd[:, 0], keys, values, place, positions_BT[:, 0], *how,
                interpret=implementation == "interpret",
            )  # fmt: skip
            mixed_BTN = mixed_BN[:, None]
        elif self.output.is_raw:
            # Reads the keys of each token's window alone.
            place = jnp.asarray(place)
            mixed_BTN = ggml.attention(q_BTHd, keys, values, place, positions_BT, *how)
        else:
            k_BCGd, v_BCGd = (array[place].astype(jnp.float32) for array in (keys, values))
            mixed_BTN = attend(q_BTHd, k_BCGd, v_BCGd, positions_BT, *how)
        if spec.gated:
            mixed_BTN = mixed_BTN * jax.nn.sigmoid(passed_BTN[..., width : 2 * width])
        return self.output(mixed_BTN)
