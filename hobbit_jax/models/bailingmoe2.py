"""Ling-mini, Ling-flash and Ring-mini 2.0 (`bailingmoe2`): one matrix of q, k and v, and groups.

Source: llama.cpp, src/models/bailingmoe2.cpp.
"""

from __future__ import annotations

from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.keys import Keys, any_router, dense_then_experts, grouped_query


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    attention = grouped_query(keys, "neox", qk_norm="head", partial_rope=True, fused=True)
    return dense_then_experts(keys, attention, any_router(keys, "softmax"))
