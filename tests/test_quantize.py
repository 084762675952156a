"""Our encoders against gguf-py's decoders: layout, error against ggml's own, edges, refusals.

`GGML_RMSE` was recorded with `test_error_at_most_ggml_live` from ggml 0.25.3 (llama-cpp-python),
whose live comparison is an oracle test here.
"""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hobbit_jax.quantize import encode, ggml
from hobbit_jax.quantize.methods import check_method

SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "IQ4_NL")
SHORT_BLOCKS = ("Q4_0", "IQ4_NL")  # of 32 weights, where K-quants have 256
every_searched = pytest.mark.parametrize("format", SEARCHED)
every_format = pytest.mark.parametrize("format", (*SEARCHED, "Q8_0", "F16", "F32"))

# Bytes of the float16 fields in a block, and of the quants with all the values that fill these
# with one level each: said again from ggml-common.h.
FLOAT16_AT = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q4_0": (0,),
    "IQ4_NL": (0,),
}
NIBBLES = [value * 0x11 for value in range(16)]
PAIRS = [value * 0x55 for value in range(4)]
QUANTS_AT = {
    "Q2_K": {(16, 80): PAIRS},
    "Q3_K": {(0, 32): [0x00, 0xFF], (32, 96): PAIRS},
    "Q4_K": {(16, 144): NIBBLES},
    "Q5_K": {(16, 48): [0x00, 0xFF], (48, 176): NIBBLES},
    "Q6_K": {(0, 128): NIBBLES, (128, 192): PAIRS},
    "Q4_0": {(2, 18): NIBBLES},
    "IQ4_NL": {(2, 18): NIBBLES},
}


def data(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    shape = (256, 1024)
    draw = {
        "normal": lambda: rng.standard_normal(shape),
        "student": lambda: rng.standard_t(3, shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
    }
    return draw[kind]().astype(np.float32)


def importance(k: int = 1024) -> np.ndarray:
    return np.random.default_rng(8).lognormal(0.0, 1.5, k).astype(np.float32)


def decode(blocks_NP: np.ndarray, format: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks_NP, gguf.GGMLQuantizationType[format])


def rmse(
    weights_NK: np.ndarray, blocks_NP: np.ndarray, format: str, importance_K: np.ndarray | None
) -> float:
    error_NK = (weights_NK.astype(np.float64) - decode(blocks_NP, format)) ** 2
    return float(np.sqrt(np.average(error_NK.mean(0), weights=importance_K)))


# Per format and data: ggml without importance, with a constant one (both plain errors), and with
# `importance()` (its weighted error).
GGML_RMSE = {
    ("Q2_K", "normal"): (0.29604, 0.26749, 0.19949),
    ("Q2_K", "student"): (0.59959, 0.52038, 0.41293),
    ("Q2_K", "uniform"): (0.13463, 0.12612, 0.09625),
    ("Q3_K", "normal"): (0.15046, 0.14418, 0.12113),
    ("Q3_K", "student"): (0.32519, 0.31580, 0.27786),
    ("Q3_K", "uniform"): (0.07217, 0.06834, 0.05633),
    ("Q4_K", "normal"): (0.07128, 0.07066, 0.05617),
    ("Q4_K", "student"): (0.15769, 0.15668, 0.12931),
    ("Q4_K", "uniform"): (0.03148, 0.03122, 0.02477),
    ("Q5_K", "normal"): (0.03608, 0.03533, 0.02932),
    ("Q5_K", "student"): (0.08006, 0.07935, 0.06904),
    ("Q5_K", "uniform"): (0.01593, 0.01556, 0.01264),
    ("Q6_K", "normal"): (0.01770, 0.01727, 0.01461),
    ("Q6_K", "student"): (0.04316, 0.04250, 0.03914),
    ("Q6_K", "uniform"): (0.00762, 0.00747, 0.00616),
    ("Q4_0", "normal"): (0.08580, 0.08149, 0.07129),
    ("Q4_0", "student"): (0.21780, 0.21346, 0.19744),
    ("Q4_0", "uniform"): (0.03750, 0.03420, 0.02952),
    ("IQ4_NL", "normal"): (0.07601, 0.07480, 0.06322),
    ("IQ4_NL", "student"): (0.17370, 0.17048, 0.14916),
    ("IQ4_NL", "uniform"): (0.03693, 0.03664, 0.03045),
}
every_data = pytest.mark.parametrize("kind", ("normal", "student", "uniform"))


@every_data
@every_searched
def test_error_at_most_ggml(format, kind):
    weights_NK = data(kind)
    plain, constant, weighted = GGML_RMSE[format, kind]
    assert rmse(weights_NK, encode(weights_NK, format), format, None) < min(plain, constant)
    blocks_NP = encode(weights_NK, format, importance())
    assert rmse(weights_NK, blocks_NP, format, importance()) < weighted


@pytest.mark.parametrize(
    ("format", "limit", "weighted_limit"),
    [
        ("Q2_K", 0.2590, 0.1875),
        ("Q3_K", 0.14351, 0.11922),
        ("Q4_K", 0.0700, 0.0551),
        ("Q5_K", 0.03465, 0.02774),
        ("Q6_K", 0.01664, 0.01345),
        ("Q4_0", 0.08091, 0.06923),
        ("IQ4_NL", 0.07328, 0.05926),
    ],
)
def test_error_stays_where_it_is(format, limit, weighted_limit):
    """0.1 % above our own figures, so that the loss of any step of the search shows."""
    weights_NK = data("normal")
    assert rmse(weights_NK, encode(weights_NK, format), format, None) < limit
    blocks_NP = encode(weights_NK, format, importance())
    assert rmse(weights_NK, blocks_NP, format, importance()) < weighted_limit


@every_searched
def test_importance_lowers_weighted_error(format):
    weights_NK = data("normal")
    plain = rmse(weights_NK, encode(weights_NK, format), format, importance())
    weighted = rmse(weights_NK, encode(weights_NK, format, importance()), format, importance())
    assert weighted < 0.95 * plain


@every_searched
def test_unimportant_columns_are_free(format):
    """Where one column in four counts, the others do not disturb it."""
    weights_NK = data("normal")[:, :512]
    importance_K = np.zeros(512, np.float32)
    importance_K[::4] = 1e-12  # Only ratios matter.
    weighted = rmse(weights_NK, encode(weights_NK, format, importance_K), format, importance_K)
    plain = rmse(weights_NK, encode(weights_NK, format), format, importance_K)
    assert weighted < (0.85 if format in SHORT_BLOCKS else 0.8) * plain


@every_searched
def test_uniform_importance_is_no_importance(format):
    weights_NK = data("student")[:8]
    importance_K = np.full(1024, 3.0)
    importance_K[256:512] = 0.0
    blocks_NP = encode(weights_NK, format, importance_K)
    error = rmse(weights_NK, blocks_NP, format, None)
    assert error == pytest.approx(rmse(weights_NK, encode(weights_NK, format), format, None), 1e-3)


@every_searched
def test_quants_are_the_nearest_levels_under_the_stored_scales(format):
    weights_NK = data("normal")[:32, :256]
    blocks_NP = encode(weights_NK, format)
    miss_NK = np.abs(weights_NK - decode(blocks_NP, format))
    fields = QUANTS_AT[format]
    for fills in np.stack(np.meshgrid(*fields.values()), -1).reshape(-1, len(fields)):
        level_NP = blocks_NP.copy()
        for (start, stop), fill in zip(fields, fills, strict=True):
            level_NP[:, start:stop] = fill
        other_NK = np.abs(weights_NK - decode(level_NP, format))
        assert (miss_NK <= other_NK + 1e-6).all()


@every_searched
def test_blocks_do_not_depend_on_their_chunk(format):
    """3 blocks a row and 1,200 in all: row 341 lies across the first chunk's end."""
    weights_NK = np.tile(data("normal")[:200, :768], (2, 1))
    importance_K = importance(768)
    blocks_NP = encode(weights_NK, format, importance_K)
    assert blocks_NP.dtype == np.uint8 and blocks_NP.shape[0] == 400
    np.testing.assert_array_equal(blocks_NP[:200], blocks_NP[200:])
    rows = [0, 340, 341, 342, 399]
    np.testing.assert_array_equal(encode(weights_NK[rows], format, importance_K), blocks_NP[rows])
    strided = np.asfortranarray(weights_NK[rows])
    np.testing.assert_array_equal(encode(strided, format, importance_K), blocks_NP[rows])


@every_format
def test_no_rows(format):
    wanted = encode(np.zeros((1, 512), np.float32), format).shape[1]
    assert encode(np.zeros((0, 512), np.float32), format).shape == (0, wanted)


@every_format
def test_zeros_are_zero_bytes_and_decode_to_zeros(format):
    weights_NK = data("normal")[:3, :768]
    weights_NK[1] = 0.0
    weights_NK[0, 256:512] = 0.0
    weights_NK[2, 32:64] = 0.0
    for importance_K in (None, importance(768)):
        blocks_NP = encode(weights_NK, format, importance_K)
        assert not blocks_NP[1].any()
        decoded_NK = decode(blocks_NP, format)
        assert not decoded_NK[weights_NK == 0].any()
        assert decoded_NK[weights_NK != 0].any()


@every_format
@pytest.mark.parametrize("value", (1.0, -1.0, 1e4, -1e4, 0.02, -3e-4))
def test_constant_blocks(format, value):
    """Exact but for the rounding of d, which stands times the largest scale and level."""
    largest = {"Q2_K": 15 * 3, "Q3_K": 32 * 4, "Q4_K": 63 * 15, "Q5_K": 63 * 31}
    largest |= {"Q6_K": 128 * 32, "Q8_0": 127, "Q4_0": 8, "IQ4_NL": 127}
    if value < 0:  # Held by dmin alone.
        largest |= {"Q2_K": 15, "Q4_K": 63, "Q5_K": 63}
    weights_NK = np.full((2, 256), value, np.float32)
    decoded_NK = decode(encode(weights_NK, format), format)
    subnormal_rounding = 2.0**-25 * largest.get(format, 1)
    np.testing.assert_allclose(decoded_NK, weights_NK, rtol=2**-11, atol=subnormal_rounding)


@every_searched
@pytest.mark.parametrize("outlier", (100.0, -100.0))
def test_one_outlier(format, outlier):
    """The outlier survives, and the other sub-blocks do no worse than at zero."""
    weights_NK = data("normal")[:16, :256]
    weights_NK[:, 5] = outlier
    decoded_NK = decode(encode(weights_NK, format), format)
    np.testing.assert_allclose(decoded_NK[:, 5], outlier, rtol=0.02)
    others = np.s_[:, 32:]
    assert np.mean((decoded_NK - weights_NK)[others] ** 2) < np.mean(weights_NK[others] ** 2)


@every_format
@pytest.mark.parametrize("size", (1e-45, 1e-38, 1e-30, 1e-10))
def test_too_small_for_float16_is_zero(format, size):
    if format == "F32":
        pytest.skip("F32 holds them")
    weights_NK = (data("normal")[:2, :256] * np.float32(size)).astype(np.float32)
    assert not decode(encode(weights_NK, format), format).any()


@pytest.mark.parametrize("format", [f for f in SEARCHED if f not in SHORT_BLOCKS])
@pytest.mark.parametrize("size", (1e-3, 1e-4, 1e-5, 1e-6))
def test_subnormal_super_scales(format, size):
    """With d in the float16 subnormals, or below them, the grid is only as coarse as it must."""
    weights_NK = data("normal")[:16, :256]
    error = rmse(weights_NK, encode(weights_NK, format), format, None)
    small_NK = weights_NK * np.float32(size)
    # Steps are multiples of the smallest float16; rounding to these alone would cost `grid`.
    grid = 2.0**-24 / np.sqrt(12)
    bound = np.hypot(1.03 * error * size, 6 * grid)
    assert rmse(small_NK, encode(small_NK, format), format, None) < bound


@every_format
def test_large_weights(format):
    """Up to what a format must hold, its error is that of weights near 1."""
    largest = {
        "Q2_K": 2.8e6,
        "Q3_K": 8e6,
        "Q4_K": 1.2e7,
        "Q5_K": 1.2e7,
        "Q6_K": 2.6e8,
        "Q4_0": 5e5,
        "IQ4_NL": 8e6,
        "Q8_0": 8.3e6,
        "F16": 65504,
    }
    size = np.float32(largest.get(format, 3e38))
    weights_NK = data("uniform")[:4, :256] * np.float32(0.33)
    weights_NK[0, 0] = 0.5
    error = rmse(weights_NK, encode(weights_NK, format), format, None)
    large_NK = weights_NK * size
    assert rmse(large_NK, encode(large_NK, format), format, None) <= 1.02 * error * size


@every_searched
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-2, 8), tail=st.sampled_from([2, 5]))
def test_scaling_by_a_power_of_two_moves_only_the_super_scales(format, seed, exponent, tail):
    block_len = 32 if format in SHORT_BLOCKS else 256
    weights_NK = np.random.default_rng(seed).standard_t(tail, (2, block_len)).astype(np.float32)
    factor = np.float32(2.0**exponent)
    blocks_NP, scaled_NP = encode(weights_NK, format), encode(weights_NK * factor, format)
    np.testing.assert_array_equal(blocks_NP, encode(weights_NK, format))
    for at in FLOAT16_AT[format]:
        half_N = blocks_NP[:, at : at + 2].copy().view(np.float16).astype(np.float32)
        scaled_half_N = scaled_NP[:, at : at + 2].copy().view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(half_N * factor, scaled_half_N)
        blocks_NP[:, at : at + 2] = scaled_NP[:, at : at + 2]
    np.testing.assert_array_equal(blocks_NP, scaled_NP)


@every_searched
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scales=st.lists(st.sampled_from([0.0, 1e-40, 1e-20, 1e-3, 1.0, 300.0]), min_size=8, max_size=8),
    shift=st.sampled_from([-2.0, 0.0, 2.0]),
)
def test_always_finite_and_no_worse_than_zeros(format, seed, scales, shift):
    """Sub-blocks of very different size, all of one sign or not, sparse or not."""
    rng = np.random.default_rng(seed)
    weights_NK = (rng.standard_normal((1, 8, 32)) + shift) * np.array(scales)[:, None]
    weights_NK = (weights_NK * rng.integers(0, 2, (1, 8, 32))).astype(np.float32).reshape(1, 256)
    for importance_K in (None, rng.integers(0, 2, 256) + np.eye(256)[0]):
        decoded_NK = decode(encode(weights_NK, format, importance_K), format)
        assert np.isfinite(decoded_NK).all()
        cost_K = np.ones(256) if importance_K is None else np.maximum(importance_K, 2.0**-20)
        error = cost_K @ (weights_NK[0].astype(np.float64) - decoded_NK[0]) ** 2
        assert error <= 1.0001 * cost_K @ weights_NK[0].astype(np.float64) ** 2


@pytest.mark.parametrize("kind", ("normal", "student"))
def test_q8_0_rounds_against_the_stored_scale(kind):
    weights_NK = data(kind)
    blocks_NP = encode(weights_NK, "Q8_0")
    d_G = np.abs(weights_NK.reshape(-1, 32)).max(1) / np.float32(127)
    stored_G = blocks_NP.reshape(-1, 34)[:, :2].copy().view(np.float16)[:, 0]
    np.testing.assert_array_equal(stored_G, d_G.astype(np.float16))
    ggml_NP = gguf.quants.quantize(weights_NK, gguf.GGMLQuantizationType.Q8_0)
    miss_NK = np.abs(decode(blocks_NP, "Q8_0") - weights_NK)
    assert (miss_NK <= np.abs(decode(ggml_NP, "Q8_0") - weights_NK) + 1e-6).all()


def test_floats_are_the_nearest():
    weights_NK = data("student")
    np.testing.assert_array_equal(decode(encode(weights_NK, "F32"), "F32"), weights_NK)
    half_NK = weights_NK.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(decode(encode(weights_NK, "F16"), "F16"), half_NK)


@every_format
@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_refuses_weights_that_are_not_finite(format, bad):
    weights_NK = data("normal")[:5, :768]
    weights_NK[3, 700] = bad
    with pytest.raises(ValueError, match=rf"got {bad} in row 3"):
        encode(weights_NK, format)


@pytest.mark.parametrize("size", (2.8e8, 1e20, 3e38, -2.8e8, -1e20, -3e38))
@pytest.mark.parametrize("format", (*SEARCHED, "Q8_0", "F16"))
def test_refuses_float16_overflow(format, size):
    weights_NK = data("normal")[:5, :768]
    weights_NK[2, 300:310] = size
    weights_NK[2, 305] *= -1
    with pytest.raises(ValueError, match="overflow in row 2"):
        encode(weights_NK, format)


def test_refuses_wrong_weights():
    with pytest.raises(ValueError, match=r"rank 2 .* got shape \(256,\)"):
        encode(np.zeros(256, np.float32), "Q2_K")
    with pytest.raises(ValueError, match="wanted float32 weights, got float64"):
        encode(np.zeros((1, 256)), "Q2_K")
    for format, k, block in (("Q2_K", 128, 256), ("Q6_K", 257, 256), ("Q8_0", 48, 32)):
        with pytest.raises(ValueError, match=f"multiple of {block}, got K={k}"):
            encode(np.zeros((1, k), np.float32), format)
    with pytest.raises(ValueError, match="got K=0"):
        encode(np.zeros((1, 0), np.float32), "F32")


@every_format
def test_refuses_wrong_importance(format):
    weights_NK = np.ones((2, 256), np.float32)
    bad_entries = {"-1.0 in column 7": -1.0, "nan in column 7": np.nan, "inf in column 7": np.inf}
    for message, bad in bad_entries.items():
        importance_K = np.ones(256, np.float32)
        importance_K[7] = bad
        with pytest.raises(ValueError, match=message):
            encode(weights_NK, format, importance_K)
    with pytest.raises(ValueError, match=r"shape \(256,\), got \(2, 256\)"):
        encode(weights_NK, format, np.ones((2, 256), np.float32))
    with pytest.raises(ValueError, match="got all zeros"):
        encode(weights_NK, format, np.zeros(256, np.float32))


def test_refuses_unknown_format():
    with pytest.raises(NotImplementedError, match=r"Q5_1.* F32, F16, .* IQ4_NL; --method ggml"):
        encode(np.zeros((1, 256), np.float32), "Q5_1")


@pytest.mark.parametrize("format", ["IQ2_XXS", "IQ2_XS", "IQ1_S"])
def test_ggml_says_which_types_demand_an_importance(format):
    with pytest.raises(ValueError, match=f"ggml encodes {format} only under an importance"):
        ggml.encode(data("normal")[:1], format)
    check_method("IQ3_XXS", "ggml", calibrated=False)
    with pytest.raises(ValueError, match="second moments"):
        check_method(format, "ggml", calibrated=False)


def test_ggml_weighs_errors_by_importance_and_refuses_nan():
    """Half of the columns count; ggml would end the process at a NaN."""
    weights_NK, importance_K = data("normal")[:4, :512], np.ones(512, np.float32)
    importance_K[::2] = 1e-3
    weighted, plain = (
        rmse(weights_NK, ggml.encode(weights_NK, "IQ3_S", given), "IQ3_S", importance_K)
        for given in (importance_K, np.ones(512, np.float32))
    )
    assert weighted < 0.95 * plain
    weights_NK[3, 7] = np.nan
    with pytest.raises(ValueError, match="got nan in row 3"):
        ggml.encode(weights_NK, "IQ3_S", importance_K)


@pytest.mark.oracle
@every_data
@every_searched
def test_error_at_most_ggml_live(format, kind):
    weights_NK, constant_K = data(kind), np.ones(1024, np.float32)
    theirs = (
        rmse(weights_NK, ggml.encode(weights_NK, format), format, None),
        rmse(weights_NK, ggml.encode(weights_NK, format, constant_K), format, None),
        rmse(weights_NK, ggml.encode(weights_NK, format, importance()), format, importance()),
    )
    assert theirs == pytest.approx(GGML_RMSE[format, kind], rel=1e-3)
    assert rmse(weights_NK, encode(weights_NK, format), format, None) < min(theirs[:2])
    ours_weighted = rmse(weights_NK, encode(weights_NK, format, importance()), format, importance())
    assert ours_weighted < theirs[2]
