"""What the host learns from one entry into the decode program, in one transfer of integers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.cache.selection import Selections
from hobbit_jax.experts.precision import SKIPPED
from hobbit_jax.experts.store import ExpertKey

LOG_FIELDS = len(Selections._fields)  # of an entry of the log; the weights as bits


def log_entry(selections: Selections) -> jax.Array:
    """One routed layer's line of the log, int32 [A, LOG_FIELDS]."""
    bits_TK = jax.lax.bitcast_convert_type(selections.weights_TK, jnp.int32)
    fields = selections._replace(weights_TK=bits_TK)
    return jnp.stack([field.reshape(-1) for field in fields], axis=-1)


def pack(
    numbers: Sequence[jax.Array], tokens_NB: jax.Array, ahead_P2A: jax.Array, log_IAf: jax.Array
) -> jax.Array:
    """All of a report in one array, int32; `numbers` are its first four and the layers logged."""
    head_5 = jnp.stack([number.astype(jnp.int32) for number in numbers])
    return jnp.concatenate([head_5, *(a.reshape(-1) for a in (tokens_NB, ahead_P2A, log_IAf))])


class Report(NamedTuple):
    """How far an entry came and what it used; P is the number of layers looked ahead."""

    steps: int
    layer: int
    blocked: bool
    finite: bool  # all logits of sequences that got a token
    tokens_NB: np.ndarray  # the first `steps` rows are drawn
    # Expert and precision that layer + 1, ... would choose of the stream as it is.
    ahead_P2A: np.ndarray
    chosen: Selections  # [I, B, K], of each routed layer in turn

    @classmethod
    def unpack(
        cls, packed: np.ndarray, most_tokens: int, batch: int, k: int, look_ahead: int
    ) -> Self:
        """Reads what the program packed."""
        steps, layer, blocked, finite, logged = packed[:5].tolist()
        tokens_end = 5 + most_tokens * batch
        ahead_end = tokens_end + look_ahead * 2 * batch * k
        log_IBKf = packed[ahead_end:].reshape(-1, batch, k, LOG_FIELDS)[:logged]
        weights_IBK = log_IBKf.view(np.float32)[..., Selections._fields.index("weights_TK")]
        chosen = Selections(*(log_IBKf[..., field] for field in range(LOG_FIELDS)))
        return cls(
            steps,
            layer,
            bool(blocked),
            bool(finite),
            packed[5:tokens_end].reshape(most_tokens, batch)[:steps],
            packed[tokens_end:ahead_end].reshape(look_ahead, 2, batch * k),
            chosen._replace(weights_TK=weights_IBK),
        )

    def logged(self, n_layers: int) -> Iterator[tuple[int, int, Selections]]:
        """Token of the entry, layer, and what it chose, [B, K], up to where the program stands."""
        end = self.steps * n_layers + self.layer + self.blocked
        for index, entry in enumerate(range(end - len(self.chosen.ids_TK), end)):
            yield *divmod(entry, n_layers), Selections(*(array[index] for array in self.chosen))

    def ahead(self) -> list[ExpertKey]:
        """The experts that the layers to come would choose, the nearest layer's first."""
        keys = [
            ExpertKey(precision, self.layer + 1 + distance, expert)
            for distance, (ids_A, precision_A) in enumerate(self.ahead_P2A.tolist())
            for expert, precision in zip(ids_A, precision_A, strict=True)
            if precision != SKIPPED
        ]
        return list(dict.fromkeys(keys))
