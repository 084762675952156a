"""How a script ends: one line for a user's mistake, a traceback for a bug of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hobbit_jax import cli, reference

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import logging
from absl import flags
from hobbit_jax import cli

_LIMIT = flags.DEFINE_integer("limit", 1, "at least 1", 1)
_SHARE = flags.DEFINE_float("share", 0.5, "0 to 1", 0.0, 1.0)
_COUNTS = cli.define_list("counts", flags.IntegerParser(1, 4).parse, "2", "1 to 4")
_RAISE = flags.DEFINE_string("raises", None, "an exception, as Python writes it")

def main(argv):
    if _RAISE.value:
        raise eval(_RAISE.value)
    logging.getLogger("jax").info("no TPU here")
    print(_LIMIT.value, len(argv), _COUNTS.value)

cli.run(main)
"""


BAD_LISTS = ("", "x", "0", "1,,2", "2.5", "nan")


def run(*args: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", SCRIPT, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_success():
    assert run("--limit=3") == (0, "3 1 [2]\n", "")
    assert run("--counts=3,1") == (0, "1 1 [3, 1]\n", "")
    assert "no TPU here" not in run("--verbosity=1")[2]
    assert "no TPU here" in run("--verbosity=2")[2]


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
    [
        ("--limit=0", "--limit=0"),
        *((f"--counts={bad}", "--counts=") for bad in BAD_LISTS),
        ("--limt=1", "'limt'"),
        ("stray", "argument 'stray'"),
    ],
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


@pytest.mark.parametrize("flag", ["--help", "--helpfull", "--version", "--helpshort"])
def test_help_succeeds(flag):
    status, out, err = run(flag)
    assert (status, err) == (0, "") and out


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf"])
def test_absl_ranges_let_no_nan_pass(text):
    status, _, err = run(f"--share={text}")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "share" in err and "number" in err


def test_output_places(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    made = tmp_path / "new" / "folder"
    assert cli.output_file("out", made / "x.npy") == made / "x.npy"
    assert cli.output_folder("out", made / "y") == made / "y"
    assert sorted(made.rglob("*")) == [made / "y"]  # nothing but folders is left behind
    assert cli.output_file("out", file) == file and file.read_text() == "kept"
    for path in (tmp_path, f"{tmp_path}/x/", "/dev/null", file / "x", "/proc/x.npy", "a\0b"):
        with pytest.raises(ValueError, match=r"^--out: "):
            cli.output_file("out", path)
    for path in (file, file / "x", "/proc/x", "x" * 300):
        with pytest.raises(ValueError, match=r"^--workdir: "):
            cli.output_folder("workdir", path)


def test_input_places(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff")
    (tmp_path / "text").write_text("ä", encoding="utf-8")
    assert cli.input_text("text", tmp_path / "text") == "ä"
    assert cli.input_folder("data_dir", tmp_path) == tmp_path
    for name in ("binary", "absent", "", "text/x", "a\0b"):
        with pytest.raises(ValueError, match=r"^--text: "):
            cli.input_text("text", tmp_path / name)
    for name in ("text", "absent"):
        with pytest.raises(ValueError, match=r"^--data_dir: "):
            cli.input_folder("data_dir", tmp_path / name)


@pytest.mark.parametrize("flag", ["--help", "--limit=3"])
def test_output_that_nobody_reads_ends_in_silence(flag):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", SCRIPT, flag]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (cli.UNREAD_STATUS, "")


def test_another_broken_pipe_is_an_error():
    assert run("--raises=BrokenPipeError(32, 'Broken pipe')") == (
        2, "", "error: [Errno 32] Broken pipe\n"
    )  # fmt: skip


def test_compiled_programs_are_kept_for_later_processes(tmp_path):
    program = """
import jax
from hobbit_jax import cache_folder
cache_folder._LEAST_COMPILE_S = 0.0
cache_folder.keep_compiled_programs()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
jax.jit(lambda x: x * 3 + 1)(2.0)
print(sum(hits))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"HOBBIT_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
        for _ in range(2)
    )
    assert first == "0\n" and int(second) > 0
    (folder,) = (tmp_path / "cache" / "compiled").iterdir()  # of this kind of processor
    assert any(folder.glob("*-cache"))
    # A user's own folder stays.
    env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "own")
    subprocess.run(command, capture_output=True, env=env, check=True)
    assert (tmp_path / "own").is_dir()
    # And a folder that cannot be made costs time, and nothing else.
    env = {k: v for k, v in env.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env["HOBBIT_CACHE_DIR"] = os.devnull
    assert subprocess.run(command, capture_output=True, text=True, env=env).stdout == "0\n"
