"""DeepSeek-V2: softmax, groups ranked by their best expert alone, a scale."""

from __future__ import annotations

from typing import Any

from families import Family, Weights, _deepseek

KEYS = _deepseek.KEYS | {
    "block_count": 3,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.q_lora_rank": 32,
    "expert_count": 12,
    "expert_shared_count": 2,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
    "expert_weights_scale": 4.0,
    "expert_gating_func": 1,
    "rope.freq_base": 10000.0,
}


def hugging_face(weights: Weights) -> Any:
    """See `Family`."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.DeepseekV2Config(
        **_deepseek.config_arguments(KEYS), topk_method="group_limited_greedy"
    )
    return _deepseek.hugging_face(transformers.DeepseekV2ForCausalLM, config, weights)


FAMILY = Family(
    "deepseek2", 1, KEYS, lambda add: _deepseek.draw(add, KEYS), hugging_face, "mlp.gate"
)
