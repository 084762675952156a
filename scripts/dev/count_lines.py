"""Prints lines of Python by room, from GGUF to logits, and functions longer than 60 lines.

    python scripts/dev/count_lines.py

From GGUF to logits are the modules that importing and running scripts/logits.py needs: its imports
and theirs, wherever in a module they stand.
"""

import ast
import subprocess
from collections import Counter
from modulefinder import ModuleFinder
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRY = Path("scripts/logits.py")
LONGEST = 60  # lines of a function


def text(path: Path) -> str:
    """Of a file of the repository."""
    return (REPOSITORY / path).read_text(encoding="utf-8")


def needed(entry: Path) -> list[Path]:
    """A script, and what of the repository it imports, wherever in a module that stands."""
    finder = ModuleFinder(path=[str(REPOSITORY)])
    finder.run_script(str(REPOSITORY / entry))
    paths = (getattr(module, "__file__", None) for module in finder.modules.values())
    return [Path(path) for path in paths if path]


def main() -> None:
    command = ["git", "-C", str(REPOSITORY), "ls-files", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tracked = [Path(line) for line in listed.splitlines() if (REPOSITORY / line).is_file()]
    rooms = Counter()
    for path in tracked:
        room = "/".join(path.parts[: 2 if path.parts[0] == "hobbit_jax" else 1])
        rooms[room] += text(path).count("\n")
    for room, count in rooms.most_common():
        print(f"{count:6}  {room}")
    print(f"{rooms.total() - rooms['tests']:6}  all but tests")
    ours = needed(ENTRY)
    count = sum(text(path).count("\n") for path in ours)
    print(f"{count:6}  from GGUF to logits, in {len(ours)} files")
    for path in tracked:
        for node in ast.walk(ast.parse(text(path))):
            if isinstance(node, ast.FunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > LONGEST:
                    print(f"{count:6}  {path}:{node.lineno} {node.name}")


if __name__ == "__main__":
    main()
