"""Reading a family's metadata: checked keys, and the refusal of what nobody has read.

Owns the keys that families share, and the rule that a key which changes the arithmetic is either
read by its family or has the value that changes nothing. Defaults are those of the format, never
guesses: llama.cpp computes a file without the key so. Numbers that are impossible or do not fit
each other are a ValueError, and what we do not compute is a NotImplementedError.

Source: llama.cpp, src/llama-model.cpp and src/models/ (keys, defaults).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from hobbit_jax.model_file import metadata
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.model_file.metadata import REQUIRED, Kind, Required, flag, integer, number, shown
from hobbit_jax.models.attention import GroupedQuery, Rope, Yarn
from hobbit_jax.models.config import OUTPUT, Attention, BlockConfig, ModelConfig, RouterConfig
from hobbit_jax.models.delta_net import GatedDeltaNet
from hobbit_jax.models.latent_attention import LatentAttention

T = TypeVar("T")

# Beyond these bounds float32 arithmetic gives zeros or NaN, not another model.
_RMS_EPS = number(1e-30, 1.0)
ROPE_BASE = number(1.0, 1e30)
_POSITIVE = number(1e-30, 1e30)
# gguf.ExpertGatingFuncType, and llama.cpp's of 4; 0 is "not said".
_GATINGS: dict[int, Literal["softmax", "sigmoid", "sqrt_softplus"]]
_GATINGS = {1: "softmax", 2: "sigmoid", 4: "sqrt_softplus"}

# Values with which a key changes nothing; the first is also the one that its absence means.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear", "yarn", "longrope"),  # all equal at factor 1
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # of the ramp; -1 is "not said"
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "expert_weights_scale": (1.0, 0.0),
    "expert_weights_norm": (False,),
    "expert_gating_func": (1, 0),  # softmax
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (1, 0),
    "leading_dense_block_count": (0,),
    "expert_count": (0,),
    "nextn_predict_layers": (0,),
    "interleave_moe_layer_step": (1, 0),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attention.temperature_length": (0,),
    "attention.causal": (True,),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.shared_kv_layers": (0,),
    "embedding_length_per_layer_input": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0, 0.0),
    "embedding_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
}


class Keys:
    """Checked access to `{arch}.*` metadata of one file, which remembers what was read."""

    def __init__(self, file: GGUFFile, arch: str):
        self.file, self.arch, self.path = file, arch, file.paths[0]
        self._read: set[str] = set()

    def read(self, key: str, kind: Kind[T], default: T | Required = REQUIRED) -> T:
        """See `GGUFFile.read`."""
        self._read.add(key)
        return self.file.read(f"{self.arch}.{key}", kind, default)

    def unchecked(self, key: str, default: Any = None) -> Any:
        """For comparing only: a value of a wrong type equals none of the right ones."""
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses any value but some, the first of which is what the key's absence means."""
        self._read.add(key)
        value = self.unchecked(key, allowed[0])
        if value not in allowed:
            raise NotImplementedError(
                f"{self.path}: {self.arch}.{key} is {shown(value)}; supported are models where it "
                f"is {allowed[0]!r} or absent"
            )

    def contradiction(self, what: str) -> ValueError:
        """The error for numbers that do not fit each other."""
        return ValueError(f"{self.path}: the metadata gives {what}; convert the model again")

    def refuse_unread(self) -> None:
        """Refuses every key that changes the arithmetic and that the family did not read."""
        neutral = dict(_NEUTRAL)
        if self.unchecked("rope.scaling.type") != "none":  # with "none", llama.cpp takes no factor
            factor = "rope.scaling.factor"
            if self.unchecked(factor) is None:
                factor = "rope.scale_linear"  # its old name
            neutral[factor] = (1.0, 0.0)  # 0 is "not said"
        for key, allowed in neutral.items():
            if key not in self._read:
                self.expect(key, *allowed)
        if "attention.sliding_window" in self._read:
            return
        window = self.read("attention.sliding_window", integer(0, 2**32 - 1), 0)
        context = self.read("context_length", integer(1))
        if 0 < window < context:
            raise NotImplementedError(
                f"{self.path}: attention over a sliding window of {window} tokens in a context of "
                f"{context}; supported is attention over the whole context"
            )

    def block_count(self) -> int:
        """All blocks of the file, held against its tensors before anything is made of each."""
        n_tensors = len(self.file.tensors)
        return self.read("block_count", integer(1, n_tensors, "the file's number of tensors"))

    def of_every_layer(self, key: str, default: int | Required = REQUIRED) -> int:
        """A positive count that is the same in all blocks, where the file may list it for each."""
        one_each = metadata.per_layer(integer(1), self.block_count())
        values = self.read(key, one_each, default if isinstance(default, Required) else [default])
        if len(set(values)) > 1:
            raise NotImplementedError(
                f"{self.path}: metadata key {self.arch}.{key} has one value per layer, and they "
                "differ; supported are models with equal layers"
            )
        return values[0]


def rotary(keys: Keys, dim: int, style: Literal["neox", "norm"]) -> Rope:
    """Rotation of `dim` values, slowed down where the file says so."""
    base = keys.read("rope.freq_base", ROPE_BASE, 10000.0)
    factor = keys.unchecked("rope.scaling.factor", 1.0)
    if keys.unchecked("rope.scaling.type") != "yarn" or factor in (0.0, 1.0):  # 0 is "not said"
        return Rope(base, dim, style)
    factor = keys.read("rope.scaling.factor", number(1.0, 1e6))
    if base == 1.0:
        raise ValueError(f"{keys.path}: {keys.arch}.rope.freq_base is 1; YaRN wants more")
    context = keys.read("context_length", integer(1))
    yarn = Yarn(
        factor,
        trained_context=keys.read("rope.scaling.original_context_length", integer(1), context),
        beta_fast=keys.read("rope.scaling.yarn_beta_fast", _POSITIVE, 32.0),
        beta_slow=keys.read("rope.scaling.yarn_beta_slow", _POSITIVE, 1.0),
        magnitude=1 + 0.1 * math.log(factor),
    )
    return Rope(base, dim, style, yarn)


def grouped_query(
    keys: Keys,
    rope_style: Literal["neox", "norm"],
    qk_norm: Literal["none", "head", "full"],
    partial_rope: bool = False,
    n_kv_heads: int = 0,
    **others: Any,
) -> GroupedQuery:
    """Attention that is the same in every block that has it, with `others` of its fields.

    `n_kv_heads` 0 reads their number; `partial_rope` allows heads of which a part rotates.
    """
    n_heads = keys.of_every_layer("attention.head_count")
    n_kv_heads = n_kv_heads or keys.of_every_layer("attention.head_count_kv", n_heads)
    d_model = keys.read("embedding_length", integer(1))
    head_dim = keys.read("attention.key_length", integer(1), d_model // n_heads)
    value_dim = keys.read("attention.value_length", integer(1), head_dim)
    rope_dim = keys.read("rope.dimension_count", integer(1), head_dim)
    if value_dim != head_dim:
        raise NotImplementedError(
            f"{keys.path}: heads of {head_dim} (key_length) and {value_dim} (value_length); "
            "supported are heads of one width"
        )
    if rope_dim != head_dim and not partial_rope:
        raise NotImplementedError(
            f"{keys.path}: {rope_dim} of {head_dim} head dimensions rotate; "
            "supported is rotation of whole heads"
        )
    if rope_dim % 2 or rope_dim > head_dim:
        raise keys.contradiction(
            f"{rope_dim} rotated values of a head (rope.dimension_count), expected an even number "
            f"up to {head_dim}"
        )
    if n_heads % n_kv_heads:
        raise keys.contradiction(
            f"{n_heads} heads, expected a multiple of the {n_kv_heads} kv heads"
        )
    rope = rotary(keys, rope_dim, rope_style)
    return GroupedQuery(n_heads, n_kv_heads, head_dim, rope, qk_norm, **others)


def latent_attention(keys: Keys) -> LatentAttention:
    """DeepSeek's, which is one shared key/value head in the file."""
    if keys.unchecked("attention.key_length_mla") is None:
        raise NotImplementedError(
            f"{keys.path}: {keys.arch}.attention.key_length_mla is missing, so keys and values are "
            "one tensor (attn_kv_b), as converters wrote before April 2025; supported are attn_k_b "
            "and attn_v_b: convert the model again with a current llama.cpp"
        )
    d_latent = keys.read("attention.kv_lora_rank", integer(1))
    rope_dim = keys.read("rope.dimension_count", integer(1))
    key_dim = keys.read("attention.key_length_mla", integer(1))
    if rope_dim % 2 or rope_dim >= key_dim:
        raise keys.contradiction(
            f"{rope_dim} rotated values of a head (rope.dimension_count), expected an even number "
            f"below its {key_dim} (key_length_mla)"
        )
    # As attention of many heads to one, which the latent vector is.
    keys.expect("attention.head_count_kv", 1)
    keys.expect("attention.key_length", d_latent + rope_dim)
    keys.expect("attention.value_length", d_latent)
    rope = rotary(keys, rope_dim, "norm")
    multiplier = keys.read("rope.scaling.yarn_log_multiplier", number(0.0, 1.0), 0.0)
    if rope.yarn is not None:
        if not multiplier:
            raise NotImplementedError(
                f"{keys.path}: YaRN without {keys.arch}.rope.scaling.yarn_log_multiplier; "
                "supported is YaRN with it, as DeepSeek-V2 has"
            )
        # Scores are multiplied instead.
        rope = replace(rope, yarn=replace(rope.yarn, magnitude=1.0))
    return LatentAttention(
        n_heads=keys.read("attention.head_count", integer(1)),
        d_latent=d_latent,
        d_query_latent=keys.read("attention.q_lora_rank", integer(), 0),
        plain_dim=key_dim - rope_dim,
        value_dim=keys.read("attention.value_length_mla", integer(1)),
        rope=rope,
        log_multiplier=multiplier,
    )


def delta_net(keys: Keys, value_heads: Literal["tiled", "grouped"]) -> GatedDeltaNet:
    """The gated delta net of Qwen's hybrids."""
    key_heads, heads, d_state, inner, kernel = (
        keys.read(f"ssm.{key}", integer(1, 2**20))
        for key in ("group_count", "time_step_rank", "state_size", "inner_size", "conv_kernel")
    )
    if heads % key_heads:
        raise keys.contradiction(
            f"{heads} value heads (ssm.time_step_rank), expected a multiple of the {key_heads} key "
            "heads"
        )
    if inner != heads * d_state:
        raise NotImplementedError(
            f"{keys.path}: {keys.arch}.ssm.inner_size is {inner}; supported are {heads} value "
            f"heads as wide as the key heads, {heads * d_state} in all"
        )
    return GatedDeltaNet(key_heads, heads, d_state, kernel, value_heads)


def experts(keys: Keys, width_key: str = "expert_feed_forward_length") -> dict[str, Any]:
    """The fields of `ModelConfig` about experts, by name.

    Where `width_key` is absent or 0, an expert's width is feed_forward_length over the experts per
    token.
    """
    used, n_experts = (keys.read(f"expert_{what}", integer(1)) for what in ("used_count", "count"))
    if used > n_experts:
        raise keys.contradiction(
            f"{used} experts per token, expected at most the number of experts, {n_experts}"
        )
    all_widths = "feed_forward_length"
    if width_key != all_widths and not keys.unchecked(width_key) and keys.unchecked(all_widths):
        d_expert = keys.of_every_layer(all_widths) // used
    else:
        d_expert = keys.of_every_layer(width_key)
    return {
        "n_experts": n_experts,
        "experts_per_token": used,
        "d_expert": d_expert,
        "fused_gate_up": any(".ffn_gate_up_exps." in name for name in keys.file.tensors),
    }


def shared_expert(keys: Keys) -> dict[str, Any]:
    """The fields of `BlockConfig` about a shared expert behind a gate, by name."""
    gate = keys.file.tensors.get("blk.0.ffn_gate_inp_shexp.weight")
    return {
        "d_shared": keys.read("expert_shared_feed_forward_length", integer(1)),
        # Converters wrote either shape.
        "shared_gate": 1 if gate is not None and len(gate.shape) == 1 else 2,
    }


def model(
    keys: Keys,
    blocks: BlockConfig | Sequence[BlockConfig],
    router: RouterConfig | None,
    width_key: str = "expert_feed_forward_length",
    **others: Any,
) -> ModelConfig:
    """A model of these blocks, or of equal ones, with `others` of its fields.

    For `width_key` see `experts`. Without a router each block's FFN is its only expert.
    """
    if isinstance(blocks, BlockConfig):
        blocks = [blocks] * keys.block_count()
    if router is None:
        width = keys.of_every_layer("feed_forward_length")
        ffn = {"n_experts": 1, "experts_per_token": 1, "d_expert": width}
        router = RouterConfig("always", renormalise=False)
    else:
        ffn = experts(keys, width_key)
    tokens = keys.file.read("tokenizer.ggml.tokens", metadata.texts(), [])
    return ModelConfig(
        arch=keys.arch,
        d_model=keys.read("embedding_length", integer(1)),
        # Rows of the embedding: the tokens of the file or, without a tokenizer, its own key.
        vocab_size=len(tokens) or keys.read("vocab_size", integer(1)),
        context_length=keys.read("context_length", integer(1)),
        rms_eps=keys.read("attention.layer_norm_rms_epsilon", _RMS_EPS),
        tied_head=OUTPUT not in keys.file.tensors,
        blocks=tuple(blocks),
        router=router,
        **ffn,
        **others,
    )


def softmax_router(keys: Keys, renormalise: bool) -> RouterConfig:
    """A softmax over all experts, in architectures that fix whether weights are renormalised."""
    keys.expect("expert_weights_norm", renormalise)
    return RouterConfig("softmax", renormalise)


def dense_then_experts(
    keys: Keys, attention: Attention, router: RouterConfig, ffn_norm: str = "ffn_norm"
) -> ModelConfig:
    """A model whose first blocks have a dense FFN.

    The others may have a shared expert without a gate. Blocks at the end that predict further
    tokens (NextN) are left out.
    """
    skipped = keys.read("nextn_predict_layers", integer(), 0)
    leading = keys.read("leading_dense_block_count", integer(), 0)
    n_blocks = keys.block_count() - skipped
    if leading >= n_blocks:
        raise keys.contradiction(
            f"{leading} leading dense blocks (leading_dense_block_count) of {n_blocks}, expected "
            "fewer"
        )
    d_dense = keys.of_every_layer("feed_forward_length") if leading else 0
    dense = (BlockConfig(attention, ffn_norm, d_dense=d_dense),) * leading
    d_expert = experts(keys)["d_expert"]
    d_shared = d_expert * keys.read("expert_shared_count", integer(0, 2**10), 0)
    own_width = keys.read("expert_shared_feed_forward_length", integer(), 0)
    stored = keys.file.tensors.get(f"blk.{leading}.ffn_gate_shexp.weight")
    if (d_shared or own_width) and stored is not None and stored.shape[0]:
        d_shared = stored.shape[0]  # families differ in what the two keys mean
    block = BlockConfig(attention, ffn_norm, d_shared=d_shared)
    blocks = (*dense, *[block] * (n_blocks - leading))
    return model(keys, blocks, router, skipped_blocks=skipped)


def any_router(keys: Keys, gating: Literal["softmax", "sigmoid"]) -> RouterConfig:
    """A router of which the file says everything; `gating` is what it means by saying nothing."""
    code = keys.read("expert_gating_func", integer(), 0)
    if code and code not in _GATINGS:
        raise NotImplementedError(
            f"{keys.path}: {keys.arch}.expert_gating_func is {code}; supported are "
            + ", ".join(f"{known} ({name})" for known, name in _GATINGS.items())
        )
    n_experts = keys.read("expert_count", integer(1))
    groups = max(1, keys.read("expert_group_count", integer(0, n_experts), 0))
    used = keys.read("expert_group_used_count", integer(0, groups), 0) if groups > 1 else 1
    chosen = keys.read("expert_used_count", integer(1))
    if groups > 1 and (n_experts % groups or n_experts < 2 * groups):
        raise keys.contradiction(
            f"{n_experts} experts in {groups} groups (expert_group_count), expected equal groups "
            "of two or more"
        )
    if chosen > used * (n_experts // groups):
        raise keys.contradiction(
            f"{chosen} experts per token out of {used} groups of {n_experts // groups} "
            "(expert_group_used_count)"
        )
    return RouterConfig(
        gating=_GATINGS.get(code, gating),
        renormalise=keys.read("expert_weights_norm", flag(), False),
        scale=keys.read("expert_weights_scale", number(0.0, 1e6), 1.0) or 1.0,  # 0 is "not said"
        selection_bias=any(name.endswith(".exp_probs_b.bias") for name in keys.file.tensors),
        groups=groups,
        groups_used=used,
    )
