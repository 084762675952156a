"""Many tokens at once: prompts and scored text, layer by layer under the host's eye.

A chunk may choose more experts of a layer than the pool has slots, so each layer's choice comes to
the host, which runs it in batches (`moe.py`). Meanwhile what the next layer's router makes of the
stream as it is now goes up, so that copies and computation overlap across layers too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.cache.miss_modes import MissMode
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.selection import RouterOutput, Selections, rows_of_layer, select
from hobbit_jax.experts.precision import SKIPPED, Array, PrecisionPlan
from hobbit_jax.experts.store import ExpertKey
from hobbit_jax.inference.host_compute import HostCompute
from hobbit_jax.inference.moe import apply_experts
from hobbit_jax.models.caches import Caches, Places
from hobbit_jax.models.layer import LayerKinds, OneBlock, States, attend_and_route
from hobbit_jax.models.loading import LoadedModel
from pallas_kernels.reference import Epilogue, Epilogues

Part = Literal["embedding", "attention", "experts"]
Inspect = Callable[[Part, int, jax.Array], object]


def _padded(tokens: int) -> int:
    """Few lengths, since a program is compiled for each: powers of two, and above 32 also three
    between two of them, so that at most a quarter is added."""
    power = 1 << (tokens - 1).bit_length()
    step = power // 8 if power > 32 else power
    return -(-tokens // step) * step


def chunks(
    sequences: Sequence[Sequence[int]], chunk_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sequences in chunks of up to `chunk_tokens` tokens, of all of them together.

    Yields:
        Ids [B, T], padded so that few shapes are compiled, how many of each row are the sequence's,
        and how many it had in the chunks before; int32.
    """
    lengths_B = np.asarray([len(sequence) for sequence in sequences], np.int32)
    ids_BT = np.zeros((len(sequences), int(lengths_B.max())), np.int32)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = sequence
    most = max(1, chunk_tokens // len(sequences))
    for start in range(0, ids_BT.shape[1], most):
        part_BT = ids_BT[:, start : start + most]
        width = min(most, _padded(part_BT.shape[1]))
        yield (
            np.pad(part_BT, ((0, 0), (0, width - part_BT.shape[1]))),
            np.clip(lengths_B - start, 0, most),
            np.clip(lengths_B, 0, start),
        )


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
    places: Places,
    layer: Array,
    plan: PrecisionPlan,
    table_UE: jax.Array,
    x_BTD: jax.Array,
    positions_BT: Array,
    caches: Caches,
) -> tuple[jax.Array, jax.Array, Caches, Selections | None, jax.Array | None]:
    block, config = kinds.block(states, kind, index), kinds.config
    routed, caches = attend_and_route(OneBlock(block, places), caches, x_BTD, positions_BT)
    x_BTD, h_TD = routed.x_BTD, routed.h_TD
    table_pE = rows_of_layer(table_UE, layer, config.n_layers)
    valid_T = (positions_BT < caches.context).reshape(-1)
    selections = None
    if block.spec.has_experts:
        selections = select(plan, mode, table_pE >= 0, layer, routed.routing, valid_T)
    if next_kind is None:
        return x_BTD, h_TD, caches, selections, None
    x_TD, table_pE = x_BTD.reshape(h_TD.shape), rows_of_layer(table_UE, layer + 1, config.n_layers)
    routing = kinds.block(states, next_kind, next_index).route_ahead(x_TD)
    ahead = select(plan, mode, table_pE >= 0, layer + 1, routing, valid_T)
    precision_TK = jnp.where(ahead.served_TK == SKIPPED, len(table_pE), ahead.served_TK)
    chosen_pE = (
        jnp.zeros(table_pE.shape, bool).at[precision_TK, ahead.ids_TK].set(True, mode="drop")
    )
    return x_BTD, h_TD, caches, selections, chosen_pE


@partial(jax.jit, static_argnames=("kinds", "kind"), donate_argnames="x_BTD")
def _add_experts(
    kinds: LayerKinds, kind: int, states: States, index: Array, x_BTD: jax.Array, y_AD: jax.Array
) -> jax.Array:
    """The stream after a block; a token's outputs are summed in the order of its selections."""
    y_TKD = y_AD.reshape(x_BTD.size // x_BTD.shape[-1], -1, x_BTD.shape[-1])
    y_BTD = jnp.sum(y_TKD, axis=1).reshape(x_BTD.shape)
    return kinds.block(states, kind, index).add_experts(x_BTD, y_BTD)


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
    pool: SlotPool
    plan: PrecisionPlan
    host: HostCompute
    epilogue: Epilogue | None = None

    def _run_experts(
        self,
        step: Step,
        routed: tuple[jax.Array, jax.Array, Selections, jax.Array | None],
        valid_T: np.ndarray,
        observed: bool,
    ) -> jax.Array:
        """y_AD of a layer's experts; `routed` is what `_attend_and_route` makes of it."""
        x_BTD, h_TD, on_device, _ = routed
        selections, chosen_pE = jax.device_get(routed[2:])
        layer, controller = step.layer, self.pool.controller
        if observed:
            controller.count_selections(selections.requested_TK, selections.served_TK)
            told = RouterOutput(
                layer, selections.ids_TK, selections.weights_TK, valid_T, h_TD,
                x_BTD.reshape(h_TD.shape),
            )  # fmt: skip
            for observer in controller.routing_observers():
                observer.after_routing(told)
        # In the order in which the next layer will ask for them.
        chosen = [] if chosen_pE is None else np.argwhere(chosen_pE).tolist()
        upcoming = [ExpertKey(precision, layer + 1, expert) for precision, expert in chosen]
        first = layer * self.model.config.n_experts
        row_A = (first + selections.ids_TK.reshape(-1)).astype(np.int32)
        return apply_experts(
            self.pool, step, h_TD, on_device.weights_TK, selections, self.model.implementation,
            upcoming, self.host, Epilogues.of(self.epilogue, row_A),
        )  # fmt: skip

    def append(
        self,
        caches: Caches,
        ids_BT: np.ndarray,
        lengths_B: np.ndarray,
        n_new_B: np.ndarray,
        token: int,
        inspect: Inspect | None = None,
    ) -> tuple[jax.Array, Caches]:
        """Appends the first `n_new_B` tokens of each row to sequences of `lengths_B`.

        Args:
            caches: donated.
            ids_BT: int32.
            lengths_B: tokens of each sequence so far.
            n_new_B: the others are padding.
            token: of the policies' `Step`.
            inspect: called with the residual stream after each part of the model, during the call
                alone; with it, observers are told nothing.

        Returns:
            Residual stream [B, T, D] after the last layer, and the caches.
        """
        model, offset_T = self.model, np.arange(ids_BT.shape[1])
        valid_BT = offset_T < n_new_B[:, None]
        # Padding stands at position C, which the KV cache drops.
        positions_BT = np.where(valid_BT, lengths_B[:, None] + offset_T, caches.context)
        positions_BT = positions_BT.astype(np.int32)
        x_BTD = _embed(*nnx.split(model.ends), np.asarray(ids_BT, np.int32))
        look = inspect or (lambda part, layer, x_BTD: None)
        look("embedding", 0, x_BTD)
        kinds, layer, longest = model.layers.kinds, 0, int(lengths_B.max())
        # What the CPU computes need not go up.
        mode = self.pool.controller.mode
        uploads = not (self.pool.holds_all or mode.computes)
        looks_ahead = self.pool.staging_bytes > 0 and uploads
        for number, block in enumerate(model.config.blocks):
            following = model.config.blocks[number + 1 : number + 2]
            next_kind, next_index = None, 0
            if looks_ahead and block.has_experts and any(b.has_experts for b in following):
                next_kind, next_index = kinds.kind_N[number + 1], kinds.index_N[number + 1]
            x_BTD, h_TD, caches, selections, chosen_pE = _attend_and_route(
                kinds, kinds.kind_N[number], next_kind, mode, model.layers.states,
                np.int32(kinds.index_N[number]), np.int32(next_index), kinds.places(number),
                np.int32(min(layer, model.config.n_layers - 1)), self.plan, self.pool.held_UE,
                x_BTD, positions_BT, caches,
            )  # fmt: skip
            look("attention", number, x_BTD)
            if selections is None:
                continue
            step, routed = Step(token, layer, longest), (x_BTD, h_TD, selections, chosen_pE)
            y_AD = self._run_experts(step, routed, valid_BT.reshape(-1), observed=inspect is None)
            x_BTD = _add_experts(
                kinds, kinds.kind_N[number], model.layers.states,
                np.int32(kinds.index_N[number]), x_BTD, y_AD,
            )  # fmt: skip
            look("experts", number, x_BTD)
            layer += 1
        return x_BTD, caches


@jax.jit
def finite_BT(x_BTD: jax.Array) -> jax.Array:
    """Whether all numbers of each token are finite."""
    return jnp.all(jnp.isfinite(x_BTD), axis=-1)


def describe_non_finite(
    prefill: Prefill, caches: Caches, ids: Sequence[Sequence[int]], chunk_tokens: int
) -> str:
    """One line that names the part of the model where NaN or infinity began.

    The token is not named: attention multiplies what is masked by 0, and so hands NaN to all tokens
    of a chunk. The caches are zeros, with room for all tokens; they are donated.
    """
    places: list[str] = []  # that have any, in the order in which the model runs
    for part_BT, n_new_B, done_B in chunks(ids, chunk_tokens):
        valid_BT = np.arange(part_BT.shape[1]) < n_new_B[:, None]

        def look(part: Part, layer: int, x_BTD: jax.Array, valid_BT=valid_BT) -> None:
            if not np.asarray(finite_BT(x_BTD))[valid_BT].all():
                embeds = part == "embedding"
                places.append("the token embedding" if embeds else f"the {part} of layer {layer}")

        _, caches = prefill.append(caches, part_BT, done_B, n_new_B, 0, look)
        if places:
            break
    place = places[0] if places else "the output norm or the output matrix"
    return (
        f"the logits are not finite: NaN or infinity begins in {place}; the weights there are "
        "damaged, or their products overflow: compare the file with its publisher's checksum"
    )
