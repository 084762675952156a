"""GGUF files as views: memory-mapped raw blocks, metadata, the parts of a split as one file.

Owns the boundary to the file on disk. A file is checked completely before a view of it is handed
out (`gguf_header`, `other_files`), so nothing behind this module meets a truncated or foreign file.

Source: the GGUF specification in ggml (docs/gguf.md); split files: llama.cpp, tools/gguf-split.
"""

import functools
import hashlib
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hobbit_jax.model_file import gguf_header
from hobbit_jax.model_file.gguf_header import FieldType
from hobbit_jax.model_file.gguf_writer import write_gguf as write_gguf  # its counterpart
from hobbit_jax.model_file.metadata import REQUIRED, Kind, Required, integer, shown
from hobbit_jax.model_file.other_files import (
    START_BYTES,
    describe_piece,
    describe_start,
    refuse_path,
)
from pallas_kernels.formats import get_format

T = TypeVar("T")

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_ONE_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight")
_MAX_PARTS = 99_999  # that five digits of a name can count
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """One tensor of a file: what it is, and its bytes as they lie on disk."""

    name: str
    format: str  # a name that `pallas_kernels.formats.get_format` knows
    shape: tuple[int, ...]  # row-major, (E, F, D) for ffn_gate_exps; the last axis is one row
    # uint8 [*shape[:-1], row_bytes], a read-only view into the memory map; or [E] such views, of
    # experts that are a tensor each in the file.
    raw: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file, without padding."""
        apart = self.raw.dtype == object
        return sum(part.nbytes for part in self.raw) if apart else self.raw.nbytes

    @property
    def blocks(self) -> np.ndarray:
        """`raw` as one array, which is a copy of experts that are apart."""
        return np.stack(list(self.raw)) if self.raw.dtype == object else self.raw


class FileStamp(NamedTuple):
    """What tells that a file on disk is still the one that was mapped."""

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """The file as it is now. FileNotFoundError if there is none."""
        stat = os.stat(path)
        return cls(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """Refuses a file that is gone or another than it was by an OSError; takes microseconds.

        Reading a map past the end of a file that was cut short kills the process (SIGBUS), so
        whoever reads late asks first.
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
    """An opened, checked file; the parts of a split file appear as one."""

    stamps: tuple[FileStamp, ...]  # in the order of the parts
    metadata: dict[str, Any]  # Python scalars, strings and lists, unchecked: for copying
    field_types: dict[str, FieldType]  # the GGUF type of each metadata key
    tensors: dict[str, TensorInfo]  # in file order

    def read(self, key: str, kind: Kind[T], default: T | Required = REQUIRED) -> T:
        """The metadata value of `key`, checked to be of `kind`, or `default` where it is missing.

        Raises:
            ValueError: the value is of another type or outside the range, or the file has no such
                key and there is no default.
        """
        problem = f"{self.paths[0]}: metadata key {key}"
        advice = "convert the model again with a current llama.cpp"
        if key not in self.metadata:
            if isinstance(default, Required):
                raise ValueError(f"{problem} is missing, expected {kind.wanted}; {advice}")
            return default
        try:
            return kind.check(self.metadata[key])
        except ValueError as error:
            raise ValueError(f"{problem} is {error}, expected {kind.wanted}; {advice}") from None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of all parts, in order."""
        return tuple(stamp.path for stamp in self.stamps)

    @property
    def file_bytes(self) -> int:
        """Size on disk of all parts."""
        return sum(path.stat().st_size for path in self.paths)

    def sha256(self) -> str:
        """Hex digest of the bytes of all parts; a file is read once, unless it has changed."""
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
    opened = _read_part(path)
    names = part_names(path.name)
    count = opened.read("split.count", integer(0, _MAX_PARTS), 1) or 1
    if count != len(names):
        raise ValueError(
            f"{path}: the file says it is one of {count} part(s) (split.count) but its name says "
            f"{len(names)}; give the parts the names they were made with "
            f"(NAME-00001-of-{count:05d}.gguf)"
        )
    if count == 1:
        return _as_written(opened)
    if path.name not in names:
        raise ValueError(f"{path}: none of {count} parts, expected {names[0]} to {names[-1]}")
    return _as_written(_join_parts([path.with_name(name) for name in names], opened))


def part_names(name: str) -> list[str]:
    """Names of all parts of a split file, by that of one; its own of another file."""
    found = _SPLIT_NAME.fullmatch(name)
    if found is None:
        return [name]
    stem, count = found["stem"], int(found["count"])
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def check_finite_scales(tensor: TensorInfo) -> None:
    """Refuses a tensor in which a block scale or a float weight is NaN or infinite.

    Looks at every float of a block (`Format.float_fields`); its quants cannot be non-finite, nor
    can NVFP4's scales.

    Raises:
      ValueError: names the tensor and its first bad row.
    """
    format = get_format(tensor.format)
    row_bytes = tensor.raw.shape[-1]
    raw = tensor.raw.reshape(-1, row_bytes)
    step = max(1, (16 << 20) // row_bytes)  # about 16 MiB at a time
    for start in range(0, len(raw), step):
        rows = raw[start : start + step]
        blocks = rows.reshape(len(rows), -1, format.block_bytes)
        for offset, bits, mask in format.float_fields:
            field = np.ascontiguousarray(blocks[:, :, offset : offset + bits.itemsize]).view(bits)
            bad = ((field & mask) == mask).reshape(len(rows), -1)
            if bad.any():
                row, block = (int(i[0]) for i in np.nonzero(bad))
                index = tuple(int(i) for i in np.unravel_index(start + row, tensor.shape[:-1]))
                what = "weight" if format.block_weights == 1 else f"{format.name} block scale"
                raise ValueError(
                    f"tensor {tensor.name!r}: a NaN or infinite {what} in row {index}, "
                    f"block {block}, but finite values were expected; the file is damaged or was "
                    "converted from a damaged model: download or convert it again"
                )


def _read_part(path: Path) -> GGUFFile:
    refuse_path(path)
    stamp = FileStamp.of(path)
    _check_prologue(path)
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    try:
        header = gguf_header.parse(data)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None
    except ValueError as error:
        if piece := describe_piece(path):
            raise ValueError(f"{path}: {piece} ({error})") from None
        raise ValueError(
            f"{path}: {error}: the file is truncated or damaged, expected a complete GGUF file; "
            "copy or download it again"
        ) from None
    tensors = {}
    for name, entry in header.tensors.items():
        raw = data[entry.start : entry.start + entry.nbytes]
        shape = gguf_header.raw_shape(name, entry.format, entry.shape)
        tensors[name] = TensorInfo(name, entry.format, entry.shape, raw.reshape(shape))
    return GGUFFile((stamp,), header.metadata, header.field_types, tensors)


def _check_prologue(path: Path) -> None:
    """Refuses what is no GGUF file of a known version by its first bytes."""
    with path.open("rb") as file:
        head = file.read(START_BYTES)
    if not head or head[:4] != b"GGUF"[: len(head)]:
        raise ValueError(f"{path}: {describe_start(path, head)}")
    if len(head) < gguf_header.PROLOGUE_BYTES:
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
        got = tuple(part.read(key, integer(0, _MAX_PARTS), None) for key in _SPLIT_KEYS[:2])
        if got != (number, len(paths)):
            raise ValueError(
                f"{path}: split.no, split.count are {got}, expected {(number, len(paths))}: a part "
                "of another split, or renamed; download the parts together"
            )
        repeated = tensors.keys() & part.tensors.keys()
        if repeated:
            raise ValueError(
                f"{path}: repeats tensor {shown(min(repeated))} of an earlier part, expected each "
                "once: a part of another split; download the parts together"
            )
        tensors |= part.tensors
        parts.append(part)
    wanted = parts[0].read("split.tensors.count", integer(), len(tensors))
    if wanted != len(tensors):
        raise ValueError(
            f"{paths[0]}: the parts hold {len(tensors)} tensors, expected {wanted} "
            "(split.tensors.count): parts of different splits; download the parts together"
        )
    stamps = tuple(stamp for part in parts for stamp in part.stamps)
    return replace(parts[0], stamps=stamps, tensors=tensors)


def _as_written(file: GGUFFile) -> GGUFFile:
    """A file as converters write it today, which stays openable when it is written again.

    It is no part of a split. Experts that are a tensor each, as before April 2024, become one of
    all; where one is missing, or of another type than the others, they stay as they are.
    """
    apart: dict[str, dict[int, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        if found := _ONE_EXPERT.fullmatch(name):
            apart.setdefault(f"{found[1]}_exps.weight", {})[int(found[2])] = tensor
    tensors = dict(file.tensors)
    for name, experts in apart.items():
        kinds = {(tensor.format, tensor.shape) for tensor in experts.values()}
        if len(kinds) == 1 and experts.keys() == {*range(len(experts))} and name not in tensors:
            ((format, shape),) = kinds
            raw = np.empty(len(experts), object)
            for expert, tensor in experts.items():
                raw[expert] = tensors.pop(tensor.name).raw
            tensors[name] = TensorInfo(name, format, (len(experts), *shape), raw)
    metadata = {k: v for k, v in file.metadata.items() if k not in _SPLIT_KEYS}
    types = {k: v for k, v in file.field_types.items() if k not in _SPLIT_KEYS}
    return GGUFFile(file.stamps, metadata, types, tensors)


@functools.lru_cache(maxsize=64)
def _sha256(stamps: tuple[FileStamp, ...]) -> str:
    digest = hashlib.sha256()
    for stamp in stamps:
        with stamp.path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
