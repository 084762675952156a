"""What the trials of one model share, made when first asked for.

Owns the loaded model, texts and windows, calibrations, precisions, measured errors and native
logits, and where they are kept: low-precision copies in the cache folder; in the working directory
what is made once for all trials (`cache/`), and the finished parts of unfinished trials (`parts/`).
Of all processes one makes a thing and the others wait for it. An `Artifact` makes such a thing
beforehand, which saves time and changes no result.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from hobbit_jax import reference
from hobbit_jax.atomic import exclusive, replacing, write_text
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.evals import quality, tasks
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.calibration import STATISTICS, Calibration, CalibrationText, calibrate
from hobbit_jax.importance.layer_inputs import run_by
from hobbit_jax.importance.scores import measure_errors
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.models.loading import LoadedModel, load_model
from hobbit_jax.quantize.methods import METHODS
from hobbit_jax.record import (
    CacheTrial,
    EvalSizes,
    Inputs,
    Measured,
    QualityTrial,
    machine,
    measured,
)
from hobbit_jax.resources import roomy_pool_bytes
from hobbit_jax.sweep.texts import calibration_documents, data_folder, evaluation_documents
from pallas_kernels.backends import for_quality


class Encoding(NamedTuple):
    """How the low precisions of a trial are made; the rest of it is a `LowPrecisionSpec`'s.

    `seed` draws the calibration windows.
    """

    method: str = METHODS[0]
    seed: int = 0
    through: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()


class ArtifactCache:
    """One model and one set of sizes, with a working directory."""

    def __init__(self, inputs: Inputs, sizes: EvalSizes, workdir: Path):
        self.inputs, self.sizes, self.workdir = inputs, sizes, workdir
        path = inputs.model or reference.model_path()
        self.model: LoadedModel = load_model(path, for_quality(inputs.implementation or None))
        self.tokenizer = self.model.tokenizer()
        self._cut = functools.partial(quality.cut_windows, self.tokenizer)
        self._calibrations: dict[tuple[str, str], Calibration] = {}
        self._precisions: dict[str, GGUFFile] = {}

    def _made(self, path: Path, make: Callable[[], object]) -> Path:
        """`path`, which `make` makes if it is not there."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(path):
                if not path.exists():
                    make()
        return path

    def part(self, name: str, measure: Callable[[], Measured]) -> Measured:
        """What `measure` returns; kept, so that a trial that is begun again goes on here.

        `name` says all that it depends on but the model, the texts and the device, which are added.
        """
        here = f"{self._what} {self.text_sha256}"
        digest = hashlib.sha256(here.encode()).hexdigest()[:8]
        path = self.workdir / "parts" / f"{name}-{digest}.json"
        self._made(path, lambda: write_text(path, json.dumps(asdict(measure()), allow_nan=False)))
        return Measured(**json.loads(path.read_text(encoding="utf-8")))

    @functools.cached_property
    def evaluation_texts(self) -> list[str]:
        """Documents of the evaluation text."""
        return evaluation_documents(self.inputs.evaluation_text)

    @functools.cached_property
    def text_sha256(self) -> str:
        """Hash of the sweep's own calibration and evaluation texts together."""
        calibration = calibration_documents(self.inputs.calibration_text)
        texts = [*calibration, "\0", *self.evaluation_texts]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

    @functools.cached_property
    def windows(self) -> quality.Windows:
        """Evaluation windows."""
        return self._cut(self.evaluation_texts, self.sizes.windows, self.sizes.context)

    def calibration_windows(self, seed: int = 0, text: str = "") -> quality.Windows:
        """Windows of a calibration text, "" for the sweep's own, drawn by `seed`."""
        texts = calibration_documents(text or self.inputs.calibration_text)
        return self._cut(texts, self.sizes.calibration_windows, self.sizes.context, seed)

    @functools.cached_property
    def decode_ids_RS(self) -> np.ndarray:
        """Token rows for the decode measurement, the first a warm-up."""
        sizes = self.sizes
        length = sizes.decode_prompt_tokens + sizes.decode_tokens
        rows = sizes.decode_repeats + 1
        return self._cut(self.evaluation_texts, rows, length - 1, seed=1).ids_WS

    @functools.cached_property
    def _what(self) -> str:
        """What is computed with what: results of two kinds of devices differ, if by roundings."""
        return f"{self.model.file.sha256()} {self.inputs.implementation} {machine()['device']}"

    def _key(self, windows: quality.Windows) -> str:
        ids = np.ascontiguousarray(windows.ids_WS).tobytes()
        return hashlib.sha256(self._what.encode() + ids).hexdigest()[:16]

    def _native_engine(self) -> Engine:
        pool_bytes = roomy_pool_bytes(self.native_store.precision_bytes(NATIVE))
        return Engine(self.model, self.native_store, CacheConfig(pool_bytes))

    @functools.cached_property
    def native_store(self) -> HostExperts:
        """The native experts alone."""
        return HostExperts(self.model.config, self.model.file)

    def calibration(
        self, statistics: str = "routing", seed: int = 0, text: str = ""
    ) -> Calibration:
        """The calibration with `statistics`, part of one with more where that has been made."""
        windows = self.calibration_windows(seed, text)
        key = (self._key(windows), statistics)
        if key not in self._calibrations:
            cache = self.workdir / "cache"
            at_least = STATISTICS[STATISTICS.index(statistics) :]
            paths = [cache / f"calibration-{key[0]}-{name}" for name in at_least]
            made = [path for path in paths if Calibration.file(path).exists()]
            path = made[0] if made else paths[0]
            file = Calibration.file(path)
            self._made(file, lambda: calibrate(self.model, windows, statistics, path))
            self._calibrations[key] = Calibration.load(path, self.model.file).only(statistics)
        return self._calibrations[key]

    def native_logits(self) -> np.ndarray:
        """Logits of the native model on the evaluation windows, [W, T, V], mapped."""
        path = self.workdir / "cache" / f"native-logits-{self._key(self.windows)}.npy"
        self._made(
            path, lambda: quality.write_native_logits(self._native_engine(), self.windows, path)
        )
        return np.load(path, mmap_mode="r")

    def specs(self, formats: Sequence[str], how: Encoding) -> list[LowPrecisionSpec]:
        """Low precisions of these formats, encoded from the calibration text."""
        if how.method == "gptq":
            windows = self.calibration_windows(how.seed)
            calibration = CalibrationText(self.model.file.sha256(), windows)
        else:
            calibration = self.calibration("second_moment", how.seed)
        rest = how.through, how.roles
        return [LowPrecisionSpec(name, how.method, calibration, *rest) for name in formats]

    def low_precision(self, format: str, how: Encoding) -> GGUFFile:
        """The file of one low precision."""
        return self.precision(*self.specs([format], how))

    def task_scores(
        self,
        engine: Engine,
        asked: CacheTrial | QualityTrial,
        specs: Sequence[LowPrecisionSpec],
        batch: int | None = None,
    ) -> Measured:
        """The miniature tasks, and lm-eval's shares of problems solved, `batch` at a time.

        lm-eval's finished requests are kept by `asked` and the low-precision files of `specs`.

        Raises:
            ModuleNotFoundError: lm-eval is asked for and not installed.
        """
        sizes = self.sizes
        found = tasks.evaluate(engine, self.tokenizer, sizes.task_problems, batch)
        if sizes.benchmarks:
            from hobbit_jax.evals import benchmarks

            settings = benchmarks.BenchmarkSettings(
                sizes.benchmarks, sizes.benchmark_problems or None, batch_size=batch or 8
            )
            files = [self.precision(spec).sha256() for spec in specs]
            depends = {**asdict(asked), "low_precision_sha256": files}
            folder = self.workdir / "responses"
            found |= benchmarks.shares(
                benchmarks.evaluate_engine(engine, settings, depends, data_folder(), folder)
            )
        return measured(found, "task")

    def precision(self, spec: LowPrecisionSpec) -> GGUFFile:
        """The low precision by `spec`."""
        file, config = self.model.file, self.model.config
        key = spec.key(file)
        if key not in self._precisions:
            calibration = cast(CalibrationText | None, spec.calibration)
            run_text = calibration and run_by(self.model, calibration.windows)
            folder = low_precision_folder()
            self._precisions[key] = open_low_precision(file, config, spec, folder, run_text)
        return self._precisions[key]

    def store(self, specs: Sequence[LowPrecisionSpec]) -> HostExperts:
        """Native experts, and the low precisions in the order of `specs`."""
        low = [self.precision(spec) for spec in specs]
        return HostExperts(self.model.config, self.model.file, low) if low else self.native_store

    def errors(self, formats: Sequence[str], how: Encoding, text: str = "") -> np.ndarray:
        """`measure_errors` of these precisions on calibration windows."""
        specs = self.specs(formats, how)
        windows = self.calibration_windows(how.seed, text)
        names = " ".join(spec.key(self.model.file) for spec in specs)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        path = self.workdir / "cache" / f"errors-{self._key(windows)}-{digest}.npz"

        def measure() -> None:
            error_NLE = measure_errors(self._native_engine(), self.store(specs), windows)
            with replacing(path) as partial, partial.open("wb") as file:
                np.savez(file, error_NLE=error_NLE)

        self._made(path, measure)
        with np.load(path) as arrays:
            return arrays["error_NLE"]


@dataclass(frozen=True)
class Artifact:
    """A file that trials with these inputs and sizes read, as a task of its own."""

    inputs: Inputs
    sizes: EvalSizes
    maker: Callable[..., Any]  # method of `ArtifactCache` that makes the file unless it exists
    arguments: tuple[Any, ...] = ()  # of that method
    artifacts: tuple["Artifact", ...] = ()  # those that it is made of

    def make(self, bench: ArtifactCache) -> None:
        """Makes the file, or raises whatever a trial would meet that makes it."""
        self.maker(bench, *self.arguments)


def all_artifacts(tasks: Iterable[Any]) -> list[Artifact]:
    """Artifacts of trials, and those that they are made of, each once."""
    found = list(dict.fromkeys(artifact for task in tasks for artifact in task.artifacts))
    return found and list(dict.fromkeys([*all_artifacts(found), *found]))
