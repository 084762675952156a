"""The shape of a weight format: its planes, their place in a raw block, and split/join/unpack.

A ggml file stores a row of weights as consecutive *blocks* of `block_bytes` bytes, each holding
small fields (scales, packed quants). Few block sizes are a multiple of 16, so no kernel can load
them in aligned words. A *plane* gathers one field of all blocks of a row: plane `scales` of a row
is the scales of block 0, then of block 1, and so on. Bytes are moved, never changed, and never
reordered inside a field: ggml already keeps runs of 16 or 32 weights in consecutive bytes, which
is what a kernel wants, and the identity leaves one layout to learn.

Owned here: `Plane`, `Format`, and the two bit-unpacking primitives all families share. Users go
through `pallas_kernels.formats`. Source: block structs in ggml-common.h; `gguf.quants` is the
oracle for the values.

Letters of this package: R rows, W weights per row, G blocks per row, P elements of a plane per
block, J sub-blocks of a block, I weights of a sub-block. Every array may have further leading
axes (slots, experts), which are not named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Planes = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Plane:
    """One field of a block.

    Attributes:
        name: the key of this plane in `Format.split`'s result.
        dtype: the element type of its arithmetic.
        per_block: elements (not bytes) per block.
        e8m0: whether an element is the exponent of a float (OCP's E8M0, of which 0xFF is NaN).
    """

    name: str
    dtype: np.dtype
    per_block: int
    e8m0: bool = False

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

    @property
    def exponent_mask(self) -> int:
        """Bits that are all set in an element that is NaN or infinite; 0 if none can be."""
        if self.e8m0:
            return 0xFF
        if not jnp.issubdtype(self.dtype, jnp.floating):
            return 0
        kind = jnp.finfo(self.dtype)
        return ((1 << kind.nexp) - 1) << kind.nmant


class FloatField(NamedTuple):
    """A float in a raw block.

    Attributes:
        offset: bytes from the block's start.
        bits: the unsigned little-endian dtype that reads it.
        exponent_mask: bits that are all set when it is NaN or infinite.
    """

    offset: int
    bits: np.dtype
    exponent_mask: int


@dataclass(frozen=True)
class Format:
    """One ggml weight type. Immutable and hashable, so it can be a static argument of a jit.

    Attributes:
        name: ggml's name, such as "Q4_K".
        block_weights: weights per block.
        block_bytes: bytes per block in the file; the planes hold exactly as many.
        planes: the fields in the order in which they lie in a raw block.
        unpack_blocks: planes [..., R, G, P] -> float32 [..., R, G, *axes], the family's
            arithmetic; the axes flatten to the weights in order, and `unpack` does so.

    Raises:
        ValueError: the planes do not cover `block_bytes`.
    """

    name: str
    block_weights: int
    block_bytes: int
    planes: tuple[Plane, ...]
    unpack_blocks: Callable[[Planes], jax.Array] = field(repr=False)

    def __post_init__(self) -> None:
        plane_bytes = sum(plane.block_bytes for plane in self.planes)
        if plane_bytes != self.block_bytes:
            raise ValueError(
                f"{self.name}: planes hold {plane_bytes} bytes per block, want {self.block_bytes}"
            )

    @property
    def float_fields(self) -> tuple[FloatField, ...]:
        """Every float of a raw block, in order: what can be non-finite in it."""
        found, start = [], 0
        for plane in self.planes:
            size = plane.dtype.itemsize
            for offset in range(start, start + plane.block_bytes, size):
                if plane.exponent_mask:
                    bits = np.dtype(f"<u{size}")
                    found.append(FloatField(offset, bits, plane.exponent_mask))
            start += plane.block_bytes
        return tuple(found)

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of `n_weights` weights, in the file and on the device.

        Raises:
            ValueError: `n_weights` is not a whole number of blocks.
        """
        return self._blocks(n_weights) * self.block_bytes

    def plane_shapes(self, n_rows: int, n_weights: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the planes of an [n_rows, n_weights] matrix.

        Raises:
            ValueError: `n_weights` is not a whole number of blocks.
        """
        n_blocks = self._blocks(n_weights)
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
        blocks = {}
        for plane in self.planes:
            field_RGP = self._by_block(plane, planes[plane.name])
            if plane.in_words:  # a narrowing bitcast adds an axis
                field_RGP = lax.bitcast_convert_type(field_RGP, plane.dtype)
                field_RGP = field_RGP.reshape(*field_RGP.shape[:-2], plane.per_block)
            blocks[plane.name] = field_RGP
        *lead, n_blocks, _ = blocks[self.planes[0].name].shape
        return self.unpack_blocks(blocks).reshape(*lead, n_blocks * self.block_weights)

    def _blocks(self, n_weights: int) -> int:
        n_blocks, rest = divmod(n_weights, self.block_weights)
        if rest:
            raise ValueError(
                f"{self.name}: a row has {n_weights} weights, "
                f"want a multiple of {self.block_weights}"
            )
        return n_blocks

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
    """`(packed >> shifts)`, low `width` bits: uint8 [..., *s] and [*t] -> [..., *broadcast(s, t)].

    For fields that complete those of `bit_fields`: two stacks in one expression make XLA's CPU
    backend 3 to 20 times slower than a stack and a broadcast.
    """
    lead = (1,) * (packed.ndim - shifts.ndim)
    aligned = jnp.asarray(shifts, jnp.uint8).reshape(*lead, *shifts.shape)
    return (packed >> aligned) & ((1 << width) - 1)
