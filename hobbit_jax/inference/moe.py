"""One layer's experts on many tokens, from routing to their weighted sum.

A row's result does not depend on the pool's size: items are padded to a width fixed by the routing
alone, each expert is computed by itself, and the K results of a token are summed last, in the order
of its selections.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hobbit_jax.cache.miss_modes import LOW, Use
from hobbit_jax.cache.policies import Step
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.selection import Selections
from hobbit_jax.experts.precision import SKIPPED
from hobbit_jax.experts.store import NATIVE, ExpertKey
from hobbit_jax.inference.host_compute import HostCompute, HostOutputs
from hobbit_jax.models.sharding import DIVIDED, REPLICATED, divided, on_each, sum_of_parts
from pallas_kernels.backends import KERNELS, Implementation
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.matmul_triton import item_rows
from pallas_kernels.reference import Bank, Epilogues, ExpertFunction, Signature, Work, items

Assignments = dict[ExpertKey, np.ndarray]  # of each copy, see `by_expert`


@partial(
    jax.jit,
    static_argnames=("signature", "implementation", "mesh", "function"),
    donate_argnames="y_AD",
)
def _expert_ffn(
    h_TD: jax.Array,
    y_AD: jax.Array,
    weight_A: jax.Array,
    bank: Bank,
    work: Work,
    signature: Signature,
    implementation: str,
    mesh: Mesh | None,
    function: ExpertFunction,
    epilogues: Epilogues | None,
) -> jax.Array:
    def run(h_TD, y_AD, weight_A, bank, work, epilogues):
        work = work._replace(count=work.count.reshape(()))
        return expert_ffn(
            h_TD, y_AD, weight_A, bank, signature, work, implementation, function, epilogues
        )

    specs = (REPLICATED, DIVIDED, REPLICATED, DIVIDED, DIVIDED, REPLICATED)
    return on_each(run, mesh, specs, DIVIDED)(h_TD, y_AD, weight_A, bank, work, epilogues)


@partial(jax.jit, static_argnames="mesh")
def _sum_of_parts(y_AD: jax.Array, mesh: Mesh) -> jax.Array:
    return on_each(partial(sum_of_parts, mesh=mesh), mesh, DIVIDED, REPLICATED)(y_AD)


@partial(jax.jit, donate_argnums=0)
def _add_outputs(y_AD: jax.Array, assignment_H: np.ndarray, y_HD: np.ndarray) -> jax.Array:
    return y_AD.at[assignment_H].set(y_HD, mode="drop")


def by_expert(layer: int, ids_TK: np.ndarray, precision_TK: np.ndarray) -> Assignments:
    """t * K + k, ascending, of the selections that each copy serves; `SKIPPED` serves none."""
    stride = int(ids_TK.max(initial=0)) + 1
    unit_A = np.where(precision_TK == SKIPPED, -1, precision_TK * stride + ids_TK).reshape(-1)
    order_A = np.argsort(unit_A, kind="stable")
    units, starts = np.unique(unit_A[order_A], return_index=True)
    parts = np.split(order_A, starts[1:])
    return {
        ExpertKey(int(unit) // stride, layer, int(unit) % stride): part
        for unit, part in zip(units, parts, strict=True)
        if unit >= 0
    }


def _uses(layer: int, grouped: Assignments, selections: Selections) -> tuple[list[Use], list[Use]]:
    """`uses_of` in NumPy; unmet are only native requests that a low copy served."""
    weights_A, requested_A = selections.weights_TK.reshape(-1), selections.requested_TK.reshape(-1)
    uses = [
        Use(key, float(weights_A[a].max()), bool((requested_A[a] == NATIVE).any()), len(a))
        for key, a in grouped.items()
    ]
    low_TK = (selections.requested_TK == NATIVE) & (selections.served_TK == LOW)
    unmet = np.unique(selections.ids_TK[low_TK]).tolist()
    return uses, [Use(ExpertKey(NATIVE, layer, expert)) for expert in unmet]


def _item_rows(grouped: Assignments, signature: Signature, implementation: str) -> int:
    """Rows of an item: the kernel's choice; of the others enough for the busiest expert."""
    counts = [len(part) for part in grouped.values()]
    if implementation not in KERNELS:
        return 1 << (max(counts, default=1) - 1).bit_length()
    return item_rows(-(-sum(counts) // max(1, len(counts))), signature)


def _calls(
    pool: SlotPool, keys: Sequence[ExpertKey], grouped: Assignments, width: int, most_items: int
) -> Iterator[Work]:
    """One batch as calls of `most_items` items a device, the last of them padded."""
    parts_of = [
        items(((pool.slot(key), grouped[key]) for key in share), width)
        for share in pool.by_device(keys)
    ]
    place = jnp.asarray if pool.mesh is None else partial(divided, mesh=pool.mesh)
    for start in range(0, max(len(slot_I) for slot_I, _ in parts_of), most_items):
        slots, assignments, counts = [], [], []
        for parts in parts_of:
            slot_I, assignment_IC = (part[start : start + most_items] for part in parts)
            padding = (0, most_items - len(slot_I))
            slots.append(np.pad(slot_I, padding))
            assignments.append(np.pad(assignment_IC, (padding, (0, 0))))
            counts.append(len(slot_I))
        yield Work(
            place(np.concatenate(slots)),
            place(np.concatenate(assignments)),
            place(np.asarray(counts if pool.mesh else counts[0], np.int32)),
        )


def _parts(
    pool: SlotPool, keys: Iterable[ExpertKey]
) -> Iterator[tuple[Signature, list[ExpertKey], list[ExpertKey]]]:
    """What runs one after the other: the signature, a batch of its bank, and a part of that.

    A part runs while the next one is on its way: first what is resident, then as many experts at a
    time as fill half of what can be staged; the other half is for those behind them. Without
    staging a batch stays whole.
    """
    by_bank: dict[Signature, list[ExpertKey]] = defaultdict(list)
    for key in keys:
        by_bank[pool.store.signature(key)].append(key)
    for signature, of_bank in by_bank.items():
        for batch in pool.controller.batches(of_bank):
            if not pool.staging_bytes:
                yield signature, batch, batch
                continue
            if resident := [key for key in batch if key in pool]:
                yield signature, batch, resident
            missing = [key for key in batch if key not in pool]
            size = max(1, pool.staging_bytes // (2 * pool.store.expert_bytes(batch[0])))
            for start in range(0, len(missing), size):
                yield signature, batch, missing[start : start + size]


def apply_experts(
    pool: SlotPool,
    step: Step,
    h_TD: jax.Array,
    weights_TK: jax.Array,
    selections: Selections,
    implementation: Implementation,
    upcoming: Sequence[ExpertKey],
    host: HostCompute,
    epilogues: Epilogues | None,
) -> jax.Array:
    """Runs every selected expert of a layer, loading what is missing or computing it on the CPU.

    While some of them run, the next ones are on their way, and at the end those of `upcoming`,
    which the next layer may need. The router's weights are on the device, and `selections` are
    NumPy's.

    Returns:
        y_AD, float32 [T * K, D]: each selection's expert output times its routing weight;
        zero for skipped selections.
    """
    store, mesh, n_assignments = pool.store, pool.mesh, selections.ids_TK.size
    grouped = by_expert(step.layer, selections.ids_TK, selections.served_TK)
    uses, unmet = _uses(step.layer, grouped, selections)
    decision = pool.controller.decide(step, uses, unmet, prefill=True)
    pool.begin(decision)
    outputs: HostOutputs | None = None
    if decision.computed:
        signatures = {store.signature(key) for key in decision.computed}
        widths = {s: _item_rows(grouped, s, host.implementation(s)) for s in signatures}
        outputs = host.run(decision.computed, grouped, widths, h_TD, selections.weights_TK)

    n_parts, layout = (1, None) if mesh is None else (mesh.size, NamedSharding(mesh, DIVIDED))
    y_AD = jnp.zeros((n_parts * n_assignments, h_TD.shape[1]), jnp.float32, device=layout)
    computed = set(decision.computed)
    parts = list(_parts(pool, (key for key in grouped if key not in computed)))
    for index, (signature, batch, part) in enumerate(parts):
        later = [key for *_, following in parts[index + 1 :] for key in following]
        pool.load(part, keep=batch, upcoming=[*later, *upcoming])
        chosen = store.backend(signature, implementation)
        width = _item_rows(grouped, signature, chosen)
        # Bounds that the shapes alone decide, so that few programs are compiled.
        most_items = min(n_assignments, store.config.n_experts + n_assignments // width)
        for work in _calls(pool, part, grouped, width, most_items):
            y_AD = _expert_ffn(
                h_TD, y_AD, weights_TK.reshape(-1), pool.banks[signature], work, signature, chosen,
                mesh, store.config.expert_function, epilogues,
            )  # fmt: skip
    if mesh is not None:
        y_AD = _sum_of_parts(y_AD, mesh)
    return y_AD if outputs is None else _add_outputs(y_AD, *outputs())
