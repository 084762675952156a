"""How a script ends: one line for a user's mistake, a traceback for a bug of ours."""

import subprocess
import sys

import pytest

from hobbit_jax import reference

SCRIPT = """
import logging
from absl import flags
from hobbit_jax import cli

_LIMIT = flags.DEFINE_integer("limit", 1, "at least 1", 1)
_RAISE = flags.DEFINE_string("raises", None, "an exception, as Python writes it")

def main(argv):
    if _RAISE.value:
        raise eval(_RAISE.value)
    logging.getLogger("jax").info("no TPU here")
    print(_LIMIT.value, len(argv))

cli.run(main)
"""


def run(*args: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", SCRIPT, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_success():
    assert run("--limit=3") == (0, "3 1\n", "")
    assert "no TPU here" in run("--verbosity=0")[2]


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("ValueError('got 1;\\n  want 2')", "error: got 1; want 2\n"),
        ("NotImplementedError('no')", "error: no\n"),
        ("FileNotFoundError(2, 'No such file', 'x')", "error: [Errno 2] No such file: 'x'\n"),
        ("PermissionError('locked')", "error: locked\n"),
        ("ValueError()", "error: ValueError\n"),
    ],
)
def test_a_mistake_is_one_line(raised, line):
    assert run(f"--raises={raised}") == (2, "", line)


@pytest.mark.parametrize(
    ("arg", "message"),
    [("--limit=0", "--limit=0"), ("--limt=1", "'limt'"), ("stray", "argument 'stray'")],
)
def test_bad_flags_are_one_line(arg, message):
    status, out, err = run(arg)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


def test_interrupt():
    assert run("--raises=KeyboardInterrupt()") == (
        130,
        "",
        "\nerror: interrupted; nothing finished is lost\n",
    )


def test_bugs_keep_their_traceback():
    status, _, err = run("--raises=RuntimeError('broken invariant')")
    assert status == 1 and "Traceback" in err and "RuntimeError: broken invariant" in err
    status, _, err = run("--raises=ValueError('got 1')", "--verbosity=1")
    assert status == 1 and "Traceback" in err


def test_absent_reference_model(monkeypatch):
    monkeypatch.setattr(reference, "MODEL_NAME", "absent.gguf")
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf is not .*--model"):
        reference.model_path()
