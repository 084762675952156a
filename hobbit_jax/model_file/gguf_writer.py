"""Writing GGUF files: whole or not at all, and metadata as it was read.

Owns the bytes of a new file. Metadata that `gguf_file` has read is written back as it was, with the
types it had; the header is made, and so everything checked, before a byte is written.

Source: the GGUF specification in ggml (docs/gguf.md). The `gguf` package's `GGUFWriter` writes no
empty arrays, which GGUF has and llama.cpp writes.
"""

import contextlib
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUF_DEFAULT_ALIGNMENT, GGUFValueType, LlamaFileType

from hobbit_jax.atomic import replacing
from hobbit_jax.model_file.gguf_header import (
    SCALAR_CODES,
    STRING_ERRORS,
    FieldType,
    raw_shape,
)
from pallas_kernels.formats import get_format

_VERSION = 3
# (name, format, shape, raw)
Tensor = tuple[str, str, tuple[int, ...], np.ndarray | Callable[[], np.ndarray]]

# Keys that tell how the weights were made.
_MADE_BY = ("quantize.", "hobbit.low_precision.")


def metadata_of_new_weights(metadata: Mapping[str, Any], format: str) -> dict[str, Any]:
    """`metadata` for other weights of the same model, most of them of `format`.

    What tells how the old weights were made (an importance matrix, our precisions) is left out, and
    `general.file_type` is set, as llama-quantize does.
    """
    kept = {k: v for k, v in metadata.items() if not k.startswith(_MADE_BY)}
    # llama.cpp's names; of the mixes of one type the medium one. Source: llama-model-loader.cpp.
    names = (f"MOSTLY_{format}", f"MOSTLY_{format}_M", f"MOSTLY_{format}_MOE", f"ALL_{format}")
    known = LlamaFileType.__members__
    file_type = next((known[name] for name in names if name in known), LlamaFileType.GUESSED)
    return kept | {
        "general.file_type": int(file_type),
        "general.quantization_version": GGML_QUANT_VERSION,
    }


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[Tensor],
    field_types: Mapping[str, FieldType] | None = None,
) -> None:
    """Writes one GGUF file, or nothing: a reader never sees a half-written file.

    Args:
      path: the file; replaced when it exists.
      metadata: must hold `general.architecture`. Python ints become UINT32 (INT32 when negative,
        64 bits where needed), floats FLOAT32, bools BOOL; int arrays INT32; that is what
        llama.cpp reads. Pass a float as a float: 10000 for a frequency base is refused there.
      tensors: (name, format, shape, raw) with `raw` uint8 [*shape[:-1], row_bytes], or a function
        that returns it, which is called when its turn comes and whose result is dropped at once.
        The iterable is exhausted first: names and shapes stand in front of the data.
      field_types: GGUF types to keep, as `GGUFFile.field_types`; a value that is of another type
        now gets the type of its own. An empty list needs one.

    Raises:
      ValueError: a value that has no GGUF type, or a tensor whose bytes contradict its shape.
      NotImplementedError: a tensor format that `pallas_kernels.formats` does not know.
    """
    path = Path(path)
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise ValueError(f"{path}: metadata has general.architecture={arch!r}, expected a name")
    entries = list(tensors)
    # Its place is the first, by the specification.
    ordered = {"general.architecture": arch, **metadata}
    alignment = ordered.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    header = _header(ordered, entries, field_types or {}, alignment)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(header)
        for name, format, shape, raw in entries:
            data = raw() if callable(raw) else raw
            wanted = raw_shape(name, format, shape)
            if data.dtype != np.uint8 or data.shape != wanted:
                raise ValueError(
                    f"tensor {name!r}: got {data.dtype} {data.shape}, but {format} of "
                    f"shape {tuple(shape)} is uint8 {wanted}"
                )
            file.write(np.ascontiguousarray(data).data)
            file.write(bytes(-data.nbytes % alignment))
            del data
        file.flush()
        os.fsync(file.fileno())
    # Makes the rename itself durable; not every file system lets a directory be opened.
    with contextlib.suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _header(
    metadata: Mapping[str, Any],
    entries: list[Tensor],
    field_types: Mapping[str, FieldType],
    alignment: int,
) -> bytes:
    """Everything in front of the data, padding included."""
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        parts += [_string(key), _typed_value(key, plain, field_types.get(key))]
    offset = 0
    for name, format, shape, _ in entries:
        nbytes = math.prod(raw_shape(name, format, shape))
        kind = get_format(format).number
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), dims, struct.pack("<IQ", kind, offset)]
        offset += nbytes + -nbytes % alignment
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8", STRING_ERRORS)
    return struct.pack("<Q", len(encoded)) + encoded


def _typed_value(key: str, value: Any, given: FieldType | None) -> bytes:
    """Type and value of one key."""
    if given is not None:
        # What does not fit its old type is no longer the value that had it.
        with contextlib.suppress(struct.error, OverflowError, TypeError):
            return _packed(value, given)
    try:
        return _packed(value, _field_type(key, value))
    except (struct.error, OverflowError, TypeError) as error:
        raise ValueError(f"metadata {key!r}: {error}") from error


def _packed(value: Any, field_type: FieldType) -> bytes:
    kind, element = field_type
    if kind != GGUFValueType.ARRAY:
        return struct.pack("<I", kind) + _elements([value], kind)
    if not isinstance(value, list | tuple) or element is None:
        raise TypeError(f"{value!r} is no list with a type")
    return struct.pack("<IIQ", kind, element, len(value)) + _elements(value, element)


def _elements(values: list | tuple, kind: GGUFValueType) -> bytes:
    if kind == GGUFValueType.STRING:
        if not all(isinstance(value, str) for value in values):
            raise TypeError("no string")
        return b"".join(map(_string, values))
    if any(isinstance(value, bool) != (kind == GGUFValueType.BOOL) for value in values):
        raise TypeError("a bool is no number")
    return struct.pack(f"<{len(values)}{SCALAR_CODES[kind]}", *values)


# Arrays that llama.cpp reads through a typed pointer, whatever Python type they come in.
_ARRAY_TYPES = {
    "tokenizer.ggml.token_type": GGUFValueType.INT32,
    "tokenizer.ggml.scores": GGUFValueType.FLOAT32,
}


def _field_type(key: str, value: Any) -> FieldType:
    """The GGUF type in which llama.cpp expects a Python value."""
    if isinstance(value, list | tuple):
        kinds = {_ARRAY_TYPES.get(key) or _scalar_type(key, v, GGUFValueType.INT32) for v in value}
        if len(kinds) == 1:
            return GGUFValueType.ARRAY, kinds.pop()
        if not kinds:
            raise ValueError(f"metadata {key!r}: an empty list needs a type in field_types")
        if kinds == {GGUFValueType.INT32, GGUFValueType.INT64}:
            return GGUFValueType.ARRAY, GGUFValueType.INT64
        names = sorted(kind.name for kind in kinds)
        raise ValueError(f"metadata {key!r}: an array of {names}, expected one type")
    return _scalar_type(key, value, GGUFValueType.UINT32), None


def _scalar_type(key: str, value: Any, int_type: GGUFValueType) -> GGUFValueType:
    if isinstance(value, bool):  # before int: a bool is one
        return GGUFValueType.BOOL
    if isinstance(value, int):
        if int_type == GGUFValueType.UINT32 and 0 <= value < 1 << 32:
            return GGUFValueType.UINT32
        if -(1 << 31) <= value < 1 << 31:
            return GGUFValueType.INT32
        return GGUFValueType.UINT64 if value >= 1 << 63 else GGUFValueType.INT64
    if isinstance(value, float):
        return GGUFValueType.FLOAT32
    if isinstance(value, str):
        return GGUFValueType.STRING
    raise ValueError(
        f"metadata {key!r}: {type(value).__name__} has no GGUF type, expected bool, int, float, "
        "str, or a list of one of them"
    )
