"""The Flax model: embedding, attention, router and head, with weights in GGUF formats.

Owns the arithmetic of a mixture-of-experts decoder outside its experts. The
engine drives it layer by layer with a KV cache (`layers.py`); the trainer
drives the very same modules with F32 weights and no cache
(`training/trainer.py`). What happens between a block's `route` and the next
block, the experts, is `inference/moe.py` and the slot pool.

Conventions follow llama.cpp's graphs for `qwen3moe`, `llama` and `olmoe`:
RMSNorm in float32, RoPE on half-split ("neox") or interleaved ("norm") pairs,
softmax router over all experts, optional renormalisation over the chosen K.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hobbit_jax.model_file.architecture import ModelConfig
from pallas_kernels.backends import Implementation
from pallas_kernels.formats import get_format
from pallas_kernels.ggml import ops as ggml
from pallas_kernels.ggml.ops import RawMatrix
from pallas_kernels.linear import linear

# Of keys and values between tokens. float32 is the default: half the bytes cost KL on every text,
# and the figures of docs/ are of float32 (docs/log/2026-11-29-cpu-backend.md has the measurement).
KV_FORMATS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class KVCache(NamedTuple):
    """Keys and values of all layers, [L, B, C, G, d] of one of `KV_FORMATS`, G key/value heads.

    One array for all layers, so that a loop over layers can write into it in place.
    """

    k_LBCGd: jax.Array
    v_LBCGd: jax.Array

    def append(
        self, layer: jax.Array, positions_BT: jax.Array, k_BTGd: jax.Array, v_BTGd: jax.Array
    ) -> KVCache:
        """Writes each token's key and value at its position; a position of C or more, nowhere."""
        at = (layer, jnp.arange(len(positions_BT))[:, None], positions_BT)
        return KVCache(
            self.k_LBCGd.at[at].set(k_BTGd.astype(self.k_LBCGd.dtype), mode="drop"),
            self.v_LBCGd.at[at].set(v_BTGd.astype(self.v_LBCGd.dtype), mode="drop"),
        )

    def attend(
        self, layer: jax.Array, q_BTHd: jax.Array, positions_BT: jax.Array, implementation: str
    ) -> jax.Array:
        """Attention of each token to the keys up to its own position, [B, T, H * d].

        "ggml" reads those alone; "xla" all C, and hides the others.
        """
        if implementation == "ggml":
            return ggml.attention(q_BTHd, self.k_LBCGd, self.v_LBCGd, layer, positions_BT)
        k_BCGd, v_BCGd = (array[layer].astype(jnp.float32) for array in self)
        return attend(q_BTHd, k_BCGd, v_BCGd, positions_BT)


class Linear(nnx.Module):
    """A matrix [N, K] in its GGUF format, as planes or as raw blocks; y = x @ W.T in float32."""

    def __init__(
        self,
        format_name: str,
        planes: dict[str, jax.Array] | RawMatrix,
        implementation: Implementation = None,
    ):
        self.format_name, self.implementation = format_name, implementation
        if isinstance(planes, RawMatrix):
            self.raw_shape = (planes.rows, planes.columns, planes.bytes)
            planes = {"raw": planes.data}
        else:
            self.raw_shape = None
        self.planes = nnx.Dict({name: nnx.Param(plane) for name, plane in planes.items()})

    def weights(self) -> jax.Array:
        """Unpacked float32 [N, K]."""
        arrays = self._arrays()
        if isinstance(arrays, RawMatrix):
            return self.rows(jnp.arange(arrays.rows, dtype=jnp.int32))
        return get_format(self.format_name).unpack(arrays)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows `ids` [...] unpacked to float32 [..., K]; only those rows are read."""
        arrays = self._arrays()
        if isinstance(arrays, RawMatrix):
            return ggml.take_rows(ids, arrays, self.format_name)
        return get_format(self.format_name).unpack({n: p[ids] for n, p in arrays.items()})

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., K] to x @ W.T [..., N]."""
        return linear(x, self._arrays(), self.format_name, self.implementation)

    def _arrays(self) -> dict[str, jax.Array] | RawMatrix:
        if self.raw_shape is not None:
            return RawMatrix(self.planes["raw"][...], *self.raw_shape)
        return {name: plane[...] for name, plane in self.planes.items()}


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, float32."""

    def __init__(self, scale: jax.Array, eps: float):
        self.scale = nnx.Param(scale)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised x, float32 of the same shape."""
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return jnp.multiply(x * inverse_rms, jnp.broadcast_to(self.scale[...], x.shape))


def _apply(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    if norm is None:
        raise RuntimeError("the architecture normalises q and k but the module was given no norm")
    return norm(x)


def rope(x_BTHd: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates the first `rope_dim` channels of each head by its position."""
    half = config.rope_dim // 2
    inverse_wavelength = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = positions_BT.astype(jnp.float32)[:, :, None, None] * jnp.reshape(
        inverse_wavelength, (1, 1, 1, half)
    )
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    rotated, passed = x_BTHd[..., : config.rope_dim], x_BTHd[..., config.rope_dim :]
    if config.rope_style == "neox":
        a, b = rotated[..., :half], rotated[..., half:]
        rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    else:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
        rotated = pairs.reshape(rotated.shape)
    return jnp.concatenate([rotated, passed], axis=-1)


def attend(
    q_BTHd: jax.Array, k_BCGd: jax.Array, v_BCGd: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Grouped-query attention of each token to the keys up to its own position, [B, T, H * d].

    Key c stands at position c.
    """
    batch, tokens, n_heads, head_dim = q_BTHd.shape
    length, n_kv_heads = k_BCGd.shape[1:3]
    q_BTGgd = q_BTHd.reshape(batch, tokens, n_kv_heads, n_heads // n_kv_heads, head_dim)
    scores = jnp.einsum("btgmd,bcgd->bgmtc", q_BTGgd, k_BCGd) * head_dim**-0.5
    visible_BTC = jnp.arange(length)[None, None, :] <= positions_BT[:, :, None]
    scores = jnp.where(visible_BTC[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    mixed = jnp.einsum("bgmtc,bcgd->btgmd", jax.nn.softmax(scores, axis=-1), v_BCGd)
    return mixed.reshape(batch, tokens, n_heads * head_dim)


class Attention(nnx.Module):
    """The matrices of attention, with the architecture's q/k normalisation and rotation.

    Between `project` and `output` stands `attend`, which holds no weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        q: Linear,
        k: Linear,
        v: Linear,
        output: Linear,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
    ):
        self.config = config
        self.q, self.k, self.v, self.output = q, k, v, output
        self.q_norm, self.k_norm = q_norm, k_norm

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, H, d], rotated keys and values [B, T, G, d]."""
        config = self.config
        batch, tokens, _ = x_BTD.shape
        q_BTN, k_BTN, v_BTN = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if config.qk_norm == "full":
            q_BTN, k_BTN = _apply(self.q_norm, q_BTN), _apply(self.k_norm, k_BTN)
        q_BTHd = q_BTN.reshape(batch, tokens, config.n_heads, config.head_dim)
        k_BTGd = k_BTN.reshape(batch, tokens, config.n_kv_heads, config.head_dim)
        v_BTGd = v_BTN.reshape(batch, tokens, config.n_kv_heads, config.head_dim)
        if config.qk_norm == "head":
            q_BTHd, k_BTGd = _apply(self.q_norm, q_BTHd), _apply(self.k_norm, k_BTGd)
        return rope(q_BTHd, positions_BT, config), rope(k_BTGd, positions_BT, config), v_BTGd


class Routing(NamedTuple):
    """What the router chose: expert ids int32 and their weights float32, both [..., K].

    Experts stand in descending order of weight. Weights are renormalised over
    the K chosen where the architecture does so.
    """

    ids: jax.Array
    weights: jax.Array


class Block(nnx.Module):
    """One decoder layer up to its experts: attention, residual, norm, router."""

    def __init__(
        self,
        config: ModelConfig,
        attention_norm: RMSNorm,
        attention: Attention,
        ffn_norm: RMSNorm,
        router: Linear,
    ):
        self.config = config
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.router = ffn_norm, router

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the normalised stream; see `Attention.project`."""
        return self.attention.project(self.attention_norm(x_BTD), positions_BT)

    def add_attention(self, x_BTD: jax.Array, mixed_BTN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The residual stream after attention, and its normalised copy for the experts."""
        x_BTD = x_BTD + self.attention.output(mixed_BTN)
        return x_BTD, self.ffn_norm(x_BTD)

    def router_probabilities(self, h: jax.Array) -> jax.Array:
        """Softmax over all experts, float32 [..., E]."""
        return jax.nn.softmax(self.router(h), axis=-1)

    def route(self, h: jax.Array) -> Routing:
        """The K experts of each token of h [..., D], heaviest first."""
        weights, ids = jax.lax.top_k(self.router_probabilities(h), self.config.experts_per_token)
        if self.config.renormalise_topk:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(ids, weights)

    def route_ahead(self, x: jax.Array) -> Routing:
        """`route` of an earlier layer's stream x [..., D]: a guess at what this one will choose."""
        return self.route(self.ffn_norm(x))


class EmbeddingAndHead(nnx.Module):
    """What stands before the first layer and after the last: embedding, final norm, head.

    A tied head shares the embedding's planes; nothing is held twice.
    """

    def __init__(self, embedding: Linear, final_norm: RMSNorm, head: Linear | None):
        self.embedding, self.final_norm, self.head = embedding, final_norm, head

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids [...] to float32 [..., D]."""
        return self.embedding.rows(ids)

    def logits(self, x: jax.Array) -> jax.Array:
        """Residual stream [..., D] to float32 logits [..., V]."""
        head = self.embedding if self.head is None else self.head
        return head(self.final_norm(x))
