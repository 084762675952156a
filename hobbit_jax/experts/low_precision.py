"""Low-precision copies of a model's experts, written once as GGUF files.

Owns where a low precision lives, when it is stale, and how it is made: each expert is decoded from
its native blocks and encoded again (`quantize/methods.py`), the rest of the model is copied, so the
file is a complete uniformly quantised model that llama.cpp opens as well. It is keyed by the
source's hash, by the encoders' own source text and by the calibration, and reopened by memory map.

GPTQ encodes layer by layer: a layer's inputs are what the layers that are encoded already make of
the text, and its aim is what the native model has in that place, so that later layers make good
what earlier ones lost. `LayerPass` runs that text by both.

GGUF has no type of 2 or 3 bits for rows that are no multiple of 256. A low precision of our own
fills them up with zeros: such a file names an architecture that llama.cpp does not know,
so that nobody takes it for one of llama.cpp's. A file for llama.cpp falls back as llama.cpp does.
"""

import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from hobbit_jax import models, quantize
from hobbit_jax.atomic import check_space, exclusive, new_map
from hobbit_jax.experts.store import ROLES, STACKS, stacked
from hobbit_jax.model_file.gguf_file import GGUFFile, TensorInfo, open_gguf, write_gguf
from hobbit_jax.model_file.gguf_writer import metadata_of_new_weights
from hobbit_jax.model_file.metadata import text
from hobbit_jax.models.config import ModelConfig, layer_tensors
from hobbit_jax.models.loading import unpacked
from hobbit_jax.quantize import ggml
from hobbit_jax.quantize.methods import (
    METHODS,
    LayerHessians,
    LayerMoments,
    check_method,
    encode_matrix,
)
from hobbit_jax.quantize.quant_recipe import format_in_a_file
from pallas_kernels import formats
from pallas_kernels.formats import get_format
from pallas_kernels.reference import Signature

MATRICES = dict(zip(Signature._fields, ROLES, strict=True))  # gate, up and down → role
SOURCE_KEY = "hobbit.low_precision.source_sha256"
ENCODER_KEY = "hobbit.low_precision.encoder_sha256"
METHOD_KEY = "hobbit.low_precision.method"
CALIBRATION_KEY = "hobbit.low_precision.calibration_sha256"


def encoder_sha256() -> str:
    """Hash of the source of the encoders, of models' arithmetic, which GPTQ is given, and of ggml's
    version, so that a better encoder never meets its old output."""
    rooms = [Path(str(room.__file__)).parent for room in (quantize, formats, models)]
    sources = [path for room in rooms for path in sorted(room.glob("*.py"))]
    sources.append(rooms[0].parent / "importance" / "layer_inputs.py")
    found = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    found.update(ggml.version().encode())
    return found.hexdigest()


def decode(blocks: np.ndarray, format: str) -> np.ndarray:
    """float32 weights of raw blocks, by the format's own unpack."""
    return np.asarray(unpacked(get_format(format), blocks))


def dequantize(tensor: TensorInfo, index: int | slice = slice(None)) -> np.ndarray:
    """float32 weights of a tensor, or of some of its rows or experts."""
    raw = tensor.raw if isinstance(index, int) else tensor.blocks
    return decode(raw[index], tensor.format)


class Calibrated(Protocol):
    """What is wanted here of a `hobbit_jax.importance.calibration.Calibration`.

    That module runs an engine; this room must not.
    """

    @property
    def model_sha256(self) -> str:
        """Of the model it was made for."""
        ...

    @property
    def sha256(self) -> str:
        """Identity of the calibration."""
        ...

    def layer(self, layer: int) -> LayerMoments:
        """Of native weights. ValueError if it has none."""
        ...


class SeenLayer(LayerHessians, Protocol):
    """The Hessians and drifts of a layer that is about to run."""

    @property
    def layer(self) -> int:
        """Which one."""
        ...


# Runs the calibration's text with the experts of a file, and natively beside, and shows each layer
# what its experts are about to read, before they are read themselves
# (`importance.layer_inputs.visit_layers`).
LayerPass = Callable[[GGUFFile, Callable[[SeenLayer], None]], None]


@dataclass(frozen=True)
class LowPrecisionSpec:
    """How a low precision is made."""

    format: str
    method: str = METHODS[0]
    calibration: Calibrated | None = None
    # Formats that the weights pass through first, each by ggml without a calibration: what a
    # quantised file would have done to them.
    through: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()  # of `MATRICES`, that are encoded and not left as they are; () all

    def __post_init__(self):
        if unknown := set(self.roles) - set(MATRICES):
            raise ValueError(f"roles {sorted(unknown)}; want some of {', '.join(MATRICES)}")

    def key(self, source: GGUFFile) -> str:
        """Identity of the precision's bytes: of the source, of the encoders, of the calibration."""
        calibrated = f"-{self.calibration.sha256[:8]}" if self.calibration else ""
        formats = "-".join([*self.through, self.format, *self.roles])
        return f"{source.sha256()[:16]}-{encoder_sha256()[:8]}-{formats}-{self.method}{calibrated}"


def _places(config: ModelConfig, roles: tuple[str, ...] = ()) -> dict[str, tuple[str, int]]:
    """Role and layer of every expert tensor, by name; of a fused one, the role of its gate.

    Raises:
        NotImplementedError: `roles` name one half of a fused matrix.
    """
    if config.fused_gate_up and len({"gate", "up"} & set(roles)) == 1:
        raise NotImplementedError(
            f"{config.arch} stores gate and up as one matrix; name both roles or neither"
        )
    chosen = {MATRICES[role] for role in roles or MATRICES}
    places = {
        name: ("ffn_gate_exps" if role == "ffn_gate_up_exps" else role, layer)
        for layer in range(config.n_layers)
        for role, name in layer_tensors(config, layer).items()
        if role in STACKS
    }
    return {name: place for name, place in places.items() if place[0] in chosen}


def _filled_up(shape: tuple[int, ...], format: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A tensor's shape with its rows filled up to whole blocks, and that of its raw blocks."""
    columns = get_format(format).padded(shape[-1])
    return (*shape[:-1], columns), (*shape[:-1], get_format(format).row_bytes(columns))


def planned_low_precision(source: GGUFFile, config: ModelConfig, format: str) -> GGUFFile:
    """The low precision in `format` with all its shapes and sizes, but no bytes behind its experts.

    Raises:
        NotImplementedError: a format that we cannot read.
    """
    blocks = {}
    for name in _places(config):
        shape, raw_shape = _filled_up(source.tensors[name].shape, format)
        blocks[name] = (format, shape, np.broadcast_to(np.uint8(0), raw_shape))
    return _with_experts(source, blocks)


def _with_experts(
    source: GGUFFile, blocks: Mapping[str, tuple[str, tuple[int, ...], np.ndarray]]
) -> GGUFFile:
    """`source` with other tensors in the place of some: their format, shape and raw blocks."""
    tensors = dict(source.tensors)
    for name, (format, shape, raw) in blocks.items():
        tensors[name] = replace(tensors[name], format=format, shape=shape, raw=raw)
    return replace(source, tensors=tensors)


def disk_bytes(source: GGUFFile, config: ModelConfig, format: str) -> int:
    """Bytes on disk that making a low precision takes: the file, and its experts beside it."""
    planned = planned_low_precision(source, config, format)
    parts = sum(planned.tensors[name].nbytes for name in _places(config))
    return parts + sum(tensor.nbytes for tensor in planned.tensors.values())


def write_low_precision(
    source: GGUFFile,
    config: ModelConfig,
    spec: LowPrecisionSpec,
    path: Path,
    run_text: LayerPass | None = None,
    for_llama_cpp: bool = True,
) -> None:
    """Writes `source` with every expert encoded anew; atomic, and resumable by tensor.

    Finished tensors wait in a folder beside `path` and are taken from there when the same precision
    is asked for again after an interruption; it is removed in the end.
    Memory: one expert's float32 weights, and what `run_text` takes.

    Args:
        run_text: runs the calibration's text; method gptq needs it.
        for_llama_cpp: rows that are no whole number of blocks get llama.cpp's own type for such
            rows, encoded by ggml; otherwise they are filled up.

    Raises:
        ValueError: a weight is NaN or infinite, or the calibration is missing, lacks what the
            method needs, or is of another model.
        NotImplementedError: no encoder for this format and method, or llama.cpp has no type.
        OSError: the disk has no room for it.
    """
    calibration = spec.calibration
    if calibration is not None and calibration.model_sha256 != source.sha256():
        raise ValueError(
            f"the calibration was made for another model (sha256 {calibration.model_sha256[:16]}…, "
            f"this one is {source.sha256()[:16]}…)"
        )
    check_method(spec.format, spec.method, calibration is not None)
    moments_L: list[LayerMoments | None] = [None] * config.n_layers
    if calibration is not None and spec.method == "ggml":
        moments_L = [calibration.layer(layer) for layer in range(config.n_layers)]
    places = _places(config, spec.roles)
    formats = dict.fromkeys(places, spec.format)
    if for_llama_cpp:
        formats = _formats_in_a_file(source, spec.format, places)
    recipe = spec.key(source) + ("" if for_llama_cpp else "-own")
    folder = path.with_name(f".{path.name}.{recipe}.parts")
    path.parent.mkdir(parents=True, exist_ok=True)
    finished_bytes = sum(part.stat().st_size for part in folder.glob("*.npy"))
    check_space(path, disk_bytes(source, config, spec.format) - finished_bytes)
    parts = {name: _Part(folder, source.tensors[name], formats[name]) for name in places}
    low = _with_experts(source, {name: part.content for name, part in parts.items()})
    total = len(places) * config.n_experts
    with tqdm(total=total, unit="matrix", desc=f"encoding {spec.format}", disable=None) as progress:

        def encode_layer(layer: int, moments: LayerMoments | None) -> None:
            # Down reads what gate and up make, so it comes last.
            for role in ROLES:
                for name in (n for n, place in places.items() if place == (role, layer)):
                    encode = partial(_encode, format=formats[name], spec=spec, moments=moments)
                    parts[name].fill(partial(encode, role=role), config.n_experts, progress.update)

        if spec.method == "gptq":
            assert run_text is not None, "method gptq needs someone to run the text"
            run_text(low, lambda seen: encode_layer(seen.layer, seen))
        else:
            for layer, moments in enumerate(moments_L):
                encode_layer(layer, moments)
    metadata = _metadata(source, config, spec)
    if any(low.tensors[name].shape != source.tensors[name].shape for name in places):
        metadata["general.architecture"] = f"{config.arch}-padded"
    tensors = [(t.name, t.format, t.shape, t.blocks) for t in low.tensors.values()]
    write_gguf(path, metadata, tensors, source.field_types)
    # Also those of another recipe whose writer was killed. If another process wrote the same
    # precision after all, it was the same bytes.
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.parts"):
        shutil.rmtree(leftover, ignore_errors=True)


class _Part:
    """One encoded tensor on its way, a .npy file of its own that has its name when it is whole.

    `content` is its format, shape and blocks; these change as they are written.
    """

    def __init__(self, folder: Path, source: TensorInfo, format: str):
        folder.mkdir(exist_ok=True)
        self._source, (shape, raw_shape) = stacked(source), _filled_up(source.shape, format)
        self._path = folder / f"{source.name}.npy"
        self._unfinished = self._path.with_suffix(".unfinished")
        if self._path.exists():
            blocks = np.load(self._path, mmap_mode="r")
        else:
            blocks = new_map(self._unfinished, np.uint8, raw_shape)
        self.content = format, shape, blocks

    def fill(
        self, encode: Callable[..., np.ndarray], n_experts: int, finished: Callable[[int], object]
    ) -> None:
        """Encodes every expert's weights, unless that has been done; tells of each."""
        *_, blocks = self.content
        if self._path.exists():
            finished(n_experts)
            return
        for expert, out in enumerate(blocks.reshape(n_experts, -1, blocks.shape[-1])):
            out[:] = encode(dequantize(self._source, expert), expert=expert)
            finished(1)
        blocks.flush()
        os.replace(self._unfinished, self._path)


def _formats_in_a_file(
    source: GGUFFile, format: str, places: Mapping[str, tuple[str, int]]
) -> dict[str, str]:
    """The format of each tensor in a file for llama.cpp; says where it is another one."""
    formats = {n: format_in_a_file(format, source.tensors[n].shape[-1]) for n in places}
    instead = {places[name][0]: name for name in places if formats[name] != format}
    for role, name in sorted(instead.items()):
        print(
            f"{role}: rows of {source.tensors[name].shape[-1]} weights are no multiple of "
            f"{get_format(format).block_weights}; {formats[name]} instead of {format}, as in "
            "llama.cpp",
            file=sys.stderr,
        )
    return formats


def _metadata(source: GGUFFile, config: ModelConfig, spec: LowPrecisionSpec) -> dict[str, Any]:
    metadata = {
        **metadata_of_new_weights(source.metadata, spec.format),
        SOURCE_KEY: source.sha256(),
        ENCODER_KEY: encoder_sha256(),
        METHOD_KEY: spec.method,
        "general.name": f"{source.read('general.name', text(), config.arch)} experts {spec.format}",
    }
    if spec.calibration is not None:
        metadata[CALIBRATION_KEY] = spec.calibration.sha256
    return metadata


def _encode(
    weights_NK: np.ndarray,
    format: str,
    spec: LowPrecisionSpec,
    moments: LayerMoments | None,
    role: str,
    expert: int,
) -> np.ndarray:
    """One expert's matrix by `spec`; where the file has another format, by ggml."""
    columns = weights_NK.shape[-1]
    for name in spec.through:
        whole_NK = np.pad(weights_NK, ((0, 0), (0, get_format(name).padded(columns) - columns)))
        weights_NK = decode(ggml.encode(whole_NK, name), name)[:, :columns]
    method = spec.method if format == spec.format else "ggml"
    return encode_matrix(weights_NK, format, method, moments, role, expert)


def open_low_precision(
    source: GGUFFile,
    config: ModelConfig,
    spec: LowPrecisionSpec,
    directory: Path,
    run_text: LayerPass | None = None,
) -> GGUFFile:
    """The low precision of `source` by `spec`, made if it is not in `directory` yet; says which.

    Of several processes one makes it and the others wait.

    Raises:
        OSError: `directory` cannot be written.
        ValueError, NotImplementedError: see `write_low_precision`.
    """
    path = directory / f"{spec.key(source)}.gguf"
    if path.exists():
        print(f"low-precision experts: {path} was made before", file=sys.stderr)
        return open_gguf(path)
    print(f"low-precision experts: making {path}", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive(path):
        if not path.exists():
            write_low_precision(source, config, spec, path, run_text, for_llama_cpp=False)
    return open_gguf(path)
