"""How a kernel reads a matrix: sixteen or thirty-two bytes of quants at a time, with their scale.

Owns how a kernel gets from words in registers to *codes* (four integers in the bytes of a word) and
scales; each format says its own beside its `unpack`, which is the oracle. Layouts are said twice
because a kernel must not gather, slice or reorder what it has loaded, as `unpack` does.

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

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

WORDS = 4  # of a part: 16 bytes
_EVERY_BYTE = 0x01010101


def neighbours(column_J: jax.Array) -> jax.Array:
    """The four columns from each on, int32 [J, U]."""
    return column_J[:, None] + jnp.arange(WORDS, dtype=jnp.int32)[None, :]


class MatrixTile:
    """The part of one matrix under a program: R rows of a slot, J groups of each."""

    def __init__(self, refs, slot, first_row, tile_rows: int, group_J):
        self._refs, self._slot = refs, slot
        self._row_R = first_row + jnp.arange(tile_rows, dtype=jnp.int32)
        self.group_J = group_J  # int32 [J], counted from the start of the row

    def at(self, plane: str, column_J: jax.Array) -> jax.Array:
        """One element of a plane for each row and group: [R, J, 1]."""
        return self._load(plane, column_J[:, None])

    def words(self, plane: str, column_J: jax.Array) -> jax.Array:
        """Four neighbouring elements from each column on: [R, J, U]."""
        return self._load(plane, neighbours(column_J))

    def _load(self, plane, column_JU):
        shape = (*self._row_R.shape, *column_JU.shape)
        row_RJU = jnp.broadcast_to(self._row_R[:, None, None], shape)
        column_RJU = jnp.broadcast_to(column_JU[None], shape)
        return self._refs[plane][self._slot, row_RJU, column_RJU]


Supers = tuple[jax.Array, jax.Array | None]
Scales = tuple[jax.Array | None, jax.Array | None]


def no_scales(tile: MatrixTile, field: int) -> Scales:
    """For a format without small scales."""
    return None, None


@dataclass(frozen=True)
class Packing:
    """A format of packed integers, as a kernel reads it."""

    fields: int  # bit fields of a byte of `quants` (1, 2 or 4)
    run_bytes: int  # between two weights that share a byte
    parts: int  # of a group
    # (tile, field, part) -> uint32 [R, J, U], a code in each byte.
    codes: Callable[[MatrixTile, int, int], jax.Array]
    # tile -> (d, dmin), float32 [R, J, 1]; no dmin means no minimum.
    supers: Callable[[MatrixTile], Supers]
    # (tile, field) -> (scale, minimum), int32 [R, J, 1]; None is one.
    scales: Callable[[MatrixTile, int], Scales] = no_scales
    signed: bool = False  # codes are int8, otherwise uint8
    zero: int = 0  # the code that stands for zero

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


# Pieces that families share.


def quants_of(tile: MatrixTile, parts: int, part: int) -> jax.Array:
    """The words of one part, uint32 [R, J, U]."""
    return tile.words("quants", (tile.group_J * parts + part) * WORDS)


def bits_of(words: jax.Array, shift: int, width: int, to: int = 0) -> jax.Array:
    """`width` bits of every byte, moved from bit `shift` of the byte to bit `to`: one shift."""
    moved = words >> (shift - to) if shift >= to else words << (to - shift)
    return moved & (_EVERY_BYTE * (((1 << width) - 1) << to))


def per_group(value_J: jax.Array) -> jax.Array:
    """A shift that differs between groups, uint32 [1, J, 1]."""
    return value_J.astype(jnp.uint32)[None, :, None]


def supers(groups_per_block: int, *planes: str) -> Callable[[MatrixTile], Supers]:
    """Reads `d`, or `d` and `dmin`, of each group's block."""

    def read(tile: MatrixTile) -> Supers:
        block_J = tile.group_J // groups_per_block
        d, *dmin = (tile.at(plane, block_J).astype(jnp.float32) for plane in planes)
        return d, dmin[0] if dmin else None

    return read


def low_codes(width: int, parts: int = 1) -> Callable[[MatrixTile, int, int], jax.Array]:
    """Codes that are the fields of `width` bits of `quants`, in groups of so many parts."""

    def codes(tile: MatrixTile, field: int, part: int) -> jax.Array:
        return bits_of(quants_of(tile, parts, part), width * field, width)

    return codes
