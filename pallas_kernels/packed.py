"""How a kernel reads a matrix: sixteen or thirty-two bytes of quants at a time, with their scale.

Owns, for every format, the arithmetic from words in registers to *codes* (four integers in the
bytes of a word) and scales. The layouts are those
of `formats/`, whose `unpack` is the oracle; they are said again here because a kernel must not
gather, slice or reorder what it has loaded, which is what `unpack` is made of.

Every format is   weight = d * scale * (code - zero) - dmin * minimum   with float `d` and `dmin`
per group and small integers `scale` and `minimum` per group and field (1 where a format has none).

A row of packed quants is a sequence of *runs* of `run_bytes` bytes. Byte p of run q holds, in its
`fields` bit fields n = 0, 1, ..., the weights

    q * fields * run_bytes + n * run_bytes + p

A kernel takes runs in *groups* of one or two *parts* of four words (what a thread loads at once),
such that the weights of one field of one group lie under one scale. Weight numbers are then affine
in (group, field, part, byte), for any format.

Letters: R rows of a tile, J groups of a tile, U the four words of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats.codebook import IQ4_NL_VALUES, MXFP4_VALUES, look_up

WORDS = 4  # of a part: 16 bytes
_EVERY_BYTE = 0x01010101


class MatrixTile(Protocol):
    """What a format may ask of the tile that a kernel stands on."""

    group_J: jax.Array  # int32 [J]: the tile's groups, counted from the start of the row

    def at(self, plane: str, column_J: jax.Array) -> jax.Array:
        """One element of a plane for each row and group: [R, J, 1]."""
        ...

    def words(self, plane: str, column_J: jax.Array) -> jax.Array:
        """Four neighbouring elements from each column on: [R, J, U]."""
        ...


Supers = tuple[jax.Array, jax.Array | None]
Scales = tuple[jax.Array | None, jax.Array | None]


@dataclass(frozen=True)
class Packing:
    """A format of packed integers, as a kernel reads it.

    Attributes:
        fields: bit fields of a byte of `quants` (1, 2 or 4).
        run_bytes: bytes between two weights that share a byte.
        parts: of a group.
        codes: (tile, field, part) -> uint32 [R, J, U], a code in each byte.
        supers: tile -> (d, dmin), float32 [R, J, 1]; no dmin means no minimum.
        scales: (tile, field) -> (scale, minimum), int32 [R, J, 1]; None is one.
        signed: codes are int8, otherwise uint8.
        zero: the code that stands for zero.
    """

    fields: int
    run_bytes: int
    parts: int
    codes: Callable[[MatrixTile, int, int], jax.Array]
    supers: Callable[[MatrixTile], Supers]
    scales: Callable[[MatrixTile, int], Scales]
    signed: bool = False
    zero: int = 0

    @property
    def group_weights(self) -> int:
        """Neighbouring weights that one field of a group holds."""
        return WORDS * 4 * self.parts

    @property
    def group_columns(self) -> int:
        """Weights of a group, in all fields."""
        return self.fields * self.group_weights

    def place(self, group_J: jax.Array, field: int) -> jax.Array:
        """Where this field's weights of each group lie in the row, in groups' widths: int32 [J].

        Times `group_weights` it is the number of the first weight. (Not the other way round: a
        compiler sees aligned, neighbouring addresses behind a product and not behind a quotient.)
        """
        per_run = self.run_bytes // self.group_weights
        run_J, part_J = group_J // per_run, group_J % per_run
        return (run_J * self.fields + field) * per_run + part_J


@dataclass(frozen=True)
class Floats:
    """A format of plain floats: `weights`, taken four at a time."""

    operand_dtype: type  # of the matrix product; float32 stands for TF32

    group_columns = WORDS


def lane(codes_RJU: jax.Array, byte: int, signed: bool) -> jax.Array:
    """One of the four codes of each word as float32 [R, J, U]."""
    if signed:
        return ((codes_RJU.astype(jnp.int32) << (24 - 8 * byte)) >> 24).astype(jnp.float32)
    return ((codes_RJU >> (8 * byte)) & 255).astype(jnp.int32).astype(jnp.float32)


# --- pieces that families share ---------------------------------------------------------------


def _quants(tile: MatrixTile, parts: int, part: int) -> jax.Array:
    return tile.words("quants", (tile.group_J * parts + part) * WORDS)


def _bits(words: jax.Array, shift: int, width: int, to: int = 0) -> jax.Array:
    """`width` bits of every byte, moved from bit `shift` of the byte to bit `to`: one shift."""
    moved = words >> (shift - to) if shift >= to else words << (to - shift)
    return moved & (_EVERY_BYTE * (((1 << width) - 1) << to))


def _per_group(value_J: jax.Array) -> jax.Array:
    """A shift that differs between groups, uint32 [1, J, 1]."""
    return value_J.astype(jnp.uint32)[None, :, None]


def _supers(groups_per_block: int, *planes: str) -> Callable[[MatrixTile], Supers]:
    """Reads `d`, or `d` and `dmin`, of each group's block."""

    def read(tile: MatrixTile) -> Supers:
        block_J = tile.group_J // groups_per_block
        d, *dmin = (tile.at(plane, block_J).astype(jnp.float32) for plane in planes)
        return d, dmin[0] if dmin else None

    return read


def _no_scales(tile: MatrixTile, field: int) -> Scales:
    return None, None


# --- Q2_K, Q3_K: runs of 32 bytes with four fields, two per block; sub-blocks of 16 -----------


def _two_bit_place(tile: MatrixTile) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block, half of it, and half of the half's run, int32 [J] each."""
    group_J = tile.group_J
    return group_J // 4, group_J % 4 // 2, group_J % 2


def _q2_k_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    return _bits(_quants(tile, 1, part), 2 * field, 2)


def _q2_k_scales(tile: MatrixTile, field: int) -> Scales:
    block_J, half_J, part_J = _two_bit_place(tile)
    word = tile.at("scales", 4 * block_J + 2 * half_J + field // 2) >> _per_group(8 * part_J)
    scale = (word >> (16 * (field % 2))) & 15
    minimum = (word >> (16 * (field % 2) + 4)) & 15
    return scale.astype(jnp.int32), minimum.astype(jnp.int32)


def _q3_k_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    block_J, half_J, part_J = _two_bit_place(tile)
    high = tile.words("high_bits", 8 * block_J + 4 * part_J) >> _per_group(4 * half_J)
    return _bits(_quants(tile, 1, part), 2 * field, 2) | _bits(high, field, 1, to=2)


def _q3_k_scales(tile: MatrixTile, field: int) -> Scales:
    block_J, half_J, part_J = _two_bit_place(tile)
    byte_J = 16 * (field % 2) + 8 * part_J
    low = tile.at("scales", 3 * block_J + field // 2) >> _per_group(byte_J + 4 * half_J)
    high = tile.at("scales", 3 * block_J + 2) >> _per_group(byte_J + 4 * half_J + 2 * (field // 2))
    return ((low & 15) | ((high & 3) << 4)).astype(jnp.int32) - 32, None


# --- Q4_K, Q5_K: runs of 32 bytes with two fields, four per block; sub-blocks of 32 -----------


def _q4_k_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    return _bits(_quants(tile, 2, part), 4 * field, 4)


def _q5_k_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    block_J, run_J = tile.group_J // 4, tile.group_J % 4
    high = tile.words("high_bits", 8 * block_J + 4 * part) >> _per_group(2 * run_J)
    return _q4_k_codes(tile, field, part) | _bits(high, field, 1, to=4)


def _six_bit_scales(tile: MatrixTile, field: int) -> Scales:
    """`get_scale_min_k4`: sub-blocks 0-3 and 4-7 of a block pack their six bits differently."""
    block_J, sub_J = tile.group_J // 4, tile.group_J % 4 * 2 + field
    byte_J = _per_group(sub_J % 4 * 8)
    first, second, third = (tile.at("scales", 3 * block_J + i) >> byte_J for i in range(3))
    early = (sub_J < 4)[None, :, None]
    scale = jnp.where(early, first & 63, (third & 15) | ((first >> 2) & 48))
    minimum = jnp.where(early, second & 63, ((third >> 4) & 15) | ((second >> 2) & 48))
    return scale.astype(jnp.int32), minimum.astype(jnp.int32)


# --- Q6_K: runs of 64 bytes with two fields, two per block; sub-blocks of 16 ------------------


def _q6_k_place(tile: MatrixTile) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block, half of it, and quarter of the half's run, int32 [J] each."""
    group_J = tile.group_J
    return group_J // 8, group_J % 8 // 4, group_J % 4


def _q6_k_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    block_J, half_J, quarter_J = _q6_k_place(tile)
    high = tile.words("high_bits", 16 * block_J + 8 * half_J + 4 * (quarter_J % 2))
    high >>= _per_group(2 * (quarter_J // 2))
    return _bits(_quants(tile, 1, part), 4 * field, 4) | _bits(high, 4 * field, 2, to=4)


def _q6_k_scales(tile: MatrixTile, field: int) -> Scales:
    block_J, half_J, quarter_J = _q6_k_place(tile)
    word = tile.at("scales", 4 * block_J + 2 * half_J + field)
    return (word << _per_group(24 - 8 * quarter_J)).astype(jnp.int32) >> 24, None  # int8


# --- blocks of 32 weights under one f16 ------------------------------------------------------


def _q8_0_codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
    return _quants(tile, 2, part)


def _nibbles(tile: MatrixTile, field: int, part: int) -> jax.Array:
    return _bits(_quants(tile, 1, part), 4 * field, 4)


def _five_bits(tile: MatrixTile, field: int, part: int) -> jax.Array:
    """Bit i of a block's `high_bits` completes weight i; word u holds weights 4u to 4u + 3."""
    word_U = jnp.arange(WORDS, dtype=jnp.uint32)[None, None, :]
    four = (tile.at("high_bits", tile.group_J) >> (16 * field + 4 * word_U)) & 15
    spread = (four * 0x00204081) & _EVERY_BYTE  # bit k to bit 0 of byte k
    return _nibbles(tile, field, part) | (spread << 4)


def _d_and_m(tile: MatrixTile) -> Supers:
    d, m = _supers(1, "d", "m")(tile)
    assert m is not None
    return d, -m


# --- codebooks ------------------------------------------------------------------------------


def _from_table(values: tuple[int, ...]) -> Callable[[MatrixTile, int, int], jax.Array]:
    def codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
        nibbles = _nibbles(tile, field, part)
        packed = jnp.zeros_like(nibbles)
        for byte in range(4):
            value = look_up(values, (nibbles >> (8 * byte)) & 15)
            packed |= (value & 255).astype(jnp.uint32) << (8 * byte)
        return packed

    return codes


def _iq4_xs_scales(tile: MatrixTile, field: int) -> Scales:
    block_J, sub_J = tile.group_J // 8, tile.group_J % 8
    low = (tile.at("scales_l", block_J) >> _per_group(4 * sub_J)) & 15
    high = tile.at("scales_h", 2 * block_J + sub_J // 4).astype(jnp.uint32)
    scale = low | (((high >> _per_group(2 * (sub_J % 4))) & 3) << 4)
    return scale.astype(jnp.int32) - 32, None


def _mxfp4_supers(tile: MatrixTile) -> Supers:
    """2^(exponent - 128). Two subnormal scales are flushed to zero, as a GPU may do anyway."""
    exponent = tile.at("exponents", tile.group_J).astype(jnp.int32)
    biased = jnp.maximum(exponent - 1, 0)
    return lax.bitcast_convert_type(biased << 23, jnp.float32), None


PACKINGS: dict[str, Packing | Floats] = {
    "F32": Floats(jnp.float32),
    "F16": Floats(jnp.float32),
    "BF16": Floats(jnp.bfloat16),
    "Q8_0": Packing(1, 32, 2, _q8_0_codes, _supers(1, "d"), _no_scales, signed=True),
    "Q4_0": Packing(2, 16, 1, _nibbles, _supers(1, "d"), _no_scales, zero=8),
    "Q4_1": Packing(2, 16, 1, _nibbles, _d_and_m, _no_scales),
    "Q5_0": Packing(2, 16, 1, _five_bits, _supers(1, "d"), _no_scales, zero=16),
    "Q5_1": Packing(2, 16, 1, _five_bits, _d_and_m, _no_scales),
    "Q2_K": Packing(4, 32, 1, _q2_k_codes, _supers(4, "d", "dmin"), _q2_k_scales),
    "Q3_K": Packing(4, 32, 1, _q3_k_codes, _supers(4, "d"), _q3_k_scales, zero=4),
    "Q4_K": Packing(2, 32, 2, _q4_k_codes, _supers(4, "d", "dmin"), _six_bit_scales),
    "Q5_K": Packing(2, 32, 2, _q5_k_codes, _supers(4, "d", "dmin"), _six_bit_scales),
    "Q6_K": Packing(2, 64, 1, _q6_k_codes, _supers(8, "d"), _q6_k_scales, zero=32),
    "IQ4_NL": Packing(
        2, 16, 1, _from_table(IQ4_NL_VALUES), _supers(1, "d"), _no_scales, signed=True
    ),
    "IQ4_XS": Packing(
        2, 16, 1, _from_table(IQ4_NL_VALUES), _supers(8, "d"), _iq4_xs_scales, signed=True
    ),
    "MXFP4": Packing(2, 16, 1, _from_table(MXFP4_VALUES), _mxfp4_supers, _no_scales, signed=True),
}
