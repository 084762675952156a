"""One decode at a real model's size: what it takes in time, in memory and in bytes moved.

Owns the run (open, load, prefill, decode token by token), the watch over the process's own memory
and the record. The model is synthetic (`synthetic/synthesize.py`): its routing is skewed and
repeats itself as real routing does, its text means nothing.

*Own memory* is anonymous memory, RssAnon of /proc/self/status, sampled by a thread every 10 ms: the
pool, the dense part, what programs allocate. Pages of the mapped file are the page cache's and not
in it; a program's scratch that lives for less than a sample may be missed.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hobbit_jax import markdown
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, ExpertKey, HostExperts
from hobbit_jax.experts.tiers import TierSpec, open_tier
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.model_file.gguf_file import open_gguf

_SAMPLE_SECONDS = 0.01
SETTINGS = ("native", "uniform", *(n for n, mode in MISS_MODES.items() if mode.low_banks != "none"))
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Run:
    """What is decoded. The second half of the tokens repeats one token, so misses become rare.

    Attributes:
        model: GGUF file; its low tier is made beside it, once.
        budget_bytes: of the pool; None holds all that anyone may ask for.
        prompt_tokens: random ones.
        tokens: decoded after them.
        policy: of eviction.
        setting: "native", "uniform" (every expert at `low_format`), or a miss mode.
        low_format: of the low tier, for every setting but native.
        seed: of the tokens.
    """

    model: Path
    budget_bytes: int | None
    prompt_tokens: int
    tokens: int
    policy: str = "slru"
    setting: str = "native"
    low_format: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.tokens < 3:
            raise ValueError(f"tokens is {self.tokens}; want at least 3, as the first compiles")
        if self.setting not in SETTINGS:
            raise ValueError(f"setting is {self.setting!r}; want one of {', '.join(SETTINGS)}")
        if (self.setting == "native") != (self.low_format is None):
            raise ValueError(f"setting {self.setting} with low_format {self.low_format}")


def own_memory_bytes() -> int:
    """Anonymous memory of this process.

    Raises:
        NotImplementedError: no /proc/self/status, as outside Linux.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotImplementedError("own memory is read from /proc, which Linux has") from error
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(kib) * 1024


@dataclass
class Watched:
    """What a stretch of a run came to."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    compile_seconds: float = 0.0
    peak_bytes: int = 0  # of own memory
    end_bytes: int = 0


class Watch:
    """Times stretches of a run, with the compilation in them and the peak of own memory."""

    def __init__(self):
        self.stretches: dict[str, Watched] = {}
        self._peak, self._compiled = 0, 0.0
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[Watch]:
        """Watches until the end of the block."""
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        thread = threading.Thread(target=self._sample, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            self._compiled += duration_secs

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, own_memory_bytes())

    @contextmanager
    def stretch(self, name: str) -> Iterator[Watched]:
        """A part of the run under a name."""
        watched = self.stretches[name] = Watched()
        self._peak, self._compiled = own_memory_bytes(), 0.0
        began, cpu_began = time.perf_counter(), time.process_time()
        yield watched
        watched.seconds = time.perf_counter() - began
        watched.cpu_seconds = time.process_time() - cpu_began
        watched.compile_seconds = self._compiled
        watched.end_bytes = own_memory_bytes()
        watched.peak_bytes = max(self._peak, watched.end_bytes)


@dataclass
class Token:
    """One decoded token."""

    seconds: float
    cpu_seconds: float
    exits: int
    hits: int
    misses: int
    bytes_moved: int
    selections: int
    degraded: int  # of them, served below what the plan asked for


@dataclass
class Decoded:
    """The tokens of a run; the first compiles and counts in no rate."""

    tokens: list[Token] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Medians with ranges over all tokens but the first, and what a miss costs."""
        tokens = self.tokens[1:]
        seconds = np.asarray([token.seconds for token in tokens])
        cpu = np.asarray([token.cpu_seconds for token in tokens])
        misses = np.asarray([token.misses for token in tokens])
        hits = sum(token.hits for token in tokens)
        selections = sum(token.selections for token in tokens)
        figures = {
            "tokens_per_s": _spread(1 / seconds),
            "tokens_per_cpu_s": _spread(1 / cpu),
            "hit_rate": hits / (hits + int(misses.sum())),
            "degraded_fraction": sum(token.degraded for token in tokens) / selections,
            "misses_per_token": _spread(misses),
            "exits_per_token": _spread(np.asarray([token.exits for token in tokens])),
            "mb_moved_per_token": _spread(
                np.asarray([token.bytes_moved for token in tokens]) / 1e6
            ),
        }
        # CPU seconds of a token, as a constant and a part per miss.
        design = np.stack([np.ones(len(tokens)), misses], axis=1)
        (none, per_miss), *_ = np.linalg.lstsq(design, cpu, rcond=None)
        known = len(set(misses.tolist())) > 1
        figures["cpu_ms_without_miss"] = float(none) * 1e3 if known else None
        figures["cpu_ms_per_miss"] = float(per_miss) * 1e3 if known else None
        return figures


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "median": float(np.median(values)),
        "lowest": float(values.min()),
        "highest": float(values.max()),
    }


def _fetch_ms(engine: Engine, seed: int, count: int = 48) -> dict[str, float] | None:
    """CPU milliseconds to give a slot to an absent expert, its pages of the file in the cache."""
    config, pool = engine.config, engine.pool
    shape = (len(engine.store.tiers), config.n_layers, config.n_experts)
    everyone = (ExpertKey(*place) for place in np.ndindex(shape))
    wanted = (key for key in everyone if engine.store.signature(key) in pool.banks)
    absent = [key for key in wanted if key not in pool]
    chosen = np.random.default_rng(seed).permutation(len(absent))[:count]
    cpu_ms = []
    for key in [absent[i] for i in chosen]:
        for matrix in engine.store.raw(key):
            matrix.max()  # reads its pages
        began = time.process_time()
        pool.load([key])
        jax.block_until_ready(pool.banks)
        cpu_ms.append((time.process_time() - began) * 1e3)
    return _spread(np.asarray(cpu_ms)) if cpu_ms else None


def measure(run: Run, progress: Callable[[str], object] = lambda stage: None) -> dict[str, Any]:
    """Opens, loads, prefills and decodes; the record, ready for JSON.

    Args:
        run: what.
        progress: called with the name of each stage, and for every token.

    Raises:
        ValueError: a budget that is too small.
        NotImplementedError: not on Linux.
    """
    rng, decoded = np.random.default_rng(run.seed), Decoded()
    with Watch().running() as watch:
        progress("open")
        with watch.stretch("open"):
            file = open_gguf(run.model)
        del file
        progress("load")
        with watch.stretch("load"):
            model = load_model(run.model)
        low = []
        if run.low_format is not None:
            progress("low tier")
            spec = TierSpec(run.low_format)
            low.append(open_tier(model.file, model.config, spec, low_precision_folder()))
        store = HostExperts(model.config, model.file, low)
        plan = uniform_plan(store, LOW if run.setting == "uniform" else NATIVE)
        mode = run.setting if run.setting in MISS_MODES else "wait"
        progress("pool")
        with watch.stretch("pool"):
            engine = Engine(model, store, run.budget_bytes, plan, run.policy, mode)
            jax.block_until_ready(engine.pool.banks)
        ids = rng.integers(0, model.config.vocab_size, run.prompt_tokens + run.tokens)
        ids[run.prompt_tokens + run.tokens // 2 :] = ids[-1]
        engine.start(1, len(ids))
        progress("prefill")
        with watch.stretch("prefill") as prefill:
            jax.block_until_ready(engine.prefill([ids[: run.prompt_tokens].tolist()]))
        prefilled = engine.pool.reset_stats()
        with watch.stretch("decode"):
            for token in ids[run.prompt_tokens :]:
                progress("decode")
                decoded.tokens.append(_decode(engine, int(token)))
        # A second sequence of the same prompt: nothing is left to compile.
        progress("prefill again")
        engine.start(1, len(ids))
        with watch.stretch("prefill again") as again:
            jax.block_until_ready(engine.prefill([ids[: run.prompt_tokens].tolist()]))
        progress("fetch")
        fetch_ms = _fetch_ms(engine, run.seed)
    peak_bytes = max(watched.peak_bytes for watched in watch.stretches.values())
    return {
        "model": {
            "name": model.file.metadata.get("general.name"),
            "bytes": model.file.file_bytes,
            "expert_bytes": store.tier_bytes(0),
            "dense_device_bytes": model.dense_device_bytes,
        },
        "run": {**vars(run), "model": run.model.name},
        "pool_bytes": engine.pool.device_bytes,
        "slots": {str(signature): n for signature, n in engine.pool.slots.items()},
        "open_s": watch.stretches["open"].seconds,
        "load_s": watch.stretches["load"].seconds,
        "compile_s": sum(watched.compile_seconds for watched in watch.stretches.values()),
        "prefill_tokens_per_s": run.prompt_tokens / again.seconds,
        "prefill_first_tokens_per_s": run.prompt_tokens / prefill.seconds,
        "prefill_hit_rate": prefilled.hit_rate,
        "prefill_mb_moved": prefilled.bytes_moved / 1e6,
        "decode": decoded.figures(),
        "fetch_cpu_ms": fetch_ms,
        "own_memory": {
            "how": "RssAnon of /proc/self/status every 10 ms",
            "peak_bytes": peak_bytes,
            "peak_beyond_budget_bytes": peak_bytes - engine.pool.budget_bytes,
        },
        "stretches": {name: vars(watched) for name, watched in watch.stretches.items()},
        "tokens": [vars(token) for token in decoded.tokens],
        "load_average": os.getloadavg(),
    }


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: what the records of one model decoded, by budget and setting.

    Counts and bytes are means over the tokens, of which the first compiles and is left out; CPU
    seconds are the median's and the range. The last column is bytes against native's at the same
    budget, where the same tokens were decoded natively.
    """
    head = (
        "GiB", "setting", "slots", "hit rate", "misses a token", "exits a token", "MB a token",
        "degraded", "CPU s a token", "bytes against native",
    )  # fmt: skip
    natives = {
        _workload(record): _mean(record, "bytes_moved")
        for record in records
        if record["run"]["setting"] == "native"
    }

    def order(record: Mapping[str, Any]) -> tuple[float, int]:
        run = record["run"]
        return run["budget_bytes"] or math.inf, SETTINGS.index(run["setting"])

    rows = []
    for record in sorted(records, key=order):
        run, native = record["run"], natives.get(_workload(record))
        moved = _mean(record, "bytes_moved")
        cpu = _spread(np.asarray([token["cpu_seconds"] for token in record["tokens"][1:]]))
        budget = "all" if run["budget_bytes"] is None else f"{run['budget_bytes'] / 2**30:g}"
        rows.append(
            [
                budget,
                " ".join(filter(None, (run["setting"], run["low_format"]))),
                sum(record["slots"].values()),
                f"{record['decode']['hit_rate']:.3f}",
                f"{_mean(record, 'misses'):.0f}",
                f"{_mean(record, 'exits'):.1f}",
                f"{moved / 1e6:.0f}",
                f"{record['decode']['degraded_fraction']:.3f}",
                "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**cpu),
                f"×{moved / native:.2f}" if native else None,
            ]
        )
    return markdown.table(head, rows)


def _workload(record: Mapping[str, Any]) -> tuple:
    """What must be equal where two settings are compared."""
    run = record["run"]
    names = ("model", "budget_bytes", "prompt_tokens", "tokens", "policy", "seed")
    return tuple(run[name] for name in names)


def _mean(record: Mapping[str, Any], name: str) -> float:
    """Of a count over the tokens, without the first."""
    return float(np.mean([token[name] for token in record["tokens"][1:]]))


def _decode(engine: Engine, token: int) -> Token:
    engine.reset_stats()
    engine.pool.reset_stats()
    began, cpu_began = time.perf_counter(), time.process_time()
    np.asarray(engine.decode(np.asarray([token])))
    stats = engine.pool.stats
    return Token(
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu_began,
        exits=engine.stats.exits,
        hits=int(stats.hits.sum()),
        misses=int(stats.misses.sum()),
        bytes_moved=stats.bytes_moved,
        selections=engine.stats.selections,
        degraded=engine.stats.degraded,
    )
