"""What a text does to a model's experts: routing counts, and the second moments of their inputs.

Owns the calibration and its folder. `calibration.npz` is written last, so that a folder with it is
whole; before that `layer-…npz` hold the moments of finished layers, which an interrupted run does
not compute again. The text's tokens are kept for GPTQ, which reads them once more.
"""

import hashlib
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from hobbit_jax.atomic import check_space, replacing
from hobbit_jax.evals.quality import Windows
from hobbit_jax.experts.low_precision import MATRICES
from hobbit_jax.importance.layer_inputs import LayerInputs, visit_layers
from hobbit_jax.importance.scores import RoutingProfile
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.loading import LoadedModel

STATISTICS = ("routing", "second_moment")
_FILE = "calibration.npz"


@dataclass(frozen=True)
class KeptMoments:
    """What a calibration has of one layer: `quantize.methods.LayerMoments`."""

    selections_E: np.ndarray
    input_ED: np.ndarray
    hidden_EF: np.ndarray

    def second_moments_EK(self, role: str) -> np.ndarray:
        """Σ w²·x² of a role's matrices."""
        return self.hidden_EF if role == MATRICES["down"] else self.input_ED


@dataclass(frozen=True)
class CalibrationText:
    """What a model is calibrated on, which is all that GPTQ needs."""

    model_sha256: str  # of the model's file(s)
    windows: Windows

    @property
    def statistics(self) -> str:
        """What was gathered."""
        return "text"

    @property
    def sha256(self) -> str:
        """Identity of everything in it but the rounding of its sums."""
        return _sha256(self.model_sha256, self.windows, self.statistics)

    def layer(self, layer: int) -> KeptMoments:
        """The moments of a layer.

        Raises:
            ValueError: there are none.
        """
        raise ValueError(
            f"the calibration has no moments for layer {layer}; make one with "
            "--statistics=second_moment"
        )


@dataclass(frozen=True)
class Calibration(CalibrationText):
    """What one model does with a text.

    Attributes:
        routing: which experts were chosen, how often and with which weight.
        input_moments: Σ w²·x² of gate's and up's inputs, [L, E, D], float32; None for "routing".
        hidden_moments: the same of down's, the hidden rows by native weights, [L, E, F].
    """

    routing: RoutingProfile
    input_moments: np.ndarray | None = None
    hidden_moments: np.ndarray | None = None

    @property
    def statistics(self) -> str:
        """What was gathered."""
        return "routing" if self.input_moments is None else "second_moment"

    def only(self, statistics: str) -> "Calibration":
        """What a calibration for no more than `statistics` would be."""
        if statistics == "second_moment":
            return self
        return replace(self, input_moments=None, hidden_moments=None)

    def layer(self, layer: int) -> KeptMoments:
        """The moments of a layer.

        Raises:
            ValueError: there are none.
        """
        if self.input_moments is None or self.hidden_moments is None:
            return super().layer(layer)
        return KeptMoments(
            self.selections_LE[layer], self.input_moments[layer], self.hidden_moments[layer]
        )

    @property
    def selections_LE(self) -> np.ndarray:
        """How often each expert was chosen."""
        return self.routing.selections_LE

    def save(self, path: Path) -> None:
        """Writes `calibration.npz` into the folder `path`."""
        arrays = {f.name: getattr(self.routing, f.name) for f in fields(RoutingProfile)}
        arrays |= {f.name: np.asarray(getattr(self.windows, f.name)) for f in fields(Windows)}
        if self.input_moments is not None and self.hidden_moments is not None:
            arrays |= {"input_moments": self.input_moments, "hidden_moments": self.hidden_moments}
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / _FILE) as partial, partial.open("wb") as file:
            np.savez(file, model_sha256=np.array(self.model_sha256), **arrays)

    @staticmethod
    def file(path: Path) -> Path:
        """What stands in the folder `path` once the calibration is whole."""
        return path / _FILE

    @classmethod
    def load(cls, path: Path, source: GGUFFile) -> "Calibration":
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
            model_sha256 = str(arrays.pop("model_sha256"))
            windows = Windows(**{f.name: arrays.pop(f.name) for f in fields(Windows)})
            windows = replace(windows, begin_with_bos=bool(windows.begin_with_bos))
            routing = RoutingProfile(**{f.name: arrays.pop(f.name) for f in fields(RoutingProfile)})
            loaded = cls(model_sha256, windows, routing, **arrays)
        except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} holds no calibration that can be read: {reason}") from error
        if model_sha256 != source.sha256():
            raise ValueError(
                f"the calibration at {path} was made for another model (sha256 "
                f"{model_sha256[:16]}…, this one is {source.sha256()[:16]}…); make one for "
                "this model with scripts/calibrate.py"
            )
        return loaded


def _sha256(model_sha256: str, windows: Windows, *more: str) -> str:
    ids = np.ascontiguousarray(windows.ids_WS, np.int32)
    text_sha256 = hashlib.sha256(ids.tobytes() + str(ids.shape).encode()).hexdigest()
    return hashlib.sha256(" ".join([model_sha256, text_sha256, *more]).encode()).hexdigest()


def calibration_bytes(config: ModelConfig, statistics: str) -> int:
    """Bytes on disk of the moments while they are made."""
    if statistics == "routing":
        return 0
    return 2 * 4 * config.n_layers * config.n_experts * (config.d_model + config.d_expert)


def calibrate(model: LoadedModel, windows: Windows, statistics: str, path: Path) -> Calibration:
    """Runs `windows` through a model, gathers `statistics` and saves them in the folder `path`.

    Raises:
        ValueError: no text, more of it than the memory holds, or unknown statistics.
        OSError: the disk has no room for the moments.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics is {statistics!r}; want one of {', '.join(STATISTICS)}")
    path.mkdir(parents=True, exist_ok=True)
    model_sha256, config = model.file.sha256(), model.config
    check_space(path / _FILE, calibration_bytes(config, statistics))
    recipe = _sha256(model_sha256, windows)[:16]
    routing: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    moments: list[tuple[np.ndarray, np.ndarray]] = []

    def visit(inputs: LayerInputs) -> None:
        routed = inputs.routed
        ids_TK, weights_TK = routed.ids_TK[routed.valid_T], routed.weights_TK[routed.valid_T]
        weight_E = np.bincount(ids_TK.reshape(-1), weights_TK.reshape(-1), config.n_experts)
        routing.append((inputs.selections_E, weight_E, weights_TK))
        if statistics == "second_moment":
            moments.append(_kept_moments(path / f"layer-{inputs.layer:03}-{recipe}.npz", inputs))

    visit_layers(model, windows, visit)
    selections_LE, weight_LE, weights = zip(*routing, strict=True)
    profile = RoutingProfile(np.stack(selections_LE), np.stack(weight_LE), np.concatenate(weights))
    stacked = [np.stack(arrays) for arrays in zip(*moments, strict=True)]
    found = Calibration(model_sha256, windows, profile, *stacked)
    found.save(path)
    for leftover in path.glob("layer-*.npz"):
        leftover.unlink()
    return found


def _kept_moments(path: Path, inputs: LayerInputs) -> tuple[np.ndarray, np.ndarray]:
    """Second moments of inputs [E, D] and hidden rows [E, F], computed where `path` has none."""
    if not path.exists():
        input_ED, hidden_EF = (inputs.second_moments_EK(MATRICES[m]) for m in ("gate", "down"))
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, input_ED=input_ED, hidden_EF=hidden_EF)
    with np.load(path) as moments:
        return moments["input_ED"], moments["hidden_EF"]
