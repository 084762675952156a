"""Prints how far our logits are from Hugging Face's and llama.cpp's, for a tiny model a family.

    PYTHONPATH=tests python scripts/dev/compare_families.py [NAME ...]

The models are those of the tests with all weights in float32, with which all three compute; Hugging
Face's logits are the goldens (`tests/goldens/make_goldens.py`). A difference is the largest of any
logit, and KL(theirs || ours) the mean over tokens in nats. It takes two minutes and `xllamacpp`.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import tiny_models  # pyright: ignore[reportMissingImports]
from families import FAMILIES  # pyright: ignore[reportMissingImports]

from hobbit_jax.baselines.child import Child, SideSpec
from hobbit_jax.baselines.comparison import BASELINES
from hobbit_jax.evals.logit_comparison import compare_in_float64
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf, write_gguf
from hobbit_jax.models.loading import load_model

GOLDENS = Path(__file__).parents[2] / "tests" / "goldens"


def write_float32(name: str, path: Path) -> None:
    """Writes the tiny model `name` with its weights decoded."""
    if name in FAMILIES:
        FAMILIES[name].write(path, as_float32=True)
        return
    tiny_models.write_model(tiny_models.MODELS[name], path)
    file, tensors = open_gguf(path), []
    for tensor in file.tensors.values():
        weights = gguf.quants.dequantize(tensor.raw, gguf.GGMLQuantizationType[tensor.format])
        raw = np.asarray(weights, np.float32).reshape(tensor.shape).view(np.uint8)
        tensors.append((tensor.name, "F32", tensor.shape, raw))
    write_gguf(path, file.metadata, tensors, file.field_types)


def ours(path: Path, ids_T: np.ndarray) -> np.ndarray:
    """Our float32 logits [T, V]."""
    model = load_model(path, "xla")
    return np.asarray(Engine(model, HostExperts(model.config, model.file)).score(ids_T[None])[0])


def llama_cpp(path: Path, ids_T: np.ndarray) -> np.ndarray:
    """llama.cpp's, with float32 keys and values. Raises ValueError for what it does not load."""
    options = {"model": str(path), "context": 64, "budget_bytes": None, "kv_format": "float32"}
    with Child(SideSpec(BASELINES["llama_cpp"][0], options, 1), "llama.cpp") as child:
        return child.score(ids_T)


def cells(ours_TV: np.ndarray, theirs_TV: np.ndarray) -> str:
    """The largest difference and the mean KL, as two cells of a row."""
    kl_T = compare_in_float64(ours_TV, theirs_TV, theirs_TV.argmax(axis=-1)).kl_BT
    return f"{np.abs(ours_TV - theirs_TV).max():.1e} | {max(0.0, float(kl_T.mean())):.1e}"


def main() -> None:
    print("| family | Hugging Face, difference | KL | llama.cpp, difference | KL |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or [*tiny_models.MODELS, *FAMILIES]:
            golden, path = np.load(GOLDENS / f"{name}.npz"), Path(folder) / f"{name}.gguf"
            ids_T, wanted_TV = golden["tokens_T"], golden["logits_TV"]
            write_float32(name, path)
            found_TV, llamas = ours(path, ids_T), "is not loaded |"
            with contextlib.suppress(ValueError):
                llamas = cells(found_TV, llama_cpp(path, ids_T))
            print(f"| {name} | {cells(found_TV, wanted_TV)} | {llamas} |", flush=True)


if __name__ == "__main__":
    main()
