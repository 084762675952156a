"""Strictness for every test: no silent dtype or rank promotion anywhere in our arithmetic."""

import os
from pathlib import Path

import jax
import pytest

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
