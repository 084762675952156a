"""Two checkouts timed in turns, also one from before its modules had rooms."""

import pytest
from conftest import REPOSITORY

from hobbit_jax.evals.host_overhead import time_in_turns, write_hollow_model

WHERE = {"engine": "inference", "store": "experts", "loading": "model"}


@pytest.fixture
def flat_checkout(tmp_path):
    """This checkout, with the three modules beside the rooms; each notes that it was imported."""
    package = tmp_path / "checkout" / "hobbit_jax"
    package.mkdir(parents=True)
    for path in (REPOSITORY / "hobbit_jax").iterdir():
        (package / path.name).symlink_to(path)
    (package.parent / "pallas_kernels").symlink_to(REPOSITORY / "pallas_kernels")
    for name, room in WHERE.items():
        (package / f"{name}.py").write_text(
            f"from pathlib import Path\nfrom hobbit_jax.{room}.{name} import *\n"
            f"Path({str(tmp_path)!r}, '{name}.imported').touch()\n"
        )
    return package.parent


def test_each_checkout_is_timed_by_its_own_modules(tmp_path, flat_checkout):
    model = tmp_path / "hollow.gguf"
    write_hollow_model(model, 2)
    seconds = time_in_turns([flat_checkout, REPOSITORY], [f"--model={model}", "--tokens=4"], 2)
    assert [len(turns) for turns in seconds] == [2, 2] and min(map(min, seconds)) > 0
    assert {path.stem for path in tmp_path.glob("*.imported")} == set(WHERE)
    with pytest.raises(RuntimeError, match="the timed process ended with status"):
        time_in_turns([REPOSITORY], [f"--model={tmp_path / 'none.gguf'}"], 1)
