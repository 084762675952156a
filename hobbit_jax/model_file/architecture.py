"""The model inside a GGUF file: its hyperparameters, and what its tensors are called.

Owns the decision whether we can run a file at all. `read_config` takes every number from the
metadata and holds every tensor against it, so the store and the model may index without asking.
Nothing is guessed: where a key may be absent, the default is the one the format defines, and a
feature that would change the arithmetic is refused by name.

Source: llama.cpp, src/models/{qwen3moe,llama,olmoe}.cpp and llama-model.cpp (keys, defaults,
shapes); gguf.constants (names).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hobbit_jax.model_file import metadata
from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo
from hobbit_jax.model_file.metadata import (
    REQUIRED,
    Kind,
    Required,
    integer,
    number,
    of_every_layer,
    shown,
    texts,
)
from hobbit_jax.model_file.other_files import refuse_other_kinds

T = TypeVar("T")

TOKEN_EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"  # absent when the head is tied to the embedding


@dataclass(frozen=True)
class _Family:
    """What llama.cpp fixes in code, not in the file, for one architecture."""

    expert_width_key: str
    rope_style: Literal["neox", "norm"]
    qk_norm: Literal["none", "head", "full"]
    renormalise_topk: bool
    may_tie_head: bool


_FAMILIES = {
    "qwen3moe": _Family("expert_feed_forward_length", "neox", "head", True, True),
    # Mixtral: the converter permutes q and k for interleaved rotary pairs.
    "llama": _Family("feed_forward_length", "norm", "none", True, True),
    "olmoe": _Family("feed_forward_length", "neox", "full", False, False),
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of one model, as its file states them."""

    arch: str  # one of SUPPORTED_ARCHITECTURES
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    experts_per_token: int
    d_expert: int  # hidden width of one expert
    vocab_size: int
    context_length: int  # tokens
    rope_base: float
    rope_dim: int  # leading dimensions of a head that rotate
    rope_style: Literal["neox", "norm"]  # pairs (i, i + rope_dim/2), or (2i, 2i + 1)
    rms_eps: float
    qk_norm: Literal["none", "head", "full"]  # over nothing, one head, the whole projection
    renormalise_topk: bool  # the K router weights are divided by their sum
    tied_head: bool


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, str]:
    """Names of the tensors of one layer, by role; `attn_*_norm` only where the model has them."""
    return {
        role: f"blk.{layer}.{_STORED_AS.get(role, role)}.weight" for role in _layer_shapes(config)
    }


def global_tensors(config: ModelConfig) -> dict[str, str]:
    """Names of the tensors outside the layers, by role; no `output` when the head is tied."""
    names = {"token_embedding": TOKEN_EMBEDDING, "output_norm": OUTPUT_NORM}
    return names if config.tied_head else names | {"output": OUTPUT}


def read_config(file: GGUFFile) -> ModelConfig:
    """Reads the hyperparameters and checks that all tensors fit them.

    Raises:
      ValueError: a missing or impossible key, a missing tensor, or one of the wrong shape.
      NotImplementedError: another architecture, or a feature that we do not compute.
    """
    refuse_other_kinds(file)
    arch = file.read("general.architecture", metadata.text())
    if arch not in _FAMILIES:
        raise NotImplementedError(
            f"{file.paths[0]}: architecture {shown(arch)}; supported are "
            f"{', '.join(SUPPORTED_ARCHITECTURES)} (llama with experts)"
        )
    family = _FAMILIES[arch]
    keys = _Keys(file, arch)
    if arch == "llama" and not keys.read("expert_count", integer(), 0):
        raise NotImplementedError(
            f"{file.paths[0]}: a dense llama model (llama.expert_count is 0); supported are llama "
            "models with experts, such as Mixtral"
        )
    _refuse_features(keys, family)

    # Whatever is counted by a key is counted again in the tensors (`_check_tensors`); only this
    # one is a number of tensors itself, and so has to be held against them first.
    n_tensors = len(file.tensors)
    n_layers = keys.read("block_count", integer(1, n_tensors, "the file's number of tensors"))
    heads = of_every_layer(integer(1), n_layers)
    d_model = keys.read("embedding_length", integer(1))
    n_heads = keys.read("attention.head_count", heads)
    # Defaults of the format, not guesses: llama.cpp computes a file without these keys so.
    n_kv_heads = keys.read("attention.head_count_kv", heads, n_heads)
    head_dim = keys.read("attention.key_length", integer(1), d_model // n_heads)
    experts_per_token = keys.read("expert_used_count", integer(1))
    config = ModelConfig(
        arch=arch,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_experts=keys.read("expert_count", integer(1)),
        experts_per_token=experts_per_token,
        d_expert=_expert_width(keys, family, n_layers, experts_per_token),
        vocab_size=_vocab_size(keys),
        context_length=keys.read("context_length", integer(1)),
        rope_base=keys.read("rope.freq_base", _ROPE_BASE, 10000.0),
        rope_dim=keys.read("rope.dimension_count", integer(1), head_dim),
        rope_style=family.rope_style,
        rms_eps=keys.read("attention.layer_norm_rms_epsilon", _RMS_EPS),
        qk_norm=family.qk_norm,
        renormalise_topk=family.renormalise_topk,
        tied_head=family.may_tie_head and OUTPUT not in file.tensors,
    )
    _check_numbers(keys, config)
    _check_tensors(file, config)
    return config


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """What `read_config` reads: the metadata of a file of this model, without a tokenizer."""
    family = _FAMILIES[config.arch]
    keys: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": config.context_length,
        "embedding_length": config.d_model,
        # Of a dense layer, which no model here has; llama.cpp wants the key all the same.
        "feed_forward_length": config.d_expert * config.experts_per_token,
        family.expert_width_key: config.d_expert,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "rope.freq_base": config.rope_base,
        "rope.dimension_count": config.rope_dim,
        "expert_count": config.n_experts,
        "expert_used_count": config.experts_per_token,
        "vocab_size": config.vocab_size,
    }
    of_arch = {f"{config.arch}.{key}": value for key, value in keys.items()}
    return {"general.architecture": config.arch, **of_arch}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Row-major shapes of all tensors by name, in the order in which files have them."""
    shapes: dict[str, tuple[int, ...]] = {TOKEN_EMBEDDING: (config.vocab_size, config.d_model)}
    for layer in range(config.n_layers):
        names = layer_tensors(config, layer)
        shapes |= {names[role]: shape for role, shape in _layer_shapes(config).items()}
    shapes[OUTPUT_NORM] = (config.d_model,)
    if not config.tied_head:
        shapes[OUTPUT] = (config.vocab_size, config.d_model)
    return shapes


# Role → name in the file, where they differ.
_STORED_AS = {"router": "ffn_gate_inp"}


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Row-major shapes of the tensors of a layer, by role."""
    d, f, e = config.d_model, config.d_expert, config.n_experts
    q_width = config.n_heads * config.head_dim
    kv_width = config.n_kv_heads * config.head_dim
    norms = {
        "none": {},
        "head": {"attn_q_norm": (config.head_dim,), "attn_k_norm": (config.head_dim,)},
        "full": {"attn_q_norm": (q_width,), "attn_k_norm": (kv_width,)},
    }[config.qk_norm]
    return {
        "attn_norm": (d,),
        "attn_q": (q_width, d),
        "attn_k": (kv_width, d),
        "attn_v": (kv_width, d),
        "attn_output": (d, q_width),
        **norms,
        "ffn_norm": (d,),
        "router": (e, d),
        "ffn_gate_exps": (e, f, d),
        "ffn_up_exps": (e, f, d),
        "ffn_down_exps": (e, d, f),
    }


class _Keys:
    """Checked access to `{arch}.*` metadata."""

    def __init__(self, file: GGUFFile, arch: str):
        self.file, self.arch, self.path = file, arch, file.paths[0]

    def read(self, key: str, kind: Kind[T], default: T | Required = REQUIRED) -> T:
        return metadata.read(self.path, self.file.metadata, f"{self.arch}.{key}", kind, default)

    def unchecked(self, key: str, default: Any = None) -> Any:
        """For comparing only: a value of a wrong type equals none of the right ones."""
        return self.file.metadata.get(f"{self.arch}.{key}", default)


# Beyond these bounds float32 arithmetic gives zeros or NaN, not another model.
_RMS_EPS = number(1e-30, 1.0)
_ROPE_BASE = number(1.0, 1e30)


def _vocab_size(keys: _Keys) -> int:
    """Rows of the embedding: the tokens of the file or, without a tokenizer, its own key."""
    tokens = keys.file.read("tokenizer.ggml.tokens", texts(), [])
    return len(tokens) or keys.read("vocab_size", integer(1))


def _expert_width(keys: _Keys, family: _Family, n_layers: int, experts_per_token: int) -> int:
    """Hidden width of one expert; 0 or no key of its own is llama.cpp's "not said" (qwen3moe)."""
    width = of_every_layer(integer(1), n_layers)
    derived = family.expert_width_key != "feed_forward_length"
    if derived and not keys.unchecked(family.expert_width_key):
        dense = keys.unchecked("feed_forward_length")
        if dense is not None:
            return keys.read("feed_forward_length", width) // experts_per_token
    return keys.read(family.expert_width_key, width)


def _refuse_features(keys: _Keys, family: _Family) -> None:
    """Refuses every key whose value would change the arithmetic and that we do not compute."""
    softmax = 1  # gguf.ExpertGatingFuncType.SOFTMAX; 0 is "not said"
    neutral = {
        "rope.scaling.type": ("none", "linear", "yarn", "longrope"),  # all equal at factor 1
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.yarn_attn_factor": (1.0,),
        "expert_weights_scale": (1.0, 0.0),
        "expert_weights_norm": (family.renormalise_topk,),
        "expert_gating_func": (softmax, 0),
        "expert_shared_count": (0,),
        "expert_shared_feed_forward_length": (0,),
        "expert_group_count": (1, 0),
        "leading_dense_block_count": (0,),
        "attention.clamp_kqv": (0.0,),
        "attention.scale": (0.0,),
        "attention.causal": (True,),
        "attn_logit_softcapping": (0.0,),
        "final_logit_softcapping": (0.0,),
        "logit_scale": (1.0, 0.0),
    }
    if keys.unchecked("rope.scaling.type") != "none":  # with "none", llama.cpp takes no factor
        factor = "rope.scaling.factor"
        if keys.unchecked(factor) is None:
            factor = "rope.scale_linear"  # its old name
        neutral[factor] = (1.0, 0.0)  # 0 is "not said"
    for key, allowed in neutral.items():
        value = keys.unchecked(key, allowed[0])
        if value not in allowed:
            raise NotImplementedError(
                f"{keys.path}: {keys.arch}.{key} is {shown(value)}; supported are models where it "
                f"is {allowed[0]!r} or absent"
            )
    window = keys.read("attention.sliding_window", integer(0, 2**32 - 1), 0)
    context = keys.read("context_length", integer(1))
    if 0 < window < context:
        raise NotImplementedError(
            f"{keys.path}: attention over a sliding window of {window} tokens in a context of "
            f"{context}; supported is attention over the whole context"
        )


def _check_numbers(keys: _Keys, config: ModelConfig) -> None:
    """Relations between hyperparameters that no tensor shape would show."""
    value_dim = keys.read("attention.value_length", integer(1), config.head_dim)
    if value_dim != config.head_dim:
        raise NotImplementedError(
            f"{keys.path}: heads of {config.head_dim} (key_length) and {value_dim} (value_length); "
            "supported are heads of one width"
        )
    if config.rope_dim != config.head_dim:
        # llama.cpp asserts the same for all three architectures.
        raise NotImplementedError(
            f"{keys.path}: {config.rope_dim} of {config.head_dim} head dimensions rotate; "
            "supported is rotation of whole heads"
        )
    broken = None
    if config.head_dim % 2:
        broken = f"a head dimension of {config.head_dim}, expected an even one"
    elif config.n_heads % config.n_kv_heads:
        broken = f"{config.n_heads} heads, expected a multiple of the {config.n_kv_heads} kv heads"
    elif config.experts_per_token > config.n_experts:
        broken = (
            f"{config.experts_per_token} experts per token, expected at most the number of "
            + (f"experts, {config.n_experts}")
        )
    if broken:
        raise ValueError(f"{keys.path}: the metadata gives {broken}; convert the model again")


# Tensors that change the arithmetic, by the sentence that refuses them; first match counts.
_REFUSED_TENSORS = (
    (r"rope_(freqs|factors_\w+)\.weight|.*\.rope_(freqs|factors_\w+)\.weight",
     "scaled rotary frequencies; supported are plain ones"),
    (r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight",
     "one tensor per expert, as converters wrote before April 2024; supported are stacked "
     "experts (ffn_gate_exps): convert the model again with a current llama.cpp"),
    (r".*_shexp\..*", "shared experts; supported are models with routed experts only"),
    (r".*\.attn_qkv\..*", "fused q, k and v; supported are separate ones"),
    (r".*\.ffn_gate_up_exps\..*", "fused gate and up experts; supported are separate ones"),
    (r".*\.bias", "biases; supported are models without"),
)  # fmt: skip


def _divides_by_one(tensor: TensorInfo) -> bool:
    """Whether this is `rope_freqs.weight` that leaves every frequency as it is."""
    is_floats = tensor.name == "rope_freqs.weight" and tensor.format == "F32"
    return is_floats and tensor.nbytes > 0 and bool((tensor.raw.view("<f4") == 1).all())


def _check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    wanted = tensor_shapes(config)
    path = file.paths[0]
    unknown = {
        name
        for name in file.tensors.keys() - wanted.keys()
        if not _divides_by_one(file.tensors[name])
    }
    for name in unknown:
        for pattern, what in _REFUSED_TENSORS:
            if re.fullmatch(pattern, name):
                raise NotImplementedError(f"{path}: tensor {shown(name)} means {what}")
    # A foreign tensor is reported before a missing one: it says more about what the file is.
    foreign = sorted(unknown)
    if foreign:
        raise NotImplementedError(
            f"{path}: tensor {shown(foreign[0])} is no part of {config.arch} with "
            f"{config.n_layers} layers as we compute it; supported roles are "
            f"{', '.join(_layer_shapes(config))}"
        )
    for name, shape in wanted.items():
        if name not in file.tensors:
            raise ValueError(
                f"{path}: tensor {name!r} is missing, expected shape {shape}; download or convert "
                "the model again"
            )
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {file.tensors[name].shape}, expected {shape} "
                "from the metadata; convert the model again"
            )
