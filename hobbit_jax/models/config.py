"""What a model is made of: blocks by kind, router, experts, and what it keeps of a sequence.

Owns the types in which a family (`registry.py`) describes a file, and everything that follows from
them alone: names and shapes of tensors, and of the states that a sequence keeps. No arrays here.

A *block* is one of the file's `blk.N`. A *layer* (the letter L) is a block with experts in the
store: store, plans, traces and caches count layers, in the order of their blocks, and leave out
blocks with a dense FFN.

Source: llama.cpp, src/models/ (shapes, defaults); gguf.constants (names).
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from pallas_kernels.reference import ExpertFunction

TOKEN_EMBEDDING = "token_embd.weight"
ROPE_DIVISORS = "rope_freqs.weight"
OUTPUT = "output.weight"  # absent when the head is tied to the embedding
OUTPUT_SCALE = "output.scale"

Shapes = dict[str, tuple[int, ...]]  # row-major, by role


class State(NamedTuple):
    """An array that blocks of one kind keep of each sequence.

    Blocks that use the same name keep it in one array, each at its own place.
    """

    name: str
    shape: tuple[int, ...]  # of one token, or of one sequence
    by_token: bool  # every token has its own; the others are replaced by the next token's


class Attention(Protocol):
    """What moves information between tokens: attention of some kind, or a recurrence.

    Each kind is a frozen dataclass in the module that computes it (`layer.MIXERS`).
    """

    @property
    def n_heads(self) -> int:
        """Heads that attend to tokens."""
        ...

    @property
    def passed_width(self) -> int:
        """Numbers of a token that go from `Mixer.project` to `Mixer.mix`."""
        ...

    def tensors(self, d_model: int) -> Shapes:
        """Those of a block."""
        ...

    def states(self) -> tuple[State, ...]:
        """What a block keeps of a sequence."""
        ...


@dataclass(frozen=True)
class BlockConfig:
    """One block. A width of 0, like a role of "", means that it has no such part."""

    attention: Attention
    ffn_norm: str = "ffn_norm"  # role of the norm before the FFN
    d_dense: int = 0  # width of a dense FFN in the place of experts
    d_shared: int = 0  # width of a shared expert, which runs for every token
    shared_gate: Literal[0, 1, 2] = 0  # axes of the tensor whose sigmoid scales it; 0 for none
    attention_out_norm: str = ""  # role of a norm of what attention adds to the stream
    # Width of a dense FFN whose input and output are normalised apart from those of the experts
    # beside it (`layer.Beside`).
    d_beside: int = 0

    @property
    def has_experts(self) -> bool:
        """Whether the block is a layer of the store."""
        return not self.d_dense


@dataclass(frozen=True)
class RouterConfig:
    """How experts are chosen and weighted; see `router.py`."""

    # From logits to scores. "sqrt_softplus" is the root of log(1 + exp(logit)); "softmax_of_chosen"
    # chooses by logits; with "always" there is one expert, a dense FFN, and no router.
    gating: Literal["softmax", "sigmoid", "sqrt_softplus", "softmax_of_chosen", "always"]
    renormalise: bool  # the weights of the chosen are divided by their sum
    scale: float = 1.0  # of all weights
    selection_bias: bool = False  # a bias is added to scores for the choice, and not to weights
    groups: int = 1  # equal groups of consecutive experts, which compete first
    groups_used: int = 1  # groups whose experts may be chosen
    ranked_by: int = 2  # number of best scores whose sum ranks a group
    biased: bool = False  # logits have a bias
    own_input: bool = False  # it reads the stream, normalised and scaled apart from experts' input
    expert_scale: bool = False  # in the end, each expert's weight has a factor of its own


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
    expert_function: ExpertFunction = "swiglu"  # of the dense FFNs too
    expert_biases: bool = False
    output_norm: str = "output_norm.weight"  # name of the tensor
    rope_divisors: int = 0  # numbers that the tensor `ROPE_DIVISORS` has
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and dense FFNs add; experts' weights have it
    logit_divisor: float = 1.0
    logit_softcap: float = 0.0  # c of c * tanh(logits / c); 0 for none
    scales: frozenset[str] = frozenset()  # names of factors of whole matrices' products (NVFP4)

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

    @functools.cached_property
    def states(self) -> dict[str, tuple[State, int]]:
        """Every state by name, and how many blocks keep one."""
        kept = [state for block in self.blocks for state in block.attention.states()]
        return {state.name: (state, kept.count(state)) for state in kept}

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


# Norms of a dense FFN's input and output, of the experts' output, and of the sum of both.
BESIDE_NORMS = ("ffn_norm", "post_ffw_norm_1", "post_ffw_norm_2", "post_ffw_norm")


def block_shapes(config: ModelConfig, block: int) -> Shapes:
    """Row-major shapes of the tensors of a block, by role.

    A scale of a matrix is one number, and that of a stack one for each of its matrices.
    """
    shapes = _unscaled_shapes(config, block)
    scales = {f"{role}.scale": shape[:-2] or (1,) for role, shape in shapes.items()}
    there = (role for role in scales if _name(config, block, role) in config.scales)
    return shapes | {role: scales[role] for role in there}


def _unscaled_shapes(config: ModelConfig, block: int) -> Shapes:
    spec, d = config.blocks[block], config.d_model
    norms = ("attn_norm", spec.ffn_norm, *filter(None, [spec.attention_out_norm]))
    shapes: Shapes = {**dict.fromkeys(norms, (d,)), **spec.attention.tensors(d)}
    if spec.d_dense:
        return shapes | _mlp("", d, spec.d_dense)
    e, f = config.n_experts, config.d_expert
    if config.has_dense_ffn:
        # The only expert's, whose matrices have no axis of experts.
        return shapes | {"ffn_gate_exps": (f, d), "ffn_up_exps": (f, d), "ffn_down_exps": (d, f)}
    shapes["router"] = (e, d)
    if config.router.selection_bias:
        shapes["exp_probs_b.bias"] = (e,)
    if config.router.biased:
        shapes["router.bias"] = (e,)
    if config.router.own_input:
        shapes["router.scale"] = (d,)
    if config.router.expert_scale:
        shapes["ffn_down_exps.scale"] = (e,)
    if config.expert_biases:
        shapes |= {"ffn_gate_exps.bias": (e, f), "ffn_up_exps.bias": (e, f)}
        shapes["ffn_down_exps.bias"] = (e, d)
    if config.fused_gate_up:
        shapes["ffn_gate_up_exps"] = (e, 2 * f, d)
    else:
        shapes |= {"ffn_gate_exps": (e, f, d), "ffn_up_exps": (e, f, d)}
    shapes["ffn_down_exps"] = (e, d, f)
    if spec.d_shared:
        shapes |= _mlp("_shexp", d, spec.d_shared)
    if spec.shared_gate:
        shapes["ffn_gate_inp_shexp"] = (d,) if spec.shared_gate == 1 else (1, d)
    if spec.d_beside:
        shapes |= dict.fromkeys(BESIDE_NORMS, (d,)) | _mlp("", d, spec.d_beside)
        shapes["layer_output_scale"] = (1,)
    return shapes


def _mlp(suffix: str, d_model: int, width: int) -> Shapes:
    return {
        f"ffn_gate{suffix}": (width, d_model),
        f"ffn_up{suffix}": (width, d_model),
        f"ffn_down{suffix}": (d_model, width),
    }


def block_tensors(config: ModelConfig, block: int) -> dict[str, str]:
    """Names of the tensors of one block, by role."""
    return {role: _name(config, block, role) for role in block_shapes(config, block)}


def _name(config: ModelConfig, block: int, role: str) -> str:
    """In the file. A role without "bias" or "scale" is a "weight"."""
    if role == "ssm_a":  # the only one without a suffix
        return f"blk.{block}.{role}"
    base, _, suffix = role.rpartition(".")
    if suffix not in ("bias", "scale"):
        base, suffix = role, "weight"
    if config.has_dense_ffn:
        base = base.removesuffix("_exps")
    return f"blk.{block}.{'ffn_gate_inp' if base == 'router' else base}.{suffix}"


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, str]:
    """Names of the tensors of the block of one layer, by role."""
    return block_tensors(config, config.block_of_layer[layer])


def global_tensors(config: ModelConfig) -> dict[str, str]:
    """Names of the tensors outside the blocks, by role; no `output` when the head is tied."""
    names = {"token_embedding": TOKEN_EMBEDDING, "output_norm": config.output_norm}
    if not config.tied_head:
        names["output"] = OUTPUT
        if OUTPUT_SCALE in config.scales:
            names["output.scale"] = OUTPUT_SCALE
    return names


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Row-major shapes of all tensors by name, in the order in which files have them."""
    shapes: Shapes = {TOKEN_EMBEDDING: (config.vocab_size, config.d_model)}
    for block in range(config.n_blocks):
        names = block_tensors(config, block)
        shapes |= {names[role]: shape for role, shape in block_shapes(config, block).items()}
    shapes[config.output_norm] = (config.d_model,)
    if config.rope_divisors:
        shapes[ROPE_DIVISORS] = (config.rope_divisors,)
    if not config.tied_head:
        shapes[OUTPUT] = (config.vocab_size, config.d_model)
        if OUTPUT_SCALE in config.scales:
            shapes[OUTPUT_SCALE] = (1,)
    return shapes
