"""What a measurement can be asked for, as a sum type, and the identity that follows from it.

Owns the classes of plans and trials, and the name of a record. Fields that have their default are
left out of the identity, so a field that is added with a default changes no identity.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hobbit_jax.record.typed_json import plain, typed

_MAX_LABEL = 80

Scalar = str | float | int | bool | None


@dataclass(frozen=True)
class Native:
    """Every expert at the precision that the model file has."""

    json_kind = "native"


@dataclass(frozen=True)
class Uniform:
    """Every expert in one low format.

    `through` are formats that it was rounded to before. `roles` are the matrices that are encoded,
    of "gate", "up" and "down", the others staying native; none named are all.
    """

    json_kind = "uniform"
    format: str
    encoder: str = "ggml"
    through: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mixed:
    """A share (0-1) of experts, or for `router_weight` of selections, is demoted to one format."""

    json_kind = "mixed"
    score: str
    share: float
    format: str
    encoder: str = "ggml"


@dataclass(frozen=True)
class MixedInBytes:
    """Experts get native or one of several formats, within a fraction of native's bytes.

    `score_text` is the text that the score was measured on; empty is the trial's own.
    """

    json_kind = "mixed_in_bytes"
    score: str
    bytes_fraction: float
    formats: tuple[str, ...]
    encoder: str = "ggml"
    score_text: str = ""


@dataclass(frozen=True)
class PerSelection:
    """Each selection gets its precision by a score of the moment.

    `shares` (0-1) are of selections: native, then `formats`, then, if one longer, those skipped.
    """

    json_kind = "per_selection"
    score: str
    shares: tuple[float, ...]
    formats: tuple[str, ...]
    encoder: str = "ggml"


@dataclass(frozen=True)
class MissModeTrial:
    """A missing expert is served as the miss mode says.

    `share` (0-1) of the pool is low copies; "adaptive" follows what is used.
    """

    json_kind = "miss_mode"
    mode: str
    share: float | Literal["adaptive"]
    format: str
    encoder: str = "ggml"


def low_formats(plan: Any) -> tuple[str, ...]:
    """The formats below native of any plan."""
    return getattr(plan, "formats", (plan.format,) if hasattr(plan, "format") else ())


@dataclass(frozen=True)
class Inputs:
    """Model and texts. An empty `model` is the reference model, empty texts are its held-out ones.

    An empty `implementation` takes float32 on a CPU, the fastest matrix products of a GPU.
    """

    model: str = ""
    calibration_text: str = ""
    evaluation_text: str = ""
    implementation: str = ""


@dataclass(frozen=True)
class EvalSizes:
    """How much a trial measures; 0 leaves windows, tasks or decode out."""

    windows: int
    context: int
    calibration_windows: int
    task_problems: int = 0  # per task
    decode_prompt_tokens: int = 0
    decode_tokens: int = 0
    decode_repeats: int = 0
    decoded_windows: int = 0  # of the windows, for quality that depends on the pool
    benchmarks: tuple[str, ...] = ()  # lm-eval's
    benchmark_problems: int = 0  # of each; 0 for all


@dataclass(frozen=True)
class CacheTrial:
    """Quality and cost of a plan under a pool of `budget_mib`, MiB of device memory.

    `misses` is the miss mode of a plan that has none of its own, and `link_to_host` the bandwidth
    of the link over the rate at which the CPU reads what it computes, for modes that ask.
    `resident_lift` routes toward what is resident, as `CacheConfig` says.
    """

    json_kind = "cache"
    plan: Native | Uniform | Mixed | MissModeTrial
    budget_mib: float
    inputs: Inputs
    sizes: EvalSizes
    protected_fraction: float = 0.1  # of the SLRU policy
    seed: int = 0  # of the random control
    policy: str = "slru"  # by its name in `cache/policies`
    misses: str = "fetch"  # or host, or hybrid
    link_to_host: float = 0.41
    resident_lift: float = 0.0

    @property
    def by_decoding(self) -> bool:
        """Whether what it loses depends on what is resident, so that only decoding shows it."""
        return isinstance(self.plan, MissModeTrial) or self.resident_lift > 0


@dataclass(frozen=True)
class QualityTrial:
    """Quality of a plan alone: no pool, no timing. `seed` draws calibration windows and control."""

    json_kind = "quality"
    plan: Native | Uniform | MixedInBytes | PerSelection
    inputs: Inputs
    sizes: EvalSizes
    seed: int = 0


@dataclass(frozen=True)
class Benchmark:
    """Any other measurement: its subject, and the settings that tell it from its siblings."""

    json_kind = "benchmark"
    subject: str
    setting: Mapping[str, Scalar]


Asked = CacheTrial | QualityTrial | Benchmark


def record_name(asked: Asked) -> str:
    """A readable name, and a file name, that ends in 12 digits of a hash of all that was asked."""
    # As read back from JSON: a whole number in a field of floats is a float there.
    found = plain(typed(plain(asked), Asked, "asked"))
    digest = hashlib.sha256(json.dumps(found, sort_keys=True, allow_nan=False).encode())
    shown = {key: value for key, value in found.items() if key not in ("inputs", "sizes", "kind")}
    label = re.sub(r"[^A-Za-z0-9_.]+", "-", _words(shown))[:_MAX_LABEL].strip("-.")
    return f"{label or 'record'}-{digest.hexdigest()[:12]}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(_words(inner) for inner in value.values())
    if isinstance(value, list):
        return "-".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
