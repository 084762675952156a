"""Experts computed on the CPU, from the blocks in the file's map, whatever the device is.

The rows that chose these experts go to the CPU, the same expert op runs on them there, and its
outputs return as data. ggml computes them. A row's result depends on its expert and the width of an
item alone, so where the device is a CPU and ggml computes there too, both give the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.cache.link import failing
from hobbit_jax.experts.store import ExpertKey, HostExperts
from pallas_kernels.backends import Implementation
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.ggml.ops import RawMatrix, address_of
from pallas_kernels.reference import Bank, Epilogue, Epilogues, Signature, Work, items

# A layer's outputs of experts that the CPU computes meanwhile; H is a power of two. The call waits
# for them: t * K + k of each row (int32; T * K for padding), and the expert's output times the
# routing weight (float32). It raises a RuntimeError if the computation failed.
HostOutputs = Callable[[], tuple[np.ndarray, np.ndarray]]


# One program a call: starting three takes longer than the products of a token's experts.
@partial(
    jax.jit, static_argnames=("signature", "implementation", "function"), donate_argnames="y_HD"
)
def _expert_ffn(
    h_TD, row_H, y_HD, weight_H, bank, work, signature, implementation, function, epilogues
):
    x_HD = h_TD[row_H]
    y_HD = jnp.zeros_like(x_HD) if y_HD is None else y_HD
    return expert_ffn(
        x_HD, y_HD, weight_H, bank, signature, work, implementation, function, epilogues
    )


class HostCompute:
    """The CPU of one engine, which reads the map of `store`.

    `implementation` is of the device's products. Beside "xla", which rounds no activations, the CPU
    rounds none either.
    """

    def __init__(self, store: HostExperts, implementation: Implementation):
        in_float32 = implementation in ("xla", "ggml_f32")
        self._store, self._implementation = store, "ggml_f32" if in_float32 else "ggml"
        self._mapped_bank = cache(self._make_mapped_bank)

    @property
    def _device(self) -> Any:  # a jax.Device
        try:
            return jax.devices("cpu")[0]
        except RuntimeError as error:
            raise RuntimeError(
                "a miss mode that computes on the CPU needs JAX's CPU device, and this process has "
                f"none; put cpu into JAX_PLATFORMS ({error})"
            ) from error

    def implementation(self, signature: Signature) -> str:
        """How experts of one signature are computed on the CPU.

        Raises:
            NotImplementedError: ggml cannot run here.
        """
        try:
            return self._store.backend(signature, self._implementation, "cpu")
        except NotImplementedError as error:
            raise NotImplementedError(
                "a miss mode that computes on the CPU does so with ggml; take another one, such as "
                f"'fetch', since: {error}"
            ) from error

    @cached_property
    def _epilogue(self) -> Epilogue | None:
        return jax.device_put(self._store.epilogue, self._device)

    def run(
        self,
        keys: Sequence[ExpertKey],
        assignments: Mapping[ExpertKey, np.ndarray],
        widths: Mapping[Signature, int],
        h_TD: jax.Array,
        weights_TK: np.ndarray,
    ) -> HostOutputs:
        """Begins to compute `keys`, experts of one layer, on all rows that chose them.

        Args:
            keys: the experts.
            assignments: t * K + k of each one's rows, ascending.
            widths: rows of an item, as on the device.
            h_TD: what the experts read, float32, on the device.
            weights_TK: the router's, float32.

        Raises:
            ValueError: an expert's scales are damaged.
            OSError: its file is gone or changed.
            RuntimeError: it could not be begun.
        """
        for key in keys:
            self._store.raw(key)  # checks it, before the first address is read
        count, k = weights_TK.size, weights_TK.shape[1]
        assignment_N = np.concatenate([assignments[key] for key in keys]).astype(np.int32)
        padding = (1 << (len(assignment_N) - 1).bit_length()) - len(assignment_N)
        assignment_H = np.pad(assignment_N, (0, padding), constant_values=count)
        counts = [len(assignments[key]) for key in keys]
        ends = np.cumsum(counts)
        rows = dict(zip(keys, np.split(np.arange(len(assignment_N)), ends[:-1]), strict=True))
        weight_H = np.append(weights_TK.reshape(-1), np.float32(0))[assignment_H]
        local_TD = h_TD.addressable_data(0)  # of several devices each has all
        function = self._store.config.expert_function
        expert_N = [key.layer * self._store.config.n_experts + key.expert for key in keys]
        expert_H = np.pad(np.repeat(expert_N, counts), (0, padding)).astype(np.int32)
        epilogues = Epilogues.of(self._epilogue, expert_H)
        what = f"computing {len(keys)} experts of layer {keys[0].layer} on the CPU"
        with failing(what), jax.default_device(self._device):
            local_TD, y_HD = jax.device_put(local_TD, self._device), None
            row_H = np.minimum(assignment_H, count - 1) // k
            for bank, work, signature, chosen in self._calls(rows, widths):
                y_HD = _expert_ffn(
                    local_TD, row_H, y_HD, weight_H, bank, work, signature, chosen, function,
                    epilogues,
                )  # fmt: skip
            assert y_HD is not None

        def wait() -> tuple[np.ndarray, np.ndarray]:
            with failing(what):
                return assignment_H, np.asarray(y_HD)

        return wait

    def _calls(self, rows, widths):
        """The calls of the op: bank, work, signature and implementation of each."""
        by_precision: dict[int, list[ExpertKey]] = {}
        for key in rows:
            by_precision.setdefault(key.precision, []).append(key)
        for keys in by_precision.values():
            signature = self._store.signature(keys[0])
            chosen, width = self.implementation(signature), widths[signature]
            slots = {key: key.expert for key in keys}
            bank = self._mapped_bank(keys[0].precision, keys[0].layer)
            yield bank, _work(slots, rows, width), signature, chosen

    def _make_mapped_bank(self, precision: int, layer: int) -> Bank:
        """All of one layer's experts as addresses in the map."""
        experts = self._store.layer(precision, layer)
        matrices = []
        for tensor in (experts.gate, experts.up, experts.down):
            addresses_E2 = np.stack([address_of(raw) for raw in tensor.raw])
            _, n_rows, n_columns = tensor.shape
            matrices.append(RawMatrix(addresses_E2, n_rows, n_columns, tensor.raw[0].nbytes))
        return Bank(*matrices)


def _work(slots: Mapping[ExpertKey, int], rows: Mapping[ExpertKey, np.ndarray], width: int) -> Work:
    """Items of up to `width` rows of one expert; a power of two of them."""
    slot_I, row_IC = items(((slot, rows[key]) for key, slot in slots.items()), width)
    padding = (1 << (len(slot_I) - 1).bit_length()) - len(slot_I)
    # NumPy's arrays go to the device with the program that takes them.
    work: tuple[Any, ...] = (
        np.pad(slot_I, (0, padding)),
        np.pad(row_IC, ((0, padding), (0, 0))),
        np.int32(len(slot_I)),
    )
    return Work(*work)
