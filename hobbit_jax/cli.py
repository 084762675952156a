"""What every script does at its edges.

Owns the start of absl, the exit status, the shape of error messages, and the checks of what flags
name: files to read, files and folders to write, lists of numbers. The library raises exceptions and
never exits.
"""

from __future__ import annotations

import io
import logging as standard_logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from hobbit_jax import config_overrides

BAD_INPUT_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count
MAX_COUNT = 2**31 - 1  # of tokens, windows and the like: what JAX indexes by
MAX_MIB = 2.0**40  # so that a budget in bytes fits 64 bits

# What the library raises for bad input (ValueError), for what it cannot do, and for the disk.
_USER_ERRORS = (ValueError, NotImplementedError, OSError, EOFError)
# Libraries that log much at INFO and DEBUG; `--verbosity=2` lets them.
_TALKATIVE = ("jax", "orbax", "matplotlib", "numba", "asyncio", "fsspec", "urllib3", "filelock")


class _VersionFlag(flags.BooleanFlag):
    """Prints the version and ends, as `--help` does."""

    def __init__(self):
        super().__init__("version", False, "Print the version and exit.")

    def parse(self, argument):
        if self._parse(argument):
            print(f"hobbit_jax {metadata.version('hobbit_jax')}, jax {metadata.version('jax')}")
            sys.exit(0)


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Parses flags and runs `main(argv)` as `absl.app.run` does; `argv` holds the name only.

    A mistake of the user's (a flag, a path, a file, a budget) ends with one line `error: …` on
    stderr and status 2, ctrl-C with one line and status 130. Every other exception is a bug of
    ours and keeps its traceback; `--verbosity=1` shows the traceback of the former too.
    """
    flags.DEFINE_flag(_VersionFlag(), module_name=sys.argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors != "backslashreplace":
        # A console that lacks a character shows "?" in its place, and the rest is printed.
        sys.stdout.reconfigure(errors="replace")
    # app.run always ends in sys.exit, but does not say so.
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse_flags)
    raise RuntimeError("absl's app.run returned")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        config_overrides.check(argv)
        rest = flags.FLAGS(list(argv))
    except (flags.Error, ValueError, AttributeError, LookupError, TypeError) as error:
        _fail(error)  # all but the first two are ml_collections' words for a config that is none
    except SystemExit:  # by --help and its kin alone, which absl ends with status 1
        sys.exit(0)
    if flags.FLAGS["verbosity"].using_default_value:
        # absl would take INFO.
        logging.set_verbosity(logging.WARNING)
    for level in (standard_logging.WARNING, standard_logging.ERROR, standard_logging.INFO):
        standard_logging.addLevelName(level, standard_logging.getLevelName(level).lower())
    # A user reads "warning: …" beside "error: …", not absl's thread number and line.
    logging.get_absl_handler().setFormatter(
        standard_logging.Formatter("%(levelname)s: %(message)s")
    )
    if logging.get_verbosity() <= logging.DEBUG:
        for name in _TALKATIVE:
            standard_logging.getLogger(name).setLevel(standard_logging.WARNING)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; every input has a flag (--help lists them)")
    _check_numbers()
    return rest


def _check_numbers() -> None:
    """Refuses what absl lets pass: NaN is within its every range, and so is infinity in most."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            _fail(f"--{name} is {value}; want a finite number")


def numbers(
    flag: flags.FlagHolder, kind: type[int] | type[float], lower: float, upper: float
) -> list[Any]:
    """The values of a flag that lists numbers.

    Args:
        flag: of a list of strings.
        kind: int or float.
        lower: the least that is allowed.
        upper: the most.

    Raises:
        ValueError: one of them is no number, or out of range; or there is none.
    """
    found = []
    for text in flag.value:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lower <= value <= upper:
            noun = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"--{flag.name} has {text!r}; want {noun} from {lower:g} to {upper:g}")
        found.append(value)
    if not found:
        raise ValueError(f"--{flag.name} is empty; want at least one number")
    return found


def input_file(flag: str, path: str | os.PathLike) -> Path:
    """A file that is there and can be read.

    Raises:
        ValueError: it is not, or it is a folder; names the flag.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"--{flag}: {file} is a folder; want a file")
    try:
        file.open("rb").close()
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag}: {file} cannot be read ({_reason(error)})") from error
    return file


def input_folder(flag: str, path: str | os.PathLike) -> Path:
    """A folder that is there and can be listed.

    Raises:
        ValueError: it is not, or it is a file; names the flag.
    """
    folder = Path(path)
    try:
        os.listdir(folder)
    except NotADirectoryError as error:
        raise ValueError(f"--{flag}: {folder} is a file; want a folder") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag}: {folder} cannot be read ({_reason(error)})") from error
    return folder


def input_text(flag: str, path: str | os.PathLike) -> str:
    """The UTF-8 text of a file.

    Raises:
        ValueError: no such file, or it holds no text; names the flag.
    """
    file = input_file(flag, path)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--{flag}: {file} is no UTF-8 text (byte {error.start}); want a text file"
        ) from error
    if not text.strip():
        raise ValueError(f"--{flag}: {file} holds no text")
    return text


def output_file(flag: str, path: str | os.PathLike) -> Path:
    """Where a file can be written; its folder is made where it is missing.

    To be called before anything is computed, so that no result is lost for want of a place.

    Raises:
        ValueError: it names a folder or a device, or the place cannot be written; names the flag.
    """
    file = Path(path)
    if str(path).endswith(os.sep) or (_exists(flag, file) and file.is_dir()):
        raise ValueError(f"--{flag}: {path} is a folder; want the name of a file")
    if _exists(flag, file) and not file.is_file():
        raise ValueError(f"--{flag}: {file} is no ordinary file, and would be replaced by one")
    _make_writable(flag, file.parent, file)
    return file


def output_folder(flag: str, path: str | os.PathLike) -> Path:
    """A folder that files can be written to; it is made where it is missing.

    To be called before anything is computed, so that no result is lost for want of a place.

    Raises:
        ValueError: it names a file, or the place cannot be written; names the flag.
    """
    folder = Path(path)
    if _exists(flag, folder) and not folder.is_dir():
        raise ValueError(f"--{flag}: {folder} is a file; want the name of a folder")
    _make_writable(flag, folder, folder)
    return folder


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)  # a zero byte


def _exists(flag: str, path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag}: {path} cannot be written ({_reason(error)})") from error
    return True


def _make_writable(flag: str, folder: Path, path: Path) -> None:
    """Makes `folder` and tries a file in it: permissions alone do not tell of a read-only disk.

    The probe is as long as the temporary name of `path` will be, in case the name is too long.
    """
    probe = folder / f".{path.name}.{secrets.token_hex(6)}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--{flag}: {folder} is no folder to write to") from error
    except OSError as error:
        raise ValueError(
            f"--{flag}: {path} cannot be written ({_reason(error)}); give another place"
        ) from error


def _guarded(main: Callable[[list[str]], Any], argv: list[str]) -> Any:
    try:
        return main(argv)
    except _USER_ERRORS as error:
        if logging.level_debug():
            raise
        _fail(error)
    except KeyboardInterrupt:
        print("\nerror: interrupted; nothing finished is lost", file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)


def _fail(error: Exception | str) -> NoReturn:
    text = str(error)
    if isinstance(error, AttributeError):  # ml_collections quotes its own message
        text = text.strip("'\"").replace("\\n", " ").replace("\\'", "'")
    if "Traceback" in text:  # ml_collections folds a config file's own traceback into its message
        text = text.strip().splitlines()[-1]
    line = " ".join(text.split()) or type(error).__name__
    print(f"error: {line}", file=sys.stderr)
    sys.exit(BAD_INPUT_STATUS)
