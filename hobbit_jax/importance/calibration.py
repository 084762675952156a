"""What a text does to a model's experts: routing counts, and the second moments of their inputs.

Owns the calibration pass and its folder: `calibration.npz` is written last, so that a folder with
it is whole; `inputs-…/` holds the recorded inputs (`layer_inputs.py`) that GPTQ's Hessians are made
from, a layer at a time, and from which an interrupted pass goes on.

An error in an expert's weights reaches the residual stream times the router's weight w, so moments
are Σ w²·x·xᵀ over the expert's own selections. x is the layer's normalised input for gate and up,
and the gated hidden row, by native weights, for down.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hobbit_jax.atomic import check_space, replacing
from hobbit_jax.cache.controller import Observer
from hobbit_jax.cache.selection import RouterOutput
from hobbit_jax.evals.quality import Windows, watch_windows
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.importance.layer_inputs import LayerInputs, record
from hobbit_jax.importance.scores import RoutingProfile
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.registry import read_config

STATISTICS = ("routing", "second_moment", "hessian")
_FILE = "calibration.npz"


@dataclass(frozen=True)
class Calibration:
    """One model on one text.

    Attributes:
        model_sha256: of the model's file(s).
        text_sha256: of the token ids, so of text, tokenizer and windows.
        tokens: how many.
        begin_with_bos: whether its windows began with BOS (`quality.cut_windows`).
        routing: who was chosen, how often and with which weight.
        input_moments: Σ w²·x² [L, E, D], float32; None for "routing".
        hidden_moments: the same of the hidden rows, [L, E, F].
        inputs: what the experts saw, which Hessians are made from; None but for "hessian".
    """

    model_sha256: str
    text_sha256: str
    tokens: int
    begin_with_bos: bool
    routing: RoutingProfile
    input_moments: np.ndarray | None = None
    hidden_moments: np.ndarray | None = None
    inputs: LayerInputs | None = None

    @property
    def statistics(self) -> str:
        """What was gathered."""
        if self.input_moments is None:
            return "routing"
        return "second_moment" if self.inputs is None else "hessian"

    def only(self, statistics: str) -> Calibration:
        """What a calibration for no more than `statistics` would be."""
        dropped: dict[str, None] = {} if statistics == "hessian" else {"inputs": None}
        if statistics == "routing":
            dropped |= {"input_moments": None, "hidden_moments": None}
        return replace(self, **dropped)

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
        """Writes `calibration.npz` into the folder `path`; recorded inputs lie there already."""
        arrays = {f.name: getattr(self.routing, f.name) for f in fields(RoutingProfile)}
        if self.input_moments is not None and self.hidden_moments is not None:
            arrays |= {"input_moments": self.input_moments, "hidden_moments": self.hidden_moments}
        about = (
            self.model_sha256, self.text_sha256, str(self.tokens), self.statistics,
            str(self.begin_with_bos),
        )  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / _FILE) as partial, partial.open("wb") as file:
            np.savez(file, about=np.array(about), **arrays)

    @staticmethod
    def file(path: Path) -> Path:
        """What stands in the folder `path` once the calibration is whole."""
        return path / _FILE

    @classmethod
    def load(cls, path: Path, source: GGUFFile) -> Calibration:
        """Reads the calibration of `source` in the folder `path`.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no calibration, or one of another model.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"no calibration at {path}; make one with scripts/calibrate.py")
        try:
            # Opened here: np.load leaves a file open that is no archive.
            with (path / _FILE).open("rb") as stream:
                arrays = dict(np.load(stream, allow_pickle=False))
            model_sha256, text_sha256, tokens, statistics, bos = arrays.pop("about").tolist()
            routing = RoutingProfile(**{f.name: arrays.pop(f.name) for f in fields(RoutingProfile)})
            loaded = cls(model_sha256, text_sha256, int(tokens), bos == "True", routing, **arrays)
        except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} holds no calibration that can be read: {reason}") from error
        if model_sha256 != source.sha256():
            raise ValueError(
                f"the calibration at {path} was made for another model (sha256 "
                f"{model_sha256[:16]}…, this one is {source.sha256()[:16]}…); make one for "
                "this model with scripts/calibrate.py"
            )
        if statistics != "hessian":
            return loaded
        native = HostExperts(read_config(source), source)
        folder = _inputs_folder(path, model_sha256, text_sha256)
        return replace(loaded, inputs=LayerInputs(folder, native, int(tokens)))

    def hessian_KK(self, role: str, layer: int, expert: int) -> np.ndarray:
        """Σ w²·x·xᵀ of one matrix's inputs, float32 [K, K]; K is D, or F for ffn_down_exps.

        Raises:
            ValueError: the calibration has no Hessians.
        """
        return self._recorded().hessian_KK(role, layer, expert)

    def layer_hessian_DD(self, layer: int) -> np.ndarray:
        """The sum over a layer's experts of their inputs' Hessians, float32 [D, D].

        Raises:
            ValueError: the calibration has no Hessians.
        """
        return self._recorded().layer_hessian_DD(layer)

    def _recorded(self) -> LayerInputs:
        if self.inputs is None:
            raise ValueError(
                f"the calibration has statistics {self.statistics!r} and no inputs to make "
                "Hessians of; make one with --statistics=hessian"
            )
        return self.inputs


def _inputs_folder(path: Path, model_sha256: str, text_sha256: str) -> Path:
    digest = hashlib.sha256(f"{model_sha256} {text_sha256}".encode()).hexdigest()
    return path / f"inputs-{digest[:16]}"


def calibration_bytes(config: ModelConfig, statistics: str, tokens: int) -> int:
    """Bytes on disk while `tokens` are calibrated on: the inputs of every layer, and the sums."""
    if statistics == "routing":
        return 0
    sums = 4 * config.n_layers * config.n_experts * (config.d_model + config.d_expert)
    selection_bytes = 8 * config.experts_per_token
    return 2 * sums + config.n_layers * tokens * (4 * config.d_model + selection_bytes)


class RoutingCounts(Observer):
    """Sums over watched layers that make a `RoutingProfile`."""

    def __init__(self, config: ModelConfig):
        shape = (config.n_layers, config.n_experts)
        self.selections_LE, self.weight_LE = np.zeros(shape, np.int64), np.zeros(shape)
        self.weights: list[np.ndarray] = []

    def after_routing(self, routed: RouterOutput) -> None:
        """Counts one layer of one step."""
        ids, weights = routed.ids_TK[routed.valid_T], routed.weights_TK[routed.valid_T]
        np.add.at(self.selections_LE[routed.layer], ids, 1)
        np.add.at(self.weight_LE[routed.layer], ids, weights)
        self.weights.append(weights)

    def profile(self) -> RoutingProfile:
        """The profile of all that was counted."""
        weights_TK = np.concatenate(self.weights)
        return RoutingProfile(self.selections_LE, self.weight_LE, weights_TK)


def calibrate(engine: Engine, windows: Windows, statistics: str, path: Path) -> Calibration:
    """Runs `windows` through a native engine, gathers `statistics` and saves them in `path`.

    "second_moment" and "hessian" record every layer's inputs first (`calibration_bytes` says how
    much that takes on disk) and then sum them up a layer at a time, so that memory holds the inputs
    of one layer and the float32 weights of one expert. An interrupted pass goes on where it was.

    Raises:
        ValueError: no text, or unknown statistics.
        OSError: the disk has no room for it.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics is {statistics!r}; want one of {', '.join(STATISTICS)}")
    if len(windows.ids_WS) == 0:
        raise ValueError("calibration needs at least one window of text")
    model_sha256, ids = engine.model.file.sha256(), np.ascontiguousarray(windows.ids_WS, np.int32)
    text_sha256 = hashlib.sha256(ids.tobytes() + str(ids.shape).encode()).hexdigest()
    if statistics == "routing":
        counts = count_routing(engine, windows)
        found = Calibration(
            model_sha256, text_sha256, windows.targets, windows.begin_with_bos, counts.profile()
        )
        found.save(path)
        return found
    path.mkdir(parents=True, exist_ok=True)
    needed = calibration_bytes(engine.config, statistics, windows.targets)
    recorded = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    check_space(path / _FILE, needed - recorded)
    folder = _inputs_folder(path, model_sha256, text_sha256)
    record(engine, windows, folder)
    inputs = LayerInputs(folder, engine.store, windows.targets)
    counts = RoutingCounts(engine.config)
    for routed in inputs.routed():
        counts.after_routing(routed)
    layers = tqdm(range(engine.config.n_layers), desc="second moments", disable=None, leave=False)
    input_LED, hidden_LEF = zip(*map(inputs.second_moments, layers), strict=True)
    found = Calibration(
        model_sha256,
        text_sha256,
        windows.targets,
        windows.begin_with_bos,
        counts.profile(),
        np.stack(input_LED),
        np.stack(hidden_LEF),
        inputs if statistics == "hessian" else None,
    )
    found.save(path)
    for leftover in path.glob("inputs-*"):
        if statistics != "hessian" or leftover != folder:
            shutil.rmtree(leftover, ignore_errors=True)
    return found


def count_routing(engine: Engine, windows: Windows) -> RoutingCounts:
    """Runs `windows` through a native engine and counts who was chosen."""
    counts = RoutingCounts(engine.config)
    watch_windows(engine, windows, counts, "calibrating")
    return counts
