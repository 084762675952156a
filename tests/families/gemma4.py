"""Gemma 4: two blocks with a window, and one without, whose values are its keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny_models import VOCAB

from families import BLOCK, Add, Family, Weights, loaded, settings

D, F, DENSE, E, K, HEADS, WINDOW = 64, 96, 160, 6, 2, 4, 12
WINDOWED = (True, True, False)
WIDTHS = (16, 16, 32)  # of a head
KV_HEADS = (2, 2, 1)
KEYS = {
    "block_count": len(WINDOWED),
    "context_length": 512,
    "embedding_length": D,
    "embedding_length_per_layer_input": 0,
    "feed_forward_length": DENSE,
    "expert_feed_forward_length": F,
    "attention.head_count": HEADS,
    "attention.head_count_kv": list(KV_HEADS),
    "attention.key_length": WIDTHS[2],
    "attention.value_length": WIDTHS[2],
    "attention.key_length_swa": WIDTHS[0],
    "attention.value_length_swa": WIDTHS[0],
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.shared_kv_layers": 0,
    "attention.sliding_window": WINDOW,
    "attention.sliding_window_pattern": list(WINDOWED),
    "expert_count": E,
    "expert_used_count": K,
    "final_logit_softcapping": 8.0,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
    "rope.dimension_count": WIDTHS[2],
    "rope.dimension_count_swa": WIDTHS[0],
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
_NAMES = BLOCK | {
    **{ours: f"{theirs}.weight" for ours, theirs in _NORMS.items()},
    **{f"ffn_{role}": f"mlp.{role}_proj.weight" for role in ("gate", "up", "down")},
    "ffn_gate_inp": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps": "experts.gate_up_proj",
    "ffn_down_exps": "experts.down_proj",
    "layer_output_scale": "layer_scalar",
}


def draw(add: Add) -> None:
    """See `Family`. The global head turns a quarter of its pairs."""
    add("token_embd.weight", (VOCAB, D), "Q8_0", 0.2)
    add("output_norm.weight", (D,), mean=1.0)
    pairs = WIDTHS[2] // 2
    divisors = np.repeat([1.0, 1e30], [pairs // 4, pairs * 3 // 4])
    add("rope_freqs.weight", (pairs,), std=0.0, mean=divisors)
    for number, (windowed, width, kv_heads) in enumerate(
        zip(WINDOWED, WIDTHS, KV_HEADS, strict=True)
    ):
        block = f"blk.{number}"
        for norm in _NORMS:
            add(f"{block}.{norm}.weight", (D,), mean=1.0)
        for role in "qk":
            add(f"{block}.attn_{role}_norm.weight", (width,), mean=0.8)
        add(f"{block}.attn_q.weight", (HEADS * width, D), "Q8_0", 0.12)
        for role in "kv" if windowed else "k":
            add(f"{block}.attn_{role}.weight", (kv_heads * width, D), "Q8_0", 0.12)
        add(f"{block}.attn_output.weight", (D, HEADS * width), "Q8_0", 0.12)
        for role, shape in (("gate", (DENSE, D)), ("up", (DENSE, D)), ("down", (D, DENSE))):
            add(f"{block}.ffn_{role}.weight", shape, "Q8_0", 0.12)
        add(f"{block}.ffn_gate_inp.weight", (E, D), std=1.5)
        add(f"{block}.ffn_gate_inp.scale", (D,), mean=1.0)
        add(f"{block}.ffn_gate_up_exps.weight", (E, 2 * F, D), "Q4_0", 0.12)
        add(f"{block}.ffn_down_exps.weight", (E, D, F), "Q5_0", 0.12)
        add(f"{block}.ffn_down_exps.scale", (E,), mean=1.0)
        add(f"{block}.layer_output_scale.weight", (1,), mean=0.8)


def hugging_face(weights: Weights) -> Any:
    """See `Family`."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.Gemma4TextConfig(
        **settings(KEYS)
        | {
            "rope_parameters": {
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": KEYS["rope.freq_base_swa"],
                },
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": KEYS["rope.freq_base"],
                },
            },
        },
        intermediate_size=DENSE,
        num_key_value_heads=KV_HEADS[0],
        head_dim=WIDTHS[0],
        num_global_key_value_heads=KV_HEADS[2],
        global_head_dim=WIDTHS[2],
        attention_k_eq_v=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention" if w else "full_attention" for w in WINDOWED],
        final_logit_softcapping=KEYS["final_logit_softcapping"],
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCAB,
        enable_moe_block=True,
        num_experts=E,
        top_k_experts=K,
        moe_intermediate_size=F,
        pad_token_id=0,
    )
    return loaded(transformers.Gemma4ForCausalLM(config), weights, _NAMES)


FAMILY = Family("gemma4", 2, KEYS, draw, hugging_face, ".router")
