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

from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.selection import RouterOutput, Selections, select
from hobbit_jax.experts.precision import SKIPPED, Array, PrecisionPlan
from hobbit_jax.experts.store import ExpertKey
from hobbit_jax.inference.host_compute import HostCompute
from hobbit_jax.inference.moe import apply_experts
from hobbit_jax.models.caches import Caches, Places
from hobbit_jax.models.layer import LayerKinds, OneBlock, Routed, States, attend_and_route
from hobbit_jax.models.loading import LoadedModel
from hobbit_jax.models.router import Routing
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


@partial(jax.jit, static_argnames=("kinds", "kind"), donate_argnames=("x_BTD", "caches"))
def _attend_and_route(
    kinds: LayerKinds,
    kind: int,
    states: States,
    index: Array,
    places: Places,
    x_BTD: jax.Array,
    positions_BT: Array,
    caches: Caches,
) -> tuple[Routed, Caches]:
    block = kinds.block(states, kind, index)
    return attend_and_route(OneBlock(block, places), caches, x_BTD, positions_BT)


@partial(jax.jit, static_argnames=("kinds", "kind"))
def _route_ahead(
    kinds: LayerKinds, kind: int, states: States, index: Array, x_BTD: jax.Array
) -> Routing:
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    return kinds.block(states, kind, index).route_ahead(x_TD)


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

    def _select(self, layer: int, routing: Routing, valid_T: np.ndarray) -> Selections:
        """Of NumPy's arrays: the programs know neither the plan nor what is resident, and so are
        the same for every plan and pool.
        """
        pool = self.pool
        resident_pE = pool.resident_pE(layer)
        return select(self.plan, pool.controller.mode, resident_pE, layer, routing, valid_T)

    def _run_experts(
        self,
        step: Step,
        routed: Routed,
        ahead: Routing | None,
        valid_T: np.ndarray,
        observed: bool,
    ) -> jax.Array:
        """y_AD of a layer's experts; `ahead` is a guess at the next layer's routing."""
        layer, controller, h_TD = step.layer, self.pool.controller, routed.h_TD
        routing, ahead = jax.device_get((routed.routing, ahead))
        selections = self._select(layer, routing, valid_T)
        if observed:
            controller.count_selections(selections.requested_TK, selections.served_TK)
            x_TD = routed.x_BTD.reshape(h_TD.shape)
            told = RouterOutput(layer, routing.ids, routing.weights, valid_T, h_TD, x_TD)
            for observer in controller.routing_observers():
                observer.after_routing(told)
        upcoming: list[ExpertKey] = []
        if ahead is not None:
            guess = self._select(layer + 1, ahead, valid_T)
            chosen = np.stack([guess.served_TK, guess.ids_TK], axis=-1)[guess.served_TK != SKIPPED]
            # In the order in which the next layer will ask for them.
            upcoming = [ExpertKey(p, layer + 1, e) for p, e in np.unique(chosen, axis=0).tolist()]
        first = layer * self.model.config.n_experts
        row_A = (first + selections.ids_TK.reshape(-1)).astype(np.int32)
        return apply_experts(
            self.pool, step, h_TD, routed.routing.weights, selections, self.model.implementation,
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
        uploads = not (self.pool.holds_all or self.pool.controller.mode.computes)
        looks_ahead = self.pool.staging_bytes > 0 and uploads
        states, kind_N = model.layers.states, kinds.kind_N
        index_N = np.asarray(kinds.index_N, np.int32)
        for number, block in enumerate(model.config.blocks):
            routed, caches = _attend_and_route(
                kinds, kind_N[number], states, index_N[number], kinds.places(number), x_BTD,
                positions_BT, caches,
            )  # fmt: skip
            x_BTD = routed.x_BTD
            look("attention", number, x_BTD)
            if not block.has_experts:
                continue
            ahead, following = None, model.config.blocks[number + 1 : number + 2]
            if looks_ahead and any(b.has_experts for b in following):
                ahead = _route_ahead(kinds, kind_N[number + 1], states, index_N[number + 1], x_BTD)
            step = Step(token, layer, longest)
            y_AD = self._run_experts(
                step, routed, ahead, valid_BT.reshape(-1), observed=inspect is None
            )
            x_BTD = _add_experts(kinds, kind_N[number], states, index_N[number], x_BTD, y_AD)
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
