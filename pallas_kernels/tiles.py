"""How each kernel is cut: a rule, which no GPU has yet confirmed."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.formats.packing import Packing
from pallas_kernels.matmul_triton import FEWEST_DOT_ROWS, Tile, packing_of, padded_columns

# Input rows of an item up to which products are taken in integers; from there on the tensor cores,
# which compute 16 rows anyway, do less.
INT8_SPLIT_ROWS = 4
MOST_ITEM_ROWS = 64
# What a program of four warps loads of its quants in a step: four 16-byte loads a thread in flight.
_WORDS_OF_STEP = 2048
_ROW_WORDS_OF_STEP = 64
_DOT_GROUPS = 4  # sixteen columns of every lane, the least that a tensor core takes


def item_rows(mean_rows: int, formats: Sequence[str]) -> int:
    """Input rows of an item (a power of two) where an expert has `mean_rows` of them on average."""
    rows = 1 << max(0, mean_rows - 1).bit_length()
    if rows <= INT8_SPLIT_ROWS and all(isinstance(packing_of(name), Packing) for name in formats):
        return rows
    return min(max(rows, FEWEST_DOT_ROWS), MOST_ITEM_ROWS)


def _divisor(number: int, most: int) -> int:
    """The largest power of two, `most` at most, that divides `number`."""
    return min(most, number & -number)


def choose_tile(formats: Sequence[str], rows: int, columns: int, item_rows: int) -> Tile:
    """The tile of a kernel."""
    columns = padded_columns(formats, columns)
    packings = [packing_of(name) for name in formats]
    if item_rows >= FEWEST_DOT_ROWS:
        step_columns = max(64, _DOT_GROUPS * min(packing.group_columns for packing in packings))
        # What fits the 99 KiB of shared memory of a desktop card, gated pair included.
        tile_rows = 64 if item_rows <= FEWEST_DOT_ROWS else 32
        return Tile(_divisor(rows, tile_rows), _divisor(columns, step_columns), item_rows)
    fields = min(packing.fields for packing in packings if isinstance(packing, Packing))
    tile_rows = _WORDS_OF_STEP // (_ROW_WORDS_OF_STEP * len(formats))
    step_columns = _divisor(columns, 4 * fields * _ROW_WORDS_OF_STEP)
    return Tile(_divisor(rows, tile_rows), step_columns, item_rows)
