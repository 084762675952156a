"""Compares experts whose rows are filled up to whole blocks with what a GGUF file has instead.

    python scripts/dev/compare_padded.py

GGUF has no type of 2 or 3 bits for rows that are no multiple of 256, and llama.cpp takes one of 4
bits for them. A low precision of ours fills such rows up with zeros. For the widths of two families
it prints bits a weight of both, and the KL of both from the same random model in float16. The model
has two layers of four experts: its KL compares encodings and stands for no trained model. It takes
five minutes.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.evals.logit_comparison import compare_in_float64
from hobbit_jax.experts.low_precision import (
    LowPrecisionSpec,
    open_low_precision,
    write_low_precision,
)
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf, write_gguf
from hobbit_jax.models.config import ModelConfig, tensor_shapes
from hobbit_jax.models.loading import LoadedModel, load_model
from hobbit_jax.models.presets import PRESETS
from hobbit_jax.models.written_keys import config_metadata
from hobbit_jax.synthetic.synthesize import made_up_vocabulary

WIDTHS = {"gpt-oss": (2880, 2880), "Gemma-4-26B-A4B": (2816, 704)}  # D and F
FORMATS = ("Q2_K", "Q3_K")


def write_random(config: ModelConfig, path: Path) -> None:
    """Writes a model of normal weights; norms are ones."""
    rng, tensors = np.random.default_rng(0), []
    for name, shape in tensor_shapes(config).items():
        weights = rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])
        weights = np.ones(shape, np.float32) if len(shape) == 1 else weights
        format = "F16" if "_exps" in name else "F32"
        raw = weights.astype(np.float16 if format == "F16" else np.float32)
        tensors.append((name, format, shape, raw.view(np.uint8)))
    write_gguf(path, config_metadata(config) | made_up_vocabulary(config.vocab_size), tensors, {})


def logits(model: LoadedModel, low: GGUFFile, ids_BT: np.ndarray) -> tuple[np.ndarray, float]:
    """Logits with the experts of `low`, and their bits a weight of the model."""
    store = HostExperts(model.config, model.file, [low])
    engine = Engine(model, store, CacheConfig(plan=uniform_plan(store, 1)))
    config = model.config
    weights = 3 * config.d_model * config.d_expert * config.n_experts * config.n_layers
    return np.asarray(engine.score(ids_BT)), 8 * store.precision_bytes(1) / weights


def main() -> None:
    print("| rows of | format | filled up, bits a weight | KL | GGUF file, bits a weight | KL |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (d_model, d_expert) in WIDTHS.items():
        tiny = PRESETS["tiny"]
        config = replace(
            tiny, d_model=d_model, d_expert=d_expert, n_experts=4, blocks=tiny.blocks[:2]
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.gguf"
            write_random(config, path)
            model = load_model(path, "xla")
            ids_BT = np.random.default_rng(1).integers(0, config.vocab_size, (4, 64), np.int32)
            native = np.asarray(Engine(model, HostExperts(config, model.file)).score(ids_BT))
            for format in FORMATS:
                spec = LowPrecisionSpec(format, "ggml")
                in_a_file = Path(folder) / f"{format}.gguf"
                write_low_precision(model.file, config, spec, in_a_file)
                ours = open_low_precision(model.file, config, spec, Path(folder))
                cells = []
                for low in (ours, open_gguf(in_a_file)):
                    low_BTV, bits = logits(model, low, ids_BT)
                    kl_BT = compare_in_float64(low_BTV, native, np.zeros(ids_BT.shape, int)).kl_BT
                    cells.append(f"{bits:.2f} | {np.mean(kl_BT):.2e}")
                print(f"| {name}, {d_model} and {d_expert} | {format} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
