"""Families that consist of known parts; one with a kind of attention of its own has its own file.

Each function makes a model of the keys of one architecture, see `registry.FAMILIES`.

Source: llama.cpp, the file of each in src/models/, and conversion/; transformers, models/.
"""

from dataclasses import replace

from hobbit_jax.model_file.metadata import flags, integer, number
from hobbit_jax.models.config import BlockConfig, ModelConfig, RouterConfig
from hobbit_jax.models.keys import (
    Keys,
    any_router,
    delta_net,
    dense_then_experts,
    ends,
    equal_blocks,
    experts,
    grouped_query,
    shared_expert,
    softmax_router,
)

_QKV = ("attn_q", "attn_k", "attn_v")
_WEIGHTS_OF_CHOSEN = 3  # gguf.ExpertGatingFuncType; files of gpt-oss do not say it


def qwen3moe(keys: Keys) -> ModelConfig:
    """Qwen3 with experts: Qwen3-30B-A3B, Qwen3-Coder."""
    block = BlockConfig(grouped_query(keys, "neox", qk_norm="head"))
    return equal_blocks(keys, block, softmax_router(keys, renormalise=True))


def qwen3(keys: Keys) -> ModelConfig:
    """Dense Qwen3."""
    return equal_blocks(keys, BlockConfig(grouped_query(keys, "neox", qk_norm="head")), None)


def qwen2moe(keys: Keys) -> ModelConfig:
    """Qwen1.5-MoE-A2.7B, whose shared expert has a gate of its own."""
    attention = grouped_query(keys, "neox", qk_norm="none", biased=_QKV)
    block = BlockConfig(attention, **shared_expert(keys))
    return equal_blocks(keys, block, softmax_router(keys, renormalise=False))


def qwen2(keys: Keys) -> ModelConfig:
    """Dense Qwen2, such as Qwen2.5-Coder-1.5B."""
    block = BlockConfig(grouped_query(keys, "neox", qk_norm="none", biased=_QKV))
    return equal_blocks(keys, block, None)


def qwen35moe(keys: Keys) -> ModelConfig:
    """Qwen3.5 and 3.6 with experts, and Qwen3-Next.

    Three of four blocks are gated delta nets, the others gated attention. Blocks for multi-token
    prediction at the end of a file are not run. Sections of the rotary embedding matter for images
    only: a text has one position for all.
    """
    n_blocks = keys.block_count()
    skipped = keys.read("nextn_predict_layers", integer(0, n_blocks - 1), 0)
    interval = keys.read("full_attention_interval", integer(1), 4)
    by_interval = [(block + 1) % interval != 0 for block in range(n_blocks)]
    recurrent = keys.read("attention.recurrent_layers", flags(n_blocks), by_interval)
    attends = BlockConfig(
        grouped_query(keys, "neox", qk_norm="head", partial_rope=True, gated=True),
        ffn_norm="post_attention_norm",
        **shared_expert(keys),
    )
    value_heads = "grouped" if keys.arch == "qwen3next" else "tiled"
    recurs = replace(attends, attention=delta_net(keys, value_heads))
    return ModelConfig(
        **ends(keys),
        blocks=tuple(recurs if r else attends for r in recurrent[: n_blocks - skipped]),
        router=softmax_router(keys, renormalise=True),
        **experts(keys),
        skipped_blocks=skipped,
    )


def llama(keys: Keys) -> ModelConfig:
    """Llama 2 and 3, Mistral, and Mixtral with its experts.

    The converter permutes rows of q and k for interleaved rotary pairs.
    """
    block = BlockConfig(grouped_query(keys, "norm", qk_norm="none"))
    has_experts = keys.read("expert_count", integer(), 0)
    router = softmax_router(keys, renormalise=True) if has_experts else None
    return equal_blocks(keys, block, router, "feed_forward_length")


def olmoe(keys: Keys) -> ModelConfig:
    """OLMoE-1B-7B. Norms of q and k go over the whole projection, no head is tied."""
    block = BlockConfig(grouped_query(keys, "neox", qk_norm="full"))
    router = softmax_router(keys, renormalise=False)
    return replace(equal_blocks(keys, block, router, "feed_forward_length"), tied_head=False)


def granitemoe(keys: Keys) -> ModelConfig:
    """Granite 3 with experts, such as granite-3.1-3b-a800m, and hybrids that only attend.

    A Mixtral whose embedding, attention, branches and logits are scaled, with a shared expert in
    some.
    """
    scale = number(0.0, 1e6)
    keys.expect("rope.scaling.finetuned", True)  # false means no rotation here
    score_scale = keys.read("attention.scale", scale, 0.0) or None  # 0 is "not said"
    attention = grouped_query(keys, "norm", qk_norm="none", score_scale=score_scale)
    d_shared = keys.read("expert_shared_feed_forward_length", integer(), 0)
    branches = keys.read("residual_scale", scale, 0.0) or 1.0
    return equal_blocks(
        keys,
        BlockConfig(attention, d_shared=d_shared),
        # What experts add is scaled by their weights.
        replace(softmax_router(keys, renormalise=True), scale=branches),
        "feed_forward_length",
        residual_scale=branches,
        embedding_scale=keys.read("embedding_scale", scale, 0.0) or 1.0,
        logit_divisor=keys.read("logit_scale", number(1e-6, 1e6)),
    )


def gpt_oss(keys: Keys) -> ModelConfig:
    """gpt-oss-20b and -120b.

    All projections, the router and the experts have biases, and the experts a SwiGLU of their own.
    Heads have sinks, and every other layer, from the first on, sees a window.
    """
    keys.expect("expert_gating_func", 0, _WEIGHTS_OF_CHOSEN)
    biased = (*_QKV, "attn_output")
    full = grouped_query(keys, "neox", qk_norm="none", biased=biased, sinks=True)
    windowed = replace(full, window=keys.read("attention.sliding_window", integer(1)))
    blocks = [BlockConfig(a, ffn_norm="post_attention_norm") for a in (windowed, full)]
    return ModelConfig(
        **ends(keys),
        blocks=tuple(blocks[number % 2] for number in range(keys.block_count())),
        router=RouterConfig("softmax_of_chosen", renormalise=False, biased=True),
        expert_function="clipped_swiglu",
        expert_biases=True,
        **experts(keys),
    )


def bailingmoe2(keys: Keys) -> ModelConfig:
    """Ling-mini, Ling-flash and Ring-mini 2.0: one matrix of q, k and v, and groups of experts."""
    attention = grouped_query(keys, "neox", qk_norm="head", partial_rope=True, fused=True)
    return dense_then_experts(keys, attention, any_router(keys, "softmax"))


def ernie4_5_moe(keys: Keys) -> ModelConfig:
    """ERNIE 4.5 with experts: a softmax whose choice is biased, always renormalised."""
    attention = grouped_query(keys, "norm", qk_norm="none")
    bias = any(name.endswith(".exp_probs_b.bias") for name in keys.file.tensors)
    keys.expect("expert_weights_norm", True)
    router = RouterConfig("softmax", renormalise=True, selection_bias=bias)
    return dense_then_experts(keys, attention, router)


def glm4moe(keys: Keys) -> ModelConfig:
    """GLM-4.5, GLM-4.5-Air, GLM-4.6 and 4.7, and Solar-Open."""
    tensors = keys.file.tensors
    attention = grouped_query(
        keys,
        "neox",
        qk_norm="head" if "blk.0.attn_q_norm.weight" in tensors else "none",  # GLM-4.5 has it
        partial_rope=True,
        biased=tuple(role for role in _QKV if f"blk.0.{role}.bias" in tensors),
    )
    router = any_router(keys, "sigmoid")
    return dense_then_experts(keys, attention, router, ffn_norm="post_attention_norm")
