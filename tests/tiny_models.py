"""Tiny random models in GGUF files, the same bytes on every machine.

Only NumPy, `gguf` and our writer are used: `goldens/make_goldens.py` needs no model of ours.
Blocks are random bytes, not encoded weights, so that every code a format can hold occurs; only the
scales are chosen, for weights of mean 0 and of the wanted standard deviation.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

from hobbit_jax.model_file.gguf_file import write_gguf

D_MODEL = D_EXPERT = 256  # one super-block of a K-quant
CONTEXT = 64
D_SHARED = 128  # width of qwen2moe's shared expert
VOCAB = 258  # 256 bytes, one merged token, end of text


@dataclass(frozen=True)
class Hybrid:
    """What a model of Qwen's hybrids has beside the others: every `interval`-th block attends."""

    interval: int
    key_heads: int
    value_heads: int
    d_state: int
    d_shared: int
    rope_dim: int
    fused: bool  # gate and up are one tensor
    skipped: int  # blocks at the end that predict further tokens


@dataclass(frozen=True)
class TinyModel:
    """Shape and formats of one file."""

    arch: str
    seed: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    experts_per_token: int
    rope_base: float
    rms_eps: float
    experts: tuple[tuple[str, str, str], ...]  # per layer, the formats of gate, up and down
    dense: tuple[str, ...]  # formats of q, k, v, output, router, embedding and head, in turn
    tied: bool = False
    # In `weights_sha256` by their tensors alone.
    hybrid: Hybrid | None = field(default=None, repr=False)
    d_expert: int = field(default=D_EXPERT, repr=False)


# Each format stands somewhere; no two layers of a file share a bank.
MODELS = {
    "qwen3moe": TinyModel(
        "qwen3moe", 1, 4, 2, 128, 8, 2, 1e6, 1e-6,
        experts=(("Q4_K", "Q4_K", "Q6_K"), ("Q2_K", "Q2_K", "Q3_K"), ("Q4_K", "Q4_K", "Q4_K")),
        dense=("Q4_K", "Q5_K", "Q6_K", "Q8_0", "F32", "Q4_K", "Q6_K"),
    ),
    "qwen3moe-tied": TinyModel(
        "qwen3moe", 2, 4, 1, 64, 6, 3, 1e4, 1e-5,
        experts=(("IQ4_NL", "IQ4_XS", "Q5_K"), ("MXFP4", "MXFP4", "MXFP4")),
        dense=("IQ4_XS", "F16", "BF16", "Q3_K", "F16", "Q6_K"),
        tied=True,
    ),
    "mixtral": TinyModel(
        "llama", 3, 8, 2, 32, 4, 2, 1e6, 1e-5,
        experts=(("Q4_0", "Q4_1", "Q5_0"), ("Q3_K", "Q3_K", "Q5_K"), ("Q5_1", "Q8_0", "F16")),
        dense=("Q4_K", "Q6_K", "Q5_0", "Q2_K", "F16", "Q4_0", "Q8_0"),
    ),
    "olmoe": TinyModel(
        "olmoe", 4, 4, 2, 64, 8, 4, 1e4, 1e-5,
        experts=(("Q4_K", "Q4_K", "Q8_0"), ("F16", "BF16", "F32")),
        dense=("Q5_K", "Q4_K", "Q5_1", "Q4_1", "F32", "F16", "Q5_K"),
    ),
    # Three value heads to a key head: with two, both orders of them are each other's inverse.
    "qwen35moe": TinyModel(
        "qwen35moe", 6, 4, 2, 64, 8, 3, 1e7, 1e-6,
        experts=(("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q5_K"), ("Q8_0", "Q8_0", "Q8_0")),
        dense=("Q8_0", "Q4_K", "Q8_0", "Q8_0", "F32", "Q4_K", "Q6_K"),
        hybrid=Hybrid(2, 2, 6, 32, 128, rope_dim=16, fused=True, skipped=1),
    ),
    "qwen3next": TinyModel(
        "qwen3next", 7, 4, 1, 64, 8, 3, 5e6, 1e-6,
        experts=(("Q4_K", "Q4_K", "Q4_K"), ("Q5_K", "Q5_K", "Q6_K"), ("Q4_K", "Q4_K", "Q6_K")),
        dense=("Q8_0", "Q5_K", "Q8_0", "Q8_0", "F32", "Q8_0", "Q8_0"),
        hybrid=Hybrid(2, 2, 6, 32, 128, rope_dim=32, fused=False, skipped=0),
    ),
    "qwen2moe": TinyModel(
        "qwen2moe", 8001, 4, 2, 64, 8, 3, 1e6, 1e-6,
        experts=(("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q8_0", "Q8_0")),
        dense=("Q8_0", "Q4_K", "Q8_0", "Q8_0", "F32", "Q4_K", "Q6_K"),
    ),
    # Without a router: each layer's one expert is its FFN.
    "qwen2": TinyModel(
        "qwen2", 9, 4, 2, 64, 1, 1, 1e6, 1e-6,
        experts=(("Q4_K", "Q4_K", "Q6_K"), ("Q5_K", "Q5_K", "Q8_0"), ("Q4_K", "Q4_K", "Q4_K")),
        dense=("Q8_0", "Q4_K", "Q6_K", "Q5_0", "F32", "Q8_0"),
        tied=True,
    ),
    "llama": TinyModel(
        "llama", 10, 8, 2, 32, 1, 1, 5e5, 1e-5,
        experts=(("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q4_K")),
        dense=("Q4_K", "Q6_K", "Q8_0", "Q4_K", "F32", "Q4_K", "Q6_K"),
    ),
}  # fmt: skip

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_ALPHABET = [chr(b) for b in _PRINTABLE] + [chr(0x100 + i) for i in range(256 - len(_PRINTABLE))]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*_ALPHABET, "he", "<|end|>"],
    "tokenizer.ggml.token_type": [1] * 257 + [3],
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.eos_token_id": 257,
}

# Of a block with random codes: byte offset of d, its weights' standard deviation when d is 1,
# and, where there is a second field, its offset and the multiple of d that makes the mean 0.
_SCALES: dict[str, tuple[int, float, tuple[int, float] | None]] = {
    "Q8_0": (0, 73.9, None),
    "Q4_0": (0, 4.64, None),
    "Q5_0": (0, 9.25, None),
    "Q4_1": (0, 4.61, (2, -7.5)),
    "Q5_1": (0, 9.23, (2, -15.5)),
    "Q2_K": (80, 13.9, (82, 1.5)),
    "Q3_K": (108, 42.9, None),
    "Q4_K": (0, 232.0, (2, 7.5)),
    "Q5_K": (0, 480.0, (2, 15.5)),
    "Q6_K": (208, 1369.0, None),
    "IQ4_NL": (0, 69.0, None),
    "IQ4_XS": (0, 1280.0, None),
}


def blocks(rng: np.random.Generator, format: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Raw uint8 [*shape[:-1], row_bytes] of weights with mean 0 and about the wanted spread."""
    if format in ("F32", "F16", "BF16"):
        values = rng.standard_normal(shape, np.float32) * np.float32(std)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[format]).view(np.uint8)
    weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
    n_blocks = math.prod(shape) // weights
    raw = np.frombuffer(rng.bytes(n_blocks * block_bytes), np.uint8).reshape(n_blocks, -1).copy()
    if format == "MXFP4":
        # E2M1 codes have a standard deviation of 2.93 at the exponent byte 127.
        center = 127 + round(math.log2(std / 2.93))
        raw[:, 0] = rng.integers(center - 1, center + 2, n_blocks)
    elif format == "NVFP4":
        # The same codes; an E4M3 byte of 8 times the exponent, which 7 biases.
        center = 8 * (7 + round(math.log2(std / 2.93)))
        raw[:, :4] = rng.integers(center - 4, center + 5, (n_blocks, 4))
    else:
        at, unit, second = _SCALES[format]
        d = (rng.uniform(0.5, 1.5, n_blocks) * std / unit).astype(np.float16)
        raw[:, at : at + 2] = d[:, None].view(np.uint8)
        if second is not None:
            at, multiple = second
            raw[:, at : at + 2] = (d * np.float16(multiple))[:, None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def _tensors(model: TinyModel) -> dict[str, tuple[str, tuple[int, ...], np.ndarray]]:
    rng = np.random.default_rng(model.seed)
    q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    tensors = {}

    def add(name: str, format: str, shape: tuple[int, ...], std: float) -> None:
        tensors[f"{name}.weight"] = (format, shape, blocks(rng, format, shape, std))

    def add_norm(name: str, width: int) -> None:
        scale = rng.uniform(0.5, 1.5, width).astype(np.float32)
        tensors[f"{name}.weight"] = ("F32", (width,), scale.view(np.uint8))

    q_format, k_format, v_format, output_format, router_format, *ends = model.dense
    # A tied head multiplies by the embedding, so that one is small.
    add("token_embd", ends[0], (VOCAB, D_MODEL), 0.1 if model.tied else 1.0)
    add_norm("output_norm", D_MODEL)
    if not model.tied:
        add("output", ends[1], (VOCAB, D_MODEL), 0.1)
    for layer, (gate, up, down) in enumerate(model.experts):
        if model.hybrid is not None:
            _add_hybrid_block(model, model.hybrid, layer, tensors, rng)
            continue
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm", D_MODEL)
        add(f"{block}.attn_q", q_format, (q, D_MODEL), 0.09)
        add(f"{block}.attn_k", k_format, (kv, D_MODEL), 0.09)
        add(f"{block}.attn_v", v_format, (kv, D_MODEL), 0.1)
        add(f"{block}.attn_output", output_format, (D_MODEL, q), 1.5 / math.sqrt(q))
        if model.arch == "qwen3moe":
            add_norm(f"{block}.attn_q_norm", model.head_dim)
            add_norm(f"{block}.attn_k_norm", model.head_dim)
        if model.arch == "olmoe":
            add_norm(f"{block}.attn_q_norm", q)
            add_norm(f"{block}.attn_k_norm", kv)
        add_norm(f"{block}.ffn_norm", D_MODEL)
        if model.arch in ("qwen2", "qwen2moe"):
            for name, width in (("q", q), ("k", kv), ("v", kv)):
                bias = (0.3 * rng.standard_normal(width)).astype(np.float32)
                tensors[f"{block}.attn_{name}.bias"] = ("F32", (width,), bias.view(np.uint8))
        if model.n_experts == 1:
            add(f"{block}.ffn_gate", gate, (model.d_expert, D_MODEL), 0.09)
            add(f"{block}.ffn_up", up, (model.d_expert, D_MODEL), 0.09)
            add(f"{block}.ffn_down", down, (D_MODEL, model.d_expert), 0.09)
            continue
        if model.arch == "qwen2moe":
            add(f"{block}.ffn_gate_inp_shexp", "F32", (1, D_MODEL), 0.06)
            add(f"{block}.ffn_gate_shexp", "Q8_0", (D_SHARED, D_MODEL), 0.09)
            add(f"{block}.ffn_up_shexp", "Q8_0", (D_SHARED, D_MODEL), 0.09)
            add(f"{block}.ffn_down_shexp", "Q8_0", (D_MODEL, D_SHARED), 0.09)
        add(f"{block}.ffn_gate_inp", router_format, (model.n_experts, D_MODEL), 0.08)
        add(f"{block}.ffn_gate_exps", gate, (model.n_experts, model.d_expert, D_MODEL), 0.09)
        add(f"{block}.ffn_up_exps", up, (model.n_experts, model.d_expert, D_MODEL), 0.09)
        add(f"{block}.ffn_down_exps", down, (model.n_experts, D_MODEL, model.d_expert), 0.09)
    return tensors


def _add_hybrid_block(
    model: TinyModel, hybrid: Hybrid, layer: int, tensors: dict, rng: np.random.Generator
) -> None:
    """The tensors of a block of `qwen35moe` or `qwen3next`, as their converter writes them."""
    block, (gate, up, down) = f"blk.{layer}", model.experts[layer]
    n_blocks, e, f = len(model.experts), model.n_experts, model.d_expert
    q_format, k_format, v_format, output_format, router_format, *_ = model.dense

    def add(name: str, format: str, shape: tuple[int, ...], std: float, mean: float = 0) -> None:
        if format == "F32":
            values = (mean + std * rng.standard_normal(shape)).astype(np.float32)
            raw = values.view(np.uint8)
        else:
            raw = blocks(rng, format, shape, std)
        tensors[f"{block}.{name}"] = (format, shape, raw)

    def add_norm(name: str, width: int) -> None:
        add(f"{name}.weight", "F32", (width,), 0.2, 1)

    add_norm("attn_norm", D_MODEL)
    if layer >= n_blocks - hybrid.skipped or (layer + 1) % hybrid.interval == 0:
        q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        # A head's gate rows follow its query rows.
        add("attn_q.weight", q_format, (2 * q, D_MODEL), 0.09)
        add("attn_k.weight", k_format, (kv, D_MODEL), 0.09)
        add("attn_v.weight", v_format, (kv, D_MODEL), 0.1)
        add("attn_output.weight", output_format, (D_MODEL, q), 1.5 / math.sqrt(q))
        add_norm("attn_q_norm", model.head_dim)
        add_norm("attn_k_norm", model.head_dim)
    else:
        heads, value = hybrid.value_heads, hybrid.value_heads * hybrid.d_state
        channels = 2 * hybrid.key_heads * hybrid.d_state + value
        add("attn_qkv.weight", q_format, (channels, D_MODEL), 0.09)
        add("attn_gate.weight", k_format, (value, D_MODEL), 0.09)
        add("ssm_conv1d.weight", "F32", (channels, 4), 0.5)
        add("ssm_dt.bias", "F32", (heads,), 1, -2)
        rates = -rng.uniform(0.1, 4, heads).astype(np.float32)
        tensors[f"{block}.ssm_a"] = ("F32", (heads,), rates.view(np.uint8))
        if model.arch == "qwen35moe":
            add("ssm_alpha.weight", "F32", (heads, D_MODEL), 0.06)
            add("ssm_beta.weight", "F32", (heads, D_MODEL), 0.06)
        else:
            add("ssm_ba.weight", "F32", (2 * heads, D_MODEL), 0.06)
        add_norm("ssm_norm", hybrid.d_state)
        add("ssm_out.weight", output_format, (D_MODEL, value), 1.5 / math.sqrt(value))
    add_norm("post_attention_norm", D_MODEL)
    add("ffn_gate_inp.weight", router_format, (e, D_MODEL), 0.08)
    if hybrid.fused:
        add("ffn_gate_up_exps.weight", gate, (e, 2 * f, D_MODEL), 0.09)
    else:
        add("ffn_gate_exps.weight", gate, (e, f, D_MODEL), 0.09)
        add("ffn_up_exps.weight", up, (e, f, D_MODEL), 0.09)
    add("ffn_down_exps.weight", down, (e, D_MODEL, f), 0.09)
    shape = (D_MODEL,) if hybrid.fused else (1, D_MODEL)  # converters wrote either
    add("ffn_gate_inp_shexp.weight", "F32", shape, 0.06)
    add("ffn_gate_shexp.weight", "Q8_0", (hybrid.d_shared, D_MODEL), 0.09)
    add("ffn_up_shexp.weight", "Q8_0", (hybrid.d_shared, D_MODEL), 0.09)
    add("ffn_down_shexp.weight", "Q8_0", (D_MODEL, hybrid.d_shared), 0.09)
    if layer >= n_blocks - hybrid.skipped:
        add("nextn.eh_proj.weight", "Q8_0", (D_MODEL, 2 * D_MODEL), 0.05)
        for name in ("enorm", "hnorm", "shared_head_norm"):
            add_norm(f"nextn.{name}", D_MODEL)


def _hybrid_keys(hybrid: Hybrid | None) -> dict:
    if hybrid is None:
        return {}
    return {
        "rope.dimension_count": hybrid.rope_dim,
        "rope.dimension_sections": [3, 3, 2, 0],
        "expert_shared_feed_forward_length": hybrid.d_shared,
        "full_attention_interval": hybrid.interval,
        "nextn_predict_layers": hybrid.skipped,
        "ssm.conv_kernel": 4,
        "ssm.state_size": hybrid.d_state,
        "ssm.group_count": hybrid.key_heads,
        "ssm.time_step_rank": hybrid.value_heads,
        "ssm.inner_size": hybrid.value_heads * hybrid.d_state,
    }


def _metadata(model: TinyModel) -> dict:
    derived = model.arch in ("llama", "olmoe", "qwen2")
    width = "feed_forward_length" if derived else "expert_feed_forward_length"
    keys = {
        "block_count": len(model.experts),
        "context_length": CONTEXT,
        "embedding_length": D_MODEL,
        width: model.d_expert,
        "attention.head_count": model.n_heads,
        "attention.head_count_kv": model.n_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": model.rms_eps,
        "rope.freq_base": model.rope_base,
        "rope.dimension_count": model.head_dim,
        "expert_count": model.n_experts,
        "expert_used_count": model.experts_per_token,
        **_hybrid_keys(model.hybrid),
    }
    if model.arch == "qwen2moe":
        keys["expert_shared_feed_forward_length"] = D_SHARED
    if model.n_experts == 1:
        del keys["expert_count"], keys["expert_used_count"]
    return {
        "general.architecture": model.arch,
        **{f"{model.arch}.{key}": value for key, value in keys.items()},
        **TOKENIZER,
    }


def write_model(model: TinyModel, path: Path) -> None:
    """Writes the file of `model`."""
    entries = [(name, *tensor) for name, tensor in _tensors(model).items()]
    write_gguf(path, _metadata(model), entries)


def tokens(model: TinyModel, count: int = 48) -> np.ndarray:
    """Random token ids, int32 [count]."""
    return np.random.default_rng(100 + model.seed).integers(0, VOCAB, count, np.int32)


def weights_sha256(model: TinyModel) -> str:
    """Digest of the shape and of every tensor's name, format and bytes."""
    digest = hashlib.sha256(repr(model).encode())
    for name, (format, shape, raw) in _tensors(model).items():
        digest.update(f"{name} {format} {shape}\n".encode())
        digest.update(np.ascontiguousarray(raw).data)
    return digest.hexdigest()
