"""Model families: each function makes a model of the keys of one architecture.

See `registry.FAMILIES`. Kinds of attention have files of their own.

Source: llama.cpp, the file of each in src/models/, and conversion/; transformers, models/.
"""

import math
from dataclasses import replace

import numpy as np

from hobbit_jax.model_file.metadata import flag, flags, integer, number, per_layer
from hobbit_jax.models.attention import GroupedQuery, Rope
from hobbit_jax.models.config import ROPE_DIVISORS, BlockConfig, ModelConfig, RouterConfig
from hobbit_jax.models.keys import (
    ROPE_BASE,
    Keys,
    any_router,
    delta_net,
    dense_then_experts,
    grouped_query,
    latent_attention,
    model,
    shared_expert,
    softmax_router,
)
from hobbit_jax.models.short_convolution import ShortConvolution

_QKV = ("attn_q", "attn_k", "attn_v")
_WEIGHTS_OF_CHOSEN = 3  # gguf.ExpertGatingFuncType; files of gpt-oss do not say it


def qwen3moe(keys: Keys) -> ModelConfig:
    """Qwen3 with experts: Qwen3-30B-A3B, Qwen3-Coder."""
    block = BlockConfig(grouped_query(keys, "neox", qk_norm="head"))
    return model(keys, block, softmax_router(keys, renormalise=True))


def qwen3(keys: Keys) -> ModelConfig:
    """Dense Qwen3."""
    block = BlockConfig(grouped_query(keys, "neox", qk_norm="head"))
    return model(keys, block, None)


def qwen2moe(keys: Keys) -> ModelConfig:
    """Qwen1.5-MoE-A2.7B, whose shared expert has a gate of its own."""
    attention = grouped_query(keys, "neox", qk_norm="none", biased=_QKV)
    block = BlockConfig(attention, **shared_expert(keys))
    return model(keys, block, softmax_router(keys, renormalise=False))


def qwen2(keys: Keys) -> ModelConfig:
    """Dense Qwen2, such as Qwen2.5-Coder-1.5B."""
    block = BlockConfig(grouped_query(keys, "neox", qk_norm="none", biased=_QKV))
    return model(keys, block, None)


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
    blocks = [recurs if r else attends for r in recurrent[: n_blocks - skipped]]
    router = softmax_router(keys, renormalise=True)
    return model(keys, blocks, router, skipped_blocks=skipped)


def llama(keys: Keys) -> ModelConfig:
    """Llama 2 and 3, Mistral, and Mixtral with its experts.

    The converter permutes rows of q and k for interleaved rotary pairs.
    """
    block = BlockConfig(grouped_query(keys, "norm", qk_norm="none"))
    has_experts = keys.read("expert_count", integer(), 0)
    router = softmax_router(keys, renormalise=True) if has_experts else None
    return model(keys, block, router, "feed_forward_length")


def olmoe(keys: Keys) -> ModelConfig:
    """OLMoE-1B-7B. Norms of q and k go over the whole projection, no head is tied."""
    block = BlockConfig(grouped_query(keys, "neox", qk_norm="full"))
    router = softmax_router(keys, renormalise=False)
    return replace(model(keys, block, router, "feed_forward_length"), tied_head=False)


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
    return model(
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
    pair = [BlockConfig(a, ffn_norm="post_attention_norm") for a in (windowed, full)]
    blocks = [pair[number % 2] for number in range(keys.block_count())]
    router = RouterConfig("softmax_of_chosen", renormalise=False, biased=True)
    return model(keys, blocks, router, expert_function="clipped_swiglu", expert_biases=True)


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


def lfm2moe(keys: Keys) -> ModelConfig:
    """LFM2-8B-A1B and -24B-A2B, of which a block without kv heads has a short convolution."""
    kv_heads_N = keys.read("attention.head_count_kv", per_layer(integer(), keys.block_count()))
    attends = grouped_query(keys, "neox", qk_norm="head", n_kv_heads=max(kv_heads_N))
    keys.expect("expert_weights_norm", True)
    router = replace(any_router(keys, "sigmoid"), renormalise=True)
    config = dense_then_experts(keys, attends, router)
    kernel = keys.read("shortconv.l_cache", integer(2, 2**10))
    convolves = ShortConvolution(config.d_model, kernel)
    blocks = tuple(
        block if n_kv_heads else replace(block, attention=convolves)
        for block, n_kv_heads in zip(config.blocks, kv_heads_N, strict=True)
    )
    return replace(config, blocks=blocks, output_norm="token_embd_norm.weight")


def deepseek2(keys: Keys) -> ModelConfig:
    """DeepSeek-V2, V2-Lite and V3, and what their files say likewise: GLM-4.7-Flash, Kanana-2."""
    # GLM-4.7-Flash, whose converter once did not write how experts are scored.
    is_glm = keys.block_count() in (47, 48) and keys.unchecked("vocab_size") == 154880
    router = any_router(keys, "sigmoid" if is_glm else "softmax")
    if router.gating == "softmax":
        # DeepSeek-V2 and V2.5; llama.cpp takes the two best there too, for which V3 was trained.
        router = replace(router, ranked_by=1)
    return dense_then_experts(keys, latent_attention(keys), router)


def gemma4(keys: Keys) -> ModelConfig:
    """gemma-4-26B-A4B.

    Most blocks see a window, with more and narrower key/value heads than the others, whose values
    are their raw keys. A dense FFN stands beside the experts, and each part between norms of its
    own.
    """
    if not keys.read("expert_count", integer(), 0):
        raise NotImplementedError(
            f"{keys.path}: a dense Gemma 4 (gemma4.expert_count is 0); supported are Gemma 4 "
            "models with experts, such as gemma-4-26B-A4B"
        )
    n_blocks = keys.block_count()
    windowed_N = keys.read("attention.sliding_window_pattern", per_layer(flag(), n_blocks))
    kv_heads_N = keys.read("attention.head_count_kv", per_layer(integer(1), n_blocks))
    d_beside = keys.of_every_layer("feed_forward_length")
    attentions = [
        _gemma4_attention(keys, number, *of_block)
        for number, of_block in enumerate(zip(windowed_N, kv_heads_N, strict=True))
    ]
    out_norm = "post_attention_norm"
    return model(
        keys,
        [
            BlockConfig(a, "pre_ffw_norm_2", attention_out_norm=out_norm, d_beside=d_beside)
            for a in attentions
        ],
        RouterConfig("softmax", renormalise=True, own_input=True, expert_scale=True),
        expert_function="geglu",
        rope_divisors=max(len(kind.rope.divisors) for kind in attentions),
        embedding_scale=math.sqrt(keys.read("embedding_length", integer(1))),
        logit_softcap=keys.read("final_logit_softcapping", number(0.0, 1e6), 0.0),
    )


def _gemma4_attention(keys: Keys, block: int, windowed: bool, n_kv_heads: int) -> GroupedQuery:
    """Of one block."""
    kind = "_swa" if windowed else ""
    n_heads = keys.of_every_layer("attention.head_count")
    head_dim, value_dim = (
        keys.read(f"attention.{what}_length{kind}", integer(1)) for what in ("key", "value")
    )
    rope_dim = keys.read(f"rope.dimension_count{kind}", integer(1), head_dim)
    if (value_dim, rope_dim) != (head_dim, head_dim):
        raise NotImplementedError(
            f"{keys.path}: heads of {head_dim} (key_length{kind}) and {value_dim} "
            f"(value_length{kind}), of which {rope_dim} rotate; supported are whole heads of one "
            "width"
        )
    if head_dim % 2 or n_heads % n_kv_heads:
        raise keys.contradiction(
            f"{n_heads} heads of {head_dim} in block {block}, expected an even width and a "
            f"multiple of the {n_kv_heads} kv heads"
        )
    base = keys.read(f"rope.freq_base{kind}", ROPE_BASE)
    divisors = () if windowed else _rope_divisors(keys, head_dim // 2)
    return GroupedQuery(
        n_heads,
        n_kv_heads,
        head_dim,
        Rope(base, rope_dim, "neox", divisors=divisors),
        "head",
        window=keys.read("attention.sliding_window", integer(1)) if windowed else 0,
        score_scale=1.0,
        values_are_keys=f"blk.{block}.attn_v.weight" not in keys.file.tensors,
        value_norm=True,
    )


def _rope_divisors(keys: Keys, pairs: int) -> tuple[float, ...]:
    """Of the rotary frequencies of heads without a window; 1e30 stops a pair."""
    tensor = keys.file.tensors.get(ROPE_DIVISORS)
    if tensor is None or tensor.shape != (pairs,) or tensor.format != "F32":
        got = "missing" if tensor is None else f"{tensor.format} {tensor.shape}"
        raise ValueError(
            f"{keys.path}: tensor {ROPE_DIVISORS!r} is {got}, expected F32 of shape ({pairs},); "
            "download or convert the model again"
        )
    values = tensor.raw.view("<f4").reshape(-1)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"{keys.path}: tensor {ROPE_DIVISORS!r} has an entry that is no positive number; "
            "download the model again"
        )
    return tuple(values.tolist())
