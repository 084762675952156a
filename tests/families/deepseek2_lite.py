"""DeepSeek-V2-Lite: queries from the stream, YaRN, softmax without renormalisation."""

from __future__ import annotations

from typing import Any

from families import Family, Weights, _deepseek

KEYS = _deepseek.KEYS | {
    "block_count": 3,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "expert_count": 6,
    "expert_shared_count": 2,
    "expert_weights_scale": 1.0,
    "expert_gating_func": 1,
    "rope.freq_base": 10000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_log_multiplier": 0.0707,
}


def hugging_face(weights: Weights) -> Any:
    """See `Family`."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.DeepseekV2Config(
        **_deepseek.config_arguments(
            KEYS,
            rope_type="yarn",
            factor=KEYS["rope.scaling.factor"],
            original_max_position_embeddings=KEYS["rope.scaling.original_context_length"],
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        topk_method="greedy",
    )
    return _deepseek.hugging_face(transformers.DeepseekV2ForCausalLM, config, weights)


FAMILY = Family(
    "deepseek2", 1, KEYS, lambda add: _deepseek.draw(add, KEYS), hugging_face, "mlp.gate"
)
