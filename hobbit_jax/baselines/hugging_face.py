"""From a GGUF file's tensors to Hugging Face's own module of the same model.

Source: transformers 5, models/{qwen3_moe,mixtral,olmoe} (an expert's gate and up are one tensor,
gate first); llama.cpp's conversion, `LlamaModel.permute`. transformers' own GGUF loader is no help:
it has no expert width for Qwen3 and loads a Mixtral file as a dense model without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from hobbit_jax.models.config import (
    OUTPUT,
    OUTPUT_NORM,
    TOKEN_EMBEDDING,
    GatedDeltaNet,
    GroupedQuery,
    ModelConfig,
    block_tensors,
    layer_tensors,
)

# A torch.nn.Module of transformers; PyTorch types each of its attributes as a tensor.
HuggingFaceModel = Any

# Architecture → the beginning of its classes' names; of a model without experts, and with.
_DENSE = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
_MIXTURES = {
    "qwen2moe": "Qwen2Moe",
    "qwen3moe": "Qwen3Moe",
    "llama": "Mixtral",
    "olmoe": "Olmoe",
    "qwen3next": "Qwen3Next",
    "qwen35moe": "Qwen3_5Moe",
}
# These store norms with the 1 that transformers adds.
_HYBRIDS = ("qwen35moe", "qwen3next")
_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
# Our role → theirs within a block; experts are apart.
_NAMES = {
    **_NORMS,
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "router": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ssm_norm": "linear_attn.norm",
}


def interleaved_to_halves(weights_NK: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation of q or k rows: rotary pairs (2i, 2i + 1) to (i, i + d/2)."""
    n, k = weights_NK.shape
    return weights_NK.reshape(n_heads, n // n_heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def _attention(config: ModelConfig) -> GroupedQuery:
    """Of the blocks that attend, which are alike in all these architectures."""
    attentions = (block.attention for block in config.blocks)
    return next(a for a in attentions if isinstance(a, GroupedQuery))


def empty_model(config: ModelConfig, kernel: str = "sdpa") -> HuggingFaceModel:
    """The module without weights (on PyTorch's meta device), in float32.

    Args:
        config: of the file.
        kernel: of attention, transformers' `attn_implementation`.

    Raises:
        NotImplementedError: an architecture without a module here.
    """
    kind = (_DENSE if config.has_dense_ffn else _MIXTURES).get(config.arch)
    if kind is None:
        raise NotImplementedError(f"architecture {config.arch!r} has no Hugging Face module here")
    attention = _attention(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": attention.rope.base}
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": rope,
        "num_experts_per_tok": config.experts_per_token,
        "tie_word_embeddings": config.tied_head,
        "attn_implementation": kernel,
        "pad_token_id": None,
        # Each class heeds the names that it knows.
        "intermediate_size": config.d_expert,
        "moe_intermediate_size": config.d_expert,
        "num_experts": config.n_experts,
        "num_local_experts": config.n_experts,
        "shared_expert_intermediate_size": config.blocks[0].d_shared,
        "norm_topk_prob": config.router.renormalise,
    }
    if config.arch in _HYBRIDS:
        settings |= _delta_settings(config)
        rope["partial_rotary_factor"] = attention.rope.dim / attention.head_dim
    if config.arch == "qwen35moe":
        rope["mrope_section"] = [attention.rope.dim // 2, 0, 0]  # a text has one position for all
    suffix = "TextConfig" if config.arch == "qwen35moe" else "Config"
    made = getattr(transformers, kind + suffix)(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(made)
    # Its frequencies are no weights: nothing would fill them.
    model.model.rotary_emb = type(model.model.rotary_emb)(made)
    return model.eval()


def _delta_settings(config: ModelConfig) -> dict[str, Any]:
    attentions = [block.attention for block in config.blocks]
    delta = next(a for a in attentions if isinstance(a, GatedDeltaNet))
    return {
        "linear_key_head_dim": delta.d_state,
        "linear_value_head_dim": delta.d_state,
        "linear_num_key_heads": delta.n_key_heads,
        "linear_num_value_heads": delta.n_value_heads,
        "linear_conv_kernel_dim": delta.kernel,
        "layer_types": [
            "full_attention" if isinstance(a, GroupedQuery) else "linear_attention"
            for a in attentions
        ],
    }


def dense_weights(
    config: ModelConfig, tensor: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the module, float32 array) of all but the experts, one tensor at a time.

    Args:
        config: of the file.
        tensor: dequantised float32 by its name in the file.
    """
    added, attention = np.float32(config.arch in _HYBRIDS), _attention(config)
    heads = {"attn_q": attention.n_heads, "attn_k": attention.n_kv_heads}
    yield "model.embed_tokens.weight", tensor(TOKEN_EMBEDDING)
    yield "model.norm.weight", tensor(OUTPUT_NORM) - added
    if not config.tied_head:
        yield "lm_head.weight", tensor(OUTPUT)
    for block, spec in enumerate(config.blocks):
        roles, to = block_tensors(config, block), f"model.layers.{block}."
        for role, theirs in _NAMES.items():
            if role not in roles:
                continue
            array = tensor(roles[role])
            if role in _NORMS:
                array = array - added
            elif attention.rope.style == "norm" and role in heads:
                array = interleaved_to_halves(array, heads[role])
            elif role == "ffn_gate_inp_shexp":
                array = array.reshape(1, -1)
            yield f"{to}{theirs}.weight", array
            if (bias := f"{role}.bias") in roles:
                yield f"{to}{theirs}.bias", tensor(roles[bias])
        if isinstance(spec.attention, GatedDeltaNet):
            read = partial(lambda roles, role: tensor(roles[role]), roles)
            for name, array in _delta_weights(spec.attention, read):
                yield f"{to}linear_attn.{name}", array


def _tiled_to_grouped(array: np.ndarray, delta: GatedDeltaNet, axis: int = 0) -> np.ndarray:
    """Value heads in the order of their key heads, along an axis that has one after another."""
    ratio = delta.n_value_heads // delta.n_key_heads
    moved = np.moveaxis(array, axis, 0)
    parts = moved.reshape(ratio, delta.n_key_heads, -1, *moved.shape[1:])
    return np.moveaxis(parts.swapaxes(0, 1).reshape(moved.shape), 0, axis)


def _delta_weights(
    delta: GatedDeltaNet, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Of one block's delta net; `read` gives its tensors by role."""
    keys = 2 * delta.key_width
    qkv, z, conv, out = (read(r) for r in ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_out"))
    rate, bias = read("ssm_a"), read("ssm_dt.bias")
    if delta.value_heads == "tiled":
        qkv, conv = (
            np.concatenate([a[:keys], _tiled_to_grouped(a[keys:], delta)]) for a in (qkv, conv)
        )
        z, rate, bias = (_tiled_to_grouped(a, delta) for a in (z, rate, bias))
        out = _tiled_to_grouped(out, delta, axis=1)
        yield "in_proj_qkv.weight", qkv
        yield "in_proj_z.weight", z
        yield "in_proj_b.weight", _tiled_to_grouped(read("ssm_beta"), delta)
        yield "in_proj_a.weight", _tiled_to_grouped(read("ssm_alpha"), delta)
    else:  # theirs is by key head: its rows of q, k, v and z
        parts = (*np.split(qkv, [keys // 2, keys]), z)
        by_head = [a.reshape(delta.n_key_heads, -1, a.shape[1]) for a in parts]
        yield "in_proj_qkvz.weight", np.concatenate(by_head, 1).reshape(-1, qkv.shape[1])
        yield "in_proj_ba.weight", read("ssm_ba")
    yield "conv1d.weight", conv[:, None]
    yield "A_log", np.log(-rate)
    yield "dt_bias", bias
    yield "out_proj.weight", out


def expert_weights(
    config: ModelConfig, tensor: Callable[[str], np.ndarray], layer: int
) -> dict[str, np.ndarray]:
    """The experts of a layer by their place in its `mlp`, float32.

    gate_up_proj is [E, 2F, D] and down_proj [E, D, F]; a dense FFN's matrices are apart.
    """
    names = layer_tensors(config, layer)
    if config.has_dense_ffn:
        parts = ("gate", "up", "down")
        return {f"{part}_proj.weight": tensor(names[f"ffn_{part}_exps"]) for part in parts}
    stacks = ["ffn_gate_up_exps"] if config.fused_gate_up else ["ffn_gate_exps", "ffn_up_exps"]
    return {
        "experts.gate_up_proj": np.concatenate([tensor(names[role]) for role in stacks], axis=1),
        "experts.down_proj": tensor(names["ffn_down_exps"]),
    }


def fill(
    model: HuggingFaceModel,
    named: Iterable[tuple[str, np.ndarray]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Gives places of an empty module their weights, rounded to `dtype`, on `device`.

    Raises:
        RuntimeError: a weight has another shape than its place.
    """
    for name, array in named:
        place = model.get_parameter(name)
        if tuple(place.shape) != array.shape:
            raise RuntimeError(f"{name} is {array.shape}; the module wants {tuple(place.shape)}")
        # A copy: an F32 tensor is a view of the file.
        weight = torch.from_numpy(np.array(array)).to(device, dtype)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(weight, requires_grad=False))


def load(
    config: ModelConfig,
    tensor: Callable[[str], np.ndarray],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
) -> HuggingFaceModel:
    """The whole model on `device`; arguments as of `empty_model` and `dense_weights`.

    Raises:
        RuntimeError: a place of the module got no weight, or one of another shape.
    """
    model = empty_model(config, attention)
    fill(model, dense_weights(config, tensor), dtype, device)
    for layer in range(config.n_layers):
        to = f"model.layers.{layer}.mlp."
        arrays = expert_weights(config, tensor, layer)
        fill(model, ((to + name, array) for name, array in arrays.items()), dtype, device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise RuntimeError(f"no weight for {', '.join(missing)}")
    return model.to(device)
