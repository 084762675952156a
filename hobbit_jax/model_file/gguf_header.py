"""The header of a GGUF file: bytes to metadata and tensor entries, each held against the file.

Owns the parsing. No count, length or offset is believed before the bytes that it speaks of are
known to be there, so a damaged or hostile header costs no more memory than the file has bytes
(times Python's size of a number) and no time but for reading it once.

Source: the GGUF specification in ggml (docs/gguf.md) and ggml/src/gguf.cpp. The `gguf` package's
own `GGUFReader` builds three Python objects per element of an array (8 s for the vocabulary of
Qwen3), slices past the end of a truncated file without noticing, and believes every count.
"""

import math
import struct
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from hobbit_jax.model_file.metadata import shown
from pallas_kernels.formats import FORMATS

# (type, element type of an array or None), as in the file: llama.cpp refuses a key of another type.
FieldType = tuple[GGUFValueType, GGUFValueType | None]

PROLOGUE_BYTES = 24  # magic, version, number of tensors, number of keys
# Strings are kept byte for byte, whatever they are: what is no UTF-8 becomes half surrogates, which
# `metadata.text` refuses where a string is used.
STRING_ERRORS = "surrogateescape"
SCALAR_CODES = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

# The package knows some that we cannot decode, and not yet all that we can.
_TYPE_NAMES = {kind.value: kind.name for kind in GGMLQuantizationType}
_TYPE_NAMES |= {format.number: format.name for format in FORMATS.values()}
_UINT32: FieldType = (GGUFValueType.UINT32, None)
_LENGTH = struct.Struct("<Q")  # of a string
_MAX_DIMS = 4  # GGML_MAX_DIMS
_LEAST_KEY_BYTES = 8 + 4 + 1  # a key without a letter, its type, a byte
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # a name without a letter, one axis, type, offset


class TensorEntry(NamedTuple):
    """One tensor as the header describes it; its bytes lie inside the file."""

    format: str  # a name that `pallas_kernels.formats.get_format` knows
    shape: tuple[int, ...]  # row-major
    start: int  # byte of the file
    nbytes: int


class Header(NamedTuple):
    """All that stands in front of the data."""

    metadata: dict[str, Any]  # Python scalars, strings and lists
    field_types: dict[str, FieldType]
    tensors: dict[str, TensorEntry]  # in file order


class CutShortError(ValueError):
    """The header goes on behind the bytes at hand; `needed` of the file's would be enough."""

    def __init__(self, needed: int):
        super().__init__(f"reads up to byte {needed}, which is not at hand")
        self.needed = needed


def parse(data: np.ndarray, file_bytes: int | None = None) -> Header:
    """Parses the header of a file.

    Args:
        data: uint8, the bytes of the file, or so many from its start; a little-endian prologue.
        file_bytes: of the whole file, where `data` is only its start.

    Raises:
        CutShortError: the header needs more than `data`.
        ValueError: the header contradicts itself or the file's size. Lacks the path.
        NotImplementedError: a tensor type that we cannot decode, or an array of arrays.
    """
    cursor = _Cursor(data, data.size if file_bytes is None else file_bytes)
    cursor.take(8)  # magic and version
    n_tensors, n_keys = cursor.scalars("QQ")
    for what, count, least in (
        ("keys", n_keys, _LEAST_KEY_BYTES),
        ("tensors", n_tensors, _LEAST_TENSOR_BYTES),
    ):
        if count * least > cursor.size:
            raise ValueError(f"promises {count} {what} but the file has {cursor.size} bytes")
    metadata, field_types = {}, {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"has the metadata key {shown(key)} twice")
        metadata[key], field_types[key] = cursor.value(key)
    entries = {}
    for _ in range(n_tensors):
        name, entry = cursor.tensor()
        if name in entries:
            raise ValueError(f"has two tensors called {shown(name)}")
        entries[name] = entry
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    is_integer = field_types.get("general.alignment", _UINT32) == _UINT32
    if not is_integer or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(
            f"general.alignment is {shown(alignment)}, expected a power of two as uint32"
        )
    start = -(-cursor.at // alignment) * alignment
    return Header(metadata, field_types, _placed(entries, start, alignment, cursor.size))


def raw_shape(name: str, format: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the bytes, (*shape[:-1], row_bytes), of a tensor of `format` and row-major `shape`.

    Raises:
        ValueError: rows that are no multiple of the format's blocks.
        NotImplementedError: a format that `pallas_kernels.formats` does not know.
    """
    if format not in FORMATS:
        raise NotImplementedError(
            f"tensor {shown(name)} has type {format}; supported are {', '.join(FORMATS)}: "
            "use a file quantised to one of them"
        )
    block_weights = FORMATS[format].block_weights
    if shape[-1] % block_weights:
        raise ValueError(
            f"tensor {shown(name)} has rows of {shape[-1]} weights, expected a multiple of "
            f"{block_weights} for {format}"
        )
    return (*(int(n) for n in shape[:-1]), int(FORMATS[format].row_bytes(shape[-1])))


class _Cursor:
    """Reads a file's bytes from the front, and never past their end."""

    def __init__(self, data: np.ndarray, size: int):
        self.data = memoryview(data)  # pyright: ignore[reportArgumentType] (stubs before 3.12)
        self.size = size
        self.at = 0

    def take(self, count: int) -> int:
        """Where the next `count` bytes begin; they are known to be there."""
        start = self.at
        if start + count > self.size:
            raise ValueError(
                f"reads {count} bytes at byte {start} but the file has {self.size} bytes"
            )
        if start + count > len(self.data):
            raise CutShortError(start + count)
        self.at = start + count
        return start

    def scalars(self, codes: str) -> tuple:
        """Little-endian values by their struct codes."""
        form = struct.Struct(f"<{codes}")
        return form.unpack_from(self.data, self.take(form.size))

    def string(self) -> str:
        # Not by `scalars`: vocabularies have some hundred thousand.
        (length,) = _LENGTH.unpack_from(self.data, self.take(_LENGTH.size))
        start = self.take(length)
        return str(self.data[start : self.at], "utf-8", STRING_ERRORS)

    def value(self, key: str) -> tuple[Any, FieldType]:
        kind = self._type(key)
        if kind == GGUFValueType.STRING:
            return self.string(), (kind, None)
        if kind != GGUFValueType.ARRAY:
            return self.scalars(SCALAR_CODES[kind])[0], (kind, None)
        element = self._type(key)
        (count,) = self.scalars("Q")
        if element == GGUFValueType.ARRAY:
            raise NotImplementedError(
                f"metadata key {shown(key)} is an array of arrays; supported are arrays of scalars "
                "and strings, as in llama.cpp"
            )
        if element == GGUFValueType.STRING:
            if count * 8 > self.size - self.at:
                raise ValueError(
                    f"metadata key {shown(key)} promises {count} strings but the file has "
                    f"{self.size} bytes"
                )
            return [self.string() for _ in range(count)], (kind, element)
        dtype = np.dtype(f"<{SCALAR_CODES[element]}")
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start).tolist(), (kind, element)

    def tensor(self) -> tuple[str, TensorEntry]:
        """A tensor's entry; `start` counts from the first byte of the data."""
        name = self.string()
        (n_dims,) = self.scalars("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {shown(name)} has {n_dims} axes, expected 1 to {_MAX_DIMS}")
        shape = self.scalars("Q" * n_dims)[::-1]
        if 0 in shape:
            raise ValueError(f"tensor {shown(name)} has shape {shape}, expected no empty axis")
        number, offset = self.scalars("IQ")
        format = _TYPE_NAMES.get(number, f"number {number}")
        return name, TensorEntry(format, shape, offset, math.prod(raw_shape(name, format, shape)))

    def _type(self, key: str) -> GGUFValueType:
        (number,) = self.scalars("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise ValueError(f"metadata key {shown(key)} has an unknown type {number}") from None


def _placed(
    entries: dict[str, TensorEntry], start: int, alignment: int, size: int
) -> dict[str, TensorEntry]:
    """The entries with `start` in the file; they lie inside it, aligned and apart."""
    for name, entry in entries.items():
        begin, end = start + entry.start, start + entry.start + entry.nbytes
        if entry.start % alignment:
            raise ValueError(
                f"tensor {shown(name)} at data offset {entry.start}, expected a multiple of "
                f"{alignment}"
            )
        if end > size:
            raise ValueError(
                f"tensor {shown(name)} needs bytes {begin} to {end} but the file has {size} bytes"
            )
    in_order = sorted(entries.items(), key=lambda item: item[1].start)
    for (_, before), (name, entry) in pairwise(in_order):
        if entry.start < before.start + before.nbytes:
            raise ValueError(f"tensor {shown(name)} overlaps the tensor before it")
    return {name: entry._replace(start=start + entry.start) for name, entry in entries.items()}
