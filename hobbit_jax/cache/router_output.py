"""What a layer's router chose, as observers of an engine are told it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class RouterOutput:
    """What one layer's router chose in one step, for observers (importance, traces)."""

    layer: int
    ids_TK: np.ndarray  # int32
    weights_TK: np.ndarray  # float32
    valid_T: np.ndarray  # bool; False is padding
    # In prefill and scoring only, float32; the second during the call alone, for it is donated.
    h_TD: jax.Array | None = None  # the experts' input
    x_TD: jax.Array | None = None  # the stream that the router read, before its normalisation

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
