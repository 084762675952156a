"""GLM-4.5, GLM-4.5-Air, GLM-4.6 and 4.7, and Solar-Open (`glm4moe`).

Source: llama.cpp, src/models/glm4-moe.cpp; transformers, models/glm4_moe.
"""

from __future__ import annotations

from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.keys import (
    Keys,
    any_router,
    dense_then_experts,
    ends,
    experts,
    grouped_query,
)


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    tensors, about_experts = keys.file.tensors, experts(keys)
    attention = grouped_query(
        keys,
        rope_style="neox",
        qk_norm="head" if "blk.0.attn_q_norm.weight" in tensors else "none",  # GLM-4.5 has it
        partial_rope=True,
        biased=tuple(
            role for role in ("attn_q", "attn_k", "attn_v") if f"blk.0.{role}.bias" in tensors
        ),
    )
    norm = "post_attention_norm"
    return ModelConfig(
        **ends(keys),
        **dense_then_experts(keys, attention, about_experts["d_expert"], norm),
        router=any_router(keys, "sigmoid"),
        **about_experts,
    )
