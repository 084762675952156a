"""From a GGUF file's tensors to Hugging Face's own module of the same model.

Owns the one mapping of our architectures to transformers' classes: hyperparameters, the order of q
and k rows, and what the file keeps in other pieces. Names of all else are gguf's.

Source: transformers 5, models/{qwen3_moe,mixtral,olmoe} (an expert's gate and up are one tensor,
gate first); llama.cpp's conversion, `LlamaModel.permute`. transformers' own GGUF loader is no help:
it has no expert width for Qwen3 and loads a Mixtral file as a dense model without a word.
"""

from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from hobbit_jax.models.attention import GroupedQuery
from hobbit_jax.models.config import ModelConfig, layer_tensors
from hobbit_jax.models.delta_net import GatedDeltaNet

# Beginnings of their classes' names, of dense models and of others.
_DENSE = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
_WITH_EXPERTS = {
    "qwen3moe": "Qwen3Moe", "qwen2moe": "Qwen2Moe", "llama": "Mixtral", "olmoe": "Olmoe",
    "qwen3next": "Qwen3Next", "qwen35moe": "Qwen3_5Moe",
}  # fmt: skip
_HYBRIDS = ("qwen35moe", "qwen3next")


def _attention(config: ModelConfig) -> GroupedQuery:
    """Of the blocks that attend, which are alike in all these architectures."""
    attentions = (block.attention for block in config.blocks)
    return next(a for a in attentions if isinstance(a, GroupedQuery))


def load(
    config: ModelConfig,
    tensor: Callable[[str], np.ndarray],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
) -> Any:
    """The whole model, a torch.nn.Module ready to compute, its weights rounded to `dtype`.

    `tensor` gives one dequantised, in float32, by its name in the file; one is held at a time.
    `attention` is transformers' `attn_implementation`.

    Raises:
        NotImplementedError: an architecture without a module here.
        RuntimeError: a weight has another shape than its place, or a place got none.
    """
    model = _empty_model(config, attention)
    for name, array in _weights(config, tensor, model):
        place = model.get_parameter(name)
        if tuple(place.shape) != array.shape:
            raise RuntimeError(f"{name} is {array.shape}; the module wants {tuple(place.shape)}")
        # A copy: an F32 tensor is a view of the file.
        weight = torch.from_numpy(np.array(array)).to(device, dtype)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(weight, requires_grad=False))
    if config.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device)


def _empty_model(config: ModelConfig, attention: str) -> Any:
    """The module without weights (on PyTorch's meta device), in float32."""
    prefix = (_DENSE if config.has_dense_ffn else _WITH_EXPERTS).get(config.arch)
    if prefix is None:
        raise NotImplementedError(f"architecture {config.arch!r} has no Hugging Face module here")
    heads = _attention(config)
    if heads.rope.yarn is not None:
        raise NotImplementedError(
            "the PyTorch baseline has no YaRN, which this file has (rope.scaling.type); compare "
            "with --baseline llama_cpp"
        )
    settings = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": heads.n_heads,
        "num_key_value_heads": heads.n_kv_heads,
        "head_dim": heads.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": heads.rope.base},
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.router.renormalise,
        # Some classes know one of these names only, and leave the other alone.
        "num_experts": config.n_experts,
        "num_local_experts": config.n_experts,
        "moe_intermediate_size": config.d_expert,
        "intermediate_size": config.d_expert,
        "shared_expert_intermediate_size": config.blocks[0].d_shared,
        "tie_word_embeddings": config.tied_head,
        "attn_implementation": attention,
        "pad_token_id": None,
    }
    if config.arch in _HYBRIDS:
        settings |= _hybrid_settings(config)
    of_text = "Text" if config.arch == "qwen35moe" else ""
    made = getattr(transformers, f"{prefix}{of_text}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForCausalLM")(made)
    # Its frequencies are no weights: nothing would fill them.
    model.model.rotary_emb = type(model.model.rotary_emb)(made)
    return model.eval()


def _weights(
    config: ModelConfig, tensor: Callable[[str], np.ndarray], model: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the module, float32 array) of all tensors, one at a time, to be placed at once."""
    for layer in range(config.n_layers):
        delta = config.blocks[config.block_of_layer[layer]].attention
        if isinstance(delta, GatedDeltaNet):
            names = layer_tensors(config, layer)
            yield from _delta_net(delta, lambda role, names=names: tensor(names[role]), layer)
        for name, array in expert_weights(config, tensor, layer).items():
            yield f"model.layers.{layer}.mlp.{name}", array
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config.arch)
    by_name = gguf.get_tensor_name_map(arch, config.n_layers)
    attention = _attention(config)
    heads = {"attn_q": attention.n_heads, "attn_k": attention.n_kv_heads}
    for name in [name for name, place in model.named_parameters() if place.is_meta]:
        ours = by_name.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise RuntimeError(f"no weight for {name}")
        array, role = tensor(ours), ours.split(".")[-2]
        if attention.rope.style == "norm" and role in heads:
            array = interleaved_to_halves(array, heads[role])
        elif config.arch in _HYBRIDS and role.endswith("_norm") and role != "ssm_norm":
            array = array - np.float32(1)  # which transformers adds
        elif role == "ffn_gate_inp_shexp":
            array = array.reshape(1, -1)
        yield name, array


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


def interleaved_to_halves(weights_NK: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation of q or k rows: rotary pairs (2i, 2i + 1) to (i, i + d/2)."""
    n, k = weights_NK.shape
    return weights_NK.reshape(n_heads, n // n_heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def _hybrid_settings(config: ModelConfig) -> dict[str, Any]:
    """What transformers' configurations of the hybrids have beside the others'."""
    attentions, attention = [block.attention for block in config.blocks], _attention(config)
    delta = next(a for a in attentions if isinstance(a, GatedDeltaNet))
    rope = {
        "rope_type": "default",
        "rope_theta": attention.rope.base,
        "partial_rotary_factor": attention.rope.dim / attention.head_dim,
    }
    if config.arch == "qwen35moe":  # a text has one position for all
        rope["mrope_section"] = [attention.rope.dim // 2, 0, 0]
    return {
        "rope_parameters": rope,
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


def _tiled_to_grouped(array: np.ndarray, delta: GatedDeltaNet, axis: int = 0) -> np.ndarray:
    """Value heads in the order of their key heads, along an axis that has one after another."""
    ratio = delta.n_value_heads // delta.n_key_heads
    moved = np.moveaxis(array, axis, 0)
    parts = moved.reshape(ratio, delta.n_key_heads, -1, *moved.shape[1:])
    return np.moveaxis(parts.swapaxes(0, 1).reshape(moved.shape), 0, axis)


def _delta_net(
    delta: GatedDeltaNet, read: Callable[[str], np.ndarray], block: int
) -> Iterator[tuple[str, np.ndarray]]:
    """As `_weights`, of a delta net, whose tensors `read` gives by role."""
    keys, to = 2 * delta.key_width, f"model.layers.{block}.linear_attn."
    qkv, z, conv, out = (read(r) for r in ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_out"))
    rate, bias = read("ssm_a"), read("ssm_dt.bias")
    if delta.value_heads == "tiled":
        qkv, conv = (
            np.concatenate([a[:keys], _tiled_to_grouped(a[keys:], delta)]) for a in (qkv, conv)
        )
        z, rate, bias = (_tiled_to_grouped(a, delta) for a in (z, rate, bias))
        out = _tiled_to_grouped(out, delta, axis=1)
        yield f"{to}in_proj_qkv.weight", qkv
        yield f"{to}in_proj_z.weight", z
        yield f"{to}in_proj_b.weight", _tiled_to_grouped(read("ssm_beta"), delta)
        yield f"{to}in_proj_a.weight", _tiled_to_grouped(read("ssm_alpha"), delta)
    else:  # theirs is by key head: its rows of q, k, v and z
        parts = (*np.split(qkv, [keys // 2, keys]), z)
        by_head = [a.reshape(delta.n_key_heads, -1, a.shape[1]) for a in parts]
        yield f"{to}in_proj_qkvz.weight", np.concatenate(by_head, 1).reshape(-1, qkv.shape[1])
        yield f"{to}in_proj_ba.weight", read("ssm_ba")
    yield f"{to}conv1d.weight", conv[:, None]
    yield f"{to}A_log", np.log(-rate)
    yield f"{to}dt_bias", bias
    yield f"{to}out_proj.weight", out
