"""The documents of the front page: their Python runs, and what they name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"\d+\.\d+")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a Markdown text, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_python_of_a_document_prints_what_it_says(name):
    found = blocks((REPOSITORY / name).read_text(encoding="utf-8"))
    (at,) = [i for i, (language, _) in enumerate(found) if language == "python"]
    (_, code), (language, printed) = found[at : at + 2]
    assert language == "text"
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert NUMBER.sub("#", done.stdout) == NUMBER.sub("#", printed)
    # Another processor rounds otherwise, and may choose another expert here and there.
    figures = [float(number) for number in NUMBER.findall(done.stdout)]
    assert figures == pytest.approx([float(n) for n in NUMBER.findall(printed)], rel=0.1)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "WORKSPACE.md"])
def test_every_path_that_a_document_names_exists(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    rooms = "scripts|configs|tests|docs|hobbit_jax|pallas_kernels"
    written = re.findall(rf"(?<![\w/])(?:{rooms})/[\w./-]*\w", text)
    assert written
    assert [path for path in {*linked, *written} if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "WORKSPACE.md"])
def test_the_trees_have_every_room(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    rooms = [path.parent.name for path in REPOSITORY.glob("hobbit_jax/*/__init__.py")]
    assert len(rooms) > 10
    assert [room for room in rooms if not re.search(rf"(?<!\w){room}/", text)] == []


def test_the_map_has_every_log_entry():
    text = (REPOSITORY / "WORKSPACE.md").read_text(encoding="utf-8")
    entries = [f"docs/log/{path.name}" for path in (REPOSITORY / "docs/log").glob("*.md")]
    assert len(entries) > 20
    assert [entry for entry in entries if entry not in text] == []


def test_every_name_of_the_recipes_is_in_the_code():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = ("hobbit_jax", "pallas_kernels", "tests")
    sources = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    written = set(re.findall(r"`([A-Za-z_]\w*)[`.(]", text))
    assert len(written) > 20
    unknown = written - set(re.findall(r"\w+", code)) - {"make"}
    assert unknown == set()


def test_every_file_that_the_map_names_is_there():
    text = (REPOSITORY / "WORKSPACE.md").read_text(encoding="utf-8")
    rooms = [REPOSITORY / "hobbit_jax", REPOSITORY / "pallas_kernels"]
    there = {path.name for room in rooms for path in room.rglob("*.py")}
    named = set(re.findall(r"`([a-z_]+\.py)`", text))
    assert len(named) > 10
    absent = named - there
    assert absent == set()
