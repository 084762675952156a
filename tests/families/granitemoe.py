"""Granite: scales of embedding, scores, branches and logits; a shared expert; pairs in a row."""

from __future__ import annotations

from typing import Any

from tiny_models import VOCAB

from families import BLOCK, Add, Family, Weights, gated_mlp, loaded, settings

LAYERS, D, F, SHARED, E, K, WIDTH = 3, 128, 32, 64, 8, 3, 32
HEADS = {"q": 4, "k": 2, "v": 2}
KEYS = {
    "block_count": LAYERS,
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": HEADS["q"],
    "attention.head_count_kv": HEADS["k"],
    "attention.scale": 0.25,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": WIDTH,
    "expert_count": E,
    "expert_used_count": K,
    "expert_shared_feed_forward_length": SHARED,
    "embedding_scale": 3.0,
    "residual_scale": 0.6,
    "logit_scale": 1.5,
}
_NAMES = BLOCK | {
    "ffn_gate_inp": "block_sparse_moe.router.weight",
    "ffn_gate_exps + ffn_up_exps": "block_sparse_moe.experts.gate_up_proj",
    "ffn_down_exps": "block_sparse_moe.experts.down_proj",
    "ffn_gate_shexp + ffn_up_shexp": "shared_mlp.input_linear.weight",
    "ffn_down_shexp": "shared_mlp.output_linear.weight",
}


def draw(add: Add) -> None:
    """See `Family`."""
    add("token_embd.weight", (VOCAB, D), "Q8_0", 0.3)
    add("output_norm.weight", (D,), mean=1.0)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            add(f"{block}.{norm}.weight", (D,), mean=1.0)
        for role, heads in HEADS.items():
            add(f"{block}.attn_{role}.weight", (heads * WIDTH, D), "Q8_0", 0.12)
        add(f"{block}.attn_output.weight", (D, HEADS["q"] * WIDTH), "Q8_0", 0.12)
        add(f"{block}.ffn_gate_inp.weight", (E, D))
        gated_mlp(add, block, "_exps", D, F, E)
        gated_mlp(add, block, "_shexp", D, SHARED)


def hugging_face(weights: Weights) -> Any:
    """See `Family`. Rows of q and k go back from interleaved pairs to halves."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.GraniteMoeSharedConfig(
        **settings(KEYS),
        intermediate_size=F,
        shared_intermediate_size=SHARED,
        num_key_value_heads=HEADS["k"],
        num_local_experts=E,
        tie_word_embeddings=True,
        attention_multiplier=KEYS["attention.scale"],
        embedding_multiplier=KEYS["embedding_scale"],
        residual_multiplier=KEYS["residual_scale"],
        logits_scaling=KEYS["logit_scale"],
    )
    halves = dict(weights)
    for layer in range(LAYERS):
        for role in "qk":
            pairs = weights[f"blk.{layer}.attn_{role}.weight"].reshape(HEADS[role], -1, 2, D)
            halves[f"blk.{layer}.attn_{role}.weight"] = pairs.swapaxes(1, 2).reshape(-1, D)
    return loaded(transformers.GraniteMoeSharedForCausalLM(config), halves, _NAMES)


FAMILY = Family("granitemoe", 1, KEYS, draw, hugging_face, "moe.router")
