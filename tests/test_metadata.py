"""Metadata: written as it was read, and read as one kind of value or refused in one line."""

import math
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from gguf import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from hobbit_jax.model_file import metadata
from hobbit_jax.model_file.gguf_file import FileStamp, GGUFFile, open_gguf, write_gguf
from hobbit_jax.model_file.gguf_header import STRING_ERRORS
from hobbit_jax.model_file.gguf_writer import metadata_of_new_weights
from hobbit_jax.models.keys import Keys

T = GGUFValueType
NAN, INFINITE = math.nan, math.inf
ANY_BYTES = st.binary(max_size=12).map(lambda raw: raw.decode("utf-8", STRING_ERRORS))
VALUES = {
    T.STRING: st.one_of(st.text(max_size=12).filter(lambda s: s.isascii()), ANY_BYTES),
    T.BOOL: st.booleans(),
    T.FLOAT32: st.floats(width=32, allow_nan=False),
    T.FLOAT64: st.floats(allow_nan=False),
    **{
        kind: st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for kind, bits in ((T.INT8, 8), (T.INT16, 16), (T.INT32, 32), (T.INT64, 64))
    },
    **{
        kind: st.integers(0, 2**bits - 1)
        for kind, bits in ((T.UINT8, 8), (T.UINT16, 16), (T.UINT32, 32), (T.UINT64, 64))
    },
}


def field(kind: GGUFValueType):
    scalar = VALUES[kind].map(lambda value: ((kind, None), value))
    array = st.lists(VALUES[kind], max_size=5).map(lambda values: ((T.ARRAY, kind), values))
    return scalar | array


FIELDS = st.dictionaries(
    st.text("abc.é", min_size=1, max_size=6), st.sampled_from(sorted(VALUES)).flatmap(field)
)


def test_any_metadata_survives_a_rewrite(tmp_path):
    path = tmp_path / "x.gguf"

    @settings(max_examples=200, deadline=None)
    @given(FIELDS)
    def check(fields):
        types = {"general.architecture": (T.STRING, None)} | {k: t for k, (t, _) in fields.items()}
        values = {"general.architecture": "olmoe"} | {k: v for k, (_, v) in fields.items()}
        write_gguf(path, values, [], types)
        file = open_gguf(path)
        # By their text: 1 is True and 1.0 is 1 otherwise.
        assert repr(file.metadata) == repr(values)
        assert file.field_types == types

    check()


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "qwen2"])
def test_vocabulary_files_survive_a_rewrite_to_the_byte(data_dir, tmp_path, name):
    source = open_gguf(data_dir / "vocab" / f"ggml-vocab-{name}.gguf")
    copy = tmp_path / "copy.gguf"
    write_gguf(copy, source.metadata, [], source.field_types)
    original = source.paths[0].read_bytes()
    # llama.cpp's file ends without the padding in front of data that it does not have.
    assert copy.read_bytes()[: len(original)] == original


def test_the_package_reads_what_is_written(tmp_path):
    """An independent reader; it has no word for an empty array's elements."""
    path = tmp_path / "x.gguf"
    values = {"general.architecture": "llama", "a": 7, "b": 0.5, "c": ["x", "é"], "d": [1, -2]}
    write_gguf(path, values | {"e": []}, [], {"e": (T.ARRAY, T.STRING)})
    reader = gguf.GGUFReader(path)
    assert {key: reader.fields[key].contents() for key in values} == values
    assert reader.fields["e"].types == [T.ARRAY] and reader.fields["e"].data == []


def test_a_value_of_another_type_leaves_its_old_type(tmp_path):
    path = tmp_path / "x.gguf"
    old = {"general.file_type": (T.STRING, None), "n": (T.UINT8, None), "k": (T.FLOAT64, None)}
    values = {"general.architecture": "llama", "general.file_type": 10, "n": 300, "k": 1.5}
    write_gguf(path, values, [], old)
    file = open_gguf(path)
    assert (file.metadata["general.file_type"], file.metadata["n"]) == (10, 300)
    assert file.field_types["general.file_type"] == file.field_types["n"] == (T.UINT32, None)
    assert file.field_types["k"] == (T.FLOAT64, None)


@pytest.mark.parametrize(
    ("format", "file_type"),
    [("F32", 0), ("F16", 1), ("Q8_0", 7), ("Q2_K", 10), ("Q3_K", 12), ("Q4_K", 15), ("IQ4_NL", 25)],
)
def test_new_weights_are_not_described_by_the_old(format, file_type):
    """File types as in llama.h."""
    old = {
        "general.architecture": "llama",
        "general.file_type": 15,
        "quantize.imatrix.file": "x.dat",
        "quantize.imatrix.chunks_count": 100,
        "hobbit.low_precision.calibration_sha256": "0" * 64,
        "general.license": "mit",
    }
    assert metadata_of_new_weights(old, format) == {
        "general.architecture": "llama",
        "general.license": "mit",
        "general.file_type": file_type,
        "general.quantization_version": 2,
    }


def file_with(value) -> GGUFFile:
    return GGUFFile((FileStamp(Path("m.gguf"), 0, 0, 0, 0),), {"k": value}, {}, {})


GOOD = [
    (metadata.text(), ["", "a\nb", "é"]),
    (metadata.flag(), [True, False]),
    (metadata.integer(0, 9), [0, 9]),
    (metadata.number(0.5, 2.0), [0.5, 1, 2.0]),
    (metadata.texts(), [[], ["", "é"]]),
    (metadata.texts(least=1), [["a"]]),
    (metadata.integers(0, 9), [[], [0, 9]]),
    (metadata.numbers(), [[], [1, 0.5, -INFINITE]]),
]


@pytest.mark.parametrize(("kind", "values"), GOOD)
def test_values_of_a_kind_are_read(kind, values):
    for value in values:
        assert file_with(value).read("k", kind) == value


BAD = [
    (metadata.text(), [1, True, None, ["a"], 0.5, "\udcff"]),
    (metadata.flag(), [0, 1, "true", [True]]),
    (metadata.integer(0, 9), [-1, 10, 1.0, INFINITE, NAN, True, "1", [1], 2**70]),
    (
        metadata.number(0.5, 2.0),
        [0.4, 2.1, NAN, INFINITE, -INFINITE, True, "1", [1.0], 2**64 * 2.0**70],
    ),
    (metadata.texts(), ["a", [1], ["a", 1], [["a"]], ["\udcff"], {"a": 1}]),
    (metadata.texts(least=1), [[]]),
    (metadata.integers(0, 9), [1, [10], [1, 0.5], [True], ["1"]]),
    (metadata.numbers(), [1, [NAN], [True], ["1"]]),
    (metadata.per_layer(metadata.integer(1, 9), 2), [0, [], [1], [1, 1, 1], [0, 0], ["a", 1]]),
]


@pytest.mark.parametrize(("kind", "values"), BAD)
def test_other_values_are_one_line_that_names_file_and_key(kind, values):
    for value in values:
        with pytest.raises(
            ValueError, match=r"^m\.gguf: metadata key k is .*, expected "
        ) as caught:
            file_with(value).read("k", kind)
        assert type(caught.value) is ValueError
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_key_is_named_or_has_a_default():
    file = file_with(1)
    assert file.read("other", metadata.integer(5, 9), None) is None
    with pytest.raises(
        ValueError, match="metadata key other is missing, expected an integer from 5"
    ):
        file.read("other", metadata.integer(5, 9))


def test_long_values_are_shown_short():
    for value in ("x" * 10**6, ["y\n" * 10**6], {"a": 1} | dict.fromkeys(range(99))):
        with pytest.raises(ValueError, match="characters") as caught:
            file_with(value).read("k", metadata.flag())
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_layers_may_repeat_one_value_but_not_differ():
    def read(value):
        keys, blocks = {"a.k": value, "a.block_count": 3}, dict.fromkeys("xyz")
        return Keys(replace(file_with(0), metadata=keys, tensors=blocks), "a").of_every_layer("k")

    assert read(4) == read([4, 4, 4]) == 4
    with pytest.raises(NotImplementedError, match=r"m\.gguf: metadata key a\.k .* per layer"):
        read([4, 4, 5])


def of_keys(count: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + b"".join(parts) + bytes(64)


def array_of(kind: GGUFValueType):
    return lambda n: of_keys(1, string(1), struct.pack("<IIQ", T.ARRAY, kind, n))


def of_tensors(count: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, 0) + b"".join(parts) + bytes(64)


def string(length: int) -> bytes:
    return struct.pack("<Q", length) + b"k"


PROMISES = {
    "keys": of_keys,
    "tensors": of_tensors,
    "length of a key": lambda n: of_keys(1, string(n)),
    "length of a string": lambda n: of_keys(1, string(1), struct.pack("<I", T.STRING), string(n)),
    "strings": array_of(T.STRING),
    "bytes": array_of(T.UINT8),
    "doubles": array_of(T.FLOAT64),
    "arrays": array_of(T.ARRAY),
    "length of a name": lambda n: of_tensors(1, string(n)),
    "axis": lambda n: of_tensors(1, string(1), struct.pack("<IQIQ", 1, n // 32 * 32, 0, 0)),
    "axes": lambda n: of_tensors(1, string(1), struct.pack("<IQIQ", n % 2**32, 1, 0, 0)),
    "offset": lambda n: of_tensors(1, string(1), struct.pack("<IQIQ", 1, 8, 0, n // 32 * 32)),
}


@pytest.mark.parametrize("count", [2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("what", PROMISES)
def test_no_count_is_believed_before_its_bytes_are_there(tmp_path, what, count):
    path = tmp_path / "x.gguf"
    path.write_bytes(PROMISES[what](count))
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
