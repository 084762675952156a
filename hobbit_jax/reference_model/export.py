"""From a trained checkpoint to GGUF: float32 for reference, Q4_K_M-style for use."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
from gguf import TokenType
from tokenizers import Tokenizer

from hobbit_jax.experts.low_precision import dequantize
from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo, write_gguf
from hobbit_jax.models.attention import GroupedQueryAttention
from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.written_keys import config_metadata
from hobbit_jax.quantize import ggml
from hobbit_jax.quantize.quant_recipe import FILE_TYPE_F32, FILE_TYPE_Q4_K_M, q4_k_m_format
from hobbit_jax.reference_model.corpus import END_OF_TEXT
from hobbit_jax.reference_model.trainer import TrainableModel


def metadata(config: ModelConfig, tokenizer: Tokenizer, name: str) -> dict:
    """GGUF metadata of a `qwen3moe` model with our byte-level BPE.

    Every text begins with END_OF_TEXT, as documents did in training, so it is BOS as well.
    """
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    boundary = ids[END_OF_TEXT]
    return {
        **config_metadata(config),
        "general.name": name,
        "general.license": "apache-2.0",
        "general.file_type": FILE_TYPE_F32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            TokenType.CONTROL if i == boundary else TokenType.NORMAL for i in range(len(tokens))
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
        attention, router = block.attention, block.expert_router.linear
        assert isinstance(attention, GroupedQueryAttention) and router is not None
        assert attention.q_norm is not None and attention.k_norm is not None  # Qwen3's
        query, key, value = attention.projections
        of_layer = {
            "attn_norm": block.attention_norm.scale[...],
            "attn_q": query.weights(),
            "attn_k": key.weights(),
            "attn_v": value.weights(),
            "attn_output": attention.output.weights(),
            "attn_q_norm": attention.q_norm.scale[...],
            "attn_k_norm": attention.k_norm.scale[...],
            "ffn_norm": block.ffn_norm.scale[...],
            "ffn_gate_inp": router.weights(),
            "ffn_gate_exps": experts.gate_EFD[...],
            "ffn_up_exps": experts.up_EFD[...],
            "ffn_down_exps": experts.down_EDF[...],
        }
        weights |= {f"blk.{layer}.{role}.weight": value for role, value in of_layer.items()}
    return {name: np.asarray(value, np.float32) for name, value in jax.device_get(weights).items()}


def export_float32(model: TrainableModel, tokenizer: Tokenizer, name: str, path: Path) -> None:
    """Writes the trained model in float32."""
    tensors = [
        (key, "F32", value.shape, np.ascontiguousarray(value).view(np.uint8))
        for key, value in named_weights(model).items()
    ]
    write_gguf(path, metadata(model.config, tokenizer, name), tensors)


def export_q4_k_m(source: GGUFFile, config: ModelConfig, path: Path) -> None:
    """Quantises a float32 export as llama.cpp's Q4_K_M would, by ggml."""

    def encoded(tensor: TensorInfo, format: str) -> np.ndarray:
        if tensor.format == format:
            return tensor.raw
        weights = dequantize(tensor)
        rows = ggml.encode(weights.reshape(-1, weights.shape[-1]), format)
        return rows.reshape(*weights.shape[:-1], -1)

    tensors = []
    for name, tensor in source.tensors.items():
        format = q4_k_m_format(name, tensor.shape, config)
        tensors.append((name, format, tensor.shape, partial(encoded, tensor, format)))
    metadata = {**source.metadata, "general.file_type": FILE_TYPE_Q4_K_M}
    write_gguf(path, metadata, tensors, source.field_types)
