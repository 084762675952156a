"""A file with scales beside its matrices, and one whose weights they have multiplied."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf_oracle import dequantize

from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf, write_gguf

# Matrices that llama.cpp reads a scale of.
_MATRIX = re.compile(
    r"(blk\.\d+\.(attn_(q|k|v|qkv|gate|output)|ffn_(gate|up|down)(_exps|_shexp)?"
    r"|ssm_(out|alpha|beta)))\.weight"
)


def powers_of_two(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Scales that round nothing, so that both files give the same bits."""
    return 2.0 ** rng.integers(-1, 3, shape)


def write_pair(
    source: GGUFFile,
    folder: Path,
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray],
    without: str = "blk.none.",
) -> tuple[Path, Path]:
    """Writes both in float32, but NVFP4 as it is in the first.

    Args:
        source: the model.
        folder: of both files.
        draw: scales of a shape.
        without: how the names of matrices begin that get none.
    """
    rng, scaled, multiplied = np.random.default_rng(0), [], []
    for name, tensor in source.tensors.items():
        weights = dequantize(tensor.raw, tensor.format).astype(np.float32).reshape(tensor.shape)
        entry = (name, "F32", tensor.shape, weights.view(np.uint8))
        kept = (name, tensor.format, tensor.shape, tensor.raw)
        scaled.append(kept if tensor.format == "NVFP4" else entry)
        found = _MATRIX.fullmatch(name)
        # Gemma 4's experts have one in any file.
        if found and not name.startswith(without) and f"{found[1]}.scale" not in source.tensors:
            scale = draw(rng, tensor.shape[:-2] or (1,)).astype(np.float32)
            scaled.append((f"{found[1]}.scale", "F32", scale.shape, scale.view(np.uint8)))
            weights = (weights * scale.reshape(-1, 1, 1)).reshape(tensor.shape)
            entry = (*entry[:3], weights.view(np.uint8))
        multiplied.append(entry)
    paths = folder / "scaled.gguf", folder / "multiplied.gguf"
    for path, entries in zip(paths, (scaled, multiplied), strict=True):
        write_gguf(path, source.metadata, entries, source.field_types)
    return paths


def write_tiny_pair(name: str, folder: Path, draw=powers_of_two, **options) -> tuple[Path, Path]:
    """`write_pair` of a tiny model by its name."""
    import tiny_models
    from families import FAMILIES

    path = folder / "source.gguf"
    if name in FAMILIES:
        FAMILIES[name].write(path)
    else:
        tiny_models.write_model(tiny_models.MODELS[name], path)
    return write_pair(open_gguf(path), folder, draw, **options)
