"""Ling 2.0: one matrix of q, k and v, norms of q and k, groups of experts, a scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from families import Add, Family, Weights, _glm
from families._glm import KV_HEADS, WIDTH, D

HEADS, NORM = 4, "ffn_norm"
KEYS = _glm.KEYS | {
    "attention.head_count": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "expert_shared_feed_forward_length": _glm.F,
    "expert_count": 12,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
    "expert_weights_scale": 2.5,
}


def draw(add: Add) -> None:
    """See `Family`."""
    _glm.draw(add, KEYS, NORM)
    for layer in range(KEYS["block_count"]):
        add(f"blk.{layer}.attn_qkv.weight", ((HEADS + 2 * KV_HEADS) * WIDTH, D), "Q8_0")
        for role in "qk":
            add(f"blk.{layer}.attn_{role}_norm.weight", (WIDTH,), mean=1.0)


def hugging_face(weights: Weights) -> Any:
    """See `Family`."""
    apart = dict(weights)
    for layer in range(KEYS["block_count"]):
        ends = np.cumsum([HEADS, KV_HEADS]) * WIDTH
        parts = np.split(weights[f"blk.{layer}.attn_qkv.weight"], ends)
        apart |= {f"blk.{layer}.attn_{r}.weight": p for r, p in zip("qkv", parts, strict=True)}
    return _glm.hugging_face(KEYS, True, apart, {})


FAMILY = Family("bailingmoe2", 1, KEYS, draw, hugging_face, "mlp.gate")
