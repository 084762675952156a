"""How important each expert is, from what calibration saw.

Owns the static scores of (layer, expert) pairs and the measured error of each pair at each
precision. The scores of selections are `precision.importance_score`.
"""

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
    """

    selections_LE: np.ndarray  # how often each expert was chosen, int64
    weight_LE: np.ndarray  # sum of its router weights, float64
    weights_TK: np.ndarray  # of every token in every layer, heaviest first, float32


def static_scores_LE(
    score: str, profile: RoutingProfile, error_LE: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """The score of each pair, float64 [L, E], at least 0; only its ratios matter.

    frequency: how often it is chosen, f. accumulated_weight: f·w̄, the sum of its router weights.
    hybrid: f·w̄², since an error's energy in the residual stream goes with the square of the
    weight. sensitivity: `error_LE`, the error itself as measured (the f^α·w^β·ε^γ of MC-MoE,
    arXiv 2410.06270, with α=1, β=γ=2 and nothing estimated). random: the frequencies dealt out
    to other pairs by `seed`, so that the control differs from a score in nothing but who.

    Raises:
        ValueError: an unknown score, or sensitivity without `error_LE`.
    """
    frequency_LE = profile.selections_LE.astype(np.float64)
    if score == "frequency":
        return frequency_LE
    if score == "accumulated_weight":
        return np.asarray(profile.weight_LE, np.float64)
    if score == "hybrid":
        return profile.weight_LE**2 / np.maximum(frequency_LE, 1)
    if score == "sensitivity":
        if error_LE is None:
            raise ValueError("score sensitivity needs the measured errors")
        return error_LE
    if score == "random":
        rng = np.random.default_rng(seed)
        dealt = rng.permutation(frequency_LE.reshape(-1)).reshape(frequency_LE.shape)
        return dealt + 1e-3 * rng.random(frequency_LE.shape)  # counts are whole: breaks ties only
    raise ValueError(f"importance score is {score!r}; want one of {', '.join(STATIC_SCORES)}")


@partial(jax.jit, static_argnames="function")
def _output_errors(h_TD, token_R, weight_R, native, lows, function, epilogue) -> list[jax.Array]:
    x_RD = h_TD[token_R]
    y_RD = run_expert(x_RD, native, function, epilogue)
    low_RDs = (run_expert(x_RD, low, function, epilogue) for low in lows)
    return [jnp.sum(jnp.square((y_RD - low_RD) * weight_R[:, None])) for low_RD in low_RDs]


def measure_errors(engine: Engine, store: HostExperts, windows: Windows) -> np.ndarray:
    """Runs every selected expert natively and at each precision of `store`, on native inputs.

    Args:
        engine: native; tells which experts meet which inputs.
        store: native and the precisions to measure.
        windows: the text.

    Returns:
        Σ w²·‖y − ŷ‖² of each pair at each precision, native (all 0) first, float64 [precisions, L,
        E]. y is an expert's output by native weights, ŷ by a precision's, w its router weight.
    """
    error_NLE = np.zeros((len(store.precisions), store.config.n_layers, store.config.n_experts))

    def measure(routed: RouterOutput) -> None:
        layer = routed.layer
        stored = [precision[layer] for precision in store.precisions]
        for expert, token_R, weight_R in routed.by_expert():
            native, *lows = (
                [dequantize(tensor, expert) for tensor in (at.gate, at.up, at.down)]
                for at in stored
            )
            epilogue = store.epilogue_of(layer, expert)
            errors = _output_errors(
                routed.h_TD, token_R, weight_R, native, lows, store.config.expert_function, epilogue
            )
            error_NLE[1:, layer, expert] += jax.device_get(errors)

    watch_windows(engine, windows, OnRouting(measure), "measuring errors")
    return error_NLE
