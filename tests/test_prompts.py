"""Prompts on the command line: files, standard input, templates, and where the text ends."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

QUESTION = "def f(x):"


def run(script: str, *args: str, stdin: bytes = b"", **environment: str) -> tuple[int, str, str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / script), *args]
    done = subprocess.run(
        command, input=stdin, capture_output=True, timeout=300, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def cases(data_dir) -> Path:
    """Small model files that users have met."""
    folder = data_dir.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    return folder


def test_a_text_becomes_ids_from_a_flag_a_file_or_standard_input(tmp_path):
    _, wanted, _ = run("text_to_ids.py", "--prompt", QUESTION)
    assert wanted.startswith("0,")  # the reference model's BOS
    file, out = tmp_path / "question.txt", tmp_path / "ids.npy"
    file.write_bytes(f"{QUESTION}\r\n".encode())
    assert run("text_to_ids.py", f"--prompt_file={file}", f"--out={out}") == (0, "", "")
    assert np.load(out).tolist() == [int(i) for i in wanted.split(",")]
    assert np.load(out).dtype == np.int32
    assert run("text_to_ids.py", "--prompt_file=-", stdin=QUESTION.encode())[1] == wanted


@pytest.mark.parametrize(
    ("args", "stdin", "reason"),
    [
        ((), b"", "want one of --prompt and --prompt_file"),
        (("--prompt=a", "--prompt_file=-"), b"b", "want one of --prompt and --prompt_file"),
        (("--prompt_file=nowhere",), b"", "--prompt_file: nowhere cannot be read"),
        (("--prompt_file=-",), b"a\xff", "--prompt_file: - is no UTF-8 text (byte 1)"),
        (("--prompt=a", "--chat"), b"", "no chat template"),
    ],
)
def test_a_prompt_that_cannot_be_had_is_one_line(args, stdin, reason):
    status, out, err = run("text_to_ids.py", *args, stdin=stdin)
    assert (status, out) == (2, "") and reason in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_chat_template_wraps_the_prompt(cases):
    model = f"--model={cases / 'template_generation_tag' / 'model.gguf'}"
    wrapped = run("text_to_ids.py", model, "--prompt=a", "--chat")
    plain = run("text_to_ids.py", model, "--prompt=a")
    assert wrapped[0] == plain[0] == 0
    assert len(wrapped[1].split(",")) > len(plain[1].split(",")) == 1


@pytest.mark.slow
def test_a_generation_ends_and_goes_on(cases):
    model = f"--model={cases / 'eog_endoftext' / 'model.gguf'}"
    shared = (model, "--prompt=a", "--max_new_tokens=6")
    assert run("generate.py", *shared)[1] == "bc\n"
    assert run("generate.py", *shared, "--ignore_eos")[1] == "bcxyz\n"


@pytest.mark.slow
def test_a_console_that_lacks_a_character_shows_another(cases):
    model = f"--model={cases / 'double_bos' / 'model.gguf'}"
    shared = ("generate.py", model, "--prompt=<s>[INST] hi [/INST]", "--max_new_tokens=3")
    status, out, err = run(*shared, PYTHONIOENCODING="ascii")
    assert status == 0 and "?" in out and "hit rate" in err
    whole = run(*shared, PYTHONIOENCODING="utf-8")[1]
    assert out == whole.encode("ascii", errors="replace").decode()
