"""The slots of one device: banks of packed experts, and the table of who is in which slot.

Owns these arrays, the host's copy of the table, and the one program that writes a slot and its
lines of the table, so that the two cannot disagree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.cache.controller import Bank as Slots
from hobbit_jax.experts.store import ExpertKey, HostExperts
from hobbit_jax.models.config import ModelConfig
from pallas_kernels.formats import Planes, get_format
from pallas_kernels.ggml.ops import RawMatrix
from pallas_kernels.reference import Bank, Signature

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
    def put(held: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(held, new, change[0], 0)

    written = []
    for held, blocks, name in zip(bank, raw, signature, strict=True):
        is_raw = isinstance(held, RawMatrix)
        new = replace(held, data=blocks) if is_raw else get_format(name).split(blocks)
        written.append(jax.tree.map(put, held, new))
    # Without a victim its row is past the table's end, and the write is dropped.
    table_UE = table_UE.at[change[3], change[4]].set(ABSENT, mode="drop")
    return Bank(*written), table_UE.at[change[1], change[2]].set(change[0])


def empty_bank(
    config: ModelConfig,
    signature: Signature,
    n_slots: int,
    device: Any = None,
    layout: Layout = "planes",
) -> Bank:
    """Zeros for `n_slots` experts of one signature, on `device` (a jax.Device) or the first."""

    def zeros(one: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((n_slots, *one.shape), one.dtype, device=device)

    sizes = [(config.d_expert, config.d_model)] * 2 + [(config.d_model, config.d_expert)]
    banks: list[Planes | RawMatrix] = []
    for name, (rows, columns) in zip(signature, sizes, strict=True):
        held: Any = get_format(name).plane_shapes(rows, columns)
        if layout != "planes":
            row_bytes = get_format(name).row_bytes(columns)
            blocks, address = ((rows, row_bytes), np.uint8), ((2,), np.uint32)
            data: Any = jax.ShapeDtypeStruct(*(blocks if layout == "blocks" else address))
            held = RawMatrix(data, rows, columns, rows * row_bytes)
        banks.append(jax.tree.map(zeros, held))
    return Bank(*banks)


class DeviceBanks:
    """The arrays of one device; `banks` and `table_UE` are new objects after each write.

    Row `precision * L + layer` of the table holds each expert's slot in the bank of its signature,
    or `ABSENT`. A signature without a layout is in planes.
    """

    def __init__(
        self,
        store: HostExperts,
        slots: Sequence[Slots],
        device: Any = None,
        layouts: Mapping[Signature, Layout] | None = None,
    ):
        self.device = device
        self._store = store
        self._layouts: dict[Signature, Layout] = dict(layouts or {})
        self.banks: dict[Signature, Bank] = {}
        self.slot_of: dict[ExpertKey, int] = {}
        self._free: dict[Signature, list[int]] = {}
        for bank in slots:
            self.renew(bank)
        n_precisions, n_layers, n_experts = store.shape_pLE
        shape_UE = (n_precisions * n_layers, n_experts)
        self.table_UE = jnp.full(shape_UE, ABSENT, jnp.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all banks; of mapped ones, those of the map that their slots stand for."""
        matrices = jax.tree.leaves(self.banks, is_leaf=lambda node: isinstance(node, RawMatrix))
        return sum(matrix.nbytes for matrix in matrices)

    def is_mapped(self, signature: Signature) -> bool:
        """Whether a bank holds addresses of the file's map: nothing is uploaded into it."""
        return self._layouts.get(signature) == "mapped"

    def renew(self, slots: Slots) -> list[ExpertKey]:
        """Puts an empty bank in the place of one; returns the copies that were in that.

        The table is as it was until `write_table`.
        """
        signature, n_slots = slots.signature, slots.policy.capacity
        layout = self._layouts.get(signature, "planes")
        config = self._store.config
        self.banks[signature] = empty_bank(config, signature, n_slots, self.device, layout)
        self._free[signature] = list(range(n_slots))[::-1]
        held = [key for key in self.slot_of if self._store.signature(key) == signature]
        for key in held:
            del self.slot_of[key]
        return held

    def give_back(self, signature: Signature) -> None:
        """Gives a bank's device memory back at once."""
        for plane in jax.tree.leaves(self.banks[signature]):
            plane.delete()

    def put(self, key: ExpertKey, raw: tuple[jax.Array, ...], victim: ExpertKey | None) -> None:
        """Puts a copy's blocks into the slot of `victim`, or a free one for None."""
        signature = self._store.signature(key)
        free = self._free[signature]
        slot = free[-1] if victim is None else self.slot_of[victim]
        change = np.asarray([slot, *self._cell(key), *self._cell(victim)], np.int32)
        self.banks[signature], self.table_UE = _write_slot(
            self.banks[signature], self.table_UE, raw, change, signature
        )
        if victim is None:
            free.pop()
        else:
            del self.slot_of[victim]
        self.slot_of[key] = slot

    def write_table(self) -> None:
        """Makes the table anew from the host's copy."""
        table_UE = np.full(self.table_UE.shape, ABSENT, np.int32)
        for key, slot in self.slot_of.items():
            table_UE[self._cell(key)] = slot
        self.table_UE = jnp.asarray(table_UE, device=self.device)

    def _cell(self, key: ExpertKey | None) -> tuple[int, int]:
        """Row and column of an expert's line in the table; outside of it for None."""
        if key is None:
            rows, columns = self.table_UE.shape
            return rows, columns
        return key.precision * self._store.config.n_layers + key.layer, key.expert
