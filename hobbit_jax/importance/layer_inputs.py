"""What every layer's experts saw of a text, on disk, and the second moments made of it.

Owns the recording and the sums. All Hessians of OLMoE-1B-7B take 20 GB and of Qwen3-30B-A3B 118 GB;
their inputs take 3 and 10 GB for 24,576 tokens, and a Hessian is made when its expert is encoded.
So memory holds one layer's inputs and one expert's Hessian, whatever the size of the model.

A batch of windows is two files, `00000.inputs.npy` (float32 [L, T, D]) and `00000.routing.npz`
(int32 and float32 [L, T, K]); the second is written last, and makes the batch count as recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hobbit_jax.atomic import replacing
from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.evals.quality import Windows, batches
from hobbit_jax.experts.low_precision import dequantize
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.inference.engine import Engine
from pallas_kernels.reference import Epilogue, ExpertFunction, gated

_INPUTS, _ROUTING = ".inputs.npy", ".routing.npz"


def record(engine: Engine, windows: Windows, folder: Path) -> None:
    """Scores `windows` by a native engine and writes what experts see; skips finished batches."""
    folder.mkdir(parents=True, exist_ok=True)
    n_layers = engine.config.n_layers
    parts = batches(windows, engine.config.vocab_size)
    for index, part in enumerate(tqdm(parts, desc="calibrating", disable=None, leave=False)):
        inputs_path, routing_path = _batch_paths(folder, index)
        if routing_path.exists():
            continue
        seen: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in range(n_layers)]

        def keep(routed: RouterOutput, seen=seen) -> None:
            valid_T, h_TD = routed.valid_T, np.asarray(routed.h_TD)
            seen[routed.layer].append(
                (h_TD[valid_T], routed.ids_TK[valid_T], routed.weights_TK[valid_T])
            )

        with engine.observed_by(OnRouting(keep)):
            engine.score(windows.ids_WS[part, :-1])
        h_LTD, ids_LTK, weights_LTK = (
            np.stack([np.concatenate([step[field] for step in layer]) for layer in seen])
            for field in range(3)
        )
        with replacing(inputs_path) as partial, partial.open("wb") as file:
            np.save(file, h_LTD)
        with replacing(routing_path) as partial, partial.open("wb") as file:
            np.savez(file, ids_LTK=ids_LTK, weights_LTK=weights_LTK)


def _batch_paths(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / f"{index:05}{_INPUTS}", folder / f"{index:05}{_ROUTING}"


class LayerInputs:
    """The recorded inputs of a model's experts on `tokens` tokens, and moments made of them."""

    def __init__(self, folder: Path, native: HostExperts, tokens: int):
        self.folder, self._native, self._tokens = folder, native, tokens
        self._layer = functools.lru_cache(maxsize=1)(self._read_layer)
        self._layer_hessian = functools.lru_cache(maxsize=1)(self._sum_layer)

    def routed(self) -> Iterator[RouterOutput]:
        """Every layer's choices of every batch, without the inputs, in the order of recording."""
        for path in sorted(self.folder.glob(f"*{_ROUTING}")):
            with np.load(path) as batch:
                choices = list(zip(batch["ids_LTK"], batch["weights_LTK"], strict=True))
            for layer, (ids_TK, weights_TK) in enumerate(choices):
                yield RouterOutput(layer, ids_TK, weights_TK, np.ones(len(ids_TK), bool))

    def second_moments(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Σ w²·x² of one layer's experts, float32: of inputs [E, D] and of hidden rows [E, F]."""
        path = self.folder / f"layer-{layer:03}.npz"
        if not path.exists():
            experts = range(self._native.config.n_experts)
            pairs = [jax.device_get(_second_moments(*self._rows(layer, e))) for e in experts]
            input_ED, hidden_EF = (np.stack(rows) for rows in zip(*pairs, strict=True))
            with replacing(path) as partial, partial.open("wb") as file:
                np.savez(file, input_ED=input_ED, hidden_EF=hidden_EF)
        with np.load(path) as moments:
            return moments["input_ED"], moments["hidden_EF"]

    def hessian_KK(self, role: str, layer: int, expert: int) -> np.ndarray:
        """Σ w²·x·xᵀ of the inputs of one expert's matrix, float32 [K, K]."""
        if role == "ffn_down_exps":
            return np.asarray(_hidden_hessian_FF(*self._rows(layer, expert)))
        x_TD, token_R, weight_R = self._selected(layer, expert)
        return np.asarray(_hessian_DD(x_TD[token_R], weight_R))

    def layer_hessian_DD(self, layer: int) -> np.ndarray:
        """The sum of `hessian_KK` over the experts of a layer, for gate and up, float32 [D, D]."""
        return self._layer_hessian(layer)

    def _sum_layer(self, layer: int) -> np.ndarray:
        h_TD, _, weights_TK = self._layer(layer)
        weight_T = np.sqrt(np.square(weights_TK).sum(axis=1))
        return np.asarray(_hessian_DD(h_TD, jnp.asarray(weight_T)))

    def _read_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs [T, D], ids [T, K], weights [T, K]) of one layer on the whole text.

        Raises:
            ValueError: some of it is gone or cut short.
        """
        batches_T = []
        for routing_path in sorted(self.folder.glob(f"*{_ROUTING}")):
            inputs_path = self.folder / routing_path.name.replace(_ROUTING, _INPUTS)
            with np.load(routing_path) as routing:
                choices = routing["ids_LTK"][layer], routing["weights_LTK"][layer]
            batches_T.append((np.load(inputs_path, mmap_mode="r")[layer], *choices))
        if sum(len(batch[0]) for batch in batches_T) != self._tokens:
            raise ValueError(
                f"{self.folder} does not hold the {self._tokens} tokens that it was made from; "
                "make the calibration again with scripts/calibrate.py"
            )
        h_TD, ids_TK, weights_TK = map(np.concatenate, zip(*batches_T, strict=True))
        return h_TD, ids_TK, weights_TK

    def _selected(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray, jax.Array]:
        """The layer's inputs [T, D], which of them `expert` got, int [R], and with which weight.

        R is padded to a power of two with weights of 0, so that few programs are compiled.
        """
        h_TD, ids_TK, weights_TK = self._layer(layer)
        token_R, choice_R = np.nonzero(ids_TK == expert)
        weight_R = weights_TK[token_R, choice_R]
        padding = (0, (1 << max(len(token_R) - 1, 0).bit_length()) - len(token_R))
        return h_TD, np.pad(token_R, padding), jnp.asarray(np.pad(weight_R, padding))

    def _rows(self, layer: int, expert: int) -> tuple:
        """One expert's function, inputs [R, D], their weights [R], gate and up [F, D], epilogue."""
        h_TD, token_R, weight_R = self._selected(layer, expert)
        experts = self._native.layer(NATIVE, layer)
        gate_FD, up_FD = (dequantize(tensor, expert) for tensor in (experts.gate, experts.up))
        function = self._native.config.expert_function
        epilogue = self._native.epilogue_of(layer, expert)
        return function, h_TD[token_R], weight_R, gate_FD, up_FD, epilogue


@jax.jit
def _hessian_DD(x_RD: jax.Array, weight_R: jax.Array) -> jax.Array:
    rows = x_RD * weight_R[:, None]
    return rows.T @ rows


@functools.partial(jax.jit, static_argnums=0)
def _hidden_hessian_FF(
    function: ExpertFunction,
    x_RD: jax.Array,
    weight_R: jax.Array,
    gate_FD: jax.Array,
    up_FD: jax.Array,
    epilogue: Epilogue | None,
) -> jax.Array:
    hidden_RF = gated(function, x_RD @ gate_FD.T, x_RD @ up_FD.T, epilogue)
    return _hessian_DD(hidden_RF, weight_R)


@functools.partial(jax.jit, static_argnums=0)
def _second_moments(
    function: ExpertFunction,
    x_RD: jax.Array,
    weight_R: jax.Array,
    gate_FD: jax.Array,
    up_FD: jax.Array,
    epilogue: Epilogue | None,
) -> tuple[jax.Array, jax.Array]:
    hidden_RF = gated(function, x_RD @ gate_FD.T, x_RD @ up_FD.T, epilogue)
    input_D, hidden_F = (
        jnp.sum(jnp.square(rows * weight_R[:, None]), axis=0) for rows in (x_RD, hidden_RF)
    )
    return input_D, hidden_F
