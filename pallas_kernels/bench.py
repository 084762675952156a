"""Times the expert op against a bfloat16 rival, in one run, on weights that do not fit the cache.

Owns the shapes, the routing, what is counted as moved, and the clock. An output is compared with
the reference before anything is timed; a wrong one is recorded as such and has no time.

What is timed is a loop on the device: one op after another, each on other slots (so that an op
never finds its weights in the L2 cache) and each on the result of the one before (so that none is
left out). Routing is drawn token by token from loads recorded on a real model
(`bench_routing.json`), never split evenly. Compiling takes longer than timing, so `prepare` is
apart from `measure` and may run in threads.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.expert_ffn import triton_expert_ffn
from pallas_kernels.formats import get_format
from pallas_kernels.formats.packing import Floats
from pallas_kernels.matmul_triton import INT8_SPLIT_ROWS, item_rows, packing_of
from pallas_kernels.reference import Bank, Signature, Work, items

ROUTING_PATH = Path(__file__).with_name("bench_routing.json")
STEPS = 32 if jax.default_backend() == "gpu" else 2  # of a loop
# Relative error of y against the reference, per rounding: tests/test_kernels.py has the reasons;
# three roundings (x, hidden, weights) in a row.
TOLERANCE = {"int8_split": 6e-4, "bfloat16": 1.5e-2, "float32": 3e-3}


@dataclass(frozen=True)
class Shape:
    """One model's expert layer."""

    d_model: int
    d_expert: int
    n_experts: int
    experts_per_token: int


SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "tiny": Shape(256, 512, 8, 2),  # for machines without a GPU
}


@dataclass(frozen=True)
class Case:
    """One row of the bench."""

    shape: str
    format: str
    tokens: int
    implementation: str  # xla, triton, interpret or jax_bf16, whose format is BF16


def draw_routing(shape: Shape, tokens: int) -> np.ndarray:
    """Expert ids int32 [T, K], distinct within a token, by recorded loads.

    The recorded loads are a quantile function: a model of any number of experts gets loads of the
    same skew, in random order.
    """
    rng = np.random.default_rng(0)
    recorded = np.asarray(json.loads(ROUTING_PATH.read_text())["relative_load"])
    quantiles = np.linspace(0, 1, shape.n_experts)
    load_E = np.interp(quantiles, np.linspace(0, 1, recorded.shape[1]), recorded.mean(0))
    rng.shuffle(load_E)
    keys_TE = np.log(load_E) + rng.gumbel(size=(tokens, shape.n_experts))  # without replacement
    return np.argsort(-keys_TE, axis=1)[:, : shape.experts_per_token].astype(np.int32)


def random_bank(shape: Shape, format_name: str) -> Bank:
    """All experts in one format: random bits, scales of the size that real weights have."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def matrix(key, rows, columns):
        planes = {}
        for name, plane in get_format(format_name).plane_shapes(rows, columns).items():
            key, here = jax.random.split(key)
            size = (shape.n_experts, *plane.shape)
            if jnp.issubdtype(plane.dtype, jnp.floating):
                scale = 0.02 if name == "weights" else 2e-5
                planes[name] = (scale * jax.random.normal(here, size)).astype(plane.dtype)
            elif name == "exponents":
                planes[name] = jax.random.randint(here, size, 112, 118).astype(plane.dtype)
            else:
                planes[name] = jax.random.bits(here, size, plane.dtype)
        return planes

    gate, up, down = jax.random.split(jax.random.key(0), 3)
    wide = (shape.d_expert, shape.d_model)
    return Bank(matrix(gate, *wide), matrix(up, *wide), matrix(down, *wide[::-1]))


Step = Callable[[jax.Array, jax.Array, Any], jax.Array]  # of index, x and operands; like x
Error = Callable[[jax.Array, Bank], jax.Array]  # of x and the bank: relative, against the reference


def loop_of(step: Step):
    """A jitted (x, operands) -> x that takes `STEPS` steps, each on the result of the one before.

    Their number is static: a GPU asks its host before every step of a loop of unknown length.
    """

    def loop(x, operands):
        def body(i, x):
            return x + 1e-30 * step(i, x, operands).astype(x.dtype)

        return jax.lax.fori_loop(0, STEPS, body, x)

    return jax.jit(loop)


def step_seconds(
    loop: Callable[[jax.Array, Any], jax.Array], x: jax.Array, operands: Any, budget_s: float
) -> list[float]:
    """Seconds per step in seven runs of the loop that share the budget, after a warm-up."""

    def timed(n: int) -> float:
        began, state = time.perf_counter(), x
        for _ in range(n):
            state = loop(state, operands)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / n

    timed(1)
    n = max(1, min(1000, int(budget_s / 8 / max(timed(1), 1e-6))))
    return [timed(n) / STEPS for _ in range(7)]


def copy_gb_s() -> float:
    """Measured device-to-device copy rate: bytes read plus bytes written."""
    on_gpu = jax.devices()[0].platform == "gpu"
    x = jnp.zeros((1 << 30 if on_gpu else 1 << 24) // 4, jnp.float32)
    # The loop adds, and XLA fuses the addition: one pass that reads and writes x.
    seconds = step_seconds(loop_of(lambda i, x, _: x + i), x, (), 1.0)
    return 2 * x.nbytes / statistics.median(seconds) / 1e9


def bf16_tflop_s() -> float:
    """Measured rate of a large bfloat16 matrix product on random data."""
    n = 8192 if jax.devices()[0].platform == "gpu" else 512
    x, w = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    seconds = step_seconds(loop_of(lambda i, x, w: x @ w), x, w, 1.0)
    return 2 * n**3 / statistics.median(seconds) / 1e12


def _token_sum(y_AD: jax.Array, tokens: int) -> jax.Array:
    return y_AD.reshape(tokens, -1, y_AD.shape[-1]).sum(1)


def _quantised(case: Case, shape: Shape, ids_TK: np.ndarray) -> tuple[Step, Error, float]:
    """An implementation of the expert op over quantised slots, its error and what that may be."""
    signature = Signature(case.format, case.format, case.format)
    n_assignments = ids_TK.size
    weight_A = jnp.full(n_assignments, 1 / shape.experts_per_token)
    width = item_rows(-(-n_assignments // len(np.unique(ids_TK))), signature)
    parts = ((expert, np.flatnonzero(ids_TK == expert)) for expert in np.unique(ids_TK))
    slot_I, assignment_IC = items(parts, width)
    work = Work(jnp.asarray(slot_I), jnp.asarray(assignment_IC), jnp.int32(len(slot_I)))

    def run(x_TD, work, bank, implementation):
        y_AD = jnp.zeros((n_assignments, shape.d_model), jnp.float32)
        if implementation == "xla":
            return reference.expert_ffn(x_TD, y_AD, weight_A, bank, signature, work)
        interpret = implementation == "interpret"
        return triton_expert_ffn(x_TD, y_AD, weight_A, bank, signature, work, interpret)

    def step(i, x_TD, bank):
        # Other experts' weights each time, with the same loads.
        slot_I = (work.slot_I + i * shape.experts_per_token) % shape.n_experts
        y_AD = run(x_TD, work._replace(slot_I=slot_I), bank, case.implementation)
        return _token_sum(y_AD, case.tokens)

    def error(x_TD, bank):
        with jax.default_matmul_precision("highest"):
            wanted_AD = run(x_TD, work, bank, "xla")
        got_AD = run(x_TD, work, bank, case.implementation)
        return jnp.linalg.norm(got_AD - wanted_AD) / jnp.linalg.norm(wanted_AD)

    packing = packing_of(case.format)
    dtype = packing.operand_dtype if isinstance(packing, Floats) else jnp.bfloat16
    if case.implementation == "xla" or dtype == jnp.float32:
        return step, error, TOLERANCE["float32"]
    integers = not isinstance(packing, Floats) and width <= INT8_SPLIT_ROWS
    return step, error, TOLERANCE["int8_split" if integers else "bfloat16"]


def _jax_bf16(case: Case, shape: Shape, ids_TK: np.ndarray) -> tuple[Step, None, float]:
    """Grouped products on resident bfloat16 experts, by XLA's ragged dot: the rival's best case.

    Weights are in the precision that matrix units take, and tokens sorted by expert beforehand.
    """
    k, contract_last = shape.experts_per_token, (((1,), (2,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(contract_last, [0], [0])
    order_A = jnp.asarray(np.argsort(ids_TK.reshape(-1), kind="stable").astype(np.int32))
    counts_E = np.bincount(ids_TK.reshape(-1), minlength=shape.n_experts).astype(np.int32)

    def step(i, x_TD, bank):
        gate, up, down = (planes["weights"] for planes in bank)
        sizes_E = jnp.roll(jnp.asarray(counts_E), i * k)

        def product(x_AK, w_ENK):
            return jax.lax.ragged_dot_general(
                x_AK, w_ENK, sizes_E, numbers, preferred_element_type=jnp.float32
            )

        x_AD = x_TD.astype(jnp.bfloat16)[order_A // k]
        hidden_AF = jax.nn.silu(product(x_AD, gate)) * product(x_AD, up)
        y_AD = product(hidden_AF.astype(jnp.bfloat16), down)
        return _token_sum(jnp.zeros_like(y_AD).at[order_A].set(y_AD), case.tokens) / k

    return step, None, 0.0


@dataclass(frozen=True)
class Prepared:
    """A case with its programs compiled, ready to be timed."""

    case: Case
    loop: Any
    error: Any  # None for the rival
    error_limit: float


def prepare(case: Case) -> Prepared:
    """Traces and compiles; takes no memory on the device.

    Raises:
        Exception: the implementation does not run here.
    """
    shape = SHAPES[case.shape]
    build = _jax_bf16 if case.implementation == "jax_bf16" else _quantised
    step, error, limit = build(case, shape, draw_routing(shape, case.tokens))
    x = jax.ShapeDtypeStruct((case.tokens, shape.d_model), jnp.float32)
    bank = jax.eval_shape(lambda: random_bank(shape, case.format))
    compiled = jax.jit(error).lower(x, bank).compile() if error else None
    return Prepared(case, loop_of(step).lower(x, bank).compile(), compiled, limit)


def measure(prepared: Prepared, budget_s: float) -> dict[str, Any]:
    """Verifies and times one case.

    Returns:
        The case, `status` ("ok" or "wrong"), raw `seconds`, distinct weight bytes of a step,
        rates, the relative error and what it may be; times are absent from a wrong row.
    """
    case, shape = prepared.case, SHAPES[prepared.case.shape]
    ids_TK = draw_routing(shape, case.tokens)
    counts = np.unique(ids_TK, return_counts=True)[1]
    bank = random_bank(shape, case.format)
    expert_bytes = sum(plane.nbytes for plane in jax.tree.leaves(bank)) // shape.n_experts
    row = {
        **vars(case),
        "active_experts": len(counts),
        "busiest_expert_tokens": int(counts.max()),
        "weight_bytes": len(counts) * expert_bytes,
        "flops": 6 * shape.d_model * shape.d_expert * ids_TK.size,
    }
    x_TD = jax.random.normal(jax.random.key(7), (case.tokens, shape.d_model), jnp.float32)
    if prepared.error is not None:
        error, limit = float(prepared.error(x_TD, bank)), prepared.error_limit
        row |= {"relative_error": error, "error_limit": limit}
        if not error < limit:  # NaN is wrong too
            return {**row, "status": "wrong"}
    seconds = step_seconds(prepared.loop, x_TD, bank, budget_s)
    median = statistics.median(seconds)
    return {
        **row,
        "status": "ok",
        "seconds": seconds,
        "median_s": median,
        "gb_s": row["weight_bytes"] / median / 1e9,
        "tflop_s": row["flops"] / median / 1e12,
    }
