"""Which way an expert's matrix is encoded: without calibration, or by what calibration saw of it.

Owns the names of the methods, and what happens to an expert that calibration saw too rarely. All
methods write the same standard blocks.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hobbit_jax.quantize import encoder, ggml, gptq
from pallas_kernels.formats import get_format

METHODS = ("rtn", "importance", "gptq", "ggml")
NEEDED_STATISTICS = {
    "rtn": None,
    "importance": "second_moment",
    "gptq": "hessian",
    "ggml": "second_moment",
}
# An expert's moments count as if it had seen this many more tokens of its layer's average, so that
# one that calibration hardly met falls back to what all experts of the layer see.
PRIOR_TOKENS = 200


class CalibratedMoments(Protocol):
    """What an encoder wants of a `hobbit_jax.importance.calibration.Calibration`.

    That module runs an engine; this room must not.
    """

    @property
    def model_sha256(self) -> str:
        """Of the model it was made for."""
        ...

    @property
    def sha256(self) -> str:
        """Identity of the calibration."""
        ...

    @property
    def input_moments(self) -> np.ndarray | None:
        """Diagonals of gate's and up's Hessians, [L, E, D]."""
        ...

    @property
    def hidden_moments(self) -> np.ndarray | None:
        """Diagonals of down's, [L, E, F]."""
        ...

    def hessian_KK(self, role: str, layer: int, expert: int) -> np.ndarray:
        """The second moment of one matrix's inputs, [K, K]. ValueError if there are none."""
        ...

    def layer_hessian_DD(self, layer: int) -> np.ndarray:
        """Its sum over a layer's experts, for gate and up."""
        ...

    @property
    def selections_LE(self) -> np.ndarray:
        """Tokens behind each expert's moments."""
        ...


def check_method(format: str, method: str, calibrated: bool = True) -> None:
    """Refuses what `encode_matrix` cannot encode, before anything is computed.

    Raises:
        ValueError: an unknown method, or no calibration for a type that ggml encodes only with one.
        NotImplementedError: `method` has no encoder for `format`, or ggml is not here.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; want one of {', '.join(METHODS)}")
    if method == "ggml":
        ggml.check_format(format, calibrated)
    elif method == "gptq":
        gptq.check_format(format)
    else:
        encoder.check_format(format)


def gptq_bytes(columns: int) -> int:
    """Host memory for one matrix of so many columns: its Hessian, inverse and factors, float64."""
    return 6 * 8 * columns**2


def moment(
    calibration: CalibratedMoments, role: str, layer: int, expert: int, full: bool
) -> np.ndarray:
    """The second moment of one matrix's inputs, [K, K], or its diagonal [K].

    Gate and up share the layer's input, so the layer's average over experts stands in for a rarely
    chosen one. Hidden neurons of two experts have nothing in common; there a multiple of the
    identity stands in.

    Raises:
        ValueError: the calibration lacks this statistic.
    """
    hidden = role == "ffn_down_exps"
    diagonals = calibration.hidden_moments if hidden else calibration.input_moments
    if diagonals is None:
        raise ValueError(
            "the calibration has routing counts alone; make one with --statistics=second_moment, "
            "or with --statistics=hessian for method gptq"
        )
    of_layer_K = diagonals[layer].sum(axis=0, dtype=np.float64)
    if hidden:
        of_layer_K = np.full_like(of_layer_K, of_layer_K.mean())
    tokens = calibration.selections_LE[layer].sum()
    if not full:
        return diagonals[layer, expert] + PRIOR_TOKENS / tokens * of_layer_K
    own_KK = calibration.hessian_KK(role, layer, expert).astype(np.float64)
    of_layer_KK = np.diag(of_layer_K) if hidden else calibration.layer_hessian_DD(layer)
    return own_KK + PRIOR_TOKENS / tokens * of_layer_KK


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
    calibration: CalibratedMoments | None,
    role: str,
    layer: int,
    expert: int,
) -> np.ndarray:
    """Blocks of one expert's matrix, uint8 [N, row_bytes], the last of a row filled up with zeros.

    rtn: the best rounding of the weights alone (`encoder`). importance: weighted by the second
    moment of each input (`encoder`). gptq: against the whole second moment (`hessian`), for
    K-quants. ggml: llama.cpp's encoder, under the same importance if there is a calibration
    (`ggml`).

    Raises:
        ValueError: an unknown method; no calibration, or one without the statistics that it needs.
        NotImplementedError: `method` has no encoder for `format`.
    """
    check_method(format, method, calibration is not None)
    filling = get_format(format).padded(weights_NK.shape[1]) - weights_NK.shape[1]
    weights_NK = np.pad(weights_NK, ((0, 0), (0, filling)))
    if method == "rtn":
        return encoder.encode(weights_NK, format)
    if method == "ggml" and calibration is None:
        return ggml.encode(weights_NK, format)
    if calibration is None:
        raise ValueError(f"method {method} needs a calibration; make one with scripts/calibrate.py")
    importance = moment(calibration, role, layer, expert, full=method == "gptq")
    importance = np.pad(importance, (0, filling))  # what fills up a block may be anything
    if method == "gptq":
        return gptq.encode(weights_NK, format, importance)
    if method == "importance":
        return encoder.encode(weights_NK, format, importance)
    return ggml.encode(weights_NK, format, importance.astype(np.float32))
