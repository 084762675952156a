"""Strictness for every test: no silent dtype or rank promotion anywhere in our arithmetic.

And one cache of compiled programs for a whole run: its workers and the scripts that tests start
need many of the same.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import shape_names

shape_names.install()
from tiny_models import TinyModel, write_model  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# For the tests of several devices; all others run on the first, as on a machine that has one.
jax.config.update("jax_num_cpu_devices", 4)

_COMPILED = "JAX_COMPILATION_CACHE_DIR"
_COMPILED_LEAST_S = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def pytest_configure(config):
    if not hasattr(config, "workerinput") and _COMPILED not in os.environ:
        config.compiled = os.environ[_COMPILED] = tempfile.mkdtemp(prefix="hobbit_jax_compiled_")
        os.environ[_COMPILED_LEAST_S] = "0.3"
        # This process imported JAX before; workers and scripts read the environment.
        jax.config.update("jax_compilation_cache_dir", os.environ[_COMPILED])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

    if not hasattr(config, "workerinput"):
        # No test reads or fills the user's own low-precision copies.
        config.copies = os.environ["HOBBIT_CACHE_DIR"] = tempfile.mkdtemp(prefix="hobbit_jax_")


def pytest_unconfigure(config):
    if hasattr(config, "copies"):
        shutil.rmtree(config.copies, ignore_errors=True)
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)


REPOSITORY = Path(__file__).resolve().parent.parent
# It is looked for and not imported: its ggml stays out of the processes that run ours.
NEEDS_LLAMA_CPP = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp is missing: pip install -c constraints.txt -e '.[llama-cpp]'",
)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data sets (README, "Data"); tests that need them are skipped by name without."""
    path = Path(os.environ.get("HOBBIT_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}; set HOBBIT_DATA_DIR")
    return path


# For the cache, the engine and the precisions: layers of two signatures, as Q4_K_M files mix them,
# one of which serves two layers. Fixtures below; `tiny_models.MODELS` are for logits.
TWO_BANKS = TinyModel(
    "qwen3moe", 5, 4, 2, 64, 8, 2, 1e6, 1e-6,
    experts=(("Q4_K", "Q4_K", "Q4_K"), ("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q4_K")),
    dense=("Q8_0", "Q8_0", "Q8_0", "Q8_0", "F32", "F16", "Q8_0"),
)  # fmt: skip


@pytest.fixture(scope="session")
def two_banks_path(tmp_path_factory) -> Path:
    """A tiny model file with two native expert signatures."""
    path = tmp_path_factory.mktemp("two_banks") / "tiny.gguf"
    write_model(TWO_BANKS, path)
    return path


@pytest.fixture(scope="module")
def model(two_banks_path):
    """That file's dense part, computed in float32 from its blocks."""
    from hobbit_jax.models.loading import load_model  # after the settings above

    return load_model(two_banks_path, "ggml_f32")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    """The model's experts, natively and in Q2_K."""
    from hobbit_jax.experts import low_precision
    from hobbit_jax.experts.store import HostExperts

    spec, folder = low_precision.LowPrecisionSpec("Q2_K"), tmp_path_factory.mktemp("low")
    low = low_precision.open_low_precision(model.file, model.config, spec, folder)
    return HostExperts(model.config, model.file, [low])


@pytest.fixture
def workdir(tmp_path, two_banks_path) -> Iterator[Path]:
    """For the launchers: a working directory to be made, beside their trials' inputs."""
    (tmp_path / "tiny.gguf").symlink_to(two_banks_path)
    (tmp_path / "text.txt").write_text("a text of some words " * 50)
    yield tmp_path / "work"
    from launch_harness import end_sweeps  # which imports all of the package

    end_sweeps()


@pytest.fixture
def transfers(monkeypatch):
    """Counts every way in which an array of the device becomes the host's."""
    count, inside = [0], [False]

    def counting(function):
        def wrapper(array, *args, **kwargs):
            if inside[0]:  # one way goes through another
                return function(array, *args, **kwargs)
            count[0] += isinstance(array, jax.Array)
            inside[0] = True
            try:
                return function(array, *args, **kwargs)
            finally:
                inside[0] = False

        return wrapper

    for name in ("asarray", "array"):
        monkeypatch.setattr(np, name, counting(getattr(np, name)))
    # Behind device_get, int, bool, float, tolist and item.
    value = type(jax.numpy.zeros(1))._value
    monkeypatch.setattr(type(jax.numpy.zeros(1)), "_value", property(counting(value.fget)))
    return count
