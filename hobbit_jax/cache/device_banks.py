"""The slot pool on the device: banks of packed experts, and the table of who is in which slot.

Owns these arrays, and the one program that writes a slot and its lines of the table, so that the
two cannot disagree. GGUF blocks come as they lie in the file; a bank holds them split into planes,
or as they are, or only their addresses in the file's map (`Layout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.experts.store import ExpertKey, HostExperts
from hobbit_jax.models.config import ModelConfig
from pallas_kernels.formats import get_format
from pallas_kernels.ggml.ops import RawMatrix
from pallas_kernels.reference import Bank, Planes, Signature

ABSENT = -1  # in the table: no slot

# How a bank holds its experts: planes for XLA and Triton, GGUF blocks for ggml, or, where the
# device is the host and all experts have a slot, the places of those blocks in the file's map.
Layout = Literal["planes", "blocks", "mapped"]


@partial(jax.jit, donate_argnums=(0, 1), static_argnums=4)
def _write_slot(
    bank: Bank,
    table_UE: jax.Array,
    raw: tuple[jax.Array, ...],
    change: np.ndarray,  # int32: slot; row and column of the newcomer, then of the victim
    signature: Signature,
) -> tuple[Bank, jax.Array]:
    slot = change[0]
    written = []
    for planes, blocks, name in zip(bank, raw, signature, strict=True):
        if isinstance(planes, RawMatrix):
            held = jax.lax.dynamic_update_index_in_dim(planes.data, blocks, slot, 0)
            written.append(replace(planes, data=held))
            continue
        new = get_format(name).split(blocks)
        written.append(
            {
                plane: jax.lax.dynamic_update_index_in_dim(planes[plane], new[plane], slot, 0)
                for plane in planes
            }
        )
    # Without a victim its row is past the table's end, and the write is dropped.
    table_UE = table_UE.at[change[3], change[4]].set(ABSENT, mode="drop")
    return Bank(*written), table_UE.at[change[1], change[2]].set(slot)


def empty_bank(
    config: ModelConfig,
    signature: Signature,
    n_slots: int,
    device: Any = None,
    layout: Layout = "planes",
) -> Bank:
    """Zeros for `n_slots` experts of one signature, on `device` (a jax.Device) or the first."""
    sizes = [(config.d_expert, config.d_model)] * 2 + [(config.d_model, config.d_expert)]
    banks: list[Planes | RawMatrix] = []
    for name, (rows, columns) in zip(signature, sizes, strict=True):
        if layout != "planes":
            row_bytes = get_format(name).row_bytes(columns)
            shape, dtype = (
                ((rows, row_bytes), np.uint8) if layout == "blocks" else ((2,), np.uint32)
            )
            data = jnp.zeros((n_slots, *shape), dtype, device=device)
            banks.append(RawMatrix(data, rows, columns, rows * row_bytes))
            continue
        shapes = get_format(name).plane_shapes(rows, columns)
        banks.append(
            {p: jnp.zeros((n_slots, *s.shape), s.dtype, device=device) for p, s in shapes.items()}
        )
    return Bank(*banks)


class DeviceBanks:
    """The arrays of one pool; `banks` and `table_UE` are new objects after each write.

    Row `precision * L + layer` of the table holds, for each expert, its slot in the bank of its
    signature, or `ABSENT`.
    """

    def __init__(
        self,
        store: HostExperts,
        slots: Mapping[Signature, int],
        device: Any = None,
        layouts: Mapping[Signature, Layout] | None = None,
    ):
        """`layouts` are planes for the signatures that it leaves out."""
        self._store, self._device = store, device
        self._layouts: dict[Signature, Layout] = dict(layouts or {})
        self.banks: dict[Signature, Bank] = {}
        for signature, n_slots in slots.items():
            self.renew(signature, n_slots)
        shape = (len(store.precisions) * store.config.n_layers, store.config.n_experts)
        self.table_UE = jnp.full(shape, ABSENT, jnp.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all banks; of mapped ones, those of the map that their slots stand for."""
        matrices = jax.tree.leaves(self.banks, is_leaf=lambda node: isinstance(node, RawMatrix))
        return sum(matrix.nbytes for matrix in matrices)

    def is_mapped(self, signature: Signature) -> bool:
        """Whether a bank holds addresses of the file's map: nothing is uploaded into it."""
        return self._layouts.get(signature) == "mapped"

    def renew(self, signature: Signature, n_slots: int) -> None:
        """Puts an empty bank in the place of one; the table is as it was."""
        self.banks[signature] = empty_bank(
            self._store.config,
            signature,
            n_slots,
            self._device,
            self._layouts.get(signature, "planes"),
        )

    def give_back(self, signature: Signature) -> None:
        """Gives a bank's device memory back at once."""
        for plane in jax.tree.leaves(self.banks[signature]):
            plane.delete()

    def is_lost(self, signature: Signature) -> bool:
        """Whether a bank was given back, or to a program that failed."""
        return any(plane.is_deleted() for plane in jax.tree.leaves(self.banks[signature]))

    def write(
        self, key: ExpertKey, raw: tuple[jax.Array, ...], slot: int, victim: ExpertKey | None
    ) -> None:
        """Puts an expert's blocks into a slot, and its line and the victim's into the table."""
        signature = self._store.signature(key)
        change = np.asarray([slot, *self._cell(key), *self._cell(victim)], np.int32)
        self.banks[signature], self.table_UE = _write_slot(
            self.banks[signature], self.table_UE, raw, change, signature
        )

    def write_table(self, slot_of: Mapping[ExpertKey, int]) -> None:
        """Makes the table anew from the host's copy."""
        table_UE = np.full(self.table_UE.shape, ABSENT, np.int32)
        for key, slot in slot_of.items():
            table_UE[self._cell(key)] = slot
        self.table_UE = jnp.asarray(table_UE, device=self._device)

    def _cell(self, key: ExpertKey | None) -> tuple[int, int]:
        """Row and column of an expert's line in the table; outside of it for None."""
        if key is None:
            rows, columns = self.table_UE.shape
            return rows, columns
        return key.precision * self._store.config.n_layers + key.layer, key.expert
