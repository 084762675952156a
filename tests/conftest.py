"""Strictness for every test: no silent dtype or rank promotion anywhere in our arithmetic."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from tiny_models import TinyModel, write_model

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data sets (README, "Data"); tests that need them are skipped by name without."""
    path = Path(os.environ.get("HOBBIT_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}; set HOBBIT_DATA_DIR")
    return path


# For the cache, the engine and the tiers: layers of two signatures, as Q4_K_M files mix them,
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


@pytest.fixture
def workdir(tmp_path, two_banks_path) -> Iterator[Path]:
    """For the launchers: a working directory to be made, beside their cells' inputs."""
    (tmp_path / "tiny.gguf").symlink_to(two_banks_path)
    (tmp_path / "text.txt").write_text("a text of some words " * 50)
    yield tmp_path / "work"
    from launch_harness import end_drivers  # which imports all of the package

    end_drivers()
