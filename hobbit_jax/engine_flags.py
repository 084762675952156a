"""The flags that say which model runs and how, defined once for every script that runs one.

Owns their names, ranges, defaults and help, and how an engine is made of them. A script takes those
that it heeds: `ENGINE = EngineFlags("model", "budget_mib", …)`. A new engine flag is one entry of
`_FLAGS` and one line of `EngineFlags.make_engine` (or `load_model`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.cache.bandwidth import read_bandwidths
from hobbit_jax.cache.config import MAX_RESIDENT_LIFT, CacheConfig
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES, Host, MissMode
from hobbit_jax.cache.policies import DEFAULT_POLICY, POLICIES
from hobbit_jax.cache.pool_sizing import DEFAULT_LOW_SHARE, LowShare, low_share
from hobbit_jax.cache.warm_start import WarmStart
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.evals.bandwidth import here
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.calibration import Calibration
from hobbit_jax.inference.engine import Engine
from hobbit_jax.inference.routing_recorder import RoutingRecorder
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.models.caches import KV_FORMATS
from hobbit_jax.models.loading import LoadedModel, load_model
from hobbit_jax.quantize import FORMATS
from pallas_kernels.backends import IMPLEMENTATIONS
from pallas_kernels.ggml.ops import set_threads

DEFAULT_LOW_FORMAT = "Q2_K"
ALL = "all"


class _Budget(flags.FloatParser):
    """MiB; `ALL` is no bound, as without the flag."""

    def __init__(self):
        super().__init__(0.0, cli.MAX_MIB)
        self.syntactic_help = f"a number from 0 to {cli.MAX_MIB:g}, or {ALL}"

    def parse(self, argument: Any) -> float | None:
        return None if argument == ALL else super().parse(argument)


class _LinkToHost(flags.FloatParser):
    """A ratio of bandwidths, or a file of measured ones."""

    def __init__(self):
        super().__init__(1e-3, 1e3)
        self.syntactic_help = "a number from 0.001 to 1000, or a file of bench_bandwidth.py"

    def parse(self, argument: Any) -> float | Path:
        try:
            float(argument)
        except ValueError:
            return cli.input_file("link_to_host", argument)
        return super().parse(argument)


class _Share(flags.ArgumentParser):
    """A share of the pool, or that it follows what is used."""

    syntactic_help = "a number from 0 to 1, or adaptive"

    def parse(self, argument: Any) -> LowShare:
        return low_share(str(argument))


def _one_of(choices: Iterable[str]) -> flags.EnumParser:
    parser = flags.EnumParser(list(choices))
    parser.syntactic_help = f"one of {', '.join(choices)}"
    return parser


def _meanings(choices: Mapping[str, Any], documented: Callable[[Any], Any]) -> str:
    """Each choice with the first sentence of what documents it, one a line."""

    def sentence(choice: Any) -> str:
        return documented(choice).__doc__.splitlines()[0].split(". ")[0].rstrip(".")

    return "\n".join(f"{name}: {sentence(choice)}." for name, choice in choices.items())


@dataclass(frozen=True)
class _Flag:
    """A flag's parser, with its range; its default; its help."""

    parser: flags.ArgumentParser
    default: Any
    help: str


_TEXT = flags.ArgumentParser()
_FLAGS: dict[str, _Flag] = {
    "model": _Flag(_TEXT, None, "GGUF file of the model; the shipped reference model by default."),
    "implementation": _Flag(
        _one_of(IMPLEMENTATIONS),
        None,
        "Implementation of the matrix products; the fastest for the device by default.",
    ),
    "devices": _Flag(flags.IntegerParser(1, 4096), 1, "Number of devices to shard experts over."),
    "budget_mib": _Flag(
        _Budget(),
        None,
        f"Size of each device's expert pool in MiB; {ALL}, the default, has room for every expert.",
    ),
    "policy": _Flag(
        _one_of(POLICIES),
        DEFAULT_POLICY,
        "Cache policy that chooses the expert to evict.\n" + _meanings(POLICIES, lambda p: p),
    ),
    "miss_mode": _Flag(
        _one_of(MISS_MODES),
        "fetch",
        "Rule that says what serves a selected expert that is not resident.\n"
        + _meanings(MISS_MODES, type),
    ),
    "link_to_host": _Flag(
        _LinkToHost(),
        None,
        "Bandwidth of the link to the device over the rate at which the CPU reads experts that it "
        "computes, for a --miss_mode that computes on the CPU, or a file of bench_bandwidth.py.",
    ),
    "resident_lift": _Flag(
        flags.FloatParser(0.0, MAX_RESIDENT_LIFT),
        0.0,
        "Amount by which the logarithms of the router's scores of resident experts are raised for "
        "the choice in decode; 0 routes as the model does, 10 and more takes residents first.",
    ),
    "low_format": _Flag(
        _one_of(FORMATS),
        None,
        "Format of the low-precision experts. They serve the misses of a --miss_mode that keeps "
        f"low copies ({DEFAULT_LOW_FORMAT} by default); under fetch, every expert runs in this "
        "format.",
    ),
    "low_share": _Flag(
        _Share(),
        str(DEFAULT_LOW_SHARE),
        "Share of the pool for low copies, under a --miss_mode that caches some; adaptive follows "
        "what is used.",
    ),
    "profile": _Flag(
        _TEXT,
        None,
        "Folder of a calibration of this model; its most used experts are resident from the start.",
    ),
    "pin_share": _Flag(
        flags.FloatParser(0.0, 0.99),
        0.0,
        "Share of each bank's slots whose experts, the most used of --profile, are never evicted.",
    ),
    "chunk_tokens": _Flag(
        flags.IntegerParser(1, cli.MAX_COUNT),
        2048,
        "Number of prompt tokens to prefill at a time; fewer take less device memory beside the "
        "pool.",
    ),
    "context": _Flag(
        flags.IntegerParser(1, cli.MAX_COUNT),
        None,
        "Number of tokens that the KV cache has room for; what the run needs by default.",
    ),
    "threads": _Flag(
        flags.IntegerParser(1, 4096),
        None,
        "Number of threads on a CPU; those that the process may use by default.",
    ),
    "trace_out": _Flag(
        _TEXT,
        None,
        "File, .npz, to record the routing of every token in, for replay.py and plan.py --trace.",
    ),
    "kv_format": _Flag(
        _one_of(KV_FORMATS),
        "float32",
        "Number format of the keys and values of attention.",
    ),
}


class EngineFlags:
    """The engine flags of one script. One that it does not take has its default."""

    def __init__(self, *names: str, **defaults: Any):
        """Defines the flags `names` as the script's own.

        Args:
            names: of `_FLAGS`.
            defaults: of some of them, where they differ from the common ones.
        """
        self._holders = {
            name: flags.DEFINE(
                _FLAGS[name].parser,
                name,
                defaults.get(name, _FLAGS[name].default),
                _FLAGS[name].help,
                module_name=sys.argv[0],  # as absl calls the module that runs
            )
            for name in names
        }
        if "low_format" in names:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["cache_dir"])

    def value(self, name: str) -> Any:
        """The value of a flag."""
        if name in self._holders:
            return self._holders[name].value
        default = _FLAGS[name].default
        return None if default is None else _FLAGS[name].parser.parse(default)

    @property
    def path(self) -> Path:
        """The model file.

        Raises:
            ValueError: it cannot be read.
        """
        given = self.value("model")
        return reference.model_path() if given is None else cli.input_file("model", given)

    @property
    def budget_bytes(self) -> int | None:
        """Of each device's pool; None holds all experts."""
        mib = self.value("budget_mib")
        return None if mib is None else int(mib * 2**20)

    @property
    def keeps_low_copies(self) -> bool:
        """Whether low copies serve misses; otherwise a low format is every expert's."""
        return MISS_MODES[self.value("miss_mode")].low_banks != "none"

    @property
    def low_format(self) -> str | None:
        """Of the low-precision experts; None where there are none."""
        given = self.value("low_format")
        return given or (DEFAULT_LOW_FORMAT if self.keeps_low_copies else None)

    def load_model(self) -> LoadedModel:
        """The model, its dense part on the device."""
        if self.value("trace_out") is not None:
            cli.output_file("trace_out", self.value("trace_out"))
        if self.value("threads") is not None:
            set_threads(self.value("threads"))
        return load_model(self.path, self.value("implementation"))

    def make_engine(self, model: LoadedModel) -> Engine:
        """An engine on `model`; low-precision experts are made first, once.

        Raises:
            ValueError, NotImplementedError: settings that do not go together, or a budget that is
                too small.
        """
        low = [] if self.low_format is None else [low_experts(model, self.low_format)]
        store = HostExperts(model.config, model.file, low)
        uniform = low and not self.keeps_low_copies
        return Engine(
            model,
            store,
            CacheConfig(
                self.budget_bytes,
                plan=uniform_plan(store, LOW if uniform else NATIVE),
                policy=self.value("policy"),
                mode=self._miss_mode(store),
                resident_lift=self.value("resident_lift"),
                low_share=self.value("low_share"),
                warm=self._warm_start(model.file),
                chunk_tokens=self.value("chunk_tokens"),
                devices=self.value("devices"),
                kv_format=self.value("kv_format"),
            ),
        )

    def load_all_that_fit(self, engine: Engine) -> None:
        """Loads every expert that the plan asks for, if the pool can hold all of them.

        An engine's pool begins empty, and a hit rate would count the first use of each as a miss.
        """
        if engine.pool.holds_all:
            uniform = self.low_format is not None and not self.keeps_low_copies
            engine.pool.load_all(LOW if uniform else NATIVE)
            engine.pool.reset_stats()

    @contextmanager
    def recorded_routing(self, engine: Engine) -> Iterator[None]:
        """Writes what one sequence routes inside the block to --trace_out, where that is given."""
        if self.value("trace_out") is None:
            yield
            return
        recorder = RoutingRecorder(engine.config.n_layers)
        with engine.observed_by(recorder):
            yield
        recorder.write(Path(self.value("trace_out")))

    def _miss_mode(self, store: HostExperts) -> MissMode:
        """The mode, with what was measured of this machine.

        Raises:
            ValueError: a figure that the mode has no use for, or of another machine.
        """
        mode, link_to_host = MISS_MODES[self.value("miss_mode")], self.value("link_to_host")
        if link_to_host is None:
            return mode
        if not isinstance(mode, Host):
            raise ValueError(
                f"--link_to_host is for a --miss_mode that computes on the CPU, and this one is "
                f"{self.value('miss_mode')}; leave it out, or take host or hybrid"
            )
        if isinstance(link_to_host, Path):
            found = read_bandwidths(link_to_host)
            found.check_here(*here())
            experts = store.layer(NATIVE, 0)  # one copy is of one of its three matrices
            link_to_host = found.link_to_host(experts.signature.gate, experts.expert_bytes / 3)
        return replace(mode, link_to_host=link_to_host)

    def _warm_start(self, file: GGUFFile) -> WarmStart | None:
        profile, pin_share = self.value("profile"), self.value("pin_share")
        if profile is None:
            if pin_share:
                raise ValueError("--pin_share needs a --profile, which says what to pin")
            return None
        folder = cli.input_folder("profile", profile)
        return WarmStart(Calibration.load(folder, file).selections_LE, pin_share)


def low_experts(model: LoadedModel, low_format: str) -> GGUFFile:
    """Every expert of `model` in `low_format`, from the cache folder or made anew."""
    return open_low_precision(
        model.file, model.config, LowPrecisionSpec(low_format), low_precision_folder()
    )
