"""What a model weighs, by tensor, without reading or having its weights.

Owns sizes: of the experts at any precision, of the dense part, of the KV cache and of what prefill
needs beside them. A precision that was never made is a file of shapes: a real `HostExperts` over
arrays that take no memory, so that the live sizing of the pool (`cache/pool_sizing.py`) can be
asked as for real ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hobbit_jax.experts.store import NATIVE, ROLES, HostExperts
from hobbit_jax.model_file.architecture import (
    TOKEN_EMBEDDING,
    ModelConfig,
    layer_tensors,
    read_config,
    tensor_shapes,
)
from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo, open_gguf
from hobbit_jax.model_file.presets import PRESETS
from hobbit_jax.quantize.quant_recipe import q4_k_m_format
from pallas_kernels.formats import get_format

# Tokens of one prefill step, `Engine`'s default.
CHUNK_TOKENS = 2048
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class PlannedModel:
    """A model's shapes and sizes.

    Attributes:
        name: of the file or the preset.
        config: its hyperparameters.
        native: its file, or one of shapes.
    """

    name: str
    config: ModelConfig
    native: GGUFFile

    @property
    def native_bytes(self) -> int:
        """Of all experts, natively."""
        return self.store().precision_bytes(NATIVE)

    @property
    def dense_bytes(self) -> int:
        """Device bytes of everything but the experts, as `model/loading.py` uploads it."""
        return sum(self._dense().values())

    @property
    def dense_read_bytes(self) -> int:
        """Of these, what one token reads: of an embedding that is not the head, one row."""
        sizes = self._dense()
        if not self.config.tied_head:
            embedding = sizes.pop(TOKEN_EMBEDDING)
            return sum(sizes.values()) + embedding // self.config.vocab_size
        return sum(sizes.values())

    def _dense(self) -> dict[str, int]:
        experts = set(self._expert_names())
        return {
            name: math.prod(t.shape) * _FLOAT_BYTES if len(t.shape) == 1 else t.nbytes
            for name, t in self.native.tensors.items()
            if name in tensor_shapes(self.config) and name not in experts
        }

    def _expert_names(self) -> list[str]:
        layers = (layer_tensors(self.config, layer) for layer in range(self.config.n_layers))
        return [names[role] for names in layers for role in ROLES]

    def store(self, low_format: str | None = None) -> HostExperts:
        """The experts natively and, with a format, at a low precision that is nothing but shapes.

        Raises:
            NotImplementedError: a width that is no multiple of the format's block.
        """
        if low_format is None:
            return HostExperts(self.config, self.native)
        shapes = tensor_shapes(self.config)
        low = _file_of_shapes({name: (low_format, shapes[name]) for name in self._expert_names()})
        return HostExperts(self.config, self.native, [low])

    def kv_cache_bytes(self, context: int) -> int:
        """Device bytes of one sequence's keys and values, float32 as in the decode loop."""
        config = self.config
        per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * _FLOAT_BYTES
        return per_token * context

    def scratch_bytes(self, context: int, chunk_tokens: int = CHUNK_TOKENS) -> int:
        """An estimate of what prefill of one sequence needs beside weights, cache and pool.

        Attention's scores and their softmax of a chunk against the whole cache, the K outputs and
        hidden rows of each token, a few residual streams and the logits, all float32.
        """
        config, tokens = self.config, min(chunk_tokens, context)
        scores = 2 * config.n_heads * tokens * context
        rows = tokens * config.experts_per_token * (config.d_model + config.d_expert)
        return _FLOAT_BYTES * (scores + rows + 4 * tokens * config.d_model + config.vocab_size)


def open_model(path: Path) -> PlannedModel:
    """A GGUF file's shapes. Raises what `open_gguf` and `read_config` raise."""
    file = open_gguf(path)
    return PlannedModel(path.name, read_config(file), file)


def preset_model(name: str) -> PlannedModel:
    """A preset's shapes.

    Raises:
        ValueError: no preset of that name; lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; want one of {', '.join(PRESETS)}")
    return model_of_shapes(name, PRESETS[name])


def model_of_shapes(name: str, config: ModelConfig) -> PlannedModel:
    """A model's shapes with llama.cpp's Q4_K_M mix of types."""
    shapes = tensor_shapes(config).items()
    formats = {n: (q4_k_m_format(n, shape, config), shape) for n, shape in shapes}
    return PlannedModel(name, config, _file_of_shapes(formats))


def _file_of_shapes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> GGUFFile:
    """A file whose every byte is the same byte in memory."""
    found = {}
    for name, (format, shape) in tensors.items():
        raw_shape = (*shape[:-1], get_format(format).row_bytes(shape[-1]))
        raw = np.broadcast_to(np.zeros((), np.uint8), raw_shape)
        found[name] = TensorInfo(name, format, shape, raw)
    return GGUFFile((), {}, {}, found)
