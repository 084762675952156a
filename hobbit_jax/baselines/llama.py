"""llama.cpp as a side of the comparison, through llama-cpp-python's low-level functions.

Owns the calls. Made in a child process (`side.py`). The high-level `Llama` class offers no tensor
overrides, and those are what `--n-cpu-moe` of llama.cpp's programs sets: on a GPU, all layers are
there and the experts of the first N layers are computed on the CPU, N being the fewest with which
the other layers' experts fit the budget. Everything else is as llama.cpp has it by default: keys
and values in float16, and on a CPU K-quant products with activations quantised to 8 bits (Q8_K), so
its logits are not those of the file's weights in float32.

Source: llama.h; common.h (`llm_add_n_cpu_ffn_overrides`) for the override.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as library  # pyright: ignore[reportMissingImports]
import numpy as np

from hobbit_jax.model_file.architecture import ModelConfig, layer_tensors, read_config
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf

llama_cpp: Any = library  # every pointer of its types may be None
_EXPERT_PATTERN = r"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_ALL_LAYERS = -1


class _Override(ctypes.Structure):
    """`llama_model_tensor_buft_override`; the binding declares a pointer to it and not itself."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def layers_on_cpu(file: GGUFFile, config: ModelConfig, budget_bytes: int) -> int:
    """How many first layers' experts must stay in host memory for the rest to fit the budget."""
    sizes_L = []
    for layer in range(config.n_layers):
        names = layer_tensors(config, layer).items()
        sizes_L.append(sum(file.tensors[n].nbytes for role, n in names if role.endswith("_exps")))
    return next(n for n in range(config.n_layers + 1) if sum(sizes_L[n:]) <= budget_bytes)


class LlamaCpp:
    """One model and one context of llama.cpp, one sequence."""

    def __init__(
        self,
        model: str,
        threads: int,
        context: int,
        budget_bytes: int | None,
        cpu_layers: int | None = None,
    ):
        """`cpu_layers` overrides what the budget says, and works without a GPU too."""
        file = open_gguf(model)
        config = read_config(file)
        self._on_gpu = bool(llama_cpp.llama_supports_gpu_offload())
        if cpu_layers is None:
            counts = self._on_gpu and budget_bytes is not None
            cpu_layers = layers_on_cpu(file, config, budget_bytes or 0) if counts else 0
        self._cpu_layers, self._vocab, self._context = cpu_layers, config.vocab_size, context
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS if self._on_gpu else 0
        self._overrides = _overrides(cpu_layers)  # the library keeps a pointer
        params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        if (found := llama_cpp.llama_vocab_n_tokens(vocab)) != config.vocab_size:
            raise RuntimeError(f"llama.cpp finds {found} tokens, we {config.vocab_size}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        self._ctx = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._ctx:
            raise RuntimeError(f"llama.cpp has no memory for a context of {context} tokens")
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)
        self._position = 0

    def score(self, ids_T: np.ndarray) -> np.ndarray:
        """See `Side.score`; one batch with the logits of every token."""
        self._clear()
        return self._append(ids_T, every=True).copy()

    def prefill(self, ids_T: np.ndarray) -> int:
        """See `Program.prefill`."""
        self._clear()
        return int(self._append(ids_T).argmax())

    def decode(self, token: int) -> int:
        """See `Program.decode`."""
        return int(self._append(np.asarray([token])).argmax())

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._ctx), True)
        self._position = 0

    def _append(self, ids_T: np.ndarray, every: bool = False) -> np.ndarray:
        """Logits of the last token, [1, V], or of every one; valid until the next call."""
        count, batch = len(ids_T), self._batch
        if self._position + count > self._context:
            raise ValueError(f"{self._position + count} tokens exceed {self._context}")
        batch.n_tokens = count
        for i, token in enumerate(ids_T.tolist()):
            batch.token[i], batch.pos[i] = token, self._position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == count - 1
        status = llama_cpp.llama_decode(self._ctx, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._position += count
        rows = count if every else 1
        address = llama_cpp.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(address, (rows, self._vocab))

    def counts(self) -> None:
        """See `Program.counts`: it counts nothing."""

    def facts(self) -> dict[str, Any]:
        """See `Side.facts`."""
        return {
            "program": "llama.cpp",
            "versions": {"llama-cpp-python": llama_cpp.__version__},
            "device": "gpu" if self._on_gpu else "cpu",
            "threads": llama_cpp.llama_n_threads(self._ctx),
            "precision": "the file's blocks; activations in 8 bits, keys and values in float16",
            "layers_with_experts_on_cpu": self._cpu_layers,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
            "device_peak_bytes": None,  # the library does not say
        }


def _overrides(cpu_layers: int) -> ctypes.Array:
    """A list ended by an empty entry: the experts of the first layers on the CPU."""
    # The binding has loaded the library that this stands in, and no name for it.
    cpu = llama_cpp.llama_cpp._lib.ggml_backend_cpu_buffer_type
    cpu.restype = ctypes.c_void_p
    patterns = [_EXPERT_PATTERN.format(layer=layer).encode() for layer in range(cpu_layers)]
    entries = [_Override(pattern, cpu()) for pattern in patterns]
    return (_Override * (cpu_layers + 1))(*entries, _Override(None, None))
