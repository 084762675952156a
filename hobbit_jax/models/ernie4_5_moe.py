"""ERNIE 4.5 with experts (`ernie4_5-moe`): a softmax whose choice is biased, always renormalised.

Source: llama.cpp, src/models/ernie4-5-moe.cpp; transformers, models/ernie4_5_moe.
"""

from __future__ import annotations

from typing import Any

from hobbit_jax.models.config import ModelConfig, RouterConfig
from hobbit_jax.models.keys import (
    Keys,
    decoder_metadata,
    dense_then_experts,
    dense_then_experts_metadata,
    ends,
    experts,
    grouped_query,
)

_WIDTH = "expert_feed_forward_length"


def read(keys: Keys) -> ModelConfig:
    """See `registry.Family`."""
    about_experts = experts(keys, _WIDTH)
    attention = grouped_query(keys, rope_style="norm", qk_norm="none")
    bias = any(name.endswith(".exp_probs_b.bias") for name in keys.file.tensors)
    keys.expect("expert_weights_norm", True)
    return ModelConfig(
        **ends(keys),
        **dense_then_experts(keys, attention, about_experts["d_expert"]),
        router=RouterConfig("softmax", renormalise=True, selection_bias=bias),
        **about_experts,
    )


def metadata(config: ModelConfig) -> dict[str, Any]:
    """See `registry.Family`."""
    step = {"interleave_moe_layer_step": 1}
    return decoder_metadata(config, _WIDTH) | dense_then_experts_metadata(config) | step
