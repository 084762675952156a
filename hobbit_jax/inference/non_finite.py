"""Where logits that are not finite come from: the same tokens once more, after they were seen."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.inference.prefill import Part, Prefill, chunks
from hobbit_jax.models.caches import Caches


@jax.jit
def finite_BT(x_BTD: jax.Array) -> jax.Array:
    """Whether all numbers of each token are finite."""
    return jnp.all(jnp.isfinite(x_BTD), axis=-1)


def describe(
    prefill: Prefill, caches: Caches, ids: Sequence[Sequence[int]], chunk_tokens: int
) -> str:
    """One line that names the part of the model where NaN or infinity began.

    The token is not named: attention multiplies what is masked by 0, and so hands NaN to all tokens
    of a chunk.

    Args:
        prefill: runs the layers.
        caches: zeros, with room for the tokens; donated.
        ids: each sequence's tokens.
        chunk_tokens: of all sequences together, that are run at a time.
    """
    places: list[str] = []  # that have any, in the order in which the model runs
    for part_BT, n_new_B, done_B in chunks(ids, chunk_tokens):
        valid_BT = np.arange(part_BT.shape[1]) < n_new_B[:, None]

        def look(part: Part, layer: int, x_BTD: jax.Array, valid_BT=valid_BT) -> None:
            if not np.asarray(finite_BT(x_BTD))[valid_BT].all():
                embeds = part == "embedding"
                places.append("the token embedding" if embeds else f"the {part} of layer {layer}")

        _, caches = prefill.append(caches, part_BT, done_B, n_new_B, 0, look)
        if places:
            break
    place = places[0] if places else "the output norm or the output matrix"
    return (
        f"the logits are not finite: NaN or infinity begins in {place}; the weights there are "
        "damaged, or their products overflow: compare the file with its publisher's checksum"
    )
