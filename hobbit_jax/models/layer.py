"""The one walk through a layer, which prefill, decode, training and benches call.

Owns the block (attention of some kind, router, what stands beside the experts) and the grouping of
blocks into *kinds*: blocks whose matrices have the same formats (Q4_K_M files mix two or three) and
whose parts are the same have one structure, and their arrays are stacked. A loop over blocks then
holds one branch per kind, not per block, and is compiled in the same time for 4 blocks and for 48.

Between a block's routing and the next block stand the experts (`inference/moe.py`, slot pool).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hobbit_jax.models.attention import GroupedQuery, GroupedQueryAttention
from hobbit_jax.models.caches import Arrays, Caches, Places
from hobbit_jax.models.config import BESIDE_NORMS, Attention, BlockConfig, ModelConfig
from hobbit_jax.models.delta_net import DeltaNetMixer, GatedDeltaNet
from hobbit_jax.models.latent_attention import LatentAttention, LatentMixer
from hobbit_jax.models.modules import BlockWeights, GatedMLP, Place, Stacked
from hobbit_jax.models.router import Router, Routing
from hobbit_jax.models.short_convolution import ShortConvolution, ShortConvolutionMixer

Result = TypeVar("Result")
# Per kind, the arrays of its blocks with a leading axis: those that are read where they lie
# (`Stacked`), the numbers that say where in them (`Place`), those of which a block gets its slice.
States = tuple[tuple[Any, Any, Any], ...]


class Mixer(Protocol):
    """What moves information between tokens, in two steps.

    `project` reads the block's own recurrent states and says what the caches shall hold; `mix`
    reads the keys and values of all tokens, these among them. Neither writes: caches are written
    outside of a switch over kinds, which would copy them.
    """

    def project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> tuple[jax.Array, Arrays]:
        """What `mix` needs of these tokens, float32 [B, T, N], and what goes into the caches."""
        ...

    def mix(
        self, passed_BTN: jax.Array, positions_BT: jax.Array, caches: Caches, places: Places
    ) -> jax.Array:
        """What is added to the stream, [B, T, D]; N may have grown by padding."""
        ...


MIXERS: dict[type[Attention], Callable[[Any, BlockWeights], Mixer]] = {
    GroupedQuery: GroupedQueryAttention,
    LatentAttention: LatentMixer,
    GatedDeltaNet: DeltaNetMixer,
    ShortConvolution: ShortConvolutionMixer,
}


class Routed(NamedTuple):
    """A block up to its experts. Where it has none, the routing is of experts 0 with weights 0."""

    x_BTD: jax.Array  # the stream, with all that the block adds but its experts
    h_TD: jax.Array  # what the experts read, of B * T tokens
    routing: Routing  # [T, K] likewise


class SharedExpert(nnx.Module):
    """An expert that runs for every token beside the chosen ones, with a gate or without."""

    def __init__(self, spec: BlockConfig, weights: BlockWeights):
        self.mlp = GatedMLP(weights, "_shexp")
        self.gate = nnx.Param(weights.array("ffn_gate_inp_shexp")) if spec.shared_gate else None

    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        y_BTD = self.mlp(h_BTD)
        if self.gate is None:
            return y_BTD
        gate_D = self.gate[...].reshape(-1)
        return y_BTD * jax.nn.sigmoid(jnp.einsum("btd,d->bt", h_BTD, gate_D))[..., None]


class Beside(nnx.Module):
    """A dense FFN beside the experts, and how their outputs become one (Gemma 4)."""

    def __init__(self, config: ModelConfig, weights: BlockWeights):
        self.dense = GatedMLP(weights, "", config.expert_function)
        self.norms = nnx.List([weights.norm(role) for role in BESIDE_NORMS])
        self.output_scale = nnx.Param(weights.array("layer_output_scale"))

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The stream [..., D] after the block, from that before its FFNs and the experts' sum."""
        before, after, after_experts, after_both = self.norms
        both = after(self.dense(before(x))) + after_experts(y)
        return (x + after_both(both)) * jnp.broadcast_to(self.output_scale[...], x.shape)


class Block(nnx.Module):
    """One decoder block without its experts."""

    def __init__(self, config: ModelConfig, number: int, weights: BlockWeights):
        self.spec, self.k = config.blocks[number], config.experts_per_token
        self.residual_scale = config.residual_scale
        self.attention_norm = weights.norm("attn_norm")
        self.attention = MIXERS[type(self.spec.attention)](self.spec.attention, weights)
        self.ffn_norm = weights.norm(self.spec.ffn_norm)
        self.router = Router(config, weights) if self.spec.has_experts else None
        self.dense = GatedMLP(weights, "") if self.spec.d_dense else None
        self.shared = SharedExpert(self.spec, weights) if self.spec.d_shared else None
        out_norm = self.spec.attention_out_norm
        self.attention_out_norm = weights.norm(out_norm) if out_norm else None
        self.beside = Beside(config, weights) if self.spec.d_beside else None

    def route(
        self,
        x_BTD: jax.Array,
        passed_BTN: jax.Array,
        positions_BT: jax.Array,
        caches: Caches,
        places: Places,
        lift_E: jax.Array | None = None,
    ) -> Routed:
        """Everything after the caches were written, up to the experts; `lift_E` is `Router`'s."""
        mixed_BTD = self.attention.mix(passed_BTN, positions_BT, caches, places)
        if self.attention_out_norm is not None:
            mixed_BTD = self.attention_out_norm(mixed_BTD)
        x_BTD = self._add(x_BTD, mixed_BTD)
        h_BTD = self.ffn_norm(x_BTD)
        h_TD = h_BTD.reshape(-1, h_BTD.shape[-1])
        if self.dense is not None:
            x_BTD = self._add(x_BTD, self.dense(h_BTD))
        if self.shared is not None:
            x_BTD = self._add(x_BTD, self.shared(h_BTD))
        if self.router is not None:
            own_input = self.router.settings.own_input
            read_TD = x_BTD.reshape(h_TD.shape) if own_input else h_TD
            return Routed(x_BTD, h_TD, self.router(read_TD, lift_E))
        nobody_TK = jnp.zeros((len(h_TD), self.k))
        return Routed(x_BTD, h_TD, Routing(nobody_TK.astype(jnp.int32), nobody_TK))

    def _add(self, x_BTD: jax.Array, branch_BTD: jax.Array) -> jax.Array:
        scale = self.residual_scale
        return x_BTD + (branch_BTD if scale == 1 else branch_BTD * scale)

    def route_ahead(self, x: jax.Array) -> Routing:
        """The routing of an earlier layer's stream x [..., D]: a guess at what this one chooses."""
        router = self.expert_router
        return router(x if router.settings.own_input else self.ffn_norm(x))

    def add_experts(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The stream after the block, from `Routed.x_BTD` and the experts' sum, both [..., D]."""
        return x + y if self.beside is None else self.beside(x, y)

    @property
    def expert_router(self) -> Router:
        """The router of a block that has one."""
        if self.router is None:
            raise RuntimeError("a block without experts was asked for its router")
        return self.router


@dataclass(frozen=True)
class OneBlock:
    """A block that a program is traced for."""

    block: Block
    places: Places  # of the block's states in the caches

    def run(self, function: Callable[..., Result], *operands: Any) -> Result:
        """`function(block, *operands)`."""
        return function(self.block, *operands)

    def uniform(self, passed_BTN: jax.Array, writes: Arrays) -> tuple[jax.Array, Arrays]:
        """Both as they are: there is no other kind of block."""
        return passed_BTN, writes


@dataclass(frozen=True, eq=False)
class LayerKinds:
    """The structure of a stack, without arrays: static for a compiler, equal to itself only."""

    config: ModelConfig
    graphs: tuple[nnx.GraphDef[Block], ...]
    kind_N: tuple[int, ...]  # of each block
    index_N: tuple[int, ...]  # of each block, within its kind

    def block(self, states: States, kind: int, index: int | jax.Array) -> Block:
        """The block at `index` of `kind`, which may be traced."""
        whole, places, stacked = states[kind]
        places = jax.tree.map(lambda _: jnp.asarray(index, jnp.int32), places)
        state = jax.tree.map(lambda array: array[index], stacked)
        return nnx.merge(self.graphs[kind], whole, places, state)

    def places(self, number: int) -> dict[str, np.int32]:
        """Of a block's states in the caches, as data, so that no program is made for each block."""
        return {n: np.int32(place) for n, place in self.config.state_places[number].items()}

    def at(self, states: States, number: jax.Array) -> "TracedBlock":
        """The block of a traced number."""
        return TracedBlock(self, states, number)


@dataclass(frozen=True)
class TracedBlock:
    """A block of a loop over blocks, known by its number in the program; one branch per kind."""

    kinds: LayerKinds
    states: States
    number: jax.Array

    @property
    def places(self) -> Places:
        """Of the block's states in the caches."""
        of_blocks = self.kinds.config.state_places
        return {
            name: jnp.asarray([places[name] for places in of_blocks], jnp.int32)[self.number]
            for name in self.kinds.config.states
        }

    def run(self, function: Callable[..., Result], *operands: Any) -> Result:
        """`function(block, *operands)`."""
        kinds = self.kinds
        index = jnp.asarray(kinds.index_N, jnp.int32)[self.number]

        def run(kind: int, *operands: Any) -> Result:
            return function(kinds.block(self.states, kind, index), *operands)

        branches = [partial(run, kind) for kind in range(len(kinds.graphs))]
        kind = jnp.asarray(kinds.kind_N, jnp.int32)[self.number]
        return jax.lax.switch(kind, branches, *operands)

    def uniform(self, passed_BTN: jax.Array, writes: Arrays) -> tuple[jax.Array, Arrays]:
        """Both padded to what every kind of block returns, so that a switch can return either."""
        (batch, tokens, width), config = passed_BTN.shape, self.kinds.config
        widest = max(block.attention.passed_width for block in config.blocks)
        passed_BTN = jnp.pad(passed_BTN, ((0, 0), (0, 0), (0, widest - width)))
        padded = {}
        for name, (state, _) in config.states.items():
            lead = (batch, tokens) if state.by_token else (batch,)
            padded[name] = writes[name] if name in writes else jnp.zeros((*lead, *state.shape))
        return passed_BTN, padded


def attend_and_route(
    at: OneBlock | TracedBlock,
    caches: Caches,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    lift_E: jax.Array | None = None,
) -> tuple[Routed, Caches]:
    """One block up to its experts; tokens at position `caches.context` are padding.

    `lift_E` raises experts' scores for the choice, as in `Router`.
    """

    def project(block: Block, x_BTD: jax.Array, recurrent: Arrays, places: Places):
        # Without the keys and values, which this step has no need of.
        own = Caches({}, recurrent, caches.context)
        h_BTD = block.attention_norm(x_BTD)
        return at.uniform(*block.attention.project(h_BTD, positions_BT, own, places))

    passed_BTN, writes = at.run(project, x_BTD, caches.recurrent, at.places)
    caches = caches.write(at.places, positions_BT, writes)

    def route(block: Block, x_BTD, passed_BTN, by_token: Arrays, places: Places, lift_E):
        own = Caches(by_token, {}, caches.context)
        return block.route(x_BTD, passed_BTN, positions_BT, own, places, lift_E)

    return at.run(route, x_BTD, passed_BTN, caches.by_token, at.places, lift_E), caches


@dataclass(frozen=True, eq=False)
class LayerStack:
    """All blocks of a model: what they are, and their arrays."""

    kinds: LayerKinds
    states: States

    @classmethod
    def of(cls, config: ModelConfig, blocks: Sequence[Block]) -> "LayerStack":
        """Stacks `blocks` by kind, in order of first appearance."""
        members: dict[nnx.GraphDef[Block], list[Any]] = {}
        kind_N, index_N = [], []
        for block in blocks:
            graph, *of_block = nnx.split(block, Stacked, Place, ...)
            of_kind = members.setdefault(graph, [])
            kind_N.append(list(members).index(graph))
            index_N.append(len(of_kind))
            of_kind.append(of_block)

        def joined(of_kind: list[Any]) -> tuple[Any, Any, Any]:
            whole, places, sliced = zip(*of_kind, strict=True)
            return (
                jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *whole),
                places[0],
                jax.tree.map(lambda *arrays: jnp.stack(arrays), *sliced),
            )

        states = tuple(map(joined, members.values()))
        return cls(LayerKinds(config, tuple(members), tuple(kind_N), tuple(index_N)), states)
