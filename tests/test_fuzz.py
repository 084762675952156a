"""Hostile and damaged files end in one line, within ten seconds and a gigabyte."""

import multiprocessing
import os
import resource
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
from mutated_files import ORIGINALS, judge, to_bytes

from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.registry import read_config

LIMIT_BYTES, LIMIT_S = 1 << 30, 10
# Each was another kind of traceback, or a message without its file, when the fuzzer was written.
KEPT_SEEDS = (1, 3, 203, 250, 543, 690, 701, 729, 1048)


def _work(seeds: range, at, failures) -> None:
    """Judges `seeds`, under the limits; a kernel's signal ends the process where Python cannot."""
    warnings.simplefilter("error")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory(prefix="fuzz_", dir=_scratch()) as folder:
        for seed in seeds:
            at.value = seed
            signal.alarm(LIMIT_S)
            if wrong := judge(seed, Path(folder)):
                failures.put(f"seed {seed}: {wrong}")
    signal.alarm(0)


def _scratch() -> str | None:
    """Memory rather than disk, where there is some: every copy is flushed."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _judge_all(seeds: range, workers: int) -> list[str]:
    """What is wrong, over all seeds; a worker that dies is replaced and its seed named."""
    spawn = multiprocessing.get_context("spawn")
    failures, found = spawn.Queue(), []
    share = -(-len(seeds) // workers)
    jobs = [seeds[i : i + share] for i in range(0, len(seeds), share)]
    running = []
    while jobs or running:
        while jobs:
            job, at = jobs.pop(), spawn.Value("q", -1)
            process = spawn.Process(target=_work, args=(job, at, failures))
            process.start()
            running.append((process, job, at))
        process, job, at = running.pop(0)
        process.join(0.5)
        while not failures.empty():
            found.append(failures.get())
        if process.is_alive():
            running.append((process, job, at))
        elif process.exitcode:
            found.append(f"seed {at.value}: the process ended with {process.exitcode}")
            if at.value < 0:
                raise AssertionError("a worker could not start")
            jobs.append(range(at.value + 1, job.stop))
    return found


def test_the_originals_open(tmp_path):
    """Otherwise every mutation would be refused for the same reason."""
    for i, draft in enumerate(ORIGINALS):
        (tmp_path / f"{i}.gguf").write_bytes(to_bytes(draft))
        assert read_config(open_gguf(tmp_path / f"{i}.gguf")).n_layers == 2


@pytest.mark.parametrize("seed", KEPT_SEEDS)
def test_a_seed_that_failed_once(seed, tmp_path):
    assert judge(seed, tmp_path) is None


def test_some_hundred_mutations():
    assert _judge_all(range(600), workers=1) == []


@pytest.mark.slow
def test_a_hundred_thousand_mutations():
    assert _judge_all(range(100_000), workers=os.cpu_count() or 1) == []
