"""How important each expert is: what the router says about it on calibration text.

Owns the routing profile and the static scores made from it. Called by
`allocation.py` and `sweep.py`. Selections are counted over all calibration
tokens; router weights are those the model multiplies with (renormalised where
the architecture does so).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hobbit_jax.atomic import replacing
from hobbit_jax.engine import Engine, RoutedLayer
from hobbit_jax.evals.quality import WINDOWS_PER_BATCH, Windows


@dataclass(frozen=True)
class RoutingProfile:
    """Routing statistics of one model on one text.

    selections_LE: how often each expert was chosen, int64 [L, E].
    weight_LE: sum of its router weights, float64 [L, E].
    selection_weights: every selection's router weight, ascending, float32.
    """

    selections_LE: np.ndarray
    weight_LE: np.ndarray
    selection_weights: np.ndarray

    def save(self, path: Path) -> None:
        """Writes the profile atomically as .npz."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> RoutingProfile:
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


def profile(engine: Engine, windows: Windows) -> RoutingProfile:
    """Runs `windows` through a native engine and counts.

    Raises:
        ValueError: no calibration text.
    """
    if len(windows.ids_WS) == 0:
        raise ValueError("calibration needs at least one window of text")
    shape = (engine.config.n_layers, engine.config.n_experts)
    selections_LE, weight_LE = np.zeros(shape, np.int64), np.zeros(shape)
    all_weights: list[np.ndarray] = []

    def count(routed: RoutedLayer) -> None:
        ids, weights = routed.ids_TK[routed.valid_T], routed.weights_TK[routed.valid_T]
        np.add.at(selections_LE[routed.layer], ids, 1)
        np.add.at(weight_LE[routed.layer], ids, weights)
        all_weights.append(weights.reshape(-1))

    watched, engine.watch = engine.watch, count
    try:
        starts = range(0, len(windows.ids_WS), WINDOWS_PER_BATCH)
        for start in tqdm(starts, desc="calibrating", leave=False):
            engine.score(windows.ids_WS[start : start + WINDOWS_PER_BATCH, :-1])
    finally:
        engine.watch = watched
    return RoutingProfile(selections_LE, weight_LE, np.sort(np.concatenate(all_weights)))
