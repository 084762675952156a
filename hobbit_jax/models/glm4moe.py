"""GLM-4.5, GLM-4.5-Air, GLM-4.6 and 4.7, and Solar-Open (`glm4moe`).

Source: llama.cpp, src/models/glm4-moe.cpp; transformers, models/glm4_moe.
"""

from __future__ import annotations

from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.keys import Keys, any_router, dense_then_experts, grouped_query


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    tensors = keys.file.tensors
    attention = grouped_query(
        keys,
        rope_style="neox",
        qk_norm="head" if "blk.0.attn_q_norm.weight" in tensors else "none",  # GLM-4.5 has it
        partial_rope=True,
        biased=tuple(
            role for role in ("attn_q", "attn_k", "attn_v") if f"blk.0.{role}.bias" in tensors
        ),
    )
    return dense_then_experts(
        keys, attention, any_router(keys, "sigmoid"), ffn_norm="post_attention_norm"
    )
