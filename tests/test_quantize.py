"""ggml's encoder as we call it, and what a K-quant's blocks take and hold, against gguf-py."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hobbit_jax.quantize import ggml, gptq
from hobbit_jax.quantize.k_quant_blocks import k_quant, pack
from hobbit_jax.quantize.methods import check_method
from hobbit_jax.quantize.scale_search import find_scales

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
every_k_quant = pytest.mark.parametrize("format", K_QUANTS)

# Bytes of the float16 fields in a block, and of the quants with all the values that fill these
# with one level each: said again from ggml-common.h.
FLOAT16_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
NIBBLES = [value * 0x11 for value in range(16)]
PAIRS = [value * 0x55 for value in range(4)]
QUANTS_AT = {
    "Q2_K": {(16, 80): PAIRS},
    "Q3_K": {(0, 32): [0x00, 0xFF], (32, 96): PAIRS},
    "Q4_K": {(16, 144): NIBBLES},
    "Q5_K": {(16, 48): [0x00, 0xFF], (48, 176): NIBBLES},
    "Q6_K": {(0, 128): NIBBLES, (128, 192): PAIRS},
}


def data(kind: str, n_rows: int = 64) -> np.ndarray:
    rng, shape = np.random.default_rng(7), (n_rows, 256)
    draw = {
        "normal": lambda: rng.standard_normal(shape),
        "student": lambda: rng.standard_t(3, shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
    }
    return draw[kind]().astype(np.float32)


def importance() -> np.ndarray:
    return np.random.default_rng(8).lognormal(0.0, 1.5, 256).astype(np.float32)


def search(
    weights_GW: np.ndarray, format: str, importance_W: np.ndarray | None = None
) -> np.ndarray:
    """Blocks of the weights with the scales that the search finds."""
    weight_GW = importance_W
    if importance_W is not None:
        weight_GW = np.broadcast_to(importance_W / importance_W.max(), weights_GW.shape)
    return pack(*find_scales(weights_GW, weight_GW, k_quant(format)), format)


def decode(blocks_NP: np.ndarray, format: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks_NP, gguf.GGMLQuantizationType[format])


def rmse(
    weights_NK: np.ndarray, blocks_NP: np.ndarray, format: str, importance_K: np.ndarray | None
) -> float:
    error_NK = (weights_NK.astype(np.float64) - decode(blocks_NP, format)) ** 2
    return float(np.sqrt(np.average(error_NK.mean(0), weights=importance_K)))


@pytest.mark.parametrize("kind", ("normal", "student", "uniform"))
@every_k_quant
def test_the_search_errs_less_than_ggml(format, kind):
    """It is where GPTQ starts from."""
    weights_NK, constant_K = data(kind, 1024), np.ones(256, np.float32)
    plain = rmse(weights_NK, search(weights_NK, format), format, None)
    for given_K in (None, constant_K):
        theirs = ggml.encode(weights_NK, format, given_K)
        assert plain < rmse(weights_NK, theirs, format, None)
    ours = rmse(weights_NK, search(weights_NK, format, importance()), format, importance())
    theirs = ggml.encode(weights_NK, format, importance())
    assert ours < rmse(weights_NK, theirs, format, importance())


@pytest.mark.parametrize(
    ("format", "limit"),
    [("Q2_K", 0.2590), ("Q3_K", 0.14351), ("Q4_K", 0.0700), ("Q5_K", 0.03465), ("Q6_K", 0.01664)],
)
def test_its_error_stays_where_it_is(format, limit):
    """0.1 % above our own figures, so that the loss of any step of the search shows."""
    weights_NK = data("normal", 1024)
    found = rmse(weights_NK, search(weights_NK, format), format, None)
    assert 0.997 * limit < found < limit


@every_k_quant
def test_quants_are_the_nearest_levels_under_the_stored_scales(format):
    weights_NK = data("normal", 32)
    blocks_NP = search(weights_NK, format)
    miss_NK = np.abs(weights_NK - decode(blocks_NP, format))
    fields = QUANTS_AT[format]
    for fills in np.stack(np.meshgrid(*fields.values()), -1).reshape(-1, len(fields)):
        level_NP = blocks_NP.copy()
        for (start, stop), fill in zip(fields, fills, strict=True):
            level_NP[:, start:stop] = fill
        other_NK = np.abs(weights_NK - decode(level_NP, format))
        assert (miss_NK <= other_NK + 1e-6).all()


@every_k_quant
@pytest.mark.parametrize("value", (1.0, -1.0, 1e4, -1e4, 0.02, -3e-4))
def test_constant_blocks(format, value):
    """Exact but for the rounding of d, which stands times the largest scale and level."""
    largest = {"Q2_K": 15 * 3, "Q3_K": 32 * 4, "Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 128 * 32}
    if value < 0:  # Held by dmin alone.
        largest |= {"Q2_K": 15, "Q4_K": 63, "Q5_K": 63}
    weights_NK = np.full((2, 256), value, np.float32)
    decoded_NK = decode(search(weights_NK, format), format)
    subnormal_rounding = 2.0**-25 * largest[format]
    np.testing.assert_allclose(decoded_NK, weights_NK, rtol=2**-11, atol=subnormal_rounding)


@every_k_quant
@pytest.mark.parametrize("size", (1e-3, 1e-4, 1e-5, 1e-6))
def test_subnormal_super_scales(format, size):
    """With d in the float16 subnormals, or below them, the grid is only as coarse as it must."""
    weights_NK = data("normal", 16)
    error = rmse(weights_NK, search(weights_NK, format), format, None)
    small_NK = weights_NK * np.float32(size)
    # Steps are multiples of the smallest float16; rounding to these alone would cost `grid`.
    grid = 2.0**-24 / np.sqrt(12)
    bound = np.hypot(1.03 * error * size, 6 * grid)
    assert rmse(small_NK, search(small_NK, format), format, None) < bound


@every_k_quant
def test_zeros_are_zero_bytes(format):
    for size in (0.0, 1e-45, 1e-30, 1e-10):
        assert not search(data("normal", 2) * np.float32(size), format).any()


@every_k_quant
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-2, 8), tail=st.sampled_from([2, 5]))
def test_scaling_by_a_power_of_two_moves_only_the_super_scales(format, seed, exponent, tail):
    weights_NK = np.random.default_rng(seed).standard_t(tail, (2, 256)).astype(np.float32)
    factor = np.float32(2.0**exponent)
    blocks_NP, scaled_NP = search(weights_NK, format), search(weights_NK * factor, format)
    np.testing.assert_array_equal(blocks_NP, search(weights_NK, format))
    for at in FLOAT16_AT[format]:
        half_N = blocks_NP[:, at : at + 2].copy().view(np.float16).astype(np.float32)
        scaled_half_N = scaled_NP[:, at : at + 2].copy().view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(half_N * factor, scaled_half_N)
        blocks_NP[:, at : at + 2] = scaled_NP[:, at : at + 2]
    np.testing.assert_array_equal(blocks_NP, scaled_NP)


@every_k_quant
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
    for importance_K in (None, np.maximum(rng.integers(0, 2, 256), 2.0**-20)):
        decoded_NK = decode(search(weights_NK, format, importance_K), format)
        assert np.isfinite(decoded_NK).all()
        cost_K = np.ones(256) if importance_K is None else importance_K
        error = cost_K @ (weights_NK[0].astype(np.float64) - decoded_NK[0]) ** 2
        assert error <= 1.0001 * cost_K @ weights_NK[0].astype(np.float64) ** 2


@every_k_quant
def test_gptq_refuses_weights_that_no_block_holds(format):
    hessian_KK = np.eye(256)
    for bad in (np.nan, np.inf, -np.inf):
        weights_NK = data("normal", 5)
        weights_NK[3, 200] = bad
        with pytest.raises(ValueError, match=rf"got {bad} in row 3"):
            gptq.encode(weights_NK, format, hessian_KK)
    for size in (2.8e8, 1e20, -3e38):
        weights_NK = data("normal", 5)
        weights_NK[2, 100:110] = size
        weights_NK[2, 105] *= -1
        with pytest.raises(ValueError, match="overflow in row 2"):
            gptq.encode(weights_NK, format, hessian_KK)


def test_gptq_refuses_other_shapes_and_formats():
    for weights, message in (
        (np.zeros(256, np.float32), r"rank 2 .* got shape \(256,\)"),
        (np.zeros((1, 256)), "wanted float32 weights, got float64"),
        (np.zeros((1, 128), np.float32), "multiple of 256, got K=128"),
        (np.zeros((1, 0), np.float32), "got K=0"),
    ):
        with pytest.raises(ValueError, match=message):
            gptq.encode(weights, "Q2_K", np.eye(weights.shape[-1]))
    with pytest.raises(NotImplementedError, match=r"'Q8_0'; .* are Q2_K, .*--method ggml"):
        gptq.encode(np.zeros((1, 256), np.float32), "Q8_0", np.eye(256))


@pytest.mark.parametrize("format", ["IQ2_XXS", "IQ2_XS", "IQ1_S"])
def test_ggml_says_which_types_demand_an_importance(format):
    with pytest.raises(ValueError, match=f"ggml encodes {format} only under an importance"):
        ggml.encode(data("normal", 1), format)
    check_method("IQ3_XXS", "ggml", calibrated=False)
    with pytest.raises(ValueError, match="second moments"):
        check_method(format, "ggml", calibrated=False)


def test_ggml_weighs_errors_by_importance_and_refuses_nan():
    """Half of the columns count; ggml would end the process at a NaN."""
    weights_NK, importance_K = data("normal", 8), np.ones(256, np.float32)
    importance_K[::2] = 1e-3
    weighted, plain = (
        rmse(weights_NK, ggml.encode(weights_NK, "IQ3_S", given), "IQ3_S", importance_K)
        for given in (importance_K, np.ones(256, np.float32))
    )
    assert weighted < 0.95 * plain
    weights_NK[3, 7] = np.nan
    with pytest.raises(ValueError, match="got nan in row 3"):
        ggml.encode(weights_NK, "IQ3_S", importance_K)
