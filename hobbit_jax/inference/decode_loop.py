"""Decode as one compiled program that leaves only when an expert is missing.

A loop over the layers of a token, inside one over tokens, attends, routes, assigns precisions,
looks the slots up on the device, runs the experts from the banks and samples. It ends after `count`
tokens, or in the layer whose experts are not all resident; the ones that are have run by then. The
host loads the others and calls again: the program runs them and goes on. So a layer may take any
number of calls and never needs more slots at a time than one.

A selection's result depends neither on the entry in which it ran nor on what ran beside it, and the
K results of a token are summed last, so the tokens are the same bits for every pool.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hobbit_jax.cache.miss_modes import MissMode
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.selection import Selections, rows_of_layer, select
from hobbit_jax.experts.precision import SKIPPED, Array, PrecisionPlan
from hobbit_jax.inference.decode_report import LOG_FIELDS, log_entry, pack
from hobbit_jax.inference.sampling import Sampling, sample
from hobbit_jax.models import sharding
from hobbit_jax.models.caches import Caches, empty_caches
from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.layer import LayerKinds, States, attend_and_route
from hobbit_jax.models.modules import EmbeddingAndHead
from pallas_kernels.backends import Implementation
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.reference import Bank, Epilogue, Epilogues, Signature, Work


@dataclass(frozen=True)
class LayerGroups:
    """Which bank each precision of each layer's experts lives in."""

    signatures: tuple[tuple[Signature | None, ...], ...]  # by kind and precision; None has no bank
    kind_L: tuple[int, ...]
    implementations: tuple[tuple[Signature, str], ...]  # how each bank's experts are computed

    @classmethod
    def of(cls, pool: SlotPool, implementation: Implementation) -> Self:
        """Of the banks that `pool` has, up to the highest precision that has one."""
        store, banks = pool.store, pool.banks
        signature_pL = [
            [e.signature if e.signature in banks else None for e in layers]
            for layers in store.precisions
        ]
        while len(signature_pL) > 1 and not any(signature_pL[-1]):
            del signature_pL[-1]
        by_layer = list(zip(*signature_pL, strict=True))
        kinds = tuple(dict.fromkeys(by_layer))
        implementations = tuple((s, store.backend(s, implementation)) for s in banks)
        return cls(kinds, tuple(kinds.index(kind) for kind in by_layer), implementations)


@dataclass(frozen=True)
class LoopSpec:
    """All that a decode program is compiled for, besides the shapes of its arguments."""

    config: ModelConfig
    layers: LayerKinds
    ends: nnx.GraphDef[EmbeddingAndHead]
    experts: LayerGroups
    mode: MissMode
    sampling: Sampling
    most_tokens: int  # of one call
    weights: Any  # structure of `Weights`
    look_ahead: int = 0  # layers whose routers are asked when the program leaves for an expert
    mesh: Mesh | None = None  # of several devices that divide the experts
    resident_lift: float = 0.0  # see `CacheConfig`


class Weights(NamedTuple):
    """What the program reads and the engine keeps: the dense part and the plan.

    A call is given its arrays in a list: JAX takes 50 microseconds to find them in the modules.
    """

    layers: States
    ends: Any
    plan: PrecisionPlan
    epilogue: Epilogue | None = None


class Carry(NamedTuple):
    """A token's state between two calls of the program; it stays on the device, donated."""

    caches: Caches
    block: jax.Array  # int32 scalar: whose experts are due, or which is attended next
    routed: jax.Array  # bool scalar: attention and routing of `block` have been done
    x_BD: jax.Array
    h_BD: jax.Array
    selections: Selections
    done_A: jax.Array  # bool: selections of `block` that have run, or that nobody serves
    y_AD: jax.Array  # of several devices, each one's part


class Inputs(NamedTuple):
    """What the host says at an entry, all small NumPy arrays."""

    fresh: Array  # bool: begins with `ids_B`, instead of going on where the last entry left
    ids_B: Array  # int32
    active_B: Array  # bool: sequences that get a token
    lengths_B: Array  # int32: tokens of each so far
    count: Array  # int32, `most_tokens` at most
    drawn: Array  # int32: tokens drawn before, which seed the next draw with `key`
    key: Array  # uint32 [2], a key's data: JAX takes a key itself on a slower way
    stop_ids: Array  # int32


class _Loop(NamedTuple):
    carry: Carry
    step: jax.Array  # int32: tokens finished
    active_B: jax.Array
    lengths_B: jax.Array
    blocked: jax.Array  # bool: an expert is missing
    finite: jax.Array  # bool: all logits of sequences that got a token are finite
    tokens_NB: jax.Array  # drawn
    logits_BV: jax.Array
    logged: jax.Array  # int32: layers routed
    log_IAf: jax.Array


def empty_carry(
    config: ModelConfig,
    batch: int,
    context: int,
    mesh: Mesh | None = None,
    kv_format: str = "float32",
) -> Carry:
    """No sequence has any token yet."""
    k, d = config.experts_per_token, config.d_model
    # Each its own buffer, for all of them are donated.
    integers = [jnp.full((batch, k), SKIPPED, jnp.int32) for _ in range(3)]
    carry = Carry(
        caches=empty_caches(config, batch, context, kv_format),
        block=jnp.int32(0),
        routed=jnp.array(False),
        x_BD=jnp.zeros((batch, d)),
        h_BD=jnp.zeros((batch, d)),
        selections=Selections(integers[0], jnp.zeros((batch, k)), integers[1], integers[2]),
        done_A=jnp.ones(batch * k, bool),
        y_AD=jnp.zeros((batch * k, d)),
    )
    if mesh is None:
        return carry
    y_AD = sharding.divided(jnp.zeros((mesh.size * batch * k, d)), mesh)
    return sharding.replicated(carry, mesh)._replace(y_AD=y_AD)


def with_outputs(
    carry: Carry, assignment_H: np.ndarray, y_HD: np.ndarray, mesh: Mesh | None
) -> Carry:
    """A carry, donated, in which some assignments have run elsewhere (`HostOutputs`).

    Of several devices the first holds the outputs; padding lies outside of the carry.
    """
    y_AD, done_A = _put_outputs(carry.y_AD, carry.done_A, assignment_H, y_HD, mesh)
    return carry._replace(y_AD=y_AD, done_A=done_A)


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=4)
def _put_outputs(y_AD, done_A, assignment_H, y_HD, mesh):
    def put(y_AD: jax.Array) -> jax.Array:
        here_H = assignment_H
        if mesh is not None:
            first = jax.lax.axis_index(sharding.AXIS) == 0
            here_H = jnp.where(first, assignment_H, len(y_AD))
        return y_AD.at[here_H].set(y_HD, mode="drop")

    y_AD = sharding.on_each(put, mesh, (sharding.DIVIDED,), sharding.DIVIDED)(y_AD)
    return y_AD, done_A.at[assignment_H].set(True, mode="drop")


def item_width(batch: int, k: int, n_experts: int) -> int:
    """Rows of an item in decode: twice an expert's mean load, and no more than there are tokens."""
    mean = -(-batch * k // min(batch * k, n_experts))
    return min(1 << (batch - 1).bit_length(), 2 << (mean - 1).bit_length())


def group(
    expert_A: jax.Array,
    precision_A: jax.Array,
    slot_A: jax.Array,
    wanted_A: jax.Array,
    n_experts: int,
    n_precisions: int,
    width: int,
) -> list[Work]:
    """Per precision, items of up to `width` wanted assignments of one expert each.

    `reference.items` does the same for prefill. Which rows an expert's items have depends on its
    own assignments alone.
    """
    n_assignments = len(expert_A)
    assignment_A = jnp.arange(n_assignments, dtype=jnp.int32)
    if width == 1:
        order_A = jnp.argsort(jnp.where(wanted_A, precision_A, n_precisions), stable=True).astype(
            jnp.int32
        )
        slot_I, assignment_IC = slot_A[order_A], order_A[:, None]
        is_of_At = wanted_A[:, None] & (precision_A[:, None] == jnp.arange(n_precisions)[None, :])
        items_t = jnp.sum(is_of_At, axis=0, dtype=jnp.int32)
    else:
        units, unit_A = n_precisions * n_experts, jnp.maximum(precision_A, 0) * n_experts + expert_A
        n_items = min(n_assignments, units + n_assignments // width)
        is_of_AU = wanted_A[:, None] & (unit_A[:, None] == jnp.arange(units)[None, :])
        rank_A = jnp.sum(jnp.where(is_of_AU, jnp.cumsum(is_of_AU, axis=0) - 1, 0), axis=1)
        items_U = -(-jnp.sum(is_of_AU, axis=0, dtype=jnp.int32) // width)
        first_U = jnp.cumsum(items_U) - items_U
        item_A = jnp.where(wanted_A, first_U[unit_A] + rank_A // width, n_items)
        column_A = rank_A % width
        # A short item repeats its first assignment, so every column starts as that one.
        first_A = jnp.where(column_A == 0, item_A, n_items)
        first_I = jnp.zeros(n_items, jnp.int32).at[first_A].set(assignment_A, mode="drop")
        assignment_IC = jnp.broadcast_to(first_I[:, None], (n_items, width))
        assignment_IC = assignment_IC.at[item_A, column_A].set(assignment_A, mode="drop")
        slot_I = jnp.zeros(n_items, jnp.int32).at[item_A].set(slot_A, mode="drop")
        items_t = jnp.sum(items_U.reshape(n_precisions, n_experts), axis=1)
    work, start = [], jnp.int32(0)
    for precision in range(n_precisions):
        # The items of a precision are neighbours; the kernels begin with the first.
        rolled_I, rolled_IC = (
            (array if precision == 0 else jnp.roll(array, -start, axis=0))
            for array in (slot_I, assignment_IC)
        )
        work.append(Work(rolled_I, rolled_IC, items_t[precision]))
        start = start + items_t[precision]
    return work


def layer_of(config: ModelConfig, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The layer of a block, or the next one's, and whether it is one: int32 and bool scalars."""
    if config.n_layers == config.n_blocks:
        return block, jnp.array(True)
    is_layer_N = [spec.has_experts for spec in config.blocks]
    before_N = np.cumsum([0, *is_layer_N])[: config.n_blocks]
    layer = jnp.asarray(np.minimum(before_N, config.n_layers - 1), jnp.int32)[block]
    return layer, jnp.asarray(is_layer_N)[block]


def _attend(spec: LoopSpec, weights: Weights, held_UE: jax.Array, loop: _Loop) -> _Loop:
    """Attention and routing of `block`, and the precisions that serve its selections."""
    carry, config = loop.carry, spec.config
    positions_B1 = jnp.where(loop.active_B, loop.lengths_B, carry.caches.context)[:, None]
    at = spec.layers.at(weights.layers, carry.block)
    layer, is_layer = layer_of(config, carry.block)
    table_pE = rows_of_layer(held_UE, layer, config.n_layers)
    lift_E = None
    if spec.resident_lift:
        resident_E = jnp.any(table_pE >= 0, axis=0)
        lift_E = jnp.where(resident_E, jnp.float32(spec.resident_lift), jnp.float32(0))
    routed, caches = attend_and_route(at, carry.caches, carry.x_BD[:, None], positions_B1, lift_E)
    valid_B = loop.active_B & is_layer
    selections = select(weights.plan, spec.mode, table_pE >= 0, layer, routed.routing, valid_B)
    carry = carry._replace(
        caches=caches,
        routed=jnp.array(True),
        x_BD=routed.x_BTD[:, 0],
        h_BD=routed.h_TD,
        selections=selections,
        done_A=selections.served_TK.reshape(-1) == SKIPPED,
        y_AD=jnp.zeros_like(carry.y_AD),
    )
    return loop._replace(
        carry=carry,
        logged=loop.logged + is_layer.astype(jnp.int32),
        # What a block without experts writes is written over by the next layer's.
        log_IAf=loop.log_IAf.at[loop.logged].set(log_entry(selections), mode="drop"),
    )


def _run_experts(
    spec: LoopSpec,
    weights: Weights,
    banks: dict[Signature, Bank],
    table_UE: jax.Array,
    held_UE: jax.Array,
    loop: _Loop,
) -> _Loop:
    """Runs what is resident and due, each device what is in its own banks by its own `table_UE`.

    `held_UE` says what is in anyone's.
    """
    carry, config, experts = loop.carry, spec.config, spec.experts
    batch, k = carry.selections.ids_TK.shape
    ids_A, weight_A, _, served_A = (field.reshape(-1) for field in carry.selections)
    layer, _ = layer_of(config, carry.block)
    slot_A, held_A = (
        rows_of_layer(rows_UE, layer, config.n_layers)[jnp.maximum(served_A, 0), ids_A]
        for rows_UE in (table_UE, held_UE)
    )
    due_A = (slot_A >= 0) & ~carry.done_A  # here
    ready_A = (held_A >= 0) & ~carry.done_A  # on some device
    n_precisions, width = len(experts.signatures[0]), item_width(batch, k, config.n_experts)
    work_t = group(ids_A, served_A, slot_A, due_A, config.n_experts, n_precisions, width)

    epilogues = Epilogues.of(weights.epilogue, layer * config.n_experts + ids_A)
    implementations = dict(experts.implementations)

    def run(signatures: tuple[Signature | None, ...], y_AD: jax.Array) -> jax.Array:
        for signature, work in zip(signatures, work_t, strict=True):
            if signature is not None:
                y_AD = expert_ffn(
                    carry.h_BD, y_AD, weight_A, banks[signature], signature, work,
                    implementations[signature], config.expert_function, epilogues,
                )  # fmt: skip
        return y_AD

    kind = jnp.asarray(experts.kind_L, jnp.int32)[layer]
    branches = [functools.partial(run, signatures) for signatures in experts.signatures]
    y_AD = jax.lax.switch(kind, branches, carry.y_AD)
    return loop._replace(carry=carry._replace(y_AD=y_AD, done_A=carry.done_A | ready_A))


def _end_layer(spec: LoopSpec, weights: Weights, loop: _Loop) -> _Loop:
    """Adds the outputs to the stream if all of a layer's have run; else it is blocked."""
    carry, config = loop.carry, spec.config
    complete = carry.routed & jnp.all(carry.done_A)
    total_AD = sharding.sum_of_parts(carry.y_AD, spec.mesh)
    sum_BD = jnp.sum(total_AD.reshape(len(carry.x_BD), -1, config.d_model), axis=1)
    if any(block.d_beside for block in config.blocks):
        at = spec.layers.at(weights.layers, jnp.minimum(carry.block, config.n_blocks - 1))
        x_BD = jax.lax.cond(
            complete,
            lambda: at.run(lambda block, x, y: block.add_experts(x, y), carry.x_BD, sum_BD),
            lambda: carry.x_BD,
        )
    else:
        x_BD = jnp.where(complete, carry.x_BD + sum_BD, carry.x_BD)
    block, routed = carry.block + complete.astype(jnp.int32), carry.routed & ~complete
    return loop._replace(
        carry=carry._replace(block=block, routed=routed, x_BD=x_BD), blocked=routed
    )


def _look_ahead(spec: LoopSpec, weights: Weights, held_UE: jax.Array, loop: _Loop) -> jax.Array:
    """What later layers' routers choose of the stream where the program waits, int32 [P, 2, A].

    Expert and precision of each selection; `SKIPPED` for layers past the last, and if nobody waits.
    The stream has this layer's attention and not its experts.
    """
    config, x_BD = spec.config, loop.carry.x_BD
    n_layers, (here, _) = config.n_layers, layer_of(config, loop.carry.block)

    def choose(distance: jax.Array) -> jax.Array:
        layer = jnp.minimum(here + distance, n_layers - 1)
        at = spec.layers.at(weights.layers, jnp.asarray(config.block_of_layer, jnp.int32)[layer])
        routing = at.run(lambda block, x: block.route_ahead(x), x_BD)
        table_pE = rows_of_layer(held_UE, layer, n_layers)
        valid_B = loop.active_B & (here + distance < n_layers)
        chosen = select(weights.plan, spec.mode, table_pE >= 0, layer, routing, valid_B)
        return jnp.stack([chosen.ids_TK.reshape(-1), chosen.served_TK.reshape(-1)])

    shape = (spec.look_ahead, 2, loop.carry.done_A.size)
    if not spec.look_ahead:
        return jnp.zeros(shape, jnp.int32)
    distances_P = jnp.arange(1, 1 + spec.look_ahead, dtype=jnp.int32)
    return jax.lax.cond(
        loop.blocked,
        lambda: jax.lax.map(choose, distances_P),
        lambda: jnp.full(shape, SKIPPED, jnp.int32),
    )


def _end_token(spec: LoopSpec, weights: Weights, inputs: Inputs, loop: _Loop) -> _Loop:
    """After the last layer: logits, the next token, and its embedding as the new stream."""

    def end(loop: _Loop) -> _Loop:
        ends = nnx.merge(spec.ends, weights.ends)
        logits_BV = ends.logits(loop.carry.x_BD)
        key = jax.random.wrap_key_data(inputs.key)
        key = jax.random.fold_in(key, inputs.drawn + loop.step)
        ids_B = sample(logits_BV, key, spec.sampling)
        finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
        stopped_B = jnp.any(ids_B[:, None] == inputs.stop_ids[None, :], axis=1)
        block = jnp.zeros_like(loop.carry.block)
        return loop._replace(
            carry=loop.carry._replace(block=block, x_BD=ends.embed(ids_B)),
            step=loop.step + 1,
            active_B=loop.active_B & ~stopped_B,
            lengths_B=loop.lengths_B + loop.active_B.astype(jnp.int32),
            finite=loop.finite & jnp.all(finite_B | ~loop.active_B),
            tokens_NB=loop.tokens_NB.at[loop.step].set(ids_B),
            logits_BV=logits_BV,
        )

    # Without what a conditional would only copy.
    nothing: Any = dict.fromkeys(set(Carry._fields) - {"block", "x_BD"})
    small = loop._replace(carry=loop.carry._replace(**nothing), log_IAf=None)
    ended = jax.lax.cond(loop.carry.block == spec.config.n_blocks, end, lambda same: same, small)
    carry = loop.carry._replace(block=ended.carry.block, x_BD=ended.carry.x_BD)
    return ended._replace(carry=carry, log_IAf=loop.log_IAf)


def _decode(
    spec: LoopSpec,
    arrays: list[jax.Array],
    banks: dict[Signature, Bank],
    table_UE: jax.Array,
    carry: Carry,
    inputs: Inputs,
) -> tuple[Carry, jax.Array, jax.Array]:
    weights: Weights = jax.tree.unflatten(spec.weights, arrays)
    config, fresh, held_UE = spec.config, inputs.fresh, sharding.held_anywhere(table_UE, spec.mesh)
    batch = len(inputs.ids_B)
    x_BD = nnx.merge(spec.ends, weights.ends).embed(inputs.ids_B)
    carry = carry._replace(
        block=jnp.where(fresh, 0, carry.block),
        routed=carry.routed & ~fresh,
        done_A=carry.done_A | fresh,
        x_BD=jnp.where(fresh, x_BD, carry.x_BD),
    )
    loop = _Loop(
        carry=carry,
        step=jnp.int32(0),
        active_B=jnp.asarray(inputs.active_B),
        lengths_B=jnp.asarray(inputs.lengths_B),
        blocked=jnp.array(False),
        finite=jnp.array(True),
        tokens_NB=jnp.zeros((spec.most_tokens, batch), jnp.int32),
        logits_BV=jnp.zeros((batch, config.vocab_size)),
        logged=jnp.int32(0),
        log_IAf=jnp.zeros(
            (spec.most_tokens * config.n_layers, carry.done_A.size, LOG_FIELDS), jnp.int32
        ),
    )

    def finish_layer(loop: _Loop) -> _Loop:
        loop = _run_experts(spec, weights, banks, table_UE, held_UE, loop)
        return _end_layer(spec, weights, loop)

    def finish_token(loop: _Loop) -> _Loop:
        loop = jax.lax.while_loop(
            lambda loop: (loop.carry.block < config.n_blocks) & ~loop.blocked,
            lambda loop: finish_layer(_attend(spec, weights, held_UE, loop)),
            loop,
        )
        return _end_token(spec, weights, inputs, loop)

    def may_go_on(loop: _Loop) -> jax.Array:
        # A token that was begun is ended, also when no sequence is left.
        more = (loop.step < inputs.count) & ((loop.carry.block > 0) | jnp.any(loop.active_B))
        return more & ~loop.blocked

    # First run the experts for which the last call left; at the start of a token there are none.
    loop = jax.lax.while_loop(may_go_on, finish_token, finish_layer(loop))
    ahead_P2A = _look_ahead(spec, weights, held_UE, loop)
    layer, _ = layer_of(config, loop.carry.block)
    numbers = (loop.step, layer, loop.blocked, loop.finite, loop.logged)
    packed = pack(numbers, loop.tokens_NB, ahead_P2A, loop.log_IAf)
    return loop.carry, packed, loop.logits_BV


Program = Callable[..., tuple[Carry, jax.Array, jax.Array]]


@functools.lru_cache(maxsize=64)
def decode_program(spec: LoopSpec) -> Program:
    """The compiled program: (arrays, banks, table, carry, inputs) to (carry, report, logits).

    The arrays are those of `Weights`. The carry is donated. The logits are those of the last token
    that ended in this entry.
    """
    whole, parts = sharding.REPLICATED, sharding.DIVIDED
    carry: Any = Carry(*[whole] * len(Carry._fields))._replace(y_AD=parts)  # pyright: ignore
    arguments, results = (whole, parts, parts, carry, whole), (carry, whole, whole)
    program = sharding.on_each(functools.partial(_decode, spec), spec.mesh, arguments, results)
    return jax.jit(program, donate_argnums=3)
