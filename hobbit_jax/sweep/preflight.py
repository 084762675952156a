"""What a sweep will need, and every reason why it cannot run, before anything is computed.

Owns the checks of model, formats, encoders, budgets, texts, memory, disk and outputs, and the sums
of what is made. A problem names the field of the config that it can be mended at: the one that has
the value in question.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hobbit_jax import reference
from hobbit_jax.cache.miss_modes import FETCH, MissMode, miss_mode
from hobbit_jax.cache.pool_sizing import least_bytes
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.experts.low_precision import disk_bytes, encoder_sha256, planned_low_precision
from hobbit_jax.experts.precision import StaticPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.calibration import calibration_bytes
from hobbit_jax.model_file.gguf_file import GGUFFile, open_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.models.config import ModelConfig
from hobbit_jax.models.registry import read_config
from hobbit_jax.quantize.methods import NEEDED_STATISTICS, check_method, gptq_bytes
from hobbit_jax.record import (
    Benchmark,
    CacheTrial,
    EvalSizes,
    Inputs,
    MissModeTrial,
    MixedInBytes,
    Native,
    PerSelection,
    Uniform,
)
from hobbit_jax.resources import free_disk_bytes, host_bytes, mib, workers_device_bytes
from hobbit_jax.sweep.texts import CODE_TEXT, calibration_documents, evaluation_documents
from hobbit_jax.sweep.trial import Trial

# What the checks that libraries do raise for bad input.
_REFUSALS = (ValueError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Needs:
    """What one cell asks of the machine.

    Attributes:
        formats: of its low-precision files.
        method: how they are encoded.
        through: formats that their weights pass through first.
        budget_mib: of its pool; None without one.
        mode: its miss mode.
        low_share: share (0-1) of selections or experts that go low.
        seed: of the calibration windows.
    """

    formats: tuple[str, ...]
    method: str
    through: tuple[str, ...] = ()
    budget_mib: float | None = None
    mode: MissMode = FETCH
    low_share: float = 0.0
    seed: int = 0


def needs(cell: Trial) -> Needs:
    """What `cell` asks of the machine; nothing that is known of a cell of another kind."""
    asked = cell.asked
    if isinstance(asked, Benchmark):
        return Needs((), "rtn")
    plan = asked.plan
    budget_mib = asked.budget_mib if isinstance(asked, CacheTrial) else None
    if isinstance(plan, Native):
        return Needs((), "rtn", budget_mib=budget_mib, seed=asked.seed)
    formats = plan.formats if isinstance(plan, MixedInBytes | PerSelection) else (plan.format,)
    through = plan.through if isinstance(plan, Uniform) else ()
    low_share = 1.0 if isinstance(plan, Uniform) else getattr(plan, "share", 0.0)
    mode = FETCH
    if isinstance(plan, MissModeTrial):
        mode, low_share = miss_mode(plan.mode), 0.0
    return Needs(formats, plan.encoder, through, budget_mib, mode, low_share, asked.seed)


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
        device_bytes: most that one cell has on the device: its pool and the rest of the model.
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
    cells: Sequence[Trial], config: dict[str, Any], workdir: Path, here: bool = True
) -> Preflight:
    """Checks all that `cells` need to run.

    Args:
        cells: of the sweep.
        config: what they were expanded from.
        workdir: that they run in.
        here: whether they run on this machine, so that its memory counts.
    """
    found = Preflight()
    found.problems += _equal_cells(cells, config)
    by_inputs: dict[tuple[Inputs, EvalSizes], list[Trial]] = defaultdict(list)
    for cell in cells:
        by_inputs[cell.inputs, cell.sizes].append(cell)
    models: dict[str, tuple[GGUFFile, ModelConfig] | None] = {}
    for (inputs, sizes), group in by_inputs.items():
        if inputs.model not in models:
            models[inputs.model] = _opened(inputs.model, config, found)
        model = models[inputs.model]
        if model is not None:
            _Check(model, inputs, sizes, group, config, workdir, found).all(here)
    # Cells of several sizes share model and files, and so what is wrong with them.
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


def leaves(config: dict[str, Any], path: str = "config") -> Iterator[tuple[str, Any]]:
    """Fields of a config and its parts with their values, as `--config.a.b` names them."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value


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


def _equal_cells(cells: Sequence[Trial], config: dict[str, Any]) -> list[str]:
    """Names cells that stand in the sweep twice, and the fields that make them equal."""
    first: dict[str, int] = {}
    pairs = []
    for number, cell in enumerate(cells, 1):
        if cell.name in first:
            pairs.append(f"cell {number} is cell {first[cell.name]} again ({cell.name})")
        first.setdefault(cell.name, number)
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
    return [f"{pairs[0]}{more}{why}; every cell of a sweep must differ"]


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value in values[:index]]


class _Check:
    """The checks of cells that share one model, texts and sizes."""

    def __init__(
        self,
        model: tuple[GGUFFile, ModelConfig],
        inputs: Inputs,
        sizes: EvalSizes,
        cells: Sequence[Trial],
        config: dict[str, Any],
        workdir: Path,
        found: Preflight,
    ):
        (self.source, self.model), self.inputs, self.sizes = model, inputs, sizes
        self.config, self.workdir, self.found = config, workdir, found
        self.needs = [needs(cell) for cell in cells]
        self.native = HostExperts(self.model, self.source)

    def all(self, here: bool) -> None:
        """Every check; what they find stands in `found`."""
        encodable = self.formats()
        self.budgets(encodable)
        self.texts()
        self.benchmarks()
        self.memory(here)
        self.disk(encodable)

    def problem(self, text: object) -> None:
        self.found.problems.append(str(text))

    def formats(self) -> set[str]:
        """Formats that can be made, by every method that they are asked for with."""
        asked = {(f, n.method) for n in self.needs for f in n.formats}
        asked |= {(f, "rtn") for n in self.needs for f in n.through}
        bad = set()
        for name, method in sorted(asked):
            try:
                check_method(name, method)
            except _REFUSALS as error:
                bad.add(name)
                self.problem(f"{_at(self.config, 'format', name)}{error}")
        return {name for name, _ in asked} - bad

    def budgets(self, encodable: set[str]) -> None:
        """Each cell's budget against the smallest pool that works."""
        least: dict[float, list[int]] = defaultdict(list)
        for need in set(self.needs):
            if need.budget_mib is None or not encodable.issuperset(need.formats):
                continue
            try:
                needed = self.least_pool_bytes(need)
            except _REFUSALS as error:
                self.problem(f"{_at(self.config, 'format', need.formats[0])}{error}")
                continue
            if need.budget_mib * 2**20 < needed:
                least[need.budget_mib].append(needed)
        for budget_mib, needed in sorted(least.items()):
            low, high = (np.ceil(n / 2**20 * 1000) / 1000 for n in (min(needed), max(needed)))
            span = f"{high:g}" if low == high else f"{low:g} to {high:g}, by cell,"
            self.problem(
                f"{_at(self.config, 'budget', budget_mib)}the experts that one token needs of a "
                f"layer take a pool of {span} MiB; give {high:g} or more"
            )
        native_mib = self.native.precision_bytes(NATIVE) / 2**20
        for budget_mib in sorted({n.budget_mib for n in self.needs if n.budget_mib is not None}):
            if budget_mib >= native_mib:
                self.found.notes.append(
                    f"{_at(self.config, 'budget', budget_mib)}all experts fit natively "
                    f"({native_mib:.1f} MiB), so that nothing is ever missing"
                )

    def least_pool_bytes(self, need: Needs) -> int:
        """The smallest pool in which a cell's experts of one token and layer have slots.

        Which experts a score sends low is not known yet; here each layer has its share of them.
        """
        lows = [planned_low_precision(self.source, self.model, name) for name in need.formats]
        store = HostExperts(self.model, self.source, lows)
        plan = uniform_plan(store, NATIVE)
        assert isinstance(plan.precision_LE, np.ndarray)
        plan.precision_LE[
            :, self.model.n_experts - round(need.low_share * self.model.n_experts) :
        ] = 1
        return least_bytes(StaticPlan(plan.precision_LE), need.mode, store)

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
        pools = {n.budget_mib: int(n.budget_mib * 2**20) for n in self.needs if n.budget_mib}
        free = workers_device_bytes()
        largest = min(max(pools.values(), default=all_bytes), 2 * all_bytes)
        self.found.device_bytes = max(self.found.device_bytes, dense + largest)
        if here and dense + largest > free:
            where = _at(self.config, "budget", max(pools, default=None))
            self.problem(
                f"{where}a pool of {mib(largest)} beside the rest of the model ({mib(dense)}) does "
                f"not fit the device, which has {mib(free)} free"
            )
        if any(n.method == "gptq" for n in self.needs):
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
        """Adds the files that are made; cells that share one add it once."""
        inputs, sizes, cache = self.inputs, self.sizes, self.workdir / "cache"
        folder, sha256 = low_precision_folder(), self.source.sha256()[:16]
        calibrated = (inputs.model, inputs.calibration_text, sizes.calibration_windows)
        for need in self.needs:
            statistics = NEEDED_STATISTICS[need.method]
            sees = (calibrated, sizes.context, need.seed) if statistics else (inputs.model,)
            for name in encodable.intersection(need.formats):
                formats = "-".join([*need.through, name])
                glob = f"{sha256}-{encoder_sha256()[:8]}-{formats}-{need.method}*.gguf"
                n_bytes = disk_bytes(self.source, self.model, name)
                kind = Kind(folder, glob, n_bytes, (inputs.model, name, need.method))
                self.found.wanted[kind].add(sees)
            statistics = statistics or "routing"
            tokens = sizes.calibration_windows * sizes.context
            kind = Kind(
                cache,
                f"calibration-*-{statistics}/calibration.npz",
                calibration_bytes(self.model, statistics, tokens),
            )
            self.found.wanted[kind].add((calibrated, sizes.context, need.seed))
        logits = 4 * sizes.windows * sizes.context * self.model.vocab_size
        kind = Kind(cache, "native-logits-*.npy", logits)
        self.found.wanted[kind].add((inputs.model, inputs.evaluation_text))


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
