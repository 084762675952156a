"""What a text does to a model's experts: routing counts, and the second moments of their inputs.

Owns the calibration pass and its file (Orbax). Called by `scripts/calibrate.py` and
`cells/sweep.py`; read by `quantize/methods.py` (how to encode an expert) and `importance.py` (who
matters).

An error in an expert's weights reaches the residual stream times the router's weight w, so moments
are Σ w²·x·xᵀ over the expert's own selections. x is the layer's normalised input for gate and up,
and the gated hidden row, by native weights, for down.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from hobbit_jax.evals.quality import Windows, watch_windows
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.experts.tiers import dequantize
from hobbit_jax.inference.engine import Engine
from hobbit_jax.inference.prefill import RoutedLayer
from hobbit_jax.model_file.architecture import ModelConfig
from hobbit_jax.signals.importance import RoutingProfile

STATISTICS = ("routing", "second_moment", "hessian")
DEFAULT_LIMIT_BYTES = 8 * 2**30
_ABOUT = ("model_sha256", "text_sha256", "tokens", "begin_with_bos")


@dataclass(frozen=True)
class Calibration:
    """One model on one text.

    Attributes:
        model_sha256: of the model's file(s).
        text_sha256: of the token ids, so of text, tokenizer and windows.
        tokens: how many.
        begin_with_bos: whether its windows began with BOS (`quality.cut_windows`).
        routing: who was chosen, how often and with which weight.
        input_moments: Σ w²·x² [L, E, D] ("second_moment") or Σ w²·x·xᵀ [L, E, D, D] ("hessian"),
            float32; None for "routing".
        hidden_moments: the same of the hidden rows, [L, E, F] or [L, E, F, F].
    """

    model_sha256: str
    text_sha256: str
    tokens: int
    begin_with_bos: bool
    routing: RoutingProfile
    input_moments: np.ndarray | None = None
    hidden_moments: np.ndarray | None = None

    @property
    def statistics(self) -> str:
        """What was gathered."""
        if self.input_moments is None:
            return "routing"
        return "hessian" if self.input_moments.ndim == 4 else "second_moment"

    @property
    def selections_LE(self) -> np.ndarray:
        """How often each expert was chosen."""
        return self.routing.selections_LE

    @property
    def sha256(self) -> str:
        """Identity of everything in it but the rounding of its sums."""
        what = f"{self.model_sha256} {self.text_sha256} {self.statistics}"
        return hashlib.sha256(what.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the folder `path`, all of it or nothing; one that exists is replaced."""
        arrays = {f.name: getattr(self.routing, f.name) for f in fields(RoutingProfile)}
        if self.input_moments is not None and self.hidden_moments is not None:
            arrays |= {"input_moments": self.input_moments, "hidden_moments": self.hidden_moments}
        about = {name: getattr(self, name) for name in _ABOUT}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                path.resolve(),
                ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
                ),
                force=True,
            )

    @classmethod
    def load(cls, path: Path, model_sha256: str) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no calibration, or one of another model.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"no calibration at {path}; make one with scripts/calibrate.py")
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                # Restored as NumPy: moments are megabytes to gigabytes, and the host's.
                restored = checkpointer.restore(
                    path.resolve(),
                    ocp.args.Composite(
                        arrays=ocp.args.StandardRestore(), about=ocp.args.JsonRestore()
                    ),
                )
            about: dict[str, Any] = dict(restored["about"])
            arrays = {name: np.asarray(array) for name, array in restored["arrays"].items()}
            routing = RoutingProfile(**{f.name: arrays.pop(f.name) for f in fields(RoutingProfile)})
            moments = arrays.get("input_moments"), arrays.get("hidden_moments")
            loaded = cls(*(about[name] for name in _ABOUT), routing, *moments)
        except (KeyError, TypeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} holds no calibration that can be read: {reason}") from error
        if loaded.model_sha256 != model_sha256:
            raise ValueError(
                f"the calibration at {path} was made for another model (sha256 "
                f"{loaded.model_sha256[:16]}…, this one is {model_sha256[:16]}…); make one for "
                "this model with scripts/calibrate.py"
            )
        return loaded


def moment_bytes(config: ModelConfig, statistics: str) -> int:
    """Bytes of all moments, on the device while they are gathered and in the file."""
    if statistics == "routing":
        return 0
    power = 2 if statistics == "hessian" else 1
    return 4 * config.n_layers * config.n_experts * (config.d_model**power + config.d_expert**power)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(
    input_E: jax.Array,
    hidden_E: jax.Array,
    expert: jax.Array,
    h_TD: jax.Array,
    token_R: jax.Array,
    weight_R: jax.Array,
    gate_FD: jax.Array,
    up_FD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Adds R selections of one expert to its moments; a weight of 0 adds nothing."""
    x_RD = h_TD[token_R]
    hidden_RF = jax.nn.silu(x_RD @ gate_FD.T) * (x_RD @ up_FD.T)

    def added(sums: jax.Array, rows: jax.Array) -> jax.Array:
        rows = rows * weight_R[:, None]
        moment = rows.T @ rows if sums.ndim == 3 else jnp.sum(rows * rows, axis=0)
        return sums.at[expert].add(moment)

    return added(input_E, x_RD), added(hidden_E, hidden_RF)


class RoutingCounts:
    """Sums over watched layers that make a `RoutingProfile`."""

    def __init__(self, config: ModelConfig):
        shape = (config.n_layers, config.n_experts)
        self.selections_LE, self.weight_LE = np.zeros(shape, np.int64), np.zeros(shape)
        self.weights: list[np.ndarray] = []

    def add(self, routed: RoutedLayer) -> None:
        """Counts one layer of one step."""
        ids, weights = routed.ids_TK[routed.valid_T], routed.weights_TK[routed.valid_T]
        np.add.at(self.selections_LE[routed.layer], ids, 1)
        np.add.at(self.weight_LE[routed.layer], ids, weights)
        self.weights.append(weights)

    def profile(self) -> RoutingProfile:
        """The profile of all that was counted."""
        weights_TK = np.concatenate(self.weights)
        return RoutingProfile(self.selections_LE, self.weight_LE, weights_TK)


class _Collector:
    """Watches an engine's layers and sums."""

    def __init__(self, store: HostExperts, statistics: str):
        config = store.config
        self.store, self.statistics = store, statistics
        self.counts = RoutingCounts(config)
        power = 2 if statistics == "hessian" else 1
        self.moments: list[tuple[jax.Array, jax.Array]] = []
        if statistics != "routing":
            self.moments = [
                (
                    jnp.zeros((config.n_experts, *(config.d_model,) * power)),
                    jnp.zeros((config.n_experts, *(config.d_expert,) * power)),
                )
                for _ in range(config.n_layers)
            ]

    def __call__(self, routed: RoutedLayer) -> None:
        self.counts.add(routed)
        if not self.moments:
            return
        experts = self.store.layer(NATIVE, routed.layer)
        sums = self.moments[routed.layer]
        for expert, token_R, weight_R in routed.by_expert():
            sums = _add(
                *sums,
                jnp.int32(expert),
                routed.h_TD,
                token_R,
                weight_R,
                jnp.asarray(dequantize(experts.gate, expert)),
                jnp.asarray(dequantize(experts.up, expert)),
            )
        self.moments[routed.layer] = sums


def calibrate(
    engine: Engine,
    windows: Windows,
    statistics: str,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> Calibration:
    """Runs `windows` through a native engine and gathers `statistics`.

    Raises:
        ValueError: no text, unknown statistics, or moments larger than `limit_bytes`.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics is {statistics!r}; want one of {', '.join(STATISTICS)}")
    if len(windows.ids_WS) == 0:
        raise ValueError("calibration needs at least one window of text")
    needed = moment_bytes(engine.config, statistics)
    if needed > limit_bytes:
        raise ValueError(
            f"statistics {statistics!r} of this model take {needed / 2**30:.1f} GiB, more than the "
            f"limit of {limit_bytes / 2**30:.1f} GiB; take second_moment "
            f"({moment_bytes(engine.config, 'second_moment') / 2**30:.2f} GiB) or raise --limit_gib"
        )
    collector = _Collector(engine.store, statistics)
    watch_windows(engine, windows, collector, "calibrating")
    ids = np.ascontiguousarray(windows.ids_WS, np.int32)
    found = Calibration(
        model_sha256=engine.model.file.sha256(),
        text_sha256=hashlib.sha256(ids.tobytes() + str(ids.shape).encode()).hexdigest(),
        tokens=windows.targets,
        begin_with_bos=windows.begin_with_bos,
        routing=collector.counts.profile(),
    )
    if not collector.moments:
        return found
    inputs, hidden = zip(*collector.moments, strict=True)
    return replace(found, input_moments=_stacked(inputs), hidden_moments=_stacked(hidden))


def _stacked(layers: Sequence[jax.Array]) -> np.ndarray:
    return np.stack([np.asarray(layer) for layer in layers])
