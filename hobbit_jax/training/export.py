"""From a trained checkpoint to GGUF: float32 for reference, Q4_K_M-style for use.

Owns the mapping of trained parameters to llama.cpp's tensor names, the
tokenizer's metadata, and the mix of types of Q4_K_M. Called by
`scripts/train_reference.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from hobbit_jax import quantize
from hobbit_jax.architecture import ModelConfig
from hobbit_jax.gguf_file import GGUFFile, write_gguf
from hobbit_jax.tiers import dequantize
from hobbit_jax.training.corpus import END_OF_TEXT
from hobbit_jax.training.trainer import TrainableModel

NORMAL_TOKEN, CONTROL_TOKEN = 1, 3  # gguf.TokenType
FILE_TYPE_F32, FILE_TYPE_Q4_K_M = 0, 15  # llama.cpp's llama_ftype


def metadata(config: ModelConfig, tokenizer: Tokenizer, name: str) -> dict:
    """GGUF metadata of a `qwen3moe` model with our byte-level BPE.

    Every text begins with END_OF_TEXT, as documents did in training, so it is BOS as well.
    """
    arch = config.arch
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    boundary = ids[END_OF_TEXT]
    return {
        "general.architecture": arch,
        "general.name": name,
        "general.license": "apache-2.0",
        f"{arch}.block_count": config.n_layers,
        f"{arch}.context_length": config.context_length,
        f"{arch}.embedding_length": config.d_model,
        f"{arch}.feed_forward_length": config.d_expert * config.experts_per_token,
        f"{arch}.attention.head_count": config.n_heads,
        f"{arch}.attention.head_count_kv": config.n_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_eps,
        f"{arch}.rope.freq_base": config.rope_base,
        f"{arch}.expert_count": config.n_experts,
        f"{arch}.expert_used_count": config.experts_per_token,
        f"{arch}.expert_feed_forward_length": config.d_expert,
        f"{arch}.vocab_size": config.vocab_size,
        "general.file_type": FILE_TYPE_F32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            CONTROL_TOKEN if i == boundary else NORMAL_TOKEN for i in range(len(tokens))
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": boundary,
        "tokenizer.ggml.eos_token_id": boundary,
        "tokenizer.ggml.padding_token_id": boundary,
        "tokenizer.ggml.add_bos_token": True,
    }


def named_weights(model: TrainableModel) -> dict[str, np.ndarray]:
    """Trained parameters as float32 arrays under llama.cpp's tensor names."""
    weights = {
        "token_embd.weight": model.ends.embedding.weights(),
        "output_norm.weight": model.ends.final_norm.scale[...],
    }
    for layer, (block, experts) in enumerate(zip(model.blocks, model.experts, strict=True)):
        attention = block.attention
        of_layer = {
            "attn_norm": block.attention_norm.scale[...],
            "attn_q": attention.q.weights(),
            "attn_k": attention.k.weights(),
            "attn_v": attention.v.weights(),
            "attn_output": attention.output.weights(),
            "attn_q_norm": attention.q_norm.scale[...],
            "attn_k_norm": attention.k_norm.scale[...],
            "ffn_norm": block.ffn_norm.scale[...],
            "ffn_gate_inp": block.router.weights(),
            "ffn_gate_exps": experts.gate_EFD[...],
            "ffn_up_exps": experts.up_EFD[...],
            "ffn_down_exps": experts.down_EDF[...],
        }
        weights |= {f"blk.{layer}.{role}.weight": value for role, value in of_layer.items()}
    return {name: np.asarray(value, np.float32) for name, value in jax.device_get(weights).items()}


def export_float32(model: TrainableModel, tokenizer: Tokenizer, name: str, path: Path) -> None:
    """Writes the trained model in float32."""
    config = model.blocks[0].config
    tensors = [
        (key, "F32", value.shape, np.ascontiguousarray(value).view(np.uint8))
        for key, value in named_weights(model).items()
    ]
    write_gguf(path, metadata(config, tokenizer, name), tensors)


def q4_k_m_format(name: str, n_dims: int, n_layers: int) -> str:
    """The type llama.cpp's Q4_K_M gives a tensor (`llama_tensor_get_type`, tied head).

    Router and norms stay float32; embedding (it is the head too) Q6_K; `attn_v`
    and `ffn_down` Q6_K in the first and last eighth of the layers and in every
    third one between.
    """
    if n_dims == 1 or "ffn_gate_inp" in name:
        return "F32"
    if name.startswith("token_embd"):
        return "Q6_K"
    if "attn_v" in name or "ffn_down" in name:
        layer, eighth = int(name.split(".")[1]), n_layers // 8
        more_bits = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
        return "Q6_K" if more_bits else "Q4_K"
    return "Q4_K"


def export_q4_k_m(source: GGUFFile, config: ModelConfig, path: Path) -> None:
    """Quantises a float32 export as llama.cpp's Q4_K_M would, with our encoders."""

    def encoded(tensor, format):
        def encode() -> np.ndarray:
            if tensor.format == format:
                return tensor.raw
            weights = dequantize(tensor)
            rows = quantize.encode(weights.reshape(-1, weights.shape[-1]), format)
            return rows.reshape(*weights.shape[:-1], -1)

        return encode

    tensors = []
    for name, tensor in source.tensors.items():
        format = q4_k_m_format(name, len(tensor.shape), config.n_layers)
        tensors.append((name, format, tensor.shape, encoded(tensor, format)))
    write_gguf(
        path,
        {**source.metadata, "general.file_type": FILE_TYPE_Q4_K_M},
        tensors,
        source.field_types,
    )
