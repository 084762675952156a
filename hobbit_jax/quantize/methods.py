"""Which way an expert's matrix is encoded: without calibration, or by what calibration saw of it.

Owns the names of the methods, and what happens to an expert that calibration saw too rarely. All
methods write the same standard blocks.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hobbit_jax.quantize import encoder, ggml, hessian

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
    """What an encoder wants of a `hobbit_jax.signals.calibration.Calibration`.

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
        """[L, E, D] or [L, E, D, D]."""
        ...

    @property
    def hidden_moments(self) -> np.ndarray | None:
        """[L, E, F] or [L, E, F, F]."""
        ...

    @property
    def selections_LE(self) -> np.ndarray:
        """Tokens behind each expert's moments."""
        ...


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
    moments = calibration.hidden_moments if hidden else calibration.input_moments
    if moments is None or (full and moments.ndim != 4):
        raise ValueError(
            f"the calibration has no {'hessian' if full else 'second_moment'} statistics; make one "
            f"with --statistics={'hessian' if full else 'second_moment'}"
        )
    own, of_layer = moments[layer, expert], moments[layer]
    if moments.ndim == 4 and not full:
        own, of_layer = np.diagonal(own), np.diagonal(of_layer, axis1=1, axis2=2)
    per_token = of_layer.sum(axis=0, dtype=np.float64) / calibration.selections_LE[layer].sum()
    if hidden:
        diagonal = np.diagonal(per_token) if full else per_token
        per_token = diagonal.mean() * (np.eye(len(diagonal)) if full else np.ones(len(diagonal)))
    return own.astype(np.float64) + PRIOR_TOKENS * per_token


def encode_matrix(
    weights_NK: np.ndarray,
    format: str,
    method: str,
    calibration: CalibratedMoments | None,
    role: str,
    layer: int,
    expert: int,
) -> np.ndarray:
    """Blocks of one expert's matrix, uint8 [N, row_bytes].

    rtn: the best rounding of the weights alone (`encoder`). importance: weighted by the second
    moment of each input (`encoder`). gptq: against the whole second moment (`hessian`), for
    K-quants. ggml: llama.cpp's encoder under the same importance, as a rival (`ggml`).

    Raises:
        ValueError: an unknown method; no calibration, or one without the statistics that it needs.
        NotImplementedError: `method` has no encoder for `format`.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; want one of {', '.join(METHODS)}")
    if method == "rtn":
        return encoder.encode(weights_NK, format)
    if calibration is None:
        raise ValueError(f"method {method} needs a calibration; make one with scripts/calibrate.py")
    importance = moment(calibration, role, layer, expert, full=method == "gptq")
    if method == "gptq":
        return hessian.encode(weights_NK, format, importance)
    if method == "importance":
        return encoder.encode(weights_NK, format, importance)
    return ggml.encode(weights_NK, format, importance.astype(np.float32))
