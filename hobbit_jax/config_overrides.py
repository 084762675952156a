"""What `--config FILE --config.field=value` may say, told in one line where it says something else.

Owns the loading of a config's module, its fields by their paths, and the comparison of overrides
with the config as its file makes it: ml_collections names a field that does not exist by a bare
KeyError, and takes any text for an element of a tuple. It is not imported here, for machines that
only run kernels.
"""

import argparse
import ast
import difflib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

NAME = "config"


def check(argv: Sequence[str]) -> None:
    """Refuses a config that cannot be read and overrides that do not fit it.

    Args:
        argv: of the process.

    Raises:
        ValueError: no such file, no config in it, no such field (names the nearest), or a value of
            another kind than the file's own.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{NAME}", nargs="?")
    known, words = parser.parse_known_args(argv)
    given = getattr(known, NAME)
    if NAME not in flags.FLAGS or given is None:
        return
    fields = dict(leaves(_config(given), ""))
    for word in words:
        path, is_set, text = word.removeprefix(f"--{NAME}.").partition("=")
        if not word.startswith(f"--{NAME}.") or not is_set:
            continue
        if path not in fields and not any(field.startswith(f"{path}.") for field in fields):
            raise ValueError(f"--{NAME}.{path}: {given} has no such field{_nearest(path, fields)}")
        if path in fields and _are_numbers(fields[path]) and not _are_numbers(_parsed(text)):
            wanted = "numbers" if isinstance(fields[path], tuple) else "a number"
            raise ValueError(f"--{NAME}.{path} is {text!r}; want {wanted}, as {fields[path]} is")


def load_module(path: str) -> ModuleType:
    """The module of a config file."""
    spec = importlib.util.spec_from_file_location("given_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(config: Any, prefix: str = f"{NAME}.") -> Iterator[tuple[str, Any]]:
    """Fields of a config and its parts with their values, as `--config.a.b` names them."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _config(given: str) -> Any:
    path, _, argument = given.partition(":")
    if not Path(path).is_file() or not path.endswith(".py"):
        raise ValueError(f"--{NAME}: {path} is no config file; want one of Python, configs/NAME.py")
    try:
        return load_module(path).get_config(*([argument] if argument else []))
    except ValueError:
        raise
    except Exception as error:  # whatever the user's own Python raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"--{NAME}: {path} gives no config ({reason})") from error


def _nearest(path: str, fields: Mapping[str, Any]) -> str:
    by_end = [field for field in fields if field.split(".")[-1] == path.split(".")[-1]]
    nearest = by_end or difflib.get_close_matches(path, fields, n=1, cutoff=0.5)
    return f"; the nearest is {NAME}.{nearest[0]}" if nearest else ""


def _parsed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _are_numbers(value: Any) -> bool:
    values = value if isinstance(value, tuple | list) else (value,)
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return bool(values) and len(numbers) == len(values) and all(map(math.isfinite, numbers))
