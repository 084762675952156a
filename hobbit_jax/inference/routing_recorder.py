"""Records which experts one sequence chooses, in the format that replays read.

This module owns the recorder, an observer of the engine, and the writing of its file; the format
and its checks are `cache/trace.py`'s.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hobbit_jax.atomic import replacing
from hobbit_jax.cache.controller import Observer
from hobbit_jax.cache.router_output import RouterOutput


class RoutingRecorder(Observer):
    """Keeps the routing of every token of one sequence, prompt and generated text alike."""

    def __init__(self, n_layers: int):
        self._ids: list[list[np.ndarray]] = [[] for _ in range(n_layers)]
        self._weights: list[list[np.ndarray]] = [[] for _ in range(n_layers)]

    def after_routing(self, routed: RouterOutput) -> None:
        """Keeps one layer's choices for the tokens of one step."""
        self._ids[routed.layer].append(routed.ids_TK[routed.valid_T])
        self._weights[routed.layer].append(routed.weights_TK[routed.valid_T])

    def write(self, path: Path) -> int:
        """Writes the trace as an .npz file; returns how many tokens it has.

        Raises:
            ValueError: nothing was routed yet, or a layer is behind the others.
        """
        counts = {sum(map(len, steps)) for steps in self._ids}
        if counts == {0} or len(counts) != 1:
            raise ValueError(
                f"layers routed {sorted(counts)} tokens; want as many in each, above 0"
            )
        (n_tokens,) = counts
        ids_TLK = np.stack([np.concatenate(steps) for steps in self._ids], axis=1)
        weights_TLK = np.stack([np.concatenate(steps) for steps in self._weights], axis=1)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                expert_ids=ids_TLK.astype(np.int32),
                weights=weights_TLK.astype(np.float32),
                seq_lens=np.asarray([n_tokens]),
            )
        return n_tokens
