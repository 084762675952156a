"""What a sweep will need, and every reason why it cannot run, before anything is computed.

Owns the checks of model, formats, encoders, budgets, texts, memory, disk and outputs, and the sums
of what is made. A problem names the field of the config that it can be mended at: the one that has
the value in question.
"""

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hobbit_jax import reference
from hobbit_jax.cache.controller import BankLayout
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
from hobbit_jax.models.registry import read_config
from hobbit_jax.quantize.methods import check_method, gptq_bytes
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
from hobbit_jax.resources import existing, free_disk_bytes, host_bytes, mib, workers_device_bytes
from hobbit_jax.sweep.artifact_cache import ArtifactCache, all_artifacts
from hobbit_jax.sweep.texts import calibration_documents, data_folder, evaluation_documents
from hobbit_jax.sweep.trial import Trial

# What the checks that libraries do raise for bad input.
_REFUSALS = (ValueError, NotImplementedError, OSError)


class Kind(NamedTuple):
    """Files of a sweep that are made alike: where, which are there, how large, and of what."""

    folder: Path
    glob: str
    bytes_each: int
    recipe: tuple[str, str, str] | None = None  # model, format, method


@dataclass
class Preflight:
    """What was found; a problem says why the sweep cannot run, and what to do about it."""

    config: Mapping[str, Any]  # what the trials were expanded from
    problems: list[str] = field(default_factory=list)
    device_bytes: int = 0  # most that one trial has there: its pool and the rest of the model
    host_bytes: int = 0  # most that an encoder needs beside that
    disk: Counter[Path] = field(default_factory=Counter)  # bytes of files to be made, by folder
    # Low-precision copies to be made, by model, format and method.
    to_encode: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def problem(self, text: str, name: str = "", value: Any = None) -> None:
        """Adds a problem, once; `name` is a part of the name of the field, of this `value`, where
        it can be mended.
        """
        for path, found in leaves(self.config) if name else ():
            if name in path.rsplit(".", 1)[1] and _holds(found, value):
                text = f"{path}={value}: {text}"
                break
        if text not in self.problems:
            self.problems.append(text)

    @contextmanager
    def trying(self, name: str = "", value: Any = None) -> Iterator[None]:
        """Adds what the block is refused for; see `problem`."""
        try:
            yield
        except _REFUSALS as error:
            self.problem(str(error), name, value)

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
    """Checks all that trials, expanded from `config`, need to run in `workdir`.

    `here` says that they run on this machine, so that its memory counts.
    """
    found = Preflight(config)
    _check_repeats(trials, found)
    by_inputs: dict[tuple[Inputs, EvalSizes], list[Trial]] = defaultdict(list)
    for trial in trials:
        by_inputs[trial.inputs, trial.sizes].append(trial)
    models: dict[str, GGUFFile] = {}
    for name in dict.fromkeys(inputs.model for inputs, _ in by_inputs):
        with found.trying("model", name):
            source = open_gguf(name or reference.model_path())
            read_config(source)
            models[name] = source
    wanted: dict[Kind, set[tuple]] = defaultdict(set)
    for (inputs, _), group in by_inputs.items():
        if inputs.model in models:
            for kind, key in _Check(models[inputs.model], group, workdir, found).all(here):
                wanted[kind].add(key)
    _check_disk(wanted, found)
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


def _holds(value: Any, wanted: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds(item, wanted) for item in value)
    return type(value) is not bool and value == wanted


def _check_repeats(trials: Sequence[Trial], found: Preflight) -> None:
    """Names a trial that stands in the sweep twice, and the fields that make it so."""
    first: dict[str, int] = {}
    for number, trial in enumerate(trials, 1):
        if first.setdefault(trial.name, number) == number:
            continue
        repeated = [
            f"{path} has {item} twice"
            for path, value in leaves(found.config)
            if isinstance(value, list | tuple)
            for item in dict.fromkeys(item for item in value if value.count(item) > 1)
        ]
        why = f"since {' and '.join(repeated)}" if repeated else "and no field tells them apart"
        found.problem(
            f"trial {number} is trial {first[trial.name]} again ({trial.name}), {why}; every trial "
            "of a sweep must differ"
        )
        return


class _Check:
    """The checks of trials that share one model, texts and sizes."""

    def __init__(self, source: GGUFFile, trials: Sequence[Trial], workdir: Path, found: Preflight):
        self.source, self.model = source, read_config(source)
        self.trials, self.workdir, self.found = trials, workdir, found
        self.inputs, self.sizes = trials[0].inputs, trials[0].sizes
        self.cached = {trial.asked for trial in trials if isinstance(trial.asked, CacheTrial)}
        self.native = HostExperts(self.model, source)

    def all(self, here: bool) -> Iterator[tuple[Kind, tuple]]:
        """Every check; what they find stands in `found`. Returns `files`."""
        encodable = self.formats()
        self.pools({name for name, _ in encodable})
        self.texts()
        self.benchmarks()
        self.memory(here)
        return self.files(encodable)

    def formats(self) -> set[tuple[str, str]]:
        """Formats and methods that are asked for and can be made."""
        asked = set()
        for trial in self.trials:
            how = trial.encoding
            asked |= {(name, how.method, True) for name in low_formats(trial.asked.plan)}
            asked |= {(name, "ggml", False) for name in how.through}
        encodable = set()
        for name, method, calibrated in sorted(asked):
            with self.found.trying("format", name):
                check_method(name, method, calibrated)
                encodable.add((name, method))
        return encodable

    def pools(self, encodable: set[str]) -> None:
        """Each trial's budget against the smallest pool that works."""
        needed: dict[float, int] = {}
        for plan, budget_mib in {(one.plan, one.budget_mib) for one in self.cached}:
            formats = low_formats(plan)
            if encodable.issuperset(formats):
                with self.found.trying("format", "".join(formats)):
                    least = self.least_pool_bytes(plan)
                    if least > budget_mib * 2**20:
                        needed[budget_mib] = max(least, needed.get(budget_mib, 0))
        for budget_mib, most in sorted(needed.items()):
            self.found.problem(
                "the experts that one token needs of a layer take a pool of "
                f"{np.ceil(most / 2**20 * 1000) / 1000:g} MiB; give that or more",
                "budget", budget_mib,
            )  # fmt: skip

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
        shares_pLE = StaticPlan(precision_LE).shares_pLE(store.shape_pLE)
        return least_bytes(shares_pLE, mode, BankLayout.of_store(store))

    def texts(self) -> None:
        """Whether the texts have the windows, and the model the context, that are asked for."""
        sizes, found, context = self.sizes, self.found, self.sizes.context
        decoded = sizes.decode_prompt_tokens + sizes.decode_tokens
        for name, tokens in (("context", context), ("decode_tokens", decoded)):
            if tokens > (most := self.model.context_length):
                found.problem(f"{tokens} tokens; the model has {most}", name, getattr(sizes, name))
        texts: dict[str, list[str]] = {}
        for name, read in (
            ("evaluation_text", evaluation_documents),
            ("calibration_text", calibration_documents),
        ):
            with found.trying(name, getattr(self.inputs, name)):
                texts[name] = read(getattr(self.inputs, name))
        with found.trying():
            tokenizer = Tokenizer(self.source)
            for name, text, count, width in (
                ("windows", "evaluation_text", sizes.windows, context),
                ("calibration_windows", "calibration_text", sizes.calibration_windows, context),
                ("decode_repeats", "evaluation_text", sizes.decode_repeats + 1, decoded - 1),
            ):
                if text in texts and count > 0 and width > 0:
                    with found.trying(name, getattr(sizes, name)):
                        cut_windows(tokenizer, texts[text], count, width)

    def benchmarks(self) -> None:
        """Whether lm-eval is here, and its data where they are said to be."""
        if not self.sizes.benchmarks:
            return
        if importlib.util.find_spec("lm_eval") is None:
            self.found.problem(
                "lm-eval is not installed; pip install -e '.[eval]', or "
                "ask for no benchmarks", "benchmarks", self.sizes.benchmarks[0],
            )  # fmt: skip
        with self.found.trying():
            data_folder()

    def memory(self, here: bool) -> None:
        """Whether the largest pool beside the model, and the encoder, fit."""
        found = self.found
        dense = sum(t.nbytes for n, t in self.source.tensors.items() if "_exps." not in n)
        pool = self.native.precision_bytes(NATIVE)
        budget_mib = max((one.budget_mib for one in self.cached), default=None)
        if budget_mib is not None:
            pool = min(int(budget_mib * 2**20), 2 * pool)
        found.device_bytes = max(found.device_bytes, dense + pool)
        if here and dense + pool > (free := workers_device_bytes()):
            found.problem(
                f"a pool of {mib(pool)} beside the rest of the model ({mib(dense)}) does not fit "
                f"the device, which has {mib(free)} free", "budget", budget_mib,
            )  # fmt: skip
        if any(trial.encoding.method == "gptq" for trial in self.trials):
            columns = max(self.model.d_model, self.model.d_expert)
            working = gptq_bytes(columns)
            found.host_bytes = max(found.host_bytes, working)
            if here and working > (free := host_bytes()):
                found.problem(
                    f"a Hessian of {columns} columns takes {mib(working)} with its factors, and "
                    f"{mib(free)} are free; method ggml needs none", "method", "gptq",
                )  # fmt: skip

    def files(self, encodable: set[tuple[str, str]]) -> Iterator[tuple[Kind, tuple]]:
        """What the trials read, with what tells files of one kind apart."""
        sizes, inputs, cache = self.sizes, self.inputs, self.workdir / "cache"
        logits = 4 * sizes.windows * sizes.context * self.model.vocab_size
        kind = Kind(cache, "native-logits-*.npy", logits)
        yield kind, (inputs.model, inputs.evaluation_text)

        def calibrated(seed: int, text: str = "") -> tuple:
            """What tells calibrations apart."""
            text = text or inputs.calibration_text
            return inputs.model, text, sizes.calibration_windows, sizes.context, seed

        for artifact in all_artifacts(self.trials):
            if artifact.maker is ArtifactCache.calibration:
                statistics, seed, text = artifact.arguments
                n_bytes = calibration_bytes(self.model, statistics)
                kind = Kind(cache, f"calibration-*-{statistics}/calibration.npz", n_bytes)
                yield kind, calibrated(seed, text)
            elif artifact.maker is ArtifactCache.low_precision:
                name, how = artifact.arguments
                if (name, how.method) not in encodable:
                    continue
                prefix = f"{self.source.sha256()[:16]}-{encoder_sha256()[:8]}"
                glob = f"{prefix}-{'-'.join([*how.through, name, *how.roles])}-{how.method}*.gguf"
                recipe = (inputs.model, name, how.method)
                n_bytes = disk_bytes(self.source, self.model, name)
                yield Kind(low_precision_folder(), glob, n_bytes, recipe), calibrated(how.seed)


def _check_disk(wanted: Mapping[Kind, set[tuple]], found: Preflight) -> None:
    """Counts what is still to be made; all that goes to one disk must fit it together."""
    for kind, keys in wanted.items():
        # One of another text or seed counts as made, for its name does not tell.
        missing = len(keys) - len(list(kind.folder.glob(kind.glob)))
        if missing > 0 and kind.bytes_each:
            found.disk[kind.folder] += missing * kind.bytes_each
            if kind.recipe is not None:
                found.to_encode[kind.recipe] += missing
    by_disk: dict[int, dict[Path, int]] = defaultdict(dict)
    for folder, n_bytes in found.disk.items():
        by_disk[existing(folder).stat().st_dev][folder] = n_bytes
    for folders in by_disk.values():
        n_bytes, free = sum(folders.values()), free_disk_bytes(next(iter(folders)))
        if n_bytes > free:
            each = ", ".join(f"{path} {size} bytes" for path, size in folders.items())
            found.problem(
                f"the disk has {free} bytes ({mib(free)}) free and the sweep wants {n_bytes} "
                f"({mib(n_bytes)}): {each}; free some, or take another --workdir or --cache_dir"
            )
