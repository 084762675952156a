"""DeepSeek-V2, V2-Lite and V3, and what their files say likewise: GLM-4.7-Flash, Kanana-2.

Latent attention, in the file as one shared key/value head; then a dense FFN in the first blocks and
experts beside a shared one in the others.

Source: llama.cpp, src/models/deepseek2.cpp; transformers, models/deepseek_{v2,v3}.
"""

from dataclasses import replace

from hobbit_jax.model_file.metadata import integer, number
from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.keys import Keys, any_router, dense_then_experts, rotary
from hobbit_jax.models.latent_attention import LatentAttention


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    router = any_router(keys, "sigmoid" if _is_old_glm(keys) else "softmax")
    if router.gating == "softmax":
        # DeepSeek-V2 and V2.5; llama.cpp takes the two best there too, for which V3 was trained.
        router = replace(router, ranked_by=1)
    return dense_then_experts(keys, _attention(keys), router)


def _attention(keys: Keys) -> LatentAttention:
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
        raise ValueError(
            f"{keys.path}: {rope_dim} values of a head rotate (rope.dimension_count), expected an "
            f"even number below its {key_dim} (key_length_mla); convert the model again"
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


def _is_old_glm(keys: Keys) -> bool:
    """Whether this is a GLM-4.7-Flash of a converter that did not write how experts are scored."""
    return keys.block_count() in (47, 48) and keys.unchecked("vocab_size") == 154880
