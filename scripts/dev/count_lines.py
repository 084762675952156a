"""Prints lines of Python by room, from GGUF to logits, and functions longer than 60 lines.

    python scripts/dev/count_lines.py

From GGUF to logits are the modules that importing and running scripts/logits.py needs: its imports
and theirs, wherever in a module they stand.
"""

import ast
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRY = Path("scripts/logits.py")
LONGEST = 60  # lines of a function


def files() -> list[Path]:
    """Python files that git tracks, relative to the repository."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (REPOSITORY / line).is_file()]


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))


def lines(paths: Iterable[Path]) -> int:
    """Of all these files."""
    return sum((REPOSITORY / path).read_text(encoding="utf-8").count("\n") for path in paths)


def imported(path: Path, modules: dict[str, Path]) -> set[Path]:
    """Files of `modules` (by dotted name) that a file imports, with the packages they are in."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    packages = {".".join(name.split(".")[:n]) for name in names for n in range(1, 9)}
    return {modules[name] for name in names | packages if name in modules}


def closure(entry: Path, modules: dict[str, Path]) -> set[Path]:
    """A file, and all that it needs."""
    found, left = {entry}, [entry]
    while left:
        new = imported(left.pop(), modules) - found
        found |= new
        left += new
    return found


def main() -> None:
    tracked = files()
    modules = {".".join(path.with_suffix("").parts): path for path in tracked}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    rooms = Counter()
    for path in tracked:
        room = "/".join(path.parts[: 2 if path.parts[0] == "hobbit_jax" else 1])
        rooms[room] += lines([path])
    for room, count in rooms.most_common():
        print(f"{count:6}  {room}")
    print(f"{rooms.total() - rooms['tests']:6}  all but tests")
    needed = closure(ENTRY, modules)
    print(f"{lines(needed):6}  from GGUF to logits, in {len(needed)} files")
    for path in tracked:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > LONGEST:
                    print(f"{count:6}  {path}:{node.lineno} {node.name}")


if __name__ == "__main__":
    main()
