"""Qwen2 with experts (`qwen2moe`), and dense (`qwen2`): Qwen1.5-MoE-A2.7B, Qwen2.5-Coder-1.5B.

Queries, keys and values have biases, and a shared expert has a gate of its own.

Source: llama.cpp, src/models/qwen2moe.cpp and qwen2.cpp.
"""

from __future__ import annotations

from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, equal_blocks, grouped_query, shared_expert, softmax_router

_BIASED = ("attn_q", "attn_k", "attn_v")


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    attention = grouped_query(keys, rope_style="neox", qk_norm="none", biased=_BIASED)
    block = BlockConfig(attention, **shared_expert(keys))
    return equal_blocks(keys, block, softmax_router(keys, renormalise=False))


def read_dense(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    block = BlockConfig(grouped_query(keys, rope_style="neox", qk_norm="none", biased=_BIASED))
    return equal_blocks(keys, block, None)
