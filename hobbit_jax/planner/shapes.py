"""What a model weighs, by its header alone: of a file, of a file behind a URL, or of a preset.

Which tensors and states there are, the models room says (`models/registry.py`,
`models/config.py`). Experts are a `HostExperts` over arrays that take no memory, so that the live
sizing of the pool (`cache/pool_sizing.py`) can be asked as for real ones.

Source: llama.cpp, src/llama-quant.cpp (types of smaller files).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hobbit_jax.experts.store import NATIVE, ROLES, STACKS, HostExperts
from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo, open_gguf
from hobbit_jax.model_file.remote import open_remote
from hobbit_jax.models.attention import GroupedQuery
from hobbit_jax.models.caches import KV_FORMATS
from hobbit_jax.models.config import (
    ROPE_DIVISORS,
    TOKEN_EMBEDDING,
    ModelConfig,
    layer_tensors,
    tensor_shapes,
)
from hobbit_jax.models.presets import PLANNED, PRESETS
from hobbit_jax.models.registry import read_config
from hobbit_jax.quantize.quant_recipe import format_in_a_file, q4_k_m_format
from pallas_kernels.formats import get_format

PRESET_NAMES = (*(name for name in PRESETS if name != "tiny"), *PLANNED)
_FLOAT_BYTES = 4

Stack = tuple[str, tuple[int, ...]]  # type and row-major shape
Matrices = Sequence[Stack]  # gate, up and down of a layer


@dataclass(frozen=True)
class PlannedModel:
    """A model's shapes and sizes.

    `config` is the model's, but for gate and up, which are apart, and experts' biases, which count
    as dense.
    """

    name: str  # of the file or the preset
    config: ModelConfig
    experts: Sequence[Matrices]  # gate, up and down of each layer
    dense_bytes: int  # on the device, of everything but the experts' matrices
    dense_read_bytes: int  # that one token reads: of an embedding that is not the head, a row

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

    def smaller_file(self, recipe: str) -> "PlannedModel | None":
        """llama.cpp's own file of `recipe`, Q3_K_M or Q2_K, with the same dense part.

        Types fall back as llama.cpp's do. None if its experts are no smaller than these.
        """
        config = self.config
        smaller = []
        for layer, matrices in enumerate(self.experts):
            shapes = [shape for _, shape in matrices]
            name = layer_tensors(config, layer)["ffn_down_exps"]
            more = q4_k_m_format(name, (*shapes[2][:-1], 256), config) == "Q6_K"
            first = config.block_of_layer[layer] < config.n_blocks // 16
            formats = ("Q3_K", "Q3_K", "Q5_K" if first else "Q4_K" if more else "Q3_K")
            if recipe == "Q2_K":
                formats = ("Q2_K", "Q2_K", "Q3_K")
            fitting = [format_in_a_file(f, s[-1]) for f, s in zip(formats, shapes, strict=True)]
            smaller.append(list(zip(fitting, shapes, strict=True)))
        found = replace(self, experts=smaller)
        return found if found.native_bytes < self.native_bytes else None

    def _file(self, experts: Sequence[Matrices]) -> GGUFFile:
        named = {}
        for layer, matrices in enumerate(experts):
            names = layer_tensors(self.config, layer)
            named |= {names[role]: stack for role, stack in zip(ROLES, matrices, strict=True)}
        return _file_of_shapes(named)

    def kv_cache_bytes(
        self, context: int, kv_format: str = "float32", of_windows: bool = False
    ) -> int:
        """Device bytes of one sequence's keys and values, and of its recurrent states.

        `of_windows` counts of layers with a sliding window no more than the window, which is what
        a token reads and what llama.cpp keeps; our engine keeps them all.
        """
        total, number_bytes = 0, jnp.dtype(KV_FORMATS[kv_format]).itemsize
        for attention in (block.attention for block in self.config.blocks):
            window = attention.window if isinstance(attention, GroupedQuery) else 0
            for state in attention.states():
                tokens = min(context, window) if of_windows and window else context
                of_each = tokens * number_bytes if state.by_token else _FLOAT_BYTES
                total += math.prod(state.shape) * of_each
        return total

    def scratch_bytes(self, context: int, chunk_tokens: int) -> int:
        """An estimate of what prefill of one sequence needs beside weights, cache and pool.

        Attention's scores and their softmax of a chunk against the whole cache, the K outputs and
        hidden rows of each token, a few residual streams and the logits, all float32.
        """
        config, tokens = self.config, min(chunk_tokens, context)
        most_heads = max(block.attention.n_heads for block in config.blocks)
        scores = 2 * most_heads * tokens * context
        rows = tokens * config.experts_per_token * (config.d_model + config.d_expert)
        return _FLOAT_BYTES * (scores + rows + 4 * tokens * config.d_model + config.vocab_size)


def open_model(place: str | Path) -> PlannedModel:
    """The shapes of a GGUF file, by its path or its URL; nothing is read of the tensors.

    Raises:
        ValueError, NotImplementedError: see `open_gguf`, `open_remote` and `read_config`; or a
            model without routed experts.
    """
    file = open_remote(place) if isinstance(place, str) else open_gguf(place)
    # Of these the models room asks for numbers, which no size depends on. Behind a URL are none.
    ones = {
        name: replace(tensor, raw=np.ones(tensor.shape, "<f4").view(np.uint8))
        for name, tensor in file.tensors.items()
        if tensor.format == "F32" and name == ROPE_DIVISORS
    }
    config = read_config(replace(file, tensors=file.tensors | ones))
    return _planned(Path(place).name, config, file)


def preset_model(name: str) -> PlannedModel:
    """A preset's shapes in llama.cpp's Q4_K_M mix of types; gpt-oss is published in MXFP4 and Q8_0.

    Raises:
        ValueError: no preset of that name; lists those there are.
    """
    config = {**PRESETS, **PLANNED}.get(name)
    if config is None:
        raise ValueError(f"preset is {name!r}; want one of {', '.join(PRESET_NAMES)}")
    shapes = tensor_shapes(config).items()
    tensors = {n: (q4_k_m_format(n, shape, config), shape) for n, shape in shapes}
    if config.arch == "gpt-oss":
        for n, (format, shape) in tensors.items():
            if format != "F32":
                tensors[n] = ("MXFP4" if "_exps" in n else "Q8_0", shape)
    return _planned(name, config, _file_of_shapes(tensors))


def _planned(name: str, config: ModelConfig, file: GGUFFile) -> PlannedModel:
    """Raises NotImplementedError for a model without routed experts."""
    if config.has_dense_ffn:
        raise NotImplementedError(
            f"{name}: no routed experts (ffn_gate_exps); a plan is of models that have them"
        )
    layers = [layer_tensors(config, layer) for layer in range(config.n_layers)]
    stacks = {of_layer[role] for of_layer in layers for role in STACKS if role in of_layer}
    others = (file.tensors[tensor] for tensor in tensor_shapes(config).keys() - stacks)
    # The loader keeps vectors in float32.
    sizes = {t.name: t.shape[0] * _FLOAT_BYTES if len(t.shape) == 1 else t.nbytes for t in others}
    dense, embedding = sum(sizes.values()), sizes[TOKEN_EMBEDDING]
    unread = 0 if config.tied_head else embedding - embedding // config.vocab_size
    of_matrices = replace(config, expert_biases=False, scales=frozenset())
    experts = [
        [(tensor.format, tensor.shape) for tensor in (layer.gate, layer.up, layer.down)]
        for layer in HostExperts(of_matrices, file).precisions[NATIVE]
    ]
    apart = replace(of_matrices, fused_gate_up=False)
    return PlannedModel(name, apart, experts, dense, dense - unread)


def _file_of_shapes(tensors: Mapping[str, Stack]) -> GGUFFile:
    """A file whose every byte is the same byte in memory."""
    zero, found = np.zeros((), np.uint8), {}
    for name, (format, shape) in tensors.items():
        raw = np.broadcast_to(zero, (*shape[:-1], get_format(format).row_bytes(shape[-1])))
        found[name] = TensorInfo(name, format, shape, raw)
    return GGUFFile((), {}, {}, found)
