"""Qwen3.5 and 3.6 with experts (`qwen35moe`): Qwen3.6-35B-A3B; and Qwen3-Next (`qwen3next`).

Three of four blocks are gated delta nets, the others gated attention; a shared expert stands beside
the others behind a gate. Blocks for multi-token prediction at the end of a file are not run.
Sections of the rotary embedding matter for images only: a text has one position for all.

Source: llama.cpp, src/models/qwen35moe.cpp and qwen3next.cpp; conversion/qwen.py.
"""

from __future__ import annotations

from dataclasses import replace

from hobbit_jax.model_file.metadata import flags, integer
from hobbit_jax.models.config import BlockConfig, ModelConfig
from hobbit_jax.models.keys import (
    Keys,
    delta_net,
    ends,
    experts,
    grouped_query,
    shared_expert,
    softmax_router,
)


def read(keys: Keys) -> ModelConfig:
    """See `registry.FAMILIES`."""
    n_blocks = keys.block_count()
    skipped = keys.read("nextn_predict_layers", integer(0, n_blocks - 1), 0)
    interval = keys.read("full_attention_interval", integer(1), 4)
    by_interval = [(block + 1) % interval != 0 for block in range(n_blocks)]
    recurrent = keys.read("attention.recurrent_layers", flags(n_blocks), by_interval)
    attends = BlockConfig(
        grouped_query(keys, rope_style="neox", qk_norm="head", partial_rope=True, gated=True),
        ffn_norm="post_attention_norm",
        **shared_expert(keys),
    )
    value_heads = "grouped" if keys.arch == "qwen3next" else "tiled"
    recurs = replace(attends, attention=delta_net(keys, value_heads))
    return ModelConfig(
        **ends(keys),
        blocks=tuple(recurs if r else attends for r in recurrent[: n_blocks - skipped]),
        router=softmax_router(keys, renormalise=True),
        **experts(keys),
        skipped_blocks=skipped,
    )
