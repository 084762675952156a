"""What must hold of a slot pool between any two calls, whatever came before."""

import jax
import numpy as np

from hobbit_jax.cache.controller import Observer
from hobbit_jax.cache.device_banks import ABSENT
from hobbit_jax.cache.promotion import Promotion
from hobbit_jax.experts.store import ExpertKey
from hobbit_jax.models.sharding import owner
from pallas_kernels.formats import get_format
from pallas_kernels.ggml.ops import RawMatrix, address_of

_join = jax.jit(lambda planes, name: get_format(name).join(planes), static_argnames="name")


def slots_and_wanted(held, format_name: str, raws: list) -> tuple[np.ndarray, list]:
    """Of one matrix of a bank what its slots hold, and what stands for these raw blocks there:
    themselves, or their addresses."""
    if not isinstance(held, RawMatrix):
        return np.asarray(_join(held, format_name)), raws
    if held.in_place:
        return np.asarray(held.data), raws
    return np.asarray(held.data), [address_of(raw) for raw in raws]


def all_keys(store, precision: int) -> list[ExpertKey]:
    shape = (store.config.n_layers, store.config.n_experts)
    return [ExpertKey(precision, layer, expert) for layer, expert in np.ndindex(shape)]


def prefetched_bytes(pool) -> int:
    return sum(map(pool.store.expert_bytes, pool.prefetched))


def check_invariants(pool, store) -> None:
    """Of every device: no slot is shared, the budget is kept, and table, policies and banks agree
    with the store.
    """
    for index, part in enumerate(pool.parts):
        prefetched = [key for key in pool.prefetched if owner(*key[1:], len(pool.parts)) == index]
        assert sum(map(store.expert_bytes, prefetched)) <= pool.staging_bytes // len(pool.parts)
        assert part.nbytes <= pool.budget_bytes // len(pool.parts)
        slots = {b.signature: b.policy for b in pool.controller.banks if b.device == index}
        check_device(part, slots, store)
    assert pool.resident() == {key for part in pool.parts for key in part.slot_of}
    assert pool.device_bytes == sum(part.nbytes for part in pool.parts)
    assert not pool.prefetched.keys() & pool.resident()


def check_device(part, policies, store) -> None:
    keys_of = {signature: {} for signature in part.banks}
    for key, slot in part.slot_of.items():
        assert 0 <= slot < policies[store.signature(key)].capacity
        taken = keys_of[store.signature(key)].setdefault(slot, key)
        assert taken == key, f"slot {slot} is shared by {taken} and {key}"
    if not any(map(part.is_mapped, part.banks)):
        on_device = [array.on_device_size_in_bytes() for array in jax.tree.leaves(part.banks)]
        assert part.nbytes == sum(on_device)
    keys = [key for precision in range(len(store.precisions)) for key in all_keys(store, precision)]
    expert_bytes = {store.signature(key): store.expert_bytes(key) for key in keys}
    assert part.nbytes == sum(expert_bytes[s] * p.capacity for s, p in policies.items())
    table_pLE = np.full(store.shape_pLE, ABSENT)
    for key, slot in part.slot_of.items():
        table_pLE[key] = slot
    on_device_UE = np.asarray(part.table_UE)
    np.testing.assert_array_equal(on_device_UE, table_pLE.reshape(on_device_UE.shape))
    for signature, bank in part.banks.items():
        policy, by_slot = policies[signature], keys_of[signature]
        assert len(policy) == len(by_slot) and all(key in policy for key in by_slot.values())
        assert policy.pinned <= set(by_slot.values())
        raws = [store.raw(key) for key in by_slot.values()]
        for matrix, (held, name) in enumerate(zip(bank, signature, strict=True)):
            found_S, wanted = slots_and_wanted(held, name, [raw[matrix] for raw in raws])
            for slot, one in zip(by_slot, wanted, strict=True):
                np.testing.assert_array_equal(found_S[slot], one, strict=True)


class UsesByExpert(Observer):
    """Hits and misses of each copy, as a controller decided them."""

    def __init__(self, shape_pLE):
        self.hits, self.misses = np.zeros((2, *shape_pLE), np.int64)

    def after_step(self, decision):
        missing = decision.fetched + decision.computed
        for use in decision.uses:
            (self.misses if use.key in missing else self.hits)[use.key] += 1


class StandIn:
    """Of a controller: who is resident, and who goes for whom."""

    def __init__(self, resident, evicted):
        self.resident, self.evicted_for = resident, evicted.get

    def __contains__(self, key):
        return key in self.resident


def promotion_of(rule, resident, evicted=()) -> Promotion:
    """A promotion that is told by hand."""
    return Promotion(rule, StandIn(resident, dict(evicted)))
