"""The layers outside their experts, stacked, so that a compiled loop can walk over them.

Owns the grouping of blocks into *kinds*: blocks whose matrices have the same formats (Q4_K_M files
mix two or three) have the same structure, and their arrays are stacked. A loop over layers then
holds one branch per kind, not per layer, and is compiled in the same time for 4 layers and for 48.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from hobbit_jax.model.modules import Block
from pallas_kernels.materialize import apart

Result = TypeVar("Result")
States = tuple[Any, ...]  # per kind, the arrays of its blocks with a leading axis


@dataclass(frozen=True, eq=False)
class LayerKinds:
    """The structure of a stack: static for a compiler, equal to itself only, without arrays."""

    graphs: tuple[nnx.GraphDef[Block], ...]
    kind_L: tuple[int, ...]
    index_L: tuple[int, ...]  # of each layer, within its kind
    attention: str = "xla"  # implementation of what lies between the projections and the output

    def block(self, states: States, kind: int, index: int | jax.Array) -> Block:
        """The block at `index` of `kind`, which may be traced."""
        state = apart(lambda i: jax.tree.map(lambda stacked: stacked[i], states[kind]), index)
        return nnx.merge(self.graphs[kind], state)

    def at(
        self, states: States, layer: jax.Array, run: Callable[..., Result], *operands: Any
    ) -> Result:
        """`run(block, *operands)` with the block of a traced `layer`: one branch per kind."""
        index = jnp.asarray(self.index_L, jnp.int32)[layer]

        def branch(kind: int) -> Callable[..., Result]:
            return lambda *inputs: run(self.block(states, kind, index), *inputs)

        branches = [branch(kind) for kind in range(len(self.graphs))]
        return jax.lax.switch(jnp.asarray(self.kind_L, jnp.int32)[layer], branches, *operands)


@dataclass(frozen=True, eq=False)
class LayerStack:
    """All blocks of a model: what they are, and their arrays."""

    kinds: LayerKinds
    states: States

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> LayerStack:
        """Stacks `blocks` by kind, in order of first appearance."""
        members: dict[nnx.GraphDef[Block], list[Any]] = {}
        kind_L, index_L = [], []
        for block in blocks:
            graph, state = nnx.split(block)
            of_kind = members.setdefault(graph, [])
            kind_L.append(list(members).index(graph))
            index_L.append(len(of_kind))
            of_kind.append(state)
        stacked = tuple(
            jax.tree.map(lambda *arrays: jnp.stack(arrays), *states) for states in members.values()
        )
        # Where the matrices are raw blocks, the device is the host, which ggml's backend needs.
        raw = all(block.attention.q.raw_shape is not None for block in blocks)
        attention = "ggml" if raw else "xla"
        kinds = LayerKinds(tuple(members), tuple(kind_L), tuple(index_L), attention)
        return cls(kinds, stacked)
