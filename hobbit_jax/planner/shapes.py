"""What a model weighs, by its header alone: of a file, of a file behind a URL, or of a preset.

This module owns sizes: of the experts at any precision, of the dense part, of keys, values and
recurrent states, and of what prefill needs beside them. It reads GGUF's keys and tensor names
alike for every architecture, so a plan does not need the engine to run the model. Experts are a
`HostExperts` over arrays that take no memory, so that the live sizing of the pool
(`cache/pool_sizing.py`) can be asked as for real ones.

Source: llama.cpp, src/llama-quant.cpp (types of smaller files), src/llama-hparams.cpp (caches).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hobbit_jax.experts.store import NATIVE, ROLES, HostExperts
from hobbit_jax.model_file import metadata as checked
from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo, open_gguf
from hobbit_jax.model_file.metadata import REQUIRED, Kind, Required, integer, integers, text
from hobbit_jax.model_file.remote import open_remote
from hobbit_jax.models.config import (
    OUTPUT,
    TOKEN_EMBEDDING,
    BlockConfig,
    ModelConfig,
    layer_tensors,
    tensor_shapes,
)
from hobbit_jax.models.presets import PRESETS
from hobbit_jax.models.registry import config_metadata
from hobbit_jax.quantize.quant_recipe import format_in_a_file, q4_k_m_format
from pallas_kernels.formats import get_format

# Bytes of a number in the KV cache, by the engine's own formats (`models/caches.py`).
KV_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Models of the engine have their shapes from its configurations (`models/presets.py`). Of the
# others there is a record each: metadata in GGUF's keys, without the architecture; what each token
# reads beside routed experts, and an embedding that is not the head too, summed over the tensors
# that config.json implies in llama.cpp's Q4_K_M types; and a published file's size beside it.
PLANNED = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
PRESET_NAMES = (*(name for name in PRESETS if name != "tiny"), *PLANNED)
_FLOAT_BYTES = 4
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")
_MOST_LAYERS = 10_000
# Architectures whose other layers than every fourth are recurrent where the file does not say.
_DELTA_NETS = ("qwen3next", "qwen35moe")

T = TypeVar("T")
D = TypeVar("D")
Stack = tuple[str, tuple[int, ...]]  # type and row-major shape
Matrices = Sequence[Stack]  # gate, up and down of a layer


@dataclass(frozen=True)
class KVCache:
    """Keys and values of layers that are alike: `numbers` a token and layer, of a window or all."""

    layers: int
    numbers: int
    window: int | None


@dataclass(frozen=True)
class PlannedModel:
    """A model's shapes and sizes.

    Attributes:
        name: of the file or the preset.
        n_layers: all of them; those with routed experts are `config`'s.
        config: the layers with routed experts, as a qwen3moe model would have them. The store asks
            for a configuration, and of this one only experts, widths and limits mean anything.
        experts: gate, up and down of each of these layers.
        dense_bytes: on the device, of everything but the routed experts.
        dense_read_bytes: of these, what one token reads: of an embedding that is not the head, a
            row.
        caches: keys and values by kind of layer.
        state_numbers: of recurrent layers, for one sequence, float32.
    """

    name: str
    n_layers: int
    config: ModelConfig
    experts: Sequence[Matrices]
    dense_bytes: int
    dense_read_bytes: int
    caches: Sequence[KVCache]
    state_numbers: int

    @property
    def native_bytes(self) -> int:
        """Of all experts, natively."""
        return self.store().precision_bytes(NATIVE)

    def store(self, low_format: str | None = None) -> HostExperts:
        """The experts natively and, with a format, at a low precision of our own."""
        if low_format is None:
            return HostExperts(self.config, self._file(self.experts))
        low = [[(low_format, shape) for _, shape in matrices] for matrices in self.experts]
        return HostExperts(self.config, self._file(self.experts), [self._file(low)])

    def smaller_file(self, recipe: str) -> PlannedModel | None:
        """llama.cpp's own file of `recipe`, Q3_K_M or Q2_K, with the same dense part.

        Types fall back as llama.cpp's do. None if its experts are no smaller than these.
        """
        config = self.config
        smaller = []
        for layer, ((_, gate), (_, up), (_, down)) in enumerate(self.experts):
            name = layer_tensors(config, layer)["ffn_down_exps"]
            more = q4_k_m_format(name, (*down[:-1], 256), config) == "Q6_K"
            if recipe == "Q2_K":
                formats = ("Q2_K", "Q2_K", "Q3_K")
            else:
                first = layer < config.n_layers // 16
                formats = ("Q3_K", "Q3_K", "Q5_K" if first else "Q4_K" if more else "Q3_K")
            smaller.append(
                [
                    (format_in_a_file(format, shape[-1]), shape)
                    for format, shape in zip(formats, (gate, up, down), strict=True)
                ]
            )
        found = replace(self, experts=smaller)
        return found if found.native_bytes < self.native_bytes else None

    def _file(self, experts: Sequence[Matrices]) -> GGUFFile:
        named = {}
        for layer, matrices in enumerate(experts):
            names = layer_tensors(self.config, layer)
            named |= {names[role]: stack for role, stack in zip(ROLES, matrices, strict=True)}
        return _file_of_shapes(named)

    def kv_cache_bytes(self, context: int, kv_format: str = "float32") -> int:
        """Device bytes of one sequence's keys and values, and of its recurrent states."""
        numbers = sum(
            kind.layers * kind.numbers * min(context, kind.window or context)
            for kind in self.caches
        )
        return numbers * KV_BYTES[kv_format] + self.state_numbers * _FLOAT_BYTES

    def scratch_bytes(self, context: int, chunk_tokens: int) -> int:
        """An estimate of what prefill of one sequence needs beside weights, cache and pool.

        Attention's scores and their softmax of a chunk against the whole cache, the K outputs and
        hidden rows of each token, a few residual streams and the logits, all float32.
        """
        config, tokens = self.config, min(chunk_tokens, context)
        scores = 2 * config.most_heads * tokens * context
        rows = tokens * config.experts_per_token * (config.d_model + config.d_expert)
        return _FLOAT_BYTES * (scores + rows + 4 * tokens * config.d_model + config.vocab_size)


def open_model(place: str | Path) -> PlannedModel:
    """The shapes of a GGUF file, by its path or its URL.

    Raises:
        ValueError, NotImplementedError: see `open_gguf`, `open_remote` and `model_of_header`.
    """
    file = open_remote(place) if isinstance(place, str) else open_gguf(place)
    return model_of_header(Path(place).name, file)


def model_of_header(name: str, file: GGUFFile) -> PlannedModel:
    """The shapes that a header gives; nothing is read of the tensors.

    Raises:
        ValueError: a key or a tensor that is missing or impossible.
        NotImplementedError: a model without routed experts, or with experts of another kind than
            gate, up and down.
    """
    keys = _Keys(name, file.metadata)
    # The last blocks of a file may be for multi-token prediction, which decode does not run.
    blocks = keys.read("block_count", integer(1, _MOST_LAYERS))
    n_layers = blocks - keys.read("nextn_predict_layers", integer(0, blocks - 1), 0)
    found: dict[int, dict[str, Stack]] = {}
    dense = embedding = 0
    for tensor in file.tensors.values():
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if block and int(block[1]) >= n_layers:
            continue
        if expert := _EXPERTS.fullmatch(tensor.name):
            found.setdefault(int(expert[1]), {})[expert[2]] = (tensor.format, tensor.shape)
            continue
        # The loader keeps vectors in float32.
        vector = len(tensor.shape) == 1
        n_bytes = math.prod(tensor.shape) * _FLOAT_BYTES if vector else tensor.nbytes
        dense += n_bytes
        if tensor.name == TOKEN_EMBEDDING and OUTPUT in file.tensors:
            embedding = n_bytes - n_bytes // tensor.shape[0]
    experts = [_matrices(name, layer, found[layer]) for layer in sorted(found)]
    if not experts:
        raise NotImplementedError(
            f"{name}: no routed experts (ffn_gate_exps); a plan is of models that have them"
        )
    return _planned(keys, n_layers, experts, dense, dense - embedding)


def preset_model(name: str) -> PlannedModel:
    """A preset's shapes, with llama.cpp's Q4_K_M mix of types where it has no types of its own.

    Raises:
        ValueError: no preset of that name; lists those there are.
    """
    if name in PLANNED:
        return _model_of_preset(name, PLANNED[name])
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; want one of {', '.join(PRESET_NAMES)}")
    config = PRESETS[name]
    shapes = tensor_shapes(config).items()
    tensors = {n: (q4_k_m_format(n, shape, config), shape) for n, shape in shapes}
    found = replace(_file_of_shapes(tensors), metadata=config_metadata(config))
    return model_of_header(name, found)


def _model_of_preset(name: str, preset: Mapping[str, Any]) -> PlannedModel:
    arch = preset["architecture"]
    given = {f"{arch}.{key}": value for key, value in preset["keys"].items()}
    keys = _Keys(name, {"general.architecture": arch, **given})
    count = integer(1)
    n_layers, d = keys.read("block_count", count), keys.read("embedding_length", count)
    e, f = keys.read("expert_count", count), keys.read("expert_feed_forward_length", count)
    with_experts = n_layers - keys.read("leading_dense_block_count", integer(), 0)
    config = keys.config(with_experts, (e, f, d))

    def format(layer: int, role: str, shape: tuple[int, ...]) -> str:
        if preset["experts"] != "Q4_K_M":
            return preset["experts"]
        return q4_k_m_format(layer_tensors(config, layer)[role], shape, config)

    shapes = dict(zip(ROLES, ((e, f, d), (e, f, d), (e, d, f)), strict=True))
    experts = [
        [(format(layer, role, shape), shape) for role, shape in shapes.items()]
        for layer in range(with_experts)
    ]
    read, embedding = (round(1e9 * preset[part]) for part in ("dense_gb", "embedding_gb"))
    return _planned(keys, n_layers, experts, read + embedding, read)


class _Keys:
    """Checked access to the metadata of one architecture."""

    def __init__(self, name: str, metadata: Mapping[str, Any]):
        self.name, self.metadata = name, metadata
        self.arch = checked.read(Path(name), metadata, "general.architecture", text(), REQUIRED)

    def read(self, key: str, kind: Kind[T], default: D | Required = REQUIRED) -> T | D:
        """The value of a key of the architecture; see `GGUFFile.read`."""
        return checked.read(Path(self.name), self.metadata, f"{self.arch}.{key}", kind, default)

    def by_layer(self, key: str, n_layers: int, default: int) -> list[int]:
        """A value for each layer, where the file has one for all or a list of them."""
        if not isinstance(self.metadata.get(f"{self.arch}.{key}"), list):
            return [self.read(key, integer(), default)] * n_layers
        values = self.read(key, integers())
        if len(values) < n_layers:
            raise ValueError(
                f"{self.name}: {self.arch}.{key} has {len(values)} values; want {n_layers}, one "
                "for each layer"
            )
        return values[:n_layers]

    def config(self, layers_with_experts: int, shape_EFD: tuple[int, ...]) -> ModelConfig:
        """The layers with experts; see `PlannedModel.config`."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        vocab_size = len(tokens) if tokens else self.read("vocab_size", integer(1))
        n_experts, d_expert, d_model = shape_EFD
        preset = PRESETS["qwen3-30b-a3b"]
        n_heads = max(self.by_layer("attention.head_count", layers_with_experts, 1))
        attention = replace(preset.blocks[0].attention, n_heads=n_heads)
        return replace(
            preset,
            blocks=(BlockConfig(attention),) * layers_with_experts,
            d_model=d_model,
            n_experts=n_experts,
            experts_per_token=self.read("expert_used_count", integer(1, n_experts)),
            d_expert=d_expert,
            vocab_size=vocab_size,
            context_length=self.read("context_length", integer(1)),
        )


def _planned(
    keys: _Keys, n_layers: int, experts: Sequence[Matrices], dense_bytes: int, read_bytes: int
) -> PlannedModel:
    config = keys.config(len(experts), experts[0][0][1])
    caches, state_numbers = _caches(keys, n_layers)
    return PlannedModel(
        keys.name, n_layers, config, experts, dense_bytes, read_bytes, caches, state_numbers
    )


def _matrices(name: str, layer: int, found: Mapping[str, Stack]) -> Matrices:
    """Gate, up and down of a layer, fused ones apart."""
    if "gate_up" in found:
        format, (e, rows, d) = found["gate_up"]
        half = (format, (e, rows // 2, d))
        found = {**found, "gate": half, "up": half}
    missing = {"gate", "up", "down"} - found.keys()
    if missing or any(len(shape) != 3 for _, shape in found.values()):
        raise NotImplementedError(
            f"{name}: the experts of block {layer} are {', '.join(sorted(found))}; supported are "
            "stacks of gate, up and down"
        )
    return [found["gate"], found["up"], found["down"]]


def _caches(keys: _Keys, n_layers: int) -> tuple[list[KVCache], int]:
    """Keys and values by kind of layer, and the numbers of all recurrent states."""
    count = integer()
    if lora := keys.read("attention.kv_lora_rank", count, 0):
        # Latent attention keeps one compressed vector and one rotary key for all heads.
        return [KVCache(n_layers, lora + keys.read("rope.dimension_count", count), None)], 0
    heads_L = keys.by_layer("attention.head_count", n_layers, 1)
    kv_heads_L = keys.by_layer("attention.head_count_kv", n_layers, heads_L[0])
    d_model = keys.read("embedding_length", count, 0)
    key = keys.read("attention.key_length", count, d_model // max(1, heads_L[0]))
    width = key + keys.read("attention.value_length", count, key)
    local_key = keys.read("attention.key_length_swa", count, key)
    local_width = local_key + keys.read("attention.value_length_swa", count, width - key)
    interval = keys.read(
        "full_attention_interval", integer(1), 4 if keys.arch in _DELTA_NETS else 1
    )
    window, local_L = keys.read("attention.sliding_window", count, 0), [False] * n_layers
    pattern = keys.metadata.get(f"{keys.arch}.attention.sliding_window_pattern")
    if window and isinstance(pattern, list) and len(pattern) >= n_layers:
        local_L = [bool(local) for local in pattern[:n_layers]]
    elif window and keys.arch == "gpt-oss":  # which every second layer is in code
        local_L = [layer % 2 == 0 for layer in range(n_layers)]
    kinds: Counter[tuple[int, int | None]] = Counter()
    for layer, kv_heads in enumerate(kv_heads_L):
        if (layer + 1) % interval == 0:
            local = local_L[layer]
            kinds[kv_heads * (local_width if local else width), window if local else None] += 1
    recurrent = n_layers - n_layers // interval
    states = recurrent and recurrent * _state_numbers(keys)
    return [KVCache(layers, *kind) for kind, layers in kinds.items()], states


def _state_numbers(keys: _Keys) -> int:
    """Of a gated delta net: the inputs that its convolution still needs, and its matrices."""
    inner, groups, state, heads, kernel = (
        keys.read(f"ssm.{key}", integer(1))
        for key in ("inner_size", "group_count", "state_size", "time_step_rank", "conv_kernel")
    )
    return (kernel - 1) * (inner + 2 * groups * state) + heads * state * (inner // heads)


def _file_of_shapes(tensors: Mapping[str, Stack]) -> GGUFFile:
    """A file whose every byte is the same byte in memory."""
    found = {}
    for name, (format, shape) in tensors.items():
        raw_shape = (*shape[:-1], get_format(format).row_bytes(shape[-1]))
        raw = np.broadcast_to(np.zeros((), np.uint8), raw_shape)
        found[name] = TensorInfo(name, format, shape, raw)
    return GGUFFile((), {}, {}, found)
