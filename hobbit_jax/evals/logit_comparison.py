"""One comparison of two programs' logits on the same tokens.

The reference is P, the program under test is Q: a KL is KL(P || Q). Intervals are 95 %, by
resampling whole windows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hobbit_jax.statistics import Interval, bootstrap


class PositionFigures(NamedTuple):
    """Of each predicted token, [B, T]: nats, nats, and whether both choose the same token."""

    nll_BT: Any
    kl_BT: Any
    agree_BT: Any


@jax.jit
def compare_logits(logits_BTV: Any, reference_BTV: Any, targets_BT: Any) -> PositionFigures:
    """Figures of each position, computed in the precision of the logits, which is the reference's.

    `targets_BT` are the tokens that followed, integers.
    """
    log_q_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    log_p_BTV = jax.nn.log_softmax(reference_BTV, axis=-1)
    nll_BT = -jnp.take_along_axis(log_q_BTV, targets_BT[..., None], axis=-1)[..., 0]
    kl_BT = jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
    agree_BT = jnp.argmax(logits_BTV, axis=-1) == jnp.argmax(reference_BTV, axis=-1)
    return PositionFigures(nll_BT, kl_BT, agree_BT)


def compare_in_float64(
    logits_BTV: np.ndarray, reference_BTV: np.ndarray, targets_BT: np.ndarray
) -> PositionFigures:
    """`compare_logits` in float64, for programs that differ by roundings alone; NumPy arrays.

    Raises:
        ValueError: shapes that do not match, or a logit that is not finite.
    """
    if logits_BTV.shape != reference_BTV.shape or targets_BT.shape != logits_BTV.shape[:-1]:
        raise ValueError(
            f"got logits {logits_BTV.shape} and {reference_BTV.shape} for tokens "
            f"{targets_BT.shape}; want one row of one width for each token"
        )
    for name, values in (("logits", logits_BTV), ("the reference's logits", reference_BTV)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} are not all finite; want numbers")
    exact = logits_BTV.astype(np.float64), reference_BTV.astype(np.float64)
    with jax.enable_x64(True):
        return jax.device_get(compare_logits(*exact, targets_BT))


@dataclass(frozen=True)
class Comparison:
    """Figures over all tokens of some windows, named as a record names them."""

    evaluation_tokens: int
    bits_per_byte: Interval | None  # of text
    perplexity: Interval  # of a token
    kl_mean_nats: Interval
    kl_p99_nats: Interval
    kl_p999_nats: Interval
    top1_agreement: Interval
    kl_nats_W: tuple[float, ...]  # mean of each window, so that plans can be compared within them


def summarize(
    parts: Sequence[PositionFigures], target_bytes_WT: np.ndarray | None = None
) -> Comparison:
    """Figures of the compared batches of windows, in their order.

    `target_bytes_WT`, the UTF-8 bytes of each target, give bits per byte.
    """
    nll_WT, kl_WT, agree_WT = (np.concatenate(part) for part in zip(*parts, strict=True))
    nll_W = nll_WT.sum(axis=1, dtype=np.float64)
    count, width = nll_WT.shape
    interval = functools.partial(bootstrap, n_units=count)
    bits_per_byte = None
    if target_bytes_WT is not None:
        bytes_W = target_bytes_WT.sum(axis=1, dtype=np.float64)
        bits_per_byte = interval(lambda w: nll_W[w].sum() / np.log(2) / bytes_W[w].sum())
    return Comparison(
        evaluation_tokens=nll_WT.size,
        bits_per_byte=bits_per_byte,
        perplexity=interval(lambda w: np.exp(nll_W[w].sum() / (width * len(w)))),
        kl_mean_nats=interval(lambda w: kl_WT[w].mean(dtype=np.float64)),
        kl_p99_nats=interval(lambda w: np.quantile(kl_WT[w], 0.99)),
        kl_p999_nats=interval(lambda w: np.quantile(kl_WT[w], 0.999)),
        top1_agreement=interval(lambda w: agree_WT[w].mean(dtype=np.float64)),
        kl_nats_W=tuple(float(f"{kl:.5g}") for kl in kl_WT.mean(axis=1, dtype=np.float64)),
    )
