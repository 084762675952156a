"""Ling-mini, Ling-flash and Ring-mini 2.0 (`bailingmoe2`): one matrix of q, k and v, and groups.

Source: llama.cpp, src/models/bailingmoe2.cpp.
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
    about_experts = experts(keys)
    attention = grouped_query(keys, "neox", qk_norm="head", partial_rope=True, fused=True)
    return ModelConfig(
        **ends(keys),
        **dense_then_experts(keys, attention, about_experts["d_expert"]),
        router=any_router(keys, "softmax"),
        **about_experts,
    )
