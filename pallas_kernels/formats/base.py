"""The shape of a weight format: its planes, their place in a raw block, and split/join/unpack.

A ggml file stores a row of weights as consecutive *blocks* of `block_bytes` bytes, each holding
small fields (scales, packed quants). Few block sizes are a multiple of 16, so no kernel can load
them in aligned words. A *plane* gathers one field of all blocks of a row: plane `scales` of a row
is the scales of block 0, then of block 1, and so on. Bytes are moved, never changed, and never
reordered inside a field: ggml already keeps runs of 16 or 32 weights in consecutive bytes, which
is what a kernel wants, and the identity leaves one layout to learn.

Owned here too: what an encoder has to know (`KQuant`), and the bit-unpacking primitives that all
families share. Users go through `pallas_kernels.formats`.
Source: block structs in ggml-common.h; `gguf.quants` is the oracle for the values.

Letters of this package: R rows, W weights per row, G blocks per row, P elements of a plane per
block, J sub-blocks of a block, I weights of a sub-block. Every array may have further leading
axes (slots, experts), which are not named.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats.packing import Floats, Packing

Planes = Mapping[str, jax.Array]


class Plane(NamedTuple):
    """One field of a block."""

    name: str  # the key of this plane in `Format.split`'s result
    dtype: np.dtype  # of an element, in arithmetic
    per_block: int  # elements (not bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of this field in one block."""
        return self.per_block * self.dtype.itemsize

    @property
    def in_words(self) -> bool:
        """Whether the device holds uint32 words of four elements each."""
        return self.dtype.itemsize == 1 and self.per_block % 4 == 0

    @property
    def device_dtype(self) -> np.dtype:
        """The element type of the array that holds this plane."""
        return np.dtype(np.uint32) if self.in_words else self.dtype

    @property
    def device_per_block(self) -> int:
        """Elements of that array per block."""
        return self.block_bytes // self.device_dtype.itemsize


class FloatField(NamedTuple):
    """A float in a raw block."""

    offset: int  # bytes from the block's start
    bits: np.dtype  # the unsigned little-endian dtype that reads it
    exponent_mask: int  # bits that are all set when it is NaN or infinite


@dataclass(frozen=True)
class KQuant:
    """An encoder chooses weight = d * scale * q, minus dmin * offset if there are offsets."""

    has_offsets: bool
    sub_len: int
    q_range: tuple[int, int]
    scale_range: tuple[int, int]
    # First guesses for a sub-block's real-valued scale. With offsets, (a, b): the lowest level lies
    # at a·min(w, 0), the highest at b·max(w). Without, (a,): the weight of largest magnitude lies
    # at q = a. Guesses that clip the extreme weights are the better ones at 2 and 3 bits.
    guesses: tuple[tuple[float, ...], ...]
    # One entry a pass: whether it tries integers nearby before it fits the super-scales again. At
    # Q3_K trying costs a tenth of the time for 0.03 % of the error.
    passes: tuple[bool, ...] = (True, True)


@dataclass(frozen=True)
class Format:
    """One ggml weight type. Immutable and hashable, so it can be a static argument of a jit."""

    name: str  # ggml's, such as "Q4_K"
    number: int  # ggml's, as in a file (`enum ggml_type`)
    block_weights: int
    planes: tuple[Plane, ...]  # in the order in which they lie in a raw block
    # Planes [..., R, G, P] -> float32 [..., R, G, *axes], the family's arithmetic; the axes flatten
    # to the weights in order, and `unpack` does so.
    unpack_blocks: Callable[[Planes], jax.Array] = field(repr=False)
    # Planes [..., R, G, P] -> the small integers of a block as they are stored, uint8
    # [..., R, G, *axes] each: a code for every weight first. For formats with an encoder.
    integers: Callable[[Planes], tuple[jax.Array, ...]] | None = field(default=None, repr=False)
    encoder: KQuant | None = None  # None for a format that ggml alone can write
    packing: Packing | Floats | None = field(default=None, repr=False)  # None where XLA computes it
    other_floats: tuple[FloatField, ...] = ()  # that are no plane of a floating dtype

    @property
    def block_bytes(self) -> int:
        """Bytes per block, in the file and on the device."""
        return sum(plane.block_bytes for plane in self.planes)

    @property
    def float_fields(self) -> tuple[FloatField, ...]:
        """Every float of a raw block, in order: what can be non-finite in it."""
        found, start = list(self.other_floats), 0
        for plane in self.planes:
            if jnp.issubdtype(plane.dtype, jnp.floating):  # one a block
                kind, bits = jnp.finfo(plane.dtype), np.dtype(f"<u{plane.block_bytes}")
                found.append(FloatField(start, bits, ((1 << kind.nexp) - 1) << kind.nmant))
            start += plane.block_bytes
        return tuple(found)

    def padded(self, n_weights: int) -> int:
        """Weights in the blocks of a row of `n_weights`: the last block is filled up.

        A GGUF file has whole blocks only. Low precisions of our own fill the last one with zeros,
        which meet activations of zero.
        """
        return -(-n_weights // self.block_weights) * self.block_weights

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights` weights, its filling included, wherever it lies."""
        return self.padded(n_weights) // self.block_weights * self.block_bytes

    def plane_shapes(self, n_rows: int, n_weights: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the planes of an [n_rows, n_weights] matrix."""
        n_blocks = self.padded(n_weights) // self.block_weights
        return {
            plane.name: jax.ShapeDtypeStruct(
                (n_rows, n_blocks * plane.device_per_block), plane.device_dtype
            )
            for plane in self.planes
        }

    def split(self, raw: jax.Array | np.ndarray) -> dict[str, jax.Array]:
        """Raw file bytes, uint8 [..., R, row_bytes], to planes, each [..., R, G*P].

        Bits are only moved (NaN payloads of float planes survive), so `join` inverts it exactly.
        Meant to be jitted, after one contiguous upload.

        Raises:
            ValueError: `raw` is not uint8, or its rows are not a whole number of blocks.
        """
        if raw.dtype != np.uint8:
            raise ValueError(f"{self.name}: raw bytes have dtype {raw.dtype}, want uint8")
        *lead, row_bytes = raw.shape
        n_blocks, rest = divmod(row_bytes, self.block_bytes)
        if rest:
            raise ValueError(
                f"{self.name}: a row has {row_bytes} bytes, want a multiple of {self.block_bytes}"
            )
        raw_RGb = jnp.asarray(raw).reshape(*lead, n_blocks, self.block_bytes)
        planes = {}
        start = 0
        for plane in self.planes:
            field_RGb = raw_RGb[..., start : start + plane.block_bytes]
            start += plane.block_bytes
            if plane.device_dtype.itemsize > 1:  # a widening bitcast consumes the last axis
                field_RGb = field_RGb.reshape(
                    *lead, n_blocks, plane.device_per_block, plane.device_dtype.itemsize
                )
            field_RGP = lax.bitcast_convert_type(field_RGb, plane.device_dtype)
            planes[plane.name] = field_RGP.reshape(*lead, n_blocks * plane.device_per_block)
        return planes

    def join(self, planes: Planes) -> jax.Array:
        """Planes, each [..., R, G*P], back to raw file bytes, uint8 [..., R, row_bytes].

        Raises:
            ValueError: a plane has another dtype than the format's, or no whole number of blocks.
        """
        fields_RGb = []
        for plane in self.planes:
            # To bytes before anything else: a backend may quieten a NaN when it concatenates f16.
            field_RGP = self._by_block(plane, planes[plane.name])
            field_RGb = lax.bitcast_convert_type(field_RGP, jnp.uint8)
            fields_RGb.append(field_RGb.reshape(*field_RGP.shape[:-1], plane.block_bytes))
        raw_RGb = jnp.concatenate(fields_RGb, axis=-1)
        *lead, n_blocks, _ = raw_RGb.shape
        return raw_RGb.reshape(*lead, n_blocks * self.block_bytes)

    def unpack(self, planes: Planes) -> jax.Array:
        """Planes, each [..., R, G*P], to weights, float32 [..., R, W].

        Equal to `gguf.quants.dequantize` bit for bit for finite scales, jitted or not: each
        family's products are exact in float32, so a fused multiply-add changes nothing.

        Raises:
            ValueError: a plane has another dtype than the format's, or no whole number of blocks.
        """
        blocks = self._elements(planes)
        *lead, n_blocks, _ = blocks[self.planes[0].name].shape
        return self.unpack_blocks(blocks).reshape(*lead, n_blocks * self.block_weights)

    def pack(self, integers: Sequence[np.ndarray], floats: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `integers`: blocks uint8 [G, block_bytes].

        Args:
            integers: uint8 [G, n] each, as `integers` gives them, with its axes flattened.
            floats: float16 [G] each, in the order of the float planes.
        """
        source_nG = np.ascontiguousarray(np.concatenate(integers, axis=1).T)
        blocks_PG = np.zeros((self.block_bytes, source_nG.shape[1]), np.uint8)
        for bit, place_P in enumerate(self._bit_sources.reshape(-1, 8).T):
            moved_PG = source_nG[place_P // 8]  # in rows, so that each step is vectorised
            moved_PG >>= (place_P % 8).astype(np.uint8)[:, None]
            moved_PG &= 1
            moved_PG <<= bit
            blocks_PG |= moved_PG
        blocks_GP = np.ascontiguousarray(blocks_PG.T)
        places = [at for at, *_ in self.float_fields]
        for at, values_G in zip(places, floats, strict=True):
            blocks_GP[:, at : at + 2] = values_G.astype("<f2")[:, None].view(np.uint8)
        return blocks_GP

    @functools.cached_property
    def _bit_sources(self) -> np.ndarray:
        """For every bit of a raw block, which bit of `integers` lies there (0 for a float's).

        Found by reading blocks of which one bit is set, so that a layout is said only once.
        """
        n_bits = 8 * self.block_bytes
        one_bit_each = np.packbits(np.eye(n_bits, dtype=np.uint8), axis=1, bitorder="little")
        integers = self.integers
        assert integers is not None, f"{self.name} has no encoder, and so nothing to pack"
        read = jax.jit(lambda raw: integers(self._elements(self.split(raw))))
        parts = [np.asarray(part).reshape(n_bits, -1) for part in read(one_bit_each)]
        bits = np.unpackbits(np.concatenate(parts, axis=1), axis=1, bitorder="little")
        return bits.argmax(axis=1)

    def _elements(self, planes: Planes) -> dict[str, jax.Array]:
        """Planes [..., R, G*P] as [..., R, G, P] in the dtypes of their arithmetic, checked."""
        blocks = {}
        for plane in self.planes:
            field_RGP = self._by_block(plane, planes[plane.name])
            if plane.in_words:  # a narrowing bitcast adds an axis
                field_RGP = lax.bitcast_convert_type(field_RGP, plane.dtype)
                field_RGP = field_RGP.reshape(*field_RGP.shape[:-2], plane.per_block)
            blocks[plane.name] = field_RGP
        return blocks

    def _by_block(self, plane: Plane, values: jax.Array | np.ndarray) -> jax.Array:
        """One plane [..., R, G*P] as [..., R, G, P], checked."""
        *lead, width = values.shape
        n_blocks, rest = divmod(width, plane.device_per_block)
        if rest or values.dtype != plane.device_dtype:
            raise ValueError(
                f"{self.name} plane {plane.name}: got {values.dtype} rows of {width}, "
                f"want {plane.device_dtype} rows of a multiple of {plane.device_per_block}"
            )
        return jnp.asarray(values).reshape(*lead, n_blocks, plane.device_per_block)


D = Plane("d", np.dtype(np.float16), 1)


def byte_plane(name: str, per_block: int) -> Plane:
    """A field of bytes."""
    return Plane(name, np.dtype(np.uint8), per_block)


def bit_fields(packed: jax.Array, width: int, run_axes: int = 1) -> jax.Array:
    """All `width`-bit fields of bytes, low bits first: uint8 [..., *run] -> [..., 8//width, *run].

    ggml packs weight i of a run of n with weights i + n, i + 2n, ..., so the fields go on an axis
    before the run, which is the last `run_axes` axes. Stacked rather than shifted by a broadcast
    vector: 2 to 10 times as fast on XLA's CPU backend, which vectorises each of the copies.
    """
    mask = (1 << width) - 1
    fields = [(packed >> shift) & mask for shift in range(0, 8, width)]
    return jnp.stack(fields, axis=-1 - run_axes)


def shifted_bits(packed: jax.Array, shifts: np.ndarray, width: int) -> jax.Array:
    """`(packed >> shifts)`, low `width` bits: uint [..., *s] and [*t] -> [..., *broadcast(s, t)].

    For fields that complete those of `bit_fields`: two stacks in one expression make XLA's CPU
    backend 3 to 20 times slower than a stack and a broadcast.
    """
    lead = (1,) * (packed.ndim - shifts.ndim)
    aligned = jnp.asarray(shifts, packed.dtype).reshape(*lead, *shifts.shape)
    return (packed >> aligned) & ((1 << width) - 1)
