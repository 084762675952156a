"""One layer's experts, from routing to their weighted sum.

Owns the grouping of selections by expert and the walk over banks and rounds.
Called by the engine between a layer's router and the next layer. What stands on
the host here is bookkeeping only; the arithmetic is `pallas_kernels.reference`.

A row's result does not depend on the pool's size: groups are padded to a width
fixed by the routing alone, each expert is computed by itself, and the K results
of a token are summed last, in the order of its selections.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.precision import SKIPPED
from hobbit_jax.store import ExpertKey
from pallas_kernels.reference import Signature, gather_slots, run_experts

# Experts gathered from their slots at a time: what bounds the op's scratch beside the pool. The
# expert program sees the gathered slots only, so it is compiled once for every pool size.
MAX_GROUPS = 8

_gather_slots = jax.jit(gather_slots)
_run_experts = jax.jit(run_experts, static_argnames=("signature",), donate_argnums=1)


@partial(jax.jit, donate_argnums=0)
def add_experts(x_BTD: jax.Array, y_AD: jax.Array, weights_TK: jax.Array) -> jax.Array:
    """Residual stream plus the experts' weighted sum, in the order of the selections."""
    y_TKD = y_AD.reshape(*weights_TK.shape, -1)
    return x_BTD + jnp.einsum("tkd,tk->td", y_TKD, weights_TK).reshape(x_BTD.shape)


@dataclass(frozen=True)
class Selections:
    """One layer's selections, grouped by the expert that serves them."""

    assignments: dict[ExpertKey, np.ndarray]  # t * K + k, ascending
    width: int  # rows per expert after padding: a power of two

    @classmethod
    def group(cls, layer: int, ids_TK: np.ndarray, tier_TK: np.ndarray) -> Selections:
        """Groups by (tier, expert); selections at tier `SKIPPED` belong to nobody."""
        stride = int(ids_TK.max(initial=0)) + 1
        unit_A = np.where(tier_TK == SKIPPED, -1, tier_TK * stride + ids_TK).reshape(-1)
        order_A = np.argsort(unit_A, kind="stable")
        units, starts = np.unique(unit_A[order_A], return_index=True)
        parts = np.split(order_A, starts[1:])
        assignments = {
            ExpertKey(int(unit) // stride, layer, int(unit) % stride): part
            for unit, part in zip(units, parts, strict=True)
            if unit >= 0
        }
        most = max((len(part) for part in assignments.values()), default=1)
        return cls(assignments, 1 << (most - 1).bit_length())


def apply_experts(
    pool: SlotPool, layer: int, h_TD: jax.Array, ids_TK: np.ndarray, tier_TK: np.ndarray
) -> jax.Array:
    """Runs every selected expert of `layer`, loading what is missing.

    Returns:
        y_AD, float32 [T * K, D]: each selection's expert output, not yet weighted;
        zero for skipped selections.
    """
    tokens, k = ids_TK.shape
    n_assignments = tokens * k
    selections = Selections.group(layer, ids_TK, tier_TK)
    by_bank: dict[Signature, list[ExpertKey]] = defaultdict(list)
    for key in selections.assignments:
        by_bank[pool.store.signature(key)].append(key)

    n_groups = min(n_assignments, pool.store.config.n_experts, MAX_GROUPS)
    y_AD = jnp.zeros((n_assignments, h_TD.shape[1]), jnp.float32)
    for signature, keys in by_bank.items():
        for part in pool.rounds(keys):
            pool.ensure(part)
            for start in range(0, len(part), n_groups):
                group = part[start : start + n_groups]
                slots_G = np.zeros(n_groups, np.int32)
                slots_G[: len(group)] = [pool.slot(key) for key in group]
                assignments_GC = np.full((n_groups, selections.width), n_assignments, np.int32)
                for row, key in enumerate(group):
                    assignments = selections.assignments[key]
                    assignments_GC[row, : len(assignments)] = assignments
                y_AD = _run_experts(
                    h_TD,
                    y_AD,
                    _gather_slots(pool.banks[signature], slots_G),
                    signature=signature,
                    assignments_GC=assignments_GC,
                    n_groups=np.int32(len(group)),
                )
    return y_AD
