"""Our engine and one baseline on the same tokens, in one run, in turns, and the record of it.

Both programs are loaded at once, each in its own process and bound to the same cores, and never
work at the same time.
"""

import contextlib
import hashlib
import importlib.util
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hobbit_jax.baselines.child import Child, SideSpec, environment
from hobbit_jax.engine_flags import EngineOptions
from hobbit_jax.evals.logit_comparison import PositionFigures, compare_in_float64, summarize
from hobbit_jax.evals.measure import Measurement, measure
from hobbit_jax.evals.quality import cut_windows
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.model_file.tokenizer import Tokenizer
from hobbit_jax.models.registry import read_config
from hobbit_jax.record import Benchmark, Measured, Record, combined, measured
from hobbit_jax.statistics import bootstrap, spread
from hobbit_jax.sweep.texts import evaluation_documents
from pallas_kernels.ggml.ops import default_threads

STUDY, SIDES = "baselines", ("ours", "baseline")
OURS = "hobbit_jax.baselines.ours:Ours"
# Baseline → its side and the packages it imports; the extra that installs them has its name.
BASELINES = {
    "torch": ("hobbit_jax.baselines.pytorch:PyTorch", ("torch", "transformers")),
    "llama_cpp": ("hobbit_jax.baselines.llama:LlamaCpp", ("xllamacpp",)),
}


def baseline_factory(baseline: str) -> str:
    """The side of a baseline whose library is installed.

    Raises:
        NotImplementedError: it is not; says how to install it.
    """
    factory, packages = BASELINES[baseline]
    extra = baseline.replace("_", "-")  # pip before 23.3 finds no extra with an underscore
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise NotImplementedError(
                f"--baseline {baseline} needs the package {package}, which is not installed: "
                f"pip install -c constraints.txt -e '.[{extra}]'"
            )
    return factory


@dataclass(frozen=True)
class Request:
    """What to compare: our engine by its options, and a baseline.

    That has the same file and threads, and on a GPU llama.cpp has the same budget for experts.
    `windows` of `context` tokens are scored for agreement. `turns` are timed after a warm-up.
    """

    options: EngineOptions
    baseline: str  # of `BASELINES`
    windows: int
    context: int
    turns: int
    prompt_tokens: int
    decode_tokens: int
    text: str = ""  # see `evaluation_documents`
    torch_mode: str | None = None  # of `pytorch.MODES`; None is its default for the device

    @property
    def threads(self) -> int:
        """Processor cores of each program."""
        return self.options.threads or default_threads()

    @property
    def asked(self) -> Benchmark:
        """What identifies the record."""
        options = {name: v for name, v in self.options.asked.items() if name != "budget_mib"}
        sizes = ("windows", "context", "turns", "prompt_tokens", "decode_tokens", "threads")
        setting = {
            **options,
            "baseline": self.baseline,
            "budget_bytes": self.options.budget_bytes,
            **{name: getattr(self, name) for name in sizes},
        }
        if self.torch_mode:
            setting["torch_mode"] = self.torch_mode
        return Benchmark(STUDY, setting)


def compare_model(request: Request) -> Record:
    """The record of a comparison.

    Raises:
        NotImplementedError: the baseline's library is not installed, or what it cannot do.
        ValueError: sizes that the model or the text do not allow, or another bad input.
        OSError: a file, or a program that failed; says how.
    """
    factory, options = baseline_factory(request.baseline), request.options
    file = open_gguf(options.path)
    config = read_config(file)
    row_tokens = request.prompt_tokens + request.decode_tokens
    longest = max(request.context, row_tokens)
    if longest > config.context_length:
        raise ValueError(
            f"windows of {request.context} and rows of {row_tokens} tokens; want at most the "
            f"model's context of {config.context_length}"
        )
    texts = evaluation_documents(request.text)
    tokenizer = Tokenizer(file)
    windows = cut_windows(tokenizer, texts, request.windows, request.context)
    rows = cut_windows(tokenizer, texts, request.turns + 1, row_tokens - 1, seed=1)
    by_program = {"budget_bytes": options.budget_bytes}
    if request.baseline == "torch":
        by_program = {"mode": request.torch_mode}
    other = {"model": str(options.path), "context": longest, **by_program}
    sides = (
        SideSpec(OURS, {"options": options, "context": longest}, request.threads),
        SideSpec(factory, other, request.threads),
    )
    began = time.monotonic()
    found, here = compare(*sides, windows.ids_WS, rows.ids_WS, request.prompt_tokens)
    about = {
        "model_bytes": file.file_bytes,
        "architecture": config.arch,
        "text": Path(request.text).name or "shipped held-out text",
        "windows_begin_with_bos": "yes" if windows.begin_with_bos else "no",
        "omp_wait_policy": environment()["OMP_WAIT_POLICY"],
    }
    text_sha256 = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    hashes = Measured(file_sha256={"model": file.sha256(), "text": text_sha256})
    return Record(
        study=STUDY,
        asked=request.asked,
        **vars(combined(found, measured(about), hashes)),
        **here,
        seconds=round(time.monotonic() - began, 2),
    )


def agreement(windows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Measured:
    """How near two programs' logits are; `logit_std`, the baseline's, is what they differ beside.

    Args:
        windows: of equal length, one held at a time: our logits [T, V], the baseline's, and the
            tokens [T] that followed.

    Raises:
        ValueError: shapes that do not match, or a logit that is not finite.
    """
    ours: list[PositionFigures] = []
    baseline: list[PositionFigures] = []
    largest, means = 0.0, []
    for ours_TV, baseline_TV, targets_T in windows:
        reference = baseline_TV[None], targets_T[None]
        ours.append(compare_in_float64(ours_TV[None], *reference))
        baseline.append(compare_in_float64(baseline_TV[None], *reference))
        exact_TV = baseline_TV.astype(np.float64)
        difference_TV = ours_TV - exact_TV
        largest = max(largest, float(np.abs(difference_TV).max()))
        means.append([np.mean(x) for x in (difference_TV**2, exact_TV, exact_TV**2)])
    square, mean, mean_square = np.mean(means, axis=0).tolist()
    ours_WT, baseline_WT = (
        np.concatenate([part.nll_BT for part in parts]) for parts in (ours, baseline)
    )

    def difference(w: np.ndarray) -> float:
        return float(np.exp(ours_WT[w].mean()) - np.exp(baseline_WT[w].mean()))

    apart = {
        "windows": len(ours_WT),
        "logit_max_difference": largest,
        "logit_rms_difference": square**0.5,
        "logit_std": max(mean_square - mean**2, 0.0) ** 0.5,
        "perplexity_baseline": summarize(baseline).perplexity,
        "perplexity_difference": bootstrap(difference, len(ours_WT)),
    }
    return combined(measured(summarize(ours)), measured(apart))


def compare(
    ours: SideSpec,
    baseline: SideSpec,
    windows_WT: np.ndarray,
    rows_RS: np.ndarray,
    prompt_tokens: int,
) -> tuple[Measured, dict[str, Any]]:
    """Runs both; the measured part of a record, and the fields that say what it ran on.

    Windows [windows, context + 1] are scored for agreement, and rows are those of `measure`.

    Raises:
        ValueError, NotImplementedError, OSError: what either program raised, after its name;
            both have ended then.
    """
    load_before = os.getloadavg()[0]
    children: dict[str, Child] = {}
    sides: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for name, spec in zip(SIDES, (ours, baseline), strict=True):
            children[name] = stack.enter_context(Child(spec, name))
            _ = children[name].loaded  # before the next one begins to
        own, other = children.values()
        bar = tqdm(windows_WT, desc="logits", unit="window", leave=False, disable=None)
        near = agreement(
            (own.score(ids_S[:-1]), other.score(ids_S[:-1]), ids_S[1:]) for ids_S in bar
        )
        turns = {name: child.turn for name, child in children.items()}
        found = measure(turns, rows_RS, prompt_tokens)
        for name, child in children.items():
            counts, load = found[name].counts, child.loaded
            sides[name] = {
                **child.facts(),
                "decode_hit_rate": counts and counts.hit_rate,
                "load_s": load["load_s"],
                "memory": {"before_model": load["before_model"], "peak": child.peak()},
            }
    here = sides["ours"].pop("machine")
    # Of the machine, over a minute: 1 is what a comparison makes itself on one core.
    sides["load_average"] = {"before": load_before, "after": os.getloadavg()[0]}
    return combined(near, measured(_speed(found)), measured(sides)), here


def _speed(found: Mapping[str, Measurement]) -> dict[str, Any]:
    """Times of both, and ratios within a turn; the share of tokens on which both agree."""
    sides = [found[name] for name in SIDES]

    def both(name: str) -> dict[str, Any]:
        own_R, other_R = (getattr(side, name) for side in sides)
        spreads = (spread(own_R), spread(other_R), spread(own_R / other_R))
        return dict(zip((*SIDES, "ratio"), spreads, strict=True))

    own, other = (np.array([turn.chosen for turn in side.turns]) for side in sides)
    timed = ("decode_tokens_per_s", "prefill_tokens_per_s", "first_token_s")
    return {**{n: both(n) for n in timed}, "same_greedy_token": float((own == other).mean())}
