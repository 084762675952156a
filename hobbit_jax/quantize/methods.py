"""Which way an expert's matrix is encoded: by llama.cpp's encoder, or by GPTQ.

Owns the names of the methods, and what happens to an expert that calibration saw too rarely.
"""

from typing import Protocol, cast

import numpy as np

from hobbit_jax.quantize import ggml, gptq
from hobbit_jax.quantize.k_quant_blocks import k_quant
from pallas_kernels.formats import get_format

# ggml weighs errors by a calibration's moments, where there is one. GPTQ runs a calibration's text.
METHODS = ("ggml", "gptq")
# An expert's moments count as if it had seen this many more tokens of its layer's average, so that
# one that calibration hardly met falls back to what all experts of the layer see.
PRIOR_TOKENS = 200


class LayerMoments(Protocol):
    """The second moments of what one layer's experts saw, by the role of a matrix."""

    @property
    def selections_E(self) -> np.ndarray:
        """Tokens behind each expert's moments."""
        ...

    def second_moments_EK(self, role: str) -> np.ndarray:
        """Diagonals of the Hessians."""
        ...


class LayerHessians(LayerMoments, Protocol):
    """The same with all of every Hessian."""

    def hessian_KK(self, role: str, expert: int) -> np.ndarray:
        """The second moment of one matrix's inputs."""
        ...

    def layer_hessian_DD(self) -> np.ndarray:
        """Its sum over the experts, for gate and up."""
        ...

    def drift_NK(self, role: str, expert: int, weights_NK: np.ndarray) -> np.ndarray | None:
        """What `gptq.encode` takes by this name, for native weights; None for nothing."""
        ...


def check_method(format: str, method: str, calibrated: bool = True) -> None:
    """Refuses what `encode_matrix` cannot encode, before anything is computed.

    Raises:
        ValueError: an unknown method, or no calibration where the method, or ggml for this type,
            needs one.
        NotImplementedError: `method` has no encoder for `format`, or ggml is not here.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; want one of {', '.join(METHODS)}")
    if method == "ggml":
        ggml.check_format(format, calibrated)
        return
    if not calibrated:
        raise ValueError(f"method {method} needs a calibration; make one with scripts/calibrate.py")
    k_quant(format)


def gptq_bytes(columns: int) -> int:
    """Host memory for one matrix of so many columns: its Hessian, inverse and factors, float64."""
    return 6 * 8 * columns**2


def importance_K(moments: LayerMoments, role: str, expert: int) -> np.ndarray:
    """How much each input of one matrix matters, [K].

    Gate and up share the layer's input, so the layer's average over experts stands in for a rarely
    chosen one. Hidden neurons of two experts have nothing in common; there one number stands in.
    """
    diagonals_EK = moments.second_moments_EK(role)
    of_layer_K = diagonals_EK.sum(axis=0, dtype=np.float64)
    if role == "ffn_down_exps":
        of_layer_K = np.full_like(of_layer_K, of_layer_K.mean())
    return diagonals_EK[expert] + PRIOR_TOKENS / moments.selections_E.sum() * of_layer_K


def prior_hessian_KK(moments: LayerHessians, role: str, expert: int) -> np.ndarray:
    """The Hessian of one matrix, float64 [K, K], with the same stand-ins as `importance_K`."""
    own_KK = moments.hessian_KK(role, expert).astype(np.float64)
    if role == "ffn_down_exps":
        diagonal = moments.second_moments_EK(role).sum(axis=0, dtype=np.float64).mean()
        of_layer_KK = diagonal * np.eye(len(own_KK))
    else:
        of_layer_KK = moments.layer_hessian_DD()
    return own_KK + PRIOR_TOKENS / moments.selections_E.sum() * of_layer_KK


def rarely_seen(selections_LE: np.ndarray) -> list[str]:
    """What there is to warn of experts that calibration saw fewer than `PRIOR_TOKENS` times.

    A sentence on the whole, then one for each layer with its experts and their tokens, fewest
    first; nothing where all were seen often enough.
    """
    rare_LE = selections_LE < PRIOR_TOKENS
    if not rare_LE.any():
        return []
    lines = [
        f"{rare_LE.sum()} of {rare_LE.size} experts saw fewer than {PRIOR_TOKENS} tokens of the "
        "calibration, so they are encoded by what all experts of their layer see; calibrate on "
        "more text, or on text of more kinds"
    ]
    for layer, rare_E in enumerate(rare_LE):
        experts = [e for e in np.argsort(selections_LE[layer], kind="stable") if rare_E[e]]
        seen = ", ".join(f"{expert}: {selections_LE[layer, expert]}" for expert in experts[:8])
        more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
        if experts:
            lines.append(f"layer {layer}, {len(experts)} experts (expert: tokens): {seen}{more}")
    return lines


def encode_matrix(
    weights_NK: np.ndarray,
    format: str,
    method: str,
    moments: LayerMoments | None,
    role: str,
    expert: int,
) -> np.ndarray:
    """Blocks of one expert's matrix, uint8 [N, row_bytes], the last of a row filled up with zeros.

    ggml: llama.cpp's encoder, which weighs errors by the second moment of each input if there are
    moments. gptq: against the whole second moment, for K-quants; `moments` are then
    `LayerHessians`.

    Raises:
        ValueError: an unknown method, or no moments where it needs some.
        NotImplementedError: `method` has no encoder for `format`.
    """
    check_method(format, method, moments is not None)
    filling = get_format(format).padded(weights_NK.shape[1]) - weights_NK.shape[1]
    columns = (0, 0), (0, filling)
    padded_NK = np.pad(weights_NK, columns)
    if moments is None:
        return ggml.encode(padded_NK, format)
    if method == "ggml":
        weight_K = np.pad(importance_K(moments, role, expert), (0, filling))
        return ggml.encode(padded_NK, format, weight_K)
    seen = cast(LayerHessians, moments)
    hessian_KK = prior_hessian_KK(seen, role, expert)
    if (drift_NK := seen.drift_NK(role, expert, weights_NK)) is not None:
        drift_NK = np.pad(drift_NK, columns)
    # What fills up a block may be anything.
    return gptq.encode(padded_NK, format, np.pad(hessian_KK, (0, filling)), drift_NK)
