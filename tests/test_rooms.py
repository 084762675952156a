"""The house: kernels import nothing of ours, and no room needs one that needs it."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, path
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def needs(package: str) -> dict[str, set[str]]:
    """What each room of a package, or file beside them, imports of the others."""
    needed = defaultdict(set)
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        room = path.relative_to(REPOSITORY / package).parts[0].removesuffix(".py")
        others = {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")}
        needed[room] |= others - {room}
    return needed


def test_no_room_needs_one_that_needs_it():
    order = list(TopologicalSorter(needs("hobbit_jax")).static_order())  # else a CycleError
    way = ["model_file", "experts", "cache", "inference", "evals", "importance", "sweep", "launch"]
    assert [room for room in order if room in way] == way


def test_nothing_that_runs_a_model_needs_how_the_reference_model_was_made():
    needed = needs("hobbit_jax")
    assert "reference_model" in needed
    assert not [room for room, others in needed.items() if "reference_model" in others]


def test_the_kernels_are_a_leaf_and_policies_know_no_jax():
    for path in (REPOSITORY / "pallas_kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "hobbit_jax" for name in imported(path)), path
    for path in (REPOSITORY / "hobbit_jax" / "cache" / "policies").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"jax", "flax"}, path
