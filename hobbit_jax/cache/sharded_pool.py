"""Slot pools of several devices, each over its share of the experts, seen as one.

This module owns the way from an expert to its device's pool, and the global arrays that programs
over all devices read, assembled from the pools' own without a copy. One controller decides for all;
which device owns which expert is `model/sharding.py`'s. Each pool keeps its own table and budget,
and uploads go straight to its device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from hobbit_jax.cache.controller import Controller, Decision
from hobbit_jax.cache.device_banks import Layout
from hobbit_jax.cache.link import Link
from hobbit_jax.cache.pool import PoolStats, SlotPool, holds_all
from hobbit_jax.experts.store import ExpertKey, HostExperts
from hobbit_jax.models.sharding import (
    DIVIDED,
    REPLICATED,
    assembled,
    held_anywhere,
    on_each,
    owner,
)
from pallas_kernels.backends import Implementation
from pallas_kernels.expert_ffn import implementation_for
from pallas_kernels.reference import Bank, Signature


@partial(jax.jit, static_argnums=1)
def _held(table_UE: jax.Array, mesh: Mesh) -> jax.Array:
    return on_each(partial(held_anywhere, mesh=mesh), mesh, DIVIDED, REPLICATED)(table_UE)


class ShardedPool:
    """One `SlotPool` per device of `mesh`, with the interface of one.

    Global arrays have the devices' parts one after another along their leading axis: `banks` all
    slots, `table_UE` every device's table, whose slots count from its own first.
    """

    def __init__(
        self,
        store: HostExperts,
        controller: Controller,
        budget_bytes: int,
        link: Link | None,
        staging_bytes: int,
        mesh: Mesh,
        layouts: Mapping[Signature, Layout] | None = None,
    ):
        """`budget_bytes` and `staging_bytes` are those of each device."""
        self.store, self.mesh, self.controller = store, mesh, controller
        self.pools = [
            SlotPool(store, controller, budget_bytes, link, staging_bytes, index, device, layouts)
            for index, device in enumerate(mesh.devices.flat)
        ]
        self._assembled: dict[Any, tuple[list[Any], Any]] = {}

    def _global(self, name: Any, parts: list[Any], build=assembled) -> Any:
        """What `build` makes of `parts`, kept until one of them is another."""
        known = self._assembled.get(name)
        if known is None or any(a is not b for a, b in zip(known[0], parts, strict=True)):
            # The old one's arrays may be donated, and a program that read them would crash.
            self._assembled[name] = known = (parts, build(parts, self.mesh))
        return known[1]

    @property
    def banks(self) -> dict[Signature, Bank]:
        """All devices' slots, [devices * S, ...]."""
        return {
            signature: self._global(signature, [pool.banks[signature] for pool in self.pools])
            for signature in self.pools[0].banks
        }

    @property
    def table_UE(self) -> jax.Array:
        """All devices' tables, [devices * precisions * L, E]."""
        return self._global("table", [pool.table_UE for pool in self.pools])

    @property
    def held_UE(self) -> jax.Array:
        """Replicated, [precisions * L, E]: not negative where an expert is resident on its
        device.
        """
        return self._global("held", [self.table_UE], lambda parts, mesh: _held(parts[0], mesh))

    @property
    def slots(self) -> dict[Signature, int]:
        """Of all devices together."""
        return {s: n * len(self.pools) for s, n in self.pools[0].slots.items()}

    @property
    def budget_bytes(self) -> int:
        """Of all devices together."""
        return sum(pool.budget_bytes for pool in self.pools)

    @property
    def staging_bytes(self) -> int:
        """Of all devices together."""
        return sum(pool.staging_bytes for pool in self.pools)

    @property
    def holds_all(self) -> bool:
        """Whether every expert of every bank can be resident at once."""
        return holds_all(self.store, self.slots)

    @property
    def device_bytes(self) -> int:
        """Bytes of all banks of all devices."""
        return sum(pool.device_bytes for pool in self.pools)

    @property
    def stats(self) -> PoolStats:
        """Counts of all devices since the last `reset_stats`."""
        return _sum([pool.stats for pool in self.pools])

    def reset_stats(self) -> PoolStats:
        """Returns the counts so far and starts again from zero."""
        return _sum([pool.reset_stats() for pool in self.pools])

    def _pool(self, key: ExpertKey) -> SlotPool:
        return self.pools[owner(key.layer, key.expert, len(self.pools))]

    def by_device(self, keys: Iterable[ExpertKey]) -> list[list[ExpertKey]]:
        """`keys` by the device that owns them."""
        shares: list[list[ExpertKey]] = [[] for _ in self.pools]
        for key in keys:
            shares[owner(key.layer, key.expert, len(self.pools))].append(key)
        return shares

    def resident(self) -> frozenset[ExpertKey]:
        """Every expert that holds a slot."""
        return frozenset().union(*(pool.resident() for pool in self.pools))

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._pool(key)

    def slot(self, key: ExpertKey) -> int:
        """The slot of a resident expert in its device's bank. KeyError if absent."""
        return self._pool(key).slot(key)

    def begin(self, decision: Decision) -> None:
        """See `SlotPool.begin`; each device counts its own experts."""
        for pool in self.pools:
            own = [use for use in decision.uses if self._pool(use.key) is pool]
            computed = [key for key in decision.computed if self._pool(key) is pool]
            pool.begin(decision._replace(uses=own, computed=computed))

    def load(
        self,
        keys: Sequence[ExpertKey],
        keep: Iterable[ExpertKey] | None = None,
        upcoming: Sequence[ExpertKey] = (),
    ) -> None:
        """See `SlotPool.load`. Where one device's load fails, the others' pools are whole too."""
        kept = keys if keep is None else keep
        shares = zip(*map(self.by_device, (keys, kept, upcoming)), strict=True)
        for pool, (own, own_kept, own_upcoming) in zip(self.pools, shares, strict=True):
            pool.load(own, own_kept, own_upcoming)

    def prefetch(self, keys: Iterable[ExpertKey]) -> None:
        """See `SlotPool.prefetch`."""
        for pool, share in zip(self.pools, self.by_device(keys), strict=True):
            pool.prefetch(share)

    def drop_prefetched(self) -> None:
        """Gives up all prefetched uploads."""
        for pool in self.pools:
            pool.drop_prefetched()

    def load_all(self, precision: int) -> None:
        """Makes every expert of a precision resident, in pools that have room for all of them."""
        config = self.store.config
        for layer in range(config.n_layers):
            self.load([ExpertKey(precision, layer, expert) for expert in range(config.n_experts)])

    def reserve(self, key: ExpertKey) -> None:
        """See `SlotPool.reserve`."""
        self._pool(key).reserve(key)

    def promote(self) -> None:
        """See `SlotPool.promote`."""
        for pool in self.pools:
            pool.promote()

    def resize(self, slots: Mapping[Signature, int]) -> None:
        """See `SlotPool.resize`; `slots` are those of each device."""
        for pool in self.pools:
            pool.resize(slots)

    def pin(self, keys: Iterable[ExpertKey]) -> None:
        """See `SlotPool.pin`; a device may have pinned its own before another refuses."""
        for pool, share in zip(self.pools, self.by_device(keys), strict=True):
            pool.pin(share)


ExpertPool = SlotPool | ShardedPool


def make_pool(
    store: HostExperts,
    controller: Controller,
    budget_bytes: int,
    link: Link | None = None,
    staging_bytes: int = 0,
    mesh: Mesh | None = None,
    implementation: Implementation = "xla",
) -> ExpertPool:
    """The pool of one device, or of all of `mesh`; bytes are those of each.

    Its banks are laid out for `implementation`. Where ggml computes, all experts have slots and no
    link is emulated, the banks are the file's map.
    """
    config, slots = store.config, Counter[Signature]()
    for bank in controller.banks:
        slots[bank.signature] += bank.policy.capacity
    stay = link is None and holds_all(store, slots)
    layouts: dict[Signature, Layout] = {
        s: "mapped" if stay else "blocks"
        for s in slots
        if implementation_for(
            s, config.d_model, config.d_expert, implementation, function=config.expert_function
        )
        == "ggml"
    }
    if mesh is None:
        return SlotPool(store, controller, budget_bytes, link, staging_bytes, layouts=layouts)
    return ShardedPool(store, controller, budget_bytes, link, staging_bytes, mesh, layouts)


def _sum(parts: list[PoolStats]) -> PoolStats:
    counts: dict[str, Any] = {
        field.name: sum(getattr(part, field.name) for part in parts) for field in fields(PoolStats)
    }
    return PoolStats(**counts)
