"""The gated delta net: a recurrence in the place of attention (Qwen3-Next, Qwen3.5 and 3.6).

Each value head keeps a matrix S, from keys to values. A token decays it, corrects what it says of
the token's key towards the token's value, and reads it with the token's query:

    S ← e^g·S;  u = β·(v − Sᵀk);  S ← S + k uᵀ;  o = Sᵀq

Queries, keys and values pass a short causal convolution before. Many tokens are computed 64 at a
time: within a chunk the corrections are the solution of a triangular system.

Letters here: J key heads, H value heads, d the width of a head, W the window of the convolution, X
its channels, I a chunk's tokens.

Source: llama.cpp, src/models/{qwen3next,qwen35moe}.cpp and delta-net-base.cpp; arXiv 2412.06464
(the recurrence and its chunks).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hobbit_jax.models.caches import Arrays, Caches, Places
from hobbit_jax.models.config import Shapes, State
from hobbit_jax.models.modules import BlockWeights

CHUNK_TOKENS = 64
# Queries, keys and values [B, T, H, d], log decays and strengths [B, T, H], of value heads.
Inputs = tuple[jax.Array, ...]
_LEAST_SQUARE = 1e-6  # added to a key's or query's square before the root, as transformers does


@dataclass(frozen=True)
class GatedDeltaNet:
    """The recurrence of `delta_net.py` in the place of attention."""

    n_key_heads: int  # of queries and keys alike
    n_value_heads: int  # a multiple of them
    d_state: int  # width of every head
    kernel: int  # tokens that the convolution sees
    # Which key head a value head uses: "tiled" v mod n_key_heads, "grouped" v div their ratio.
    # Grouped ones have the rows of decay and strength in one tensor.
    value_heads: Literal["tiled", "grouped"]
    n_heads: int = 0  # none attends to tokens

    @property
    def key_width(self) -> int:
        """Of all key heads."""
        return self.n_key_heads * self.d_state

    @property
    def value_width(self) -> int:
        """Of all value heads."""
        return self.n_value_heads * self.d_state

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_width + self.value_width

    def tensors(self, d_model: int) -> Shapes:
        """Those of a block."""
        heads = self.n_value_heads
        tiled = {"ssm_alpha": (heads, d_model), "ssm_beta": (heads, d_model)}
        return {
            "attn_qkv": (self.channels, d_model),
            "attn_gate": (self.value_width, d_model),
            "ssm_conv1d": (self.channels, self.kernel),
            "ssm_dt.bias": (heads,),
            "ssm_a": (heads,),
            **(tiled if self.value_heads == "tiled" else {"ssm_ba": (2 * heads, d_model)}),
            "ssm_norm": (self.d_state,),
            "ssm_out": (d_model, self.value_width),
        }

    @property
    def passed_width(self) -> int:
        """See `GroupedQuery.passed_width`: the output before its matrix."""
        return self.value_width

    def states(self) -> tuple[State, ...]:
        """The last inputs of the convolution, and the matrices."""
        window = (self.kernel - 1, self.channels)
        matrix = (self.n_value_heads, self.d_state, self.d_state)
        return State("delta_window", window, False), State("delta_matrix", matrix, False)


class DeltaNetMixer(nnx.Module):
    """The matrices of `GatedDeltaNet`, and what it computes. See `layer.Mixer`."""

    def __init__(self, spec: GatedDeltaNet, weights: BlockWeights):
        self.spec = spec
        self.qkv, self.gate = weights.linear("attn_qkv"), weights.linear("attn_gate")
        tiled = spec.value_heads == "tiled"
        self.decay = weights.linear("ssm_alpha") if tiled else None
        self.strength = weights.linear("ssm_beta" if tiled else "ssm_ba")
        self.kernel_XW = nnx.Param(weights.array("ssm_conv1d"))
        self.decay_bias_H = nnx.Param(weights.array("ssm_dt.bias"))
        self.decay_rate_H = nnx.Param(weights.array("ssm_a"))  # negative
        self.norm, self.output = weights.norm("ssm_norm"), weights.linear("ssm_out")

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> tuple[jax.Array, Arrays]:
        """The gated output, before its matrix, and the states after these tokens."""
        spec, (batch, tokens, _) = self.spec, x_BTD.shape
        window, matrix = (state.name for state in spec.states())
        valid_BT = positions_BT < caches.context
        sums_BTX, window_BWX = convolve(
            self.kernel_XW[...], self.qkv(x_BTD), caches.recurrent[window][places[window]], valid_BT
        )
        q_BTJd, k_BTJd, v_BTHd = (
            part.reshape(batch, tokens, -1, spec.d_state)
            for part in jnp.split(
                jax.nn.silu(sums_BTX), [spec.key_width, 2 * spec.key_width], axis=-1
            )
        )
        q_BTHd, k_BTHd = (self._of_value_heads(_normalised(a)) for a in (q_BTJd, k_BTJd))
        log_decay_BTH, strength_BTH = self._gates(x_BTD)
        # Padding neither decays nor corrects.
        log_decay_BTH = jnp.where(valid_BT[..., None], log_decay_BTH, 0.0)
        strength_BTH = jnp.where(valid_BT[..., None], strength_BTH, 0.0)
        state_BHdd = caches.recurrent[matrix][places[matrix]]
        run = _one_token if tokens == 1 else _in_chunks
        inputs = q_BTHd * spec.d_state**-0.5, k_BTHd, v_BTHd, log_decay_BTH, strength_BTH
        state_BHdd, o_BTHd = run(state_BHdd, inputs)
        gated_BTV = self.norm(o_BTHd).reshape(batch, tokens, -1) * jax.nn.silu(self.gate(x_BTD))
        return gated_BTV, {window: window_BWX, matrix: state_BHdd}

    def mix(
        self, passed_BTN: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> jax.Array:
        """What is added to the stream, [B, T, D]."""
        return self.output(passed_BTN[..., : self.spec.value_width])

    def _of_value_heads(self, x_BTJd: jax.Array) -> jax.Array:
        """Each value head's key head."""
        ratio = self.spec.n_value_heads // self.spec.n_key_heads
        if self.spec.value_heads == "tiled":
            return jnp.tile(x_BTJd, (1, 1, ratio, 1))
        return jnp.repeat(x_BTJd, ratio, axis=2)

    def _gates(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """g, the logarithm of the decay, and β of every value head."""
        strength_BTN = self.strength(x_BTD)
        if self.decay is not None:
            decay_BTH, strength_BTH = self.decay(x_BTD), strength_BTN
        else:  # one matrix; its rows are by key head: β of its value heads, then their decays
            lead = strength_BTN.shape[:2]
            pairs = strength_BTN.reshape(*lead, self.spec.n_key_heads, 2, -1)
            strength_BTH, decay_BTH = (pairs[..., i, :].reshape(*lead, -1) for i in range(2))
        rate_BTH, bias_BTH = (
            jnp.broadcast_to(a[...], decay_BTH.shape)
            for a in (self.decay_rate_H, self.decay_bias_H)
        )
        return rate_BTH * jax.nn.softplus(decay_BTH + bias_BTH), jax.nn.sigmoid(strength_BTH)


def convolve(
    kernel_XW: jax.Array, new_BTX: jax.Array, past_BPX: jax.Array, valid_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each channel's own causal convolution over the last W tokens.

    Args:
        kernel_XW: the last column is the token's own.
        new_BTX: inputs; those of padding, which comes last, are not `valid_BT`.
        past_BPX: the P = W - 1 inputs before them.

    Returns:
        The sums [B, T, X], and the last P valid inputs [B, P, X].
    """
    tokens, width = new_BTX.shape[1], kernel_XW.shape[1]
    inputs = jnp.concatenate([past_BPX, new_BTX], axis=1)
    sums = jnp.zeros_like(new_BTX)
    for j in range(width):
        weight_11X = kernel_XW[None, None, :, j]
        sums += jnp.broadcast_to(weight_11X, new_BTX.shape) * inputs[:, j : j + tokens]
    kept_BW = jnp.sum(valid_BT, axis=1)[:, None] + jnp.arange(width - 1)[None, :]
    return sums, jnp.take_along_axis(inputs, kept_BW[..., None], axis=1)


def _normalised(x_BTJd: jax.Array) -> jax.Array:
    square = jnp.sum(jnp.square(x_BTJd), axis=-1, keepdims=True)
    return x_BTJd * jax.lax.rsqrt(square + _LEAST_SQUARE)


def _one_token(state_BHde: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The recurrence itself, for inputs of one token: the state after it, and o [B, 1, H, e]."""
    q_BHd, k_BHd, v_BHe, log_decay_BH, strength_BH = (array[:, 0] for array in inputs)
    state_BHde = state_BHde * jnp.exp(log_decay_BH)[..., None, None]
    known_BHe = jnp.sum(state_BHde * k_BHd[..., None], axis=-2)
    correction_BHe = (v_BHe - known_BHe) * strength_BH[..., None]
    state_BHde = state_BHde + k_BHd[..., None] * correction_BHe[..., None, :]
    return state_BHde, jnp.sum(state_BHde * q_BHd[..., None], axis=-2)[:, None]


def _in_chunks(state_BHde: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The same for T tokens, `CHUNK_TOKENS` at a time."""
    tokens = inputs[0].shape[1]
    size = min(CHUNK_TOKENS, tokens)
    padding = -tokens % size

    def chunked(array: jax.Array) -> jax.Array:
        """[B, T, H, ...] to [chunks, B, H, I, ...]."""
        array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        array = array.reshape(array.shape[0], -1, size, *array.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(array, 1, 0), 3, 2)

    state_BHde, o_NBHIe = jax.lax.scan(_chunk, state_BHde, tuple(map(chunked, inputs)))
    o_BNIHe = jnp.moveaxis(jnp.moveaxis(o_NBHIe, 2, 3), 0, 1)
    batch, _, _, heads, width = o_BNIHe.shape
    return state_BHde, o_BNIHe.reshape(batch, -1, heads, width)[:, :tokens]


def _chunk(state_BHde: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """One chunk, whose inputs are [B, H, I, ...]: the state after it, and o [B, H, I, e].

    With G the sums of log decays up to each token, token i finds Σ_j<i e^(G_i - G_j)(k_j·k_i)u_j of
    the tokens before it and e^G_i Sᵀk_i of the state before the chunk.
    """
    q_BHId, k_BHId, v_BHIe, log_decay_BHI, strength_BHI = inputs
    size = q_BHId.shape[2]
    total_BHI = jnp.cumsum(log_decay_BHI, axis=-1)
    before_II = jnp.tril(jnp.ones((size, size), bool))
    difference_BHIJ = total_BHI[..., :, None] - total_BHI[..., None, :]
    visible = jnp.broadcast_to(before_II, difference_BHIJ.shape)
    decay_BHIJ = jnp.where(visible, jnp.exp(jnp.where(visible, difference_BHIJ, 0.0)), 0.0)
    from_start_BHI1 = jnp.exp(total_BHI)[..., None]
    strength_BHI1 = strength_BHI[..., None]
    overlap_BHIJ = jnp.einsum("bhid,bhjd->bhij", k_BHId, k_BHId) * decay_BHIJ * strength_BHI1
    known_BHIe = jnp.einsum("bhid,bhde->bhie", k_BHId * from_start_BHI1, state_BHde)
    # (1 + strictly lower part) u = β (v - what the state says); the solver takes the diagonal as 1.
    u_BHIe = jax.scipy.linalg.solve_triangular(
        overlap_BHIJ, strength_BHI1 * (v_BHIe - known_BHIe), lower=True, unit_diagonal=True
    )
    scores_BHIJ = jnp.einsum("bhid,bhjd->bhij", q_BHId, k_BHId) * decay_BHIJ
    o_BHIe = jnp.einsum("bhid,bhde->bhie", q_BHId * from_start_BHI1, state_BHde)
    o_BHIe = o_BHIe + jnp.einsum("bhij,bhje->bhie", scores_BHIJ, u_BHIe)
    to_end_BHI1 = jnp.exp(total_BHI[..., -1:] - total_BHI)[..., None]
    state_BHde = state_BHde * from_start_BHI1[..., -1:, :] + jnp.einsum(
        "bhid,bhie->bhde", k_BHId * to_end_BHI1, u_BHIe
    )
    return state_BHde, o_BHIe
