"""One trial of a sweep: what it asks, what it shares with others, and the record that it leaves.

Owns how a trial of any kind becomes its record. What it costs under a pool budget is measured by
`cache_trial.py`, what it loses by `quality_trial.py`. Configs make the trials. What trials of a
model share is `artifact_cache.py`.
"""

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hobbit_jax.cache.miss_modes import LOW, MISS_MODES
from hobbit_jax.cache.policies import DEFAULT_POLICY, policy_factory
from hobbit_jax.evals import quality
from hobbit_jax.experts.precision import SELECTION_SCORES, SKIPPED, PrecisionPlan, uniform_plan
from hobbit_jax.experts.store import NATIVE, HostExperts
from hobbit_jax.importance import allocation
from hobbit_jax.importance.scores import STATIC_SCORES, static_scores_LE
from hobbit_jax.quantize.methods import METHODS
from hobbit_jax.record import (
    CacheTrial,
    EvalSizes,
    Inputs,
    Measured,
    MissModeTrial,
    Mixed,
    MixedInBytes,
    Native,
    PerSelection,
    QualityTrial,
    Record,
    Uniform,
    combined,
    low_formats,
    machine,
    measured,
    record_name,
)
from hobbit_jax.sweep import cache_trial, quality_trial
from hobbit_jax.sweep.artifact_cache import Artifact, ArtifactCache, Encoding

# Of a trial that cannot be measured; another exception is a bug, and shows its traceback.
_EXPECTED = (ValueError, NotImplementedError, RuntimeError, MemoryError, OSError)


@dataclass(frozen=True)
class Trial:
    """A plan, under a budget or for its quality alone.

    Raises:
        ValueError: a plan or a cache policy that does not exist.
    """

    asked: CacheTrial | QualityTrial
    study: str = "reference"

    def __post_init__(self):
        check_plan(self.asked.plan)
        policy_factory(getattr(self.asked, "policy", DEFAULT_POLICY))

    @property
    def inputs(self) -> Inputs:
        """What it runs on."""
        return self.asked.inputs

    @property
    def sizes(self) -> EvalSizes:
        """How much it measures."""
        return self.asked.sizes

    @property
    def name(self) -> str:
        """Of its record."""
        return record_name(self.asked)

    @property
    def encoding(self) -> Encoding:
        """How its low precisions are made."""
        plan = self.asked.plan
        method = getattr(plan, "encoder", METHODS[0])
        # The seed of a trial of the cache draws the random control alone.
        seed = self.asked.seed if isinstance(self.asked, QualityTrial) else 0
        return Encoding(method, seed, getattr(plan, "through", ()), getattr(plan, "roles", ()))

    @property
    def reads_routing(self) -> bool:
        """Whether it asks which experts the calibration text chose."""
        asked = self.asked
        return isinstance(asked, CacheTrial) or not isinstance(asked.plan, Native | Uniform)

    @property
    def reads_errors(self) -> bool:
        """Whether it asks what each expert loses in its low formats."""
        plan = self.asked.plan
        by_sensitivity = isinstance(plan, Mixed) and plan.score == "sensitivity"
        return by_sensitivity or isinstance(plan, MixedInBytes)

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What it shares with other trials, and is worth making before any of them runs."""
        plan, how = self.asked.plan, self.encoding
        text, formats = getattr(plan, "score_text", ""), low_formats(plan)

        def made_by(maker: Callable[..., Any], *arguments: Any, of=()) -> Artifact:
            return Artifact(self.inputs, self.sizes, maker, arguments, of)

        def calibration(statistics: str, text: str = "") -> Artifact:
            return made_by(ArtifactCache.calibration, statistics, how.seed, text)

        found = [made_by(ArtifactCache.native_logits)] if self.sizes.windows else []
        if self.reads_routing:
            found.append(calibration("routing"))
        moments = (calibration("second_moment"),) if how.method == "ggml" else ()
        files = tuple(made_by(ArtifactCache.low_precision, n, how, of=moments) for n in formats)
        found += files
        if text:
            found.append(calibration("routing", text))
        if self.reads_errors:
            found.append(made_by(ArtifactCache.errors, formats, how, text, of=files))
        return tuple(found)

    def run(self, bench: ArtifactCache) -> Measured:
        """Measures, and returns everything of the record that is the trial's own.

        Long steps go through `bench.part`: a process may be killed or preempted at any time, and
        the next one takes finished parts from there.

        Raises:
            ValueError: the budget cannot hold one step's experts, no plan of these precisions keeps
                a limit of bytes, or too little text.
            NotImplementedError: a method without an encoder for a format.
        """
        asked = self.asked
        specs = bench.specs(low_formats(asked.plan), self.encoding)
        store = bench.store(specs)
        plan = self.plan(store, bench)
        if isinstance(asked, CacheTrial):
            found = cache_trial.measure_trial(asked, bench, store, plan, specs)
        else:
            found = quality_trial.measure_trial(asked, bench, store, plan, specs)
        hashes = {f"low_{spec.format}": bench.precision(spec).sha256() for spec in specs}
        if self.reads_routing:
            hashes["calibration"] = bench.calibration("routing", self.encoding.seed).sha256
        sizes = store_figures(store, plan, isinstance(asked.plan, MissModeTrial))
        return combined(found, measured(sizes), Measured(file_sha256=hashes))

    def plan(self, store: HostExperts, bench: ArtifactCache) -> PrecisionPlan:
        """Who gets which precision."""
        plan, seed = self.asked.plan, self.encoding.seed
        if isinstance(plan, Native | MissModeTrial):
            return uniform_plan(store, NATIVE)
        if isinstance(plan, Uniform):
            return uniform_plan(store, LOW)
        text = getattr(plan, "score_text", "")
        profile = bench.calibration("routing", seed, text).routing
        if isinstance(plan, PerSelection):
            precisions = (NATIVE, *range(1, len(plan.formats) + 1), SKIPPED)[: len(plan.shares)]
            return allocation.selection_plan(plan.score, precisions, plan.shares, profile)
        error_NLE = None
        if self.reads_errors:
            error_NLE = bench.errors(low_formats(plan), self.encoding, text)
        if isinstance(plan, Mixed):
            error_LE = None if error_NLE is None else error_NLE[LOW]
            return allocation.allocate(
                plan.score, plan.share, LOW, profile, self.asked.seed, error_LE
            )
        assert error_NLE is not None
        if plan.score != "sensitivity":
            # What a format costs is the same number for every score, so that scores differ in
            # nothing but who is demoted.
            score_LE = static_scores_LE(plan.score, profile, seed=seed)
            error_NLE = error_NLE.mean(axis=(1, 2), keepdims=True) * score_LE[None]
        limit_bytes = plan.bytes_fraction * store.precision_bytes(NATIVE)
        return allocation.fit_in_bytes(error_NLE, store, limit_bytes)


def check_plan(plan: Any) -> None:
    """Refuses a plan that does not exist.

    Raises:
        ValueError: names what is wrong and what there is.
    """
    serving = [name for name, mode in MISS_MODES.items() if mode.low_banks != "none"]
    scores = {
        Mixed: allocation.IMPORTANCE_SCORES,
        MixedInBytes: STATIC_SCORES,
        PerSelection: SELECTION_SCORES,
    }
    _check("method", getattr(plan, "encoder", METHODS[0]), METHODS)
    if type(plan) in scores:
        _check("importance score", plan.score, list(scores[type(plan)]))
    if isinstance(plan, MissModeTrial):
        _check("miss mode", plan.mode, serving)
        if plan.share != "adaptive" and not 0 <= plan.share <= 1:
            raise ValueError(f"the low copies' share is {plan.share}; want adaptive or 0 to 1")
    if isinstance(plan, Mixed) and not 0 <= plan.share <= 1:
        raise ValueError(f"the demoted share is {plan.share}; want 0 to 1")
    if isinstance(plan, PerSelection) and len(plan.shares) - len(plan.formats) not in (1, 2):
        raise ValueError(
            f"{len(plan.formats)} formats with shares {plan.shares}; want one share more than "
            "formats, or two more, the last for skipped selections"
        )


def _check(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{what} is {value!r}; want one of {', '.join(choices)}")


def store_figures(store: HostExperts, plan: PrecisionPlan, all_precisions: bool) -> dict[str, Any]:
    """Bytes of all experts, natively and under the plan; a pair that needs two copies has both.

    `all_precisions`: any expert may be wanted at any precision, whatever the plan says.
    """
    pairs = store.config.n_layers * store.config.n_experts
    bytes_pL = [[layer.expert_bytes for layer in precision] for precision in store.precisions]
    stored_pLE = (plan.shares_pLE(store.shape_pLE) != 0) | all_precisions
    stored_bytes = int((stored_pLE.sum(axis=2) * bytes_pL).sum())
    return {
        "experts": pairs,
        "native_bytes": store.precision_bytes(NATIVE),
        "stored_bytes": stored_bytes,
        "expert_bytes_mean": stored_bytes / pairs,
    }


def spread(trials: Iterable[Trial]) -> list[Trial]:
    """The same trials, those of the same quality far apart.

    It is measured once for all of them, and a worker that needs it meanwhile would wait.
    """
    before = Counter[Any]()
    turns: list[tuple[int, Trial]] = []
    for trial in trials:
        asked = trial.asked
        shared = cache_trial.of_quality(asked) if isinstance(asked, CacheTrial) else asked
        turns.append((before[shared], trial))
        before[shared] += 1
    return [trial for _, trial in sorted(turns, key=lambda pair: pair[0])]


def run_trial(trial: Trial, bench: ArtifactCache) -> Record:
    """The record of a trial; one that cannot be measured has a record too, with the reason."""
    began = time.monotonic()
    try:
        found = trial.run(bench)
    except Exception as error:
        if not isinstance(error, _EXPECTED):
            traceback.print_exc()
        return failed_record(trial, f"{type(error).__name__}: {error}")
    inputs = {"model": bench.model.file.sha256(), "text": bench.text_sha256}
    bos = "yes" if quality.begin_with_bos(bench.tokenizer) else "no"
    arithmetic = bench.model.implementation or "the fastest"
    notes = {"windows_begin_with_bos": bos, "implementation": arithmetic}
    found = combined(Measured(file_sha256=inputs, notes=notes), found)
    seconds = round(time.monotonic() - began, 2)
    return Record(trial.study, trial.asked, **vars(found), **machine(), seconds=seconds)


def failed_record(trial: Trial, error: str) -> Record:
    """The record of a trial that failed for `error`."""
    return Record(trial.study, trial.asked, **machine(), status="failed", error=error)
