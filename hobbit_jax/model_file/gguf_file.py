"""Reading and writing GGUF files: memory-mapped views of raw blocks, typed metadata.

Owns the boundary to the file on disk. A file is checked completely before a view of it is handed
out, so nothing behind this module meets a truncated or foreign file.

Source: the GGUF specification in ggml (docs/gguf.md) through the `gguf` package. `GGUFReader`
builds three Python objects per element of a metadata array (8 s for the vocabulary of Qwen3) and
slices past the end of a truncated file without noticing; `_CheckedReader` replaces those two
places and leaves the rest of the parsing to the package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from hobbit_jax.atomic import replacing
from hobbit_jax.model_file import metadata as checked
from hobbit_jax.model_file.metadata import REQUIRED, Kind, Required
from pallas_kernels.formats import FORMATS

T = TypeVar("T")
D = TypeVar("D")

# (type, element type of an array or None), as in the file: llama.cpp refuses a key of another type.
FieldType = tuple[GGUFValueType, GGUFValueType | None]

_MAX_DIMS = 4  # GGML_MAX_DIMS
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """One tensor of a file: what it is, and its bytes as they lie on disk."""

    name: str
    format: str  # a key of `pallas_kernels.formats.FORMATS`
    shape: tuple[int, ...]  # row-major, (E, F, D) for ffn_gate_exps; the last axis is one row
    raw: np.ndarray  # uint8 [*shape[:-1], row_bytes], a read-only view into the memory map

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file, without padding."""
        return self.raw.nbytes


@dataclass(frozen=True)
class FileStamp:
    """What tells that a file on disk is still the one that was mapped."""

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """The file as it is now. FileNotFoundError if there is none."""
        stat = path.stat()
        return cls(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """Refuses a file that is gone or another than it was.

        Reading a map past the end of a file that was cut short kills the process (SIGBUS), so
        whoever reads late asks first.

        Raises:
            OSError: what became of the file.
        """
        try:
            now = self.of(self.path)
        except OSError as error:
            raise OSError(
                f"{self.path}: disappeared while it was in use ({error.strerror}); put it back and "
                "start again"
            ) from error
        if now != self:
            raise OSError(
                f"{self.path}: changed while it was in use (it had {self.size} bytes, now "
                f"{now.size}); start again with a file that nobody writes to"
            )


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An opened, checked file; the parts of a split file appear as one.

    `metadata` is what the file says, unchecked: for copying. `read` is how a value is used.
    """

    stamps: tuple[FileStamp, ...]  # in the order of the parts
    metadata: dict[str, Any]  # Python scalars, strings and lists
    field_types: dict[str, FieldType]  # the GGUF type of each metadata key
    tensors: dict[str, TensorInfo]  # in file order

    @overload
    def read(self, key: str, kind: Kind[T]) -> T: ...

    @overload
    def read(self, key: str, kind: Kind[T], default: D) -> T | D: ...

    def read(self, key: str, kind: Kind[T], default: D | Required = REQUIRED) -> T | D:
        """The metadata value of `key`, checked to be of `kind` (see `metadata.py`).

        Returns:
            The value, or `default` where the file has no such key.

        Raises:
            ValueError: the value is of another type or outside the range, or the file has no such
                key and there is no default.
            NotImplementedError: a value per layer (`of_every_layer`), and they differ.
        """
        return checked.read(self.paths[0], self.metadata, key, kind, default)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of all parts, in order."""
        return tuple(stamp.path for stamp in self.stamps)

    @property
    def file_bytes(self) -> int:
        """Size on disk of all parts."""
        return sum(path.stat().st_size for path in self.paths)

    def sha256(self) -> str:
        """Hex digest of the bytes of all parts, one after the other.

        Reads the whole file once per process; a file that changed (size or time) is read again.
        """
        return _sha256(tuple(FileStamp.of(path) for path in self.paths))


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a GGUF file and checks that everything it promises is there.

    Any part of a split file (`…-00001-of-00003.gguf`) opens all parts. Tensor data is mapped,
    not read, so the time does not depend on its size.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a GGUF file, damaged or truncated, or a part of a split is missing or foreign.
      NotImplementedError: big-endian, another GGUF version, or a tensor type we cannot decode.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the path of a .gguf file")
    opened = _read_part(path)
    name = _SPLIT_NAME.fullmatch(path.name)
    name_count = int(name["count"]) if name else 1
    count = opened.metadata.get("split.count", 1) or 1
    if count != name_count:
        raise ValueError(
            f"{path}: the file says it is one of {count} part(s) (split.count) but its name says "
            f"{name_count}; give the parts the names they were made with "
            f"(NAME-00001-of-{count:05d}.gguf)"
        )
    if count == 1 or name is None:
        return _drop_split_keys(opened)
    names = [f"{name['stem']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    return _join_parts([path.with_name(n) for n in names], opened)


def check_finite_scales(tensor: TensorInfo) -> None:
    """Refuses a tensor in which a block scale or a float weight is NaN or infinite.

    Looks at the f16 super-scales (d, dmin) of a quantised type, at the exponent byte of MXFP4
    (0xFF is NaN there) and at every weight of a float type; the quants of a block cannot be
    non-finite. Works in chunks of rows, about 16 MiB at a time.

    Raises:
      ValueError: names the tensor and its first bad row.
    """
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[tensor.format]]
    row_bytes = tensor.raw.shape[-1]
    raw = tensor.raw.reshape(-1, row_bytes)
    step = max(1, (16 << 20) // row_bytes)
    for start in range(0, len(raw), step):
        rows = raw[start : start + step]
        blocks = rows.reshape(len(rows), -1, block_bytes)
        for offset, bits, mask in FORMATS[tensor.format].float_fields:
            field = np.ascontiguousarray(blocks[:, :, offset : offset + bits.itemsize]).view(bits)
            bad = ((field & mask) == mask).reshape(len(rows), -1)
            if bad.any():
                row, block = (int(i[0]) for i in np.nonzero(bad))
                index = tuple(int(i) for i in np.unravel_index(start + row, tensor.shape[:-1]))
                what = "weight" if block_weights == 1 else f"{tensor.format} block scale"
                raise ValueError(
                    f"tensor {tensor.name!r}: a NaN or infinite {what} in row {index}, "
                    f"block {block}, but finite values were expected; the file is damaged or was "
                    "converted from a damaged model: download or convert it again"
                )


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, str, tuple[int, ...], np.ndarray | Callable[[], np.ndarray]],],
    field_types: Mapping[str, FieldType] | None = None,
) -> None:
    """Writes one GGUF file, or nothing: a reader never sees a half-written file.

    Args:
      path: the file; replaced when it exists.
      metadata: must hold `general.architecture`. Python ints become UINT32 (INT32 when negative,
        64 bits where needed), floats FLOAT32, bools BOOL; int arrays INT32; that is what
        llama.cpp reads. Pass a float as a float: 10000 for a frequency base is refused there.
      tensors: (name, format, shape, raw) with `raw` uint8 [*shape[:-1], row_bytes], or a function
        that returns it. All names and shapes stand in front of the first byte of data, so the
        iterable is exhausted first; data that is not a mapped view should be a function, which
        is called when its turn comes and whose result is dropped at once.
      field_types: GGUF types to keep, as `GGUFFile.field_types`.

    Raises:
      ValueError: a value that has no GGUF type, or a tensor whose bytes contradict its shape.
      NotImplementedError: a tensor format outside `pallas_kernels.formats.FORMATS`.
    """
    path = Path(path)
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or not arch:
        raise ValueError(f"{path}: metadata has general.architecture={arch!r}, expected a name")
    entries = list(tensors)
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, arch)
        try:
            for key, value in metadata.items():
                if key == "general.architecture":
                    continue  # the writer has put it first
                if key == "general.alignment":
                    writer.add_custom_alignment(int(value))
                    continue
                value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
                given = (field_types or {}).get(key)
                kind, element = given if given is not None else _field_type(key, value)
                if kind == GGUFValueType.ARRAY and len(value) == 0:
                    raise ValueError(
                        f"metadata {key!r}: GGUF has no empty arrays; leave the key out"
                    )
                writer.add_key_value(key, value, kind, element)
            for name, format_name, shape, _ in entries:
                raw_shape = _raw_shape(name, format_name, shape)
                kind = GGMLQuantizationType[format_name]
                writer.add_tensor_info(
                    name, raw_shape, np.dtype(np.uint8), math.prod(raw_shape), kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, format_name, shape, raw in entries:
                data = raw() if callable(raw) else raw
                wanted = _raw_shape(name, format_name, shape)
                if data.dtype != np.uint8 or data.shape != wanted:
                    raise ValueError(
                        f"tensor {name!r}: got {data.dtype} {data.shape}, but {format_name} of "
                        f"shape {tuple(shape)} is uint8 {wanted}"
                    )
                writer.write_tensor_data(np.ascontiguousarray(data))
                del data
            writer.flush()
            assert writer.fout is not None
            os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()
    _sync_directory(path.parent)


# ---------------------------------------------------------------------------------------------
# Reading


class _CheckedReader(gguf.GGUFReader):
    """`GGUFReader` that notices the end of the file and reads metadata arrays in one pass.

    Its complaints lack the path, which `_read_part` adds.
    """

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(
                f"the header reads up to byte {end} but the file has {self.data.size} bytes"
            )
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        element = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if element == GGUFValueType.STRING:
            values, end = self._strings(start, count)
        elif element in self.gguf_scalar_to_np:
            array = self._get(start, self.gguf_scalar_to_np[element], count)
            values, end = array.tolist(), start + array.nbytes
        else:
            raise ValueError(f"an array of {element.name} in the metadata, expected scalars")
        # `parts` carries the finished list; `_metadata` knows.
        return end - orig_offs, [values], [0], [GGUFValueType.ARRAY, element]

    def _strings(self, start: int, count: int) -> tuple[list[str], int]:
        data = memoryview(self.data)  # pyright: ignore[reportArgumentType] (stubs before 3.12)
        size = self.data.size
        length_at = struct.Struct("<Q").unpack_from
        values, pos = [], start
        for _ in range(count):
            if pos + 8 > size:
                raise ValueError(f"a string at byte {pos} but the file has {size} bytes")
            begin = pos + 8
            pos = begin + length_at(data, pos)[0]
            if pos > size:
                raise ValueError(f"a string up to byte {pos} but the file has {size} bytes")
            values.append(str(data[begin:pos], "utf-8"))
        return values, pos

    def _build_tensors(self, start_offs, fields):
        end_of_last = 0
        spans = []
        for field in fields:
            _, _, n_dims, dims, raw_type, offset = field.parts
            shape = tuple(int(d) for d in reversed(dims))
            nbytes = math.prod(_stored_shape(field.name, int(n_dims[0]), shape, int(raw_type[0])))
            begin = int(start_offs) + int(offset[0])
            if int(offset[0]) % int(self.alignment):
                raise ValueError(
                    f"tensor {field.name!r} at data offset {int(offset[0])}, expected a multiple "
                    f"of {int(self.alignment)}"
                )
            if begin + nbytes > self.data.size:
                raise ValueError(
                    f"tensor {field.name!r} needs bytes {begin} to {begin + nbytes} but the file "
                    f"has {self.data.size} bytes"
                )
            spans.append((begin, begin + nbytes, field.name))
        for begin, end, name in sorted(spans):
            if begin < end_of_last:
                raise ValueError(f"tensor {name!r} overlaps the tensor before it")
            end_of_last = end
        super()._build_tensors(start_offs, fields)


def _stored_shape(name: str, n_dims: int, shape: tuple[int, ...], raw_type: int) -> tuple[int, ...]:
    """Checks one tensor entry of a header; returns the shape of its bytes."""
    if not 1 <= n_dims <= _MAX_DIMS or 0 in shape:
        raise ValueError(
            f"tensor {name!r} has shape {shape}, expected 1 to {_MAX_DIMS} axes, none empty"
        )
    try:
        format_name = GGMLQuantizationType(raw_type).name
    except ValueError:
        format_name = f"number {raw_type}"
    return _raw_shape(name, format_name, shape)


def _raw_shape(name: str, format_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the bytes, (*shape[:-1], row_bytes), of a tensor of `format_name` and `shape`."""
    if format_name not in FORMATS:
        raise NotImplementedError(
            f"tensor {name!r} has type {format_name}; supported are {', '.join(FORMATS)}: "
            "use a file quantised to one of them"
        )
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[format_name]]
    if shape[-1] % block_weights:
        raise ValueError(
            f"tensor {name!r} has rows of {shape[-1]} weights, expected a multiple of "
            f"{block_weights} for {format_name}"
        )
    return (*(int(n) for n in shape[:-1]), shape[-1] // block_weights * block_bytes)


def _check_prologue(path: Path) -> None:
    """Refuses what is no GGUF file by its first eight bytes, before the package sees it."""
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, expected a .gguf file; name the file inside it")
    with path.open("rb") as file:
        head = file.read(24)
    if not head:
        raise ValueError(f"{path}: the file is empty, expected a GGUF file; copy it again")
    if head[:4] != b"GGUF"[: len(head)]:
        raise ValueError(
            f"{path}: starts with {head[:4]!r}, expected b'GGUF': not a GGUF file; convert the "
            "model with llama.cpp's convert_hf_to_gguf.py"
        )
    if len(head) < 24:
        raise ValueError(
            f"{path}: has {len(head)} bytes, expected at least the 24 of a GGUF header: the file "
            "is truncated; copy or download it again"
        )
    (version,) = struct.unpack_from("<I", head, 4)
    if version & 0xFFFF == 0:
        raise NotImplementedError(
            f"{path}: a big-endian GGUF file; supported is little-endian: convert it with "
            "gguf_convert_endian.py of the gguf package"
        )
    if version not in (2, 3):
        raise NotImplementedError(
            f"{path}: GGUF version {version}; supported are 2 and 3: convert the model again with "
            "a current llama.cpp"
        )


def _read_part(path: Path) -> GGUFFile:
    stamp = FileStamp.of(path)
    _check_prologue(path)
    try:
        reader = _CheckedReader(path)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        # Everything the package throws on bytes it did not expect; the cause stays attached.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: {reason}: the file is truncated or damaged, expected a complete GGUF file; "
            "copy or download it again"
        ) from error
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    try:
        metadata = {
            key: f.parts[f.data[0]] if f.types[0] == GGUFValueType.ARRAY else f.contents()
            for key, f in fields.items()
        }
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: a metadata string is not UTF-8 ({error.reason}): the file is damaged; copy "
            "or download it again"
        ) from error
    types = {k: (f.types[0], f.types[1] if len(f.types) > 1 else None) for k, f in fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        raw_shape = _raw_shape(tensor.name, tensor.tensor_type.name, shape)
        # The base-class view: slicing an np.memmap costs several times a plain array's slice.
        raw = tensor.data.view(np.ndarray).reshape(-1).view(np.uint8).reshape(raw_shape)
        tensors[tensor.name] = TensorInfo(tensor.name, tensor.tensor_type.name, shape, raw)
    return GGUFFile((stamp,), metadata, types, tensors)


def _join_parts(paths: list[Path], opened: GGUFFile) -> GGUFFile:
    """One file from the parts of a split; the metadata of a model stands in its first part."""
    tensors: dict[str, TensorInfo] = {}
    parts = []
    for number, path in enumerate(paths):
        if not path.exists():
            raise ValueError(
                f"{path}: missing part {number + 1} of {len(paths)} of a split file; put all parts "
                "into one directory"
            )
        part = opened if path == opened.paths[0] else _read_part(path)
        got = part.metadata.get("split.no"), part.metadata.get("split.count")
        if got != (number, len(paths)):
            raise ValueError(
                f"{path}: split.no, split.count are {got}, expected {(number, len(paths))}: a part "
                "of another split, or renamed; download the parts together"
            )
        repeated = tensors.keys() & part.tensors.keys()
        if repeated:
            raise ValueError(
                f"{path}: repeats tensor {min(repeated)!r} of an earlier part, expected each once: "
                "a part of another split; download the parts together"
            )
        tensors |= part.tensors
        parts.append(part)
    wanted = parts[0].metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ValueError(
            f"{paths[0]}: the parts hold {len(tensors)} tensors, expected {wanted} "
            "(split.tensors.count): parts of different splits; download the parts together"
        )
    first = parts[0]
    return _drop_split_keys(
        GGUFFile(
            tuple(stamp for part in parts for stamp in part.stamps),
            first.metadata,
            first.field_types,
            tensors,
        ),
    )


def _drop_split_keys(file: GGUFFile) -> GGUFFile:
    """The joined file is no part of anything, and must stay openable when it is written again."""
    metadata = {k: v for k, v in file.metadata.items() if k not in _SPLIT_KEYS}
    types = {k: v for k, v in file.field_types.items() if k not in _SPLIT_KEYS}
    return GGUFFile(file.stamps, metadata, types, file.tensors)


@functools.lru_cache(maxsize=64)
def _sha256(stamps: tuple[FileStamp, ...]) -> str:
    digest = hashlib.sha256()
    for stamp in stamps:
        with stamp.path.open("rb") as file:
            while chunk := file.read(4 << 20):
                digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Writing

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
        if kinds <= {GGUFValueType.INT32, GGUFValueType.INT64}:
            return GGUFValueType.ARRAY, GGUFValueType.INT64
        if kinds:
            names = sorted(kind.name for kind in kinds)
            raise ValueError(f"metadata {key!r}: an array of {names}, expected one type")
        return GGUFValueType.ARRAY, None
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


def _sync_directory(directory: Path) -> None:
    """Makes the rename itself durable; not every file system lets a directory be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
