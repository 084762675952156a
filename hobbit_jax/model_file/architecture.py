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
from typing import Any, Literal

from hobbit_jax.model_file.gguf_file import GGUFFile

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
    arch = file.metadata.get("general.architecture")
    if arch not in _FAMILIES:
        raise NotImplementedError(
            f"{file.paths[0]}: architecture {arch!r}; supported are "
            f"{', '.join(SUPPORTED_ARCHITECTURES)} (llama with experts)"
        )
    family = _FAMILIES[arch]
    keys = _Keys(file, arch)
    if arch == "llama" and not keys.integer("expert_count", 0):
        raise NotImplementedError(
            f"{file.paths[0]}: a dense llama model (llama.expert_count is 0); supported are llama "
            "models with experts, such as Mixtral"
        )
    _refuse_features(keys, family)

    d_model = keys.positive("embedding_length")
    n_heads = keys.positive("attention.head_count")
    # Defaults of the format, not guesses: llama.cpp computes a file without these keys so.
    n_kv_heads = keys.positive("attention.head_count_kv", n_heads)
    head_dim = keys.positive("attention.key_length", d_model // n_heads)
    rope_dim = keys.positive("rope.dimension_count", head_dim)
    config = ModelConfig(
        arch=arch,
        n_layers=keys.positive("block_count"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_experts=keys.positive("expert_count"),
        experts_per_token=keys.positive("expert_used_count"),
        d_expert=keys.positive(family.expert_width_key),
        vocab_size=_vocab_size(keys),
        context_length=keys.positive("context_length"),
        rope_base=keys.number("rope.freq_base", 10000.0),
        rope_dim=rope_dim,
        rope_style=family.rope_style,
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
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
    """Typed access to `{arch}.*` metadata; every complaint names the key and the file."""

    def __init__(self, file: GGUFFile, arch: str):
        self.metadata, self.arch, self.path = file.metadata, arch, file.paths[0]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise ValueError(
                f"{self.path}: metadata key {self.arch}.{key} is missing, expected a number; "
                "convert the model again with a current llama.cpp"
            )
        if isinstance(value, list):
            raise NotImplementedError(
                f"{self.path}: {self.arch}.{key} has one value per layer; supported are models "
                "with equal layers"
            )
        if isinstance(value, bool | str):
            raise ValueError(f"{self.path}: {self.arch}.{key} is {value!r}, expected a number")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise ValueError(f"{self.path}: {self.arch}.{key} is {value}, expected an integer")
        return int(value)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise ValueError(f"{self.path}: {self.arch}.{key} is {value}, expected at least 1")
        return value


def _vocab_size(keys: _Keys) -> int:
    """Rows of the embedding: the tokens of the file or, without a tokenizer, its own key."""
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if tokens else keys.positive("vocab_size")


def _refuse_features(keys: _Keys, family: _Family) -> None:
    """Refuses every key whose value would change the arithmetic and that we do not compute."""
    softmax = 1  # gguf.ExpertGatingFuncType.SOFTMAX; 0 is "not said"
    neutral = {
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (1.0, 0.0),  # 0 is llama.cpp's "not said"
        "rope.scale_linear": (1.0, 0.0),
        "rope.scaling.attn_factor": (1.0,),
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
    for key, allowed in neutral.items():
        value = keys.get(key, allowed[0])
        if value not in allowed:
            raise NotImplementedError(
                f"{keys.path}: {keys.arch}.{key} is {value!r}; supported are models where it is "
                f"{allowed[0]!r} or absent"
            )
    window = keys.integer("attention.sliding_window", 0)
    context = keys.positive("context_length")
    if 0 < window < context:
        raise NotImplementedError(
            f"{keys.path}: attention over a sliding window of {window} tokens in a context of "
            f"{context}; supported is attention over the whole context"
        )


def _check_numbers(keys: _Keys, config: ModelConfig) -> None:
    """Relations between hyperparameters that no tensor shape would show."""
    value_dim = keys.positive("attention.value_length", config.head_dim)
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
    elif config.rms_eps <= 0 or config.rope_base <= 0:
        broken = f"rms_eps={config.rms_eps}, rope_base={config.rope_base}, expected both above 0"
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


def _check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    wanted = tensor_shapes(config)
    path = file.paths[0]
    for name in file.tensors.keys() - wanted.keys():
        for pattern, what in _REFUSED_TENSORS:
            if re.fullmatch(pattern, name):
                raise NotImplementedError(f"{path}: tensor {name!r} means {what}")
    # A foreign tensor is reported before a missing one: it says more about what the file is.
    foreign = sorted(file.tensors.keys() - wanted.keys())
    if foreign:
        raise NotImplementedError(
            f"{path}: tensor {foreign[0]!r} is no part of {config.arch} with {config.n_layers} "
            f"layers as we compute it; supported roles are {', '.join(_layer_shapes(config))}"
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
