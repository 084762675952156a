"""GLM-4.5-Air: biases of q, k and v, half of a head rotates, and a block at the end is left out."""

from __future__ import annotations

from typing import Any

from families import Add, Family, Weights, _glm
from families._glm import KV_HEADS, WIDTH, D

HEADS, NORM = 6, "post_attention_norm"
KEYS = _glm.KEYS | {
    "block_count": 4,
    "nextn_predict_layers": 1,
    "attention.head_count": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "expert_count": 8,
    "expert_weights_scale": 1.0,
}


def draw(add: Add) -> None:
    """See `Family`."""
    _glm.draw(add, KEYS, NORM)
    for layer in range(KEYS["block_count"]):
        for role, heads in {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}.items():
            add(f"blk.{layer}.attn_{role}.weight", (heads * WIDTH, D), "Q8_0")
            add(f"blk.{layer}.attn_{role}.bias", (heads * WIDTH,), std=0.5)
    add(f"blk.{layer}.nextn.eh_proj.weight", (D, 2 * D), "Q8_0")
    for norm in ("enorm", "hnorm"):
        add(f"blk.{layer}.nextn.{norm}.weight", (D,), mean=1.0)


def hugging_face(weights: Weights) -> Any:
    """See `Family`."""
    biases = {f"attn_{role}.bias": f"self_attn.{role}_proj.bias" for role in "qkv"}
    return _glm.hugging_face(KEYS, False, weights, biases)


FAMILY = Family("glm4moe", 3, KEYS, draw, hugging_face, "mlp.gate")
