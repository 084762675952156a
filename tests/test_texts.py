"""Texts for calibration and evaluation, by name and from files."""

import json

import pytest

from hobbit_jax.sweep import texts


def test_parts_give_as_many_characters_each(tmp_path):
    short, long = tmp_path / "short.txt", tmp_path / "long.jsonl"
    short.write_text("a" * 500)
    long.write_text(
        "\n".join(json.dumps({"question": "b" * 60, "n": 1, "answer": "c" * 39}) for _ in range(50))
    )
    first, *rest = texts.calibration_documents(f"{short}, {long}")
    assert first == "a" * 500
    assert rest == ["b" * 60 + "\n" + "c" * 39] * 5
    code = sum(map(len, texts.calibration_documents("code")))
    tasks = sum(map(len, texts.calibration_documents("mixed"))) - code
    assert 0.99 * code < tasks <= code


def test_a_single_document_is_cut(tmp_path):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("a" * 50)
    long.write_text("b" * 500)
    assert texts.calibration_documents(f"{long},{short}") == ["b" * 50, "a" * 50]


def test_data_sets_have_a_half_for_either(monkeypatch, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for half in ("train", "test"):
        (tmp_path / "gsm8k" / f"{half}.jsonl").write_text(json.dumps({"question": half}))
    monkeypatch.setenv(texts.DATA_VARIABLE, str(tmp_path))
    assert texts.calibration_documents("gsm8k") == ["train"]
    assert texts.evaluation_documents("gsm8k") == ["test"]
    monkeypatch.setenv(texts.DATA_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"^\$HOBBIT_DATA_DIR is .*none; want the folder"):
        texts.evaluation_documents("gsm8k")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": "b"}\n{', "line 2 is no JSON"), (b"[1]", "line 1 is list; want an object"),
     (b"\xff", r"no UTF-8 text \(byte 0\)"), (None, "cannot be read")],
)  # fmt: skip
def test_a_file_that_is_no_text(tmp_path, content, message):
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts.evaluation_documents(str(path))
