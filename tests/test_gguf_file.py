"""Files: what is written comes back, and what is broken is refused in one clear sentence."""

import os
import struct
import time

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_oracle import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from hobbit_jax.model_file import gguf_header
from hobbit_jax.model_file.gguf_file import TensorInfo, check_finite_scales, open_gguf, write_gguf
from pallas_kernels.formats import FORMATS, get_format

METADATA = {
    "general.architecture": "qwen3moe",
    "general.name": "größe",
    "qwen3moe.block_count": 3,
    "qwen3moe.rope.freq_base": 1e6,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["a", "", "Ġb"],
    "tokenizer.ggml.token_type": [1, 3, 1],
    "tokenizer.ggml.scores": [0, -1, -2],
    "x.negative": -5,
    "x.large": 1 << 40,
    "x.flags": [True, False],
    "x.numbers": [1, 2],
    "x.empty": "",
}


def row_bytes(format_name: str, weights: int) -> int:
    return get_format(format_name).row_bytes(weights)


def random_tensor(name: str, format_name: str, shape: tuple[int, ...], seed: int = 0):
    raw = np.random.default_rng(seed).integers(
        0, 0x3C, (*shape[:-1], row_bytes(format_name, shape[-1])), dtype=np.uint8
    )  # every byte below 0x3C: as the high byte of an f16, a finite number
    return name, format_name, shape, raw


def refused(path, *errors) -> str:
    with pytest.raises(errors or ValueError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message and str(path.name) in message
    return message


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(path, bytes up to the end of the last tensor) of a file with every kind of content."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    tensors = [random_tensor("a", "Q4_K", (2, 3, 256)), random_tensor("b", "F32", (5,))]
    write_gguf(path, METADATA, tensors)
    last = open_gguf(path).tensors["b"].raw.tobytes()
    data = path.read_bytes()
    return path, data[: data.rindex(last) + len(last)]


def test_write_then_open_round_trip(tmp_path):
    tensors = [random_tensor(f"t{i}", name, (2, 3, 256), seed=i) for i, name in enumerate(FORMATS)]
    path = tmp_path / "all.gguf"
    # Data as a function: called only when its turn comes.
    write_gguf(path, METADATA, [(n, f, s, lambda raw=raw: raw) for n, f, s, raw in tensors])
    file = open_gguf(path)
    assert file.metadata == METADATA
    assert list(file.tensors) == [name for name, *_ in tensors]
    for name, format_name, shape, raw in tensors:
        tensor = file.tensors[name]
        assert (tensor.format, tensor.shape, tensor.nbytes) == (format_name, shape, raw.nbytes)
        np.testing.assert_array_equal(tensor.raw, raw)
        assert not tensor.raw.flags.writeable and not tensor.raw.flags.owndata
    assert file.file_bytes == path.stat().st_size
    assert os.listdir(tmp_path) == ["all.gguf"]


def test_written_types_are_those_llama_cpp_reads(tmp_path):
    write_gguf(tmp_path / "f.gguf", METADATA, [])
    got = open_gguf(tmp_path / "f.gguf").field_types
    t = GGUFValueType
    assert got == {
        "general.architecture": (t.STRING, None),
        "general.name": (t.STRING, None),
        "qwen3moe.block_count": (t.UINT32, None),
        "qwen3moe.rope.freq_base": (t.FLOAT32, None),
        "tokenizer.ggml.add_bos_token": (t.BOOL, None),
        "tokenizer.ggml.tokens": (t.ARRAY, t.STRING),
        "tokenizer.ggml.token_type": (t.ARRAY, t.INT32),
        "tokenizer.ggml.scores": (t.ARRAY, t.FLOAT32),
        "x.negative": (t.INT32, None),
        "x.large": (t.INT64, None),
        "x.flags": (t.ARRAY, t.BOOL),
        "x.numbers": (t.ARRAY, t.INT32),
        "x.empty": (t.STRING, None),
    }


def test_foreign_types_survive_a_rewrite(tmp_path):
    """Types that a Python value does not show (uint16, float64, int8 arrays, alignment)."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    writer.add_uint16("x.short", 7)
    writer.add_float64("x.double", 0.1)
    writer.add_key_value("x.bytes", [1, -2], GGUFValueType.ARRAY, GGUFValueType.INT8)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = open_gguf(tmp_path / "a.gguf")
    tensors = [(t.name, t.format, t.shape, t.raw) for t in first.tensors.values()]
    write_gguf(tmp_path / "b.gguf", first.metadata, tensors, first.field_types)
    second = open_gguf(tmp_path / "b.gguf")
    assert second.metadata == first.metadata and second.field_types == first.field_types
    values = second.tensors["t"].raw.view("<f4")
    np.testing.assert_array_equal(values, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert second.sha256() == first.sha256()


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "f.gguf"
    path.write_bytes(b"precious")
    good = random_tensor("good", "Q8_0", (4, 32))

    def broken():
        raise RuntimeError("encoder failed")

    for second, error, match in [
        (("bad", "Q8_0", (4, 32), broken), RuntimeError, "encoder failed"),
        (("bad", "Q8_0", (4, 32), good[3][:2]), ValueError, r"'bad'.*\(2, 34\).*\(4, 34\)"),
        (("bad", "Q8_0", (4, 33), good[3]), ValueError, "multiple of 32"),
        (("bad", "Q8_K", (4, 256), good[3]), NotImplementedError, "Q8_K.*Q4_K"),
    ]:
        with pytest.raises(error, match=match):
            write_gguf(path, METADATA, [good, second])
        assert os.listdir(tmp_path) == ["f.gguf"] and path.read_bytes() == b"precious"
    for value in ({"x": 1}, None, [1, "a"], []):
        with pytest.raises(ValueError, match="'x'"):
            write_gguf(path, {"general.architecture": "llama", "x": value}, [])
    with pytest.raises(ValueError, match=r"general\.architecture"):
        write_gguf(path, {}, [])
    assert os.listdir(tmp_path) == ["f.gguf"] and path.read_bytes() == b"precious"


def test_every_truncation_is_one_sentence(small, tmp_path):
    _, data = small
    path = tmp_path / "cut.gguf"
    path.write_bytes(data)
    assert set(open_gguf(path).tensors) == {"a", "b"}
    header = data.index(open_gguf(path).tensors["a"].raw.tobytes())
    for size in range(len(data)):
        path.write_bytes(data[:size])
        message = refused(path)
        assert size == 0 or f"has {size} bytes" in message or size < 4
        assert size < header or "needs bytes" in message


def test_damaged_bytes_never_escape_as_other_errors(small, tmp_path):
    whole, data = small
    header = data.index(open_gguf(whole).tensors["a"].raw.tobytes())
    path = tmp_path / "flipped.gguf"

    @settings(max_examples=300, deadline=None)
    @given(st.integers(0, header - 1), st.binary(min_size=1, max_size=8))
    def check(position, damage):
        path.write_bytes(data[:position] + damage + data[position + len(damage) :])
        try:
            file = open_gguf(path)
        except (ValueError, NotImplementedError) as error:
            assert "\n" not in str(error) and path.name in str(error)
        else:
            for tensor in file.tensors.values():
                tensor.raw.sum()  # whatever was accepted lies inside the file

    check()


def test_repeated_names(small, tmp_path):
    """The package answers a repeated key with a KeyError of its own."""
    _, data = small
    path = tmp_path / "repeated.gguf"
    path.write_bytes(data.replace(b"x.large", b"x.flags"))
    assert "x.flags" in refused(path)


def test_what_is_no_gguf_file(tmp_path, small):
    _, data = small
    path = tmp_path / "x.gguf"
    refused(path, FileNotFoundError)
    assert "directory" in refused(tmp_path)
    path.write_bytes(b"")
    assert "empty" in refused(path)
    path.write_bytes(b"\x12\x34\x56\x78" + bytes(100))
    assert "expected b'GGUF'" in refused(path)
    path.write_bytes(data[:4] + struct.pack("<I", 1) + data[8:])
    assert "version 1; supported are 2 and 3" in refused(path, NotImplementedError)
    path.write_bytes(data[:4] + struct.pack(">I", 3) + data[8:])
    assert "big-endian" in refused(path, NotImplementedError)


OTHER_FILES = {
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html><html><head>", "…/resolve/… instead of …/blob/…"),
    "page of HTML": (b"<html lang=en><body>404", "…/resolve/…"),
    "XML": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "download it again"),
    "JSON": (b'{"error": "Entry not found"}', "download it again"),
    "manifest of Ollama": (b'{"mediaType":"application/vnd.docker.distribution.manifest', "blob"),
    "'Invalid username": (b"Invalid username or password.", "download it again"),
    "safetensors": (struct.pack("<Q", 800) + b'{"__metadata__":{}', "convert_hf_to_gguf.py"),
    "ZIP": (b"PK\x03\x04" + bytes(range(200)), "convert_hf_to_gguf.py"),
    "pickle": (b"\x80\x02}q\x00" + bytes(range(200)), "convert_hf_to_gguf.py"),
    "gzip": (b"\x1f\x8b\x08" + bytes(range(200)), "unpack it"),
    "GGML": (b"lmgg" + bytes(range(200)), "before GGUF"),
    "GGMF": (b"fmgg" + bytes(range(200)), "before GGUF"),
    "GGJT": (b"tjgg" + bytes(range(200)), "before GGUF"),
    "GGLA": (b"algg" + bytes(range(200)), "before GGUF"),
    "zeros": (bytes(4096), "download it again"),
    "empty": (b"", "download or copy it again"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_files_say_what_they_are_and_how_to_get_the_right_one(tmp_path, what):
    content, advice = OTHER_FILES[what]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    message = refused(path)
    assert what in message and advice in message and "GGUF" in message


@pytest.mark.parametrize(
    ("name", "joined"),
    [
        ("m.gguf.part1of2", "cat m.gguf[-.]* > m.gguf"),
        ("m.gguf.part2of2", "cat m.gguf[-.]* > m.gguf"),
        ("m.gguf-split-b", "cat m.gguf[-.]* > m.gguf"),
        ("m.gguf.002", "cat m.gguf[-.]* > m.gguf"),
        ("m.gguf.ab", "cat m.gguf[-.]* > m.gguf"),
        ("m.part1of2.gguf", "cat m[-.]* > m.gguf"),
    ],
)
def test_pieces_of_a_file_are_to_be_joined(small, tmp_path, name, joined):
    """The first begins like a whole file and ends early; the others begin with anything."""
    _, data = small
    path = tmp_path / name
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        path.write_bytes(piece)
        message = refused(path)
        assert "one of the pieces" in message and joined in message
    path.write_bytes(data)  # whole after all
    assert set(open_gguf(path).tensors) == {"a", "b"}


def test_paths_that_name_no_file(tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "gone")
    assert "link to" in refused(link, FileNotFoundError)
    with pytest.raises(ValueError, match="is an address; download"):
        open_gguf("https://huggingface.co/a/b/resolve/main/c.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert "Hugging Face model" in refused(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"")
    assert "such as b.gguf" in refused(tmp_path)
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert "no regular file" in refused(pipe)


def test_unknown_tensor_types(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    raw = np.zeros((2, 292), np.uint8)
    writer.add_tensor("experts", raw, raw_dtype=GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refused(path, NotImplementedError)
    assert "'experts' has type Q8_K" in message and "MXFP4" in message
    known, future = (struct.pack("<I", n) for n in (GGMLQuantizationType.Q8_K, 999))
    data = path.read_bytes()
    at = data.index(known, data.index(b"experts"))
    path.write_bytes(data[:at] + future + data[at + 4 :])
    assert "'experts' has type number 999" in refused(path, NotImplementedError)


@pytest.fixture
def split(tmp_path):
    """Three parts of one model, as llama.cpp's gguf-split names them."""

    def make(stem):
        writer = gguf.GGUFWriter(tmp_path / f"{stem}.gguf", "llama", split_max_tensors=2)
        for i in range(5):
            writer.add_tensor(f"t{i}", np.full((2, 4), i, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [tmp_path / f"{stem}-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]

    return make


def test_split_files_open_as_one(split, tmp_path):
    parts = split("model")
    for given_part in parts:
        file = open_gguf(given_part)
        assert file.paths == tuple(parts)
        assert [float(t.raw.view("<f4")[0, 0]) for t in file.tensors.values()] == [0, 1, 2, 3, 4]
        assert file.file_bytes == sum(p.stat().st_size for p in parts)
    # Written again it is one ordinary file.
    tensors = [(t.name, t.format, t.shape, t.raw) for t in file.tensors.values()]
    write_gguf(tmp_path / "whole.gguf", file.metadata, tensors, file.field_types)
    assert list(open_gguf(tmp_path / "whole.gguf").tensors) == list(file.tensors)


def test_broken_splits(split):
    parts = split("model")
    second = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.gguf: missing part 2 of 3"):
        open_gguf(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf: split\.no.*\(2, 3\).*\(1, 3\)"):
        open_gguf(parts[0])
    parts[1].write_bytes(second.replace(b"t2", b"t0"))
    with pytest.raises(ValueError, match="repeats tensor 't0'"):
        open_gguf(parts[2])
    key = b"split.tensors.count" + struct.pack("<I", GGUFValueType.INT32)
    first = parts[0].read_bytes()
    parts[1].write_bytes(second)
    parts[0].write_bytes(first.replace(key + struct.pack("<i", 5), key + struct.pack("<i", 6)))
    with pytest.raises(ValueError, match="5 tensors, expected 6"):
        open_gguf(parts[0])
    renamed = parts[0].with_name("other.gguf")
    parts[0].rename(renamed)
    with pytest.raises(ValueError, match=r"other\.gguf: .*one of 3 part.*split\.count"):
        open_gguf(renamed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split.count", [3]),
        ("split.count", "3"),
        ("split.count", -1),
        ("split.count", float("inf")),
        ("split.count", 2**63),
        ("split.no", [0]),
        ("split.no", 0.0),
        ("split.tensors.count", "5"),
        ("split.tensors.count", -5),
    ],
)
def test_split_keys_of_another_type(split, key, value):
    part = split("model")[0]
    file = gguf_header.parse(np.fromfile(part, np.uint8))
    tensors = [(n, t.format, t.shape, np.zeros((2, 16), np.uint8)) for n, t in file.tensors.items()]
    write_gguf(part, file.metadata | {key: value}, tensors)
    assert key in refused(part)


def test_a_part_beyond_the_count(split):
    parts = split("model")
    extra = parts[0].with_name("model-00007-of-00003.gguf")
    extra.write_bytes(parts[0].read_bytes())
    assert "none of 3 parts" in refused(extra)


@pytest.mark.parametrize("format_name", FORMATS)
def test_non_finite_scales_are_named(format_name):
    """The oracle for where the scales stand is gguf's own dequantisation."""
    shape = (2, 3, 512)
    raw = random_tensor("w", format_name, shape)[3]
    check_finite_scales(TensorInfo("w", format_name, shape, raw))
    block_bytes = get_format(format_name).block_bytes
    seen = False
    for offset in range(block_bytes - 1 if block_bytes > 2 else 1):
        for value in (b"\x00\x7c", b"\x00\xfe") if block_bytes > 4 else (b"\x80\x7f",):
            if format_name == "MXFP4":
                value = b"\xff"
            if format_name == "IQ1_M":  # d's nibbles are the tops of four words
                value, offset = b"\x00\xc0\x00\x7c", min(offset, 52)
            if format_name in ("F16", "F32"):
                value, offset = {"F16": (b"\x00\x7c", 0), "F32": (b"\x80\xff", 2)}[format_name]
            damaged = raw.copy()
            damaged[1, 2, block_bytes + offset : block_bytes + offset + len(value)] = list(value)
            tensor = TensorInfo("w", format_name, shape, damaged)
            with np.errstate(all="ignore"):
                values = dequantize(damaged.reshape(6, -1), format_name)
            finite = np.isfinite(values).all()
            if format_name == "MXFP4":
                finite = offset > 0  # ggml multiplies 0xFF out; the standard says NaN
            if finite:
                check_finite_scales(tensor)
            else:
                seen = True
                with pytest.raises(ValueError, match=r"'w'.*row \(1, 2\), block 1"):
                    check_finite_scales(tensor)
    assert seen == (format_name != "NVFP4")  # whose scales have no such bits


def test_a_large_vocabulary_opens_quickly(data_dir):
    start = time.process_time()
    file = open_gguf(data_dir / "vocab" / "ggml-vocab-qwen2.gguf")
    assert time.process_time() - start < 2.0  # measured: 0.2 s; GGUFReader alone: 8 s
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 151936
