"""What the host learns from one entry into the decode program, in one transfer.

Owns the layout: integers in one array, packed inside the program (`decode_loop.py`) and read by the
engine: how far it came, the tokens drawn, what the routers of the layers to come would choose, and
every routed layer's selections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.cache.controller import uses_of
from hobbit_jax.cache.miss_modes import Use
from hobbit_jax.cache.router_output import RouterOutput
from hobbit_jax.cache.selection import Selections
from hobbit_jax.experts.precision import SKIPPED
from hobbit_jax.experts.store import ExpertKey

# Of an entry of the log: expert, precision asked for, precision that serves it, bits of the
# router's weight.
LOG_FIELDS = 4


def log_entry(selections: Selections) -> jax.Array:
    """One routed layer's line of the log, int32 [A, LOG_FIELDS]."""
    fields = [
        selections.ids_TK,
        selections.requested_TK,
        selections.served_TK,
        jax.lax.bitcast_convert_type(selections.weights_TK, jnp.int32),
    ]
    return jnp.stack([field.reshape(-1) for field in fields], axis=-1)


def pack(
    steps: jax.Array,
    layer: jax.Array,
    blocked: jax.Array,
    finite: jax.Array,
    logged: jax.Array,
    tokens_NB: jax.Array,
    ahead_P2A: jax.Array,
    log_IAf: jax.Array,
) -> jax.Array:
    """All of a report in one array, int32; see `Report`."""
    head_5 = jnp.stack([a.astype(jnp.int32) for a in (steps, layer, blocked, finite, logged)])
    parts = [head_5, tokens_NB.reshape(-1), ahead_P2A.reshape(-1), log_IAf.reshape(-1)]
    return jnp.concatenate(parts)


@dataclass(frozen=True)
class LoggedLayer:
    """What one layer of one token of an entry chose."""

    token: int  # of the entry
    layer: int
    ids_A: np.ndarray
    requested_A: np.ndarray
    served_A: np.ndarray
    weights_A: np.ndarray

    def routed(self, k: int) -> RouterOutput:
        """For observers: `k` experts of each sequence, valid where it got a token."""
        shape = (-1, k)
        valid_T = (self.requested_A.reshape(shape) != SKIPPED).any(axis=1)
        return RouterOutput(
            self.layer, self.ids_A.reshape(shape), self.weights_A.reshape(shape), valid_T
        )

    def uses(self) -> tuple[list[Use], list[Use]]:
        """For the controller: see `uses_of`."""
        return uses_of(self.layer, self.ids_A, self.weights_A, self.requested_A, self.served_A)


@dataclass(frozen=True)
class Report:
    """How far an entry came and what it used; P is the number of layers looked ahead."""

    steps: int
    layer: int
    blocked: bool
    finite: bool  # all logits of sequences that got a token
    tokens_NB: np.ndarray  # the first `steps` rows are drawn
    ahead_P2A: (
        np.ndarray
    )  # expert and precision that layer + 1, ... would choose of the stream as it is
    ids_IA: np.ndarray  # of each routed layer, in turn
    requested_IA: np.ndarray
    served_IA: np.ndarray
    weights_IA: np.ndarray

    @classmethod
    def unpack(
        cls, packed: np.ndarray, most_tokens: int, batch: int, k: int, look_ahead: int
    ) -> Report:
        """Reads what the program packed."""
        steps, layer, blocked, finite, logged = (int(number) for number in packed[:5])
        ends = np.cumsum([5, most_tokens * batch, look_ahead * 2 * batch * k])
        tokens, ahead, log = np.split(packed, ends)[1:]
        log_IAf = log.reshape(-1, batch * k, LOG_FIELDS)[:logged]
        return cls(
            steps=steps,
            layer=layer,
            blocked=bool(blocked),
            finite=bool(finite),
            tokens_NB=tokens.reshape(most_tokens, batch)[:steps],
            ahead_P2A=ahead.reshape(look_ahead, 2, batch * k),
            ids_IA=log_IAf[..., 0],
            requested_IA=log_IAf[..., 1],
            served_IA=log_IAf[..., 2],
            weights_IA=np.ascontiguousarray(log_IAf[..., 3]).view(np.float32),
        )

    def logged(self, n_layers: int) -> Iterator[LoggedLayer]:
        """What the entry's layers chose, in their order, up to the one where the program stands."""
        end = self.steps * n_layers + self.layer + self.blocked
        for number, entry in enumerate(range(end - len(self.ids_IA), end)):
            yield LoggedLayer(
                *divmod(entry, n_layers),
                self.ids_IA[number],
                self.requested_IA[number],
                self.served_IA[number],
                self.weights_IA[number],
            )

    def ahead(self) -> list[ExpertKey]:
        """The experts that the layers to come would choose, the nearest layer's first."""
        keys = [
            ExpertKey(precision, self.layer + 1 + distance, expert)
            for distance, (ids_A, precision_A) in enumerate(self.ahead_P2A.tolist())
            for expert, precision in zip(ids_A, precision_A, strict=True)
            if precision != SKIPPED
        ]
        return list(dict.fromkeys(keys))
