"""The slot pool: a fixed number of bytes on the device that holds the hot experts.

Owns the banks (device arrays), the table that says which expert is in which slot, on the device
and in the host's copy, and every host-to-device copy of an expert. Called by the engine and by
`moe.py`. One bank per expert signature, sized exactly, so that a low-bit expert takes only its
own bytes; each bank has its own policy. Raw GGUF blocks go up in one contiguous copy per matrix
and are split into planes on the device, inside the one program that writes the slot and its line
of the table: the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.cache.policies import Policy, PolicyFactory, Step
from hobbit_jax.store import ExpertKey, HostExperts
from pallas_kernels.formats import get_format
from pallas_kernels.reference import Bank, Planes, Signature

ABSENT = -1  # in the slot table: no slot


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


@dataclass
class PoolStats:
    """Counts since the last `reset`; arrays are [tiers, L, E]."""

    hits: np.ndarray
    misses: np.ndarray
    bytes_moved: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hits over accesses (0-1); None before the first access."""
        total = int(self.hits.sum() + self.misses.sum())
        return int(self.hits.sum()) / total if total else None


class Use(NamedTuple):
    """One expert's use in one step of one layer, for the policies."""

    key: ExpertKey
    weight: float = 1.0  # its largest router weight among the step's tokens
    native: bool = True  # whether native precision was asked for


class SlotPool:
    """Banks, slot table and policies under one byte budget (`cache/budget.py` divides it).

    `banks` and `table_UE` are for compiled programs to read: row `tier * L + layer` of the table
    holds, for each expert, its slot in the bank of its signature, or `ABSENT`. All of it is on
    `device`, or on the process's first; several devices have a `ShardedPool` of such pools.
    """

    mesh = None

    def __init__(
        self,
        store: HostExperts,
        slots: Mapping[Signature, int],
        budget_bytes: int,
        policy: PolicyFactory,
        device: Any = None,  # a jax.Device
    ):
        self.store, self.device = store, device
        self.budget_bytes = budget_bytes
        self.slots = dict(slots)
        self.banks: dict[Signature, Bank] = {}
        self.policies: dict[Signature, Policy[ExpertKey]] = {}
        self._free: dict[Signature, list[int]] = {}
        self._slot_of: dict[ExpertKey, int] = {}
        self._staged: dict[ExpertKey, tuple[jax.Array, ...]] = {}
        for signature, n_slots in slots.items():
            self.banks[signature] = self._empty_bank(signature, n_slots)
            self.policies[signature] = policy(n_slots)
            self._free[signature] = list(range(n_slots))[::-1]
        shape = (len(store.tiers) * store.config.n_layers, store.config.n_experts)
        self.table_UE = jnp.full(shape, ABSENT, jnp.int32, device=device)
        self.stats = self._zero_stats()
        if self.device_bytes > budget_bytes:
            raise RuntimeError(f"banks take {self.device_bytes} of {budget_bytes} bytes")

    def _empty_bank(self, signature: Signature, n_slots: int) -> Bank:
        config = self.store.config
        sizes = [(config.d_expert, config.d_model)] * 2 + [(config.d_model, config.d_expert)]
        banks: list[Planes] = []
        for name, (rows, columns) in zip(signature, sizes, strict=True):
            shapes = get_format(name).plane_shapes(rows, columns)
            banks.append(
                {
                    p: jnp.zeros((n_slots, *s.shape), s.dtype, device=self.device)
                    for p, s in shapes.items()
                }
            )
        return Bank(*banks)

    def _zero_stats(self) -> PoolStats:
        shape = (len(self.store.tiers), self.store.config.n_layers, self.store.config.n_experts)
        return PoolStats(np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    @property
    def device_bytes(self) -> int:
        """Bytes of all banks, as the device counts them."""
        return sum(array.nbytes for array in jax.tree.leaves(self.banks))

    @property
    def held_UE(self) -> jax.Array:
        """A table whose signs say who is resident, for programs that do not read the banks."""
        return self.table_UE

    def by_device(self, keys: Sequence[ExpertKey]) -> list[Sequence[ExpertKey]]:
        """`keys` by the device that holds them."""
        return [keys]

    def resident(self) -> frozenset[ExpertKey]:
        """Every expert that holds a slot."""
        return frozenset(self._slot_of)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slot_of

    def slot(self, key: ExpertKey) -> int:
        """The slot of a resident expert, in the bank of its signature. KeyError if absent."""
        return self._slot_of[key]

    def access(self, step: Step, uses: Sequence[Use], wished: Sequence[Use] = ()) -> None:
        """Records one use of each expert in a step of a layer, before anything is loaded for it.

        `wished` copies were asked for and another tier served: the policies hear of them, the
        counts do not.
        """
        for policy in self.policies.values():
            policy.begin_step(step)
        for key, weight, native in uses:
            hit = self.policies[self.store.signature(key)].access(key, weight, native)
            (self.stats.hits if hit else self.stats.misses)[key] += 1
        for key, weight, native in wished:
            if (policy := self.policies.get(self.store.signature(key))) is not None:
                policy.access(key, weight, native)

    def rounds(self, keys: Iterable[ExpertKey]) -> list[list[ExpertKey]]:
        """Splits one step's experts of one bank into rounds that fit its slots together.

        Resident experts come first, so that a round that must evict does not
        evict what the step still needs.
        """
        ordered = sorted(keys, key=lambda key: (key not in self._slot_of, key))
        if not ordered:
            return []
        signature = self.store.signature(ordered[0])
        # Pinned experts of this step are all in the first round; in later ones they only take room.
        pinned = self.policies[signature].pinned
        first = self.slots[signature] - len(pinned - set(ordered))
        size = self.slots[signature] - len(pinned)
        if len(ordered) > first and size < 1:
            raise RuntimeError(f"every slot of bank {signature} is pinned")
        starts = range(first, len(ordered), max(size, 1))
        return [ordered[:first], *(ordered[i : i + size] for i in starts)]

    def load(self, keys: Sequence[ExpertKey]) -> None:
        """Makes all of `keys` (one round) resident; none of them is evicted for another.

        Raises:
            ValueError: an expert's scales are damaged.
            OSError: its file is gone or changed.
            RuntimeError: more experts than slots that are not pinned, or an upload failed. The
                pool is whole after each of these, though an expert or a bank's may be missing.
        """
        keep = frozenset(keys)
        for key in keys:
            if key not in self._slot_of:
                self._fetch(key, keep)

    def load_all(self, tier: int) -> None:
        """Makes every expert of a tier resident, in a pool that has room for all of them."""
        config = self.store.config
        for layer in range(config.n_layers):
            self.load([ExpertKey(tier, layer, expert) for expert in range(config.n_experts)])

    def stage(self, key: ExpertKey) -> None:
        """Starts the upload of an expert that nobody waits for; `commit` gives it a slot.

        Programs that run meanwhile do not see it. Nothing happens if it is resident or staged, or
        has no bank.
        """
        if (
            key in self._slot_of
            or key in self._staged
            or self.store.signature(key) not in self.banks
        ):
            return
        self._staged[key] = self._upload(key)

    def commit(self) -> None:
        """Gives every staged expert a slot, between two entries of a program."""
        for key in list(self._staged):
            policy = self.policies[self.store.signature(key)]
            if len(policy.pinned) < policy.capacity and key not in self._slot_of:
                self._fetch(key, frozenset())
            self._staged.pop(key, None)

    def _upload(self, key: ExpertKey) -> tuple[jax.Array, ...]:
        raw = self.store.raw(key)
        try:
            return jax.device_put(raw, self.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"the upload of expert {key.expert} of layer {key.layer}, tier {key.tier}, "
                f"to {self.device or 'the device'} failed: {error}"
            ) from error

    def _fetch(self, key: ExpertKey, keep: frozenset[ExpertKey]) -> None:
        signature = self.store.signature(key)
        raw = self._staged.pop(key, None) or self._upload(key)
        # On a CPU an upload is the map itself, read only when the slot is written.
        self.store.check_unchanged(key.tier)
        policy, free = self.policies[signature], self._free[signature]
        victim = policy.admit(key, keep)
        try:
            slot = free[-1] if victim is None else self._slot_of[victim]
            change = np.asarray([slot, *self._cell(key), *self._cell(victim)], np.int32)
            self.banks[signature], self.table_UE = _write_slot(
                self.banks[signature], self.table_UE, raw, change, signature
            )
            if victim is None:
                free.pop()
            else:
                del self._slot_of[victim]
            self._slot_of[key] = slot
        except BaseException:
            # Failed or interrupted half-way: which of banks, table and policy changed is unknown.
            self._empty(signature)
            raise
        self.stats.bytes_moved += self.store.expert_bytes(key)

    def _empty(self, signature: Signature) -> None:
        """Makes a bank's experts absent, so that banks, table and policy agree for certain."""
        policy, n_slots = self.policies[signature], self.slots[signature]
        for layer, tier in np.ndindex(self.store.config.n_layers, len(self.store.tiers)):
            for expert in range(self.store.config.n_experts):
                key = ExpertKey(tier, layer, expert)
                if self.store.signature(key) == signature:
                    self._slot_of.pop(key, None)
                    if key in policy:
                        policy.unpin(key)
                        policy.remove(key)
        self._free[signature] = list(range(n_slots))[::-1]
        if any(plane.is_deleted() for plane in jax.tree.leaves(self.banks[signature])):
            self.banks[signature] = self._empty_bank(signature, n_slots)
        table_UE = np.full(self.table_UE.shape, ABSENT, np.int32)
        for key, slot in self._slot_of.items():
            table_UE[self._cell(key)] = slot
        self.table_UE = jnp.asarray(table_UE, device=self.device)

    def _cell(self, key: ExpertKey | None) -> tuple[int, int]:
        """Row and column of an expert's line in the table; outside of it for None."""
        if key is None:
            rows, columns = self.table_UE.shape
            return rows, columns
        return key.tier * self.store.config.n_layers + key.layer, key.expert

    def pin(self, keys: Iterable[ExpertKey]) -> None:
        """Loads `keys` and keeps them resident until `unpin`; not counted as accesses.

        Raises:
            ValueError: a bank would keep no slot to stream the rest through.
        """
        wanted = list(keys)
        for signature, policy in self.policies.items():
            of_bank = {key for key in wanted if self.store.signature(key) == signature}
            total = len(policy.pinned | of_bank)
            least = min(self.slots[signature], self.store.config.experts_per_token)
            if of_bank and total > self.slots[signature] - least:
                raise ValueError(
                    f"pinning {total} experts leaves bank {signature} fewer than {least} of its "
                    f"{self.slots[signature]} slots to stream through"
                )
        for key in wanted:
            if key not in self._slot_of:
                self._fetch(key, frozenset(wanted))
            self.policies[self.store.signature(key)].pin(key)

    def unpin(self, keys: Iterable[ExpertKey]) -> None:
        """Gives pinned experts back to the policy."""
        for key in keys:
            self.policies[self.store.signature(key)].unpin(key)

    def reset_stats(self) -> PoolStats:
        """Returns the counts so far and starts again from zero."""
        stats, self.stats = self.stats, self._zero_stats()
        return stats
