"""Artifacts: what several trials of a sweep share, as tasks of their own.

Owns which artifacts there are and which each needs first. A trial that finds one missing makes it
itself (`artifact_cache.py`), so running them first saves time and changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hobbit_jax.record import EvalSizes, Inputs
from hobbit_jax.sweep.artifact_cache import ArtifactCache, Encoding


@dataclass(frozen=True)
class Artifact:
    """A file that trials with these inputs and sizes read."""

    inputs: Inputs
    sizes: EvalSizes
    maker: Callable[..., Any]  # method of `ArtifactCache` that makes the file unless it exists
    arguments: tuple[Any, ...] = ()  # of that method
    artifacts: tuple[Artifact, ...] = ()  # those that it is made of

    def make(self, bench: ArtifactCache) -> None:
        """Makes the file, or raises whatever a trial would meet that makes it."""
        self.maker(bench, *self.arguments)


def native_logits(inputs: Inputs, sizes: EvalSizes) -> Artifact:
    """The native model's logits on the evaluation windows."""
    return Artifact(inputs, sizes, ArtifactCache.native_logits)


def calibration_run(
    inputs: Inputs, sizes: EvalSizes, statistics: str = "routing", seed: int = 0, text: str = ""
) -> Artifact:
    """What a text does to the experts."""
    return Artifact(inputs, sizes, ArtifactCache.calibration, (statistics, seed, text))


def low_precision_file(inputs: Inputs, sizes: EvalSizes, format: str, how: Encoding) -> Artifact:
    """A copy of the model with all experts in one lower format, after its encoder's calibration."""
    moments = calibration_run(inputs, sizes, "second_moment", how.seed)
    needed = (moments,) if how.method == "ggml" else ()
    return Artifact(inputs, sizes, ArtifactCache.low_precision, (format, how), needed)


def expert_errors(
    inputs: Inputs, sizes: EvalSizes, formats: tuple[str, ...], how: Encoding, text: str
) -> Artifact:
    """What each expert loses in lower formats, after the files in these formats."""
    files = tuple(low_precision_file(inputs, sizes, name, how) for name in formats)
    return Artifact(inputs, sizes, ArtifactCache.errors, (formats, how, text), files)


def all_artifacts(tasks: Iterable[Any]) -> list[Artifact]:
    """Artifacts of trials, and those that they are made of, each once."""
    found = list(dict.fromkeys(artifact for task in tasks for artifact in task.artifacts))
    return found and list(dict.fromkeys([*all_artifacts(found), *found]))
