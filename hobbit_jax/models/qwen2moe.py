"""Qwen2-MoE (`qwen2moe`): Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B. A shared expert has a gate of its own.

Source: llama.cpp, src/models/qwen2moe.cpp.
"""

from __future__ import annotations

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, ends, experts, grouped_query, shared_expert, softmax_router
from hobbit_jax.models.qwen2 import BIASED


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    attention = grouped_query(keys, rope_style="neox", qk_norm="none", biased=BIASED)
    block = BlockConfig(attention, **shared_expert(keys))
    return ModelConfig(
        **ends(keys),
        blocks=(block,) * keys.block_count(),
        router=softmax_router(keys, renormalise=False),
        **experts(keys),
    )
