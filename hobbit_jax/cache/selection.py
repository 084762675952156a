"""From a router's choice to the copies that serve it: one layer's selections.

Array code that runs in compiled programs on JAX's arrays, and on NumPy's in replays.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from hobbit_jax.cache.miss_modes import MissMode
from hobbit_jax.experts.precision import SKIPPED, Array, PrecisionPlan


class Selections(NamedTuple):
    """What T tokens want of one layer, [T, K] each, heaviest first."""

    ids_TK: Array  # int32
    weights_TK: Array  # float32
    requested_TK: Array  # int32: the plan's precision, `SKIPPED` for padding
    served_TK: Array  # int32: the precision that serves it, resident or to be fetched


def rows_of_layer(table_UE: jax.Array, layer: jax.Array, n_layers: int) -> jax.Array:
    """One layer's lines of the slot table, int32 [precisions, E]."""
    return table_UE.reshape(-1, n_layers, table_UE.shape[1])[:, layer]


def select(
    plan: PrecisionPlan,
    mode: MissMode,
    resident_pE: Array,
    layer: int | jax.Array,
    routing: tuple[Array, Array],
    valid_T: Array,
) -> Selections:
    """Assigns precisions to a router's choice; rows that are not valid ask for nothing.

    Args:
        plan: says what is requested.
        mode: says what serves it.
        resident_pE: bool, of the layer's copies.
        layer: of the model.
        routing: experts and weights, [T, K] each, heaviest first.
        valid_T: bool; False is padding.
    """
    ids_TK, weights_TK = routing
    xp = weights_TK.__array_namespace__()
    assigned_TK = plan.assign(layer, ids_TK, weights_TK).astype(xp.int32)
    requested_TK = xp.where(valid_T[:, None], assigned_TK, xp.int32(SKIPPED))
    served_TK = mode.serve(requested_TK, weights_TK, resident_pE[:, ids_TK])
    served_TK = xp.where(requested_TK == SKIPPED, xp.int32(SKIPPED), served_TK)
    return Selections(ids_TK, weights_TK, requested_TK, served_TK)
