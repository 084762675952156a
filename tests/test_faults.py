"""Faults in the middle of decode: one clear error, a whole pool, and the same bits afterwards."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest
from pool_invariants import check_invariants

import hobbit_jax.cache.device_banks as device_banks
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.cache.controller import OnRouting
from hobbit_jax.cache.link import Link
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.model_file.gguf_file import open_gguf
from hobbit_jax.models.loading import load_model

PROMPT, NEW_TOKENS, CHUNK = [5, 200, 17, 17, 99, 3, 250, 11], 6, 8


def engine_of(model, experts) -> Engine:
    """Slots for half of each layer's experts, so that every token misses."""
    store = HostExperts(model.config, experts)
    return Engine(model, store, CacheConfig(store.precision_bytes(0) // 2, chunk_tokens=CHUNK))


def tokens(engine) -> list[int]:
    return [int(ids_B[0]) for ids_B, _ in engine.generate([PROMPT], NEW_TOKENS)]


def check_refuses_to_go_on(engine) -> None:
    with pytest.raises(RuntimeError, match="call start first"):
        engine.decode(np.asarray([7]))


@pytest.fixture(scope="module")
def model(two_banks_path):
    return load_model(two_banks_path, "xla")


@pytest.fixture(scope="module")
def engine(model):
    return engine_of(model, model.file)


@pytest.fixture(scope="module")
def wanted(engine):
    return tokens(engine)


@pytest.fixture(scope="module")
def uploads(engine, wanted):
    """Of a run with a warm pool."""
    engine.counts.take()
    assert tokens(engine) == wanted
    return int(engine.counts.misses)


def _failing(function, after: int, error: BaseException, also_runs: bool):
    calls = [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] != after:
            return function(*args, **kwargs)
        if also_runs:
            function(*args, **kwargs)
        raise error

    return wrapper


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
@pytest.mark.parametrize(
    ("what", "error", "also_runs"),
    [
        ("device_put", RuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        ("device_put", KeyboardInterrupt(), True),
        ("_write_slot", RuntimeError("INTERNAL"), False),
        ("_write_slot", KeyboardInterrupt(), True),  # banks donated, their successors lost
    ],
)
def test_a_failing_upload(engine, wanted, uploads, monkeypatch, what, error, also_runs, share):
    """In prefill or decode, before or after the device took it: an error and a whole pool."""
    module, after = jax if what == "device_put" else device_banks, 1 + int(share * uploads)
    with monkeypatch.context() as patch:
        patch.setattr(engine.pool, "link", Link())  # as a GPU has it
        patch.setattr(module, what, _failing(getattr(module, what), after, error, also_runs))
        with pytest.raises(type(error)) as raised:
            tokens(engine)
    if what == "device_put" and not also_runs:
        assert "the upload of expert" in str(raised.value) and "out of memory" in str(raised.value)
    check_invariants(engine.pool, engine.store)
    check_refuses_to_go_on(engine)
    assert tokens(engine) == wanted


def test_an_interrupt_during_decode(engine, wanted):
    """A real SIGINT while the device decodes; what was yielded before it stands."""
    seen = []
    # A test runner's worker may ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(routed):
        if len(seen) == 2 and routed.layer == 1:
            signal.raise_signal(signal.SIGINT)

    with engine.observed_by(OnRouting(interrupt)), pytest.raises(KeyboardInterrupt):
        for ids_B, _ in engine.generate([PROMPT], NEW_TOKENS):
            seen.append(int(ids_B[0]))
    signal.signal(signal.SIGINT, handler)
    assert seen == wanted[:2]
    check_invariants(engine.pool, engine.store)
    check_refuses_to_go_on(engine)
    assert tokens(engine) == wanted


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def _rewrite(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(path, ns=(0, 0))


def _replace(path):
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    os.replace(copy, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (os.unlink, r"disappeared while it was in use \(No such file"),
        (_truncate, "changed while it was in use"),
        (_rewrite, "changed while it was in use"),
        (_replace, "changed while it was in use"),
    ],
)
def test_a_file_that_changes_under_the_map(
    model, two_banks_path, tmp_path, wanted, damage, message
):
    """Refused before a byte of it is read: a read past a file's new end would kill the process."""
    path = tmp_path / "model.gguf"
    shutil.copy2(two_banks_path, path)
    engine = engine_of(model, open_gguf(path))
    steps = engine.generate([PROMPT], NEW_TOKENS)
    seen = [int(next(steps)[0][0])]
    damage(path)
    with pytest.raises(OSError, match=rf"{path}: {message}"):
        for ids_B, _ in steps:
            seen.append(int(ids_B[0]))
    assert seen == wanted[: len(seen)]
    check_refuses_to_go_on(engine)
    shutil.copy2(two_banks_path, path)
    check_invariants(engine.pool, HostExperts(model.config, open_gguf(path)))
