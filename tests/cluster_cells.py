"""Cheap cells for the launchers' tests, and a driver process for them.

A cell's result is a chain of digests in parts, through the same workbench, on a tiny model. It
notes in a log when it runs, and takes a kernel lock while it computes, so that two processes at
one cell are noticed; the kernel drops the lock of a killed one.

python cluster_cells.py LAUNCHER WORKDIR CELLS WORKERS [NAME=VALUE ...]
"""

import fcntl
import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax import launch
from hobbit_jax.cells.workbench import EvalSizes, Inputs, Workbench
from hobbit_jax.launch.driver import drive

PARTS = 3
SIZES = EvalSizes(windows=1, context=8, calibration_windows=1)


@dataclass(frozen=True)
class DigestCell:
    """`kind`: "digest" computes, "crash" kills its process, "stuck" never stores a part."""

    index: int
    inputs: Inputs
    sizes: EvalSizes
    kind: str = "digest"

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.index:03d}"

    def run(self, bench: Workbench) -> dict:
        note(f"run {self.name} {id(bench)}")
        if self.kind == "crash":
            os.kill(os.getpid(), 9)
        if self.kind == "stuck":
            time.sleep(3600)
        with lock(self.name):
            parts = []
            for part in range(PARTS):
                parts.append(bench.part(f"{self.name}-{part}", lambda part=part: self.part(part)))
        return {"digests": parts, "provenance": {}}

    def part(self, part: int) -> str:
        note(f"part {self.name} {part}")
        time.sleep(float(os.environ.get("CELL_PAUSE_S", "0")))
        digest = f"{self.index} {part}".encode()
        for _ in range(20_000):
            digest = hashlib.sha256(digest).digest()
        return digest.hex()


@dataclass(frozen=True)
class ProcessesCell(DigestCell):
    """Two processes that add up their ranks over `jax.distributed`."""

    processes: int = 2

    def run(self, bench: Workbench) -> dict:
        note(f"rank {jax.process_index()} of {jax.process_count()}")
        local = np.full(1, 1.0 + jax.process_index(), np.float32)
        mesh = jax.make_mesh((jax.device_count(),), ("all",))
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
        ranks = jax.make_array_from_process_local_data(spread, local)
        return {"sum": bench.part("sum", lambda: float(jax.jit(jnp.sum)(ranks))), "provenance": {}}


class lock:  # noqa: N801
    def __init__(self, name: str):
        folder = Path(os.environ["CELL_LOG"]).with_suffix(".locks")
        folder.mkdir(exist_ok=True)
        self.file = (folder / name).open("w")

    def __enter__(self):
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"overlap {self.file.name}")

    def __exit__(self, *_):
        self.file.close()


def note(text: str) -> None:
    with Path(os.environ["CELL_LOG"]).open("a") as log:
        log.write(f"{os.getpid()} {text}\n")


def notes(workdir: Path, kind: str) -> list[list[str]]:
    """Notes of one kind: process id, kind, and the rest."""
    log = workdir.with_suffix(".log")
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if line[1] == kind]


def inputs(workdir: Path) -> Inputs:
    return Inputs(str(workdir.parent / "tiny.gguf"), str(workdir.parent / "text.txt"), "")


def cells(workdir: Path, count: int) -> list[DigestCell]:
    return [DigestCell(index, inputs(workdir), SIZES) for index in range(count)]


def main() -> None:
    launcher, workdir, count, workers, *options = sys.argv[1:]
    resources = [option for option in options if not option.startswith("--")]
    settings = launch.parse_resources([o[2:] for o in options if o.startswith("--")])
    kind = settings.pop("kind", "digest")
    path = Path(workdir)
    if kind == "processes":
        made = [ProcessesCell(0, inputs(path), SIZES, "processes")]
    else:
        made = cells(path, int(count))
        if kind != "digest":
            made.insert(0, DigestCell(999, inputs(path), SIZES, str(kind)))
    factory, _ = launch.connect(launcher, resources)
    own = {name: settings.pop(name) for name in ("poll_s", "ask_s") if name in settings}

    def start(workdir, driver):
        made = factory(workdir, driver)
        for name, value in own.items():
            setattr(made, name, value)
        return made

    ran = drive(made, {"title": "t"}, path, start, int(workers), **settings)
    print("cells:", *ran)


if __name__ == "__main__":
    # A test runner in the background ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Workers unpickle cells of a module, not of a script.
    import cluster_cells

    cluster_cells.main()
