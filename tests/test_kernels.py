"""Pallas kernels: interpreted against the reference op, and lowered for CUDA without a GPU.

On a machine with an NVIDIA GPU the same comparisons also run the compiled kernels (`make gpu`).
The chain: gguf-py's values (test_formats) -> unpack -> reference op -> kernel.
"""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractMesh
from marks import slow_unless

from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.models.attention import attend
from pallas_kernels import linear as linear_module
from pallas_kernels.attention_triton import decode_attention
from pallas_kernels.expert_ffn import expert_ffn, triton_expert_ffn
from pallas_kernels.formats import FORMATS, get_format
from pallas_kernels.formats.packing import Floats
from pallas_kernels.linear import linear, triton_linear
from pallas_kernels.matmul_triton import (
    INT8_SPLIT_BLOCK,
    INT8_SPLIT_ROWS,
    LARGEST_INTEGER,
    Items,
    Tile,
    grouped_matmul,
    int8_split,
    item_rows,
)
from pallas_kernels.reference import Bank, Signature, Work

ON_GPU = jax.devices()[0].platform == "gpu"
IMPLEMENTATIONS = ["interpret", *(["triton"] if ON_GPU else [])]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
PACKINGS = {fmt.name: fmt.packing for fmt in FORMATS.values() if fmt.packing}
FLOATS = [name for name, packing in PACKINGS.items() if isinstance(packing, Floats)]
# One format of each kind of packing is quick enough for every run; `make slow` has the rest.
QUICK = ("Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "Q8_0", "F16")


every_format = pytest.mark.parametrize("name", [slow_unless(n in QUICK, n) for n in PACKINGS])

# Largest allowed ||kernel - reference|| / ||reference||, and why. The reference is float32.
TOLERANCE = {
    # Activations to 15 bits of a 256-block's largest: 2^-15 / sqrt(3) times max/rms of 3 to 4.
    "int8_split": 2e-4,
    # Weights and activations to bfloat16, 2^-9 / sqrt(3) each.
    "bfloat16": 5e-3,
    # TF32 on a GPU: 2^-11 / sqrt(3) each; plain float32 in the interpreter.
    "float32": 1e-3 if ON_GPU else 1e-5,
}

N, K, SLOTS = 32, 512, 3


def tolerance(name, width):
    packing = PACKINGS[name]
    if isinstance(packing, Floats):
        return TOLERANCE["float32" if packing.operand_dtype == jnp.float32 else "bfloat16"]
    return TOLERANCE["int8_split" if width <= INT8_SPLIT_ROWS else "bfloat16"]


def random_planes(name, rows, columns, lead=(SLOTS,), scale=0.02):
    """Planes of random bits with scales drawn around `scale`."""
    format, rng = get_format(name), np.random.default_rng(zlib.crc32(f"{name}{rows}".encode()))
    raw = rng.integers(0, 256, (*lead, rows, format.row_bytes(columns)), dtype=np.uint8)
    planes = dict(format.split(raw))
    for key in ("d", "dmin", "m", "weights"):
        if key in planes:
            values = rng.normal(0, scale, planes[key].shape).astype(np.float32)
            planes[key] = jnp.asarray(values).astype(planes[key].dtype)
    if "exponents" in planes:
        exponents = rng.integers(112, 120, planes["exponents"].shape, "u1")
        planes["exponents"] = jnp.asarray(exponents)
    return planes


def x_of(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


def relative_error(got, wanted):
    return np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted)


def widths(name):
    return [16] if name in FLOATS else [1, 16]


def products(name, width, implementation, x, planes, columns=K, rows=N):
    """Every input row times the matrix in slot 1, through items of `width`."""
    row_IC = np.arange(-(-len(x) // width) * width).reshape(-1, width)
    row_IC = np.where(row_IC < len(x), row_IC, row_IC[:, :1]).astype(np.int32)
    items = Items(
        jnp.full(len(row_IC), 1, jnp.int32),
        jnp.asarray(row_IC),
        jnp.asarray(row_IC),
        jnp.full(1, len(row_IC), jnp.int32),
    )
    return _products(jnp.asarray(x), planes, items, name, rows, width, implementation)


@partial(jax.jit, static_argnames=("name", "rows", "width", "implementation"))
def _products(x, planes, items, name, rows, width, implementation):
    y = jax.ShapeDtypeStruct((len(x), rows), jnp.float32)
    tile, interpret = Tile(16, 256, width), implementation == "interpret"
    return grouped_matmul(x, y, [planes], [name], items, interpret=interpret, tile=tile)


def test_every_kernel_is_of_a_format():
    assert set(PACKINGS) <= set(FORMATS)


@every_implementation
@pytest.mark.parametrize(
    ("name", "width"),
    [slow_unless(name in QUICK, name, w) for name in PACKINGS for w in widths(name)],
)
def test_product_equals_reference(name, width, implementation):
    planes, x = random_planes(name, N, K), x_of(5, K)
    wanted = x @ np.asarray(get_format(name).unpack(planes)[1]).T
    got = products(name, width, implementation, x, planes)
    assert relative_error(got, wanted) < tolerance(name, width)


@every_implementation
@every_format
def test_each_weight_stands_where_it_should(name, implementation):
    """One-hot inputs pick out single columns: a permuted pair of weights cannot hide in a sum."""
    width = widths(name)[0]
    planes = random_planes(name, 16, 256)
    weights_NK = np.asarray(get_format(name).unpack(planes)[1])
    got_KN = products(name, width, implementation, np.eye(256, dtype=np.float32), planes, 256, 16)
    # A one-hot row is one digit exactly; bfloat16 rounds the weight.
    error = np.abs(np.asarray(got_KN).T - weights_NK)
    assert (error <= np.abs(weights_NK) * 2**-7 + 1e-6).all()


@every_implementation
@pytest.mark.parametrize("scale", [0.0, 6e-8, 3e4], ids=["zero", "subnormal", "largest"])
@pytest.mark.parametrize(
    "name", [slow_unless(n in QUICK[:3], n) for n in ("Q2_K", "Q4_K", "Q6_K", "Q8_0", "Q5_1")]
)
def test_extreme_scales(name, scale, implementation):
    """Every d (and dmin, m) the same float16: zero, its smallest, and nearly its largest."""
    planes, x = random_planes(name, N, K), x_of(3, K)
    for key in {"d", "dmin", "m"} & planes.keys():
        planes[key] = jnp.full(planes[key].shape, scale, jnp.float16)
    wanted = x @ np.asarray(get_format(name).unpack(planes)[1]).T
    for width in widths(name):
        got = np.asarray(products(name, width, implementation, x, planes))
        assert np.isfinite(got).all()
        limit = tolerance(name, width) * np.linalg.norm(wanted) if scale else 0.0
        assert np.linalg.norm(got - wanted) <= limit


@every_implementation
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e15], ids=["zero", "subnormal", "large"])
def test_extreme_activations(size, implementation):
    planes, x = random_planes("Q4_K", N, K), x_of(2, K) * np.float32(size)
    wanted = x @ np.asarray(get_format("Q4_K").unpack(planes)[1]).T
    for width in (1, 16):
        got = np.asarray(products("Q4_K", width, implementation, x, planes))
        # Below float32's normal numbers nothing is promised but a finite, small result.
        slack = 1e-36 if size < 1e-30 else 0.0
        assert np.linalg.norm(got - wanted) <= 5e-3 * np.linalg.norm(wanted) + slack


@pytest.mark.parametrize("name", ["Q5_K", "Q6_K", "IQ4_XS", "Q4_K"])
def test_integer_sums_do_not_overflow(name):
    """The worst case: all quants and scales at their extremes, all activations equal."""
    worst = 0.0
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        format = get_format(name)
        planes = dict(format.split(np.full((SLOTS, N, format.row_bytes(K)), byte, np.uint8)))
        for key in {"d", "dmin"} & planes.keys():
            planes[key] = jnp.full(planes[key].shape, 1.0, jnp.float16)
        x = np.ones((1, K), np.float32)
        wanted = x @ np.asarray(format.unpack(planes)[1]).T
        worst = max(worst, float(np.abs(wanted).max()))
        np.testing.assert_allclose(
            products(name, 1, "interpret", x, planes), wanted, rtol=1e-5, atol=1e-2
        )
    assert worst > 1e5  # the extremes were really met


def test_digits_round_to_fifteen_bits():
    x = x_of(3, 1024) * np.float32([1e-3, 1.0, 1e4])[:, None]
    d = int8_split(jnp.asarray(x), 16)
    high, low = (np.asarray(plane).view(np.int8).astype(np.int32) for plane in d[:2])
    integer = 256 * high + low
    scale = np.repeat(np.asarray(d.scale_TB), INT8_SPLIT_BLOCK, axis=1)
    assert np.abs(integer).max() == LARGEST_INTEGER
    assert (np.abs(scale * integer - x) <= scale * 0.502).all()
    np.testing.assert_array_equal(np.asarray(d.sum_TP), integer.reshape(3, -1, 16).sum(-1))
    with jax.debug_nans(True):  # no zero times infinity on the way
        assert not any(np.any(plane) for plane in int8_split(jnp.zeros((1, 256)), 16))


# --- the expert op ---------------------------------------------------------------------------

D, F, TOKENS, CHOICES, EXPERTS = 256, 512, 6, 2, 4
SIGNATURES = {
    "q4_k_m": Signature("Q4_K", "Q4_K", "Q6_K"),
    "low": Signature("Q2_K", "Q2_K", "Q2_K"),
    "unequal": Signature("Q3_K", "Q8_0", "IQ4_NL"),
    "float": Signature("BF16", "F16", "F16"),
}


def bank_of(signature, slots=EXPERTS):
    sizes = ((F, D), (F, D), (D, F))
    # Small enough that exp(-gate) stays finite in the NumPy answer.
    planes = (random_planes(n, *s, (slots,), 5e-4) for n, s in zip(signature, sizes, strict=True))
    return Bank(*planes)


run_op = jax.jit(expert_ffn, static_argnames=("signature", "implementation"))


def work_of(slot_A, width):
    """Items over `slot_A` (-1: not ours), padded as the op wants; the last ones do not count."""
    slots, rows = [], []
    for slot in np.unique(slot_A[slot_A >= 0]):
        mine = np.flatnonzero(slot_A == slot)
        for start in range(0, len(mine), width):
            part = mine[start : start + width]
            rows.append(np.pad(part, (0, width - len(part)), constant_values=part[0]))
            slots.append(slot)
    count = len(slots)
    extra = 14 - count  # one program for every routing
    slots += [(slot_A[0] + 1) % EXPERTS] * extra  # would overwrite the first row, wrongly
    rows += [np.zeros(width, np.int32)] * extra
    return Work(
        jnp.asarray(np.array(slots, np.int32)),
        jnp.asarray(np.array(rows, np.int32).reshape(len(slots), width)),
        jnp.asarray(count, jnp.int32),
    )


def dense_answer(x_TD, weight_A, bank, signature, slot_A):
    """NumPy, one assignment at a time."""
    matrices = [
        np.asarray(get_format(name).unpack(planes))
        for name, planes in zip(signature, bank, strict=True)
    ]
    y_AD = np.full((len(slot_A), D), 7.0, np.float32)
    for a, slot in enumerate(slot_A):
        if slot >= 0:
            x_D = x_TD[a // CHOICES]
            gate_F, up_F = matrices[0][slot] @ x_D, matrices[1][slot] @ x_D
            y_AD[a] = weight_A[a] * (matrices[2][slot] @ (gate_F / (1 + np.exp(-gate_F)) * up_F))
    return y_AD


ROUTINGS = {
    "one token": np.array([2, 0]),
    "ragged": np.array([0, 1, 0, 2, 0, 3, 0, 1, 0, 2, 1, 0]),
    "all on one": np.array([3] * 12),
    "some absent": np.array([0, -1, -1, 2, 0, -1, -1, -1, 2, 0, -1, 2]),
    "none here": np.array([-1] * 12),
}


@pytest.mark.parametrize("implementation", ["xla", *IMPLEMENTATIONS])
@pytest.mark.parametrize(
    ("signature", "routing"),
    [slow_unless(s == "q4_k_m" or r == "one token", s, r) for s in SIGNATURES for r in ROUTINGS],
)
def test_expert_ffn(signature, routing, implementation):
    formats, slot_A = SIGNATURES[signature], ROUTINGS[routing]
    rng = np.random.default_rng(1)
    x_TD = x_of(len(slot_A) // CHOICES, D)
    weight_A = rng.random(len(slot_A), np.float32)
    bank = bank_of(formats)
    wanted = dense_answer(x_TD, weight_A, bank, formats, slot_A)
    width = item_rows(1 if routing == "one token" else 3, formats)
    got = np.asarray(
        run_op(
            jnp.asarray(x_TD),
            jnp.full((len(slot_A), D), 7.0),
            jnp.asarray(weight_A),
            bank,
            formats,
            work_of(slot_A, width),
            implementation,
        )
    )
    absent = slot_A < 0
    np.testing.assert_array_equal(got[absent], 7.0)
    if absent.all():
        return
    rounding = [tolerance(name, width) for name in formats]
    limit = 3 * (TOLERANCE["float32"] if implementation == "xla" else max(rounding))
    assert relative_error(got[~absent], wanted[~absent]) < limit


@every_implementation
def test_slot_and_company_change_no_bit(implementation):
    """The same expert in another slot, alone or among others: the same bits."""
    signature = SIGNATURES["q4_k_m"]
    bank = bank_of(signature)
    moved = Bank(*({k: jnp.roll(p, 1, axis=0) for k, p in planes.items()} for planes in bank))
    x_TD, y_AD = jnp.asarray(x_of(TOKENS, D)), jnp.zeros((TOKENS * CHOICES, D))
    weight_A = jnp.ones(TOKENS * CHOICES)
    slot_A = ROUTINGS["ragged"]

    def run(bank, slot_A):
        work = work_of(slot_A, 4)
        return np.asarray(run_op(x_TD, y_AD, weight_A, bank, signature, work, implementation))

    together = run(bank, slot_A)
    np.testing.assert_array_equal(run(moved, (slot_A + 1) % EXPERTS), together)
    alone = run(bank, np.where(slot_A == 2, 2, -1))
    np.testing.assert_array_equal(alone[slot_A == 2], together[slot_A == 2])


@every_implementation
@pytest.mark.parametrize("tokens", [1, 21, slow_unless(False, 3)])
@pytest.mark.parametrize("name", [slow_unless(n != "Q8_0", n) for n in QUICK[1:] if n[0] != "I"])
def test_linear(name, tokens, implementation):
    planes = random_planes(name, 48, K, lead=())
    x = x_of(tokens, K)
    got = linear(jnp.asarray(x).reshape(1, tokens, K), planes, name, implementation)
    assert got.shape == (1, tokens, 48)
    wanted = x @ np.asarray(get_format(name).unpack(planes)).T
    assert relative_error(got[0], wanted) < tolerance(name, item_rows(tokens, (name,)))


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_a_large_matrix_is_unpacked_in_parts(name, monkeypatch):
    planes, x = random_planes(name, 48, K, lead=()), jnp.asarray(x_of(3, K))
    whole = linear(x, planes, name, "xla")
    for rows in (1, 7, 24, 47):
        monkeypatch.setattr(linear_module, "MAX_UNPACKED", rows * K + 1)
        assert relative_error(linear(x, planes, name, "xla"), whole) < TOLERANCE["float32"]
        text = jax.jit(lambda x, planes: linear(x, planes, name, "xla")).lower(x, planes).as_text()
        assert f"{rows}x{K}xf32" in text and f"48x{K}xf32" not in text


def test_other_slots_do_not_recompile():
    signature, bank = SIGNATURES["low"], bank_of(SIGNATURES["low"])
    x_TD, y_AD, weight_A = jnp.asarray(x_of(1, D)), jnp.zeros((CHOICES, D)), jnp.ones(CHOICES)
    run = jax.jit(lambda work: expert_ffn(x_TD, y_AD, weight_A, bank, signature, work, "interpret"))
    outputs = [run(work_of(np.array(slots), 1)) for slots in ([0, 1], [3, 2])]
    assert not np.array_equal(*outputs)
    assert run._cache_size() == 1


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.skipif(ON_GPU, reason="there is a GPU here")
def test_triton_without_a_gpu_is_refused_by_name():
    planes = random_planes("Q4_K", 32, 256, lead=())
    with pytest.raises(ValueError, match=r"'triton' needs an NVIDIA GPU.*cpu.*'xla'"):
        linear(jnp.zeros((1, 256)), planes, "Q4_K", "triton")


def test_unknown_implementation_lists_them():
    planes = random_planes("Q4_K", 32, 256, lead=())
    with pytest.raises(
        ValueError, match=r"'cuda'; want one of xla, ggml, ggml_f32, triton, interpret"
    ):
        linear(jnp.zeros((1, 256)), planes, "Q4_K", "cuda")


def test_uncovered_shape_says_got_and_supported():
    planes = random_planes("Q8_0", 24, 288, lead=())
    with pytest.raises(NotImplementedError, match=r"multiple of 16 rows and 256 columns.*24, 288"):
        linear(jnp.zeros((1, 288)), planes, "Q8_0", "interpret")
    assert linear(jnp.zeros((1, 288)), planes, "Q8_0").shape == (1, 24)  # None takes XLA


def test_bank_beyond_the_address_range_is_refused():
    """Shapes only: nothing of that size is allocated."""
    format = get_format("MXFP4")
    slots = 2**31 // (1024 * 128) + 1
    planes = {
        name: jax.ShapeDtypeStruct((slots, *shape.shape), shape.dtype)
        for name, shape in format.plane_shapes(1024, 4096).items()
    }
    items = Items(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1,), (1, 1), (1, 1), (1,))))
    y = jax.ShapeDtypeStruct((1, 1024), jnp.float32)
    run = lambda x, planes, items: grouped_matmul(  # noqa: E731
        x, y, [planes], ["MXFP4"], items, tile=Tile(16, 256, 1)
    )
    with pytest.raises(NotImplementedError, match=r"plane exponents of MXFP4 has 2\d{9} elements"):
        jax.eval_shape(run, jax.ShapeDtypeStruct((1, 4096), jnp.float32), planes, items)


# --- lowering for CUDA, without a GPU ---------------------------------------------------------


def lower_for_cuda(function, *args):
    """MLIR with Triton kernels for an H200 that is not there; raises where Pallas cannot."""
    from jax.sharding import AbstractDevice, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        slow_unless(n in QUICK and w in (1, 64), n, w)
        for n in PACKINGS
        for w in (1, 4, 16, 64)
        if w >= 16 or n not in FLOATS
    ],
)
def test_every_kernel_lowers_for_cuda(name, width):
    signature = Signature(name, name, name)
    args = (
        jnp.zeros((TOKENS, D)), jnp.zeros((TOKENS * CHOICES, D)), jnp.zeros(TOKENS * CHOICES),
        bank_of(signature), work_of(ROUTINGS["ragged"], width),
    )  # fmt: skip
    text = lower_for_cuda(
        lambda x, y, w, bank, work: triton_expert_ffn(x, y, w, bank, signature, work),
        *abstract(args),
    )
    assert text.count("matmul_" + name) >= 2


@every_implementation
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "width", "values_width", "context", "window", "sinks", "dtype"),
    [
        (2, 8, 2, 64, 64, 300, 0, False, jnp.float32),  # as most models
        (1, 6, 3, 80, 48, 33, 7, True, jnp.bfloat16),  # no power of two; gpt-oss's window and sinks
        (3, 4, 4, 256, 256, 40, 16, False, jnp.float16),  # Gemma's width, no shared heads
        (1, 32, 1, 64, 64, 50, 0, False, jnp.float32),  # more heads than the least of a product
    ],
)
def test_decode_attention_is_attention(
    implementation, batch, heads, groups, width, values_width, context, window, sinks, dtype
):
    """One token of each sequence, at positions from the first to the last, in the second block."""
    rng = np.random.default_rng(3)

    def drawn(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q_BHd = drawn(batch, heads, width)
    k_nBCGd = drawn(2, batch, context, groups, width, dtype=dtype)
    v_nBCGe = drawn(2, batch, context, groups, values_width, dtype=dtype)
    sinks_H = drawn(heads) if sinks else None
    scale, interpret = width**-0.5, implementation == "interpret"
    for position in (0, context // 2, context - 1):
        position_B = jnp.asarray([(position + 5 * b) % context for b in range(batch)], jnp.int32)
        k_BCGd, v_BCGe = (cache[1].astype(jnp.float32) for cache in (k_nBCGd, v_nBCGe))
        at = position_B[:, None]
        wanted_B1N = attend(q_BHd[:, None], k_BCGd, v_BCGe, at, scale, window, sinks_H)
        got_BN = decode_attention(
            q_BHd, k_nBCGd, v_nBCGe, 1, position_B, scale, window, sinks_H, interpret
        )
        np.testing.assert_allclose(got_BN, wanted_B1N[:, 0], atol=2e-6)
    padding_B = jnp.full(batch, context, jnp.int32)
    got_BN = decode_attention(
        q_BHd, k_nBCGd, v_nBCGe, 1, padding_B, scale, window, sinks_H, interpret
    )
    assert not np.asarray(got_BN).any()


def test_decode_attention_lowers_for_cuda():
    caches = jnp.zeros((3, 2, 64, 4, 128))
    text = lower_for_cuda(
        lambda q, k, v, place, at: decode_attention(q, k, v, place, at, 0.1, 32),
        *abstract((jnp.zeros((2, 32, 128)), caches, caches, jnp.int32(0), jnp.zeros(2, jnp.int32))),
    )
    assert "decode_attention" in text


def test_linear_lowers_for_cuda():
    planes = random_planes("Q6_K", 64, 512, lead=(2,))
    text = lower_for_cuda(
        lambda x, planes, index: triton_linear(x, planes, "Q6_K", index),
        *abstract((jnp.zeros((3, 512)), planes, jnp.int32(0))),
    )
    assert "matmul_Q6_K" in text


def test_lowering_rejects_what_triton_has_not():
    """The check can fail: a slice of a loaded value is not in Pallas's Triton backend."""

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...][:8]

    def run(x):
        y = jax.ShapeDtypeStruct((8,), jnp.float32)
        return pl.pallas_call(kernel, out_shape=y, compiler_params=plgpu.CompilerParams())(x)

    with pytest.raises(Exception, match="slice"):
        lower_for_cuda(run, jax.ShapeDtypeStruct((16,), jnp.float32))


# --- a whole model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "implementation",
    [pytest.param(i, marks=pytest.mark.slow) if i == "interpret" else i for i in IMPLEMENTATIONS],
)
def test_reference_model_through_the_kernels(implementation):
    """Prefill and decode of the shipped model: attention, head and experts in the kernels."""
    pytest.importorskip("gguf")  # a machine that only runs kernels has none
    from hobbit_jax import reference
    from hobbit_jax.experts.store import HostExperts
    from hobbit_jax.inference.engine import Engine
    from hobbit_jax.models.loading import load_model

    def log_probabilities(implementation):
        model = load_model(reference.model_path(), implementation)
        prompt = model.tokenizer().encode("def add(a, b):\n    return a")
        engine = Engine(model, HostExperts(model.config, model.file), CacheConfig(2 << 20))
        engine.start(1, len(prompt) + 1)
        prefill_V = engine.prefill([prompt])[0]
        decode_V = engine.decode(np.array([int(jnp.argmax(prefill_V))]))[0]
        return np.asarray(jax.nn.log_softmax(jnp.stack([prefill_V, decode_V])), np.float64)

    wanted, got = log_probabilities("xla"), log_probabilities(implementation)
    assert (wanted.argmax(-1) == got.argmax(-1)).all()
    kl = (np.exp(wanted) * (wanted - got)).sum(-1)
    # Rounding to bfloat16 in prefill; far below the .004 nats that Q4_K costs.
    assert (kl < 4e-4).all(), kl
