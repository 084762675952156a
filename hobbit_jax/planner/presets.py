"""The models that people run, as far as a plan needs them, for planning without a file.

This module owns one record for each model: metadata in GGUF's own keys, and what everything but
the routed experts weighs. A model that the engine knows takes its keys and sizes from the engine's
configuration (`model_file/presets.py`) instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a file's header would say.

    Attributes:
        architecture: llama.cpp's name of it.
        keys: of the metadata, without the architecture.
        dense_bytes: of everything that each token reads: attention, shared experts, router, head.
        embedding_bytes: of an embedding that is not the head too, of which a token reads one row.
        source: where the shapes come from, and the size of a published file to hold them against.
        file_gb: that size, 1e9 bytes.
        experts: type of the experts' weights; "Q4_K_M" is llama.cpp's mix.
    """

    architecture: str
    keys: dict[str, Any]
    dense_bytes: float
    embedding_bytes: float
    source: str
    file_gb: float
    experts: str = "Q4_K_M"


def _attention(heads: int, kv_heads: int | list[int], width: int) -> dict[str, Any]:
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": width,
        "attention.value_length": width,
    }


def _experts(
    n_layers: int, d_model: int, n_experts: int, per_token: int, width: int
) -> dict[str, Any]:
    return {
        "block_count": n_layers,
        "embedding_length": d_model,
        "expert_count": n_experts,
        "expert_used_count": per_token,
        "expert_feed_forward_length": width,
    }


def _latent(lora: int, rope: int) -> dict[str, Any]:
    return {
        "attention.kv_lora_rank": lora,
        "rope.dimension_count": rope,
        "leading_dense_block_count": 1,
    }


# Qwen3-Next's mixers: a gated delta net in three of four layers.
_DELTA_NET = {
    "full_attention_interval": 4, "ssm.conv_kernel": 4, "ssm.state_size": 128,
    "ssm.group_count": 16, "ssm.time_step_rank": 32, "ssm.inner_size": 4096,
}  # fmt: skip
# Dense bytes are sums over the tensors that config.json implies, in llama.cpp's Q4_K_M types.
PLANNED = {
    "qwen3.6-35b-a3b": Preset(
        "qwen35moe",
        {**_experts(40, 2048, 256, 8, 512), **_attention(16, 2, 256), **_DELTA_NET,
         "vocab_size": 248320, "context_length": 262144},
        1.368e9, 0.286e9,
        "config.json of Qwen3.5-35B-A3B, of the same shape; 20.49 GiB (dev.to/kenimo49)", 22.0,
    ),
    "qwen3-coder-next-80b": Preset(
        "qwen3next",
        {**_experts(48, 2048, 512, 10, 512), **_attention(16, 2, 256), **_DELTA_NET,
         "vocab_size": 151936, "context_length": 262144},
        1.497e9, 0.175e9, "config.json of Qwen3-Next-80B-A3B; the file's size from memory", 48.5,
    ),
    "gpt-oss-20b": Preset(
        "gpt-oss",
        {**_experts(24, 2880, 32, 4, 2880), **_attention(64, 8, 64),
         "attention.sliding_window": 128, "vocab_size": 201088, "context_length": 131072},
        1.329e9, 0.615e9, "config.json; 11.27 GiB in MXFP4 (smeltcore.com)", 12.1, "MXFP4",
    ),
    "gpt-oss-120b": Preset(
        "gpt-oss",
        {**_experts(36, 2880, 128, 4, 2880), **_attention(64, 8, 64),
         "attention.sliding_window": 128, "vocab_size": 201088, "context_length": 131072},
        1.845e9, 0.615e9, "config.json; the file's size in MXFP4 from memory", 63.4, "MXFP4",
    ),
    "gemma-4-26b-a4b": Preset(
        "gemma4",
        {**_experts(30, 2816, 128, 8, 704), **_attention(16, [8, 8, 8, 8, 8, 2] * 5, 512),
         "attention.key_length_swa": 256, "attention.value_length_swa": 256,
         "attention.sliding_window": 1024,
         "attention.sliding_window_pattern": [True, True, True, True, True, False] * 5,
         "vocab_size": 262144, "context_length": 262144},
        1.649e9, 0.0, "config.json; the file's size from memory", 16.9,
    ),
    "glm-4.7-flash": Preset(
        "deepseek2",
        {**_experts(47, 2048, 64, 4, 1536), **_attention(20, 1, 576), **_latent(512, 64),
         "vocab_size": 154880, "context_length": 202752},
        1.160e9, 0.178e9, "config.json; 18.31 GB (hyperspaceai/GLM-4.7-Flash-asym-2bitexp)", 18.31,
    ),
    "glm-4.5-air": Preset(
        "glm4moe",
        {**_experts(46, 4096, 128, 8, 1408), **_attention(96, 8, 128),
         "leading_dense_block_count": 1, "vocab_size": 151552, "context_length": 131072},
        4.059e9, 0.349e9, "config.json; the file's size, with its MTP block, from memory", 73.0,
    ),
    "deepseek-v2-lite": Preset(
        "deepseek2",
        {**_experts(27, 2048, 64, 6, 1408), **_attention(16, 1, 576), **_latent(512, 64),
         "vocab_size": 102400, "context_length": 163840},
        0.739e9, 0.118e9, "config.json; the file's size from memory", 10.36,
    ),
}  # fmt: skip
