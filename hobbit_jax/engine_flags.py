"""The flags that say which model runs and how, defined once for every script that runs one.

Owns their names, ranges, defaults and help, and how an engine is made of them. A script takes those
that it heeds: `ENGINE = engine_flags("model", "budget_mib", …)`, and `ENGINE()` in `main` reads
them. A new engine flag is one field of `EngineOptions`, one entry of `_FLAGS` and one line of
`EngineOptions.make_engine` (or `load_model`).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from absl import flags

from hobbit_jax import cli, reference
from hobbit_jax.cache.bandwidth import read_bandwidths
from hobbit_jax.cache.config import MAX_RESIDENT_LIFT, CacheConfig
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES, Host, MissMode
from hobbit_jax.cache.policies import DEFAULT_POLICY, POLICIES
from hobbit_jax.cache.pool import SlotPool
from hobbit_jax.cache.pool_sizing import DEFAULT_LOW_SHARE, LowShare, low_share
from hobbit_jax.cache.prefetch import PredictorName, PrefetchRule
from hobbit_jax.cache.trace import RoutingRecorder
from hobbit_jax.cache.warm_start import WarmStart, load_all
from hobbit_jax.cache_folder import keep_compiled_programs, low_precision_folder
from hobbit_jax.evals.bandwidth import here
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance.calibration import Calibration
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import GGUFFile
from hobbit_jax.models.caches import KV_FORMATS
from hobbit_jax.models.loading import LoadedModel, load_model
from pallas_kernels.backends import IMPLEMENTATIONS, Implementation
from pallas_kernels.formats import FORMATS
from pallas_kernels.ggml.ops import set_threads

DEFAULT_LOW_FORMAT = "Q2_K"
ALL = "all"
_MIB_OR_ALL = f"a number from 0 to {cli.MAX_MIB:g}, or {ALL}"


@dataclass(frozen=True)
class EngineOptions:
    """Which model runs and how; `_FLAGS` says what each field means."""

    model: str | None = None
    implementation: Implementation | None = None
    devices: int = 1
    budget_mib: float | None = None
    policy: str = DEFAULT_POLICY
    miss_mode: str = "fetch"
    link_to_host: float | Path | None = None
    resident_lift: float = 0.0
    low_format: str | None = None
    low_share: LowShare = DEFAULT_LOW_SHARE
    prefetch: PrefetchRule | None = None
    profile: str | None = None
    pin_share: float = 0.0
    chunk_tokens: int = 2048
    context: int | None = None
    threads: int | None = None
    trace_out: str | None = None
    kv_format: str = "float32"

    @property
    def path(self) -> Path:
        """The model file; ValueError if it cannot be read."""
        if self.model is None:
            return reference.model_path()
        return cli.input_file("model", self.model)

    @property
    def asked(self) -> dict[str, Any]:
        """What identifies a measurement: the file's name, and options that have not their default.

        Options that are added later are no part of what was measured before.
        """
        default = EngineOptions()
        found = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        if self.prefetch is not None:
            found["prefetch"] = f"{self.prefetch.predictor}:{self.prefetch.distance}"
        if isinstance(self.link_to_host, Path):
            found["link_to_host"] = self.link_to_host.name
        return found | {"model": self.path.name}

    @property
    def budget_bytes(self) -> int | None:
        """Of each device's pool; None holds all experts."""
        return None if self.budget_mib is None else int(self.budget_mib * 2**20)

    @property
    def keeps_low_copies(self) -> bool:
        """Whether low copies serve misses; otherwise a low format is every expert's."""
        return MISS_MODES[self.miss_mode].low_banks != "none"

    @property
    def low(self) -> str | None:
        """Format of the low-precision experts; None where there are none."""
        return self.low_format or (DEFAULT_LOW_FORMAT if self.keeps_low_copies else None)

    @property
    def _precision(self) -> int:
        """That the plan asks for of every expert."""
        return LOW if self.low is not None and not self.keeps_low_copies else NATIVE

    def load_model(self) -> LoadedModel:
        """The model, its dense part on the device."""
        if self.trace_out is not None:
            cli.output_file("trace_out", self.trace_out)
        if self.threads is not None:
            set_threads(self.threads)
        keep_compiled_programs()
        return load_model(self.path, self.implementation)

    def low_experts(self, model: LoadedModel) -> list[GGUFFile]:
        """Every expert of `model` in the low format, from the cache folder or made anew."""
        if self.low is None:
            return []
        spec = LowPrecisionSpec(self.low)
        return [open_low_precision(model.file, model.config, spec, low_precision_folder())]

    def make_engine(
        self, model: LoadedModel, executor: Callable[..., SlotPool] = SlotPool
    ) -> Engine:
        """An engine on `model`; low-precision experts are made first, once.

        Raises:
            ValueError, NotImplementedError: settings that do not go together, or a budget that is
                too small.
        """
        store = HostExperts(model.config, model.file, self.low_experts(model))
        config = CacheConfig(
            self.budget_bytes,
            plan=uniform_plan(store, self._precision),
            policy=self.policy,
            mode=self.mode(store),
            resident_lift=self.resident_lift,
            low_share=self.low_share,
            warm=self._warm_start(model.file),
            prefetch=self.prefetch,
            chunk_tokens=self.chunk_tokens,
            devices=self.devices,
            kv_format=self.kv_format,
        )
        return Engine(model, store, config, executor)

    def load_all_that_fit(self, engine: Engine) -> None:
        """Loads every expert that the plan asks for, if the pool can hold all of them.

        An engine's pool begins empty, and a hit rate would count the first use of each as a miss.
        """
        if engine.pool.holds_all:
            load_all(engine.pool, self._precision)
            engine.counts.take()

    @contextmanager
    def recorded_routing(self, engine: Engine) -> Iterator[None]:
        """Writes what one sequence routes inside the block to `trace_out`, where that is given."""
        if self.trace_out is None:
            yield
            return
        recorder = RoutingRecorder(engine.config.n_layers)
        with engine.observed_by(recorder):
            yield
        recorder.write(Path(self.trace_out))

    def mode(self, store: HostExperts) -> MissMode:
        """The miss mode, with what was measured of this machine.

        ValueError for a figure that the mode has no use for, or of another machine.
        """
        mode, link_to_host = MISS_MODES[self.miss_mode], self.link_to_host
        if link_to_host is None:
            return mode
        if not isinstance(mode, Host):
            raise ValueError(
                f"--link_to_host is for a --miss_mode that computes on the CPU, and this one is "
                f"{self.miss_mode}; leave it out, or take host or hybrid"
            )
        if isinstance(link_to_host, Path):
            found = read_bandwidths(link_to_host)
            found.check_here(*here())
            experts = store.layer(NATIVE, 0)  # one copy is of one of its three matrices
            link_to_host = found.link_to_host(experts.signature.gate, experts.expert_bytes / 3)
        return replace(mode, link_to_host=link_to_host)

    def _warm_start(self, file: GGUFFile) -> WarmStart | None:
        if self.profile is None:
            if self.pin_share:
                raise ValueError("--pin_share needs a --profile, which says what to pin")
            return None
        folder = cli.input_folder("profile", self.profile)
        return WarmStart(Calibration.load(folder, file).selections_LE, self.pin_share)


def budget_mib(text: str) -> float | None:
    """A pool's size in MiB; None for `ALL`, which is no bound, as without the flag."""
    mib = None if text == ALL else float(text)
    if mib is not None and not 0 <= mib <= cli.MAX_MIB:
        raise ValueError(f"{text} is not {_MIB_OR_ALL}")
    return mib


def _link_to_host(text: str) -> float | Path:
    """A ratio of bandwidths, or a file of measured ones."""
    try:
        float(text)
    except ValueError:
        return cli.input_file("link_to_host", text)
    return flags.FloatParser(1e-3, 1e3).parse(text)


def _prefetch(text: str) -> PrefetchRule:
    predictor, _, distance = text.partition(":")
    return PrefetchRule(predictor, int(distance or 1))  # pyright: ignore[reportArgumentType]


def _one_of(choices: Iterable[str]) -> flags.EnumParser:
    parser = flags.EnumParser(list(choices))
    parser.syntactic_help = f"one of {', '.join(choices)}"
    return parser


def _meanings(choices: Mapping[str, Any], documented: Callable[[Any], Any]) -> str:
    """Each choice with the first sentence of what documents it, one a line."""

    def sentence(choice: Any) -> str:
        return documented(choice).__doc__.splitlines()[0].split(". ")[0].rstrip(".")

    return "\n".join(f"{name}: {sentence(choice)}." for name, choice in choices.items())


_TEXT = flags.ArgumentParser()
_COUNT = flags.IntegerParser(1, cli.MAX_COUNT)
# A flag's parser, with its range, and its help; the default is the field's.
_FLAGS: dict[str, tuple[flags.ArgumentParser, str]] = {
    "model": (_TEXT, "GGUF file of the model; the shipped reference model by default."),
    "implementation": (
        _one_of(IMPLEMENTATIONS),
        "Implementation of the matrix products; the fastest for the device by default.",
    ),
    "devices": (flags.IntegerParser(1, 4096), "Number of devices to shard experts over."),
    "budget_mib": (
        cli.Parsed(budget_mib, _MIB_OR_ALL),
        f"Size of each device's expert pool in MiB; {ALL}, the default, has room for every expert.",
    ),
    "policy": (
        _one_of(POLICIES),
        "Cache policy that chooses the expert to evict.\n" + _meanings(POLICIES, lambda p: p),
    ),
    "miss_mode": (
        _one_of(MISS_MODES),
        "Rule that says what serves a selected expert that is not resident.\n"
        + _meanings(MISS_MODES, type),
    ),
    "link_to_host": (
        cli.Parsed(_link_to_host, "a number from 0.001 to 1000, or a file of bench_bandwidth.py"),
        "Bandwidth of the link to the device over the rate at which the CPU reads experts that it "
        "computes, for a --miss_mode that computes on the CPU, or a file of bench_bandwidth.py.",
    ),
    "resident_lift": (
        flags.FloatParser(0.0, MAX_RESIDENT_LIFT),
        "Amount by which the logarithms of the router's scores of resident experts are raised for "
        "the choice in decode; 0 routes as the model does, 10 and more takes residents first.",
    ),
    "low_format": (
        _one_of(FORMATS),
        "Format of the low-precision experts. They serve the misses of a --miss_mode that keeps "
        f"low copies ({DEFAULT_LOW_FORMAT} by default); under fetch, every expert runs in this "
        "format.",
    ),
    "low_share": (
        cli.Parsed(low_share, "a number from 0 to 1, or adaptive"),
        "Share of the pool for low copies, under a --miss_mode that caches some; adaptive follows "
        "what is used.",
    ),
    "prefetch": (
        cli.Parsed(_prefetch, "PREDICTOR or PREDICTOR:DISTANCE"),
        "Predictor of the experts that later layers need, and how many layers ahead it looks: "
        f"{', '.join(get_args(PredictorName))}. Nothing is prefetched by default.",
    ),
    "profile": (
        _TEXT,
        "Folder of a calibration of this model; its most used experts are resident from the start.",
    ),
    "pin_share": (
        flags.FloatParser(0.0, 0.99),
        "Share of each bank's slots whose experts, the most used of --profile, are never evicted.",
    ),
    "chunk_tokens": (
        _COUNT,
        "Number of prompt tokens to prefill at a time; fewer take less device memory beside the "
        "pool.",
    ),
    "context": (
        _COUNT,
        "Number of tokens that the KV cache has room for; what the run needs by default.",
    ),
    "threads": (
        flags.IntegerParser(1, 4096),
        "Number of threads on a CPU; those that the process may use by default.",
    ),
    "trace_out": (
        _TEXT,
        "File, .npz, to record the routing of every token in, for replay.py and plan.py --trace.",
    ),
    "kv_format": (_one_of(KV_FORMATS), "Number format of the keys and values of attention."),
}


def engine_flags(*names: str) -> Callable[[], EngineOptions]:
    """Defines the engine flags `names` as the script's own; returns what reads them.

    A flag that the script does not take has its default.
    """
    default = EngineOptions()
    script = sys.argv[0]  # as absl calls the module that runs
    holders = {}
    for name in names:
        parser, text = _FLAGS[name]
        holders[name] = flags.DEFINE(parser, name, getattr(default, name), text, module_name=script)
    if "low_format" in names:
        flags.FLAGS.register_key_flag_for_module(script, flags.FLAGS["cache_dir"])
    return lambda: EngineOptions(**{name: holder.value for name, holder in holders.items()})
