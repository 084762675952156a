"""PyTorch as a side of the comparison: Hugging Face's module on the dequantised file.

- `float32`: the file's weights exactly, every expert on the device. The oracle, and what runs
  without a GPU.
- `bfloat16`: the same in half the bytes; what runs on a GPU. All experts are resident: a budget is
  our pool's alone.
"""

import functools
from typing import Any

import gguf
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from hobbit_jax.baselines.hugging_face import load
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf
from hobbit_jax.models.registry import read_config

MODES = ("float32", "bfloat16")


def dequantised(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor in float32, by gguf-py, times its scale where it has one."""
    info, scale = file.tensors[name], file.tensors.get(f"{name.removesuffix('weight')}scale")
    array = gguf.quants.dequantize(info.blocks, gguf.GGMLQuantizationType[info.format])
    if scale is not None:
        array = array * dequantised(file, scale.name).reshape(-1, 1, 1)
    return array.reshape(info.shape)


class PyTorch:
    """A transformers module with a KV cache, on the GPU where PyTorch has one."""

    def __init__(self, model: str, threads: int, context: int, mode: str | None):
        del context  # the cache grows
        torch.set_num_threads(threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        mode = mode or ("float32" if self._device == "cpu" else "bfloat16")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; want one of {', '.join(MODES)}")
        self._mode = mode
        file, dtype = open_gguf(model), getattr(torch, mode)
        tensor = functools.partial(dequantised, file)
        self._model = load(read_config(file), tensor, dtype, self._device)
        self._cache: Any = None

    @torch.inference_mode()
    def score(self, ids_T: np.ndarray) -> np.ndarray:
        """See `Side.score`."""
        output = self._model(self._ids(ids_T), use_cache=False)
        return output.logits[0].float().cpu().numpy()

    def prefill(self, ids_T: np.ndarray) -> int:
        """See `Program.prefill`."""
        self._cache = None
        return self._append(ids_T)

    def decode(self, token: int) -> int:
        """See `Program.decode`."""
        return self._append(np.asarray([token]))

    @torch.inference_mode()
    def _append(self, ids_T: np.ndarray) -> int:
        output = self._model(self._ids(ids_T), cache=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.cache
        return int(output.logits[0, -1].argmax())

    def _ids(self, ids_T: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids_T[None].astype(np.int64)).to(self._device)

    def counts(self) -> None:
        """See `Program.counts`: it counts nothing."""

    def facts(self) -> dict[str, Any]:
        """See `Side.facts`."""
        on_gpu = self._device == "cuda"
        return {
            "program": "PyTorch",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": None if on_gpu else torch.get_num_threads(),
            "mode": self._mode,
            "precision": self._mode,
            "attention": self._model.config._attn_implementation,
            "experts": self._model.config._experts_implementation,
            "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
