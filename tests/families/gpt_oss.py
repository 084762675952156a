"""gpt-oss: no width is a multiple of 256, four layers with a window on the first and third."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny_models import VOCAB

from families import BLOCK, Add, Family, Weights, loaded, settings

LAYERS, D, F, E, K, HEADS, KV_HEADS, WIDTH, WINDOW = 3, 96, 160, 6, 2, 4, 2, 32, 12
KEYS = {
    "block_count": LAYERS,
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": F,
    "expert_feed_forward_length": F,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": WIDTH,
    "attention.value_length": WIDTH,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.sliding_window": WINDOW,
    "expert_count": E,
    "expert_used_count": K,
    "rope.freq_base": 150000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 64,
}
_PROJECTIONS = {
    "q": (HEADS * WIDTH, D),
    "k": (KV_HEADS * WIDTH, D),
    "v": (KV_HEADS * WIDTH, D),
    "output": (D, HEADS * WIDTH),
}


def draw(add: Add) -> None:
    """See `Family`."""
    add("token_embd.weight", (VOCAB, D), "Q8_0", 1.0)
    add("output_norm.weight", (D,), mean=1.0)
    add("output.weight", (VOCAB, D), "Q8_0", 0.2)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "post_attention_norm"):
            add(f"{block}.{norm}.weight", (D,), mean=1.0)
        for role, shape in _PROJECTIONS.items():
            add(f"{block}.attn_{role}.weight", shape, "Q8_0", 0.12)
            add(f"{block}.attn_{role}.bias", shape[:1], std=0.3)
        add(f"{block}.attn_sinks.weight", (HEADS,), std=1.0, mean=1.0)
        add(f"{block}.ffn_gate_inp.weight", (E, D))
        add(f"{block}.ffn_gate_inp.bias", (E,), std=0.3)
        # Wide enough that some of both are clipped at 7.
        for role, shape, std in (
            ("gate", (F, D), 0.4),
            ("up", (F, D), 0.4),
            ("down", (D, F), 0.02),
        ):
            add(f"{block}.ffn_{role}_exps.weight", (E, *shape), "MXFP4", std)
            add(f"{block}.ffn_{role}_exps.bias", (E, shape[0]), std=0.3)


def hugging_face(weights: Weights) -> Any:
    """See `Family`. Rows of gate and up alternate in transformers."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.GptOssConfig(
        **settings(
            KEYS,
            rope_type="yarn",
            factor=KEYS["rope.scaling.factor"],
            original_max_position_embeddings=KEYS["rope.scaling.original_context_length"],
            truncate=True,  # as llama.cpp does, and the checkpoint's own code does not
        ),
        intermediate_size=F,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        num_local_experts=E,
        sliding_window=WINDOW,
        layer_types=["full_attention" if n % 2 else "sliding_attention" for n in range(LAYERS)],
    )
    names = {"attn_sinks": "self_attn.sinks", "ffn_gate_inp": "mlp.router.weight"} | BLOCK
    for role in (*(f"attn_{p}" for p in _PROJECTIONS), "ffn_gate_inp"):
        names[f"{role}.bias"] = names[role].replace("weight", "bias")
    experts = {}
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            gate, up, down = (
                weights[f"blk.{layer}.ffn_{role}_exps.{kind}"] for role in ("gate", "up", "down")
            )
            pairs = np.stack([gate, up], axis=2).reshape(E, 2 * F, *gate.shape[2:])
            if kind == "weight":
                pairs, down = pairs.swapaxes(1, 2), down.swapaxes(1, 2)
            suffix = "" if kind == "weight" else "_bias"
            experts[f"model.layers.{layer}.mlp.experts.gate_up_proj{suffix}"] = pairs
            experts[f"model.layers.{layer}.mlp.experts.down_proj{suffix}"] = down
    return loaded(transformers.GptOssForCausalLM(config), weights, names, experts)


FAMILY = Family("gpt-oss", 1, KEYS, draw, hugging_face, "mlp.router")
