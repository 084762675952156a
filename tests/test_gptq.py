"""The Hessian-based encoder: GPTQ by its definition, and what its refinement promises."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from hobbit_jax.quantize import ggml, gptq
from hobbit_jax.quantize.k_quant_blocks import k_quant, pack
from hobbit_jax.quantize.scale_search import find_scales
from pallas_kernels.formats import KQuant

# Of every test here: each further shape compiles for ten seconds. Two super-blocks a row.
N, K = 8, 512
# Q4_K is Q5_K with a bit less; Q6_K's scales are Q3_K's.
FORMATS = ("Q2_K", "Q3_K", "Q5_K")


def correlated(n_columns: int, seed: int = 0) -> np.ndarray:
    """Σ x·xᵀ of 4 · K inputs that share a few directions, as activations do."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n_columns, n_columns)) * np.linspace(1, 0.05, n_columns)[:, None]
    inputs = rng.standard_normal((4 * n_columns, n_columns)) @ mixing
    return inputs.T @ inputs


def weights(n_rows: int, n_columns: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n_rows, n_columns)).astype(np.float32)


def decode(blocks_NP: np.ndarray, format: str) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[format]
    return gguf.quants.dequantize(blocks_NP, kind).astype(np.float64)


def objective(weights_NK: np.ndarray, decoded_NK: np.ndarray, hessian_KK: np.ndarray) -> float:
    miss_NK = weights_NK - decoded_NK
    return float(np.einsum("nk,kl,nl->", miss_NK, hessian_KK, miss_NK, optimize=True))


def obq(weights_NK: np.ndarray, hessian_KK: np.ndarray, levels_NKV: np.ndarray) -> np.ndarray:
    """GPTQ as its paper's equations say it: H⁻¹ loses a row and a column with every rounding."""
    moved_NK, inverse_KK = weights_NK.astype(np.float64), np.linalg.inv(hessian_KK)
    decoded_NK = np.zeros_like(moved_NK)
    for i in range(moved_NK.shape[1]):
        nearest_N = np.abs(moved_NK[:, i, None] - levels_NKV[:, i]).argmin(axis=1)
        decoded_NK[:, i] = levels_NKV[np.arange(len(nearest_N)), i, nearest_N]
        error_N = (moved_NK[:, i] - decoded_NK[:, i]) / inverse_KK[i, i]
        moved_NK[:, i + 1 :] -= error_N[:, None] * inverse_KK[i, i + 1 :]
        inverse_KK -= np.outer(inverse_KK[:, i], inverse_KK[i]) / inverse_KK[i, i]
    return decoded_NK


def fed_forward(weights_NK: np.ndarray, damped_KK: np.ndarray, quant: KQuant):
    upper_KK, h_KK = gptq._upper_factor(damped_KK), jnp.asarray(damped_KK, jnp.float32)
    return gptq._feed_errors_forward(jnp.asarray(weights_NK.T), h_KK, upper_KK, quant)


@pytest.mark.parametrize("format", ("Q2_K", "Q3_K"))
def test_error_feedback_is_gptq(format):
    """Across the border of two super-blocks; the scales are taken as found."""
    quant, weights_NK = k_quant(format), weights(N, K)
    hessian_KK, _ = gptq._conditioned(correlated(K), K)
    blocks = fed_forward(weights_NK, hessian_KK, quant)
    q_V = np.arange(quant.q_range[0], quant.q_range[1] + 1)
    levels, found = [], []
    for block in blocks:
        step_NK, low_NK = (
            np.repeat(np.asarray(part_JN, np.float64).T, quant.sub_len, axis=1)
            for part_JN in (
                block.d_N[None] * block.scale_JN,
                -block.dmin_N[None] * block.offset_JN,
            )
        )
        levels.append(step_NK[..., None] * q_V + low_NK[..., None])
        found.append(step_NK * np.asarray(block.q_WN).T + low_NK)
    wanted_NK = obq(weights_NK, hessian_KK, np.concatenate(levels, axis=1))
    found_NK = np.concatenate(found, axis=1)
    # A weight within float32's rounding of two levels' middle may fall to either, and what follows
    # in its row then differs too.
    same_N = (np.abs(found_NK - wanted_NK) < 1e-5).all(axis=1)
    assert same_N.sum() >= N - 1
    assert objective(weights_NK, found_NK, hessian_KK) == pytest.approx(
        objective(weights_NK, wanted_NK, hessian_KK), rel=0.02
    )


@pytest.mark.parametrize(
    "format",
    [pytest.param(f, marks=[] if f == "Q2_K" else pytest.mark.slow) for f in FORMATS],
)
def test_objective_falls_at_every_step(format):
    weights_NK, hessian_KK = weights(N, K), correlated(K)
    damped_KK, _ = gptq._conditioned(hessian_KK, K)
    quant = k_quant(format)
    blocks = fed_forward(weights_NK, damped_KK, quant)
    fed_NK = np.concatenate([np.asarray(gptq._decoded_WN(b, quant)).T for b in blocks], axis=1)
    refined = objective(
        weights_NK, decode(gptq.encode(weights_NK, format, hessian_KK), format), damped_KK
    )
    fed = objective(weights_NK, fed_NK, damped_KK)
    diagonal_K = np.diagonal(damped_KK).astype(np.float32)
    weighed = decode(ggml.encode(weights_NK, format, diagonal_K), format)
    assert refined < 0.95 * fed
    assert fed < 0.9 * objective(weights_NK, weighed, damped_KK)


@pytest.mark.parametrize("format", FORMATS)
def test_hardly_a_quant_can_be_moved_to_gain(format):
    """Each weight on its own, its scales as stored, under the exact objective.

    Not none: the descent ends after a few sweeps, and a later move may have opened an earlier one.
    """
    weights_NK, gains = weights(N, K), []
    hessian_KK, _ = gptq._conditioned(correlated(K), K)
    blocks_NP = gptq.encode(weights_NK, format, correlated(K))
    decoded_NK = decode(blocks_NP, format)
    quant = k_quant(format)
    # The step of a sub-block shows in the decoded weights: their smallest distance.
    gain_NK = (weights_NK - decoded_NK) @ hessian_KK
    for row in range(N):
        for j in range(K // quant.sub_len):
            part = slice(j * quant.sub_len, (j + 1) * quant.sub_len)
            levels = np.unique(decoded_NK[row, part])
            if len(levels) < 2:
                continue
            step = np.diff(levels).min()
            curve = np.diagonal(hessian_KK)[part]
            inside = (decoded_NK[row, part] > levels[0]) & (decoded_NK[row, part] < levels[-1])
            for move in (step, -step):
                change = curve * move**2 - 2 * move * gain_NK[row, part]
                gains.append(change[inside] < -1e-3 * curve[inside] * step**2)
    assert np.concatenate(gains).size > 1000
    assert np.concatenate(gains).mean() < 0.01


@pytest.mark.parametrize(
    "format", [*FORMATS, *(pytest.param(f, marks=pytest.mark.slow) for f in ("Q4_K", "Q6_K"))]
)
def test_without_correlation_it_is_the_plain_search_or_better(format):
    weights_NK = weights(N, K)
    found = pack(*find_scales(weights_NK.reshape(-1, 256), None, k_quant(format)), format)
    plain = ((weights_NK - decode(found.reshape(N, -1), format)) ** 2).sum()
    found = decode(gptq.encode(weights_NK, format, np.eye(K)), format)
    assert ((weights_NK - found) ** 2).sum() <= plain * 1.0001


def test_other_outputs_can_be_wanted():
    """Those of inputs that have lost something since: then the weights aimed at are a ridge's."""
    rng, weights_NK = np.random.default_rng(3), weights(N, K)
    x_RK = rng.standard_normal((4 * K, K)) @ rng.standard_normal((K, K)) / np.sqrt(K)
    seen_RK = 0.7 * x_RK + 0.2 * rng.standard_normal(x_RK.shape)
    wanted_RN, hessian_KK = x_RK @ weights_NK.T, seen_RK.T @ seen_RK
    drift_NK = (wanted_RN - seen_RK @ weights_NK.T).T @ seen_RK

    def missed(decoded_NK: np.ndarray) -> float:
        return ((wanted_RN - seen_RK @ decoded_NK.T) ** 2).sum() / (wanted_RN**2).sum()

    damping = gptq.DAMPING * np.diagonal(hessian_KK).mean() * np.eye(K)
    ridge_NK = weights_NK + np.linalg.solve(hessian_KK + damping, drift_NK.T).T
    found_NK = decode(gptq.encode(weights_NK, "Q6_K", hessian_KK, drift_NK), "Q6_K")
    step = np.abs(ridge_NK).max() / 32
    assert np.abs(found_NK - ridge_NK).max() < step < 0.5 * np.abs(weights_NK - ridge_NK).max()
    assert missed(found_NK) == pytest.approx(missed(ridge_NK), rel=0.01)
    plain_NK = decode(gptq.encode(weights_NK, "Q6_K", hessian_KK), "Q6_K")
    assert missed(found_NK) < 0.7 * missed(plain_NK)
    for wrong_NK in (drift_NK[:, 1:], np.full_like(drift_NK, np.nan)):
        with pytest.raises(ValueError, match=r"wanted a finite drift \(8, 512\)"):
            gptq.encode(weights_NK, "Q6_K", hessian_KK, wrong_NK)


def test_zeros_and_no_rows():
    zeros_NK = np.zeros((N, K), np.float32)
    assert not gptq.encode(zeros_NK, "Q2_K", correlated(K)).any()
    assert gptq.encode(zeros_NK[:0], "Q2_K", correlated(K)).shape == (0, 168)


def test_inputs_never_seen_do_not_break_it():
    """Calibration that met fewer tokens than columns: a singular H."""
    few_NK = np.random.default_rng(2).standard_normal((5, K))
    few_NK[:, 7] = 0
    blocks_NP = gptq.encode(weights(N, K), "Q2_K", few_NK.T @ few_NK)
    assert np.isfinite(decode(blocks_NP, "Q2_K")).all()


def test_refusals():
    weights_NK = weights(2, 256)
    with pytest.raises(NotImplementedError, match=r"'Q4_0'; .* Q2_K, Q3_K"):
        gptq.encode(weights_NK, "Q4_0", np.eye(256))
    with pytest.raises(ValueError, match=r"\[256, 256\], got \(255, 255\)"):
        gptq.encode(weights_NK, "Q2_K", np.eye(255))
    for bad in (np.zeros((256, 256)), -np.eye(256), np.full((256, 256), np.nan)):
        with pytest.raises(ValueError, match="wanted a Hessian that is finite"):
            gptq.encode(weights_NK, "Q2_K", bad)
    with pytest.raises(ValueError, match="multiple of 256, got K=128"):
        gptq.encode(weights_NK[:, :128].copy(), "Q2_K", np.eye(128))
    weights_NK[1, 9] = np.inf
    with pytest.raises(ValueError, match="got inf in row 1"):
        gptq.encode(weights_NK, "Q2_K", np.eye(256))
