"""Low-precision copies of a model's experts, written once as GGUF files.

Owns where a low tier lives, when it is stale, and how it is made: each expert
is decoded from its native blocks and encoded again (`quantize.py`), the rest of
the model is copied, so the file is a complete uniformly quantised model that
llama.cpp opens as well. It is keyed by the source's hash and by the encoder's
own source text, and reopened by memory map. Called by `sweep.py` and the scripts
before a store is built.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from hobbit_jax import quantize
from hobbit_jax.architecture import ModelConfig, layer_tensors
from hobbit_jax.gguf_file import GGUFFile, TensorInfo, open_gguf, write_gguf
from hobbit_jax.store import ROLES
from pallas_kernels.formats import Format, get_format

SOURCE_KEY = "hobbit.tier.source_sha256"
ENCODER_KEY = "hobbit.tier.encoder_sha256"


def encoder_sha256() -> str:
    """Hash of the encoder's source, so that a better encoder never meets its old output."""
    sources = [inspect.getsource(module).encode() for module in (quantize, scale_search)]
    return hashlib.sha256(b"".join(sources)).hexdigest()


@partial(jax.jit, static_argnames="format")
def _unpack(raw: jax.Array, format: Format) -> jax.Array:
    return format.unpack(format.split(raw))


def dequantize(tensor: TensorInfo, index: int | slice = slice(None)) -> np.ndarray:
    """float32 weights of `tensor.raw[index]`, decoded by the format's own unpack."""
    return np.asarray(_unpack(tensor.raw[index], get_format(tensor.format)))


def _encoded(tensor: TensorInfo, format: str, progress: tqdm) -> Callable[[], np.ndarray]:
    def encode() -> np.ndarray:
        experts = []
        for expert in range(tensor.shape[0]):
            experts.append(quantize.encode(dequantize(tensor, expert), format))
            progress.update()
        return np.stack(experts)

    return encode


def write_tier(source: GGUFFile, config: ModelConfig, format: str, path: Path) -> None:
    """Writes `source` with every expert re-encoded to `format`; atomic, one tensor at a time.

    Raises:
        ValueError: a weight is NaN or infinite, or a width is no multiple of the block.
        NotImplementedError: no encoder for `format`.
    """
    expert_names = {
        layer_tensors(config, layer)[role] for layer in range(config.n_layers) for role in ROLES
    }
    total = len(expert_names) * config.n_experts
    metadata = {
        **source.metadata,
        SOURCE_KEY: source.sha256(),
        ENCODER_KEY: encoder_sha256(),
        "general.name": f"{source.metadata.get('general.name', config.arch)} experts {format}",
    }
    with tqdm(total=total, unit="matrix", desc=f"encoding {format}") as progress:

        def tensors() -> Iterable:
            for name, tensor in source.tensors.items():
                if name in expert_names:
                    yield name, format, tensor.shape, _encoded(tensor, format, progress)
                else:
                    yield name, tensor.format, tensor.shape, tensor.raw

        write_gguf(path, metadata, tensors(), source.field_types)


def open_tier(source: GGUFFile, config: ModelConfig, format: str, directory: Path) -> GGUFFile:
    """The low tier of `source` at `format`, made if it is not in `directory` yet.

    Raises:
        OSError: `directory` cannot be written.
        ValueError, NotImplementedError: see `write_tier`.
    """
    name = f"{source.sha256()[:16]}-{encoder_sha256()[:8]}-{format}.gguf"
    path = directory / name
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_tier(source, config, format, path)
    return open_gguf(path)
