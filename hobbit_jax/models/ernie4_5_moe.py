"""ERNIE 4.5 with experts (`ernie4_5-moe`): a softmax whose choice is biased, always renormalised.

Source: llama.cpp, src/models/ernie4-5-moe.cpp; transformers, models/ernie4_5_moe.
"""

from __future__ import annotations

from hobbit_jax.models.config import ModelConfig, RouterConfig
from hobbit_jax.models.keys import Keys, dense_then_experts, grouped_query


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    attention = grouped_query(keys, rope_style="norm", qk_norm="none")
    bias = any(name.endswith(".exp_probs_b.bias") for name in keys.file.tensors)
    keys.expect("expert_weights_norm", True)
    router = RouterConfig("softmax", renormalise=True, selection_bias=bias)
    return dense_then_experts(keys, attention, router)
