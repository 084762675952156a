"""What must hold of a slot pool between any two calls, whatever came before."""

import jax
import numpy as np

from hobbit_jax.cache.device_banks import ABSENT
from hobbit_jax.experts.store import ExpertKey
from pallas_kernels.formats import get_format

_join = jax.jit(lambda planes, name: get_format(name).join(planes), static_argnames="name")


def all_keys(store, precision: int) -> list[ExpertKey]:
    shape = (store.config.n_layers, store.config.n_experts)
    return [ExpertKey(precision, layer, expert) for layer, expert in np.ndindex(shape)]


def check_invariants(pool, store) -> None:
    """No slot is shared, the budget is kept, and table, policies and banks agree with the store."""
    keys_of = {signature: {} for signature in pool.banks}
    for key in pool.resident():
        assert 0 <= pool.slot(key) < pool.slots[store.signature(key)]
        taken = keys_of[store.signature(key)].setdefault(pool.slot(key), key)
        assert taken == key, f"slot {pool.slot(key)} is shared by {taken} and {key}"
    assert pool.device_bytes <= pool.budget_bytes
    assert sum(map(store.expert_bytes, pool.prefetched())) <= pool.staging_bytes
    assert not pool.prefetched() & pool.resident()
    on_device = [array.on_device_size_in_bytes() for array in jax.tree.leaves(pool.banks)]
    assert pool.device_bytes == sum(on_device)
    keys = [key for precision in range(len(store.precisions)) for key in all_keys(store, precision)]
    expert_bytes = {store.signature(key): store.expert_bytes(key) for key in keys}
    assert pool.device_bytes == sum(expert_bytes[s] * n for s, n in pool.slots.items())
    table_tLE = np.full(
        (len(store.precisions), store.config.n_layers, store.config.n_experts), ABSENT
    )
    for key in pool.resident():
        table_tLE[key] = pool.slot(key)
    on_device_UE = np.asarray(pool.table_UE)
    np.testing.assert_array_equal(on_device_UE, table_tLE.reshape(on_device_UE.shape))
    for signature, bank in pool.banks.items():
        policy, by_slot = pool.policies[signature], keys_of[signature]
        assert len(policy) == len(by_slot) and all(key in policy for key in by_slot.values())
        assert policy.pinned <= set(by_slot.values())
        raws_S = [np.asarray(_join(p, n)) for p, n in zip(bank, signature, strict=True)]
        for slot, key in by_slot.items():
            for raw_S, wanted in zip(raws_S, store.raw(key), strict=True):
                np.testing.assert_array_equal(raw_S[slot], wanted, strict=True)
