"""How well later layers' experts can be guessed: the figure behind every prefetch.

Owns the measurement on text: the share of the experts that a layer chooses which a predictor named
beforehand, with as many guesses as the router has choices.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from hobbit_jax.cache.controller import Observer
from hobbit_jax.cache.router_output import RouterOutput
from hobbit_jax.evals.quality import Windows, watch_windows
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.layers import LayerKinds, States


@jax.jit(static_argnums=(0, 1))
def _route_ahead(kinds: LayerKinds, kind: int, states: States, index: int, x_TD: jax.Array):
    return kinds.block(states, kind, index).route_ahead(x_TD).ids


def _found(guessed_TK: np.ndarray, chosen_TK: np.ndarray) -> np.ndarray:
    """Of each token's choices, how many were among its guesses; int64 [T]."""
    return (guessed_TK[:, :, None] == chosen_TK[:, None, :]).any(axis=1).sum(axis=1)


class _Chosen(Observer):
    """Every layer's choices over all tokens, and what each distance had guessed of them."""

    def __init__(self, engine: Engine, distances: tuple[int, ...]):
        self._layers, self._distances = engine.model.layers, distances
        self.chosen: dict[int, list[np.ndarray]] = {}
        self.found: dict[int, dict[int, list[np.ndarray]]] = {d: {} for d in distances}
        self._guessed: dict[tuple[int, int], np.ndarray] = {}

    def after_routing(self, routed: RouterOutput) -> None:
        kinds, valid_T = self._layers.kinds, routed.valid_T
        self.chosen.setdefault(routed.layer, []).append(routed.ids_TK[valid_T])
        for distance in self._distances:
            guessed_TK = self._guessed.pop((distance, routed.layer), None)
            if guessed_TK is not None:
                found_T = _found(guessed_TK, routed.ids_TK)[valid_T]
                self.found[distance].setdefault(routed.layer, []).append(found_T)
            if (layer := routed.layer + distance) < len(kinds.kind_L):
                self._guessed[distance, layer] = np.asarray(
                    _route_ahead(
                        kinds, kinds.kind_L[layer], self._layers.states, kinds.index_L[layer],
                        routed.x_TD,
                    )
                )  # fmt: skip


def prediction_accuracy(
    engine: Engine, windows: Windows, profile: Windows, distances: tuple[int, ...] = (1, 2, 3)
) -> dict[str, Any]:
    """Shares (0-1) of the actual top-k that were in the predicted top-k, over tokens and layers.

    `layer_ahead` applies a layer's own norm and router to the stream at the router of `distance`
    layers before, without that layer's experts: what an exit of the decode program has. Beside it,
    over the layers that the distance reaches: chance, the experts that `profile`, other text, used
    most, and those that the same layer used for the token before.

    Returns:
        `tokens`, `layers`, `chance`, and per distance the three shares, `layer_ahead` by layer too.
    """
    frequency = _Chosen(engine, ())
    watch_windows(engine, profile, frequency, "profile")
    watched = _Chosen(engine, distances)
    watch_windows(engine, windows, watched, "prediction")
    config = engine.config
    k, width = config.experts_per_token, windows.ids_WS.shape[1] - 1
    by_layer: dict[str, dict[int, float]] = {"frequency": {}, "previous_token": {}}
    for layer, parts in watched.chosen.items():
        chosen_TK = np.concatenate(parts)
        counts_E = np.bincount(
            np.concatenate(frequency.chosen[layer]).reshape(-1), minlength=config.n_experts
        )
        most_K = np.argsort(-counts_E, kind="stable")[:k]
        most_TK = np.broadcast_to(most_K, chosen_TK.shape)
        by_layer["frequency"][layer] = float(_found(most_TK, chosen_TK).mean()) / k
        sequences = chosen_TK.reshape(-1, width, k)
        before, after = sequences[:, :-1].reshape(-1, k), sequences[:, 1:].reshape(-1, k)
        by_layer["previous_token"][layer] = float(_found(before, after).mean()) / k
    result: dict[str, Any] = {
        "tokens": windows.targets,
        "layers": config.n_layers,
        "experts": config.n_experts,
        "experts_per_token": k,
        "chance": k / config.n_experts,
        "by_distance": {},
    }
    for distance, of_layers in watched.found.items():
        ahead = {n: float(np.concatenate(part).mean()) / k for n, part in of_layers.items()}
        if ahead:
            result["by_distance"][distance] = {
                "layer_ahead": float(np.mean(list(ahead.values()))),
                "layer_ahead_by_layer": ahead,
                **{
                    name: float(np.mean([shares[n] for n in ahead]))
                    for name, shares in by_layer.items()
                },
            }
    return result
