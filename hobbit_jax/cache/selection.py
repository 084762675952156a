"""From a router's choice to the copies that serve it: one layer's selections.

`select` is array code that runs in compiled programs on JAX's arrays, and on NumPy's in replays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.cache.miss_modes import MissMode
from hobbit_jax.experts.precision import SKIPPED, Array, PrecisionPlan


@dataclass(frozen=True)
class RouterOutput:
    """What one layer's router chose in one step, for observers (importance, traces)."""

    layer: int
    ids_TK: np.ndarray  # int32
    weights_TK: np.ndarray  # float32
    valid_T: np.ndarray  # bool; False is padding
    # In prefill and scoring only, float32; the second during the call alone, for it is donated.
    h_TD: jax.Array | None = None  # the experts' input
    x_TD: jax.Array | None = None  # the stream with all that the block adds but its experts

    def by_expert(self) -> Iterator[tuple[int, jax.Array, jax.Array]]:
        """Each chosen expert with the tokens that chose it, int32 [R], and its weights, [R].

        Padded to a power of two with weights of 0, so that few programs are compiled.
        """
        valid_TK = np.broadcast_to(self.valid_T[:, None], self.ids_TK.shape)
        for expert in np.unique(self.ids_TK[valid_TK]).tolist():
            token_R, choice_R = np.nonzero((self.ids_TK == expert) & valid_TK)
            weight_R = self.weights_TK[token_R, choice_R]
            padding = (0, (1 << (len(token_R) - 1).bit_length()) - len(token_R))
            yield (
                expert,
                jnp.asarray(np.pad(token_R, padding), jnp.int32),
                jnp.asarray(np.pad(weight_R, padding)),
            )


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
    """Assigns precisions to a router's choice: experts and weights, [T, K] each, heaviest first.

    The plan says what is requested, and the mode what serves it, by what is resident. Rows that are
    not valid are padding and ask for nothing.
    """
    ids_TK, weights_TK = routing
    xp = weights_TK.__array_namespace__()
    assigned_TK = plan.assign(layer, ids_TK, weights_TK).astype(xp.int32)
    requested_TK = xp.where(valid_T[:, None], assigned_TK, xp.int32(SKIPPED))
    served_TK = mode.serve(requested_TK, weights_TK, resident_pE[:, ids_TK])
    served_TK = xp.where(requested_TK == SKIPPED, xp.int32(SKIPPED), served_TK)
    return Selections(ids_TK, weights_TK, requested_TK, served_TK)
