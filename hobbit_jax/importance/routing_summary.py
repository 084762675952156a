"""What a routing profile says of caching, in a few figures per layer.

Owns the figures and their table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hobbit_jax.experts.store import NATIVE, HostExperts
from pallas_kernels.reference import Signature


def entropy_bits_L(uses_LE: np.ndarray) -> np.ndarray:
    """Entropy of each layer's choice, float64 [L]; log2 of the experts if all are used alike."""
    share_LE = uses_LE / np.maximum(uses_LE.sum(axis=1, keepdims=True), 1)
    return -(share_LE * np.log2(np.where(share_LE > 0, share_LE, 1.0))).sum(axis=1)


def favourites_share_L(uses_LE: np.ndarray, fraction: float) -> np.ndarray:
    """Share (0-1) of each layer's uses that its most used `fraction` of experts have, [L]."""
    ordered_LE = np.sort(uses_LE, axis=1)[:, ::-1]
    count = round(fraction * uses_LE.shape[1])
    return ordered_LE[:, :count].sum(axis=1) / np.maximum(uses_LE.sum(axis=1), 1)


def static_hits_L(
    uses_LE: np.ndarray, store: HostExperts, slots: Mapping[Signature, int]
) -> np.ndarray:
    """Share (0-1) of each layer's uses that the most used native experts serve, [L].

    They are chosen once, on the same text: what no static cache of these slots can better.
    """
    hits_L = np.zeros(len(uses_LE))
    bank_L = [store.layer(NATIVE, layer).signature for layer in range(len(uses_LE))]
    for signature, n_slots in slots.items():
        layers = [layer for layer, bank in enumerate(bank_L) if bank == signature]
        hottest = np.argsort(-uses_LE[layers].ravel(), kind="stable")[:n_slots]
        rows, experts = np.unravel_index(hottest, uses_LE[layers].shape)
        for row, expert in zip(rows.tolist(), experts.tolist(), strict=True):
            hits_L[layers[row]] += uses_LE[layers[row], expert]
    return hits_L / np.maximum(uses_LE.sum(axis=1), 1)


def table(uses_LE: np.ndarray, store: HostExperts, slots: Mapping[Signature, int]) -> str:
    """One line a layer, and their mean."""
    columns = [
        entropy_bits_L(uses_LE),
        favourites_share_L(uses_LE, 0.25),
        static_hits_L(uses_LE, store, slots),
    ]
    names = [*map(str, range(len(uses_LE))), "mean"]
    figures = [*zip(*columns, strict=True), [column.mean() for column in columns]]
    lines = ["layer  entropy (bits)  top quarter  static hit rate"]
    for name, (entropy, quarter, hits) in zip(names, figures, strict=True):
        lines.append(f"{name:>5}  {entropy:14.2f}  {quarter:11.3f}  {hits:15.3f}")
    return "\n".join(lines)
