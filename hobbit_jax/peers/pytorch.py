"""PyTorch as a side of the comparison: Hugging Face's module on the dequantised file.

Owns the ways of running it. Made in a child process (`side.py`):

- `float32`: the file's weights exactly, every expert on the device. The oracle, and what runs
  without a GPU.
- `bfloat16`: the same in half the bytes; what runs on a GPU when all experts may be there.
- `offload`: bfloat16, with experts in host memory and as many device slots as our pool has
  (`expert_offload.py`); what runs on a GPU under a budget.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from hobbit_jax.model_file.architecture import read_config
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf
from hobbit_jax.peers.expert_offload import ExpertSlots, load_offloaded
from hobbit_jax.peers.hugging_face import load

MODES = ("float32", "bfloat16", "offload")


def dequantised(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor in float32, by gguf-py."""
    info = file.tensors[name]
    return gguf.quants.dequantize(info.raw, gguf.GGMLQuantizationType[info.format]).reshape(
        info.shape
    )


class PyTorch:
    """A transformers module with a KV cache, on the GPU where PyTorch has one."""

    def __init__(self, model: str, threads: int, context: int, mode: str | None, slots: int | None):
        del context  # the cache grows
        torch.set_num_threads(threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if mode is None and self._device == "cpu":
            mode = "float32"
        mode = mode or ("bfloat16" if slots is None else "offload")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; want one of {', '.join(MODES)}")
        if mode == "offload" and slots is None:
            raise ValueError("PyTorch offloads experts under a budget only; give --budget_mib")
        self._mode = mode
        file = open_gguf(model)
        config = read_config(file)
        dtype = torch.float32 if mode == "float32" else torch.bfloat16
        self._slots: ExpertSlots | None = None

        def tensor(name: str) -> np.ndarray:
            return dequantised(file, name)

        if mode == "offload" and slots is not None:
            self._model, self._slots = load_offloaded(config, tensor, slots, dtype, self._device)
        else:
            self._model = load(config, tensor, dtype, self._device)
        self._cache: Any = None
        self._decode_hits = self._decode_misses = 0

    @torch.inference_mode()
    def score(self, ids_T: np.ndarray) -> np.ndarray:
        """See `Side.score`."""
        output = self._model(self._ids(ids_T), use_cache=False)
        return output.logits[0].float().cpu().numpy()

    def prefill(self, ids_T: np.ndarray) -> int:
        """See `Side.prefill`."""
        self._cache = None
        return self._append(ids_T)

    def decode(self, token: int) -> int:
        """See `Side.decode`."""
        before = self._counts()
        chosen = self._append(np.asarray([token]))
        hits, misses = self._counts()
        self._decode_hits += hits - before[0]
        self._decode_misses += misses - before[1]
        return chosen

    def _counts(self) -> tuple[int, int]:
        order = self._slots and self._slots.order
        return (order.hits, order.misses) if order else (0, 0)

    @torch.inference_mode()
    def _append(self, ids_T: np.ndarray) -> int:
        output = self._model(self._ids(ids_T), cache=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.cache
        return int(output.logits[0, -1].argmax())

    def _ids(self, ids_T: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids_T[None].astype(np.int64)).to(self._device)

    def facts(self) -> dict[str, Any]:
        """See `Side.facts`."""
        on_gpu, slots = self._device == "cuda", self._slots
        uses = self._decode_hits + self._decode_misses
        return {
            "program": "PyTorch",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": None if on_gpu else torch.get_num_threads(),
            "mode": self._mode,
            "precision": "float32" if self._mode == "float32" else "bfloat16",
            "attention": self._model.config._attn_implementation,
            "experts": "offloaded" if slots else self._model.config._experts_implementation,
            "slots": slots and slots.order.capacity,
            "slot_bytes": slots and slots.slot_bytes,
            "decode_hit_rate": self._decode_hits / uses if uses else None,
            "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
