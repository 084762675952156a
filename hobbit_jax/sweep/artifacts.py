"""Artifacts: what several trials of a sweep share, as tasks of their own.

Owns which artifacts there are and which each needs first. A trial that finds one missing makes it
itself (`artifact_cache.py`), so running them first saves time and changes no result.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from hobbit_jax.quantize.methods import NEEDED_STATISTICS
from hobbit_jax.record import EvalSizes, Inputs
from hobbit_jax.sweep.artifact_cache import ArtifactCache


@dataclass(frozen=True)
class Artifact(abc.ABC):
    """A file that trials with these inputs and sizes read."""

    inputs: Inputs
    sizes: EvalSizes

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The artifacts that this one is made of."""
        return ()

    @abc.abstractmethod
    def make(self, bench: ArtifactCache) -> None:
        """Makes the file unless it exists.

        Raises:
            Exception: whatever a trial would meet that makes it.
        """


@dataclass(frozen=True)
class NativeLogits(Artifact):
    """The native model's logits on the evaluation windows."""

    def make(self, bench: ArtifactCache) -> None:
        """See `Artifact`."""
        _ = bench.native_logits_WTV


@dataclass(frozen=True)
class CalibrationRun(Artifact):
    """What a text does to the experts; see `ArtifactCache.calibration`."""

    statistics: str = "routing"
    seed: int = 0
    text: str = ""

    def make(self, bench: ArtifactCache) -> None:
        """See `Artifact`."""
        bench.calibration(self.statistics, self.seed, self.text)


@dataclass(frozen=True)
class LowPrecisionFile(Artifact):
    """A copy of the model with all experts in one lower format; see `ArtifactCache.precision`."""

    format: str
    method: str
    seed: int = 0
    through: tuple[str, ...] = ()

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The calibration that the encoder needs."""
        needed = NEEDED_STATISTICS[self.method]
        return (CalibrationRun(self.inputs, self.sizes, needed, self.seed),) if needed else ()

    def make(self, bench: ArtifactCache) -> None:
        """See `Artifact`."""
        for spec in bench.specs((self.format,), self.method, self.seed, self.through):
            bench.precision(spec)


@dataclass(frozen=True)
class ExpertErrors(Artifact):
    """What each expert loses in lower formats; see `ArtifactCache.errors`."""

    formats: tuple[str, ...]
    method: str
    seed: int = 0
    text: str = ""
    through: tuple[str, ...] = ()

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The files in these formats."""
        how = (self.method, self.seed, self.through)
        return tuple(LowPrecisionFile(self.inputs, self.sizes, f, *how) for f in self.formats)

    def make(self, bench: ArtifactCache) -> None:
        """See `Artifact`."""
        specs = bench.specs(self.formats, self.method, self.seed, self.through)
        bench.errors(specs, self.seed, self.text)
