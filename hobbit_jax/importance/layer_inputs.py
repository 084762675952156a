"""What a layer's experts see of a text, a layer at a time, and the second moments made of it.

Owns the pass over the text: all of it is one chunk of prefill, so that a layer has run on every
token before the next one begins. What a visitor makes of a layer's inputs may therefore be the
weights that this layer and all later ones run by, and none of it has to be kept. Memory holds the
text's residual stream, its keys and values, and what one layer makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.evals.quality import Windows
from hobbit_jax.experts.low_precision import MATRICES, LayerPass, dequantize
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.models.caches import empty_caches
from hobbit_jax.models.loading import LoadedModel
from hobbit_jax.resources import device_bytes, mib, roomy_pool_bytes
from pallas_kernels.reference import Epilogue, ExpertFunction, gated

_ROWS = 4096  # of an expert's inputs at a time, so that memory holds no more hidden rows


class LayerInputs:
    """The inputs of one layer's experts on a text, and their second moments.

    An error in an expert's weights reaches the residual stream times the router's weight w, so
    moments are Σ w²·x·xᵀ over the expert's own selections. x is the layer's normalised input for
    gate and up. For down it is the gated hidden row, by the gate and up that stand in the store
    when it is asked.
    """

    def __init__(self, routed: RouterOutput, store: HostExperts, precision: int):
        assert routed.h_TD is not None
        self.routed, self.layer = routed, routed.layer
        self._store, self._experts = store, store.layer(precision, routed.layer)
        self._h_TD = routed.h_TD
        self._rows = {expert: rows for expert, *rows in routed.by_expert()}
        ids = routed.ids_TK[routed.valid_T].reshape(-1)
        self.selections_E = np.bincount(ids, minlength=store.config.n_experts)
        self._second_moments: dict[str, np.ndarray] = {}

    def second_moments_EK(self, role: str) -> np.ndarray:
        """Σ w²·x² of a role's matrices, float32; K is D, or F for ffn_down_exps."""
        if role not in self._second_moments:
            moments_EK = np.zeros((len(self.selections_E), self._width(role)), np.float32)
            for expert in self._rows:
                for inputs in self._inputs(role, expert):
                    moments_EK[expert] += np.asarray(_second_moment_K(*inputs))
            self._second_moments[role] = moments_EK
        return self._second_moments[role]

    def hessian_KK(self, role: str, expert: int) -> np.ndarray:
        """Σ w²·x·xᵀ of one matrix's inputs, float32; zeros if nothing chose the expert."""
        hessian_KK = np.zeros((self._width(role),) * 2, np.float32)
        for inputs in self._inputs(role, expert):
            hessian_KK += np.asarray(_hessian_KK(*inputs))
        return hessian_KK

    def layer_hessian_DD(self) -> np.ndarray:
        """The sum of gate's `hessian_KK` over the experts, float32."""
        return self._layer_hessian_DD

    @cached_property
    def _layer_hessian_DD(self) -> np.ndarray:
        square_T = np.where(self.routed.valid_T[:, None], self.routed.weights_TK, 0) ** 2
        return np.asarray(_hessian_KK(self._h_TD, jnp.sqrt(square_T.sum(axis=1))))

    def _width(self, role: str) -> int:
        config = self._store.config
        return config.d_expert if role == MATRICES["down"] else config.d_model

    def _inputs(self, role: str, expert: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Inputs of one expert's matrix, [R, K], and the router's weights, [R], a part at a time.

        None of an expert that nothing chose.
        """
        if expert not in self._rows:
            return
        token_R, weight_R = self._rows[expert]
        if hidden := role == MATRICES["down"]:
            # A precision of our own may have filled up rows.
            gate_FD, up_FD = (
                dequantize(tensor, expert)[:, : self._h_TD.shape[1]]
                for tensor in (self._experts.gate, self._experts.up)
            )
            epilogue = self._store.epilogue_of(self.layer, expert)
        for start in range(0, len(token_R), _ROWS):
            part = slice(start, start + _ROWS)
            x_RK = self._h_TD[token_R[part]]
            if hidden:
                x_RK = _hidden_RF(
                    self._store.config.expert_function, x_RK, gate_FD, up_FD, epilogue
                )
            yield x_RK, weight_R[part]


@jax.jit
def _second_moment_K(x_RK: jax.Array, weight_R: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x_RK * weight_R[:, None]), axis=0)


@jax.jit
def _hessian_KK(x_RK: jax.Array, weight_R: jax.Array) -> jax.Array:
    rows = x_RK * weight_R[:, None]
    return rows.T @ rows


@partial(jax.jit, static_argnums=0)
def _hidden_RF(
    function: ExpertFunction,
    x_RD: jax.Array,
    gate_FD: jax.Array,
    up_FD: jax.Array,
    epilogue: Epilogue | None,
) -> jax.Array:
    return gated(function, x_RD @ gate_FD.T, x_RD @ up_FD.T, epilogue)


def visit_layers(
    model: LoadedModel,
    windows: Windows,
    visit: Callable[[LayerInputs], object],
    low: GGUFFile | None = None,
) -> None:
    """Runs `windows` through a model, natively or with the experts of `low`.

    Each layer's experts are read after `visit` has seen their inputs, so `visit` may write them.

    Raises:
        ValueError: no text, or more of it than the memory holds at a time.
    """
    ids_WT = windows.ids_WS[:, :-1]
    if ids_WT.size == 0:
        raise ValueError("calibration needs at least one window of text")
    shapes = jax.eval_shape(partial(empty_caches, model.config, *ids_WT.shape, "float32"))
    kv_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(shapes))
    if kv_bytes > (free := device_bytes()):
        raise ValueError(
            f"keys and values of {ids_WT.size} tokens take {mib(kv_bytes)}, and {mib(free)} are "
            "free; calibrate on fewer tokens"
        )
    store = HostExperts(model.config, model.file, () if low is None else (low,))
    precision = NATIVE if low is None else NATIVE + 1
    cache = CacheConfig(
        roomy_pool_bytes(store.precision_bytes(precision)),
        uniform_plan(store, precision),
        staging_bytes=0,  # an expert that went up ahead of its turn would be an unwritten one
        chunk_tokens=ids_WT.size,
    )
    engine = Engine(model, store, cache)
    layers = tqdm(total=model.config.n_layers, unit="layer", disable=None, leave=False)

    def see(routed: RouterOutput) -> None:
        visit(LayerInputs(routed, store, precision))
        layers.update()

    with layers, engine.observed_by(OnRouting(see)):
        engine.start(*ids_WT.shape)
        engine.prefill(ids_WT.tolist())


def run_by(model: LoadedModel, windows: Windows) -> LayerPass:
    """The pass over a calibration's text that an encoder runs; see `experts.low_precision`."""
    return lambda low, visit: visit_layers(model, windows, visit, low)
