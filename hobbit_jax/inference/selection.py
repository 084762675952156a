"""From a router's choice to the copies that serve it: one layer's selections.

Owns the order of the three decisions: the router says which experts, the plan which precision each
selection asks for, and the miss mode, which sees the slot table, which precision serves it. Pure
array code inside compiled programs, the same for prefill and decode.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hobbit_jax.cache.miss_modes import MissMode
from hobbit_jax.experts.precision import SKIPPED, Array, PrecisionPlan
from hobbit_jax.models.router import Routing


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
    table_pE: jax.Array,
    layer: jax.Array,
    routing: Routing,
    valid_T: jax.Array,
) -> Selections:
    """Assigns precisions to `routing`; rows that are not valid ask for nothing."""
    ids_TK, weights_TK = routing
    assigned_TK = plan.assign(layer, ids_TK, weights_TK).astype(jnp.int32)
    requested_TK = jnp.where(valid_T[:, None], assigned_TK, SKIPPED)
    served_TK = mode.serve(requested_TK, weights_TK, table_pE[:, ids_TK] >= 0)
    return Selections(
        ids_TK, weights_TK, requested_TK, jnp.where(requested_TK == SKIPPED, SKIPPED, served_TK)
    )
