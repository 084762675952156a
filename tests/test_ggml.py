"""The CPU backend `ggml`: its products against decoded weights, and what must not change a bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NEEDS_LLAMA_CPP
from gguf_oracle import dequantize

from hobbit_jax import reference
from hobbit_jax.baselines.child import Child, SideSpec
from hobbit_jax.cache.config import CacheConfig
from hobbit_jax.experts.store import HostExperts
from hobbit_jax.inference.engine import Engine
from hobbit_jax.models.loading import load_model
from hobbit_jax.quantize import ggml
from pallas_kernels.backends import choose, for_quality
from pallas_kernels.expert_ffn import expert_ffn, implementation_for
from pallas_kernels.formats import FORMATS, get_format
from pallas_kernels.ggml import ops
from pallas_kernels.linear import linear
from pallas_kernels.reference import Bank, Epilogue, Epilogues, Signature, Work

ROWS, COLUMNS = 48, 512
# Relative error of a product whose activations are rounded to 8 bits in blocks of 32 or 256; of
# float weights the rounding is that of float16 and bfloat16.
ROUNDING = {"F32": 1e-6, "F16": 1e-3, "BF16": 6e-3}
DEFAULT_ROUNDING = 0.012


def encode(name: str, weights_NK: np.ndarray) -> np.ndarray:
    """By ggml's own encoder: uint8 [N, row bytes]."""
    return ggml.encode(weights_NK, name, np.ones(weights_NK.shape[1], np.float32))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mapped(raw: np.ndarray, columns: int) -> ops.RawMatrix:
    address = jnp.asarray(ops.address_of(raw))
    return ops.RawMatrix(address, len(raw), columns, raw.nbytes)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_decoded_weights(name):
    raw = encode(name, random(ROWS, COLUMNS))
    matrix = mapped(raw, COLUMNS)
    ids = jnp.asarray([[3, 0], [ROWS - 1, 3]], jnp.int32)
    rows = np.asarray(ops.take_rows(ids, matrix, name))
    weights_NK = dequantize(raw, name)
    np.testing.assert_allclose(rows, weights_NK[np.asarray(ids)], rtol=1e-6, atol=1e-30)
    in_place = replace(matrix, data=jnp.asarray(raw))
    for tokens in (1, 30):  # a dot product each, and where there is one the interleaved product
        x_TK = random(tokens, COLUMNS, seed=tokens)
        limits = {"ggml": ROUNDING.get(name, DEFAULT_ROUNDING), "ggml_f32": 1e-6}
        for implementation, limit in limits.items():
            got_TN = np.asarray(linear(jnp.asarray(x_TK), matrix, name, implementation))
            assert relative_error(got_TN, x_TK @ weights_NK.T) < limit
            again_TN = linear(jnp.asarray(x_TK), in_place, name, implementation)
            np.testing.assert_array_equal(again_TN, got_TN)


def bank_of(signature: Signature, slots: int, d_model: int, d_expert: int):
    """Decoded weights, and their bank: of addresses, in place, and as planes."""
    decoded, by_address, in_place, planes, kept = [], [], [], [], []
    shapes = [(d_expert, d_model)] * 2 + [(d_model, d_expert)]
    for seed, (name, (rows, columns)) in enumerate(zip(signature, shapes, strict=True)):
        filling = ((0, 0), (0, get_format(name).padded(columns) - columns))
        raw = np.stack(
            [
                encode(name, np.pad(random(rows, columns, seed=9 * seed + s), filling))
                for s in range(slots)
            ]
        )
        kept.append(raw)
        decoded.append(dequantize(raw, name)[..., :columns])
        planes.append(get_format(name).split(raw))
        addresses = jnp.asarray(np.stack([ops.address_of(matrix) for matrix in raw]))
        by_address.append(ops.RawMatrix(addresses, rows, columns, raw[0].nbytes))
        in_place.append(ops.RawMatrix(jnp.asarray(raw), rows, columns, raw[0].nbytes))
    return decoded, Bank(*by_address), Bank(*in_place), Bank(*planes), kept


@pytest.mark.parametrize(
    ("signature", "d_model", "d_expert", "n_stacks"),  # of `Epilogue`: scales, and biases
    [
        (Signature("Q4_K", "Q4_K", "Q6_K"), 256, 512, 0),
        (Signature("Q8_0", "Q3_K", "Q4_K"), 256, 512, 1),
        # Rows that are filled up, with other bits than zeros in the types that have no zero.
        (Signature("Q4_K", "Q4_K", "Q2_K"), 288, 224, 0),
        (Signature("Q8_0", "IQ2_XXS", "IQ3_S"), 288, 704, 0),
        (Signature("NVFP4", "IQ1_M", "Q1_0"), 96, 160, 4),
    ],
    ids=str,
)
def test_experts_are_those_of_the_decoded_weights(signature, d_model, d_expert, n_stacks):
    tokens, k = 40, 2
    decoded, bank, in_place, planes, kept = bank_of(signature, 3, d_model, d_expert)
    x_TD, weight_A = random(tokens, d_model), random(tokens * k, seed=5)
    # Expert 0 has every token's first choice, 30 in an item; expert 2 five of the second.
    chosen = {0: np.arange(30) * 2, 1: np.arange(30, 40) * 2, 2: np.arange(5) * 2 + 1}
    rows = [np.pad(a, (0, 32 - len(a)), constant_values=a[0]) for a in chosen.values()]
    work = Work(
        jnp.asarray(list(chosen), jnp.int32), jnp.asarray(np.stack(rows), jnp.int32), jnp.int32(3)
    )
    # Of four experts, of whom the first is in no slot.
    widths = (3, d_expert, d_expert, d_model)
    stacks = [random(4, width, seed=7 + i) for i, width in enumerate(widths)]
    neutral = [np.ones((4, 3)), *(np.zeros((4, width)) for width in widths[1:])]
    scale_R3, *biases = stacks[:n_stacks] + neutral[n_stacks:]
    row_A = np.zeros(tokens * k, np.int32)
    for expert, assignments in chosen.items():
        row_A[assignments] = expert + 1
    epilogues = Epilogues(Epilogue(*stacks[:n_stacks]), row_A) if n_stacks else None
    untouched = random(tokens * k, d_model, seed=6)

    def result(bank, implementation=None):
        y_AD = jnp.asarray(untouched)
        run = jax.jit(expert_ffn, static_argnames=("signature", "implementation"))
        return np.asarray(
            run(x_TD, y_AD, weight_A, bank, signature, work, implementation, epilogues=epilogues)
        )

    got_AD, want_AD = result(bank), untouched.copy()
    for expert, assignments in chosen.items():
        gate, up, down = (matrix[expert].astype(np.float64) for matrix in decoded)
        x_RD = x_TD[assignments // k].astype(np.float64)
        scale_3, (gate_F, up_F, down_D) = scale_R3[expert + 1], (b[expert + 1] for b in biases)
        gated = scale_3[0] * (x_RD @ gate.T) + gate_F
        hidden = gated / (1 + np.exp(-gated)) * (scale_3[1] * (x_RD @ up.T) + up_F)
        y_RD = scale_3[2] * (hidden @ down.T) + down_D
        want_AD[assignments] = weight_A[assignments][:, None] * y_RD
    written = np.concatenate(list(chosen.values()))
    assert relative_error(got_AD[written], want_AD[written]) < 0.03
    assert relative_error(result(planes, "xla")[written], want_AD[written]) < 1e-6
    in_float32_AD = result(bank, "ggml_f32")
    assert relative_error(in_float32_AD[written], want_AD[written]) < 1e-6
    np.testing.assert_array_equal(result(in_place, "ggml_f32"), in_float32_AD)
    if d_model == 288 and all(get_format(name).packing for name in signature):
        # In bfloat16, as of this many tokens a kernel rounds.
        assert relative_error(result(planes, "interpret")[written], want_AD[written]) < 0.015
    rest = np.setdiff1d(np.arange(tokens * k), written)
    np.testing.assert_array_equal(got_AD[rest], untouched[rest])
    np.testing.assert_array_equal(result(in_place), got_AD)
    del kept


# Of the second one a sequence's keys take four blocks, its tokens three chunks, and the heads of a
# key/value head two.
@pytest.mark.parametrize(
    "length, heads, kv_heads, width, positions_BT",
    [
        (12, 6, 2, 24, [[2, 3, 12], [7, 8, 9]]),
        (200, 22, 2, 40, [[*range(187, 196)], [3, 250, *range(63, 70)]]),
    ],
)
@pytest.mark.parametrize("window, with_sinks", [(0, False), (70, True)])
def test_attention_is_that_of_each_token_alone(
    length, heads, kv_heads, width, positions_BT, window, with_sinks
):
    positions_BT = np.asarray(positions_BT, np.int32)  # one is padding, behind the caches
    batch, tokens = positions_BT.shape
    shape = (2, batch, length, kv_heads, width)
    q = random(batch, tokens, heads, width)
    k, v = random(*shape, seed=1), random(*shape, seed=2)
    sinks_H = random(heads, seed=3) if with_sinks else None
    run = jax.jit(ops.attention, static_argnames="window")

    def attend(q, k, v, positions_BT):
        return np.asarray(
            run(q, k, v, np.int32(1), positions_BT, window=window, sinks_H=sinks_H)
        ).reshape(q.shape)

    got = attend(q, k, v, positions_BT)
    for b, t in np.ndindex(batch, tokens):
        position = int(positions_BT[b, t])
        if position >= length:
            assert not got[b, t].any()
            continue
        seen = slice(max(position + 1 - window, 0) if window else 0, position + 1)
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = k[1, b, seen, group] @ q[b, t, head].astype(np.float64) / np.sqrt(width)
            share = np.exp(scores - scores.max())
            total = share.sum() + (np.exp(sinks_H[head] - scores.max()) if with_sinks else 0)
            want = share / total @ v[1, b, seen, group]
            np.testing.assert_allclose(got[b, t, head], want, rtol=2e-5, atol=2e-6)
        one, token = slice(b, b + 1), slice(t, t + 1)
        alone = attend(q[one, token], k[:, one], v[:, one], positions_BT[one, token])
        np.testing.assert_array_equal(alone[0, 0], got[b, t])
    behind = k.copy()
    behind[1, 0, positions_BT[0][positions_BT[0] < length].max() + 1 :] = np.nan
    np.testing.assert_array_equal(attend(q, behind, v, positions_BT)[0], got[0])
    for dtype in (jnp.float16, jnp.bfloat16):
        rounded = [jnp.asarray(array, dtype) for array in (k, v)]
        exact = [np.asarray(array.astype(jnp.float32)) for array in rounded]
        np.testing.assert_array_equal(
            attend(q, *rounded, positions_BT), attend(q, *exact, positions_BT)
        )


def test_a_token_outside_of_the_vocabulary_is_an_error():
    raw = encode("Q8_0", random(ROWS, COLUMNS))
    take = jax.jit(lambda ids: ops.take_rows(ids, mapped(raw, COLUMNS), "Q8_0"))
    for wrong in (ROWS, -1):
        with pytest.raises(
            jax.errors.JaxRuntimeError, match="token id lies outside of the vocabulary"
        ):
            jax.block_until_ready(take(np.asarray([0, wrong], np.int32)))


@pytest.mark.parametrize("slot", [3, -1])
def test_a_slot_outside_of_the_bank_is_an_error(slot):
    signature = Signature("Q8_0", "Q8_0", "Q8_0")
    _, bank, in_place, _, kept = bank_of(signature, 3, 64, 64)
    run = jax.jit(expert_ffn, static_argnames="signature")
    work = Work(jnp.asarray([slot], jnp.int32), jnp.zeros((1, 1), jnp.int32), jnp.int32(1))
    for matrices in (bank, in_place):
        with pytest.raises(jax.errors.JaxRuntimeError, match="slot lies outside of its bank"):
            jax.block_until_ready(
                run(random(1, 64), jnp.zeros((1, 64)), random(1), matrices, signature, work)
            )
    del kept


def test_an_expert_that_was_never_loaded_is_an_error():
    matrix = ops.RawMatrix(jnp.zeros((2, 2), jnp.uint32), 64, 64, 64 * 68)
    signature = Signature("Q8_0", "Q8_0", "Q8_0")
    work = Work(jnp.ones(1, jnp.int32), jnp.zeros((1, 1), jnp.int32), jnp.int32(1))
    run = jax.jit(expert_ffn, static_argnames="signature")
    with pytest.raises(jax.errors.JaxRuntimeError, match="never loaded"):
        bank = Bank(matrix, matrix, matrix)
        jax.block_until_ready(
            run(random(1, 64), jnp.zeros((1, 64)), random(1), bank, signature, work)
        )


def test_none_takes_ggml_on_a_cpu_and_a_name_is_refused_with_its_reason(caplog):
    signature = Signature("Q4_K", "Q4_K", "Q4_K")
    assert implementation_for(signature, 256, 256) == "ggml"

    def refuse():
        raise NotImplementedError("no wheel here")

    checks = {"ggml": refuse, "triton": refuse}
    assert choose(None, checks) == "xla" and "no wheel here" in caplog.text
    with pytest.raises(NotImplementedError, match="no wheel here"):
        choose("ggml", checks)
    assert for_quality(None) == "ggml_f32" and for_quality("ggml") == "ggml"
    without_kernel = Signature("Q4_K", "IQ2_XXS", "Q4_K")
    assert implementation_for(without_kernel, 256, 256, "xla") == "xla"
    with pytest.raises(NotImplementedError, match="the Triton kernels have no IQ2_XXS"):
        implementation_for(without_kernel, 256, 256, "interpret")


@pytest.fixture(scope="module")
def model():
    return load_model(reference.model_path(), "ggml")


@pytest.fixture(scope="module")
def ids_T(model):
    return np.random.default_rng(3).integers(0, model.config.vocab_size, 40).astype(np.int32)


@pytest.mark.parametrize("implementation", ops.ON_BLOCKS)
def test_neither_threads_nor_budget_nor_context_change_a_bit(implementation, ids_T):
    from pallas_kernels.ggml.machine import TABLE, THREADS

    model = load_model(reference.model_path(), implementation)
    store = HostExperts(model.config, model.file)
    before, results = int(TABLE[THREADS]), []
    try:
        for threads, budget, context in ((1, None, 48), (4, None, 200), (2, 2 << 20, 48)):
            TABLE[THREADS] = threads
            engine = Engine(model, store, CacheConfig(budget))
            engine.start(1, context)
            logits = [engine.prefill([ids_T.tolist()])]
            logits += [engine.decode(ids_T[i : i + 1]) for i in range(4)]
            results.append(np.concatenate(logits))
            assert engine.counts.bytes_moved == 0 or budget is not None
    finally:
        TABLE[THREADS] = before
    assert np.isfinite(results[0]).all()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_half_precision_keys_and_values_change_little(model, ids_T):
    store = HostExperts(model.config, model.file)

    def log_probabilities(kv_format):
        engine = Engine(model, store, CacheConfig(kv_format=kv_format))
        logits = jax.nn.log_softmax(engine.score(ids_T[None])[0].astype(jnp.float32))
        return np.asarray(logits), engine.kv_cache_bytes

    wanted, full = log_probabilities("float32")
    for kv_format, most in (("float16", 1e-3), ("bfloat16", 5e-3)):
        got, half = log_probabilities(kv_format)
        assert half * 2 == full
        assert 0 < (np.exp(wanted) * (wanted - got)).sum(-1).mean() < most
    with pytest.raises(ValueError, match="want one of float32, bfloat16, float16"):
        Engine(model, store, CacheConfig(kv_format="int8"))


def test_a_file_that_is_cut_short_is_an_error_and_no_crash(two_banks_path, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(two_banks_path.read_bytes())
    small = load_model(path, "ggml")
    engine = Engine(small, HostExperts(small.config, small.file))
    engine.start(1, 8)
    engine.prefill([[1, 2, 3]])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(OSError, match="changed while it was in use"):
        engine.decode(np.asarray([4]))


@pytest.mark.oracle
@NEEDS_LLAMA_CPP
def test_logits_are_as_near_to_llama_cpps_as_its_own_two_ways_are(model):
    """The arithmetic is the same; an ulp of attention decides how an activation is rounded.

    llama.cpp computes a text at once and token by token with a KL of 1.6e-4 between them on this
    small model, whose activations flip at such ulps as larger ones' do not.
    """
    text = (reference.model_path().parent / "MODEL_CARD.md").read_text()
    ids_T = np.asarray(model.tokenizer().encode(text)[:400], np.int32)

    def logits(tokens_at_once):
        """In a process of its own: its ggml and ours do not share one."""
        options = {
            "model": str(reference.model_path()), "context": len(ids_T), "budget_bytes": None,
            "kv_format": "float32", "tokens_at_once": tokens_at_once,
        }  # fmt: skip
        spec = SideSpec("hobbit_jax.baselines.llama:LlamaCpp", options, 1)
        with Child(spec, "llama.cpp") as child:
            return child.score(ids_T)

    engine = Engine(model, HostExperts(model.config, model.file))
    ours, whole, stepwise = (
        np.asarray(jax.nn.log_softmax(jnp.asarray(logits_TV)))
        for logits_TV in (
            engine.score(ids_T[None])[0],
            logits(len(ids_T)),
            logits(1),
        )
    )

    def kl(p, q):
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    assert kl(whole, ours) < max(1e-4, 1.5 * kl(whole, stepwise))
