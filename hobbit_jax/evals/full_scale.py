"""One decode at a real model's size: what it takes in time, in memory and in bytes moved.

Owns the run (open, load, prefill, decode token by token), the watch over the process's own memory
and the record. The model is synthetic (`synthetic/synthesize.py`): its routing is skewed and
repeats itself as real routing does, its text means nothing.

*Own memory* is anonymous memory, RssAnon of /proc/self/status, sampled by a thread every 20 ms: the
pool, the dense part, what programs allocate. Pages of the mapped file are the page cache's and not
in it; a program's scratch that lives for less than a sample may be missed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hobbit_jax import markdown
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.miss_modes import LOW, MISS_MODES
from hobbit_jax.cache_folder import low_precision_folder
from hobbit_jax.evals.engine_program import EngineProgram
from hobbit_jax.evals.measure import Counts, Turn, timed_turn
from hobbit_jax.evals.process_memory import PeakWatch, read_resident
from hobbit_jax.experts.low_precision import LowPrecisionSpec, open_low_precision
from hobbit_jax.experts.precision import uniform_plan
from hobbit_jax.experts.store import NATIVE, ExpertKey, HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model.loading import load_model
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.model_file.metadata import text
from hobbit_jax.statistics import spread

SETTINGS = ("native", "uniform", *(n for n, mode in MISS_MODES.items() if mode.low_banks != "none"))
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Run:
    """What is decoded. The second half of the tokens repeats one token, so misses become rare.

    Attributes:
        model: GGUF file; its low precision is made beside it, once.
        budget_bytes: of the pool; None holds all that anyone may ask for.
        prompt_tokens: random ones.
        tokens: decoded after them.
        policy: of eviction.
        setting: "native", "uniform" (every expert at `low_format`), or a miss mode.
        low_format: of the low precision, for every setting but native.
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
        self._compiled = 0.0

    @contextmanager
    def running(self) -> Iterator[Watch]:
        """Watches until the end of the block.

        Raises:
            NotImplementedError: no /proc/self/status, as outside Linux.
        """
        if read_resident(os.getpid()) is None:
            raise NotImplementedError("own memory is read from /proc, which Linux has")
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            self._compiled += duration_secs

    @contextmanager
    def stretch(self, name: str) -> Iterator[Watched]:
        """A part of the run under a name."""
        watched = self.stretches[name] = Watched()
        self._compiled, memory = 0.0, PeakWatch(os.getpid())
        began, cpu_began = time.perf_counter(), time.process_time()
        try:
            yield watched
        finally:
            watched.seconds = time.perf_counter() - began
            watched.cpu_seconds = time.process_time() - cpu_began
            watched.compile_seconds = self._compiled
            end, peak = read_resident(os.getpid()), memory.stop()
            assert end is not None and peak is not None  # `running` has read it before
            watched.end_bytes, watched.peak_bytes = end.anonymous, peak.anonymous


def token_rows(turn: Turn) -> list[dict[str, Any]]:
    """The tokens of a turn, one row each."""
    return [
        {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "exits": counts.host_round_trips,
            "hits": counts.hits,
            "misses": counts.misses,
            "bytes_moved": counts.bytes_moved,
            "selections": counts.selections,
            "degraded": counts.demoted,
        }
        for seconds, cpu_seconds, counts in zip(
            turn.token_s, turn.token_cpu_s, turn.tokens, strict=True
        )
    ]


def decode_figures(turn: Turn) -> dict[str, Any]:
    """Spreads over all tokens but the first, which compiles, and what a miss costs."""
    tokens = turn.tokens[1:]
    seconds, cpu = (np.asarray(values[1:]) for values in (turn.token_s, turn.token_cpu_s))
    misses, total = np.asarray([counts.misses for counts in tokens]), sum(tokens, Counts())
    # CPU seconds of a token, as a constant and a part per miss.
    design = np.stack([np.ones(len(tokens)), misses], axis=1)
    (none, per_miss), *_ = np.linalg.lstsq(design, cpu, rcond=None)
    known = len(set(misses.tolist())) > 1
    return {
        "tokens_per_s": spread(1 / seconds),
        "tokens_per_cpu_s": spread(1 / cpu),
        "hit_rate": total.hit_rate,
        "degraded_fraction": total.demoted / total.selections,
        "misses_per_token": spread(misses),
        "exits_per_token": spread([counts.host_round_trips for counts in tokens]),
        "mb_moved_per_token": spread([counts.bytes_moved / 1e6 for counts in tokens]),
        "cpu_ms_without_miss": float(none) * 1e3 if known else None,
        "cpu_ms_per_miss": float(per_miss) * 1e3 if known else None,
    }


def _fetch_ms(engine: Engine, seed: int, count: int = 48) -> dict[str, float] | None:
    """CPU milliseconds to give a slot to an absent expert, its pages of the file in the cache."""
    config, pool = engine.config, engine.pool
    shape = (len(engine.store.precisions), config.n_layers, config.n_experts)
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
    return spread(cpu_ms) if cpu_ms else None


def measure(run: Run, progress: Callable[[str], object] = lambda stage: None) -> dict[str, Any]:
    """Opens, loads, prefills and decodes; the record, ready for JSON.

    Args:
        run: what.
        progress: called with the name of each stage, and for every token.

    Raises:
        ValueError: a budget that is too small.
        NotImplementedError: not on Linux.
    """
    rng = np.random.default_rng(run.seed)
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
            progress("low precision")
            spec = LowPrecisionSpec(run.low_format)
            low.append(open_low_precision(model.file, model.config, spec, low_precision_folder()))
        store = HostExperts(model.config, model.file, low)
        plan = uniform_plan(store, LOW if run.setting == "uniform" else NATIVE)
        mode = run.setting if run.setting in MISS_MODES else "fetch"
        progress("pool")
        with watch.stretch("pool"):
            engine = Engine(
                model,
                store,
                CacheConfig(run.budget_bytes, plan=plan, policy=run.policy, mode=mode),
            )
            jax.block_until_ready(engine.pool.banks)
        ids = rng.integers(0, model.config.vocab_size, run.prompt_tokens + run.tokens)
        ids[run.prompt_tokens + run.tokens // 2 :] = ids[-1]
        program = EngineProgram(engine, len(ids))
        with watch.stretch("decode"):
            turn = timed_turn(program, ids, run.prompt_tokens, progress=lambda: progress("decode"))
        # A second sequence of the same prompt: nothing is left to compile.
        progress("prefill again")
        with watch.stretch("prefill again"):
            again = timed_turn(program, ids[: run.prompt_tokens], run.prompt_tokens)
        progress("fetch")
        fetch_ms = _fetch_ms(engine, run.seed)
    peak_bytes = max(watched.peak_bytes for watched in watch.stretches.values())
    return {
        "model": {
            "name": model.file.read("general.name", text(), None),
            "bytes": model.file.file_bytes,
            "expert_bytes": store.precision_bytes(0),
            "dense_device_bytes": model.dense_device_bytes,
        },
        "run": {**vars(run), "model": run.model.name},
        "pool_bytes": engine.pool.device_bytes,
        "slots": {str(signature): n for signature, n in engine.pool.slots.items()},
        "open_s": watch.stretches["open"].seconds,
        "load_s": watch.stretches["load"].seconds,
        "compile_s": sum(watched.compile_seconds for watched in watch.stretches.values()),
        "prefill_tokens_per_s": run.prompt_tokens / again.first_token_s,
        "prefill_first_tokens_per_s": run.prompt_tokens / turn.first_token_s,
        "prefill_hit_rate": turn.prefill and turn.prefill.hit_rate,
        "prefill_mb_moved": turn.prefill and turn.prefill.bytes_moved / 1e6,
        "decode": decode_figures(turn),
        "fetch_cpu_ms": fetch_ms,
        "own_memory": {
            "how": "RssAnon of /proc/self/status every 20 ms",
            "peak_bytes": peak_bytes,
            "peak_beyond_budget_bytes": peak_bytes - engine.pool.budget_bytes,
        },
        "stretches": {name: vars(watched) for name, watched in watch.stretches.items()},
        "tokens": token_rows(turn),
        "load_average": os.getloadavg(),
    }


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: what the records of one model decoded, by budget and setting.

    Counts and bytes are means over the tokens, of which the first compiles and is left out; CPU
    seconds are the median's and the range. The last column is bytes against native's at the same
    budget, where the same tokens were decoded natively.
    """
    head = (
        "GiB", "setting", "slots", "hit rate", "misses a token", "round trips a token",
        "MB a token", "degraded", "CPU s a token", "bytes against native",
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
        cpu = spread([token["cpu_seconds"] for token in record["tokens"][1:]])
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
                "{median:.2f} ({low:.2f} to {high:.2f})".format(**cpu),
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
