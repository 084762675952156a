"""What a sweep will need, and every reason why it cannot run, before anything is computed.

Owns the checks of model, formats, encoders, budgets, texts, memory, disk and outputs, and the sums
of what is made. A problem names the field of the config that it can be mended at: the one that has
the value in question.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hobbit_jax import reference
from hobbit_jax.cache.miss_modes import FETCH, miss_mode
from hobbit_jax.cache.pool_sizing import least_bytes
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.config_overrides import leaves
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.experts.low_precision import disk_bytes, encoder_sha256, planned_low_precision
from hobbit_jax.experts.precision import StaticPlan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.calibration import calibration_bytes
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.registry import read_config
from hobbit_jax.quantize.methods import NEEDED_STATISTICS, check_method, gptq_bytes
from hobbit_jax.record import (
    CacheTrial,
    EvalSizes,
    Inputs,
    MissModeTrial,
    Mixed,
    Native,
    Uniform,
    low_formats,
)
from hobbit_jax.resources import free_disk_bytes, host_bytes, mib, workers_device_bytes
from hobbit_jax.sweep.artifact_cache import ArtifactCache, Encoding
from hobbit_jax.sweep.artifacts import all_artifacts
from hobbit_jax.sweep.texts import CODE_TEXT, calibration_documents, evaluation_documents
from hobbit_jax.sweep.trial import Trial

# What the checks that libraries do raise for bad input.
_REFUSALS = (ValueError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Kind:
    """Files of a sweep that are made alike: where, which are there, how large, and of what."""

    folder: Path
    glob: str
    bytes_each: int
    recipe: tuple[str, str, str] | None = None  # model, format, method

    def made(self) -> int:
        """How many are there; one of another text or seed counts, for its name does not tell."""
        return len(list(self.folder.glob(self.glob)))


@dataclass
class Preflight:
    """What was found.

    Attributes:
        problems: each a reason why the sweep cannot run, and what to do about it.
        notes: what it means where that is not plain.
        device_bytes: most that one trial has on the device: its pool and the rest of the model.
        host_bytes: most that an encoder needs beside that.
        wanted: what tells files of a kind apart, by kind; those that are there already among them.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    device_bytes: int = 0
    host_bytes: int = 0
    wanted: dict[Kind, set[tuple]] = field(default_factory=lambda: defaultdict(set))

    def missing(self) -> dict[Kind, int]:
        """How many files of each kind are still to be made."""
        left = {kind: len(keys) - kind.made() for kind, keys in self.wanted.items()}
        return {kind: count for kind, count in left.items() if count > 0}

    @property
    def disk(self) -> dict[Path, int]:
        """Bytes of the files that are still to be made, by folder."""
        folders: dict[Path, int] = defaultdict(int)
        for kind, count in self.missing().items():
            folders[kind.folder] += count * kind.bytes_each
        return {folder: n_bytes for folder, n_bytes in folders.items() if n_bytes}

    @property
    def to_encode(self) -> dict[tuple[str, str, str], int]:
        """How many low-precision copies are to be made, by (model, format, method)."""
        found: dict[tuple[str, str, str], int] = defaultdict(int)
        for kind, count in self.missing().items():
            if kind.recipe is not None:
                found[kind.recipe] += count
        return found

    def refuse(self) -> None:
        """Raises a ValueError with all problems, if there are any, in one line."""
        if len(self.problems) == 1:
            raise ValueError(self.problems[0])
        if self.problems:
            numbered = "; ".join(f"({n}) {text}" for n, text in enumerate(self.problems, 1))
            raise ValueError(f"{len(self.problems)} problems, and nothing was run: {numbered}")


def preflight(
    trials: Sequence[Trial], config: dict[str, Any], workdir: Path, here: bool = True
) -> Preflight:
    """Checks all that `trials` need to run.

    Args:
        trials: of the sweep.
        config: what they were expanded from.
        workdir: that they run in.
        here: whether they run on this machine, so that its memory counts.
    """
    found = Preflight()
    found.problems += _equal_trials(trials, config)
    by_inputs: dict[tuple[Inputs, EvalSizes], list[Trial]] = defaultdict(list)
    for trial in trials:
        by_inputs[trial.inputs, trial.sizes].append(trial)
    models: dict[str, tuple[GGUFFile, ModelConfig] | None] = {}
    for (inputs, sizes), group in by_inputs.items():
        if inputs.model not in models:
            models[inputs.model] = _opened(inputs.model, config, found)
        model = models[inputs.model]
        if model is not None:
            _Check(model, inputs, sizes, group, config, workdir, found).all(here)
    # Trials of several sizes share model and files, and so what is wrong with them.
    found.problems = list(dict.fromkeys(found.problems))
    found.notes = list(dict.fromkeys(found.notes))
    _check_disk(found)
    return found


def all_low_mib(model: str, format: str) -> float:
    """MiB of all experts of a model ("" is the reference model) in a low format.

    Raises:
        OSError, ValueError: the model does not open.
        NotImplementedError: there is no such format.
    """
    source = open_gguf(model or reference.model_path())
    config = read_config(source)
    store = HostExperts(config, source, [planned_low_precision(source, config, format)])
    return store.precision_bytes(1) / 2**20


def _opened(
    model: str, config: dict[str, Any], found: Preflight
) -> tuple[GGUFFile, ModelConfig] | None:
    try:
        source = open_gguf(model or reference.model_path())
        return source, read_config(source)
    except _REFUSALS as error:
        found.problems.append(f"{_at(config, 'model', model)}{error}")
        return None


def _holds(value: Any, wanted: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds(item, wanted) for item in value)
    return type(value) is not bool and value == wanted


def _at(config: dict[str, Any], name: str, wanted: Any) -> str:
    """ "config.a.b=value: " of the field whose name has `name` and that holds `wanted`, or ""."""
    for path, value in leaves(config):
        if name in path.rsplit(".", 1)[1] and _holds(value, wanted):
            return f"{path}={wanted}: "
    return ""


def _equal_trials(trials: Sequence[Trial], config: dict[str, Any]) -> list[str]:
    """Names trials that stand in the sweep twice, and the fields that make them equal."""
    first: dict[str, int] = {}
    pairs = []
    for number, trial in enumerate(trials, 1):
        if trial.name in first:
            pairs.append(f"trial {number} is trial {first[trial.name]} again ({trial.name})")
        first.setdefault(trial.name, number)
    if not pairs:
        return []
    repeated = [
        f"{path} has {item} twice"
        for path, value in leaves(config)
        if isinstance(value, list | tuple)
        for item in _repeated(value)
    ]
    why = ", since " + " and ".join(repeated) if repeated else "; no field tells them apart"
    more = f", and so are {len(pairs) - 1} more" if len(pairs) > 1 else ""
    return [f"{pairs[0]}{more}{why}; every trial of a sweep must differ"]


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value in values[:index]]


class _Check:
    """The checks of trials that share one model, texts and sizes."""

    def __init__(
        self,
        model: tuple[GGUFFile, ModelConfig],
        inputs: Inputs,
        sizes: EvalSizes,
        trials: Sequence[Trial],
        config: dict[str, Any],
        workdir: Path,
        found: Preflight,
    ):
        (self.source, self.model), self.inputs, self.sizes = model, inputs, sizes
        self.config, self.workdir, self.found = config, workdir, found
        self.trials = trials
        budgets = (getattr(trial.asked, "budget_mib", None) for trial in trials)
        self.budgets_mib = sorted({budget_mib for budget_mib in budgets if budget_mib is not None})
        self.native = HostExperts(self.model, self.source)

    def all(self, here: bool) -> None:
        """Every check; what they find stands in `found`."""
        encodable = self.formats()
        self.pools(encodable)
        self.texts()
        self.benchmarks()
        self.memory(here)
        self.disk(encodable)

    def problem(self, text: object) -> None:
        self.found.problems.append(str(text))

    def formats(self) -> set[str]:
        """Formats that can be made, by every method that they are asked for with."""
        asked = set()
        for trial in self.trials:
            how = trial.encoding
            asked |= {(name, how.method) for name in low_formats(trial.asked.plan)}
            asked |= {(name, "rtn") for name in how.through}
        bad = set()
        for name, method in sorted(asked):
            try:
                check_method(name, method)
            except _REFUSALS as error:
                bad.add(name)
                self.problem(f"{_at(self.config, 'format', name)}{error}")
        return {name for name, _ in asked} - bad

    def pools(self, encodable: set[str]) -> None:
        """Each trial's budget against the smallest pool that works."""
        least: dict[float, list[int]] = defaultdict(list)
        asked = {t.asked for t in self.trials if isinstance(t.asked, CacheTrial)}
        for plan, budget_mib in {(one.plan, one.budget_mib) for one in asked}:
            formats = low_formats(plan)
            if not encodable.issuperset(formats):
                continue
            try:
                needed = self.least_pool_bytes(plan)
            except _REFUSALS as error:
                self.problem(f"{_at(self.config, 'format', formats[0])}{error}")
                continue
            if budget_mib * 2**20 < needed:
                least[budget_mib].append(needed)
        for budget_mib, needed in sorted(least.items()):
            low, high = (np.ceil(n / 2**20 * 1000) / 1000 for n in (min(needed), max(needed)))
            span = f"{high:g}" if low == high else f"{low:g} to {high:g}, by trial,"
            self.problem(
                f"{_at(self.config, 'budget', budget_mib)}the experts that one token needs of a "
                f"layer take a pool of {span} MiB; give {high:g} or more"
            )
        native_mib = self.native.precision_bytes(NATIVE) / 2**20
        for budget_mib in self.budgets_mib:
            if budget_mib >= native_mib:
                self.found.notes.append(
                    f"{_at(self.config, 'budget', budget_mib)}all experts fit natively "
                    f"({native_mib:.1f} MiB), so that nothing is ever missing"
                )

    def least_pool_bytes(self, plan: Native | Uniform | Mixed | MissModeTrial) -> int:
        """The smallest pool in which a plan's experts of one token and layer have slots.

        Which experts a score demotes is not known yet; here each layer has its share of them.
        """
        lows = [planned_low_precision(self.source, self.model, f) for f in low_formats(plan)]
        store = HostExperts(self.model, self.source, lows)
        precision_LE = np.zeros((self.model.n_layers, self.model.n_experts), np.int8)
        by_miss = isinstance(plan, MissModeTrial)
        share = 0.0 if by_miss else getattr(plan, "share", float(isinstance(plan, Uniform)))
        precision_LE[:, self.model.n_experts - round(share * self.model.n_experts) :] = 1
        mode = miss_mode(plan.mode) if by_miss else FETCH
        return least_bytes(StaticPlan(precision_LE), mode, store)

    def texts(self) -> None:
        """Whether the texts have the windows, and the model the context, that are asked for."""
        sizes, model = self.sizes, self.model
        decoded = sizes.decode_prompt_tokens + sizes.decode_tokens
        for name, tokens in (("context", sizes.context), ("decode_tokens", decoded)):
            if tokens > model.context_length:
                where = _at(self.config, name, getattr(sizes, name))
                self.problem(f"{where}{tokens} tokens; the model has {model.context_length}")
        inputs = self.inputs
        try:
            tokenizer = Tokenizer.from_gguf(self.source)
        except _REFUSALS as error:
            self.problem(error)
            return
        documents = {}
        for name, read in (
            ("evaluation_text", evaluation_documents),
            ("calibration_text", lambda text: calibration_documents(text or CODE_TEXT)),
        ):
            text = getattr(inputs, name)
            try:
                documents[name] = read(text)
            except _REFUSALS as error:
                self.problem(f"{_at(self.config, name, text)}{error}")
        if len(documents) < 2:
            return
        evaluated, calibrated = documents["evaluation_text"], documents["calibration_text"]
        wanted = [
            ("windows", evaluated, sizes.windows, sizes.context),
            ("calibration_windows", calibrated, sizes.calibration_windows, sizes.context),
        ]
        if decoded:
            wanted.append(("decode_repeats", evaluated, sizes.decode_repeats + 1, decoded - 1))
        for name, texts, count, context in wanted:
            try:
                cut_windows(tokenizer, texts, count, context)
            except ValueError as error:
                self.problem(f"{_at(self.config, name, getattr(sizes, name))}{error}")

    def benchmarks(self) -> None:
        """Whether lm-eval is here and its data where they are said to be."""
        if not self.sizes.benchmarks:
            return
        if importlib.util.find_spec("lm_eval") is None:
            self.problem(
                f"{_at(self.config, 'benchmarks', self.sizes.benchmarks[0])}lm-eval is not "
                "installed; pip install -e '.[eval]', or set config.eval.benchmarks=()"
            )
        folder = self.inputs.data_dir
        if folder and not Path(folder).is_dir():
            self.problem(f"{_at(self.config, 'data_dir', folder)}there is no such folder")

    def memory(self, here: bool) -> None:
        """Whether the largest pool beside the model, and the encoder, fit."""
        dense = sum(t.nbytes for n, t in self.source.tensors.items() if "_exps." not in n)
        all_bytes = self.native.precision_bytes(NATIVE)
        budget_mib, free = max(self.budgets_mib, default=None), workers_device_bytes()
        largest = all_bytes if budget_mib is None else min(int(budget_mib * 2**20), 2 * all_bytes)
        self.found.device_bytes = max(self.found.device_bytes, dense + largest)
        if here and dense + largest > free:
            where = _at(self.config, "budget", budget_mib)
            self.problem(
                f"{where}a pool of {mib(largest)} beside the rest of the model ({mib(dense)}) does "
                f"not fit the device, which has {mib(free)} free"
            )
        if any(trial.encoding.method == "gptq" for trial in self.trials):
            columns = max(self.model.d_model, self.model.d_expert)
            working, free = gptq_bytes(columns), host_bytes()
            self.found.host_bytes = max(self.found.host_bytes, working)
            where = _at(self.config, "method", "gptq")
            if here and working > free:
                self.problem(
                    f"{where}a Hessian of {columns} columns takes {mib(working)} with its factors, "
                    f"and {mib(free)} are free; method importance needs none"
                )
            self.found.notes.append(
                f"{where}its Hessians are made one at a time, in {mib(working)}"
            )

    def disk(self, encodable: set[str]) -> None:
        """Adds the files that are made; trials that share one add it once."""
        for artifact in all_artifacts(self.trials):
            if artifact.maker is ArtifactCache.low_precision:
                if artifact.arguments[0] in encodable:
                    self.low_precision_file(*artifact.arguments)
            elif artifact.maker is ArtifactCache.calibration:
                self.calibration(*artifact.arguments)
        sizes = self.sizes
        logits = 4 * sizes.windows * sizes.context * self.model.vocab_size
        kind = Kind(self.workdir / "cache", "native-logits-*.npy", logits)
        self.found.wanted[kind].add((self.inputs.model, self.inputs.evaluation_text))

    def low_precision_file(self, name: str, how: Encoding) -> None:
        """Adds a file; of an encoder without calibration all trials of the model share it."""
        prefix = f"{self.source.sha256()[:16]}-{encoder_sha256()[:8]}"
        glob = f"{prefix}-{'-'.join([*how.through, name, *how.roles])}-{how.method}*.gguf"
        n_bytes = disk_bytes(self.source, self.model, name)
        recipe = (self.inputs.model, name, how.method)
        kind = Kind(low_precision_folder(), glob, n_bytes, recipe)
        calibrated = self.calibrated(how.seed) if NEEDED_STATISTICS[how.method] else recipe
        self.found.wanted[kind].add(calibrated)

    def calibration(self, statistics: str, seed: int, text: str) -> None:
        """Adds what a calibration keeps."""
        tokens = self.sizes.calibration_windows * self.sizes.context
        n_bytes = calibration_bytes(self.model, statistics, tokens)
        glob = f"calibration-*-{statistics}/calibration.npz"
        self.found.wanted[Kind(self.workdir / "cache", glob, n_bytes)].add(
            self.calibrated(seed, text)
        )

    def calibrated(self, seed: int, text: str = "") -> tuple:
        """What tells calibrations apart."""
        inputs, sizes = self.inputs, self.sizes
        text = text or inputs.calibration_text
        return inputs.model, text, sizes.calibration_windows, sizes.context, seed


def _check_disk(found: Preflight) -> None:
    """What is made in several folders of one disk must fit it together."""
    by_disk: dict[int, dict[Path, int]] = defaultdict(dict)
    for folder, wanted in found.disk.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        by_disk[there.stat().st_dev][folder] = wanted
    for folders in by_disk.values():
        wanted, free = sum(folders.values()), free_disk_bytes(next(iter(folders)))
        if wanted > free:
            each = ", ".join(f"{path} {size} bytes" for path, size in folders.items())
            found.problems.append(
                f"the disk has {free} bytes ({mib(free)}) free and the sweep wants {wanted} "
                f"({mib(wanted)}): {each}; free some, or take another --workdir or --cache_dir"
            )
