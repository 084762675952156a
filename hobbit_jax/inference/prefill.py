"""Many tokens at once: prompts and scored text, layer by layer under the host's eye.

Owns the walk over layers for a chunk of tokens. A chunk may choose more experts of a layer than the
pool has slots, so each layer's choice comes to the host, which groups it by expert and runs it in
rounds (`moe.py`). While they run, what the next layer's router makes of the stream as it is now
goes up, so that copies and computation overlap across layers too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.cache.miss_modes import MissMode
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.router_output import RouterOutput
from hobbit_jax.cache.sharded_pool import ExpertPool
from hobbit_jax.experts.precision import SKIPPED, Array, PrecisionPlan
from hobbit_jax.experts.store import ExpertKey
from hobbit_jax.inference.moe import add_experts, apply_experts
from hobbit_jax.inference.selection import Selections, rows_of_layer, select
from hobbit_jax.model.layers import LayerKinds, States
from hobbit_jax.model.loading import LoadedModel
from hobbit_jax.model.modules import KVCache

Part = Literal["embedding", "attention", "experts"]
Inspect = Callable[[Part, int, jax.Array], object]


def pad_tokens(ids_BT: np.ndarray, chunk: int) -> np.ndarray:
    """Pads the token axis to a power of two up to `chunk`, so that few shapes are compiled."""
    tokens = ids_BT.shape[1]
    width = min(chunk, 1 << (tokens - 1).bit_length())
    return np.pad(ids_BT, ((0, 0), (0, width - tokens)))


@partial(jax.jit, static_argnums=0)
def _embed(graph, state, ids_BT: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).embed(ids_BT)


@partial(
    jax.jit,
    static_argnames=("kinds", "kind", "next_kind", "mode"),
    donate_argnames=("x_BTD", "caches"),
)
def _attend_and_route(
    kinds: LayerKinds,
    kind: int,
    next_kind: int | None,
    mode: MissMode,
    states: States,
    index: Array,
    next_index: Array,
    layer: Array,
    plan: PrecisionPlan,
    table_UE: jax.Array,
    x_BTD: jax.Array,
    positions_BT: Array,
    caches: KVCache,
) -> tuple[jax.Array, jax.Array, KVCache, Selections, jax.Array | None]:
    block, context = kinds.block(states, kind, index), caches.k_LBCGd.shape[2]
    q_BTHd, k_BTGd, v_BTGd = block.project(x_BTD, positions_BT)
    caches = caches.append(layer, positions_BT, k_BTGd, v_BTGd)
    mixed_BTN = caches.attend(layer, q_BTHd, positions_BT, kinds.attention)
    x_BTD, h_BTD = block.add_attention(x_BTD, mixed_BTN)
    h_TD = h_BTD.reshape(-1, h_BTD.shape[-1])
    n_layers = len(kinds.kind_L)
    table_pE = rows_of_layer(table_UE, layer, n_layers)
    valid_T = (positions_BT < context).reshape(-1)
    selections = select(plan, mode, table_pE, layer, block.route(h_TD), valid_T)
    if next_kind is None:
        return x_BTD, h_TD, caches, selections, None
    x_TD, table_pE = x_BTD.reshape(h_TD.shape), rows_of_layer(table_UE, layer + 1, n_layers)
    routing = kinds.block(states, next_kind, next_index).route_ahead(x_TD)
    ahead = select(plan, mode, table_pE, layer + 1, routing, valid_T)
    precision_TK = jnp.where(ahead.served_TK == SKIPPED, len(table_pE), ahead.served_TK)
    chosen_pE = (
        jnp.zeros(table_pE.shape, bool).at[precision_TK, ahead.ids_TK].set(True, mode="drop")
    )
    return x_BTD, h_TD, caches, selections, chosen_pE


@partial(jax.jit, static_argnums=0)
def logits(graph, state, x_BTD: jax.Array, last_B: np.ndarray | None) -> jax.Array:
    """Logits of every token, or of token `last_B` of each sequence."""
    if last_B is not None:
        x_BTD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    return nnx.merge(graph, state).logits(x_BTD)


@dataclass(frozen=True)
class Prefill:
    """Appends chunks of tokens to sequences."""

    model: LoadedModel
    pool: ExpertPool
    plan: PrecisionPlan
    mode: MissMode

    def append(
        self,
        caches: KVCache,
        ids_BT: np.ndarray,
        lengths_B: np.ndarray,
        n_new_B: np.ndarray,
        token: int,
        watch: Callable[[RouterOutput, Selections], None],
        inspect: Inspect = lambda part, layer, x_BTD: None,
    ) -> tuple[jax.Array, KVCache]:
        """Appends the first `n_new_B` tokens of each row to sequences of `lengths_B`.

        Args:
            caches: donated.
            ids_BT: int32.
            lengths_B: tokens of each sequence so far.
            n_new_B: the others are padding.
            token: of the policies' `Step`.
            watch: called with each layer's routing and with its selections as NumPy arrays.
            inspect: called with the residual stream after each part of the model, during the call
                alone.

        Returns:
            Residual stream [B, T, D] after the last layer, and the caches.
        """
        model, (batch, tokens) = self.model, ids_BT.shape
        context = caches.k_LBCGd.shape[2]
        offsets_BT = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens))
        valid_BT = offsets_BT < n_new_B[:, None]
        # Padding stands at position C, which the KV cache drops.
        positions_BT = np.where(valid_BT, lengths_B[:, None] + offsets_BT, context)
        positions_BT = positions_BT.astype(np.int32)
        x_BTD = _embed(*nnx.split(model.ends), np.asarray(ids_BT, np.int32))
        inspect("embedding", 0, x_BTD)
        kinds = model.layers.kinds
        walk = list(zip(kinds.kind_L, kinds.index_L, strict=True))
        looks_ahead = self.pool.staging_bytes > 0 and not self.pool.holds_all
        for layer, (kind, index) in enumerate(walk):
            last = layer == len(walk) - 1
            next_kind, next_index = walk[layer + 1] if looks_ahead and not last else (None, 0)
            x_BTD, h_TD, caches, selections, chosen_pE = _attend_and_route(
                kinds, kind, next_kind, self.mode, model.layers.states, np.int32(index),
                np.int32(next_index), np.int32(layer), self.plan, self.pool.held_UE, x_BTD,
                positions_BT, caches,
            )  # fmt: skip
            inspect("attention", layer, x_BTD)
            fields, chosen_pE = jax.device_get((selections, chosen_pE))
            on_host, valid_T = Selections(*fields), valid_BT.reshape(-1)
            watch(
                RouterOutput(
                    layer, on_host.ids_TK, on_host.weights_TK, valid_T, h_TD,
                    x_BTD.reshape(h_TD.shape),
                ),
                on_host,
            )  # fmt: skip
            # In the order in which the next layer will ask for them.
            ahead = [] if chosen_pE is None else np.argwhere(chosen_pE).tolist()
            upcoming = [ExpertKey(precision, layer + 1, expert) for precision, expert in ahead]
            step = Step(token, layer, int(lengths_B.max()))
            y_AD = apply_experts(
                self.pool, step, h_TD, selections.weights_TK, on_host, model.implementation,
                upcoming,
            )  # fmt: skip
            x_BTD = add_experts(x_BTD, y_AD)
            inspect("experts", layer, x_BTD)
        return x_BTD, caches
