"""How important each expert is: the signals, from what calibration saw.

Owns the static scores of (layer, expert) pairs and the measured error of each pair at each
precision. A score says what an error in that expert would cost; the scores of selections are
`precision.importance_score`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.evals.quality import Windows, watch_windows
from hobbit_jax.experts.low_precision import dequantize
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from pallas_kernels.reference import run_expert

STATIC_SCORES = ("frequency", "accumulated_weight", "hybrid", "sensitivity", "random")


@dataclass(frozen=True)
class RoutingProfile:
    """Routing statistics of one model on one text.

    Weights are those the model multiplies with (renormalised where the architecture does so).

    selections_LE: how often each expert was chosen, int64 [L, E].
    weight_LE: sum of its router weights, float64 [L, E].
    weights_TK: the weights of every token in every layer, heaviest first, float32.
    """

    selections_LE: np.ndarray
    weight_LE: np.ndarray
    weights_TK: np.ndarray


def static_scores_LE(
    signal: str,
    profile: RoutingProfile,
    error_LE: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The score of each pair, float64 [L, E], at least 0; only its ratios matter.

    frequency: how often it is chosen, f. accumulated_weight: f·w̄, the sum of its router weights.
    hybrid: f·w̄², since an error's energy in the residual stream goes with the square of the
    weight. sensitivity: `error_LE`, the error itself as measured (the f^α·w^β·ε^γ of MC-MoE,
    arXiv 2410.06270, with α=1, β=γ=2 and nothing estimated). random: the frequencies dealt out
    to other pairs by `seed`, so that the control differs from a signal in nothing but who.

    Raises:
        ValueError: an unknown signal, or sensitivity without `error_LE`.
    """
    frequency_LE = profile.selections_LE.astype(np.float64)
    if signal == "frequency":
        return frequency_LE
    if signal == "accumulated_weight":
        return np.asarray(profile.weight_LE, np.float64)
    if signal == "hybrid":
        return profile.weight_LE**2 / np.maximum(frequency_LE, 1)
    if signal == "sensitivity":
        if error_LE is None:
            raise ValueError("signal sensitivity needs the measured errors")
        return error_LE
    if signal == "random":
        rng = np.random.default_rng(seed)
        dealt = rng.permutation(frequency_LE.reshape(-1)).reshape(frequency_LE.shape)
        return dealt + 1e-3 * rng.random(frequency_LE.shape)  # counts are whole: breaks ties only
    raise ValueError(f"signal is {signal!r}; want one of {', '.join(STATIC_SCORES)}")


@dataclass(frozen=True)
class MeasuredErrors:
    """What each pair's errors come to on a text, by precision.

    error_NLE: Σ w²·‖y − ŷ‖² of a pair at each precision, native (all 0) first, float64.
    energy_LE: Σ w²·‖y‖² of its native output.
    """

    error_NLE: np.ndarray
    energy_LE: np.ndarray


@partial(jax.jit, static_argnames="function")
def _output_energies(h_TD, token_R, weight_R, native, lows, function, epilogue) -> list[jax.Array]:
    x_RD = h_TD[token_R]
    y_RD = run_expert(x_RD, native, function, epilogue)

    def energy(y_RD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(y_RD * weight_R[:, None]))

    low_RDs = (run_expert(x_RD, low, function, epilogue) for low in lows)
    return [energy(y_RD), *(energy(y_RD - low_RD) for low_RD in low_RDs)]


def measure_errors(engine: Engine, store: HostExperts, windows: Windows) -> MeasuredErrors:
    """Runs every selected expert natively and at each precision of `store`, on native inputs.

    y is an expert's output by native weights, ŷ by a precision's, w its router weight.

    Args:
        engine: native; tells which experts meet which inputs.
        store: native and the precisions to measure.
        windows: the text.
    """
    config = store.config
    error_NLE = np.zeros((len(store.precisions), config.n_layers, config.n_experts))
    energy_LE = np.zeros((config.n_layers, config.n_experts))

    def matrices(precision: int, layer: int, expert: int) -> tuple[jax.Array, ...]:
        experts = store.layer(precision, layer)
        tensors = (experts.gate, experts.up, experts.down)
        return tuple(jnp.asarray(dequantize(tensor, expert)) for tensor in tensors)

    def measure(routed: RouterOutput) -> None:
        layer = routed.layer
        for expert, token_R, weight_R in routed.by_expert():
            native, *lows = (
                matrices(precision, layer, expert) for precision in range(len(store.precisions))
            )
            energy, *errors = _output_energies(
                routed.h_TD, token_R, weight_R, native, lows, config.expert_function,
                store.epilogue_of(layer, expert),
            )  # fmt: skip
            energy_LE[layer, expert] += float(energy)
            error_NLE[1:, layer, expert] += [float(error) for error in errors]

    watch_windows(engine, windows, OnRouting(measure), "measuring errors")
    return MeasuredErrors(error_NLE, energy_LE)
