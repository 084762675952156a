"""What every script does at its edges.

Owns the start of absl, the exit status, the shape of error messages, and the checks of what flags
name: files to read, files and folders to write. What fails such a check is a ValueError that names
the flag. The library raises exceptions and never exits.
"""

import io
import logging as standard_logging
import math
import os
import secrets
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from hobbit_jax import config_overrides

BAD_INPUT_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count
UNREAD_STATUS = 141  # 128 + SIGPIPE
MAX_COUNT = 2**31 - 1  # of tokens, windows and the like: what JAX indexes by
MAX_MIB = 2.0**40  # so that a budget in bytes fits 64 bits

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
    stderr and status 2, ctrl-C with one line and status 130, and output that nobody reads any more
    (`| head`) in silence. Every other exception is a bug of ours and keeps its traceback;
    `--verbosity=1` shows the traceback of the former too.
    """

    def guarded(argv: list[str]) -> Any:
        try:
            return main(argv)
        except BrokenPipeError:
            raise
        # Bad input, what the library cannot do, and the disk.
        except (ValueError, NotImplementedError, OSError, EOFError) as error:
            if logging.level_debug():
                raise
            _fail(error)
        except KeyboardInterrupt:
            print("\nerror: interrupted; nothing finished is lost", file=sys.stderr)
            sys.exit(INTERRUPTED_STATUS)

    flags.DEFINE_flag(_VersionFlag(), module_name=sys.argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors != "backslashreplace":
        # A console that lacks a character shows "?" in its place, and the rest is printed.
        sys.stdout.reconfigure(errors="replace")
    try:
        # It always ends in sys.exit, but does not say so.
        app.run(guarded, flags_parser=_parse_flags)
    except BrokenPipeError as error:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not output.poll(0):
            _fail(error)  # it is another pipe, such as that of a worker
        # What is left in the buffer would raise once more when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD_STATUS)
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
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        # absl lets NaN pass, which is within its every range, and infinity in most.
        if isinstance(value, float) and not math.isfinite(value):
            _fail(f"--{name} is {value}; want a finite number")
    return rest


class Parsed(flags.ArgumentParser):
    """Of a flag whose value is what a function makes of the text."""

    def __init__(self, parse: Callable[[str], Any], syntactic_help: str):
        self._read, self.syntactic_help = parse, syntactic_help

    def parse(self, argument: Any) -> Any:
        """See `flags.ArgumentParser.parse`."""
        return self._read(str(argument))


def define_list(
    name: str, parse: Callable[[str], Any], default: str | None, text: str
) -> flags.FlagHolder[Any]:
    """Defines a flag of the script that lists values, separated by commas.

    `parse` makes a value of its text, or raises ValueError. The default is as on a command line.
    """
    parser = Parsed(lambda listed: [parse(one) for one in listed.split(",")], "a list with commas")
    holder = flags.DEFINE(parser, name, default, text, module_name=sys.argv[0])
    flags.FLAGS[name].default_as_str = default  # --help says what can be typed
    return holder


@contextmanager
def _naming(flag: str, path: str | os.PathLike, what: str) -> Iterator[None]:
    """Refuses with the flag and the path what the file system refuses."""
    try:
        yield
    except (OSError, ValueError) as error:  # the latter of a zero byte
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ValueError(f"--{flag}: {path} cannot be {what} ({reason})") from error


def input_file(flag: str, path: str | os.PathLike) -> Path:
    """A file that is there and can be read."""
    with _naming(flag, path, "read"):
        Path(path).open("rb").close()
    return Path(path)


def input_folder(flag: str, path: str | os.PathLike) -> Path:
    """A folder that is there and can be listed."""
    with _naming(flag, path, "read"):
        os.listdir(path)
    return Path(path)


def input_text(flag: str, path: str | os.PathLike) -> str:
    """The UTF-8 text of a file."""
    with _naming(flag, path, "read"):
        data = Path(path).read_bytes()
    return utf8(data, f"--{flag}: {path}")


def utf8(data: bytes, name: str) -> str:
    """The text of some bytes.

    Raises:
        ValueError: they are none; begins with `name`.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text (byte {error.start})") from None


def output_file(flag: str, path: str | os.PathLike) -> Path:
    """Where a file, but no device, can be written; its folder is made where it is missing.

    To be called before anything is computed, so that no result is lost for want of a place.
    """
    file = Path(path)
    with _naming(flag, path, "written"):
        if str(path).endswith(os.sep) or file.is_dir():
            raise IsADirectoryError("a folder; want the name of a file")
        if file.exists() and not file.is_file():
            raise OSError("no ordinary file, and would be replaced by one")
        _try_file(file.parent, file.name)
    return file


def output_folder(flag: str, path: str | os.PathLike) -> Path:
    """A folder that files can be written to, made where it is missing; called as `output_file`."""
    with _naming(flag, path, "written"):
        _try_file(Path(path), "")
    return Path(path)


def _try_file(folder: Path, name: str) -> None:
    """Makes `folder` and a file in it: permissions alone do not tell of a read-only disk.

    The file's name is as long as the temporary one of `name` will be, in case that is too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{name}.{secrets.token_hex(6)}.partial"
    probe.touch()
    probe.unlink()


def _fail(error: Exception | str) -> NoReturn:
    text = str(error)
    if isinstance(error, AttributeError):  # ml_collections quotes its own message
        text = text.strip("'\"").replace("\\n", " ").replace("\\'", "'")
    if "Traceback" in text:  # ml_collections folds a config file's own traceback into its message
        text = text.strip().splitlines()[-1]
    line = " ".join(text.split()) or type(error).__name__
    print(f"error: {line}", file=sys.stderr)
    sys.exit(BAD_INPUT_STATUS)
