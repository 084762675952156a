"""llama.cpp as a side of the comparison, through its C API (`llama_cpp_api.py`).

On a GPU, all layers are there and the experts of the first N layers are computed on the CPU, as
with `--n-cpu-moe` of llama.cpp's programs, N being the fewest with which the other layers' experts
fit the budget. A file of more than half of the machine's memory is not repacked (`--no-repack`).
Everything else is as llama.cpp has it by default: keys and values in float16, and on a CPU K-quant
products with activations quantised to 8 bits (Q8_K), so its logits are not those of the file's
weights in float32.

Source: llama.h.
"""

from typing import Any, Literal

import numpy as np
import psutil

from hobbit_jax.baselines.llama_cpp_api import VERSION, Model, load_library
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf
from hobbit_jax.models.config import ModelConfig, layer_tensors
from hobbit_jax.models.registry import read_config

_TYPE_F32, _FLASH_ATTENTION_OFF = 0, 0


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
        kv_format: Literal["float16", "float32"] = "float16",
        tokens_at_once: int = 512,
    ):
        """Loads a GGUF file, with room for a sequence of `context` tokens.

        Args:
            budget_bytes: of experts on a GPU; None is all of them, and a CPU has no such limit.
            cpu_layers: overrides what the budget says, and works without a GPU too.
            tokens_at_once: how many tokens of a batch are computed together (`n_ubatch`).

        Raises:
            NotImplementedError: see `llama_cpp_api.load_library`.
            ValueError: a file that llama.cpp does not load.
            RuntimeError: no memory, or another vocabulary than ours.
        """
        file = open_gguf(model)
        config = read_config(file)
        self._library = library = load_library()
        self._on_gpu = library.llama_supports_gpu_offload()
        if cpu_layers is None:
            counts = self._on_gpu and budget_bytes is not None
            cpu_layers = layers_on_cpu(file, config, budget_bytes or 0) if counts else 0
        # Our own program maps the same file beside it.
        self._repack = 2 * file.file_bytes <= psutil.virtual_memory().total
        self._model = Model(model, cpu_layers=cpu_layers, repack=self._repack)
        self._cpu_layers, self._vocab, self._context = cpu_layers, config.vocab_size, context
        if (found := library.llama_vocab_n_tokens(self._model.vocab)) != config.vocab_size:
            raise RuntimeError(f"llama.cpp finds {found} tokens, we {config.vocab_size}")
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_ubatch = tokens_at_once
        settings.n_threads = settings.n_threads_batch = threads
        self._kv_format = kv_format
        if kv_format == "float32":  # flash attention's sums are in another order
            settings.flash_attn_type = _FLASH_ATTENTION_OFF
            settings.type_k = settings.type_v = _TYPE_F32
        self._ctx = library.llama_init_from_model(self._model.pointer, settings)
        if not self._ctx:
            raise RuntimeError(f"llama.cpp has no memory for a context of {context} tokens")
        self._batch = library.llama_batch_init(context, 0, 1)
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
        self._library.llama_memory_clear(self._library.llama_get_memory(self._ctx), True)
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
        status = self._library.llama_decode(self._ctx, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._position += count
        rows = count if every else 1
        address = self._library.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(address, (rows, self._vocab))

    def counts(self) -> None:
        """See `Program.counts`: it counts nothing."""

    def facts(self) -> dict[str, Any]:
        """See `Side.facts`."""
        library = self._library
        return {
            "program": "llama.cpp",
            "versions": {"xllamacpp": VERSION, "ggml": library.ggml_version().decode()},
            "device": "gpu" if self._on_gpu else "cpu",
            "threads": library.llama_n_threads(self._ctx),
            "precision": "the file's blocks; activations in 8 bits, "
            f"keys and values in {self._kv_format}",
            "layers_with_experts_on_cpu": self._cpu_layers,
            "weights_repacked": self._repack,
            "system": library.llama_print_system_info().decode().strip(),
            "device_peak_bytes": None,  # the library does not say
        }
