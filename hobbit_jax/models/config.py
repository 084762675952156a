"""What a model is made of: blocks by kind, router, experts, and what it keeps of a sequence.

Owns the types in which a family (`registry.py`) describes a file, and everything that follows from
them alone: names and shapes of tensors, and of the states that a sequence keeps. No arrays here.

A *block* is one of the file's `blk.N`. A *layer* (the letter L) is a block with experts in the
store: store, plans, traces and caches count layers, in the order of their blocks, and leave out
blocks with a dense FFN.

Source: llama.cpp, src/models/ (shapes, defaults); gguf.constants (names).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

TOKEN_EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"  # absent when the head is tied to the embedding

Shapes = dict[str, tuple[int, ...]]  # row-major, by role


class State(NamedTuple):
    """An array that blocks of one kind keep of each sequence.

    Attributes:
        name: blocks that use the same name keep it in one array, each at its own place.
        shape: of one token, or of one sequence.
        by_token: whether every token has its own; the others are replaced by the next token's.
    """

    name: str
    shape: tuple[int, ...]
    by_token: bool


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dim` values of a head."""

    base: float
    dim: int
    style: Literal["neox", "norm"]  # pairs (i, i + dim/2), or (2i, 2i + 1)


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

    def tensors(self, d_model: int) -> Shapes:
        """Those of a block."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        norms = {
            "none": {},
            "head": {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)},
            "full": {"attn_q_norm": (q,), "attn_k_norm": (kv,)},
        }[self.qk_norm]
        matrices: Shapes = {
            "attn_q": (q * (1 + self.gated), d_model),
            "attn_k": (kv, d_model),
            "attn_v": (kv, d_model),
            "attn_output": (d_model, q),
        }
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


@dataclass(frozen=True)
class GatedDeltaNet:
    """The recurrence of `delta_net.py` in the place of attention.

    Attributes:
        n_key_heads: of queries and keys alike.
        n_value_heads: a multiple of them.
        d_state: width of every head.
        kernel: tokens that the convolution sees.
        value_heads: which key head a value head uses, "tiled" v mod n_key_heads, "grouped" v div
            their ratio. Grouped ones have the rows of decay and strength in one tensor.
    """

    n_key_heads: int
    n_value_heads: int
    d_state: int
    kernel: int
    value_heads: Literal["tiled", "grouped"]

    @property
    def n_heads(self) -> int:
        """Heads that attend to tokens: none."""
        return 0

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


Attention = GroupedQuery | GatedDeltaNet


@dataclass(frozen=True)
class BlockConfig:
    """One block.

    Attributes:
        attention: its kind, and that kind's numbers.
        ffn_norm: role of the norm before the FFN.
        d_dense: width of a dense FFN in the place of experts; 0 where there are experts.
        d_shared: width of a shared expert, which runs for every token; 0 for none.
        shared_gate: axes of the tensor whose sigmoid scales the shared expert; 0 for none.
    """

    attention: Attention
    ffn_norm: str = "ffn_norm"
    d_dense: int = 0
    d_shared: int = 0
    shared_gate: Literal[0, 1, 2] = 0

    @property
    def has_experts(self) -> bool:
        """Whether the block is a layer of the store."""
        return not self.d_dense


@dataclass(frozen=True)
class RouterConfig:
    """How experts are chosen and weighted; see `router.py`.

    Attributes:
        gating: from logits to scores; with "always" there is one expert, a dense FFN, and no
            router.
        renormalise: the weights of the chosen are divided by their sum.
        scale: of all weights.
        selection_bias: a bias is added to scores for the choice, and not to weights.
        groups: consecutive experts compete as so many groups first.
        groups_used: of them remain.
    """

    gating: Literal["softmax", "sigmoid", "always"]
    renormalise: bool
    scale: float = 1.0
    selection_bias: bool = False
    groups: int = 1
    groups_used: int = 1


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of one model, as its file states them."""

    arch: str  # one of `registry.FAMILIES`
    d_model: int
    vocab_size: int
    context_length: int  # tokens
    rms_eps: float
    tied_head: bool
    blocks: tuple[BlockConfig, ...]  # that run, in their order
    router: RouterConfig
    n_experts: int
    experts_per_token: int
    d_expert: int  # hidden width of one expert
    fused_gate_up: bool = False  # gate and up of all experts are one tensor, gate rows first
    skipped_blocks: int = 0  # blocks at the end of the file that predict further tokens (NextN)

    @property
    def has_dense_ffn(self) -> bool:
        """Whether every block's FFN is one expert that is always chosen."""
        return self.router.gating == "always"

    @property
    def n_blocks(self) -> int:
        """Blocks that run."""
        return len(self.blocks)

    @property
    def n_layers(self) -> int:
        """Blocks with experts in the store."""
        return len(self.block_of_layer)

    @functools.cached_property
    def block_of_layer(self) -> tuple[int, ...]:
        """The blocks that have experts, by layer."""
        return tuple(i for i, block in enumerate(self.blocks) if block.has_experts)

    @property
    def most_heads(self) -> int:
        """Query heads of the block that has most."""
        return max(block.attention.n_heads for block in self.blocks)

    @functools.cached_property
    def states(self) -> dict[str, tuple[State, int]]:
        """Every state by name, and how many blocks keep one."""
        found: dict[str, tuple[State, int]] = {}
        for block in self.blocks:
            for state in block.attention.states():
                found[state.name] = state, found.get(state.name, (state, 0))[1] + 1
        return found

    @functools.cached_property
    def state_places(self) -> tuple[dict[str, int], ...]:
        """Of each block, where its part of each state lies; past the end for states it has not."""
        taken = dict.fromkeys(self.states, 0)
        places = []
        for block in self.blocks:
            own = {state.name for state in block.attention.states()}
            places.append({n: taken[n] if n in own else self.states[n][1] for n in self.states})
            for name in own:
                taken[name] += 1
        return tuple(places)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.arch, self.d_model, self.n_experts, self.blocks, self.router))

    def __hash__(self) -> int:
        # Once: programs are looked up by it for every token.
        return self._hash


# Role → name in the file, where they differ. Roles with a suffix of their own have it there too.
_STORED_AS = {"router": "ffn_gate_inp.weight", "ssm_a": "ssm_a"}


def block_shapes(config: ModelConfig, block: int) -> Shapes:
    """Row-major shapes of the tensors of a block, by role."""
    spec, d = config.blocks[block], config.d_model
    shapes: Shapes = {"attn_norm": (d,), **spec.attention.tensors(d), spec.ffn_norm: (d,)}
    if spec.d_dense:
        return shapes | _mlp("", d, spec.d_dense)
    e, f = config.n_experts, config.d_expert
    if config.has_dense_ffn:
        # The only expert's, whose matrices have no axis of experts.
        return shapes | {"ffn_gate_exps": (f, d), "ffn_up_exps": (f, d), "ffn_down_exps": (d, f)}
    shapes["router"] = (e, d)
    if config.router.selection_bias:
        shapes["exp_probs_b.bias"] = (e,)
    if config.fused_gate_up:
        shapes["ffn_gate_up_exps"] = (e, 2 * f, d)
    else:
        shapes |= {"ffn_gate_exps": (e, f, d), "ffn_up_exps": (e, f, d)}
    shapes["ffn_down_exps"] = (e, d, f)
    if spec.d_shared:
        shapes |= _mlp("_shexp", d, spec.d_shared)
    if spec.shared_gate:
        shapes["ffn_gate_inp_shexp"] = (d,) if spec.shared_gate == 1 else (1, d)
    return shapes


def _mlp(suffix: str, d_model: int, width: int) -> Shapes:
    return {
        f"ffn_gate{suffix}": (width, d_model),
        f"ffn_up{suffix}": (width, d_model),
        f"ffn_down{suffix}": (d_model, width),
    }


def block_tensors(config: ModelConfig, block: int) -> dict[str, str]:
    """Names of the tensors of one block, by role."""
    return {role: f"blk.{block}.{_stored(config, role)}" for role in block_shapes(config, block)}


def _stored(config: ModelConfig, role: str) -> str:
    if config.has_dense_ffn:
        role = role.removesuffix("_exps")
    return role if "." in role else _STORED_AS.get(role, f"{role}.weight")


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, str]:
    """Names of the tensors of the block of one layer, by role."""
    return block_tensors(config, config.block_of_layer[layer])


def global_tensors(config: ModelConfig) -> dict[str, str]:
    """Names of the tensors outside the blocks, by role; no `output` when the head is tied."""
    names = {"token_embedding": TOKEN_EMBEDDING, "output_norm": OUTPUT_NORM}
    return names if config.tied_head else names | {"output": OUTPUT}


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Row-major shapes of all tensors by name, in the order in which files have them."""
    shapes: Shapes = {TOKEN_EMBEDDING: (config.vocab_size, config.d_model)}
    for block in range(config.n_blocks):
        names = block_tensors(config, block)
        shapes |= {names[role]: shape for role, shape in block_shapes(config, block).items()}
    shapes[OUTPUT_NORM] = (config.d_model,)
    if not config.tied_head:
        shapes[OUTPUT] = (config.vocab_size, config.d_model)
    return shapes
