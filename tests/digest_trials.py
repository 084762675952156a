"""Cheap trials for the launchers' tests, and a process that runs a sweep of them.

A trial's result is a chain of digests in parts, beside what it reads of two artifacts of a tiny
model. It notes in a log when it runs.

python digest_trials.py LAUNCHER WORKDIR TRIALS WORKERS [--kinds=KIND,KIND] [--OPTION=N]
    [NAME=VALUE ...]
"""

import functools
import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hobbit_jax import launch
from hobbit_jax.launch.sweeping import run_sweep
from hobbit_jax.record import Benchmark, EvalSizes, Inputs, Measured, record_name
from hobbit_jax.sweep.artifact_cache import Artifact, ArtifactCache
from pallas_kernels.ggml.ops import THREADS_VARIABLE

DESCRIPTION = {"title": "t", "question": "", "command": "", "config": {}, "rule": {}}
PARTS = 3
SIZES = EvalSizes(windows=1, context=8, calibration_windows=1)


@dataclass(frozen=True)
class DigestTrial:
    """`kind`: "digest" computes, "crash" kills its process, "stuck" never ends, "fail" raises."""

    index: int
    inputs: Inputs
    sizes: EvalSizes
    kind: str = "digest"

    study = "digests"

    @property
    def asked(self) -> Benchmark:
        return Benchmark(f"{self.kind}-{self.index:03d}", {})

    @property
    def name(self) -> str:
        return record_name(self.asked)

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        makers = (ArtifactCache.native_logits, ArtifactCache.calibration)
        return tuple(Artifact(self.inputs, self.sizes, maker) for maker in makers)

    def run(self, bench: ArtifactCache) -> Measured:
        note(f"run {self.asked.subject} {id(bench)}")
        note(f"threads {os.environ.get(THREADS_VARIABLE)}")
        if self.kind == "crash":
            os.kill(os.getpid(), 9)
        if self.kind == "stuck":
            time.sleep(3600)
        if self.kind == "fail":
            raise ValueError("this one fails")
        parts = [
            bench.part(f"{self.name}-{n}", lambda n=n: Measured(notes={"digest": self.part(n)}))
            for n in range(PARTS)
        ]
        logits = hashlib.sha256(bench.native_logits().tobytes()).hexdigest()
        read = {"logits": logits, "calibration": bench.calibration().sha256}
        digests = [part.notes["digest"] for part in parts]
        return Measured(samples={"digests": digests}, file_sha256=read)

    def part(self, part: int) -> str:
        note(f"part {self.asked.subject} {part}")
        time.sleep(float(os.environ.get("TRIAL_PAUSE_S", "0")))
        digest = f"{self.index} {part}".encode()
        for _ in range(20_000):
            digest = hashlib.sha256(digest).digest()
        return digest.hex()


def note(text: str) -> None:
    with Path(os.environ["TRIAL_LOG"]).open("a") as log:
        log.write(f"{os.getpid()} {text}\n")


def notes(workdir: Path, kind: str) -> list[list[str]]:
    """Notes of one kind: process id, kind, and the rest."""
    log = workdir.with_suffix(".log")
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if line[1] == kind]


def inputs(workdir: Path) -> Inputs:
    return Inputs(str(workdir.parent / "tiny.gguf"), str(workdir.parent / "text.txt"), "")


def trials(workdir: Path, count: int, kinds: str = "") -> list[DigestTrial]:
    """One of each of the kinds, which are separated by commas, before `count` that compute."""
    on = (inputs(workdir), SIZES)
    odd = [DigestTrial(999, *on, kind) for kind in filter(None, kinds.split(","))]
    return [*odd, *(DigestTrial(index, *on) for index in range(count))]


def main() -> None:
    launcher, workdir, count, workers, *words = sys.argv[1:]
    engine, _ = launch.connect(launcher, [w for w in words if not w.startswith("--")])
    options = launch.parse_resources([w[2:] for w in words if w.startswith("--")])
    made = trials(Path(workdir), int(count), str(options.pop("kinds", "")))
    engine = functools.partial(engine, **options)
    print("trials:", *run_sweep(made, DESCRIPTION, Path(workdir), engine, int(workers)))


if __name__ == "__main__":
    # A test runner in the background ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Workers unpickle trials of a module, not of a script.
    import digest_trials

    digest_trials.main()
