"""Granite 3 with experts (`granitemoe`): granite-3.1-3b-a800m, and hybrids that only attend.

A Mixtral whose embedding, attention, branches and logits are scaled, with a shared expert in some.

Source: llama.cpp, src/models/granite.cpp; transformers, models/granitemoeshared.
"""

from __future__ import annotations

from dataclasses import replace

from hobbit_jax.model_file.metadata import integer, number
from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import Keys, equal_blocks, grouped_query, softmax_router


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    scale = number(0.0, 1e6)
    keys.expect("rope.scaling.finetuned", True)  # false means no rotation here
    attention = replace(
        grouped_query(keys, rope_style="norm", qk_norm="none"),
        score_scale=keys.read("attention.scale", scale, 0.0) or None,  # 0 is "not said"
    )
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
