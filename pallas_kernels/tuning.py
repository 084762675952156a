"""Finds the best tile of each kernel on this device and records it (`tiles.py`)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from pallas_kernels import bench, tiles
from pallas_kernels.matmul_triton import FEWEST_DOT_ROWS, Items, Tile, grouped_matmul

# Widths that decode and prefill of the benched shapes come to.
_WIDTHS = (1, 2, 4, 16, 32, 64)


def candidates(formats: Sequence[str], rows: int, columns: int, width: int) -> Iterator[Tile]:
    """The rule's own tile, and what differs from it by a step or two."""
    yield tiles.default_tile(formats, rows, columns, width)
    many = width >= FEWEST_DOT_ROWS
    for tile_rows, step, warps, stages in itertools.product(
        (32, 64, 128) if many else (8, 16, 32, 64),
        (128, 256, 512) if many else (256, 512, 1024, 2048),
        (4, 8) if many else (2, 4, 8),
        (1, 2, 3) if many else (1,),
    ):
        if rows % tile_rows == 0 and columns % step == 0:
            yield Tile(tile_rows, step, width, warps, stages)


def _prepare(formats: Sequence[str], shape: bench.Shape, down: bool, tile: Tile):
    """A compiled loop over one kernel, and what makes its operands."""
    rows, columns = (shape.d_expert, shape.d_model)[:: -1 if down else 1]
    n_items = max(shape.experts_per_token, shape.n_experts if tile.tokens > 4 else 0)
    row_IC = jnp.arange(n_items * tile.tokens, dtype=jnp.int32).reshape(n_items, tile.tokens)
    y = jax.ShapeDtypeStruct((row_IC.size, rows), jnp.float32)

    def step(i, x, matrices):
        slot_I = (jnp.arange(n_items, dtype=jnp.int32) + i * n_items) % shape.n_experts
        items = Items(slot_I, row_IC, row_IC, jnp.full(1, n_items, jnp.int32))
        y_YN = grouped_matmul(x, y, matrices, formats, items, tile)
        return jnp.sum(y_YN) * jnp.ones_like(x)

    def operands():
        bank = bench.random_bank(shape, formats[0])
        return [bank.down] if down else [bank.gate, bank.up]

    program = bench.Program(step, operands)
    x = jax.ShapeDtypeStruct((row_IC.size, columns), jnp.float32)
    loop = bench.loop_of(program).lower(x, jax.eval_shape(operands)).compile()
    return loop, operands, x.shape


def _best(formats: Sequence[str], shape: bench.Shape, down: bool, width: int) -> Tile | None:
    rows, columns = (shape.d_expert, shape.d_model)[:: -1 if down else 1]
    tried = list(dict.fromkeys(candidates(formats, rows, columns, width)))
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(_prepare, formats, shape, down, tile) for tile in tried]
        timed: list[tuple[float, int]] = []
        weights = None
        for index, future in enumerate(futures):
            try:
                loop, operands, x_shape = future.result()
            except Exception:  # too much shared memory, say: not a candidate on this device
                continue
            weights = operands() if weights is None else weights
            x = jax.random.normal(jax.random.key(0), x_shape)
            run = bench.run_loop(loop, x, weights)
            timed.append((statistics.median(bench.repeats(run, 0.05)), index))
    return tried[min(timed)[1]] if timed else None


def tune(
    formats: Sequence[str],
    shapes: Sequence[str],
    progress: Callable[[list], Iterable] = iter,
) -> None:
    """Measures all candidates of every kernel and rewrites this device's part of the table.

    The table is written after every kernel, so an interrupted run keeps what it found.

    Raises:
        ValueError: there is no GPU to tune for.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"--tune needs a GPU, and this process has {device.device_kind}")
    table = json.loads(tiles.TUNING_PATH.read_text())
    mine = table.setdefault(device.device_kind, {})
    cases = itertools.product(shapes, formats, (False, True), _WIDTHS)
    for shape_name, name, down, width in progress(list(cases)):
        shape, names = bench.SHAPES[shape_name], (name,) if down else (name, name)
        if tiles.item_rows(width, names) != width:
            continue
        best = _best(names, shape, down, width)
        if best is not None:
            rows, columns = (shape.d_expert, shape.d_model)[:: -1 if down else 1]
            record = dataclasses.asdict(best)
            del record["tokens"]  # it is in the key
            mine[tiles.table_key(names, rows, columns, width)] = record
        partial = tiles.TUNING_PATH.with_suffix(".partial")
        partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        os.replace(partial, tiles.TUNING_PATH)
    tiles.forget()
