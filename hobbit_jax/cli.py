"""What every script does at its edges: start absl, and turn a user's mistake into one line.

Owns the exit status and the shape of error messages on the command line. The library raises
exceptions and never exits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

BAD_INPUT_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells count

# What the library raises for bad input (ValueError), for what it cannot do, and for the disk.
_USER_ERRORS = (ValueError, NotImplementedError, OSError, EOFError)


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Parses flags and runs `main(argv)` as `absl.app.run` does; `argv` holds the name only.

    A mistake of the user's (a flag, a path, a file, a budget) ends with one line `error: …` on
    stderr and status 2, ctrl-C with one line and status 130. Every other exception is a bug of
    ours and keeps its traceback; `--verbosity=1` shows the traceback of the former too.
    """
    # app.run always ends in sys.exit, but does not say so.
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse_flags)
    raise RuntimeError("absl's app.run returned")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
    except (flags.Error, AttributeError) as error:  # the latter: an unknown --config.field
        _fail(error)
    if flags.FLAGS["verbosity"].using_default_value:
        # absl would take INFO, at which JAX reports each kind of device it did not find.
        logging.set_verbosity(logging.WARNING)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; every input has a flag (--help lists them)")
    return rest


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
