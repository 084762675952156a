"""What a layer's experts see of a text, a layer at a time, and the second moments made of it.

Owns the pass over the text: all of it is one chunk of prefill, so that a layer has run on every
token before the next one begins. What a visitor makes of a layer's inputs may therefore be the
weights that this layer and all later ones run by. Where a file's experts are encoded so, the native
model runs on the same text beside them, for its outputs are what theirs should be. Memory holds the
text's residual stream, its keys and values, and what one layer makes of it, for each of the two.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

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
_LOW = NATIVE + 1  # the precision of the experts that are encoded
_See = Callable[[RouterOutput], object]


class _Experts(NamedTuple):
    """What the experts of a layer read, and at which precision they are."""

    h_TD: jax.Array
    precision: int


class LayerInputs:
    """The inputs of one layer's experts on a text, and their second moments.

    An error in an expert's weights reaches the residual stream times the router's weight w, so
    moments are Σ w²·x·xᵀ over the expert's own selections. x is the layer's normalised input for
    gate and up. For down it is the gated hidden row, by the gate and up that stand in the store
    when it is asked.

    `native` is what the native model has in the same place on the same text, where the experts are
    those of a low precision.
    """

    def __init__(self, routed: RouterOutput, store: HostExperts, native: RouterOutput | None):
        assert routed.h_TD is not None
        self.routed, self.layer, self._store = routed, routed.layer, store
        self._own, self._native = _Experts(routed.h_TD, NATIVE), None
        if native is not None:
            assert not (native.h_TD is None or native.x_TD is None or routed.x_TD is None)
            self._own, self._native = _Experts(routed.h_TD, _LOW), _Experts(native.h_TD, NATIVE)
            self._lag_TD = native.x_TD - routed.x_TD
        self._rows = {expert: rows for expert, *rows in routed.by_expert()}
        ids = routed.ids_TK[routed.valid_T].reshape(-1)
        self.selections_E = np.bincount(ids, minlength=store.config.n_experts)
        self._second_moments: dict[str, np.ndarray] = {}

    def second_moments_EK(self, role: str) -> np.ndarray:
        """Σ w²·x² of a role's matrices, float32; K is D, or F for ffn_down_exps."""
        if role not in self._second_moments:
            moments_EK = np.zeros((len(self.selections_E), self._width(role)), np.float32)
            for expert in self._rows:
                for x_RK, _, weight_R in self._inputs(role, expert):
                    moments_EK[expert] += np.asarray(_second_moment_K(x_RK, weight_R))
            self._second_moments[role] = moments_EK
        return self._second_moments[role]

    def hessian_KK(self, role: str, expert: int) -> np.ndarray:
        """Σ w²·x·xᵀ of one matrix's inputs, float32; zeros if nothing chose the expert."""
        hessian_KK = np.zeros((self._width(role),) * 2, np.float32)
        for x_RK, _, weight_R in self._inputs(role, expert):
            hessian_KK += np.asarray(_hessian_KK(x_RK, weight_R))
        return hessian_KK

    def layer_hessian_DD(self) -> np.ndarray:
        """The sum of gate's `hessian_KK` over the experts, float32."""
        return self._layer_hessian_DD

    @cached_property
    def _layer_hessian_DD(self) -> np.ndarray:
        return np.asarray(_hessian_KK(self._own.h_TD, jnp.sqrt(self._square_T)))

    def drift_NK(self, role: str, expert: int, weights_NK: np.ndarray) -> np.ndarray | None:
        """Σ w²·(y − W·x)·xᵀ of one matrix of native weights W, float32; None by native weights.

        y is what W makes of the native model's input on the same token. Down's y has the difference
        between the two models' residual streams added, which one expert of a token takes over by
        its share of Σ w².
        """
        if self._native is None:
            return None
        w_NK, drift_NK = jnp.asarray(weights_NK), np.zeros(weights_NK.shape, np.float32)
        own, natively = self._inputs(role, expert), self._inputs(role, expert, self._native)
        for (x_RK, token_R, weight_R), (native_RK, *_) in zip(own, natively, strict=True):
            if role == MATRICES["down"]:
                share_R1 = self._share_of_lag_R1(expert, token_R, weight_R)
                miss_RN = (native_RK - x_RK) @ w_NK.T + share_R1 * self._lag_TD[token_R]
                drift_NK += np.asarray(_cross(miss_RN, x_RK, weight_R))
            else:
                drift_NK += np.asarray(w_NK @ _cross(native_RK - x_RK, x_RK, weight_R))
        return drift_NK

    def _share_of_lag_R1(self, expert: int, token_R: jax.Array, weight_R: jax.Array) -> jax.Array:
        """How much of what the residual streams differ by is to be added to outputs of down."""
        if any(block.d_beside for block in self._store.config.blocks):
            return jnp.zeros((len(token_R), 1))  # the experts' sum is normalised, not added
        epilogue = self._store.epilogue_of(self.layer, expert)
        scale = 1.0 if epilogue is None else float(epilogue.scale_3[2])
        square_R = self._square_T[token_R]
        share_R = weight_R / jnp.where(square_R == 0, 1, square_R)
        return share_R[:, None] / (scale or 1.0)

    @cached_property
    def _square_T(self) -> jax.Array:
        """Σ w² of each token's experts; 0 of padding."""
        square_TK = np.where(self.routed.valid_T[:, None], self.routed.weights_TK, 0) ** 2
        return jnp.asarray(square_TK.sum(axis=1))

    def _width(self, role: str) -> int:
        config = self._store.config
        return config.d_expert if role == MATRICES["down"] else config.d_model

    def _inputs(
        self, role: str, expert: int, experts: _Experts | None = None
    ) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """Inputs of one expert's matrix, [R, K], their tokens and the router's weights, [R].

        A part at a time, and none of an expert that nothing chose. `experts` are the native ones
        for what these would read for the same tokens, whomever their own router chose.
        """
        if expert not in self._rows:
            return
        h_TD, precision = experts or self._own
        token_R, weight_R = self._rows[expert]
        if hidden := role == MATRICES["down"]:
            stored = self._store.layer(precision, self.layer)
            # A precision of our own may have filled up rows.
            gate_FD, up_FD = (
                dequantize(matrix, expert)[:, : h_TD.shape[1]]
                for matrix in (stored.gate, stored.up)
            )
            function = self._store.config.expert_function
            epilogue = self._store.epilogue_of(self.layer, expert)
        for start in range(0, len(token_R), _ROWS):
            part = slice(start, start + _ROWS)
            x_RK = h_TD[token_R[part]]
            if hidden:
                x_RK = _hidden_RF(function, x_RK, gate_FD, up_FD, epilogue)
            yield x_RK, token_R[part], weight_R[part]


@jax.jit
def _second_moment_K(x_RK: jax.Array, weight_R: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x_RK * weight_R[:, None]), axis=0)


@jax.jit
def _cross(left_RN: jax.Array, right_RK: jax.Array, weight_R: jax.Array) -> jax.Array:
    return (left_RN * jnp.square(weight_R)[:, None]).T @ right_RK


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


@contextmanager
def _layers_ahead(run: Callable[[_See], None]) -> Iterator[Iterator[RouterOutput]]:
    """What `run` tells of each layer, while it goes on in a thread, up to two layers ahead."""
    told: queue.Queue[RouterOutput] = queue.Queue(1)
    ended = threading.Event()

    def hand_over(routed: RouterOutput) -> None:
        # A copy of the stream, which is donated to the rest of the layer.
        kept = replace(routed, x_TD=jnp.array(routed.x_TD))
        while not ended.is_set():
            with suppress(queue.Full):
                return told.put(kept, timeout=0.1)
        raise CancelledError

    def layers(running: Future[None]) -> Iterator[RouterOutput]:
        while not (running.done() and told.empty()):
            with suppress(queue.Empty):
                yield told.get(timeout=0.1)
        running.result()

    with ThreadPoolExecutor(1) as thread:
        try:
            yield layers(thread.submit(run, hand_over))
        finally:
            ended.set()


def _run(
    model: LoadedModel, ids_WT: np.ndarray, store: HostExperts, precision: int, see: _See
) -> None:
    """Runs all windows as one chunk with the experts of one precision."""
    cache = CacheConfig(
        roomy_pool_bytes(store.precision_bytes(precision)),
        uniform_plan(store, precision),
        staging_bytes=0,  # an expert that went up ahead of its turn would be an unwritten one
        chunk_tokens=ids_WT.size,
    )
    engine = Engine(model, store, cache, observers=[OnRouting(see)])
    engine.start(*ids_WT.shape)
    engine.prefill(ids_WT.tolist())


def visit_layers(
    model: LoadedModel,
    windows: Windows,
    visit: Callable[[LayerInputs], object],
    low: GGUFFile | None = None,
) -> None:
    """Runs `windows` through a model, natively or with the experts of `low` and natively beside.

    Each layer's experts are read after `visit` has seen their inputs, so `visit` may write them.

    Raises:
        ValueError: no text, or more of it than the memory holds at a time.
    """
    ids_WT = windows.ids_WS[:, :-1]
    if ids_WT.size == 0:
        raise ValueError("calibration needs at least one window of text")
    shapes = jax.eval_shape(partial(empty_caches, model.config, *ids_WT.shape, "float32"))
    kv_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(shapes))
    kv_bytes *= 1 if low is None else 2
    if kv_bytes > (free := device_bytes()):
        raise ValueError(
            f"keys and values of {ids_WT.size} tokens take {mib(kv_bytes)}, and {mib(free)} are "
            "free; calibrate on fewer tokens"
        )
    store = HostExperts(model.config, model.file, () if low is None else (low,))
    with tqdm(total=model.config.n_layers, unit="layer", disable=None, leave=False) as layers:

        def see(routed: RouterOutput, native: RouterOutput | None = None) -> None:
            visit(LayerInputs(routed, store, native))
            layers.update()

        if low is None:
            _run(model, ids_WT, store, NATIVE, see)
            return
        with _layers_ahead(partial(_run, model, ids_WT, store, NATIVE)) as natively:
            _run(model, ids_WT, store, _LOW, lambda routed: see(routed, next(natively)))


def run_by(model: LoadedModel, windows: Windows) -> LayerPass:
    """The pass over a calibration's text that an encoder runs; see `experts.low_precision`."""
    return lambda low, visit: visit_layers(model, windows, visit, low)
